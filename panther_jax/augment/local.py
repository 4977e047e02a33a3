"""Local and neighbourhood transforms of the DA5 pipeline (spec 04 §6.11-6.14).

Median filter, blank rectangles, brightness gradient, local gamma, sharpening.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from panther_jax.augment.intensity import raised
from panther_jax.augment.transform import (
    Draw,
    Example,
    PatchGeometry,
    Range,
    Transform,
    between,
    whole_between,
)

MEDIAN_SIZES = (2, 3, 4, 5, 6, 7)
LARGEST_NETWORK = 4
"""Largest median window that a fixed sequence of minima and maxima selects from."""
FAMILY = "local (DA5)"


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


@dataclass(frozen=True, kw_only=True)
class Median(Transform):
    """The median of a cubic window whose edge is one of `MEDIAN_SIZES`."""

    family: ClassVar[str] = FAMILY

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw the edge of the window for each channel."""
        gates, uniform = self.gated(key, num_channels, 1)
        return Draw(gates, whole_between(uniform[:, 0], MEDIAN_SIZES[0], MEDIAN_SIZES[-1]))

    def apply(self, volume: Float[Array, "*spatial"], value: Int[Array, ""]) -> Array:
        """Take the median."""
        branches = [partial(median_filter, size=edge) for edge in MEDIAN_SIZES]
        return lax.switch(value - MEDIAN_SIZES[0], branches, volume)

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the smallest and the largest window."""
        for size in (MEDIAN_SIZES[0], MEDIAN_SIZES[-1]):
            yield Example(f"median {size}", jnp.int32(size))


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


@dataclass(frozen=True, kw_only=True)
class BlankRectangles(Transform):
    """One to four boxes, edges about a tenth to a third of the patch, blanked one by one."""

    family: ClassVar[str] = FAMILY
    max_count: ClassVar[int] = 4
    first_voxel: ClassVar[int] = 0
    """Lowest corner that a box may have."""
    below_third: ClassVar[int] = 1
    """Voxels by which the longest edge stays below a third of the patch."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw number, corners and sizes of the boxes for each channel."""
        num_axes = len(patch.patch_size)
        per_box = self.max_count * num_axes
        gates, uniform = self.gated(key, num_channels, 1 + 2 * per_box)
        shape = (num_channels, self.max_count, num_axes)
        of_size = uniform[:, 1 : 1 + per_box].reshape(shape)
        of_lower = uniform[:, 1 + per_box :].reshape(shape)
        sizes = np.asarray(patch.patch_size)
        smallest = np.maximum(1, sizes // 10)
        largest = np.maximum(smallest, sizes // 3 - self.below_third)
        size = whole_between(of_size, smallest, largest)
        lower = whole_between(of_lower, self.first_voxel, sizes - size)
        return Draw(gates, Rectangles(whole_between(uniform[:, 0], 1, self.max_count), lower, size))

    def apply(self, volume: Float[Array, "*spatial"], value: Rectangles) -> Array:
        """Replace each box by the mean of its current content, one after the other."""

        def blank(slot, volume):
            inside = jnp.ones(volume.shape, bool)
            for axis in range(volume.ndim):
                along = lax.broadcasted_iota(jnp.int32, volume.shape, axis)
                first = value.lower[slot, axis]
                inside = inside & (along >= first) & (along < first + value.size[slot, axis])
            total = jnp.where(inside, volume, 0.0).sum()
            return jnp.where(inside, total / value.size[slot].prod(), volume)

        return lax.fori_loop(0, value.count, blank, volume)

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give as many boxes as there can be."""
        # In percent; in plane a tenth to a third, along z enough to meet the middle slice.
        lower = np.array([(0, 11, 17), (12, 51, 14), (25, 34, 62), (6, 20, 45), (18, 67, 67)])
        size = np.array([(97, 33, 23), (81, 23, 33), (69, 33, 33), (88, 17, 14), (75, 28, 17)])
        count, patch_size = self.max_count, np.array(patch.patch_size)
        lower, size = (
            jnp.asarray(x[:count, -len(patch_size) :] * patch_size // 100) for x in (lower, size)
        )
        yield Example(f"{count} blank rectangles", Rectangles(jnp.int32(count), lower, size))


@dataclass(frozen=True, kw_only=True)
class Windowed(Transform):
    """A change that is strongest at the centre of a Gaussian window; says how much it is."""

    family: ClassVar[str] = FAMILY
    name: ClassVar[str] = ""
    amount_ranges: tuple[Range, Range]
    """Of the effect; either with probability 1/2."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw a window and its effect for each channel."""
        num_axes = len(patch.patch_size)
        gates, uniform = self.gated(key, num_channels, 2 + 2 * num_axes)
        of_centre, of_width = uniform[:, 2 : 2 + num_axes], uniform[:, 2 + num_axes :]
        narrow = np.array([math.log(max(size // 6, 1)) for size in patch.patch_size], np.float32)
        wide = np.log(np.asarray(patch.patch_size, np.float32))
        one, other = (between(uniform[:, 1], amounts) for amounts in self.amount_ranges)
        amount = jnp.where(uniform[:, 0] < 0.5, one, other)
        width = jnp.exp(narrow + (wide - narrow) * of_width)
        return Draw(gates, Window(-0.5 + 2 * of_centre, width, amount))

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the outer ends of the two ranges, in a window towards the first corner."""
        sizes = jnp.asarray(patch.patch_size, jnp.float32)
        centre = jnp.asarray([0.5, 0.3, 0.3][-len(sizes) :])
        for amount in (self.amount_ranges[0][0], self.amount_ranges[1][1]):
            yield Example(f"{self.name} {amount:g}", Window(centre, sizes / 4, jnp.float32(amount)))


@dataclass(frozen=True, kw_only=True)
class Gradient(Windowed):
    """A window added to the brightness."""

    name: ClassVar[str] = "gradient"

    def apply(self, volume: Float[Array, "*spatial"], value: Window) -> Array:
        """Add the window times its amount."""
        weights = window_weights(value.centre, value.width, volume.shape)
        return volume + value.amount * weights


@dataclass(frozen=True, kw_only=True)
class LocalGamma(Windowed):
    """A gamma that acts in a window."""

    name: ClassVar[str] = "local gamma"

    def apply(self, volume: Float[Array, "*spatial"], value: Window) -> Array:
        """Blend the channel with its gamma-transformed self, weighted by the window."""
        weights = window_weights(value.centre, value.width, volume.shape)
        low = volume.min()
        extent = jnp.maximum(volume.max() - low, 1e-8)
        share = (volume - low) / extent
        curved = raised(share, value.amount, weights)
        return ((1 - weights) * share + curved) * extent + low


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


@dataclass(frozen=True, kw_only=True)
class Sharpen(Transform):
    """The channel less its Laplacian; beyond the borders the edge voxels are repeated."""

    family: ClassVar[str] = FAMILY
    name: ClassVar[str] = "sharpening"
    border: ClassVar[Literal["edge", "constant"]] = "edge"
    strength_range: Range
    """Of the factor of the Laplacian."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw a strength for each channel."""
        gates, uniform = self.gated(key, num_channels, 1)
        return Draw(gates, between(uniform[:, 0], self.strength_range))

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, ""]) -> Array:
        """Subtract the Laplacian of the face neighbours times the strength."""
        laplacian = -2.0 * volume.ndim * volume
        for axis, size in enumerate(volume.shape):
            padding = [(1, 1) if other == axis else (0, 0) for other in range(volume.ndim)]
            padded = jnp.pad(volume, padding, mode=self.border)
            for start in (0, 2):
                laplacian = laplacian + lax.slice_in_dim(padded, start, start + size, axis=axis)
        return volume - value * laplacian

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the least and the most."""
        for strength in self.strength_range:
            yield Example(f"{self.name} {strength:g}", jnp.float32(strength))


def _ordered_bits(values: Array) -> Array:
    """Map float32 to int32 of the same order."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _from_ordered_bits(bits: Array) -> Array:
    bits = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return lax.bitcast_convert_type(bits, jnp.float32)
