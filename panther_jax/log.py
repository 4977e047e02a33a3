"""What a run tells: log lines, progress with time left, metrics.jsonl, progress.png, run.json."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("panther_jax")


def setup_logging(*, quiet: bool = False, file: Path | None = None) -> None:
    """Log to standard error, and to ``file`` too; ``quiet`` leaves warnings only."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(logging.Formatter("%(message)s"))
    stream.setLevel(logging.WARNING if quiet else logging.INFO)
    LOGGER.addHandler(stream)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOGGER.addHandler(handler)


def duration(seconds: int | float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


# ------------------------------------------------------------------------------------ progress


class Progress:
    """One progress line with time left: in place on a terminal, else a line every few seconds.

    Time between :meth:`pause` and :meth:`resume` (validation, checkpoints) counts as used, not as
    a step's, so the time left stays honest.
    """

    def __init__(self, total: int, *, first: int = 0, label: str, every_seconds: float = 15.0):
        self.total, self.first, self.label = total, first, label
        self.every_seconds = every_seconds
        self.done = first
        self._busy, self._since = 0.0, time.monotonic()
        self._last_line = self._since
        self._live = sys.stderr.isatty() and LOGGER.isEnabledFor(logging.INFO)

    def pause(self) -> None:
        """Stop the clock of the steps."""
        self._busy += time.monotonic() - self._since

    def resume(self) -> None:
        """Start it again."""
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent in steps since the start."""
        return self._busy + time.monotonic() - self._since

    @property
    def left(self) -> float:
        """Estimated seconds to the end."""
        steps = max(self.done - self.first, 1)
        return self.seconds / steps * (self.total - self.done)

    def update(self, done: int, text: str = "") -> None:
        """Show that ``done`` of the total is reached."""
        self.done = done
        line = (
            f"{self.label} {done}/{self.total} ({100 * done / max(self.total, 1):.0f} %) {text} "
            f"used {duration(self.seconds)}, left {duration(self.left)}"
        )
        if self._live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last_line >= self.every_seconds or done == self.total:
            self._last_line = time.monotonic()
            LOGGER.info(line)

    def close(self) -> None:
        """Leave the terminal on a fresh line."""
        if self._live:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


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


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Log ``what…`` at the start and its duration at the end."""
    LOGGER.info("%s…", what)
    start = time.monotonic()
    yield
    LOGGER.info("%s: %.1f s", what, time.monotonic() - start)


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


def write_text(path: Path, text: str) -> None:
    """Write a file by a temporary name and a rename, so that it is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:  # of a full disk it names no file
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON by a temporary name and a rename."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text; the first column is left-aligned."""
    widths = [max(len(r[c]) for r in [header, *rows]) for c in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [
            cell.ljust(w) if c == 0 else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
