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
from pathlib import Path

from panther_jax.base.console import duration
from panther_jax.base.errors import PantherError
from panther_jax.panther.chain import Step, command_of, layers

DRIVER = Path("/dev")
LOGGER = logging.getLogger("panther_jax")


class StageError(PantherError, RuntimeError):
    """A step of the cascade that failed or cannot be run."""


@dataclass(frozen=True)
class Running:
    """How steps are run: what becomes of stale ones, and how many run side by side.

    With several jobs each has a GPU of its own, one of those that are visible here, by
    ``CUDA_VISIBLE_DEVICES``.
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
    progress = _Progress(sum(step.state.status != "done" for step in steps))
    devices: queue.Queue[str | None] = queue.Queue()
    for device in deal_devices(how.jobs):
        devices.put(device)

    def run(step: Step) -> StageError | None:
        device = devices.get()
        try:
            # now, not before: an earlier layer may have made it, or changed what it began with
            if not _skipped(step, how):
                _run_step(step, how, progress, device=device)
        except StageError as error:
            return error
        finally:
            devices.put(device)
        return None

    with ThreadPoolExecutor(how.jobs) as pool:
        for layer in layers(steps):
            if how.jobs == 1:
                failed = next((error for error in map(run, layer) if error), None)
            else:
                failed = next((error for error in [*pool.map(run, layer)] if error), None)
            if failed:
                raise failed


def deal_devices(jobs: int) -> list[str | None]:
    """A value of ``CUDA_VISIBLE_DEVICES`` a job; None leaves it as it is.

    Devices are those that the variable names, or if it is not set those that the driver shows. One
    job has all of them; without any, jobs share the processor.

    Raises:
        StageError: if there are fewer devices than jobs.
    """
    if jobs == 1:
        return [None]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        found = [p.name.removeprefix("nvidia") for p in DRIVER.glob("nvidia[0-9]*")]
        devices = sorted(found, key=int)
    else:
        devices = [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if not devices:
        return [None] * jobs
    if len(devices) < jobs:
        raise StageError(
            f"--jobs {jobs}: there are {len(devices)} visible devices ({', '.join(devices)})\n"
            f"  Take --jobs {len(devices)}, or show more with CUDA_VISIBLE_DEVICES."
        )
    return list(devices[:jobs])


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


def _run_step(step: Step, how: Running, progress: _Progress, *, device: str | None) -> None:
    state, argv = step.state, step.argv
    if state.status == "missing" or not argv:
        raise StageError(f"{step.name}: {state.why}")
    if state.status == "stale":
        if not how.restart_stale:
            raise StageError(
                f"{step.name} is out of date: {state.why}\n"
                "  Train it anew with --restart-stale, keep it with --keep-stale, or begin another "
                "chain with --name."
            )
        # other folds of the run are restarted, too: each is compared with what the chain gives
        argv = (*argv, "--restart", "--allow-config-change")
    progress.begun += 1
    LOGGER.info("[%d/%d] %s: %s", progress.begun, progress.total, step.name, state.why or "begins")
    LOGGER.info("  %s", command_of(step))
    chosen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
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
