"""Write one self-contained HTML page about a fold, a cross-validation, or several runs compared.

The page opens offline, loads nothing and runs nothing; what is missing or broken in a run is said
on top of it and the rest is shown.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from panther_jax.base import command
from panther_jax.base.command import UsageError
from panther_jax.base.console import duration
from panther_jax.base.files import write_text
from panther_jax.reporting import page, records, sections
from panther_jax.reporting.comparison import comparison_page
from panther_jax.reporting.page import Card, Page, Section
from panther_jax.reporting.records import CHECKPOINTS, CaseRecord, RunRecord, number

LOGGER = logging.getLogger("panther_jax")
EXAMPLE = "python -m panther_jax.report --run data/runs/mri_t2_demo"
REPORT = "report.html"
HEAD = 2000
MAX_RUNS = 5  # with the reference, as many outlines as there are colours


@dataclass(frozen=True)
class Options:
    """What the page shows."""

    checkpoint: str | None
    raw: Path | None
    num_worst: int


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.parser(
        "panther_jax.report",
        "One HTML page about a run: scores with their spread, failures, overlays, learning\n"
        "curves, settings. Several folds of a run are a cross-validation; several runs are\n"
        "compared with the first. The page opens offline.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--run", type=Path, nargs="+", required=True, metavar="DIR", help="run, or fold_K, folders")
    add(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="default: report.html in the run or fold; required for a comparison. A page that this "
        "command wrote is written anew",
    )
    add("--overwrite", action="store_true", help="replace --output even if it is another file")
    add("--checkpoint", choices=CHECKPOINTS, help="validation to show (default final, else best)")
    add("--raw", type=Path, help="raw data set with the images, if it is not under the run's root")
    add("--num-worst", type=int, default=3, metavar="N", help="worst cases to picture (default 3)")
    return parser


def make_page(runs: Sequence[RunRecord], options: Options) -> Page:
    """The page of one run, or of several compared with the first.

    Raises:
        UsageError: if there are too many runs to tell apart.
    """
    if len(runs) > MAX_RUNS:
        raise UsageError(f"{len(runs)} runs; at most {MAX_RUNS} fit on a page")
    checkpoint = options.checkpoint or _common_checkpoint(runs)
    if len(runs) > 1:
        return comparison_page(runs, checkpoint, raw=options.raw)
    return _run_page(runs[0], checkpoint, options)


def _common_checkpoint(runs: Sequence[RunRecord]) -> str:
    """The first checkpoint that all runs were validated with."""
    have = [set(run.checkpoints()) for run in runs]
    return next((c for c in CHECKPOINTS if all(c in h for h in have)), CHECKPOINTS[0])


# ------------------------------------------------------------------------------------- one run


def _run_page(run: RunRecord, checkpoint: str, options: Options) -> Page:
    name = sections.class_name(run)
    cases, several = run.cases(checkpoint), len(run.folds) > 1
    notices = [*run.all_notices(), *run.unvalidated(checkpoint)]
    parts: list[Section] = []
    if cases:
        parts = [
            sections.failures(cases, several),
            _scores(run, checkpoint, name),
            sections.overlay_section(run, checkpoint, raw=options.raw, num_worst=options.num_worst),
            sections.scatter(_by_fold(run, checkpoint), name),
        ]
    parts.append(sections.learning_curves([(f.name, [f]) for f in run.folds]))
    if cases:
        table = sections.case_table(cases, name, several)
        parts.append(Section("cases", "All cases", tables=(table,)))
    parts.append(sections.settings_section([run]))
    folds = ", ".join(f.name for f in run.folds)
    kind = f"cross-validation over {len(run.folds)} folds" if several else folds
    return Page(
        title=f"{run.name}: {kind}",
        subtitle=f"Data set {run.dataset_name}; {folds}; {checkpoint} checkpoint; {run.folder}",
        notices=tuple(notices),
        cards=_cards(run, cases, name),
        sections=tuple(parts),
        footer=sections.footer(),
    )


def _by_fold(run: RunRecord, checkpoint: str) -> list[tuple[str, Sequence[CaseRecord]]]:
    return [
        (f.name, f.validations[checkpoint].cases) for f in run.folds if checkpoint in f.validations
    ]


def _scores(run: RunRecord, checkpoint: str, name: str) -> Section:
    orders = {
        v.spacing_order for f in run.folds for c, v in f.validations.items() if c == checkpoint
    }
    seen = " (cases that were trained on)" if any(f.saw_its_cases for f in run.folds) else ""
    tables = [
        sections.spread_table(run.cases(c), name, f"Over the cases, {c} checkpoint{seen}")
        for c in sorted(run.checkpoints(), key=lambda c: c != checkpoint)
    ]
    if len(run.folds) > 1:
        tables.insert(1, sections.fold_table(run, checkpoint))
    explanation = (
        f"Surface distances with {' and '.join(sorted(orders))} spacing order. Means leave out "
        "what is not a number; the column of cases then says how many are left."
    )
    return Section("scores", "Scores", (explanation,), tables=tuple(tables))


def _cards(run: RunRecord, cases: Sequence[CaseRecord], name: str) -> tuple[Card, ...]:
    finished = sum(f.finished for f in run.folds)
    state = "finished" if finished == len(run.folds) else f"{finished} of {len(run.folds)} finished"
    epochs = ", ".join(dict.fromkeys(str(len(f.rows)) for f in run.folds))
    seconds = sum(
        s for f in run.folds for r in f.rows if math.isfinite(s := number(r.get("seconds")))
    )
    each = " a fold" if len(run.folds) > 1 else ""
    training = f"{epochs} of {run.epochs or '?'} epochs{each}, {duration(seconds)} in all"
    whole = "" if finished == len(run.folds) else "bad"
    about_run = Card("training", state, training, whole)
    if not cases:
        return (about_run,)
    dice, surface, distance = (
        sections.metric_cells(cases, m) for m in ("volumetric_dice", "surface_dice", "hausdorff95")
    )
    bad = sum(c.outcome != "scored" for c in cases)
    seen = ", on cases that were trained on" * any(f.saw_its_cases for f in run.folds)
    return (
        Card(f"mean Dice, {name}{seen}", dice[2], f"95 % CI {dice[3]}; median {dice[5]}"),
        Card("mean surface Dice, 5 mm", surface[2], f"95 % CI {surface[3]}"),
        Card("mean HD95", f"{distance[2]} mm", f"95 % CI {distance[3]}; median {distance[5]}"),
        Card("failures", f"{bad} of {len(cases)}", "cases", "bad" if bad else ""),
        about_run,
    )


# ---------------------------------------------------------------------------------- command line


def output_file(given: Path | None, paths: Sequence[Path], runs: Sequence[RunRecord]) -> Path:
    """Where the page goes: as asked, else into the fold or run.

    Raises:
        UsageError: if several runs are compared and no file is named.
    """
    if given is not None:
        if given.is_dir():
            raise UsageError(
                f"--output {given} is a folder; name a file, for instance {given / REPORT}"
            )
        return given
    if len(runs) > 1:
        raise UsageError("several runs are compared: name the page, --output comparison.html")
    return (paths[0] if len(paths) == 1 else runs[0].folder) / REPORT


def _check_output(path: Path, overwrite: bool) -> None:
    if overwrite or not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(HEAD)
    if not page.is_report(head):
        raise UsageError(f"{path} exists and is not a page of this command; pass --overwrite")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = command.normalized(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(given)

    def body() -> str:
        if arguments.num_worst < 1:
            raise UsageError(f"--num-worst must be at least 1, found {arguments.num_worst}")
        if arguments.raw is not None and not arguments.raw.is_dir():
            raise UsageError(f"--raw {arguments.raw} is not a folder")
        runs = records.read_runs(arguments.run)
        path = output_file(arguments.output, arguments.run, runs)
        _check_output(path, arguments.overwrite)
        made = make_page(runs, Options(arguments.checkpoint, arguments.raw, arguments.num_worst))
        for notice in made.notices:
            LOGGER.warning("%s", notice)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page.render(made))
        LOGGER.info("%.1f MB", path.stat().st_size / 1e6)
        return str(path)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
