"""Score label maps against references: ``python -m panther_jax.evaluate --predictions DIR …``.

The five PANTHER metrics with their presets, nnU-Net's summary, cross-validations pooled and by
fold (``--runs``), and the comparison of two of them over the same cases (``--compare``).
"""

import argparse
import csv
import dataclasses
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panther_jax import command, crossval, metrics, scoring, statistics
from panther_jax.command import UsageError
from panther_jax.log import Progress, table, write_json, write_text
from panther_jax.plans import LabelValue, read_json
from panther_jax.scoring import (
    Evaluation,
    EvaluationError,
    Scoring,
    evaluate,
    evaluate_runs,
    failure_text,
)

__all__ = ["Evaluation", "Scoring", "evaluate", "evaluate_runs", "main"]

LOGGER = logging.getLogger("panther_jax")
COMPARISON_FORMAT = "panther_jax.comparison/1"
PRESETS = ("default", "organisers", "fork_a", "fork_b")
COMPARED_KEYS = ("name", "preset", "spacing_order", "label", "per_subject", "failed")
MM3_IN_ML = 1000.0
HEADER = ("Dice", "surface Dice", "HD95 mm", "MASD mm")
EXAMPLE = "python -m panther_jax.evaluate --predictions out --references raw/labelsTr"

# -------------------------------------------------------------------------------------- results


def write_evaluation(path: Path, result: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write ``FILE.json``, and beside it ``FILE.csv`` and nnU-Net's ``FILE.summary.json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_summary(_beside(path, ".summary.json"), summary)
    write_text(_beside(path, ".csv"), csv_text(result))
    write_json(path, result)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name.removesuffix(".json") + ending)


def csv_text(result: Mapping[str, Any]) -> str:
    """The scored cases of an evaluation's JSON as comma-separated values, with a header."""
    panther = (*metrics.PANTHER_METRICS, "gt_volume", "pred_volume")
    classes = list(result["classes"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["subject", "fold", *panther, "outcome", *(f"dice_{name}" for name in classes)]
        + ["prediction_file", "reference_file"]
    )
    for case in result["per_subject"]:
        writer.writerow(
            [case["subject"], case["fold"] or "", *(case[m] for m in panther), case["outcome"]]
            + [case["classes"][name] for name in classes]
            + [case["prediction_file"], case["reference_file"]]
        )
    return text.getvalue()


def evaluation_text(result: Mapping[str, Any]) -> str:
    """Tables of the cases, the folds and all together, from an evaluation's JSON."""
    cases = [
        [
            case["subject"],
            *(_number(case[m]) for m in metrics.PANTHER_METRICS),
            *(f"{case[v] / MM3_IN_ML:.2f}" for v in ("gt_volume", "pred_volume")),
            {"missed": "missed", "false_positive": "false positive"}.get(case["outcome"], ""),
        ]
        for case in result["per_subject"]
    ]
    volumes = ("reference ml", "predicted ml", "")
    rows = [
        [name, str(fold["num_cases"]), *_aggregates(fold["aggregates"]), *_detections(fold)]
        for name, fold in result["folds"].items()
    ]
    rows.append(
        ["all", str(result["num_cases"]), *_aggregates(result["aggregates"]), *_detections(result)]
    )
    limits = [_limits(name, result["intervals"]["of"][name]) for name in statistics.AGGREGATES]
    rows.append([f"{100 * result['intervals']['level']:g} % interval", "", *limits, "", ""])
    means = ("cases", *HEADER, "volume RMSE ml", "missed", "false positive")
    label, preset = result["label"], result["preset"]
    scored = label["name"] + (f" (label {label['value']})" if preset == "default" else "")
    scored += " (by fold label 1)" if preset == "fork_b" and result["folds"] else ""
    return "\n\n".join(
        [
            table(["case", *HEADER, *volumes], cases),
            table(["mean over cases", *means], rows),
            f"{scored}, preset {preset}, spacing order {result['spacing_order']}; "
            f"{result['intervals']['method']}",
        ]
    )


def _aggregates(values: Mapping[str, float]) -> list[str]:
    return [_number(_shown(name, values[name])) for name in statistics.AGGREGATES]


def _detections(values: Mapping[str, Any]) -> list[str]:
    return [str(values["detections"][k]) for k in ("num_missed", "num_false_positive")]


def _limits(name: str, limits: Sequence[float]) -> str:
    low, high = (_number(_shown(name, limit)) for limit in limits)
    return f"{low} to {high}"


def _shown(aggregate: str, value: float) -> float:
    return value / MM3_IN_ML if aggregate == statistics.RMSE else value


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


# ----------------------------------------------------------------------------------- comparison


def compare(
    baseline: Mapping[str, Any], candidate: Mapping[str, Any], *, seed: int = 0
) -> dict[str, Any]:
    """Compare two evaluations, as their JSON has them, over the cases that both scored.

    Raises:
        EvaluationError: if they were not scored alike, or have no case in common.
    """
    for what in ("preset", "spacing_order", "label"):
        if baseline[what] != candidate[what]:
            raise EvaluationError(
                f"{what} is {baseline[what]} in {baseline['name']}, {candidate[what]} in "
                f"{candidate['name']}\n  Evaluate both with the same settings."
            )
    ours, theirs = ([c["subject"] for c in e["per_subject"]] for e in (baseline, candidate))
    common = [case for case in ours if case in set(theirs)]
    changes = statistics.compare(baseline["per_subject"], candidate["per_subject"], seed=seed)
    names = _names(baseline, candidate)
    return {
        "format": COMPARISON_FORMAT,
        "baseline": names[0],
        "candidate": names[1],
        "num_cases": len(common),
        "only_in_a": sorted(set(ours) - set(common)),
        "only_in_b": sorted(set(theirs) - set(common)),
        "metrics": [change.to_json() for change in changes],
        "sentence": statistics.sentence(
            changes, num_cases=len(common), baseline=names[0], candidate=names[1]
        ),
        "seed": seed,
        "a": baseline,
        "b": candidate,
    }


def _names(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> tuple[str, str]:
    names = baseline["name"], candidate["name"]
    return names if names[0] != names[1] else (f"{names[0]} (A)", f"{names[1]} (B)")


def comparison_text(result: Mapping[str, Any]) -> str:
    """Table and sentence of a comparison."""
    rows = []
    for entry in result["metrics"]:
        name = entry["metric"]
        values = [_shown(name, entry[k]) for k in ("baseline", "candidate", "difference")]
        rows.append(
            [
                statistics.TITLES[name],
                *(_number(v) for v in values[:2]),
                "-" if values[2] != values[2] else f"{values[2]:+.3f}",
                _limits(name, (entry["low"], entry["high"])),
                *(_p_value(entry[k]) for k in ("p", "p_holm")),
                f"{entry['num_better']}/{entry['num_worse']}",
                entry["verdict"],
            ]
        )
    header = [f"{result['num_cases']} cases", result["baseline"], result["candidate"]]
    header += ["difference", "95 % interval", "p", "p (Holm)", "better/worse", ""]
    left_out = [
        f"only in {result[name]}: {', '.join(result[key][: scoring.MAX_LISTED])}"
        for name, key in (("baseline", "only_in_a"), ("candidate", "only_in_b"))
        if result[key]
    ]
    notes = [
        "Intervals: BCa bootstrap over cases; p: paired permutation test, corrected for the number "
        "of metrics by Holm's method.",
        *left_out,
        result["sentence"],
    ]
    return "\n\n".join([table(header, rows), "\n".join(notes)])


def _p_value(p: float) -> str:
    return "-" if p != p else "<0.001" if p < 0.001 else f"{p:.3f}"


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
    add("--checkpoint", choices=("final", "best"), default="final", help="of runs (final)")
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
    is_run = arguments.runs is not None or crossval.is_run(paths[0])
    if arguments.predictions is not None:
        is_run = False
    if not is_run and arguments.references is None:
        raise UsageError(f"{paths[0]} is no run; score a folder of label maps with --references")
    places = [p for p in (arguments.references, *paths) if p is not None]
    settings = _scoring(arguments, places)
    bar = _Bar(f"scoring {crossval.run_name(paths[0])}: case")
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


def _read_evaluation(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, Mapping) or value.get("format") != scoring.FORMAT:
        raise EvaluationError(
            f"{path} was not written by panther_jax.evaluate --output\n  Name a run, a folder of "
            "label maps, or such a file."
        )
    missing = [key for key in COMPARED_KEYS if key not in value]
    if missing or not isinstance(value["per_subject"], list):
        raise EvaluationError(
            f"{path} lacks {', '.join(missing) or 'a list of cases'}\n  Write it again with "
            "panther_jax.evaluate --output."
        )
    return dict(value)


def _scoring(arguments: argparse.Namespace, places: Sequence[Path]) -> Scoring:
    """What to score, by the command line and the dataset.json that lies with the files."""
    path = arguments.dataset_json or crossval.find_dataset_json(places)
    labels = crossval.read_labels(path)
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


if __name__ == "__main__":
    sys.exit(main())
