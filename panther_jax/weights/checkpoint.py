"""Training state and its checkpoints."""

import contextlib
import errno
import logging
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

from panther_jax.base.checksums import verify_checksums, write_checksums
from panther_jax.base.errors import CheckpointError
from panther_jax.network.unet import Params

LOGGER = logging.getLogger("panther_jax")
KEPT = {"latest": 2, "best": 1, "final": 1}
SETTLE_SECONDS = 0.3  # of writers that fail beside the first
Kind = Literal["latest", "best", "final"]


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
                    params=ocp.args.StandardRestore(abstract(template.params)),
                    opt_state=ocp.args.StandardRestore(abstract(template.opt_state)),
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


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree: what :meth:`Checkpoints.restore` wants of one."""
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
