"""An evaluation as JSON, CSV and text, and read again."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panther_jax.base.console import table
from panther_jax.base.files import read_json, write_json, write_text
from panther_jax.evaluation import metrics, scoring, statistics
from panther_jax.evaluation.folds import SEEN
from panther_jax.evaluation.scoring import EvaluationError

COMPARED_KEYS = ("name", "preset", "spacing_order", "label", "per_subject", "failed")
MM3_IN_ML = 1000.0

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
    panther = (*metrics.METRICS.names, "gt_volume", "pred_volume")
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
            *(_number(case[m]) for m in metrics.METRICS.names),
            *(f"{case[v] / MM3_IN_ML:.2f}" for v in ("gt_volume", "pred_volume")),
            {"missed": "missed", "false_positive": "false positive"}.get(case["outcome"], ""),
        ]
        for case in result["per_subject"]
    ]
    titles = [metrics.METRICS.find(name).title for name in metrics.METRICS.names]
    volumes = ("reference ml", "predicted ml", "")
    rows = [
        [name, str(fold["num_cases"]), *_aggregates(fold["aggregates"]), *_detections(fold)]
        for name, fold in result["folds"].items()
    ]
    seen = bool(result.get("trained_on"))
    rows.append(
        [
            "all (trained on)" if seen else "all",
            str(result["num_cases"]),
            *_aggregates(result["aggregates"]),
            *_detections(result),
        ]
    )
    limits = [
        _limits(name, result["intervals"]["of"][name]) for name in statistics.aggregate_names()
    ]
    rows.append([f"{100 * result['intervals']['level']:g} % interval", "", *limits, "", ""])
    means = ("cases", *titles, "volume RMSE ml", "missed", "false positive")
    label, preset = result["label"], result["preset"]
    scored = label["name"] + (f" (label {label['value']})" if preset == "default" else "")
    scored += " (by fold label 1)" if preset == "fork_b" and result["folds"] else ""
    return "\n\n".join(
        [
            *([SEEN] if seen else []),
            table(["case", *titles, *volumes], cases),
            table(["mean over cases", *means], rows),
            f"{scored}, preset {preset}, spacing order {result['spacing_order']}; "
            f"{result['intervals']['method']}",
        ]
    )


def _aggregates(values: Mapping[str, float]) -> list[str]:
    return [_number(_shown(name, values[name])) for name in statistics.aggregate_names()]


def _detections(values: Mapping[str, Any]) -> list[str]:
    return [str(values["detections"][k]) for k in ("num_missed", "num_false_positive")]


def _limits(name: str, limits: Sequence[float]) -> str:
    low, high = (_number(_shown(name, limit)) for limit in limits)
    return f"{low} to {high}"


def _shown(aggregate: str, value: float) -> float:
    return value / MM3_IN_ML if aggregate == statistics.RMSE else value


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


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
