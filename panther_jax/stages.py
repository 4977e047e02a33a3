"""Run the cascade of a task: ``python -m panther_jax.stages --task t2``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from panther_jax.base import command
from panther_jax.base.files import write_text
from panther_jax.panther.chain import (
    NAME,
    SCRATCH,
    Plan,
    cascade,
    command_of,
    draw,
    slurm_script,
)
from panther_jax.panther.runner import Running, StageError, run_steps
from panther_jax.panther.stages import STAGES, HandedOn, stages

EXAMPLE = "python -m panther_jax.stages --task t2 --demo"


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.stages",
        "Run the stages up to a task: weights, CT, MRI specialists, cross-validation, ensemble, "
        "report.\nUnknown options --section.field VALUE go to every training.",
        EXAMPLE,
    )
    add = parser.add_argument
    tasks = ", ".join(stage.name for stage in stages().values() if not stage.imported)
    add("--task", metavar="STAGE", required=True, help=f"the stage to reach: {tasks}")
    add("--name", default=NAME, help="begins the names of the chain's runs (default: %(default)s)")
    add(
        "--root", type=Path, default=Path("data"), help="root of raw, store, weights, runs (./data)"
    )
    folds_help = "folds of the task, numbers or all (default: 0 1 2 3 4, of t1 also all)"
    add("--folds", nargs="+", default=[], metavar="K", help=folds_help)
    start_help = "weights that a stage starts from, or none; no stage before it is then trained"
    add("--start", nargs="+", default=[], metavar="STAGE=WEIGHTS|none", help=start_help)
    hand_help = "weights that the next stage starts from (default: STAGE=all:best)"
    add("--hand-on", nargs="+", default=[], metavar="STAGE=FOLD[:CHECKPOINT]", help=hand_help)
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


def _by_stage(option: str, given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        stage, separator, value = text.partition("=")
        if not separator or not value or stage in found:
            raise command.UsageError(f"{option} {text}: expected STAGE=VALUE, each stage once")
        found[stage] = value
    return found


def _handed_on(given: Sequence[str]) -> dict[str, HandedOn]:
    found = {}
    for stage, value in _by_stage("--hand-on", given).items():
        fold, _, checkpoint = value.partition(":")
        if not (fold == "all" or fold.isdigit()) or checkpoint not in ("", "final", "best"):
            raise command.UsageError(
                f"--hand-on {stage}={value}: expected a fold's number or all, and :final or :best"
            )
        found[stage] = HandedOn(fold=fold, checkpoint="final" if checkpoint == "final" else "best")
    return found


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    if arguments.task not in stages():
        raise command.UsageError(f"--task: {STAGES.unknown(arguments.task)}")
    plan = Plan(
        task=arguments.task,
        root=arguments.root,
        folds=tuple(arguments.folds),
        specialists=tuple(arguments.specialists or ()),
        name=arguments.name,
        starts=_by_stage("--start", arguments.start),
        handed_on=_handed_on(arguments.hand_on),
        foundation=arguments.foundation,
        demo=arguments.demo,
        overrides=tuple(overrides),
    )
    if plan.foundation not in (None, SCRATCH) and not Path(plan.foundation).is_dir():
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
    if not all(fold.isdigit() or fold == "all" for fold in arguments.folds):
        parser.error(f"--folds must be numbers or all, found {' '.join(arguments.folds)}")
    return command.run(
        lambda: _run(arguments, overrides), quiet=arguments.quiet, debug=arguments.debug
    )


if __name__ == "__main__":
    sys.exit(main())
