"""Separable resampling: one small operator table an axis, applied on the host or on the device.

Interpolation between voxel grids is linear and separable but for a final clip, so every rule of
nnU-Net's two resampling functions (spec 02 §4.5-4.6) is a matrix an axis, and label maps are the
argmax over the resampled indicators of their labels. Axes are z, y, x *after* the plans' transpose.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Integer, Shaped

from panther_jax.plans import Resampler

if TYPE_CHECKING:
    import jax

Kind = Literal["spline0", "spline1", "spline3", "torch_linear", "torch_nearest_exact"]
Operators = tuple[np.ndarray | None, ...]

ANISOTROPY_THRESHOLD = 3.0
SPLINE_PAD = 12
TORCH_SCORE_SCALE = 1000.0
BLOCK_ROWS = 64
"""Output rows of an operator applied at once; few enough that the band they read is narrow."""
SLAB_VOXELS = 1 << 20
"""Output voxels of a label map made at once: bounds memory, and fits caches."""
NEAR_TIE = 1e-9
"""Scores closer than this may be exact ties in the reference's order of summation."""


# ------------------------------------------------------------------------------ what to resample


def target_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, ...]:
    """Give the number of voxels an axis at the new spacing; halves round to even (spec 02 §4.4)."""
    triples = zip(spacing, new_spacing, shape, strict=True)
    return tuple(int(round(float(old) / float(new) * int(n))) for old, new, n in triples)


def separate_axis(
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    force: bool | None = None,
    *,
    threshold: float = ANISOTROPY_THRESHOLD,
) -> int | None:
    """Find the low-resolution axis that is resampled on its own, or None (spec 02 §4.5)."""
    if force is False:
        return None
    decisive = spacing
    if force is None:
        if max(spacing) / min(spacing) > threshold:
            decisive = spacing
        elif max(new_spacing) / min(new_spacing) > threshold:
            decisive = new_spacing
        else:
            return None
    coarsest = [axis for axis, s in enumerate(decisive) if max(decisive) / s == 1]
    return coarsest[0] if len(coarsest) == 1 else None


# --------------------------------------------------------------------------------- operator tables


def axis_operator(num_in: int, num_out: int, kind: Kind) -> Float[np.ndarray, "out in"]:
    """Tabulate the resampling of one axis: ``output = operator @ input``, float64.

    ``spline*`` have the coordinates and edge rule of ``skimage.transform.resize`` (mode edge), the
    ``torch_*`` kinds the float32 coordinates of ``torch.nn.functional.interpolate``.

    Raises:
        ValueError: if an axis is empty.
    """
    if num_in < 1 or num_out < 1:
        raise ValueError(f"cannot resample an axis of {num_in} voxels to {num_out} voxels")
    if kind == "spline3":
        return _cubic_operator(num_in, num_out)
    low, high, weight_high, weight_low = _two_taps(num_in, num_out, kind)
    operator = np.zeros((num_out, num_in))
    rows = np.arange(num_out)
    operator[rows, low] = weight_low
    operator[rows, high] += weight_high
    return operator


def _two_taps(num_in: int, num_out: int, kind: Kind) -> tuple[np.ndarray, ...]:
    """Neighbours and weights of the linear and nearest kinds: low, high, weight of high, of low."""
    out = np.arange(num_out)
    if kind.startswith("torch"):
        # spec 02 §4.6: torch computes coordinates in float32
        scale = np.float32(num_in) / np.float32(num_out)
        centre = out.astype(np.float32) + np.float32(0.5)
        if kind == "torch_nearest_exact":
            low = np.minimum(np.floor(centre * scale).astype(int), num_in - 1)
            return low, low, np.zeros(num_out), np.ones(num_out)
        # product and difference are one fused operation there, rounded once: rounded twice, the
        # coordinates of an axis of 500 voxels are off by up to 3e-5
        fused = (centre.astype(np.float64) * np.float64(scale) - 0.5).astype(np.float32)
        position = np.maximum(fused, np.float32(0))
        low = np.minimum(np.floor(position).astype(int), num_in - 1)
        fraction = position - low.astype(np.float32)
        weight_low = np.float32(1) - fraction
        high = np.minimum(low + 1, num_in - 1)
        return low, high, fraction.astype(np.float64), weight_low.astype(np.float64)
    position = (out + 0.5) * (num_in / num_out) - 0.5
    if kind == "spline0":
        position = np.clip(position, 0, num_in - 1)
        low = np.floor(position + 0.5).astype(int)  # spec 02 §4.5: ties go up
        return low, low, np.zeros(num_out), np.ones(num_out)
    # As SciPy: beyond the edge both neighbours are the edge voxel, with weights that add to one;
    # the last weight is what is missing to one. Both decide how exact ties round.
    below = np.floor(position)
    weight_low = 1.0 - (position - below)
    low = np.clip(below.astype(int), 0, num_in - 1)
    high = np.clip(below.astype(int) + 1, 0, num_in - 1)
    return low, high, 1.0 - weight_low, weight_low


def _cubic_operator(num_in: int, num_out: int) -> np.ndarray:
    from scipy import ndimage

    padded = np.pad(np.eye(num_in), ((SPLINE_PAD, SPLINE_PAD), (0, 0)), mode="edge")
    coefficients = ndimage.spline_filter1d(padded, order=3, axis=0, mode="mirror")
    position = (np.arange(num_out) + 0.5) * (num_in / num_out) - 0.5 + SPLINE_PAD
    knot = np.floor(position).astype(int)
    y = position - knot
    z = 1.0 - y
    weights = [
        z**3 / 6.0,
        (y * y * (y - 2.0) * 3.0 + 4.0) / 6.0,
        (z * z * (z - 2.0) * 3.0 + 4.0) / 6.0,
        y**3 / 6.0,
    ]
    taps = range(-1, 3)
    operator = sum(w[:, None] * coefficients[knot + t] for w, t in zip(weights, taps, strict=True))
    operator = np.asarray(operator)
    operator[np.abs(operator) < 1e-17] = 0.0  # the prefilter decays below rounding: a band remains
    return operator


def image_operators(
    shape: Sequence[int],
    new_shape: Sequence[int],
    resampler: Resampler,
    *,
    spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> Operators:
    """Tabulate what a resampler of the plans does to intensities or logits; None: axis unchanged.

    Clipping, which order 3 needs, is not part of the tables.
    """
    kinds = _kinds(resampler, _separate_axis_of(resampler, spacing, new_spacing))
    return tuple(
        None if old == new else axis_operator(old, new, kind)
        for old, new, kind in zip(shape, new_shape, kinds, strict=True)
    )


def _separate_axis_of(
    resampler: Resampler, spacing: Sequence[float], new_spacing: Sequence[float]
) -> int | None:
    # the two functions differ in the default, and plans may leave it out (spec 02 §4.5, §4.6)
    default = False if resampler.name == "resample_data_or_seg_to_shape" else None
    return separate_axis(
        spacing,
        new_spacing,
        resampler.get("force_separate_z", default),
        threshold=resampler.get("separate_z_anisotropy_threshold", ANISOTROPY_THRESHOLD),
    )


def _kinds(resampler: Resampler, separate: int | None) -> tuple[Kind, ...]:
    if resampler.name == "resample_torch_fornnunet":
        # spec 02 §4.6: without a separate axis the mode is linear whatever the plans say
        aniso = resampler.get("aniso_axis_mode", "nearest-exact")
        modes: dict[str, Kind] = {"nearest-exact": "torch_nearest_exact", "linear": "torch_linear"}
        if aniso not in modes:
            raise ValueError(
                f"plans: aniso_axis_mode {aniso!r} is not supported; expected {sorted(modes)}"
            )
        in_plane, along = "torch_linear", modes[aniso]
    else:
        in_plane = _spline_kind(resampler.get("order", 3), "order")
        along = _spline_kind(resampler.get("order_z", 0), "order_z")
    return tuple(along if axis == separate else in_plane for axis in range(3))


def _spline_kind(order: Any, name: str) -> Kind:
    kinds: dict[int, Kind] = {0: "spline0", 1: "spline1", 3: "spline3"}
    if order not in kinds:
        raise ValueError(f"plans: resampling {name} {order!r} is not supported; expected 0, 1 or 3")
    return kinds[order]


# ------------------------------------------------------------------------------------ application


def apply_operators(
    array: Shaped[np.ndarray, "..."], operators: Operators, *, dtype: Any = np.float64
) -> Shaped[np.ndarray, "..."]:
    """Apply one operator to each axis, in ``dtype``, the axis that shrinks most first."""
    order = sorted(
        (axis for axis, o in enumerate(operators) if o is not None),
        key=lambda axis: operators[axis].shape[0] / operators[axis].shape[1],  # type: ignore[union-attr]
    )
    result = np.ascontiguousarray(array, dtype=dtype)
    for axis in order:
        result = _apply_axis(result, operators[axis], axis)  # type: ignore[arg-type]
    return result


def apply_on_device(
    array: "Shaped[jax.Array, '...']",
    operators: Sequence[Any],
    *,
    first_axis: int = 0,
) -> "Shaped[jax.Array, '...']":
    """Apply operator i to axis ``first_axis + i`` (None: unchanged) in float32; may be jitted."""
    import jax
    import jax.numpy as jnp

    result = jnp.asarray(array, jnp.float32)
    numbered = [(first_axis + i, o) for i, o in enumerate(operators) if o is not None]
    for axis, operator in sorted(numbered, key=lambda item: item[1].shape[0] / item[1].shape[1]):
        table = jnp.asarray(operator, jnp.float32)
        product = jnp.tensordot(table, result, (1, axis), precision=jax.lax.Precision.HIGHEST)
        result = jnp.moveaxis(product, 0, axis)
    return result


def _apply_axis(array: np.ndarray, operator: np.ndarray, axis: int) -> np.ndarray:
    """Multiply along one axis by blocks of rows, each with the narrow band of columns it reads."""
    num_out = operator.shape[0]
    shape = (*array.shape[:axis], num_out, *array.shape[axis + 1 :])
    if _is_selection(operator):
        return np.take(array, operator.argmax(axis=1), axis=axis)
    operator = operator.astype(array.dtype)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    result = np.empty((before, num_out, after), array.dtype)
    source = array.reshape(before, -1, after)
    for start in range(0, num_out, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, num_out))
        block = operator[rows]
        columns = _band(block)
        if after == 1:
            np.matmul(source[:, columns, 0], block[:, columns].T, out=result[:, rows, 0])
        else:
            np.matmul(block[:, columns], source[:, columns], out=result[:, rows])
    return result.reshape(shape)


def _is_selection(operator: np.ndarray) -> bool:
    return bool(np.all(operator.max(axis=1) == 1.0) and np.count_nonzero(operator) == len(operator))


def _band(block: np.ndarray) -> slice:
    columns = np.flatnonzero(block.any(axis=0))
    return slice(int(columns[0]), int(columns[-1]) + 1)


# ------------------------------------------------------------------------------- images and logits


def resample_image(
    image: Float[np.ndarray, "channel z y x"],
    new_shape: Sequence[int],
    resampler: Resampler,
    *,
    spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> Float[np.ndarray, "channel new_z new_y new_x"]:
    """Resample intensities to ``new_shape`` as the plans say; an equal shape is returned as it is.

    The spline function keeps the dtype and works in float64, the torch function gives float32.
    """
    shape = image.shape[1:]
    if tuple(new_shape) == shape:
        return image
    separate = _separate_axis_of(resampler, spacing, new_spacing)
    operators = image_operators(
        shape, new_shape, resampler, spacing=spacing, new_spacing=new_spacing
    )
    spline = resampler.name == "resample_data_or_seg_to_shape"
    result = np.empty((image.shape[0], *new_shape), image.dtype if spline else np.float32)
    for source, target in zip(image, result, strict=True):
        if not spline:
            target[...] = apply_operators(source, operators, dtype=np.float32)
        elif resampler.get("order", 3) <= 1 and resampler.get("order_z", 0) <= 1:
            target[...] = apply_operators(source, operators)
        else:
            target[...] = _spline_clipped(source, operators, separate)
    return result


def resample_logits(
    logits: Float[np.ndarray, "channel z y x"],
    new_shape: Sequence[int],
    resampler: Resampler,
    *,
    spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> Float[np.ndarray, "channel new_z new_y new_x"]:
    """Resample logits; channels are independent, so a caller short of memory passes one by one."""
    return resample_image(logits, new_shape, resampler, spacing=spacing, new_spacing=new_spacing)


def _spline_clipped(source: np.ndarray, operators: Operators, separate: int | None) -> np.ndarray:
    """Clip overshoot to the range of the volume, or of each slice across the separate axis."""
    if separate is None:
        result = apply_operators(source, operators)
        return np.clip(result, source.min(), source.max(), out=result)
    others = tuple(axis for axis in range(3) if axis != separate)
    in_plane = tuple(None if axis == separate else o for axis, o in enumerate(operators))
    result = apply_operators(source, in_plane)
    if any(o is not None for o in in_plane):
        low, high = (np.asarray(f(source, axis=others, keepdims=True)) for f in (np.min, np.max))
        np.clip(result, low, high, out=result)
    along = operators[separate]
    return result if along is None else _apply_axis(result, along, separate)


# ------------------------------------------------------------------------------------- label maps


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
    separate = _separate_axis_of(resampler, spacing, new_spacing)
    kinds = _kinds(resampler, separate)
    if separate is None:
        stages = [(new_shape, kinds)]
    else:  # in-plane first, then along the axis (spec 02 §4.5, §4.6)
        pairs = enumerate(_pairs(label, new_shape))
        in_plane = tuple(old if axis == separate else new for axis, (old, new) in pairs)
        stages = [(in_plane, kinds), (new_shape, kinds)]
    for index, (shape, stage_kinds) in enumerate(stages):
        if shape != label.shape:
            rule = _label_rule(resampler, legacy_half, along=index == 1)
            label = _resample_label_once(label, shape, stage_kinds, rule)
    return label


Rule = Literal["spline", "torch", "torch_above_half", "above_half", "half"]


def _pairs(label: np.ndarray, new_shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(label.shape, new_shape, strict=True))


def _label_rule(resampler: Resampler, legacy_half: bool, *, along: bool) -> Rule:
    if resampler.name == "resample_torch_fornnunet":
        lean = resampler.get("memefficient_seg_resampling", False)
        return "torch_above_half" if lean else "torch"
    if along:
        return "above_half"
    return "half" if legacy_half else "spline"


def _resample_label_once(
    label: np.ndarray, shape: tuple[int, ...], kinds: tuple[Kind, ...], rule: Rule
) -> np.ndarray:
    axes = tuple(
        _AxisTable(old, new, kind)
        for (old, new), kind in zip(_pairs(label, shape), kinds, strict=True)
    )
    if all(axis.selects for axis in axes):
        return label[np.ix_(*(axis.low for axis in axes))]
    result = np.empty(shape, label.dtype)
    rows = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        slab = slice(start, min(start + rows, shape[0]))
        _fill_slab(label, result[slab], (axes[0].rows(slab), *axes[1:]), rule)
    return result


class _AxisTable:
    """An operator of one axis with the band of input voxels that each output voxel reads."""

    def __init__(self, num_in: int, num_out: int, kind: Kind) -> None:
        if num_in == num_out:
            kind = "spline0"  # unchanged axes cost nothing
        self.operator = axis_operator(num_in, num_out, kind)
        self.linear = kind == "spline1"
        self.selects = kind in ("spline0", "torch_nearest_exact")
        used = self.operator != 0
        self.low = used.argmax(axis=1)
        self.high = num_in - used[:, ::-1].argmax(axis=1)
        taps = _two_taps(num_in, num_out, kind) if kind != "spline3" else None
        self.taps = taps
        self.nearest = _two_taps(num_in, num_out, "spline0")[0]

    def rows(self, rows: slice) -> "_AxisTable":
        part = object.__new__(_AxisTable)
        part.linear, part.selects = self.linear, self.selects
        part.operator, part.nearest = self.operator[rows], self.nearest[rows]
        part.low, part.high = self.low[rows], self.high[rows]
        part.taps = None if self.taps is None else tuple(t[rows] for t in self.taps)
        return part

    def reading(self, start: int, stop: int) -> slice:
        """Output voxels that read any of the input voxels ``start`` to ``stop``."""
        hit = np.flatnonzero((self.low < stop) & (self.high > start))
        return slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, 0)

    @property
    def band(self) -> slice:
        return slice(int(self.low.min()), int(self.high.max()))


def _fill_slab(
    label: np.ndarray, result: np.ndarray, axes: tuple[_AxisTable, ...], rule: Rule
) -> None:
    """Compute only where more than one label can contribute: the rest is constant."""
    source = label[axes[0].band]
    base = source.flat[0]
    other = source != base
    result[...] = base
    if not other.any():
        return
    offset = axes[0].band.start
    for axis in range(3):
        occupied = np.flatnonzero(other.any(axis=tuple(a for a in range(3) if a != axis)))
        shift = offset if axis == 0 else 0
        region = axes[axis].reading(int(occupied[0]) + shift, int(occupied[-1]) + 1 + shift)
        axes = (*axes[:axis], axes[axis].rows(region), *axes[axis + 1 :])
        result = result[(slice(None),) * axis + (region,)]
    if result.size:
        result[...] = _scored(label, axes, rule)


def _scored(label: np.ndarray, axes: tuple[_AxisTable, ...], rule: Rule) -> np.ndarray:
    bands = tuple(axis.band for axis in axes)
    source = label[bands]
    operators = tuple(axis.operator[:, band] for axis, band in zip(axes, bands, strict=True))
    dtype = np.float32 if rule.startswith("torch") else np.float64
    shape = tuple(len(axis.low) for axis in axes)
    winner = np.zeros(shape, label.dtype)
    best = np.full(shape, -1.0, np.float16 if rule == "torch" else np.float64)
    second = np.full(shape, -1.0) if rule == "spline" else None
    for value in _values(source):
        scale = TORCH_SCORE_SCALE if rule == "torch" else 1.0
        score = _score((source == value).astype(dtype) * dtype(scale), operators)
        if rule.endswith("above_half"):
            winner[score > 0.5] = value
        elif rule == "half":
            winner[score >= 0.5] = value
        else:
            if rule == "torch":
                score = score.astype(np.float16)
            if second is not None:
                np.maximum(second, np.minimum(best, score), out=second)
            wins = score > best  # strict: the smallest label keeps a tie
            winner[wins] = value
            np.maximum(best, score, out=best)
    if second is not None:
        _settle_ties(label, winner, np.nonzero(best - second < NEAR_TIE), axes)
    return winner


def _score(indicator: np.ndarray, operators: Operators) -> np.ndarray:
    score = indicator
    for axis in (2, 1, 0):  # torch's order of rounding; and slabs are thin along axis 0
        score = _apply_axis(score, operators[axis], axis)  # type: ignore[arg-type]
    return np.clip(score, 0.0, indicator.max(), out=score)


def _values(label: np.ndarray) -> np.ndarray:
    lowest = int(label.min())
    counts = np.bincount(label.ravel().astype(np.int64) - lowest)
    return np.flatnonzero(counts) + lowest


def _settle_ties(
    label: np.ndarray, winner: np.ndarray, where: tuple[np.ndarray, ...], axes: tuple[Any, ...]
) -> None:
    """Decide near ties as the reference does: its rounding, then nearest neighbour, then smallest.

    SciPy multiplies a corner's weights in axis order and adds the corners in C order; which of two
    mathematically equal scores is larger depends on it.
    """
    if not where[0].size:
        return
    if any(axis.taps is None for axis in axes):  # order 3: no eight corners; settle by value alone
        return
    corners, weights = _corners(label, where, axes)
    nearest = label[tuple(axis.nearest[i] for axis, i in zip(axes, where, strict=True))]
    best = np.full(nearest.shape, -1.0)
    chosen = np.zeros_like(nearest)
    for value in _values(corners):
        score = np.zeros(nearest.shape)
        for corner, weight in zip(corners, weights, strict=True):
            score += np.where(corner == value, weight, 0.0)
        score = np.minimum(score, 1.0)
        takes = (score > best) | ((score == best) & (nearest == value))
        chosen[takes] = value
        best = np.maximum(best, score)
    winner[where] = chosen


def _corners(
    label: np.ndarray, where: tuple[np.ndarray, ...], axes: tuple[Any, ...]
) -> tuple[np.ndarray, np.ndarray]:
    corners, weights = [], []
    for code in np.ndindex(2, 2, 2):
        index, weight = [], np.ones(where[0].shape)
        for upper, axis, i in zip(code, axes, where, strict=True):
            low, high, weight_high, weight_low = axis.taps
            index.append(high[i] if upper else low[i])
            weight = weight * (weight_high[i] if upper else weight_low[i])
        corners.append(label[tuple(index)])
        weights.append(weight)
    return np.stack(corners), np.stack(weights)
