"""The steps of a cascade run in order: what is done is skipped, the first failure stops."""

import logging
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from panther_jax.base.console import duration
from panther_jax.base.errors import PantherError
from panther_jax.panther.chain import Step, command_of, layers

LOGGER = logging.getLogger("panther_jax")


class StageError(PantherError, RuntimeError):
    """A step of the cascade that failed or cannot be run."""


@dataclass(frozen=True)
class Running:
    """How steps are run: what becomes of stale ones, and how many run side by side.

    With several jobs each has a GPU of its own, by ``CUDA_VISIBLE_DEVICES``.
    """

    restart_stale: bool = False
    keep_stale: bool = False
    jobs: int = 1


def run_steps(steps: Sequence[Step], how: Running | None = None) -> None:
    """Run what is to do, layer by layer.

    Raises:
        StageError: at the first step that fails, is missing, or stale; those beside it end first.
    """
    how = how or Running()
    left = [step for step in steps if not _skipped(step, how)]
    progress = _Progress(len(left))
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(how.jobs):
        slots.put(slot)

    def run(step: Step) -> StageError | None:
        slot = slots.get()
        try:
            _run_step(step, how, progress, slot=slot if how.jobs > 1 else None)
        except StageError as error:
            return error
        finally:
            slots.put(slot)
        return None

    with ThreadPoolExecutor(how.jobs) as pool:
        for layer in layers(left):
            if how.jobs == 1:
                failed = next((error for error in map(run, layer) if error), None)
            else:
                failed = next((error for error in [*pool.map(run, layer)] if error), None)
            if failed:
                raise failed


def _skipped(step: Step, how: Running) -> bool:
    status = step.state.status
    skipped = status == "done" or (status == "stale" and how.keep_stale)
    if skipped:
        LOGGER.info("%s: %s, skipped", step.name, status)
    return skipped


@dataclass
class _Progress:
    total: int
    begun: int = 0
    done: int = 0
    start: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        spent = time.monotonic() - self.start
        left = spent / max(self.done, 1) * (self.total - self.done)
        return f"{self.done}/{self.total} steps, {duration(spent)} so far, {duration(left)} left"


def _run_step(step: Step, how: Running, progress: _Progress, *, slot: int | None) -> None:
    state, argv = step.state, step.argv
    if state.status == "done":  # one of an earlier layer has made it meanwhile
        return
    if state.status == "missing" or not argv:
        raise StageError(f"{step.name}: {state.why}")
    if state.status == "stale":
        if not how.restart_stale:
            raise StageError(
                f"{step.name} is out of date: {state.why}\n"
                "  Train it anew with --restart-stale, or keep it with --keep-stale."
            )
        argv = (*argv, "--restart")
    progress.begun += 1
    LOGGER.info("[%d/%d] %s: %s", progress.begun, progress.total, step.name, state.why or "begins")
    LOGGER.info("  %s", command_of(step))
    chosen = {} if slot is None else {"CUDA_VISIBLE_DEVICES": str(slot)}
    code = subprocess.run(
        [sys.executable, "-m", *argv], stdout=sys.stderr, env={**os.environ, **chosen}, check=False
    ).returncode
    if code != 0:
        raise StageError(
            f"{step.name} failed with exit code {code}; what is done is kept\n"
            f"  To go on with it alone: {command_of(step)}\n"
            "  To go on with all that is left: the same command again."
        )
    if step.state.status != "done":
        raise StageError(f"{step.name} ended, but left nothing: {step.state.why or step.name}")
    progress.done += 1
    LOGGER.info("%s: done (%s)", step.name, progress.text())
