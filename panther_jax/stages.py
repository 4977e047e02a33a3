"""Run the cascade of a task: ``python -m panther_jax.stages --task t2``.

Weights, CT stage, MRI specialists in five folds, cross-validation, ensemble selection, report:
each step is one of the other commands in a process of its own. What is done is skipped; the first
failure stops the chain and names the command that goes on.
"""

import argparse
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

from panther_jax import command
from panther_jax.cascade import (
    SPECIALISTS,
    Plan,
    Step,
    cascade,
    command_of,
    draw,
    layers,
    slurm_script,
)
from panther_jax.log import duration, write_text

LOGGER = logging.getLogger("panther_jax")
EXAMPLE = "python -m panther_jax.stages --task t2 --demo"


class StageError(RuntimeError):
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


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.stages",
        "Run the cascade of a task: weights, CT, MRI specialists, cross-validation, ensemble, "
        "report.\nUnknown options --section.field VALUE go to every training.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--task", choices=("t1", "t2"), required=True, help="T1 diagnostic or T2 MR-Linac")
    add(
        "--root", type=Path, default=Path("data"), help="root of raw, store, weights, runs (./data)"
    )
    add("--folds", nargs="+", default=[*"01234"], metavar="K", help="folds (default: 0 1 2 3 4)")
    add(
        "--foundation", metavar="FOLDER|none", help="nnU-Net model folder of the foundation weights"
    )
    specialists_help = "configs of the MRI stage (default: aggressive and default augmentation)"
    add("--specialists", nargs="+", metavar="FILE[:ARG]", help=specialists_help)
    jobs_help = "steps side by side, each on a GPU of its own (default: %(default)s)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs_help)
    add("--demo", action="store_true", help="phantom data, small networks, a budget of minutes")
    add("--dry-run", action="store_true", help="draw the graph with what is done; do nothing")
    add("--print-commands", action="store_true", help="print the commands that are left")
    add("--slurm", type=Path, metavar="FILE", help="write a script that submits what is left")
    add("--restart-stale", action="store_true", help="train anew what earlier weights began")
    add("--keep-stale", action="store_true", help="keep what earlier weights began")
    return parser


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    plan = Plan(
        task=arguments.task,
        root=arguments.root,
        folds=tuple(arguments.folds),
        specialists=tuple(arguments.specialists or SPECIALISTS[arguments.task]),
        foundation=arguments.foundation,
        demo=arguments.demo,
        overrides=tuple(overrides),
    )
    if plan.foundation not in (None, "none") and not Path(plan.foundation).is_dir():
        raise command.UsageError(
            f"--foundation {plan.foundation} is not a folder; name the unpacked model folder, the "
            "one that holds fold_all, or none"
        )
    steps = cascade(plan)
    if arguments.dry_run:
        return draw(steps)
    left = [step for step in steps if step.state.status != "done"]
    if arguments.print_commands or arguments.slurm:
        for step in left:
            if step.state.status in ("missing", "stale"):
                raise StageError(f"{step.name}: {step.state.why}")
    if arguments.print_commands:
        return "\n".join(command_of(step) for step in left)
    if arguments.slurm:
        write_text(arguments.slurm, slurm_script(left, folder=Path.cwd()))
        return f"{arguments.slurm}\nsubmit with: bash {arguments.slurm}"
    how = Running(arguments.restart_stale, arguments.keep_stale, arguments.jobs)
    run_steps(steps, how)
    return draw(steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    given = command.normalized(sys.argv[1:] if argv is None else argv)
    arguments, overrides = parser.parse_known_args(given)
    wrong = [o for o in overrides if o.startswith("-") and "." not in o]
    if wrong or (overrides and not overrides[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or overrides)}")
    if arguments.restart_stale and arguments.keep_stale:
        parser.error("--restart-stale and --keep-stale exclude each other")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, found {arguments.jobs}")
    if not all(fold.isdigit() for fold in arguments.folds):
        parser.error(f"--folds must be numbers, found {' '.join(arguments.folds)}")
    return command.run(
        lambda: _run(arguments, overrides), quiet=arguments.quiet, debug=arguments.debug
    )


if __name__ == "__main__":
    sys.exit(main())
