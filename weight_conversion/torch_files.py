"""Read and write torch files without running anything that they hold (spec 01 §3.5).

Reading is ``torch.load(weights_only=True)`` with a fixed list of additions, after the container has
been checked, and nothing else. Tensors stay memory-mapped: a file larger than memory can be read.
"""

import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from panther_jax.base.errors import PantherError
from panther_jax.base.files import writing
from panther_jax.store.pickles import (
    MAX_ENTRIES,
    NUMERIC_BUILDERS,
    StandInArray,
    has_too_many_entries,
)

try:
    import torch
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "nnU-Net weights need PyTorch; install it with pip install 'panther-jax[nnunet]'"
    ) from None

SIGNATURES = (
    (b"\x89HDF", "an HDF5 file (Keras or another framework's)"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run git lfs pull"),
    (b"<", "an HTML or XML page, probably a failed download"),
)
ENTRIES = (
    "network_weights",
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
)
BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")


class TorchFileError(PantherError, ValueError):
    """A file that is not a readable torch checkpoint, or that is not safe to read."""


@dataclass(frozen=True)
class TorchCheckpoint:
    """A checkpoint: weights by state-dict key (views of the mapped file) and its other entries."""

    path: Path
    weights: Mapping[str, np.ndarray]
    entries: Mapping[str, Any]

    def init_arg(self, name: str) -> Any:
        """One of the trainer's constructor arguments, or None."""
        arguments = self.entries.get("init_args")
        return arguments.get(name) if isinstance(arguments, Mapping) else None

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Axes that the predictor may mirror."""
        axes = self.entries.get("inference_allowed_mirroring_axes")
        return () if axes is None else tuple(int(a) for a in axes)


def read_checkpoint(path: Path) -> TorchCheckpoint:
    """Read an nnU-Net checkpoint, or a bare state dict; nothing in it is executed.

    Raises:
        FileNotFoundError, TorchFileError: saying what is wrong with the file.
    """
    content = read_torch(path)
    if not isinstance(content, Mapping):
        raise TorchFileError(
            f"{path} holds a {type(content).__name__}, expected a checkpoint (a dictionary)"
        )
    weights = content.get("network_weights")
    entries = {k: v for k, v in content.items() if k != "network_weights"}
    if weights is None and content and all(torch.is_tensor(v) for v in content.values()):
        weights, entries = content, {}
    if not isinstance(weights, Mapping):
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise TorchFileError(
            f"{path} is not an nnU-Net v2 checkpoint: it has no 'network_weights', only {keys}\n"
            "  Expected a checkpoint_final.pth or checkpoint_best.pth of nnU-Net v2."
        )
    statistics = next((k for k in weights if str(k).endswith(BATCH_NORM)), None)
    if statistics is not None:
        raise TorchFileError(
            f"{path} is of a network with batch norm (it holds {statistics!r}), as "
            "nnUNetTrainerBN makes it, which is not supported\n  Expected instance norm, nnU-Net's "
            "default; docs/from-nnunet.md lists what is not supported."
        )
    return TorchCheckpoint(path, {str(k): _array(path, k, v) for k, v in weights.items()}, entries)


def _array(path: Path, name: Any, tensor: Any) -> np.ndarray:
    if (
        not torch.is_tensor(tensor)
        or tensor.layout != torch.strided
        or not tensor.is_floating_point()
    ):
        kind = f"{tensor.dtype} tensor" if torch.is_tensor(tensor) else type(tensor).__name__
        raise TorchFileError(f"{path}: weight {name!r} is a {kind}, expected float32")
    return tensor.detach().to(torch.float32).numpy()


def read_torch(path: Path) -> Any:
    """Whatever a torch file holds, tensors memory-mapped on the CPU.

    Raises:
        FileNotFoundError, TorchFileError: saying what is wrong with the file.
    """
    check_container(path)
    with _allowed():
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as error:  # the pickle is damaged or uses opcodes that torch never writes
            raise TorchFileError(_unreadable(path, error)) from None
        if unsafe:
            named = _places(path, set(unsafe))
            raise TorchFileError(
                f"{path} was refused: it asks for {named}, which is not in the "
                "list of harmless types\n  Such a file can run code when loaded the usual way; "
                "none of it was run. Get the weights from a source you trust."
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for damaged files
            raise TorchFileError(_unreadable(path, error)) from None
    if has_too_many_entries(content):
        raise TorchFileError(
            f"{path} was refused: it holds more than {MAX_ENTRIES} entries, most of them the "
            "same again\n  No nnU-Net checkpoint does; get it from a source you trust."
        )
    try:
        return _data(content)
    except Exception as error:  # a crafted file: stand-ins without content, endless nesting
        raise TorchFileError(_unreadable(path, error)) from None


@contextmanager
def _allowed() -> Iterator[None]:
    """What nnU-Net's log and arguments hold besides tensors: NumPy values, slices, paths.

    NumPy's names, old and new, stand for builders of ours, which check what they make: its own
    would trust the state of a forged type.
    """
    additions: list[Any] = [(slice, "builtins.slice")]
    for (module, name), build in NUMERIC_BUILDERS.items():
        additions.append((build, f"{module}.{name}"))
        additions.append((build, f"{module}.{name}".replace("numpy._core", "numpy.core")))
    for module in ("pathlib", "pathlib._local"):
        for kind in ("PurePosixPath", "PosixPath"):
            additions.append((PurePosixPath, f"{module}.{kind}"))
        for kind in ("PureWindowsPath", "WindowsPath"):
            additions.append((PureWindowsPath, f"{module}.{kind}"))
    with torch.serialization.safe_globals(additions):
        yield


def _places(path: Path, names: set[str]) -> str:
    """Where a pickle first asks for each name: the entry, and the text read before it.

    The pickle is only parsed.
    """
    with zipfile.ZipFile(path) as archive:
        member = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        data = archive.read(member)
    entry, before, found = "", "", {}
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if name in names and name not in found:
                after = f" after {before[:80]!r}" if before != entry else ""
                found[name] = f"{name} (in {entry!r}{after})" if before else name
        elif "UNICODE" in operation.name:
            before = str(argument)
            entry = before if before in ENTRIES else entry
    return ", ".join(found.get(name, name) for name in sorted(names))


def _data(value: Any) -> Any:
    """Plain arrays and texts in the place of stand-ins and paths."""
    if isinstance(value, StandInArray):
        return value.array
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return type(value)({_data(k): _data(v) for k, v in value.items()})  # type: ignore[call-arg]
    if type(value) in (list, tuple):
        return type(value)(_data(v) for v in value)
    return value


def _unreadable(path: Path, error: Exception) -> str:
    text = str(error).strip().splitlines()
    reason = text[0][:200] if text else ""
    for line in text:
        if "WeightsUnpickler error" in line:
            reason = line.strip()[:200]
    return (
        f"{path} was refused: PyTorch's safe loader cannot read it ({type(error).__name__}: "
        f"{reason})"
        "\n  It is damaged, or holds more than weights; none of it was run."
    )


# ----------------------------------------------------------------------------------- container


def check_container(path: Path) -> None:
    """Make sure that a file is a complete zip as ``torch.save`` writes it, without unpickling.

    Raises:
        FileNotFoundError, TorchFileError: saying what the file is instead.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise TorchFileError(f"{path} is a folder, expected a checkpoint file (.pth)")
    size = path.stat().st_size
    if size == 0:
        raise TorchFileError(f"{path} is empty (0 bytes); copy or download it again")
    with path.open("rb") as file:
        head = file.read(512)
    if not head.startswith(b"PK"):
        raise TorchFileError(f"{path} is not a torch checkpoint: {_foreign(head, size)}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            damaged = archive.testzip()
    except TorchFileError:
        raise
    except Exception as error:  # zipfile raises many types for damaged directories
        raise TorchFileError(
            f"{path} is truncated or damaged ({error}; it has {size} bytes); copy or download it "
            "again"
        ) from None
    if damaged is not None:
        raise TorchFileError(
            f"{path} is damaged: the checksum of {damaged!r} is wrong; copy or download it again"
        )


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        raise TorchFileError(f"{path} is not a torch checkpoint: it is a NumPy archive (.npz)")
    if "model.weights.h5" in names or "metadata.json" in names:
        raise TorchFileError(f"{path} is not a torch checkpoint: it is a Keras model")
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") for name in names):
        raise TorchFileError(
            f"{path} is a TorchScript program, not a checkpoint; import the checkpoint that it was "
            "made from"
        )
    if len(pickles) != 1:
        inside = ", ".join(names[:5]) or "nothing"
        hint = "; unpack it first" if any(name.endswith(".pth") for name in names) else ""
        raise TorchFileError(
            f"{path} is a zip archive, but not a torch checkpoint: it holds {inside}{hint}"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise TorchFileError(
            f"{path} is compressed, which torch.save never does; it was refused. Unpack it, or "
            "take the original file."
        )


def _foreign(head: bytes, size: int) -> str:
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return (
            "it is a bare pickle, perhaps in the format of PyTorch before 1.6, which is not read "
            "because reading could run code\n  If you trust it, open and save it again with a "
            "PyTorch of today."
        )
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and length < max(size, 1):
        return "it is a safetensors file; bundles are used as they are, without importing"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it"
    for signature, what in SIGNATURES:
        if head.startswith(signature):
            return f"it is {what}"
    return (
        f"its first bytes are {head[:8].hex(' ')}, expected a zip archive as torch.save writes it"
    )


# ------------------------------------------------------------------------------------- writing


def make_state_dict(
    tensors: Mapping[str, np.ndarray], keys: tuple[tuple[str, str], ...]
) -> "OrderedDict[str, Any]":
    """A state dict with all its names; names of one tensor share its memory, also in the file."""
    made = {name: make_tensor(array) for name, array in tensors.items()}
    return OrderedDict((key, made[name]) for key, name in keys)


def make_tensor(array: np.ndarray) -> Any:
    """A contiguous float32 tensor with the array's values; never a view of a larger array."""
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def cpu_device() -> Any:
    """The device that checkpoints name."""
    return torch.device("cpu")


def write_torch(path: Path, content: Any) -> None:
    """Write by a temporary name and a rename, so that the file is whole or not there."""
    with writing(path) as temporary:
        torch.save(content, temporary)
