"""Post-processing of label maps: largest component, its search, the organisers' filter (spec 05).

``determine`` tries on cross-validated predictions whether keeping only the largest component helps
(§11.2), and writes ``postprocessing.json`` as nnU-Net does; ``apply`` replays such a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from panther_jax.base.errors import PantherError
from panther_jax.base.files import read_json
from panther_jax.base.workers import Failure, map_cases
from panther_jax.evaluation import metrics
from panther_jax.evaluation.components import (
    LARGEST_COMPONENT,
    Step,
    flat_labels,
    keep_largest_component,
)
from panther_jax.images.imageio import read_label, write_label
from panther_jax.plans.labels import LabelValue


class PostprocessError(PantherError, ValueError):
    """Predictions that cannot be post-processed; the message names them."""


# -------------------------------------------------------------------------------------- search


@dataclass(frozen=True)
class _Case:
    """A prediction, its reference, and what its labels mean."""

    prediction: Path
    reference: Path
    classes: tuple[LabelValue, ...]
    ignore_id: int | None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Search:
    """Result of :func:`determine_postprocessing`: the accepted chain, both summaries."""

    chain: tuple[Any, ...]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    predictions: tuple[Path, ...]

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The labels of each accepted step."""
        return tuple(flat_labels(labels) for labels in self.chain)

    def to_json(self) -> dict[str, Any]:
        """The content of nnU-Net's ``postprocessing.json`` (spec 05 §11.2)."""
        scores = {
            name: {key: summary[key] for key in ("foreground_mean", "mean")}
            for name, summary in (("input_folder", self.before), ("postprocessed", self.after))
        }
        return scores | {
            "postprocessing_fns": [LARGEST_COMPONENT] * len(self.chain),
            "postprocessing_kwargs": [{"labels_or_regions": labels} for labels in self.chain],
        }


def determine_postprocessing(
    predictions: Sequence[Path],
    references: Path,
    *,
    classes: Sequence[LabelValue],
    ignore_id: int | None = None,
    workers: int = 0,
) -> Search:
    """Search the largest-component steps that raise Dice (spec 05 §11.2).

    All foreground labels at once are tried first: accepted if the mean Dice rises and that of no
    class falls. Then each class, if there are several, on top of what was accepted: if its own
    Dice rises. ``classes`` are labels or regions in declared order.

    Raises:
        PostprocessError: if there is no prediction, a case twice, or a case cannot be scored.
    """
    cases = _paired(predictions, references, tuple(classes), ignore_id)
    chain: list[Any] = []
    before = best = _score(cases, chain, workers)
    together = list(flat_labels(classes))
    candidate = _score(cases, [together], workers)
    if _all_gain(best, candidate):
        chain, best = [together], candidate
    for value in classes if len(classes) > 1 else ():
        candidate = _score(cases, [*chain, value], workers)
        key = metrics.class_key(value)
        if candidate["mean"][key]["Dice"] > best["mean"][key]["Dice"]:
            chain, best = [*chain, value], candidate
    return Search(tuple(chain), before, best, tuple(case.prediction for case in cases))


def _all_gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    classes = zip(before["mean"].values(), after["mean"].values(), strict=True)
    return after["foreground_mean"]["Dice"] > before["foreground_mean"]["Dice"] and not any(
        new["Dice"] < old["Dice"] for old, new in classes
    )


def _paired(
    predictions: Sequence[Path],
    references: Path,
    classes: tuple[LabelValue, ...],
    ignore_id: int | None,
) -> list[_Case]:
    if not classes:
        raise PostprocessError("no class to post-process; dataset.json declares background only")
    by_name = {path.name: path for path in predictions}
    if len(by_name) < len(predictions):
        names = [path.name for path in predictions]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise PostprocessError(
            f"cases predicted twice: {', '.join(twice[:20])}\n"
            "  Each case must be in the validation of one fold only."
        )
    if not by_name:
        raise PostprocessError("no prediction to score; name a folder of label maps")
    missing = [name for name in by_name if not (references / name).is_file()]
    if missing:
        raise PostprocessError(
            f"{references}: no reference for {', '.join(missing[:20])}; references are named as "
            "predictions are"
        )
    return [
        _Case(path, references / name, classes, ignore_id) for name, path in sorted(by_name.items())
    ]


def _score(cases: Sequence[_Case], chain: Sequence[Any], workers: int) -> dict[str, Any]:
    """Summary of all cases after a chain of steps; predictions are read again, not kept."""
    steps = tuple(flat_labels(labels) for labels in chain)
    tasks = [(case.prediction.name, replace(case, steps=steps)) for case in cases]
    scored, broken = [], []
    for name, result in map_cases(_score_case, tasks, workers=workers):
        if isinstance(result, Failure):
            broken.append(f"{name}: {result.message}")
        else:
            scored.append(result)
    if broken:
        raise PostprocessError("\n".join(["cases that cannot be scored:", *sorted(broken)[:20]]))
    return metrics.summarise(scored)


def _score_case(case: _Case) -> dict[str, Any]:
    reference, _ = read_label(case.reference)
    prediction = postprocess(read_label(case.prediction)[0], case.steps)
    return {
        "metrics": metrics.label_counts(reference, prediction, case.classes, case.ignore_id),
        "prediction_file": str(case.prediction),
        "reference_file": str(case.reference),
    }


# -------------------------------------------------------------------------------------- replay


def read_postprocessing(path: Path) -> tuple[Step, ...]:
    """The steps of a ``postprocessing.json``.

    Raises:
        FileNotFoundError, PostprocessError: if it is missing, or names a function we do not know.
    """
    stored = read_json(path)
    functions = stored.get("postprocessing_fns") if isinstance(stored, Mapping) else None
    settings = stored.get("postprocessing_kwargs") if isinstance(stored, Mapping) else None
    if not isinstance(functions, list) or not isinstance(settings, list):
        raise PostprocessError(
            f"{path}: expected the lists 'postprocessing_fns' and 'postprocessing_kwargs', as "
            "`determine` writes them"
        )
    unknown = [name for name in functions if name != LARGEST_COMPONENT]
    if unknown or len(functions) != len(settings):
        raise PostprocessError(
            f"{path}: {len(functions)} functions {functions} with {len(settings)} settings; known "
            f"is {LARGEST_COMPONENT}, with 'labels_or_regions'"
        )
    try:
        return tuple(flat_labels(one["labels_or_regions"]) for one in settings)
    except (KeyError, TypeError, ValueError):
        raise PostprocessError(f"{path}: 'labels_or_regions' is missing or not integers") from None


def postprocess(
    label_map: Integer[np.ndarray, "z y x"], steps: Sequence[Step]
) -> Integer[np.ndarray, "z y x"]:
    """Apply steps in order."""
    for labels in steps:
        label_map = keep_largest_component(label_map, labels)
    return label_map


def postprocess_files(
    paths: Sequence[Path], steps: Sequence[Step], output: Path, *, workers: int = 0
) -> None:
    """Apply steps to label map files; they keep their names and geometry.

    Raises:
        PostprocessError: listing the files that cannot be used, after all others are done.
    """
    output.mkdir(parents=True, exist_ok=True)
    tasks = [(path.name, (path, tuple(steps), output / path.name)) for path in paths]
    broken = []
    for name, result in map_cases(_postprocess_file, tasks, workers=workers):
        if isinstance(result, Failure):
            broken.append(f"{name}: {result.message}")
    if broken:
        raise PostprocessError(
            "\n".join(
                [f"{len(broken)} of {len(tasks)} files cannot be post-processed:", *sorted(broken)]
            )
        )


def _postprocess_file(task: tuple[Path, tuple[Step, ...], Path]) -> None:
    path, steps, output = task
    label_map, geometry = read_label(path)
    write_label(output, postprocess(label_map, steps), geometry)
