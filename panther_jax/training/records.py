"""What a run writes while it trains: ``metrics.jsonl``, TensorBoard, and where its time goes."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from panther_jax.base.console import Progress
from panther_jax.base.files import write_text


class Clock:
    """Where a run's time goes: steps, waiting for data, pauses, since the last checkpoint."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self._saved = self._epoch = time.monotonic()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside as time of the steps."""
        self.progress.pause()
        yield
        self.progress.resume()

    def end_epoch(self) -> dict[str, float]:
        """Seconds and share of waiting since the last call, as entries of metrics.jsonl."""
        used = max(time.monotonic() - self._epoch, 1e-9)  # a clock may stand still
        entries = {"seconds": round(used, 3), "wait_share": round(self._waited / used, 4)}
        self._epoch, self._waited = time.monotonic(), 0.0
        return entries

    def saved(self) -> None:
        """A checkpoint was written."""
        self._saved = time.monotonic()

    def since_save(self) -> float:
        """Seconds since the last checkpoint, or the start."""
        return time.monotonic() - self._saved


# ------------------------------------------------------------------------------------- metrics


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, append-only, each with the ``step`` it is of."""

    def __init__(self, path: Path, *, resume_step: int = 0):
        """Open for appending, dropping lines of steps after ``resume_step`` or cut short."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [r for r in read_metrics(path) if r["step"] <= resume_step]
        write_text(path, "".join(json.dumps(r) + "\n" for r in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line; NaN is written as null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(dict(row))) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def tensorboard_writer(folder: Path) -> Any:
    """A TensorBoard writer.

    Raises:
        ModuleNotFoundError: naming the extra that brings it.
    """
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "log.tensorboard needs tensorboardX: pip install 'panther-jax[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder))


def write_scalars(writer: Any, row: Mapping[str, Any], prefix: str = "") -> None:
    """Write the numbers of an epoch's row as TensorBoard scalars at its step."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            write_scalars(writer, {"step": row["step"], **value}, f"{prefix}{name}/")
        elif name not in ("step", "epoch") and value is not None:
            writer.add_scalar(f"{prefix}{name}", value, row["step"])
