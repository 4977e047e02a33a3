"""Training state, its checkpoints, and model bundles.

Checkpoints (orbax) are for resuming: parameters, optimiser state and a JSON of counters, complete
or invisible. Bundles (safetensors and JSON) are models ready to start from or to predict with; they
hold no code. Starting weights follow the rules of spec 01 §5.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from panther_jax.checksums import verify_checksums, write_checksums
from panther_jax.log import write_json
from panther_jax.model import Params, param_shapes, walk
from panther_jax.plans import Labels, Plans, read_object

LOGGER = logging.getLogger("panther_jax")
OPTIONAL_PARTS = {"stem": "encoder/stem/", "heads": "decoder/heads/"}
KEPT = {"latest": 2, "best": 1, "final": 1}
SETTLE_SECONDS = 0.3  # of writers that fail beside the first
Kind = Literal["latest", "best", "final"]


class CheckpointError(RuntimeError):
    """A checkpoint or bundle that cannot be written, read or used."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes: int32 step number, parameters, optimiser state. A pytree.

    Its leaves are arrays, or what JAX puts in their place: shapes, shardings, tracers.
    """

    step: Any
    params: Params
    opt_state: Any


@dataclass(frozen=True)
class Counters:
    """What resuming needs beside the state: JSON-able numbers.

    ``epoch_losses`` are the losses of the steps of the unfinished epoch; ``ema`` and ``best_ema``
    follow the pseudo-Dice; ``best_step`` is the step of the best checkpoint.
    """

    step: int = 0
    ema: float | None = None
    best_ema: float | None = None
    best_step: int | None = None
    epoch_losses: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The counters as a dictionary."""
        return {**vars(self), "epoch_losses": list(self.epoch_losses)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Counters":
        """Inverse of :meth:`to_json`."""
        return Counters(**{**value, "epoch_losses": tuple(value["epoch_losses"])})


# ---------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The checkpoints of one fold: the latest two, the best, the final one."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    def _manager(self, kind: Kind) -> Any:
        import orbax.checkpoint as ocp

        # Saves are synchronous: an asynchronous one reads buffers that the next, donated step
        # overwrites on a CPU, and a save every few minutes costs nothing.
        return ocp.CheckpointManager(
            self.folder / kind,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT[kind], create=True, enable_async_checkpointing=False
            ),
            item_names=("params", "opt_state", "meta"),
        )

    def steps(self, kind: Kind) -> tuple[int, ...]:
        """Steps of the complete checkpoints of a kind, ascending."""
        if not (self.folder / kind).is_dir():
            return ()
        with self._manager(kind) as manager:
            return tuple(sorted(manager.all_steps()))

    def save(self, kind: Kind, state: TrainState, counters: Counters) -> None:
        """Write a checkpoint; it becomes visible only when complete.

        Raises:
            CheckpointError: if the disk is full or not writable; earlier checkpoints are untouched.
        """
        import orbax.checkpoint as ocp

        step = counters.step
        try:
            with _one_message(), self._manager(kind) as manager:
                if step in manager.all_steps():
                    return
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardSave(state.params),
                        opt_state=ocp.args.StandardSave(state.opt_state),
                        meta=ocp.args.JsonSave(counters.to_json()),
                    ),
                )
            if jax.process_index() == 0:
                # a crash just before leaves a complete checkpoint, which is read unverified
                write_checksums(self.folder / kind / str(step))
        except Exception as error:
            self._remove_unfinished(kind)
            raise CheckpointError(_save_failure(error, self.folder / kind, step)) from error

    def _remove_unfinished(self, kind: Kind) -> None:
        for leftover in (self.folder / kind).glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def restore(self, kind: Kind, template: TrainState) -> tuple[TrainState, Counters] | None:
        """The newest readable checkpoint of a kind, or None if there is none.

        A damaged one is logged and the one before it is taken. ``template`` gives structure,
        shapes and shardings.

        Raises:
            CheckpointError: if checkpoints exist and none can be read.
        """
        steps = self.steps(kind)
        for step in reversed(steps):
            try:
                verify_checksums(self.folder / kind / str(step))
                return self._read(kind, step, template)
            except Exception as error:  # orbax raises many types for damaged files
                LOGGER.warning(
                    "checkpoint %s of step %d cannot be read (%s); trying the one before",
                    self.folder / kind,
                    step,
                    _first_line(error),
                )
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder / kind} (steps {list(steps)}) can be read"
                "\n  Restore the folder from a backup, or pass --restart to begin anew."
            )
        return None

    def _read(self, kind: Kind, step: int, template: TrainState) -> tuple[TrainState, Counters]:
        import orbax.checkpoint as ocp

        with self._manager(kind) as manager:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(_abstract(template.params)),
                    opt_state=ocp.args.StandardRestore(_abstract(template.opt_state)),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        counters = Counters.from_json(restored["meta"])
        number = jax.device_put(np.int32(step), template.step.sharding)
        return TrainState(number, restored["params"], restored["opt_state"]), counters

    def read(self, kind: Kind) -> tuple[Params, Any, Counters] | None:
        """Parameters, optimiser state (nested dicts), counters of the newest readable checkpoint.

        On the host, without knowing the optimiser; None if there is none.

        Raises:
            CheckpointError: if checkpoints exist and none can be read.
        """
        found = self._read_newest(kind, ("params", "opt_state"))
        return None if found is None else (found[0][0], found[0][1], found[1])

    def read_params(self, kind: Kind) -> tuple[Params, Counters] | None:
        """As :meth:`read`, without the optimiser state, which is several times as large."""
        found = self._read_newest(kind, ("params",))
        return None if found is None else (found[0][0], found[1])

    def _read_newest(self, kind: Kind, items: Sequence[str]) -> tuple[list[Any], Counters] | None:
        steps = self.steps(kind)
        for step in reversed(steps):
            folder = self.folder / kind / str(step)
            try:
                verify_checksums(folder)
                counters = Counters.from_json(_read_item_json(folder / "meta"))
                return [_read_item(folder / item) for item in items], counters
            except Exception as error:  # orbax raises many types for damaged files
                LOGGER.warning("checkpoint %s cannot be read (%s)", folder, _first_line(error))
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self.folder / kind} can be read")
        return None

    def drop_after(self, step: int) -> None:
        """Delete best checkpoints of steps after ``step``, which a resumed run makes again."""
        for late in (s for s in self.steps("best") if s > step):
            shutil.rmtree(self.folder / "best" / str(late))


@contextlib.contextmanager
def _one_message() -> Iterator[None]:
    """Keep to itself what orbax's threads and tasks print when one of them fails: it is raised."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    try:
        yield
    except Exception:
        time.sleep(SETTLE_SECONDS)
        raise
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_item(folder: Any) -> Any:
    """An orbax tree as NumPy arrays, whatever devices it was saved from."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    metadata = handler.metadata(folder).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _read_item_json(folder: Any) -> Any:
    import orbax.checkpoint as ocp

    return ocp.JsonCheckpointHandler().restore(folder)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _save_failure(error: BaseException, folder: Path, step: int) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            break
        cause = cause.__cause__ or cause.__context__
    full = cause is not None or "no space" in str(error).lower()
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent.parent).free
    reason = "the disk is full" if full else _first_line(error)
    return (
        f"checkpoint of step {step} cannot be saved to {folder}: {reason} "
        f"({free / 2**20:.0f} MiB free)\n"
        "  Earlier checkpoints are intact. Free some space and run the same command again."
    )


# -------------------------------------------------------------------------------------- bundles


@dataclass(frozen=True)
class ModelBundle:
    """A model ready to predict or to start from: plans, labels, parameters of each fold.

    ``absent`` names the parts (``stem``, ``heads``) that imported weights came without; such a
    bundle is only good to start from.
    """

    plans: Plans
    labels: Labels
    params: Mapping[str, Params]
    provenance: Mapping[str, Any]
    absent: tuple[str, ...] = ()

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Axes that may be mirrored at inference: those that training flipped."""
        return tuple(self.provenance.get("inference_allowed_mirroring_axes") or ())

    def require_complete(self, what: str) -> None:
        """Refuse to predict with or export a bundle that lacks its stem or heads.

        Raises:
            CheckpointError: naming ``what`` cannot be done.
        """
        if self.absent:
            raise CheckpointError(
                f"cannot {what}: the bundle has no {' and no '.join(self.absent)}, it was imported "
                "to start training from\n  Train from it with `python -m panther_jax.train --init`."
            )


def save_bundle(
    folder: Path,
    *,
    params: Mapping[str, Params],
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Write a bundle: ``params`` by fold name (``""`` for a single model), JSON beside them.

    ``provenance`` gains the SHA-256 of every weight file. The folder appears when complete.

    Raises:
        CheckpointError: if the folder exists or cannot be written.
    """
    refuse_existing(folder, overwrite=overwrite)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        checksums = {}
        for fold, tree in params.items():
            path = temporary / _weights_name(fold)
            checksums[path.name] = _write_safetensors(path, tree)
        write_json(temporary / "plans.json", plans)
        write_json(temporary / "dataset.json", dataset)
        write_json(temporary / "provenance.json", {**provenance, "sha256": checksums})
        replace_folder(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"bundle {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Make sure that a folder may be written.

    Raises:
        CheckpointError: if it exists and is not to be overwritten.
    """
    if folder.exists() and not overwrite:
        raise CheckpointError(
            f"{folder} exists; choose another name, remove it, or pass --overwrite"
        )


def replace_folder(new: Path, folder: Path) -> None:
    """Move ``new`` to ``folder``; what is there goes only when the new one is complete."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_safetensors(path: Path, tree: Params) -> str:
    """Write one tensor after the other and return the SHA-256 of the file.

    The library's writer copies all tensors first; here one is in memory at a time, so that views of
    a mapped file can be written whatever their sum.
    """
    leaves = {"/".join(p): leaf for p, leaf in walk(tree)}
    header: dict[str, Any] = {}
    offset = 0
    for name, leaf in leaves.items():
        end = offset + 4 * math.prod(leaf.shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(leaf.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for leaf in leaves.values():
            data = np.ascontiguousarray(leaf, "<f4").reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def load_bundle(folder: Path) -> ModelBundle:
    """Read a bundle and verify its checksums.

    Raises:
        CheckpointError: if something is missing, damaged, or does not fit its plans.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for name in ("plans.json", "dataset.json", "provenance.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a bundle: it holds no {name}")
    dataset = read_object(folder / "dataset.json")
    plans = Plans.from_nnunet(read_object(folder / "plans.json"), dataset)
    provenance = read_object(folder / "provenance.json")
    checksums = provenance.get("sha256", {})
    if not isinstance(checksums, dict):
        raise CheckpointError(
            f"{folder / 'provenance.json'}: 'sha256' must map file names to checksums, found "
            f"{type(checksums).__name__}\n  Copy the bundle again."
        )
    params: dict[str, Params] = {}
    absent: dict[str, None] = {}
    for path in sorted(folder.glob("*.safetensors")):
        expected = checksums.get(path.name)
        if expected and _sha256(path) != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one of provenance.json\n"
                "  Copy the bundle again, or make it anew."
            )
        try:
            tree = _unflatten(load_file(path))
        except (SafetensorError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file: {error}\n  Copy the bundle again."
            ) from None
        absent |= dict.fromkeys(_absent_parts(path, tree, plans))
        params[_fold_name(path.name)] = tree
    if not params:
        raise CheckpointError(f"bundle {folder} holds no weights (*.safetensors)")
    return ModelBundle(plans, Labels.from_dataset_json(dataset), params, provenance, tuple(absent))


def _absent_parts(path: Path, tree: Params, plans: Plans) -> tuple[str, ...]:
    """Which of stem and heads are left out; anything else that does not fit is an error."""
    stored = {"/".join(p): tuple(leaf.shape) for p, leaf in walk(tree)}
    wanted = {"/".join(p): tuple(leaf.shape) for p, leaf in walk(param_shapes(plans.arch))}
    absent = []
    for part, prefix in OPTIONAL_PARTS.items():
        names = [name for name in wanted if name.startswith(prefix)]
        if names and not any(name.startswith(prefix) for name in stored):
            absent.append(part)
            for name in names:
                del wanted[name]
    wrong = sorted(n for n in {*stored, *wanted} if stored.get(n) != wanted.get(n))
    if wrong:
        lines = [f"  {n}: {stored.get(n)}, expected {wanted.get(n)}" for n in wrong[:10]]
        raise CheckpointError(
            f"{path} does not fit the plans.json beside it; {len(wrong)} parameter(s) differ:\n"
            + "\n".join(lines)
            + "\n  Import or train the model again."
        )
    return tuple(absent)


def params_sha256(params: Params) -> str:
    """SHA-256 of parameters by value: names, shapes, bytes; the same wherever they are stored."""
    digest = hashlib.sha256()
    for path, leaf in sorted(walk(params), key=lambda item: item[0]):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights_name(fold: str) -> str:
    return f"fold_{fold}.safetensors" if fold else "params.safetensors"


def _fold_name(file: str) -> str:
    return (
        file.removesuffix(".safetensors").removeprefix("fold_")
        if file != "params.safetensors"
        else ""
    )


def _unflatten(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for name, leaf in flat.items():
        node, *path = tree, *name.split("/")
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


# ----------------------------------------------------------------------------- starting weights


@dataclass(frozen=True)
class Transfer:
    """What became of each parameter: names loaded, left fresh by rule, not used of the source."""

    params: Params
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    unused: tuple[str, ...]

    def report(self) -> str:
        """One line of counts."""
        return (
            f"{len(self.loaded)} parameters loaded, {len(self.skipped)} fresh by rule, "
            f"{len(self.unused)} of the source not used"
        )


def transfer(source: Params, fresh: Params, *, stem: Literal["copy", "reinit"]) -> Transfer:
    """Start ``fresh`` parameters from ``source`` by the rules of spec 01 §5.

    Heads stay fresh always, the stem with ``reinit``; every other parameter must be in the source
    with the same shape. All are checked before any is taken.

    Raises:
        CheckpointError: with a table of what is missing or of another shape.
    """
    stored = {"/".join(p): leaf for p, leaf in walk(source)}
    loaded, skipped, missing, reshaped = [], [], [], []
    for path, leaf in walk(fresh):
        name = "/".join(path)
        if name.startswith("decoder/heads/") or (
            stem == "reinit" and name.startswith("encoder/stem/")
        ):
            skipped.append(name)
        elif name not in stored:
            missing.append(name)
        elif tuple(stored[name].shape) != tuple(leaf.shape):
            reshaped.append(f"{name}: {tuple(stored[name].shape)} -> {tuple(leaf.shape)}")
        else:
            loaded.append(name)
    if missing or reshaped:
        raise CheckpointError(_misfit(loaded, skipped, missing, reshaped))
    taken = set(loaded)
    flat = {
        "/".join(p): stored["/".join(p)] if "/".join(p) in taken else leaf
        for p, leaf in walk(fresh)
    }
    unused = tuple(name for name in stored if name not in taken)
    return Transfer(_unflatten(flat), tuple(loaded), tuple(skipped), unused)


def _misfit(
    loaded: Sequence[str], skipped: Sequence[str], missing: Sequence[str], reshaped: Sequence[str]
) -> str:
    lines = [
        f"starting weights do not fit: {len(loaded)} fit, {len(skipped)} skipped by rule, "
        f"{len(missing)} missing, {len(reshaped)} of another shape (stored -> expected)"
    ]
    lines += [f"  missing: {name}" for name in missing[:10]]
    lines += [f"  shape:   {name}" for name in reshaped[:10]]
    if missing and all(name.startswith("encoder/stem/") for name in missing):
        lines.append("  The source has no stem: start it anew with --init.stem reinit.")
    else:
        lines.append("  Take the architecture from the bundle's plans, or another bundle.")
    return "\n".join(lines)
