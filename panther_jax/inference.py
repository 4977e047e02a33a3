"""Sliding-window prediction and the way back from logits to a label map on the raw grid (spec 05).

A *tile* is a window of the preprocessed image. The network is a function
``forward(params, tiles (1, *tile, C)) -> logits (1, *tile, K)`` that JAX can trace.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer
from scipy.special import expit

from panther_jax.plans import Labels, Plans, Properties
from panther_jax.resampling import resample_logits

log = logging.getLogger("panther_jax")

IMPORTANCE_MAXIMUM = 10.0  # spec 05 §4.1
IMPORTANCE_SIGMA = 1 / 8  # of the tile size
_TOO_LARGE = (
    "not enough device memory for an image of %s voxels with %d outputs beside tiles of %s; "
    "adding up the tiles in host memory instead"
)
SLICE_BUCKET = 32  # number of slices of 2-D predictions is rounded up to a multiple of this

Forward = Callable[[Any, Any], Any]
Progress = Callable[[int, int], None]
Predictor = Callable[..., np.ndarray]

# ---------------------------------------------------------------------------- tiles and weights


def tile_starts(
    size: tuple[int, ...], tile: tuple[int, ...], step: float
) -> tuple[tuple[int, ...], ...]:
    """Positions of the tiles along each axis (spec 05 §3).

    ``step`` is the largest distance of two tiles as a fraction of the tile. The first tile starts
    at 0, the last ends at ``size``; in between equidistant, rounded half to even.

    Raises:
        ValueError: if the step is not in (0, 1], or the tile is larger than ``size``.
    """
    if not 0 < step <= 1:
        raise ValueError(f"step size is {step}; expected a fraction of the tile in (0, 1]")
    if len(size) != len(tile) or any(n < k for n, k in zip(size, tile, strict=True)):
        raise ValueError(f"tile {tile} does not fit in {size}; pad the image to at least the tile")
    return tuple(_axis_starts(n, k, step) for n, k in zip(size, tile, strict=True))


def _axis_starts(size: int, tile: int, step: float) -> tuple[int, ...]:
    count = math.ceil((size - tile) / (tile * step)) + 1
    stride = (size - tile) / (count - 1) if count > 1 else 0.0
    return tuple(round(stride * i) for i in range(count))


def importance_map(
    tile: tuple[int, ...], *, maximum: float = IMPORTANCE_MAXIMUM, dtype: Any = np.float16
) -> Float[np.ndarray, "..."]:
    """Gaussian weight of each voxel of a tile, centred at ``tile // 2`` (spec 05 §4).

    Evaluated in float64, then cast to float32 and to ``dtype``; what the cast makes 0 becomes the
    smallest weight that is not.
    """
    exponent = np.zeros((1,) * len(tile))
    for axis, size in enumerate(tile):
        offset = (np.arange(size) - size // 2) / (size * IMPORTANCE_SIGMA)
        shape = tuple(size if a == axis else 1 for a in range(len(tile)))
        exponent = exponent + (offset**2).reshape(shape)
    # Through float32: the reference's sums over whole maps show that it rounds twice.
    weights = (maximum * np.exp(-0.5 * exponent)).astype(np.float32).astype(dtype)
    weights[weights == 0] = weights[weights > 0].min()
    return weights


def mirror_combinations(axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """All non-empty subsets of the mirror axes, by size, then lexicographically (spec 05 §5.3)."""
    ordered = sorted(axes)
    sizes = range(1, len(ordered) + 1)
    return tuple(c for n in sizes for c in itertools.combinations(ordered, n))


def _weight_sum(
    size: tuple[int, ...], starts: tuple[tuple[int, ...], ...], weights: np.ndarray
) -> np.ndarray:
    # The tiles form a grid, so the sum over all of them can be taken one axis after the other.
    total = weights.astype(np.float32)
    for axis, positions in enumerate(starts):
        shape = (*total.shape[:axis], size[axis], *total.shape[axis + 1 :])
        summed = np.zeros(shape, np.float32)
        for start in positions:
            window = [slice(None)] * len(size)
            window[axis] = slice(start, start + total.shape[axis])
            summed[tuple(window)] += total
        total = summed
    return total


# -------------------------------------------------------------------------------- sliding window


def make_predictor(
    forward: Forward,
    *,
    tile: tuple[int, ...],
    num_outputs: int,
    mirror_axes: tuple[int, ...] = (),
    step_size: float = 0.5,
    gaussian: bool = True,
    accumulate: Literal["float32", "reference"] = "float32",
) -> Predictor:
    """Make ``predict(params, image (C,Z,Y,X), progress=None) -> logits (K,Z,Y,X)``.

    Images smaller than the tile are padded with 0, centred. A tile of two axes predicts slice by
    slice. ``mirror_axes`` are spatial axes of the tile; logits are averaged over all mirrored
    variants. ``accumulate="float32"`` sums on the device, compiles once for each padded shape, and
    returns float32; where the device memory does not suffice, it sums on the host.
    ``"reference"`` sums in float16 on the host as nnU-Net does (spec 05 §5.1) and returns float16.
    ``progress(done, total)`` is called after each tile. One predictor should serve many cases and
    parameter sets: it holds the compiled functions.

    Raises:
        ValueError: if tile, mirror axes, step size or accumulation mode are not usable.
    """
    _check_settings(tile, mirror_axes, step_size, accumulate)
    window = tile if len(tile) == 3 else (1, *tile)
    weights = importance_map(tile) if gaussian else np.ones(tile, np.float16)
    weights = weights.reshape(window)
    mirrored = _mirrored(forward, mirror_combinations(mirror_axes))
    on_device = _device_accumulation(mirrored, weights, num_outputs, batch_axis=len(tile) == 3)
    on_host = _host_accumulation(jax.jit(mirrored), weights, num_outputs, len(tile) == 3)

    def predict(
        params: Any, image: Float[np.ndarray, "channel z y x"], progress: Progress | None = None
    ) -> Float[np.ndarray, "output z y x"]:
        padded, inner = _pad_to_tile(image, window)
        starts = tile_starts(padded.shape[4 - len(tile) :], tile, step_size)
        if len(tile) == 2:
            starts = (tuple(range(padded.shape[1])), *starts)
        if accumulate == "reference":
            logits = on_host(params, padded, starts, progress, np.float16)
        else:
            try:
                logits = on_device(params, padded, starts, progress)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                log.warning(_TOO_LARGE, padded.shape[1:], num_outputs, tile)
                logits = on_host(params, padded, starts, progress, np.float32)
        if np.isinf(logits).any():
            raise ValueError(
                f"the predicted logits are infinite with accumulate={accumulate!r}; the network "
                "diverged, or its logits are too large for float16 (use accumulate='float32')"
            )
        return np.ascontiguousarray(logits[(slice(None), *inner)])

    return predict


def _check_settings(
    tile: tuple[int, ...], mirror_axes: tuple[int, ...], step_size: float, accumulate: str
) -> None:
    if len(tile) not in (2, 3) or any(k < 1 for k in tile):
        raise ValueError(f"tile {tile} must have 2 or 3 positive sizes")
    if any(not 0 <= a < len(tile) for a in mirror_axes) or len(set(mirror_axes)) < len(mirror_axes):
        raise ValueError(f"mirror axes {mirror_axes} must be distinct and below {len(tile)}")
    if not 0 < step_size <= 1:
        raise ValueError(f"step size is {step_size}; expected a fraction of the tile in (0, 1]")
    if accumulate not in ("float32", "reference"):
        raise ValueError(f"accumulate is {accumulate!r}; expected 'float32' or 'reference'")


def mean_logits(
    logits: Iterable[Float[np.ndarray, "output z y x"]],
) -> Float[np.ndarray, "output z y x"]:
    """Unweighted mean over parameter sets (folds), in their order and dtype (spec 05 §6).

    Takes an iterator, so that two arrays at most are in memory. float16 is rounded after each sum.

    Raises:
        ValueError: if there is nothing to average.
    """
    total, count = None, 0
    for one in logits:
        total = one.copy() if total is None else np.add(total, one, out=total)
        count += 1
    if total is None:
        raise ValueError("no logits to average; name at least one fold or model")
    return np.divide(total, total.dtype.type(count), out=total) if count > 1 else total


def _mirrored(forward: Forward, combinations: tuple[tuple[int, ...], ...]) -> Forward:
    def predict_tile(params: Any, tiles: jax.Array) -> jax.Array:
        total = forward(params, tiles)
        for axes in combinations:
            flipped_axes = tuple(a + 1 for a in axes)
            flipped = forward(params, jnp.flip(tiles, flipped_axes))
            total = total + jnp.flip(flipped, flipped_axes)
        return total / (len(combinations) + 1)

    return predict_tile


def _pad_to_tile(image: np.ndarray, window: tuple[int, ...]) -> tuple[np.ndarray, tuple]:
    deficits = [max(k - n, 0) for n, k in zip(image.shape[1:], window, strict=True)]
    before = [d // 2 for d in deficits]  # spec 05 §2: an odd remainder goes to the high end
    widths = [(0, 0), *((b, d - b) for b, d in zip(before, deficits, strict=True))]
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    return np.pad(image.astype(np.float32, copy=False), widths), inner


def _bucket(size: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """The compiled shape for a size: the tile, then multiples of half a tile (spec 08 §8.6)."""
    rounded = []
    for n, k in zip(size, window, strict=True):
        unit = SLICE_BUCKET if k == 1 else k // 2
        rounded.append(k + math.ceil((n - k) / unit) * unit)
    return tuple(rounded)


def _placement(params: Any) -> Any:
    """Where image and accumulator must be: on the parameters' devices, replicated."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            if isinstance(leaf.sharding, jax.sharding.NamedSharding):
                return jax.NamedSharding(leaf.sharding.mesh, jax.P())
            return leaf.sharding
    return None


def _device_accumulation(
    predict_tile: Forward, weights: np.ndarray, num_outputs: int, *, batch_axis: bool
) -> Callable[..., np.ndarray]:
    window = weights.shape

    @partial(jax.jit, donate_argnums=3)
    def add_tile(params: Any, image: jax.Array, weight: jax.Array, total: jax.Array, start: Any):
        corner = (start[0], start[1], start[2], 0)
        tiles = jax.lax.dynamic_slice(image, corner, (*window, image.shape[-1]))
        # A slice of a 2-D prediction is already a batch of one.
        logits = predict_tile(params, tiles[None] if batch_axis else tiles)
        logits = (logits[0] if batch_axis else logits).astype(jnp.float32)
        here = jax.lax.dynamic_slice(total, corner, logits.shape)
        return jax.lax.dynamic_update_slice(total, here + logits * weight[..., None], corner)

    @jax.jit
    def normalise(total: jax.Array, weight_sum: jax.Array) -> jax.Array:
        return jnp.moveaxis(total / weight_sum[..., None], -1, 0)

    @lru_cache(maxsize=2)  # the folds of a case share it
    def weight_sum(size: tuple[int, ...], starts: tuple[tuple[int, ...], ...]) -> np.ndarray:
        rim = [(0, b - n) for b, n in zip(_bucket(size, window), size, strict=True)]
        return np.pad(_weight_sum(size, starts, weights), rim, constant_values=1.0)

    def accumulate(
        params: Any,
        padded: np.ndarray,
        starts: tuple[tuple[int, ...], ...],
        progress: Progress | None,
    ) -> np.ndarray:
        size, place = padded.shape[1:], _placement(params)
        bucket = _bucket(size, window)
        image = np.zeros((*bucket, padded.shape[0]), np.float32)
        image[tuple(slice(n) for n in size)] = np.moveaxis(padded, 0, -1)
        image = jax.device_put(image, place)
        weight = jax.device_put(weights.astype(np.float32), place)
        total = jnp.zeros((*bucket, num_outputs), jnp.float32, device=place)
        for start, done, count in _visits(starts):
            total = add_tile(params, image, weight, total, np.asarray(start, np.int32))
            if progress is not None:
                total.block_until_ready()  # or it would report what is queued, not what is done
                progress(done, count)
        logits = normalise(total, jax.device_put(weight_sum(size, starts), place))
        return np.asarray(logits)[(slice(None), *(slice(n) for n in size))]

    return accumulate


def _host_accumulation(
    predict_tile: Forward, weights: np.ndarray, num_outputs: int, batch_axis: bool
) -> Callable[..., np.ndarray]:
    window = weights.shape

    def accumulate(
        params: Any,
        padded: np.ndarray,
        starts: tuple[tuple[int, ...], ...],
        progress: Progress | None,
        dtype: Any,
    ) -> np.ndarray:
        total = np.zeros((num_outputs, *padded.shape[1:]), dtype)
        weight_sum = np.zeros(padded.shape[1:], dtype)
        weight = weights.astype(dtype)
        for start, done, count in _visits(starts):
            here = tuple(slice(s, s + k) for s, k in zip(start, window, strict=True))
            tiles = np.moveaxis(padded[(slice(None), *here)], 0, -1)
            logits = predict_tile(params, jnp.asarray(tiles[None] if batch_axis else tiles))
            logits = np.asarray(logits[0] if batch_axis else logits, np.float32)
            # spec 05 §5.1: the product and the sum are float32, what is stored is of the dtype
            total[(slice(None), *here)] += np.moveaxis(logits, -1, 0) * weight
            weight_sum[here] += weight
            if progress is not None:
                progress(done, count)
        with np.errstate(over="ignore"):  # infinities are reported by the caller
            return np.divide(total, weight_sum, out=total)

    return accumulate


def _visits(
    starts: tuple[tuple[int, ...], ...],
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Tile positions, last axis fastest, with a running count and the total."""
    count = math.prod(len(s) for s in starts)
    for done, start in enumerate(itertools.product(*starts), 1):
        yield start, done, count


# ----------------------------------------------------------------------- back to the raw grid


def logits_to_label(
    logits: Float[np.ndarray, "output z y x"], properties: Properties, plans: Plans, labels: Labels
) -> Integer[np.ndarray, "raw_z raw_y raw_x"]:
    """Label map on the raw grid from logits on the network's grid (spec 05 §7, §8, §14).

    uint8, or uint16 from 255 foreground labels on. One class at a time is resampled. Resampled
    values are compared in the dtype of ``logits``; of equal ones the first class wins.
    """
    dtype = np.uint8 if len(labels.foreground_ids) < 255 else np.uint16
    shape = properties.shape_before_resampling
    found = np.zeros(shape, dtype)
    if labels.has_regions:
        for head, value in enumerate(labels.regions_class_order or ()):
            values = _resampled(logits[head], properties, plans)
            # spec 05 §8.2: strict, and after the sigmoid, whose float32 rounding has a say
            found[expit(values.astype(np.float32)) > 0.5] = value
    else:
        highest = _resampled(logits[0], properties, plans)
        for head in range(1, len(logits)):
            values = _resampled(logits[head], properties, plans)
            higher = values > highest
            np.copyto(highest, values, where=higher)
            found[higher] = head
    raw = np.zeros(properties.shape_before_crop, dtype)
    raw[_crop(properties)] = found
    return np.ascontiguousarray(raw.transpose(plans.transpose_backward))


def logits_to_probabilities(
    logits: Float[np.ndarray, "output z y x"], properties: Properties, plans: Plans, labels: Labels
) -> Float[np.ndarray, "output raw_z raw_y raw_x"]:
    """Probabilities, float32, on the raw grid from logits on the network's grid (spec 05 §8.3).

    Softmax over labels, or a sigmoid for each region. Outside the crop the background, output 0 of
    a label task, is 1 and all else 0.
    """
    raw = np.zeros((len(logits), *properties.shape_before_crop), np.float32)
    if not labels.has_regions:
        raw[0] = 1.0
    inside = raw[(slice(None), *_crop(properties))]  # a view
    for head, one in enumerate(logits):
        inside[head] = _resampled(one, properties, plans)
    for z in range(inside.shape[1]):  # slice by slice: no temporary of full size
        piece = inside[:, z]
        if labels.has_regions:
            inside[:, z] = expit(piece)
        else:
            powers = np.exp(piece - piece.max(axis=0))
            inside[:, z] = powers / powers.sum(axis=0)
    backward = tuple(a + 1 for a in plans.transpose_backward)
    return np.ascontiguousarray(raw.transpose(0, *backward))


def _resampled(one: np.ndarray, properties: Properties, plans: Plans) -> np.ndarray:
    raw_spacing = tuple(properties.geometry.spacing_zyx[a] for a in plans.transpose_forward)
    spacing = plans.spacing
    if len(spacing) == 2:  # spec 05 §7.1: slices keep their distance
        spacing = (raw_spacing[0], *spacing)
    resampled = resample_logits(
        one[None],
        properties.shape_before_resampling,
        plans.resampling_logits,
        spacing=spacing,
        new_spacing=raw_spacing,
    )[0]
    # A copy: the caller writes into it, and nothing changes in size may return the input.
    return np.array(resampled, dtype=one.dtype)


def _crop(properties: Properties) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in properties.crop_box)
