"""Local and neighbourhood transforms of the DA5 pipeline (spec 04 §6.11-6.14).

Median filter, blank rectangles, brightness gradient, local gamma, sharpening. As in `intensity`,
`sample_*` draws for all channels of a sample and `apply_*` transforms one channel.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from panther_jax.augment.intensity import Draw, Gate, Range, sample_gated

MEDIAN_SIZES = (2, 3, 4, 5, 6, 7)
LARGEST_NETWORK = 4
"""Largest median window that a fixed sequence of minima and maxima selects from."""
MAX_RECTANGLES = 4


class Rectangles(NamedTuple):
    """Boxes to blank: how many of the slots count, lower corners and sizes in voxels."""

    count: Int[Array, "*channel"]
    lower: Int[Array, "*channel slot axis"]
    size: Int[Array, "*channel slot axis"]


class Window(NamedTuple):
    """A Gaussian window: centre as a share of each axis, width in voxels, and its effect."""

    centre: Float[Array, "*channel axis"]
    width: Float[Array, "*channel axis"]
    amount: Float[Array, "*channel"]
    """Strength of the gradient, or the gamma."""


def sample_median(key: PRNGKeyArray, num_channels: int, *, gate: Gate, p_channel: float) -> Draw:
    """Draw the edge of the filter's window for each channel."""
    gates, uniform = sample_gated(key, num_channels, 1, gate=gate, p_channel=p_channel)
    return Draw(gates, _integer(uniform[:, 0], MEDIAN_SIZES[0], MEDIAN_SIZES[-1]))


def apply_median(
    volume: Float[Array, "*spatial"], size: Int[Array, ""]
) -> Float[Array, "*spatial"]:
    """Take the median of a cubic window whose edge is one of `MEDIAN_SIZES`."""
    branches = [partial(median_filter, size=edge) for edge in MEDIAN_SIZES]
    return lax.switch(size - MEDIAN_SIZES[0], branches, volume)


def median_filter(volume: Float[Array, "*spatial"], size: int) -> Float[Array, "*spatial"]:
    """Take the upper median of `size` voxels an axis, edge voxels repeated (spec 04 §6.11).

    An even window reaches one voxel further down than up.
    """
    before, after = size // 2, size - 1 - size // 2
    padded = jnp.pad(volume, (before, after), mode="symmetric")
    if size <= LARGEST_NETWORK:
        return _median_by_network(padded, volume.shape, size)
    return _median_by_bisection(padded, volume.shape, size)


def _median_by_network(padded: Array, shape: tuple[int, ...], size: int) -> Array:
    values = [padded[_window_part(offset, shape)] for offset in np.ndindex(*(size,) * len(shape))]
    rank = len(values) // 2
    for low, high in _selection_network(len(values), rank):
        pair = values[low], values[high]
        values[low], values[high] = jnp.minimum(*pair), jnp.maximum(*pair)
    return values[rank]


def _window_part(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def _selection_network(count: int, rank: int) -> list[tuple[int, int]]:
    """Pairs to put in order, one after the other, so that the `rank`-th smallest is in its place.

    Batcher's odd-even merge sort, without what the wanted place does not depend on.
    """
    length = 1 << (count - 1).bit_length()
    pairs = []
    for block in (1 << n for n in range(length.bit_length() - 1)):
        for step in (block >> n for n in range(block.bit_length())):
            pairs += [
                (i + j, i + j + step)
                for j in range(step % block, length - step, 2 * step)
                for i in range(min(step, length - step - j))
                if (i + j) // (2 * block) == (i + j + step) // (2 * block)
            ]
    wanted, kept = {rank}, []
    for low, high in reversed(pairs):
        if high < count and (low in wanted or high in wanted):
            wanted |= {low, high}
            kept.append((low, high))
    return kept[::-1]


def _median_by_bisection(padded: Array, shape: tuple[int, ...], size: int) -> Array:
    # The smallest value with more than `rank` voxels up to it: exact, and without the size^3
    # copies of the volume that sorting would take.
    padded, rank = _ordered_bits(padded), size ** len(shape) // 2

    def count_up_to(threshold):
        def add_plane(first, count):
            plane = lax.dynamic_slice_in_dim(padded, first, shape[0], axis=0)
            for offset in np.ndindex(*(size,) * (len(shape) - 1)):
                count = count + (plane[:, *_window_part(offset, shape[1:])] <= threshold)
            return count

        # "like": under shard_map what a loop starts from has to differ between devices, too.
        return lax.fori_loop(0, size, add_plane, jnp.zeros_like(threshold))

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        enough = count_up_to(middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    limits = np.iinfo(np.int32)
    start = tuple(jnp.full_like(padded, x, shape=shape) for x in (limits.min, limits.max))
    return _from_ordered_bits(lax.fori_loop(0, 32, halve, start)[0])


def sample_rectangles(
    key: PRNGKeyArray,
    num_channels: int,
    patch_size: tuple[int, ...],
    *,
    gate: Gate,
    p_channel: float,
    fork: bool = False,
) -> Draw:
    """Draw one to four boxes for each channel, edges about a tenth to a third of the patch.

    The `fork` draws one to five, may reach a full third, and never touches voxel 0 (spec 04 §5).
    """
    num_axes, max_count = len(patch_size), MAX_RECTANGLES + fork
    per_box = max_count * num_axes
    gates, uniform = sample_gated(
        key, num_channels, 1 + 2 * per_box, gate=gate, p_channel=p_channel
    )
    shape = (num_channels, max_count, num_axes)
    of_size = uniform[:, 1 : 1 + per_box].reshape(shape)
    of_lower = uniform[:, 1 + per_box :].reshape(shape)
    patch = np.asarray(patch_size)
    smallest = np.maximum(1, patch // 10)
    size = _integer(of_size, smallest, np.maximum(smallest, patch // 3 - (not fork)))
    lower = _integer(of_lower, int(fork), patch - size)
    return Draw(gates, Rectangles(_integer(uniform[:, 0], 1, max_count), lower, size))


def apply_rectangles(
    volume: Float[Array, "*spatial"], rectangles: Rectangles
) -> Float[Array, "*spatial"]:
    """Replace each box by the mean of its current content, one after the other."""

    def blank(slot, volume):
        inside = jnp.ones(volume.shape, bool)
        for axis in range(volume.ndim):
            along = lax.broadcasted_iota(jnp.int32, volume.shape, axis)
            first = rectangles.lower[slot, axis]
            inside = inside & (along >= first) & (along < first + rectangles.size[slot, axis])
        total = jnp.where(inside, volume, 0.0).sum()
        return jnp.where(inside, total / rectangles.size[slot].prod(), volume)

    return lax.fori_loop(0, rectangles.count, blank, volume)


def sample_window(
    key: PRNGKeyArray,
    num_channels: int,
    patch_size: tuple[int, ...],
    *,
    gate: Gate,
    p_channel: float,
    amount_ranges: tuple[Range, Range],
) -> Draw:
    """Draw a window and its effect for each channel; either range of the effect with 1/2."""
    num_axes = len(patch_size)
    gates, uniform = sample_gated(
        key, num_channels, 2 + 2 * num_axes, gate=gate, p_channel=p_channel
    )
    of_centre, of_width = uniform[:, 2 : 2 + num_axes], uniform[:, 2 + num_axes :]
    narrow = np.array([math.log(max(size // 6, 1)) for size in patch_size], np.float32)
    wide = np.log(np.asarray(patch_size, np.float32))
    (low, high), (other_low, other_high) = amount_ranges
    amount = jnp.where(
        uniform[:, 0] < 0.5,
        low + (high - low) * uniform[:, 1],
        other_low + (other_high - other_low) * uniform[:, 1],
    )
    width = jnp.exp(narrow + (wide - narrow) * of_width)
    return Draw(gates, Window(-0.5 + 2 * of_centre, width, amount))


def window_weights(
    centre: Float[Array, "axis"], width: Float[Array, "axis"], patch_size: tuple[int, ...]
) -> Float[Array, "*patch"]:
    """Evaluate the Gaussian window, integrated over voxels, rescaled to [0, 1] (spec 04 §6.13)."""
    weights, smallest = jnp.ones(()), jnp.ones(())
    for axis, size in enumerate(patch_size):
        z = (np.arange(size) - centre[axis] * size) / width[axis]
        # Series of the integral over a voxel; differences of a float32 cdf lose the digits.
        h2 = 1 / (4 * width[axis] ** 2)
        z2 = z**2
        series = 1 + (z2 - 1) * h2 / 6 + ((z2 - 6) * z2 + 3) * h2**2 / 120
        series = series + (((z2 - 15) * z2 + 45) * z2 - 15) * h2**3 / 5040
        along = jnp.exp(-z2 / 2) * series
        along = along / along.max()
        weights = weights[..., None] * along
        smallest = smallest * along.min()
    return (weights - smallest) / (1 - smallest)


def apply_gradient(volume: Float[Array, "*spatial"], window: Window) -> Float[Array, "*spatial"]:
    """Add the window times its amount."""
    weights = window_weights(window.centre, window.width, volume.shape)
    return volume + window.amount * weights


def apply_local_gamma(volume: Float[Array, "*spatial"], window: Window) -> Float[Array, "*spatial"]:
    """Blend the channel with its gamma-transformed self, weighted by the window."""
    weights = window_weights(window.centre, window.width, volume.shape)
    low = volume.min()
    extent = jnp.maximum(volume.max() - low, 1e-8)
    share = (volume - low) / extent
    return ((1 - weights) * share + weights * share**window.amount) * extent + low


def sample_sharpen(
    key: PRNGKeyArray,
    num_channels: int,
    *,
    gate: Gate,
    p_channel: float,
    strength_range: Range,
) -> Draw:
    """Draw a strength for each channel."""
    gates, uniform = sample_gated(key, num_channels, 1, gate=gate, p_channel=p_channel)
    low, high = strength_range
    return Draw(gates, low + (high - low) * uniform[:, 0])


def apply_sharpen(
    volume: Float[Array, "*spatial"],
    strength: Float[Array, ""],
    *,
    border: Literal["edge", "constant"] = "edge",
) -> Float[Array, "*spatial"]:
    """Subtract the Laplacian of the face neighbours times `strength`.

    Beyond the borders the edge voxels are repeated, or zeros with `border` "constant".
    """
    laplacian = -2.0 * volume.ndim * volume
    for axis, size in enumerate(volume.shape):
        padding = [(1, 1) if other == axis else (0, 0) for other in range(volume.ndim)]
        padded = jnp.pad(volume, padding, mode=border)
        for start in (0, 2):
            laplacian = laplacian + lax.slice_in_dim(padded, start, start + size, axis=axis)
    return volume - strength * laplacian


def _integer(uniform: Array, low, high) -> Array:
    number = low + jnp.floor(uniform * (high - low + 1)).astype(jnp.int32)
    return jnp.minimum(number, high)


def _ordered_bits(values: Array) -> Array:
    """Map float32 to int32 of the same order."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _from_ordered_bits(bits: Array) -> Array:
    bits = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return lax.bitcast_convert_type(bits, jnp.float32)
