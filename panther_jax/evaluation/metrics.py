"""Segmentation metrics: PANTHER's, surface distances, nnU-Net's ``summary.json`` (spec 06).

NumPy and SciPy only. Averages and percentiles over surfaces are area-weighted. What is measured
of a case is a table, :data:`METRICS`: a metric is one function and one row; a user's file adds one.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Integer

from panther_jax.base import plugins
from panther_jax.base.files import write_text
from panther_jax.base.registry import Registry
from panther_jax.evaluation.surfaces import (
    SurfaceDistances,
    bounding_box,
    check_shapes,
    surface_distances,
)
from panther_jax.plans.labels import Labels, LabelValue

Preset = Literal["default", "organisers", "fork_a", "fork_b", "fork_b_folds"]
SpacingOrder = Literal["geometric", "organisers"]

SURFACE_DICE_TOLERANCE_MM = 5.0
HAUSDORFF_PERCENT = 95.0
TUMOR_NAMES = ("tumor", "tumour", "lesion")
SUMMARY_METRICS = ("Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref")

# ------------------------------------------------------------------------------------- measures


def dice(
    reference_mask: Bool[np.ndarray, "..."], prediction_mask: Bool[np.ndarray, "..."]
) -> float:
    """Volumetric Dice; NaN if both masks are empty.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(reference_mask, prediction_mask)
    total = np.count_nonzero(reference_mask) + np.count_nonzero(prediction_mask)
    return _ratio(2 * np.count_nonzero(reference_mask & prediction_mask), total)


def _ratio(numerator: Any, denominator: Any) -> float:
    return float(numerator / denominator) if denominator else math.nan


def average_surface_distances(surfaces: SurfaceDistances) -> tuple[float, float]:
    """Area-weighted mean distance, reference to prediction and back; NaN from an empty mask."""
    return (
        _weighted_mean(surfaces.reference_to_prediction, surfaces.reference_areas),
        _weighted_mean(surfaces.prediction_to_reference, surfaces.prediction_areas),
    )


def _weighted_mean(distances: np.ndarray, areas: np.ndarray) -> float:
    return _ratio(float(np.sum(distances * areas)), float(np.sum(areas)))


def mean_average_surface_distance(surfaces: SurfaceDistances) -> float:
    """MASD: mean of the two directed averages; NaN if a mask is empty."""
    return sum(average_surface_distances(surfaces)) / 2


def surface_dice(
    surfaces: SurfaceDistances, tolerance_mm: float | int = SURFACE_DICE_TOLERANCE_MM
) -> float:
    """Share of both surfaces within the tolerance (inclusive) of the other one (spec 06 §3.3)."""
    reference, prediction = surfaces.reference_areas, surfaces.prediction_areas
    near = np.sum(reference[surfaces.reference_to_prediction <= tolerance_mm])
    near += np.sum(prediction[surfaces.prediction_to_reference <= tolerance_mm])
    return _ratio(float(near), float(np.sum(reference) + np.sum(prediction)))


def robust_hausdorff(surfaces: SurfaceDistances, percent: float | int = HAUSDORFF_PERCENT) -> float:
    """Larger of the two directed percentiles by area, not interpolated (spec 06 §3.4)."""
    return max(
        _percentile(surfaces.reference_to_prediction, surfaces.reference_areas, percent),
        _percentile(surfaces.prediction_to_reference, surfaces.prediction_areas, percent),
    )


def _percentile(distances: np.ndarray, areas: np.ndarray, percent: float | int) -> float:
    if not len(distances):
        return math.inf
    covered = np.cumsum(areas) / np.sum(areas)
    index = int(np.searchsorted(covered, percent / 100))
    return float(distances[min(index, len(distances) - 1)])


# ------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Masks:
    """The scored class of a case: two masks, and the spacing z, y, x in mm.

    They may be cut from a larger grid. Neither is empty, but by the organisers' preset, which
    measures an empty reference too.
    """

    reference: Bool[np.ndarray, "z y x"]
    prediction: Bool[np.ndarray, "z y x"]
    spacing: tuple[float, ...]

    @cached_property
    def surfaces(self) -> SurfaceDistances:
        """Distances between the surfaces of the two, in mm."""
        return surface_distances(self.reference, self.prediction, self.spacing)


@dataclass(frozen=True)
class Metric:
    """A row of the table: how a case is measured, and how the number is shown and compared.

    ``missed`` is the value where one of the masks is empty, by default the diagonal of the grid in
    mm; ``both_empty`` where both are. ``title`` heads columns, ``caption`` the report's, where
    ``{label}`` is the class.
    """

    measure: Callable[[Masks], float]
    title: str
    higher_is_better: bool
    missed: float | None = None
    both_empty: float = 0.0
    decimals: int = 3
    caption: str = ""


METRICS: Registry[Metric] = Registry(
    "metric",
    remedy=f"{plugins.HINT}; "
    "panther_jax.evaluation.metrics.METRICS.add('NAME')(Metric(...)) adds one",
)
"""The metrics of a case by name, in the order of tables."""

METRICS.add("volumetric_dice")(
    Metric(
        lambda masks: dice(masks.reference, masks.prediction),
        "Dice", higher_is_better=True, missed=0.0, both_empty=1.0, caption="Dice {label}",
    )
)  # fmt: skip
METRICS.add("surface_dice")(
    Metric(
        lambda masks: surface_dice(masks.surfaces),
        "surface Dice", higher_is_better=True, missed=0.0, both_empty=1.0,
        caption="surface Dice 5 mm",
    )
)  # fmt: skip
METRICS.add("hausdorff95")(
    Metric(
        lambda masks: robust_hausdorff(masks.surfaces),
        "HD95 mm", higher_is_better=False, decimals=1,
    )
)  # fmt: skip
METRICS.add("masd")(
    Metric(
        lambda masks: mean_average_surface_distance(masks.surfaces),
        "MASD mm", higher_is_better=False, decimals=2,
    )
)  # fmt: skip
PANTHER_METRICS = ("volumetric_dice", "surface_dice", "hausdorff95", "masd")
"""The challenge's, which every evaluation has; a user's file may add to the table."""


# -------------------------------------------------------------------------------------- PANTHER


def foreground_masks(
    reference: Integer[np.ndarray, "z y x"],
    prediction: Integer[np.ndarray, "z y x"],
    *,
    preset: Preset = "default",
    label: LabelValue = 1,
) -> tuple[Bool[np.ndarray, "z y x"], Bool[np.ndarray, "z y x"]]:
    """Reference and prediction mask from label maps, by the rule of a preset (spec 06 §4.2, §5.2).

    ``label``, an id or the ids of a region, matters to ``default`` only: the other presets have
    their own fixed rule.

    Raises:
        ValueError: if the organisers' rule does not accept the prediction's values.
    """
    if preset == "default":
        return member_mask(reference, label), member_mask(prediction, label)
    if preset in ("fork_a", "fork_b_folds"):
        return reference == 1, prediction == 1
    if preset == "fork_b":
        return reference > 0, prediction > 0
    values = np.unique(prediction).tolist()
    if not (set(values) <= {0, 1} or (len(values) == 2 and 0 in values)):
        raise ValueError(
            f"prediction holds the values {values}; the organisers' rule takes 0 and one other "
            "value: remove the other labels, or use another preset"
        )
    return reference != 0, prediction > 0


def member_mask(
    label_map: Integer[np.ndarray, "..."], value: LabelValue
) -> Bool[np.ndarray, "..."]:
    """Voxels of a label, or of any label of a region."""
    return np.isin(label_map, value) if isinstance(value, tuple) else label_map == value


def scored_label(labels: Labels) -> tuple[str, LabelValue]:
    """Name and value of the class that the PANTHER metrics score: the tumour, else the first."""
    named = [c for c in labels.classes if c[0].casefold() in TUMOR_NAMES]
    return (named or list(labels.classes))[0]


def panther_case(
    reference_mask: Bool[np.ndarray, "z y x"],
    prediction_mask: Bool[np.ndarray, "_ _ _"],
    *,
    spacing_zyx: tuple[float, ...],
    preset: Preset = "default",
    spacing_order: SpacingOrder | None = None,
    grid_shape_zyx: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """The PANTHER metrics of one case (spec 06 §1), and the edge cases of a preset (§5.2).

    Lengths are mm, volumes mm³. ``spacing_order="organisers"`` reproduces the organisers' mix-up
    of x and z (§4.5), ``"geometric"`` is right; by default it follows the preset. Where the
    organisers' script penalises, the dictionary has a further key ``time_score``. The masks may be
    cut from a larger grid, whose shape is then given; what is left out of them must be empty.

    Raises:
        ValueError: if shapes, spacing or settings do not fit.
    """
    check_shapes(reference_mask, prediction_mask)
    if len(spacing_zyx) != 3 or reference_mask.ndim != 3:
        raise ValueError(f"masks must have three axes and spacings, found {spacing_zyx}")
    order = spacing_order or default_spacing_order(preset)
    # spec 06 §4.5: z gets the spacing of x and the reverse
    spacing = spacing_zyx if order == "geometric" else spacing_zyx[::-1]
    voxel_volume = math.prod(spacing_zyx)
    num_reference = int(np.count_nonzero(reference_mask))
    num_prediction = int(np.count_nonzero(prediction_mask))
    volumes = {
        "gt_volume": num_reference * voxel_volume,
        "pred_volume": num_prediction * voxel_volume,
    }
    grid = grid_shape_zyx or reference_mask.shape
    table = {name: METRICS.find(name) for name in METRICS.names}
    extent = math.hypot(*(n * s for n, s in zip(grid, spacing, strict=True)))
    penalty = {name: extent if m.missed is None else m.missed for name, m in table.items()}
    if preset in ("organisers", "fork_a"):
        if num_prediction in (0, math.prod(grid)):  # spec 06 §4.3: all ones count as nothing
            return penalty | volumes | {"pred_volume": 0.0, "time_score": 0.0}
    elif num_reference == num_prediction == 0:
        return {name: m.both_empty for name, m in table.items()} | volumes
    elif num_reference == 0 or num_prediction == 0:
        return penalty | volumes
    masks = Masks(reference_mask, prediction_mask, spacing)
    return {name: float(m.measure(masks)) for name, m in table.items()} | volumes


def default_spacing_order(preset: Preset) -> SpacingOrder:
    """The spacing order that a preset implies (spec 06 §5.5)."""
    return "geometric" if preset == "default" else "organisers"


def panther_aggregate(cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over cases and the RMSE of the tumour volume in mm³ (spec 06 §1); NaN and inf spread.

    Raises:
        ValueError: if there are no cases.
    """
    if not cases:
        raise ValueError("no case was evaluated; predictions and references have no name in common")
    result = {f"mean_{m}": float(np.mean([c[m] for c in cases])) for m in METRICS.names}
    errors = np.array([c["pred_volume"] - c["gt_volume"] for c in cases], np.float64)
    return result | {"tumor_burden_rmse": float(np.sqrt(np.mean(errors**2)))}


def panther_detections(cases: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Number of cases where only the reference (missed), or only the prediction, is not empty."""
    pairs = [(c["gt_volume"] > 0, c["pred_volume"] > 0) for c in cases]
    return {
        "num_missed": sum(reference and not prediction for reference, prediction in pairs),
        "num_false_positive": sum(prediction and not reference for reference, prediction in pairs),
    }


# ------------------------------------------------------------------------------------- nnU-Net


def class_key(value: LabelValue) -> str:
    """A label or region as nnU-Net writes it as a key: ``1``, ``(1, 2)``, ``(1,)``."""
    return str(value)


def label_counts(
    reference: Integer[np.ndarray, "..."],
    prediction: Integer[np.ndarray, "..."],
    classes: Sequence[LabelValue],
    ignore_id: int | None = None,
) -> dict[str, dict[str, float | int]]:
    """nnU-Net's metrics of one case by class key (spec 06 §7.1); counts are integers.

    Voxels whose reference is ``ignore_id`` count nowhere. Dice and IoU are NaN where a class is
    neither in the reference nor in the prediction.

    Raises:
        ValueError: if the shapes differ or a label is negative.
    """
    return class_metrics(count_pairs(reference, prediction), classes, ignore_id)


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Number of voxels by the label of the reference (row) and of the prediction (column)."""

    values: Integer[np.ndarray, " value"]
    counts: Integer[np.ndarray, "value value"]

    @property
    def reference_values(self) -> tuple[int, ...]:
        """Labels that occur in the reference, ascending."""
        return tuple(self.values[self.counts.any(axis=1)].tolist())

    @property
    def prediction_values(self) -> tuple[int, ...]:
        """Labels that occur in the prediction, ascending."""
        return tuple(self.values[self.counts.any(axis=0)].tolist())

    def extended(self, num_voxels: int) -> "PairCounts":
        """The counts of a grid of ``num_voxels``, of which what was not counted is background."""
        counts = self.counts.copy()
        counts[0, 0] += num_voxels - int(counts.sum())
        return PairCounts(self.values, counts)


def class_metrics(
    pairs: PairCounts, classes: Sequence[LabelValue], ignore_id: int | None = None
) -> dict[str, dict[str, float | int]]:
    """As :func:`label_counts`, of pairs counted before."""
    counts = pairs.counts.copy()
    if ignore_id is not None:
        counts[pairs.values == ignore_id] = 0
    return {class_key(c): _class_metrics(counts, np.isin(pairs.values, c)) for c in classes}


def _class_metrics(counts: np.ndarray, members: np.ndarray) -> dict[str, float | int]:
    true_positive = int(counts[np.ix_(members, members)].sum())
    num_reference = int(counts[members].sum())
    num_prediction = int(counts[:, members].sum())
    wrong = num_reference + num_prediction - 2 * true_positive
    return {
        "Dice": _ratio(2 * true_positive, 2 * true_positive + wrong),
        "FN": num_reference - true_positive,
        "FP": num_prediction - true_positive,
        "IoU": _ratio(true_positive, true_positive + wrong),
        "TN": int(counts.sum()) - true_positive - wrong,
        "TP": true_positive,
        "n_pred": num_prediction,
        "n_ref": num_reference,
    }


def count_pairs(
    reference: Integer[np.ndarray, "..."], prediction: Integer[np.ndarray, "..."]
) -> PairCounts:
    """Count the voxels of each pair of labels; 0 is always among the values.

    Raises:
        ValueError: if the shapes differ or a label is negative.
    """
    check_shapes(reference, prediction)
    reference, prediction = np.atleast_1d(reference, prediction)
    box = bounding_box(reference, prediction)  # outside, all are pairs of zeros
    one, other = reference[box], prediction[box]
    highest = int(max(one.max(), other.max())) if one.size else 0
    if one.size and min(one.min(), other.min()) < 0:
        raise ValueError("label maps must not hold negative values")
    if highest < 256:
        values = np.arange(highest + 1)
    else:  # rare: few values, far apart
        values = np.union1d([0], np.union1d(one, other)).astype(np.int64)
        lookup = np.zeros(highest + 1, np.int64)
        lookup[values] = np.arange(len(values))
        one, other = lookup[one], lookup[other]
    number = len(values)
    dtype = np.uint8 if number**2 <= 256 else np.int64
    counts = np.zeros(number**2, np.int64)
    for row, other_row in zip(one, other, strict=True):  # small temporaries
        codes = row.astype(dtype) * dtype(number) + other_row.astype(dtype)
        counts += np.bincount(codes.ravel(), minlength=len(counts))
    counts[0] += reference.size - one.size
    return PairCounts(values, counts.reshape(number, number))


def summarise(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """nnU-Net's summary (spec 06 §7.2) of cases, sorted by the name of their prediction.

    Each case has ``metrics`` (from :func:`label_counts`), ``prediction_file`` and
    ``reference_file``. Means over cases skip NaN, the mean over foreground classes does not; label
    0 is not foreground.

    Raises:
        ValueError: if there are no cases, or they were not scored on the same classes.
    """
    if not cases:
        raise ValueError("no case to summarise; the folder of predictions has no label file")
    keys = list(cases[0]["metrics"])
    differing = [str(c["prediction_file"]) for c in cases if list(c["metrics"]) != keys]
    if differing:
        raise ValueError(f"cases scored on other classes than {keys}: {differing[:20]}")
    means = {key: _mean_metrics([c["metrics"][key] for c in cases], skip_nan=True) for key in keys}
    foreground = [means[key] for key in keys if key != "0"]
    ordered = sorted(cases, key=lambda c: Path(str(c["prediction_file"])).name)
    return {
        "foreground_mean": _mean_metrics(foreground, skip_nan=False),
        "mean": means,
        "metric_per_case": [
            {
                "metrics": {key: dict(case["metrics"][key]) for key in keys},
                "prediction_file": str(case["prediction_file"]),
                "reference_file": str(case["reference_file"]),
            }
            for case in ordered
        ],
    }


def _mean_metrics(entries: Sequence[Mapping[str, Any]], *, skip_nan: bool) -> dict[str, float]:
    means = {}
    for metric in SUMMARY_METRICS:
        values = [float(entry[metric]) for entry in entries]
        if skip_nan:
            values = [value for value in values if not math.isnan(value)]
        means[metric] = float(np.mean(values)) if values else math.nan
    return means


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary as nnU-Net does (spec 06 §7.3): sorted, indented, NaN literals; atomically.

    The folder is created.
    """
    write_text(path, json.dumps(summary, indent=4, sort_keys=True))
