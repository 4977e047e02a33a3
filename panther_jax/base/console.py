"""What a command says: log lines, progress with time left, tables."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

LOGGER = logging.getLogger("panther_jax")


class _Stderr(logging.StreamHandler):
    """Writes to what standard error is at that moment: a program may redirect and close it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(*, quiet: bool = False, file: Path | None = None) -> None:
    """Log to standard error, and to ``file`` too; ``quiet`` leaves warnings only."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    stream = _Stderr()
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


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Log ``what…`` at the start and its duration at the end."""
    LOGGER.info("%s…", what)
    start = time.monotonic()
    yield
    LOGGER.info("%s: %.1f s", what, time.monotonic() - start)


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
