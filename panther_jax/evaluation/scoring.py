"""Scoring of label maps against references, in folders or over a cross-validation (spec 06).

The PANTHER metrics by preset and nnU-Net's summary. Cases are scored in parallel; a case that
cannot be scored is kept with its message, and the others are done all the same.
"""

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

import panther_jax
from panther_jax.base import workers
from panther_jax.base.errors import PantherError
from panther_jax.config.schema import CheckpointName
from panther_jax.evaluation import metrics, statistics
from panther_jax.evaluation.folds import (
    find_dataset_json,
    find_folds,
    label_files,
    read_labels,
    reference_folder,
    run_name,
)
from panther_jax.evaluation.metrics import Preset, SpacingOrder
from panther_jax.images import imageio
from panther_jax.images.geometry import check_geometry
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels, LabelValue

FORMAT = "panther_jax.evaluation/1"
ORGANISERS_SPACING_TOLERANCE_MM = 1e-4  # spec 06 §4.1; they compare neither origin nor direction
MAX_LISTED = 20
CASES_A_WORKER = 8  # fewer are not worth the start of a process
MAX_WORKERS = 8
TUMOR = ("tumor", 1)

Progress = Callable[[str, int, int], None]


class EvaluationError(PantherError, ValueError):
    """An evaluation that cannot be made, or that left cases out; the message lists them."""


# -------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scoring:
    """What is scored: the PANTHER class and its preset, and the labels that files may hold.

    Without ``labels`` the files may hold any label, and the summary has the PANTHER class alone.
    """

    label: tuple[str, LabelValue] = TUMOR
    preset: Preset = "default"
    spacing_order: SpacingOrder | None = None
    labels: Labels | None = None

    @property
    def order(self) -> SpacingOrder:
        """The spacing order in force."""
        return self.spacing_order or metrics.default_spacing_order(self.preset)

    @property
    def scored(self) -> dict[str, Any]:
        """What the PANTHER metrics of the pooled cases look at: a name, and a value if it has one.

        Only the default preset looks at ``label``; the others have their own rule (spec 06 §5.2).
        """
        if self.preset == "default":
            return {"name": self.label[0], "value": self.label[1]}
        if self.preset == "fork_a":
            return {"name": "label 1", "value": 1}
        return {"name": "any label", "value": None}

    @property
    def fold_preset(self) -> Preset:
        """The preset of the results by fold (spec 06 §5.5)."""
        return "fork_b_folds" if self.preset == "fork_b" else self.preset

    @property
    def classes(self) -> tuple[tuple[str, LabelValue], ...]:
        """What nnU-Net's summary scores, by name."""
        return (self.label,) if self.labels is None else self.labels.classes


@dataclass(frozen=True)
class CaseFiles:
    """A case to score: its two files, None where one is missing, and the fold it belongs to."""

    id: str
    prediction: Path | None
    reference: Path | None
    fold: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class CaseScore:
    """The scores of one case; ``fold_panther`` are those that enter the results by fold."""

    files: CaseFiles
    panther: dict[str, float]
    fold_panther: dict[str, float]
    counts: dict[str, dict[str, float | int]]


def score_case(files: CaseFiles, scoring: Scoring) -> CaseScore:
    """Read and score one case; free of JAX, for a worker process.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or cannot be used, the grids differ, or
            a label is not declared.
    """
    prediction_path, reference_path = _require_files(files)
    reference, geometry = imageio.read_label(reference_path, unsigned=True)
    prediction, prediction_geometry = imageio.read_label(prediction_path, unsigned=True)
    strict = scoring.preset == "default"
    tolerances = (
        {}
        if strict
        else {
            "spacing_tolerance_mm": ORGANISERS_SPACING_TOLERANCE_MM,
            "origin_tolerance_mm": math.inf,
            "direction_tolerance": math.inf,
        }
    )
    check_geometry(
        files.id,
        prediction_geometry,
        geometry,
        names=("prediction", "reference"),
        paths=(prediction_path, reference_path),
        **tolerances,
    )
    scores = score_maps(reference, prediction, scoring, geometry=geometry, files=files)
    return CaseScore(files, scores.panther, scores.fold_panther, scores.counts)


@dataclass(frozen=True)
class MapScores:
    """The scores of a label map; ``fold_panther`` are those that enter the results by fold."""

    panther: dict[str, float]
    fold_panther: dict[str, float]
    counts: dict[str, dict[str, float | int]]


def score_maps(
    reference: Integer[np.ndarray, "z y x"],
    prediction: Integer[np.ndarray, "z y x"],
    scoring: Scoring,
    *,
    geometry: Geometry,
    files: CaseFiles | None = None,
) -> MapScores:
    """Score a label map on the grid of its reference: evaluation and validation both do so.

    Raises:
        EvaluationError: naming the file of ``files`` that holds a label that is not declared.
        ValueError: if a preset does not accept the prediction's values.
    """
    # Scored on a box: one voxel wider than the labels, so that background is in it, if anywhere.
    box = _wider(metrics.bounding_box(reference, prediction), reference.shape)
    cut = reference[box], prediction[box]
    pairs = metrics.count_pairs(*cut).extended(reference.size)
    if files is not None:
        _require_declared(files, pairs, scoring.labels)

    def panther(preset: Preset) -> dict[str, float]:
        masks = metrics.foreground_masks(*cut, preset=preset, label=scoring.label[1])
        return metrics.panther_case(
            *masks,
            spacing_zyx=geometry.spacing_zyx,
            preset=preset,
            spacing_order=scoring.order,
            grid_shape_zyx=geometry.shape_zyx,
        )

    pooled = panther(scoring.preset)
    by_fold = files is not None and files.fold is not None
    another = by_fold and scoring.fold_preset != scoring.preset
    ignore_id = None if scoring.labels is None else scoring.labels.ignore_id
    counts = metrics.class_metrics(pairs, [v for _, v in scoring.classes], ignore_id)
    return MapScores(pooled, panther(scoring.fold_preset) if another else pooled, counts)


def _wider(box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(max(0, b.start - 1), min(n, b.stop + 1)) for b, n in zip(box, shape, strict=True)
    )


def _require_files(files: CaseFiles) -> tuple[Path, Path]:
    if files.problem:
        raise EvaluationError(files.problem)
    if files.prediction is None:
        raise FileNotFoundError(
            f"no prediction for {files.reference}\n  Predict the case, or pass --allow-missing to "
            "leave cases without prediction out."
        )
    if files.reference is None:
        raise FileNotFoundError(
            f"no reference for {files.prediction}\n  Add its label map to the references, or move "
            "the prediction away."
        )
    if not files.reference.is_file():
        raise FileNotFoundError(
            f"the reference {files.reference} is not there\n  Name the folder of label maps with "
            "--references."
        )
    return files.prediction, files.reference


def _require_declared(files: CaseFiles, pairs: metrics.PairCounts, labels: Labels | None) -> None:
    if labels is None:
        return
    for what, path, values, allowed in (
        ("reference", files.reference, pairs.reference_values, labels.allowed_values),
        ("prediction", files.prediction, pairs.prediction_values, labels.ids),
    ):
        unknown = sorted(set(values) - set(allowed))
        if unknown:
            raise EvaluationError(
                f"{what} {path} holds the labels {unknown[:MAX_LISTED]}; dataset.json declares "
                f"{list(allowed)}\n  Renumber the label map, or name the dataset.json that it was "
                "made for with --dataset-json."
            )


# ----------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """Scores of all cases, and the message of each that could not be scored."""

    name: str
    scoring: Scoring
    scores: tuple[CaseScore, ...]
    failed: Mapping[str, str]
    origin: Mapping[str, Any]

    @property
    def per_subject(self) -> list[dict[str, Any]]:
        """The scored cases by name: the organisers' entries, and what we add."""
        return [_subject(score, self.scoring) for score in self.scores]

    @property
    def folds(self) -> dict[str, dict[str, Any]]:
        """Aggregates by fold; empty if the cases are not of folds."""
        found = {}
        for name in sorted({s.files.fold for s in self.scores if s.files.fold is not None}):
            group = [s for s in self.scores if s.files.fold == name]
            cases = [s.fold_panther for s in group]
            found[name] = {
                "num_cases": len(group),
                "subjects": [s.files.id for s in group],
                "aggregates": metrics.panther_aggregate(cases),
                "detections": metrics.panther_detections(cases),
            }
        return found

    def summary(self) -> dict[str, Any]:
        """nnU-Net's summary (spec 06 §7)."""
        return metrics.summarise(
            [
                {
                    "metrics": s.counts,
                    "prediction_file": s.files.prediction,
                    "reference_file": s.files.reference,
                }
                for s in self.scores
            ]
        )

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Everything as a JSON-able dictionary; ``seed`` is that of the intervals."""
        cases, means = self.per_subject, self.summary()["mean"]
        limits = statistics.intervals(cases, seed=seed)
        return {
            "format": FORMAT,
            "name": self.name,
            "preset": self.scoring.preset,
            "spacing_order": self.scoring.order,
            "label": self.scoring.scored,
            **self.origin,
            "num_cases": len(cases),
            "per_subject": cases,
            "aggregates": metrics.panther_aggregate(cases),
            "detections": metrics.panther_detections(cases),
            "intervals": {
                "method": statistics.METHOD,
                "level": statistics.LEVEL,
                "resamples": statistics.RESAMPLES,
                "seed": seed,
                "of": {name: [i.low, i.high] for name, i in limits.items()},
            },
            "classes": {n: means[metrics.class_key(v)] for n, v in self.scoring.classes},
            "folds": self.folds,
            "failed": dict(self.failed),
            "versions": {
                "panther_jax": panther_jax.__version__,
                "python": platform.python_version(),
            },
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


def _subject(score: CaseScore, scoring: Scoring) -> dict[str, Any]:
    has_reference, has_prediction = (score.panther[k] > 0 for k in ("gt_volume", "pred_volume"))
    outcome = {
        (True, True): "both",
        (True, False): "missed",
        (False, True): "false_positive",
        (False, False): "both_empty",
    }[has_reference, has_prediction]
    return {
        "subject": score.files.id,
        "fold": score.files.fold,
        **score.panther,
        "outcome": outcome,
        "classes": {
            name: score.counts[metrics.class_key(value)]["Dice"] for name, value in scoring.classes
        },
        "prediction_file": str(score.files.prediction),
        "reference_file": str(score.files.reference),
    }


def evaluate(
    predictions: Path,
    references: Path,
    *,
    scoring: Scoring | None = None,
    allow_missing: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a folder of label maps against a folder of references, matched by case name.

    ``references`` may be a raw data set or a store. By default the labels are those of the
    ``dataset.json`` that lies with them. With ``allow_missing`` references without prediction are
    left out; else they are failures.

    Raises:
        FileNotFoundError: if a folder is missing.
        EvaluationError: if no case could be scored.
    """
    found, twice = label_files(predictions)
    known, known_twice = label_files(reference_folder(references))
    problems = known_twice | twice
    wanted = {*found, *twice} if allow_missing else {*found, *known, *problems}
    cases = [
        CaseFiles(case, found.get(case), known.get(case), problem=problems.get(case, ""))
        for case in sorted(wanted)
    ]
    origin = {"checkpoint": None, "predictions": str(predictions), "references": str(references)}
    return _evaluate(
        predictions.resolve().name,
        cases,
        scoring or _found_scoring([references, predictions]),
        {**origin, "runs": []},
        num_workers=num_workers,
        progress=progress,
    )


def evaluate_runs(
    runs: Sequence[Path],
    *,
    references: Path | None = None,
    checkpoint: CheckpointName = "final",
    scoring: Scoring | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a cross-validation, pooled and by fold: a run's folder, or the folders of its folds.

    References are those that training validated with, unless a folder is given.

    Raises:
        FileNotFoundError: if a fold is missing or not validated.
        CrossValidationError: if the folds are of several runs, or a case is in two of them.
        EvaluationError: if no case could be scored.
    """
    folds = find_folds(runs, checkpoint)
    known = None if references is None else reference_folder(references)
    given = {} if known is None else label_files(known)[0]
    cases = []
    for fold in folds:
        for case in sorted({*fold.predictions, *fold.references}):
            reference = (fold.references if known is None else given).get(case)
            cases.append(CaseFiles(case, fold.predictions.get(case), reference, fold=fold.name))
    run = folds[0].run
    places = [run] if references is None else [references, run]
    return _evaluate(
        run_name(run),
        sorted(cases, key=lambda c: c.id),
        scoring or _found_scoring(places),
        {
            "checkpoint": checkpoint,
            "predictions": None,
            "references": None if references is None else str(references),
            "runs": [str(fold.folder) for fold in folds],
            "trained_on": [fold.name for fold in folds if fold.saw_its_cases],
        },
        num_workers=num_workers,
        progress=progress,
    )


def default_scoring(labels: Labels | None) -> Scoring:
    """Scoring of the tumour by the default preset; without labels it is label 1."""
    return Scoring(label=TUMOR if labels is None else metrics.scored_label(labels), labels=labels)


def _found_scoring(places: Sequence[Path]) -> Scoring:
    return default_scoring(read_labels(find_dataset_json(places)))


def _evaluate(
    name: str,
    cases: Sequence[CaseFiles],
    scoring: Scoring,
    origin: Mapping[str, Any],
    *,
    num_workers: int | None,
    progress: Progress | None,
) -> Evaluation:
    if num_workers is None:
        num_workers = min(MAX_WORKERS, os.cpu_count() or 1, len(cases) // CASES_A_WORKER)
    scores: list[CaseScore] = []
    failed = {}
    work = functools.partial(score_case, scoring=scoring)
    tasks = [(case.id, case) for case in cases]
    done = 0
    for done, (case_id, result) in enumerate(
        workers.map_cases(work, tasks, workers=num_workers), start=1
    ):
        if isinstance(result, workers.Failure):
            failed[case_id] = result.message
        else:
            scores.append(result)
        if progress is not None:
            progress(case_id, done, len(tasks))
    if not scores:
        what = failure_text(failed) if failed else "there are none"
        raise EvaluationError(f"{name}: no case could be scored: {what}")
    scores.sort(key=lambda s: s.files.id)
    return Evaluation(name, scoring, tuple(scores), dict(sorted(failed.items())), origin)


def failure_text(failed: Mapping[str, str]) -> str:
    """The cases that could not be scored, the first with their messages."""
    lines = [f"{len(failed)} case(s) could not be scored:"]
    lines += [f"  {case}: {text}" for case, text in list(failed.items())[:MAX_LISTED]]
    if len(failed) > MAX_LISTED:
        lines.append(f"  ... and {len(failed) - MAX_LISTED} more")
    return "\n".join(lines)
