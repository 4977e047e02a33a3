"""Score label maps against references: ``python -m panther_jax.evaluate --predictions DIR …``."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panther_jax.base import command
from panther_jax.base.command import UsageError
from panther_jax.base.console import Progress
from panther_jax.base.files import write_json
from panther_jax.config.schema import CHECKPOINTS
from panther_jax.evaluation import folds, scoring
from panther_jax.evaluation.comparison import compare, comparison_text
from panther_jax.evaluation.results import _read_evaluation, evaluation_text, write_evaluation
from panther_jax.evaluation.scoring import (
    Evaluation,
    EvaluationError,
    Scoring,
    evaluate,
    evaluate_runs,
    failure_text,
)
from panther_jax.library import Face
from panther_jax.plans.labels import LabelValue

__all__ = ["Evaluation", "Scoring", "evaluate", "evaluate_runs", "main"]

LOGGER = logging.getLogger("panther_jax")
PRESETS = ("default", "organisers", "fork_a", "fork_b")
EXAMPLE = "python -m panther_jax.evaluate --predictions out --references raw/labelsTr"


# -------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.evaluate",
        "Score label maps: PANTHER's metrics, nnU-Net's summary, intervals, comparisons.",
        f"{EXAMPLE}\n  python -m panther_jax.evaluate --runs data/runs/mri_t2/fold_*\n"
        "  python -m panther_jax.evaluate --compare data/runs/mri_t2 data/runs/mri_t2_da5",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", type=Path, metavar="DIR", help="label maps to score")
    what.add_argument(
        "--runs", type=Path, nargs="+", metavar="FOLD", help="folds of a run, or the run's folder"
    )
    what.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="baseline and candidate: runs, folders of label maps, or JSON files written here",
    )
    add = parser.add_argument
    add(
        "--references",
        type=Path,
        metavar="DIR",
        help="reference label maps, or a raw data set; runs know those that they validated with",
    )
    add("--output", type=Path, metavar="FILE.json", help="write JSON, beside it CSV and summary")
    add("--overwrite", action="store_true", help="replace the output")
    add("--label", help="what the metrics score: a label's name or number (default: the tumor)")
    add("--preset", choices=PRESETS, default="default", help="edge cases (default: %(default)s)")
    add(
        "--spacing-order",
        choices=("geometric", "organisers"),
        help="organisers reproduces their swap of x and z; default: as the preset has it",
    )
    add("--checkpoint", choices=CHECKPOINTS, default="final", help="of runs (final)")
    add("--dataset-json", type=Path, help="label declaration, if it does not lie with the files")
    add("--allow-missing", action="store_true", help="leave out references without prediction")
    add("--workers", type=int, help="processes (default: by cases and cores, at most 8)")
    add("--seed", type=int, default=0, help="of intervals and p-values (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    if arguments.predictions is not None and arguments.references is None:
        parser.error("--predictions needs --references")
    if arguments.workers is not None and arguments.workers < 0:
        parser.error(f"--workers must not be negative, found {arguments.workers}")
    if arguments.label is not None and arguments.preset != "default":
        parser.error(f"--label belongs to the default preset; {arguments.preset} has its own rule")
    if arguments.seed < 0:
        parser.error(f"--seed must not be negative, found {arguments.seed}")
    return command.run(
        lambda: _compare(arguments) if arguments.compare else _evaluate_one(arguments),
        quiet=arguments.quiet,
        debug=arguments.debug,
    )


def _evaluate_one(arguments: argparse.Namespace) -> str:
    _require_free(arguments)
    result, evaluation = _result(arguments, arguments.runs or [arguments.predictions])
    assert evaluation is not None
    if arguments.output is not None:
        write_evaluation(arguments.output, result, evaluation.summary())
    return _finished(evaluation_text(result), arguments, [result])


def _compare(arguments: argparse.Namespace) -> str:
    _require_free(arguments)
    for path in arguments.compare:  # before the first is scored
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; name a run, a folder of label maps, or a JSON of --output"
            )
    results = [_result(arguments, [path])[0] for path in arguments.compare]
    for result in results:
        if result.get("trained_on"):
            LOGGER.warning("%s: %s", result["name"], folds.SEEN)
    result = compare(*results, seed=arguments.seed)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, result)
    return _finished(comparison_text(result), arguments, results)


def _require_free(arguments: argparse.Namespace) -> None:
    path = arguments.output
    if path is not None and path.exists() and not arguments.overwrite:
        raise EvaluationError(f"{path} exists; pass --overwrite to replace it, or name another")


def _finished(text: str, arguments: argparse.Namespace, results: Sequence[Mapping]) -> str:
    """The text of the result; raises where cases are missing from it, after printing it."""
    if arguments.output is not None:
        text = f"{text}\n\n{arguments.output}"
    failed = {case: message for result in results for case, message in result["failed"].items()}
    if failed:
        print(text)
        raise EvaluationError(failure_text(failed))
    return text


def _result(
    arguments: argparse.Namespace, paths: Sequence[Path]
) -> tuple[dict[str, Any], Evaluation | None]:
    """The JSON of what paths name: an evaluation's file, folds of a run, or label maps."""
    if len(paths) == 1 and paths[0].is_file():
        return _read_evaluation(paths[0]), None
    is_run = arguments.runs is not None or folds.is_run(paths[0])
    if arguments.predictions is not None:
        is_run = False
    if not is_run and arguments.references is None:
        raise UsageError(f"{paths[0]} is no run; score a folder of label maps with --references")
    places = [p for p in (arguments.references, *paths) if p is not None]
    settings = _scoring(arguments, places)
    bar = _Bar(f"scoring {folds.run_name(paths[0])}: case")
    common = {"scoring": settings, "num_workers": arguments.workers, "progress": bar.update}
    if is_run:
        evaluation = evaluate_runs(
            paths, references=arguments.references, checkpoint=arguments.checkpoint, **common
        )
    else:
        evaluation = evaluate(
            paths[0], arguments.references, allow_missing=arguments.allow_missing, **common
        )
    bar.close()
    return evaluation.to_json(seed=arguments.seed), evaluation


def _scoring(arguments: argparse.Namespace, places: Sequence[Path]) -> Scoring:
    """What to score, by the command line and the dataset.json that lies with the files."""
    path = arguments.dataset_json or folds.find_dataset_json(places)
    labels = folds.read_labels(path)
    if path is not None:
        LOGGER.info("labels of %s", path)
    settings = scoring.default_scoring(labels)
    return dataclasses.replace(
        settings,
        label=settings.label if arguments.label is None else _label(arguments.label, settings),
        preset=arguments.preset,
        spacing_order=arguments.spacing_order,
    )


def _label(text: str, settings: Scoring) -> tuple[str, LabelValue]:
    named = {name.casefold(): (name, value) for name, value in settings.classes}
    if text.casefold() in named:
        return named[text.casefold()]
    by_value = {str(value): (name, value) for name, value in settings.classes}
    if text in by_value:
        return by_value[text]
    if text.isdigit() and settings.labels is None:
        return f"label {text}", int(text)
    known = ", ".join(f"{name} ({value})" for name, value in settings.classes)
    hint = "; name a dataset.json with --dataset-json" if settings.labels is None else ""
    raise UsageError(f"--label {text} is not declared; there are: {known}{hint}")


class _Bar:
    """A progress line that learns its length with the first case."""

    def __init__(self, label: str):
        self._label = label
        self._bar: Progress | None = None

    def update(self, case_id: str, done: int, total: int) -> None:
        self._bar = self._bar or Progress(total, label=self._label, every_seconds=5.0)
        self._bar.update(done, case_id)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


sys.modules[__name__].__class__ = Face  # panther_jax.evaluate is a function too


if __name__ == "__main__":
    sys.exit(main())
