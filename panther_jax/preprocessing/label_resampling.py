"""Resampling of label maps: the argmax over the resampled indicators of their labels.

Along an axis every rule of the plans but a spline of order 3 reads two voxels, so an output voxel
whose eight corners are equal has their label; only the others, a thin layer around the structures,
are scored (spec 02 §4.5-4.6). Their arithmetic is the reference's, term by term, because which of
two mathematically equal scores is larger depends on it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from panther_jax.plans.plans import Resampler
from panther_jax.preprocessing.resampling import (
    Kind,
    apply_operators,
    axis_kinds,
    axis_operator,
    separate_axis_of,
    two_taps,
)

Rule = Literal["spline", "torch", "torch_above_half", "above_half", "half"]

TORCH_SCORE_SCALE = 1000.0
SLAB_VOXELS = 1 << 20
"""Output voxels made at once: bounds memory, and fits caches."""


def resample_label(
    label: Integer[np.ndarray, "z y x"],
    new_shape: Sequence[int],
    resampler: Resampler,
    *,
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    legacy_half: bool = False,
) -> Integer[np.ndarray, "new_z new_y new_x"]:
    """Resample a label map by the scores of its labels; dtype kept, equal shape returned as it is.

    ``legacy_half`` is the spline rule of batchgenerators <= 0.25.1: a score of 0.5 or more takes
    the voxel, later labels overwrite, others become 0 (spec 02 §4.5).
    """
    new_shape = tuple(int(n) for n in new_shape)
    if new_shape == label.shape:
        return label
    separate = separate_axis_of(resampler, spacing, new_spacing)
    kinds = axis_kinds(resampler, separate)
    if separate is None:
        stages = [new_shape]
    else:  # in-plane first, then along the axis (spec 02 §4.5, §4.6)
        pairs = enumerate(zip(label.shape, new_shape, strict=True))
        stages = [tuple(old if axis == separate else new for axis, (old, new) in pairs), new_shape]
    for index, shape in enumerate(stages):
        if shape != label.shape:
            rule = _label_rule(resampler, legacy_half, along=index == 1)
            label = _resample_once(label, shape, kinds, rule)
    return label


def _label_rule(resampler: Resampler, legacy_half: bool, *, along: bool) -> Rule:
    if resampler.name == "resample_torch_fornnunet":
        lean = resampler.get("memefficient_seg_resampling", False)
        return "torch_above_half" if lean else "torch"
    if along:
        return "above_half"
    return "half" if legacy_half else "spline"


class _Axis:
    """The two voxels that each output voxel reads along an axis, their weights, and the nearest."""

    def __init__(self, num_in: int, num_out: int, kind: Kind) -> None:
        if num_in == num_out:
            kind = "spline0"  # unchanged axes cost nothing
        self.selects = kind in ("spline0", "torch_nearest_exact")
        self.low, self.high, self.weight_high, self.weight_low = two_taps(num_in, num_out, kind)
        self.nearest = two_taps(num_in, num_out, "spline0")[0]

    def rows(self, rows: slice) -> "_Axis":
        part = object.__new__(_Axis)
        part.selects = self.selects
        for name in ("low", "high", "weight_high", "weight_low", "nearest"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def spread(self, array: np.ndarray, axis: int, function: Any) -> np.ndarray:
        """Combine the two voxels that each output voxel reads."""
        low = np.take(array, self.low, axis=axis)
        return low if self.selects else function(low, np.take(array, self.high, axis=axis), out=low)


def _resample_once(
    label: np.ndarray, shape: tuple[int, ...], kinds: tuple[Kind, ...], rule: Rule
) -> np.ndarray:
    changed = [k for k, old, new in zip(kinds, label.shape, shape, strict=True) if old != new]
    if "spline3" in changed:
        return _resample_cubic(label, shape, kinds, rule)
    axes = tuple(
        _Axis(old, new, kind) for old, new, kind in zip(label.shape, shape, kinds, strict=True)
    )
    if all(axis.selects for axis in axes):
        return label[np.ix_(*(axis.low for axis in axes))]
    result = np.empty(shape, label.dtype)
    num_rows = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], num_rows):
        slab = slice(start, min(start + num_rows, shape[0]))
        _fill_slab(label, result[slab], (axes[0].rows(slab), *axes[1:]), rule)
    return result


def _fill_slab(label: np.ndarray, result: np.ndarray, axes: tuple[_Axis, ...], rule: Rule) -> None:
    first = axes[0]
    band = slice(int(first.low.min()), int(first.high.max()) + 1)
    lowest = highest = label[band]
    if lowest.min() == lowest.max():
        result[...] = lowest.flat[0]
        return
    within = object.__new__(_Axis)
    within.selects = first.selects
    within.low, within.high = first.low - band.start, first.high - band.start
    for axis, taps in ((2, axes[2]), (1, axes[1]), (0, within)):
        lowest = taps.spread(lowest, axis, np.minimum)
        highest = taps.spread(highest, axis, np.maximum)
    result[...] = lowest
    where = np.nonzero(lowest != highest)
    if where[0].size:
        result[where] = _decide(label, where, axes, rule)


def _decide(
    label: np.ndarray, where: tuple[np.ndarray, ...], axes: tuple[_Axis, ...], rule: Rule
) -> np.ndarray:
    """Score each label at the voxels ``where``, and choose by the rule."""
    corners = _corners(label, where, axes)
    weights = tuple((a.weight_low[i], a.weight_high[i]) for a, i in zip(axes, where, strict=True))
    values = np.unique(corners)
    if rule.startswith("torch"):
        scores = (_torch_score(corners == v, weights, rule) for v in values)
    else:
        product = _scipy_weights(weights)
        scores = (_scipy_score(corners == v, product) for v in values)
    shape = where[0].shape
    winner, best = np.zeros(shape, label.dtype), np.full(shape, -1.0)
    nearest = label[tuple(a.nearest[i] for a, i in zip(axes, where, strict=True))]
    for value, score in zip(values, scores, strict=True):
        if rule.endswith("above_half"):
            wins = score > 0.5
        elif rule == "half":
            wins = score >= 0.5
        else:
            wins = score > best  # strict: the smallest label keeps a tie
            if rule == "spline":  # spec 02 §4.5: but the nearest neighbour's label wins it
                wins |= (score == best) & (nearest == value)
            np.maximum(best, score, out=best)
        winner[wins] = value
    return winner


def _corners(
    label: np.ndarray, where: tuple[np.ndarray, ...], axes: tuple[_Axis, ...]
) -> np.ndarray:
    """Labels of the eight voxels that each output voxel reads: (8, voxel), C order of low, high."""
    shape = label.shape
    offsets = [
        [(taps[i] * stride).astype(np.intp) for taps in (axis.low, axis.high)]
        for axis, i, stride in zip(axes, where, (shape[1] * shape[2], shape[2], 1), strict=True)
    ]
    flat = label.reshape(-1)
    corners = np.empty((8, where[0].size), label.dtype)
    for row, (z, y, x) in enumerate(np.ndindex(2, 2, 2)):
        np.take(flat, offsets[0][z] + offsets[1][y] + offsets[2][x], out=corners[row])
    return corners


def _scipy_weights(weights: tuple[tuple[np.ndarray, np.ndarray], ...]) -> list[np.ndarray]:
    # SciPy multiplies a corner's weights in axis order
    return [weights[0][z] * weights[1][y] * weights[2][x] for z, y, x in np.ndindex(2, 2, 2)]


def _scipy_score(is_label: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    score = np.zeros(is_label.shape[1])
    for hit, weight in zip(is_label, weights, strict=True):  # ... and adds the corners in C order
        score += hit * weight
    return np.minimum(score, 1.0, out=score)


def _torch_score(
    is_label: np.ndarray, weights: tuple[tuple[np.ndarray, np.ndarray], ...], rule: Rule
) -> np.ndarray:
    """Interpolate in float32 along x, y, z in turn; for the plain rule of 1000, then float16."""
    scale = np.float32(TORCH_SCORE_SCALE if rule == "torch" else 1.0)
    score = (is_label * scale).reshape(2, 2, 2, -1)
    for low, high in reversed(weights):
        score = score[..., 0, :] * np.float32(low) + score[..., 1, :] * np.float32(high)
    np.clip(score, 0.0, scale, out=score)
    return score.astype(np.float16) if rule == "torch" else score


def _resample_cubic(
    label: np.ndarray, shape: tuple[int, ...], kinds: tuple[Kind, ...], rule: Rule
) -> np.ndarray:
    """Score every label everywhere: a spline of order 3 reads far voxels."""
    operators = tuple(
        None if old == new else axis_operator(old, new, kind)
        for old, new, kind in zip(label.shape, shape, kinds, strict=True)
    )
    winner, best = np.zeros(shape, label.dtype), np.full(shape, -1.0)
    for value in np.unique(label):
        score = np.clip(apply_operators((label == value).astype(np.float64), operators), 0.0, 1.0)
        wins = {"half": score >= 0.5, "above_half": score > 0.5}.get(rule, score > best)
        winner[wins] = value
        np.maximum(best, score, out=best)
    return winner
