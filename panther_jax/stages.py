"""Run the cascade of a task: ``python -m panther_jax.stages --task t2``.

Weights, CT stage, MRI specialists in five folds, cross-validation, ensemble selection, report:
each step is one of the other commands in a process of its own. What is done is skipped; the first
failure stops the chain and names the command that goes on.
"""

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from panther_jax import command
from panther_jax.cascade import SPECIALISTS, Plan, Step, cascade, command_of, draw, slurm_script
from panther_jax.log import duration, write_text

LOGGER = logging.getLogger("panther_jax")
EXAMPLE = "python -m panther_jax.stages --task t2 --demo"


class StageError(RuntimeError):
    """A step of the cascade that failed or cannot be run."""


def run_steps(steps: Sequence[Step], *, restart_stale: bool = False, keep_stale: bool = False):
    """Run what is to do, in order.

    Raises:
        StageError: at the first step that fails, is missing, or is stale.
    """
    start, ran = time.monotonic(), 0
    for number, step in enumerate(steps, start=1):
        state, argv = step.state, step.argv
        if state.status == "done" or (state.status == "stale" and keep_stale):
            LOGGER.info("[%d/%d] %s: %s, skipped", number, len(steps), step.name, state.status)
            continue
        if state.status == "missing" or not argv:
            raise StageError(f"{step.name}: {state.why}")
        if state.status == "stale":
            if not restart_stale:
                raise StageError(
                    f"{step.name} is out of date: {state.why}\n"
                    "  Train it anew with --restart-stale, or keep it with --keep-stale."
                )
            argv = (*argv, "--restart")
        LOGGER.info("[%d/%d] %s\n  python -m %s", number, len(steps), step.name, " ".join(argv))
        code = subprocess.run([sys.executable, "-m", *argv], stdout=sys.stderr, check=False)
        if code.returncode != 0:
            raise StageError(
                f"{step.name} failed with exit code {code.returncode}; what is done is kept\n"
                f"  To go on with it alone: {command_of(step)}\n"
                "  To go on with all that is left: the same command again."
            )
        if step.state.status != "done":
            raise StageError(f"{step.name} ended, but left nothing: {step.state.why or step.name}")
        ran += 1
        spent = time.monotonic() - start
        LOGGER.info(
            "[%d/%d] %s: done; %s so far, about %s left",
            number,
            len(steps),
            step.name,
            duration(spent),
            duration(spent / ran * (len(steps) - number)),
        )


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
    run_steps(steps, restart_stale=arguments.restart_stale, keep_stale=arguments.keep_stale)
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
    if not all(fold.isdigit() for fold in arguments.folds):
        parser.error(f"--folds must be numbers, found {' '.join(arguments.folds)}")
    return command.run(
        lambda: _run(arguments, overrides), quiet=arguments.quiet, debug=arguments.debug
    )


if __name__ == "__main__":
    sys.exit(main())
