"""nnU-Net's own preprocessed folders read as they are: ``.b2nd``, ``.npz``, ``.npy``, and ``.pkl``.

The only place where a pickle is read or written (00 §0.3). It is read by an unpickler that builds
builtin containers, numbers and numeric NumPy arrays, and nothing else: whatever else a file names
is refused before anything of it runs.
"""

import io
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.plans import (
    Geometry,
    LabelValue,
    Plans,
    PlansError,
    Properties,
    read_json,
    read_object,
    resolve_configuration,
)

DATASET = "dataset.json"
GROUND_TRUTHS = "gt_segmentations"
MAX_ENTRIES = 3_000_000
PLANS_KEYS = ("plans_name", "configurations", "transpose_forward")

logger = logging.getLogger("panther_jax")


class StoreError(ValueError):
    """A store, a stored case or a split file that cannot be used; the message names the file."""


@dataclass(frozen=True)
class NnunetFolder:
    """A preprocessed folder: its plans and dataset.json lie in the folder above."""

    folder: Path
    plans: Plans
    dataset: dict[str, Any]
    case_ids: tuple[str, ...]


@dataclass(frozen=True)
class NnunetCase:
    """What nnU-Net stored of a case; locations are z, y, x in the order of the file."""

    image: np.ndarray
    label: np.ndarray
    locations: tuple[tuple[LabelValue, np.ndarray], ...]
    properties: Properties


# ------------------------------------------------------------------------------------- folders


def is_nnunet_folder(folder: Path) -> bool:
    """Tell whether a folder holds cases as nnU-Net stores them."""
    return folder.is_dir() and bool(_case_ids(folder))


def open_folder(folder: Path) -> NnunetFolder:
    """Read plans, dataset.json and the list of cases.

    Several plans can share a folder; those that it is named after are taken, and the log says so.

    Raises:
        FileNotFoundError: if no plans in the folder above make this folder.
    """
    folder = folder.resolve()
    dataset = read_object(folder.parent / DATASET)
    plans, configuration = _plans_of(folder)
    return NnunetFolder(
        folder, Plans.from_nnunet(plans, dataset, configuration), dataset, _case_ids(folder)
    )


def _case_ids(folder: Path) -> tuple[str, ...]:
    return tuple(
        sorted(p.stem for p in folder.glob("*.pkl") if _array_file(folder, p.stem) is not None)
    )


def _array_file(folder: Path, case_id: str) -> Path | None:
    # spec 02 §4.8: an unpacked .npy lies beside its .npz and holds the same
    files = (folder / f"{case_id}{ending}" for ending in (".b2nd", ".npy", ".npz"))
    return next((f for f in files if f.is_file()), None)


def _plans_of(folder: Path) -> tuple[dict[str, Any], str]:
    found = []
    for path in sorted(folder.parent.glob("*.json")):
        plans = _plans_json(path)
        for name in plans.get("configurations", ()):
            entry = resolve_configuration(plans, name)
            if entry.get("data_identifier") == folder.name:
                named_after = f"{plans['plans_name']}_{name}" == folder.name
                inherited = "inherits_from" in entry
                found.append((not named_after, inherited, path.name, name, plans))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds cases of nnU-Net, but no plans file in {folder.parent} has a "
            f"configuration with data_identifier {folder.name!r}\n  Copy the plans (and "
            "dataset.json) there, under the folder's own name."
        )
    found.sort(key=lambda item: item[:4])
    _, _, file, name, plans = found[0]
    if len(found) > 1:
        others = ", ".join(f"{i[2]} {i[3]}" for i in found[1:])
        logger.info("%s: taken for %s of %s (also made by %s)", folder, name, file, others)
    return plans, name


def _plans_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except PlansError:
        return {}
    return value if isinstance(value, dict) and all(k in value for k in PLANS_KEYS) else {}


# --------------------------------------------------------------------------------------- cases


def read_folder_case(source: NnunetFolder, case_id: str) -> NnunetCase:
    """Read one case; ``.npy`` files are memory-mapped, others read whole.

    Raises:
        StoreError: if a file is missing, damaged, or not what nnU-Net writes.
        ModuleNotFoundError: naming what reads ``.b2nd`` files, where it is not installed.
    """
    path = _array_file(source.folder, case_id)
    if path is None:
        raise StoreError(f"case {case_id!r} is not in {source.folder}; run nnU-Net's preprocessing")
    read = {".b2nd": _read_b2nd, ".npz": _read_npz, ".npy": _read_npy}[path.suffix]
    try:
        image, label = read(path)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} cannot be read: {type(error).__name__}: {error}\n"
            "  Is it complete? Run nnU-Net's preprocessing again."
        ) from None
    _check_arrays(image, label, path)
    pickled = path.with_suffix(".pkl")
    entry = read_pickle(pickled)
    try:
        properties = _properties(entry, source.plans)
        locations = _locations(entry.get("class_locations") or {})
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreError(
            f"{pickled} is not what nnU-Net's SimpleITKIO leads to: {type(error).__name__}: {error}"
            "\n  Preprocess the raw dataset with panther_jax.preprocess instead."
        ) from None
    return NnunetCase(image, label[0], locations, properties)


def reference_file(source: NnunetFolder, case_id: str) -> Path:
    """The copy of the raw label map that nnU-Net keeps beside its preprocessed folders."""
    return source.folder.parent / GROUND_TRUTHS / f"{case_id}{source.dataset['file_ending']}"


def _read_b2nd(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        import blosc2
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is compressed with blosc2: pip install 'panther-jax[nnunet]', or preprocess "
            "the raw dataset with panther_jax.preprocess"
        ) from None
    files = (path, path.with_name(f"{path.stem}_seg.b2nd"))
    image, label = (np.asarray(blosc2.open(str(f), mode="r")[:]) for f in files)  # type: ignore[index]
    return image, label


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    # opened here: of a damaged archive, numpy.load leaves its own file open
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays["data"], arrays["seg"]


def _read_npy(path: Path) -> tuple[np.ndarray, np.ndarray]:
    files = (path, path.with_name(f"{path.stem}_seg.npy"))
    image, label = (np.load(f, mmap_mode="r", allow_pickle=False) for f in files)
    return image, label


def _check_arrays(image: np.ndarray, label: np.ndarray, path: Path) -> None:
    fits = image.ndim == 4 and label.shape == (1, *image.shape[1:])
    if not fits or image.dtype != np.float32 or label.dtype.kind != "i":
        raise StoreError(
            f"{path}: image {image.dtype} {image.shape}, label {label.dtype} {label.shape}; "
            "expected float32 (channel, z, y, x) and integers (1, z, y, x)"
        )


def _properties(entry: Mapping[str, Any], plans: Plans) -> Properties:
    shape = tuple(int(n) for n in entry["shape_before_cropping"])
    sitk = entry["sitk_stuff"]
    geometry = Geometry(
        shape_zyx=tuple(shape[a] for a in plans.transpose_backward),
        spacing_zyx=tuple(float(s) for s in entry["spacing"]),
        origin_xyz=tuple(float(o) for o in sitk["origin"]),
        direction=tuple(float(d) for d in sitk["direction"]),
    )
    box = tuple((int(low), int(high)) for low, high in entry["bbox_used_for_cropping"])
    cropped = tuple(int(n) for n in entry["shape_after_cropping_and_before_resampling"])
    return Properties(geometry, shape, box, cropped)


def _locations(found: Mapping[Any, Any]) -> tuple[tuple[LabelValue, np.ndarray], ...]:
    result = []
    for key, rows in found.items():
        value = tuple(int(k) for k in key) if isinstance(key, (tuple, list)) else int(key)
        # rows are (channel, z, y, x); an absent class has an empty list
        coordinates = np.asarray(rows, np.int32).reshape(-1, 4)[:, 1:]
        result.append((value, np.ascontiguousarray(coordinates)))
    return tuple(result)


# ---------------------------------------------------------------------------------- the pickle


def write_pickle(path: Path, value: Mapping[str, Any]) -> None:
    """Write what nnU-Net's ensembler reads beside probabilities: containers, texts, numbers.

    The file appears complete or not at all.

    Raises:
        StoreError: if the value holds anything else.
    """
    _require_plain(value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(pickle.dumps(value, protocol=4))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _require_plain(value: Any) -> None:
    if type(value) in (dict, list, tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            _require_plain(part)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise StoreError(f"{type(value).__name__} is not written to a pickle")


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a dictionary of builtin containers, numbers and numeric arrays; nothing else.

    Raises:
        FileNotFoundError: if the file is missing.
        StoreError: naming what the file holds besides; nothing of it has run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        value = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"it holds {type(value).__name__}, not a dictionary")
        if has_too_many_entries(value):
            raise pickle.UnpicklingError(f"it holds more than {MAX_ENTRIES} entries")
        return _plain(value)
    except Exception as error:  # a crafted file fails in many ways, all of them refusals
        raise StoreError(
            f"{path} is refused: {error}\n  Only nnU-Net's case properties are read: containers, "
            "numbers and numeric arrays."
        ) from None


class _Unpickler(pickle.Unpickler):
    """Stand-ins for the few NumPy names that arrays and scalars need; every other name is refused.

    NumPy's own functions are not called: with forged states they read memory they should not.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        module = module_name.replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")
        build = _BUILDERS.get((module, global_name))
        if build is None:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return _Callable(build)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it holds a persistent id")


class _Callable:
    """A function that a pickle may call but not change: neither attributes nor state."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        object.__setattr__(self, "_build", build)

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Dtype:
    """A numeric type: kind and size from its code, byte order from its state."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufc](1|2|4|8|16)", code):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}")
        self.code = code.lstrip("<>|=")
        self.order = code[0] if code[0] in "<>|=" else "="

    def __setstate__(self, state: Any) -> None:
        _version, order, subarray, names, fields = state[:5]
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("it holds an array of a structured type")
        self.order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """An array: nothing until its state, checked, arrives."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.array = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("it holds an array that is not numeric")
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if any(not isinstance(n, int) or n < 0 for n in sizes) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"it holds an array of shape {sizes}")
    if math.prod(sizes) * dtype.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"it holds {len(data)} bytes for an array of shape {sizes}")
    return np.frombuffer(data, dtype.dtype).reshape(sizes, order=order).copy()


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C").item()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _array(data, dtype, shape, order)


def _ndarray(*_: Any) -> Any:
    raise pickle.UnpicklingError("it makes an array other than by its state")


def _bytearray(data: Any = b"") -> bytearray:
    if not isinstance(data, bytes):  # a number would ask for that much memory
        raise pickle.UnpicklingError("it makes a bytearray of something else than bytes")
    return bytearray(data)


def _encode(text: Any, _encoding: Any) -> bytes:
    return str(text).encode("latin1")  # how protocol 2 and older write bytes


_BUILDERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _ndarray,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "bytes"): lambda *data: bytes(_bytearray(*data)),
    ("_codecs", "encode"): _encode,
}


def has_too_many_entries(value: Any) -> bool:
    """Whether nested containers hold more than :data:`MAX_ENTRIES`, shared ones counted each time.

    Shared entries of a small file can stand for more than fits into memory.
    """
    waiting, seen = [value], 0
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            waiting += node.values()
        elif isinstance(node, (list, tuple)):
            waiting += node
        seen += 1
        if seen + len(waiting) > MAX_ENTRIES:
            return True
    return False


def _plain(value: Any) -> Any:
    """Put arrays in the place of their stand-ins."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, (_Callable, _Dtype)):
        raise pickle.UnpicklingError("it holds a function or a type")
    return value
