"""Signals that ask a run to stop, and what it ends with."""

import signal
from dataclasses import dataclass
from typing import Any

from panther_jax.base.errors import PantherError

# ------------------------------------------------------------------------------------- signals


class TrainingError(PantherError, RuntimeError):
    """Training cannot go on; the message says from where."""


class LostProcess(PantherError, RuntimeError):
    """Another process of the run died."""


class Interrupted(PantherError, RuntimeError):
    """A signal asked to stop; everything is saved."""


@dataclass
class StopRequest:
    """Set by SIGINT, SIGTERM or SIGUSR1; read between steps. A second Ctrl-C stops at once."""

    by: str | None = None

    def listen(self) -> None:
        """Install the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def asked(self, *, late: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether to save now, if it is ``late``: as all processes say."""
        from panther_jax.devices import processes

        stop, save = processes.any_process(bool(self.by), late)
        return stop, save or stop

    @staticmethod
    def after_training() -> None:
        """Nobody reads between steps any more: let the signals stop the process at once."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)

    def _handle(self, number: int, _frame: Any) -> None:
        self.by = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
