"""Separable resampling: one small operator table an axis, applied on the host or on the device.

Interpolation between voxel grids is linear and separable but for a final clip, so every rule of
nnU-Net's two resampling functions (spec 02 §4.5-4.6) is a matrix an axis. Whole images that are
interpolated between two voxels an axis need no matrix: they go plane after plane through the cache.
Axes are z, y, x *after* the plans' transpose. Label maps have a module of their own,
:mod:`panther_jax.label_resampling`.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Shaped

from panther_jax.plans.plans import Resampler

if TYPE_CHECKING:
    pass

Kind = Literal["spline0", "spline1", "spline3", "torch_linear", "torch_nearest_exact"]
Operators = tuple[np.ndarray | None, ...]

ANISOTROPY_THRESHOLD = 3.0
SPLINE_PAD = 12
TORCH_SCORE_SCALE = 1000.0
BLOCK_ROWS, BLOCK_COLUMNS = 32, 64
"""Output of one matrix product: few rows read a narrow band of the operator, and products of this
size stay below those that BLAS gives to threads, which wait for each other longer than they work.
"""
THREADS = 2
"""Ranges of planes interpolated side by side; more would wait for the memory."""


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
    if kind == "spline3":
        return _cubic_operator(num_in, num_out)
    low, high, weight_high, weight_low = two_taps(num_in, num_out, kind)
    operator = np.zeros((num_out, num_in))
    rows = np.arange(num_out)
    operator[rows, low] = weight_low
    operator[rows, high] += weight_high
    return operator


def two_taps(num_in: int, num_out: int, kind: Kind) -> tuple[np.ndarray, ...]:
    """Tabulate the linear and nearest kinds: low and high neighbour, weight of high, of low.

    Raises:
        ValueError: if an axis is empty.
    """
    _require_voxels(num_in, num_out)
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


def _require_voxels(num_in: int, num_out: int) -> None:
    if num_in < 1 or num_out < 1:
        raise ValueError(f"cannot resample an axis of {num_in} voxels to {num_out} voxels")


def _cubic_operator(num_in: int, num_out: int) -> np.ndarray:
    from scipy import ndimage

    _require_voxels(num_in, num_out)
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
    kinds = axis_kinds(resampler, separate_axis_of(resampler, spacing, new_spacing))
    return tuple(
        None if old == new else axis_operator(old, new, kind)
        for old, new, kind in zip(shape, new_shape, kinds, strict=True)
    )


def separate_axis_of(
    resampler: Resampler, spacing: Sequence[float], new_spacing: Sequence[float]
) -> int | None:
    """Find the axis that a resampler of the plans treats on its own, or None."""
    # the two functions differ in the default, and plans may leave it out (spec 02 §4.5, §4.6)
    default = False if resampler.name == "resample_data_or_seg_to_shape" else None
    return separate_axis(
        spacing,
        new_spacing,
        resampler.get("force_separate_z", default),
        threshold=resampler.get("separate_z_anisotropy_threshold", ANISOTROPY_THRESHOLD),
    )


def axis_kinds(resampler: Resampler, separate: int | None) -> tuple[Kind, ...]:
    """Give the kind of interpolation along each axis.

    Raises:
        ValueError: if the plans ask for one that is not supported.
    """
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
    result = np.ascontiguousarray(array, dtype=dtype)
    for axis in _axis_order(operators):
        result = _apply_axis(result, operators[axis], axis)  # type: ignore[arg-type]
    return result


def _axis_order(operators: Operators) -> list[int]:
    return sorted(
        (axis for axis, o in enumerate(operators) if o is not None),
        key=lambda axis: operators[axis].shape[0] / operators[axis].shape[1],  # type: ignore[union-attr]
    )


def _apply_into(
    target: np.ndarray,
    array: np.ndarray,
    operators: Operators,
    *,
    limits: tuple[float, float],
) -> None:
    """As :func:`apply_operators`, into ``target`` and clipped; needs no array of its size more."""
    result = np.ascontiguousarray(array, dtype=np.float64)
    *others, last = _axis_order(operators)
    for axis in others:
        result = _apply_axis(result, operators[axis], axis)  # type: ignore[arg-type]
    _apply_axis(result, operators[last], last, target=target, limits=limits)  # type: ignore[arg-type]


def _apply_axis(
    array: np.ndarray,
    operator: np.ndarray,
    axis: int,
    *,
    target: np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """Multiply along one axis by blocks of rows, each with the narrow band of columns it reads.

    The result is cast to ``target``'s type if that is given, after a clip to ``limits``.
    """
    num_out = operator.shape[0]
    shape = (*array.shape[:axis], num_out, *array.shape[axis + 1 :])
    if target is None and _is_selection(operator):
        return np.take(array, operator.argmax(axis=1), axis=axis)
    operator = operator.astype(array.dtype)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    result = np.empty(shape, array.dtype) if target is None else target
    flat = result.reshape(before, num_out, after)
    source = array.reshape(before, -1, after)
    direct = flat.dtype == array.dtype and limits is None
    for start in range(0, num_out, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, num_out))
        columns = _band(operator[rows])
        block, read = operator[rows, columns], source[:, columns]
        out = flat[:, rows] if direct else np.empty((before, len(block), after), array.dtype)
        if after == 1:
            _small_products(read[None, :, :, 0].mT, block, out[None, :, :, 0].mT)
        else:
            _small_products(read, block, out)
        if limits is not None:
            np.clip(out, *limits, out=out)
        if not direct:
            flat[:, rows] = out
    return result


def _small_products(read: np.ndarray, block: np.ndarray, out: np.ndarray) -> None:
    """Multiply ``block`` with each matrix of ``read``, a few of its columns at a time."""
    width = read.shape[2] // BLOCK_COLUMNS * BLOCK_COLUMNS
    if width:
        parts = tuple(
            a[:, :, :width].reshape(*a.shape[:2], -1, BLOCK_COLUMNS).swapaxes(1, 2)
            for a in (read, out)
        )
        assert np.may_share_memory(parts[1], out), "split into columns must not copy"
        np.matmul(block, parts[0], out=parts[1])
    if width < read.shape[2]:
        np.matmul(block, read[:, :, width:], out=out[:, :, width:])


def _is_selection(operator: np.ndarray) -> bool:
    return bool(np.all(operator.max(axis=1) == 1.0) and np.count_nonzero(operator) == len(operator))


def _band(block: np.ndarray) -> slice:
    columns = np.flatnonzero(block.any(axis=0))
    return slice(int(columns[0]), int(columns[-1]) + 1)


# ----------------------------------------------------------------------------- plane after plane


class _Planes:
    """Linear or nearest interpolation of a volume, a plane of the result at a time.

    All that a plane needs stays in the cache, and nothing of the volume's size is made beside it.
    """

    def __init__(
        self, source: np.ndarray, target: np.ndarray, kinds: Sequence[Kind], dtype: Any
    ) -> None:
        self._source, self._target, self._dtype = source, target, dtype
        self._taps = tuple(
            _weighted(old, new, kind, dtype)
            for old, new, kind in zip(source.shape, target.shape, kinds, strict=True)
        )
        ratios = [new / old for old, new in zip(source.shape, target.shape, strict=True)]
        order = sorted(range(3), key=ratios.__getitem__)  # what shrinks most first
        changed = [axis for axis in order if axis == 0 or ratios[axis] != 1]
        along = changed.index(0)
        self._before, self._after = changed[:along], changed[along + 1 :]

    def fill(self, rows: range) -> None:
        """Make the planes ``rows`` of the result."""
        low, high, weight_low, weight_high = self._taps[0]
        ready: dict[int, np.ndarray] = {}
        for row in rows:
            needed = {int(low[row]), int(high[row])}
            ready = {z: ready[z] if z in ready else self._read(z) for z in needed}
            plane = ready[int(low[row])]
            if weight_high.any():
                plane = plane * weight_low[row]
                plane += ready[int(high[row])] * weight_high[row]
            self._target[row] = self._in_plane(plane, self._after)

    def _read(self, z: int) -> np.ndarray:
        return self._in_plane(self._source[z].astype(self._dtype, copy=False), self._before)

    def _in_plane(self, plane: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        for axis in axes:
            low, high, weight_low, weight_high = self._taps[axis]
            column = (-1, 1) if axis == 1 else (1, -1)
            result = np.take(plane, low, axis - 1, mode="clip")
            if weight_high.any():
                result *= weight_low.reshape(column)
                far = np.take(plane, high, axis - 1, mode="clip")
                far *= weight_high.reshape(column)
                result += far
            plane = result
        return plane


def _weighted(num_in: int, num_out: int, kind: Kind, dtype: Any) -> tuple[np.ndarray, ...]:
    unchanged = num_in == num_out
    low, high, weight_high, weight_low = two_taps(num_in, num_out, "spline0" if unchanged else kind)
    return low, high, weight_low.astype(dtype), weight_high.astype(dtype)


def _interpolate(
    target: np.ndarray, source: np.ndarray, kinds: Sequence[Kind], *, dtype: Any
) -> None:
    """Interpolate ``source`` to ``target`` in ``dtype``; the kinds read two voxels at most."""
    planes = _Planes(source, target, kinds, dtype)
    bounds = [len(target) * part // THREADS for part in range(THREADS + 1)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(planes.fill, map(range, bounds[:-1], bounds[1:])))


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
    separate = separate_axis_of(resampler, spacing, new_spacing)
    kinds = axis_kinds(resampler, separate)
    changed = {k for k, old, new in zip(kinds, shape, new_shape, strict=True) if old != new}
    spline = resampler.name == "resample_data_or_seg_to_shape"
    result = np.empty((image.shape[0], *new_shape), image.dtype if spline else np.float32)
    for source, target in zip(image, result, strict=True):
        if "spline3" not in changed:
            _interpolate(target, source, kinds, dtype=np.float64 if spline else np.float32)
            continue
        operators = image_operators(
            shape, new_shape, resampler, spacing=spacing, new_spacing=new_spacing
        )
        if separate is None:
            limits = (float(source.min()), float(source.max()))
            _apply_into(target, source, operators, limits=limits)
        else:
            target[...] = _clipped_slices(source, operators, separate)
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


def _clipped_slices(source: np.ndarray, operators: Operators, separate: int) -> np.ndarray:
    """Clip overshoot to the range of each slice across the separate axis."""
    others = tuple(axis for axis in range(3) if axis != separate)
    in_plane = tuple(None if axis == separate else o for axis, o in enumerate(operators))
    result = apply_operators(source, in_plane)
    if any(o is not None for o in in_plane):
        low, high = (np.asarray(f(source, axis=others, keepdims=True)) for f in (np.min, np.max))
        np.clip(result, low, high, out=result)
    along = operators[separate]
    return result if along is None else _apply_axis(result, along, separate)
