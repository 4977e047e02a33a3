"""Two evaluations compared, case by case."""

from collections.abc import Mapping
from typing import Any

from panther_jax.base.console import table
from panther_jax.evaluation import scoring, statistics
from panther_jax.evaluation.results import _limits, _number, _shown
from panther_jax.evaluation.scoring import EvaluationError

COMPARISON_FORMAT = "panther_jax.comparison/1"


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
                statistics.aggregate_title(name),
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
