"""Intensity transforms: noise, blur, brightness, contrast, low resolution, gamma (spec 04 §6)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int, PRNGKeyArray

from panther_jax.augment.transform import (
    Draw,
    Example,
    PatchGeometry,
    Range,
    Transform,
    between,
    two_sided,
)


class NoiseValue(NamedTuple):
    """Standard deviation of the noise, and the key that its values come from."""

    sigma: Float[Array, "*channel"]
    key: PRNGKeyArray


@dataclass(frozen=True, kw_only=True)
class Noise(Transform):
    """Normally distributed noise; all channels share the standard deviation."""

    family: ClassVar[str] = "intensity"
    sigma_range: Range
    """Of the standard deviation (the reference calls it variance)."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw the standard deviation, and a key for each channel."""
        gates, uniform = self.gated(key, num_channels, 1)
        sigma = jnp.broadcast_to(between(uniform[0, 0], self.sigma_range), (num_channels,))
        keys = jax.random.split(jax.random.fold_in(key, 1), num_channels)
        return Draw(gates, NoiseValue(sigma, keys))

    def apply(self, volume: Float[Array, "*spatial"], value: NoiseValue) -> Array:
        """Add noise."""
        noise = jax.random.normal(value.key, volume.shape, volume.dtype)
        return add_noise(volume, value.sigma, noise)

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the strongest noise."""
        sigma = self.sigma_range[1]
        yield Example(f"noise σ {sigma:g}", NoiseValue(jnp.float32(sigma), jax.random.key(1)))


def add_noise(
    volume: Float[Array, "*spatial"], sigma: Float[Array, ""], noise: Float[Array, "*spatial"]
) -> Float[Array, "*spatial"]:
    """Add standard normal `noise` times `sigma`."""
    return volume + sigma * noise


@dataclass(frozen=True, kw_only=True)
class Blur(Transform):
    """Gaussian blur; borders are reflected without repeating the edge voxel."""

    family: ClassVar[str] = "intensity"
    name: ClassVar[str] = "blur"
    reach: ClassVar[tuple[float, float]] = (3, 0.25)
    """Taps on either side, floor(3 sigma + 1/4) (spec 04 §6.6)."""
    border: ClassVar[Literal["reflect", "symmetric"]] = "reflect"
    sigma_range: Range
    """Of the width, in voxels."""
    same_axes: bool = False
    """One width for all axes of a channel."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw a width for each channel and, unless `same_axes`, each axis."""
        num_axes = len(patch.patch_size)
        gates, uniform = self.gated(key, num_channels, 1 if self.same_axes else num_axes)
        sigmas = jnp.broadcast_to(between(uniform, self.sigma_range), (num_channels, num_axes))
        return Draw(gates, sigmas)

    @property
    def max_radius(self) -> int:
        """Taps on either side at the largest width: the static size of the window."""
        factor, offset = self.reach
        return int(np.floor(factor * self.sigma_range[1] + offset))

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, "axis"]) -> Array:
        """Blur along each axis in turn."""
        factor, offset = self.reach
        for axis in range(volume.ndim):
            radius = jnp.floor(factor * value[axis] + offset)
            taps = gaussian_taps(value[axis], radius, self.max_radius)
            volume = convolve_axis(volume, taps, axis, border=self.border)
        return volume

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the least and the widest blur."""
        for sigma in self.sigma_range:
            yield Example(f"{self.name} σ {sigma:g}", _all_axes(sigma, patch))


def gaussian_taps(
    sigma: Float[Array, ""], radius: Float[Array, ""], max_radius: int
) -> Float[Array, "tap"]:
    """Sample a Gaussian up to `radius` steps from its centre, 0 beyond; the sum is 1."""
    steps = np.arange(-max_radius, max_radius + 1)
    taps = jnp.where(np.abs(steps) <= radius, jnp.exp(-(steps**2) / (2 * sigma**2)), 0.0)
    return taps / taps.sum()


def convolve_axis(
    volume: Float[Array, "*spatial"],
    taps: Float[Array, "tap"],
    axis: int,
    *,
    border: Literal["reflect", "symmetric"],
) -> Float[Array, "*spatial"]:
    """Convolve one axis with an odd window; "symmetric" repeats the edge voxel, "reflect" not."""
    reach, size = taps.shape[0] // 2, volume.shape[axis]
    padding = [(reach, reach) if other == axis else (0, 0) for other in range(volume.ndim)]
    padded = jnp.pad(volume, padding, mode=border)
    total = jnp.zeros_like(volume)
    for tap in range(2 * reach + 1):
        total = total + taps[tap] * lax.slice_in_dim(padded, tap, tap + size, axis=axis)
    return total


@dataclass(frozen=True, kw_only=True)
class Brightness(Transform):
    """A factor, half of them below 1."""

    family: ClassVar[str] = "intensity"
    factor_range: Range

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw a factor for each channel."""
        gates, uniform = self.gated(key, num_channels, 2)
        return Draw(gates, two_sided(uniform, self.factor_range))

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, ""]) -> Array:
        """Multiply."""
        return volume * value

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the darkest and the brightest."""
        for factor in self.factor_range:
            yield Example(f"brightness × {factor:g}", jnp.float32(factor))


@dataclass(frozen=True, kw_only=True)
class BrightnessShift(Transform):
    """A normally distributed number added to a channel."""

    family: ClassVar[str] = "intensity"
    sigma: float
    """Its standard deviation; the mean is 0."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw a shift for each channel."""
        gates, uniform = self.gated(key, num_channels, 1)
        # The generator can return 0, whose quantile is infinite.
        return Draw(gates, self.sigma * ndtri(jnp.maximum(uniform[:, 0], 2.0**-24)))

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, ""]) -> Array:
        """Add."""
        import dm_pix as pix  # where it is used: the module loads without it

        return jnp.asarray(pix.adjust_brightness(volume, value))

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give two standard deviations down and up."""
        for sign, number in (("-", -2), ("+", 2)):
            title = f"brightness {sign} {2 * self.sigma:g} (2 sd)"
            yield Example(title, jnp.float32(number * self.sigma))


@dataclass(frozen=True, kw_only=True)
class Contrast(Transform):
    """A factor on the distance from the mean, half of them below 1."""

    family: ClassVar[str] = "intensity"
    factor_range: Range
    clip: bool = True
    """Whether the channel keeps its range."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw a factor for each channel."""
        gates, uniform = self.gated(key, num_channels, 2)
        return Draw(gates, two_sided(uniform, self.factor_range))

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, ""]) -> Array:
        """Scale the distance from the mean."""
        mean = _mean(volume)
        scaled = mean + value * (volume - mean)
        return jnp.clip(scaled, volume.min(), volume.max()) if self.clip else scaled

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the least and the most contrast."""
        for factor in self.factor_range:
            title = f"contrast {factor:g}" + ("" if self.clip else ", unclipped")
            yield Example(title, jnp.float32(factor))


@dataclass(frozen=True, kw_only=True)
class LowResolution(Transform):
    """Down-sampling to the nearest voxel, then linear up-sampling to the same shape."""

    family: ClassVar[str] = "intensity"
    name: ClassVar[str] = "low resolution"
    scale_range: Range
    """Of the share of voxels an axis that is kept."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw one zoom factor for each channel; with dummy 2-D axis 0 stays as it is."""
        gates, uniform = self.gated(key, num_channels, 1)
        num_axes = len(patch.patch_size)
        scales = jnp.broadcast_to(between(uniform, self.scale_range), (num_channels, num_axes))
        if patch.dummy_2d:
            scales = scales.at[:, 0].set(1.0)
        return Draw(gates, scales)

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, "axis"]) -> Array:
        """Sample down and up; separable, so one blend of two voxels an axis.

        The nearest index follows float32 arithmetic, as in the reference (spec 04 §6.9).
        """
        for axis, size in enumerate(volume.shape):
            low_size = low_resolution_size(size, value[axis])
            # A table, because division is not correctly rounded on every accelerator.
            steps = np.float32(size) / np.arange(1, size + 1, dtype=np.float32)
            step = jnp.asarray(steps)[jnp.clip(low_size - 1, 0, size - 1)]
            # Position (i + 1/2) m/n - 1/2 in units of 1/(2n): exact in integers.
            position = jnp.maximum((2 * np.arange(size) + 1) * low_size - size, 0)
            lower = position // (2 * size)
            weight = (position % (2 * size)).astype(jnp.float32) / (2 * size)
            weight = weight.reshape([-1] + [1] * (volume.ndim - axis - 1))
            upper = jnp.minimum(lower + 1, low_size - 1)
            below = _take_nearest(volume, lower, step, axis)
            above = _take_nearest(volume, upper, step, axis)
            volume = (1 - weight) * below + weight * above
        return volume

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the coarsest, and the coarsest of dummy 2-D."""
        title, scales = (
            f"{self.name} {self.scale_range[0]:g}",
            _all_axes(self.scale_range[0], patch),
        )
        yield Example(title, scales)
        yield Example(f"{title}, 2-D", scales.at[0].set(1.0))


def low_resolution_size(size: int, scale: Float[Array, ""]) -> Int[Array, ""]:
    """Round `size * scale` half to even, the product as exact as in float64 (spec 04 §6.9)."""
    # scale in units of 2^-25 (exact from 1/4 on), split so that no product exceeds 32 bits.
    units = jnp.round(scale * 2.0**25).astype(jnp.int32)
    low_product = size * (units & 0x1FFF)
    product = size * (units >> 13) + (low_product >> 13)  # in units of 2^-12
    rest = low_product & 0x1FFF
    whole, fraction = product >> 12, product & 0xFFF
    above_half = (fraction > 2048) | ((fraction == 2048) & (rest > 0))
    is_half = (fraction == 2048) & (rest == 0)
    return whole + (above_half | (is_half & (whole % 2 == 1)))


@dataclass(frozen=True, kw_only=True)
class Gamma(Transform):
    """The channel rescaled to [0, 1] and raised to a power, half of them below 1.

    Mean and standard deviation are restored; nothing is clipped at the end (spec 04 §6.10).
    """

    family: ClassVar[str] = "intensity"
    name: ClassVar[str] = "gamma"
    gamma_range: Range
    invert: bool = False
    """Whether it is done on the negated channel."""

    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw a gamma for each channel."""
        gates, uniform = self.gated(key, num_channels, 2)
        return Draw(gates, two_sided(uniform, self.gamma_range))

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, ""]) -> Array:
        """Raise to the power, of the negated channel if `invert`."""
        return -self.curved(-volume, value) if self.invert else self.curved(volume, value)

    def curved(self, volume: Float[Array, "*spatial"], gamma: Float[Array, ""]) -> Array:
        """Raise to the power `gamma`."""
        mean, std = mean_and_std(volume)
        low = volume.min()
        extent = volume.max() - low
        share = (volume - low) / jnp.maximum(extent, 1e-7)
        curved = raised(share, gamma, extent) + low
        new_mean, new_std = mean_and_std(curved)
        return (curved - new_mean) * (std / jnp.maximum(new_std, 1e-7)) + mean

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the smallest and the largest gamma."""
        for gamma in self.gamma_range:
            title = f"{'inverted ' if self.invert else ''}{self.name} {gamma:g}"
            yield Example(title, jnp.float32(gamma))


def raised(
    share: Float[Array, "*spatial"], gamma: Float[Array, ""], gain: Float[Array, "*any"]
) -> Float[Array, "*spatial"]:
    """Give `gain` times `share` to the power `gamma`, of shares in [0, 1]."""
    import dm_pix as pix  # where it is used: the module loads without it

    return jnp.asarray(pix.adjust_gamma(share, gamma, gain=gain, assume_in_bounds=True))


def _all_axes(value: Any, patch: PatchGeometry) -> Array:
    return jnp.full(len(patch.patch_size), value, jnp.float32)


def _take_nearest(volume: Array, low_index: Array, step: Array, axis: int) -> Array:
    source = jnp.floor((low_index.astype(jnp.float32) + 0.5) * step).astype(jnp.int32)
    source = jnp.minimum(source, volume.shape[axis] - 1)
    where = (slice(None),) * axis + (source,)
    return volume.at[where].get(mode="promise_in_bounds")


def _mean(volume: Array) -> Array:
    # Axis by axis: one long float32 sum loses digits at 192^3 voxels.
    for _ in range(volume.ndim):
        volume = volume.mean(axis=-1)
    return volume


def mean_and_std(
    volume: Float[Array, "*spatial"], *, ddof: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Give mean and standard deviation of a channel."""
    mean = _mean(volume)
    # ddof 1 is nnU-Net's, spec 04 §6.10
    variance = _mean((volume - mean) ** 2) * (volume.size / max(volume.size - ddof, 1))
    return mean, jnp.sqrt(variance)
