"""Intensity transforms: noise, blur, brightness, contrast, low resolution, gamma (spec 04 §6).

`sample_*` draws for all channels of one sample; `apply_*` transforms one channel, an array with
spatial axes only. `gate` is the interval of a uniform number in which the sample is transformed:
(0, p) for a probability p; disjoint intervals and the same key make alternatives of one draw.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Gate = tuple[float, float]
Range = tuple[float, float]


class Draw(NamedTuple):
    """Which channels are transformed, and their parameters (first axis of each leaf: channel)."""

    gate: Bool[Array, "channel"]
    value: Any


class NoiseValue(NamedTuple):
    """Standard deviation of the noise, and the key that its values come from."""

    sigma: Float[Array, "*channel"]
    key: PRNGKeyArray


def sample_gated(
    key: PRNGKeyArray, num_channels: int, num_values: int, *, gate: Gate, p_channel: float = 1.0
) -> tuple[Bool[Array, "channel"], Float[Array, "channel value"]]:
    """Draw the gates of a sample's channels and, for each channel, uniform numbers in [0, 1).

    Alternatives that share a key must ask for equally many values, to see the same first number.
    """
    uniform = jax.random.uniform(key, (1 + num_channels * (1 + num_values),))
    per_sample = (uniform[0] >= gate[0]) & (uniform[0] < gate[1])
    of_channels = uniform[1:].reshape(num_channels, 1 + num_values)
    return per_sample & (of_channels[:, 0] < p_channel), of_channels[:, 1:]


def two_sided(uniform: Float[Array, "*any 2"], value_range: Range) -> Float[Array, "*any"]:
    """Map two uniform numbers to TS(low, high), half the mass on each side of 1 (spec 04 §3.1)."""
    low, high = value_range
    side, share = uniform[..., 0], uniform[..., 1]
    if low >= 1:
        return low + (high - low) * share
    return jnp.where(side < 0.5, low + (1 - low) * share, 1 + (high - 1) * share)


def sample_noise(key: PRNGKeyArray, num_channels: int, *, gate: Gate, sigma_range: Range) -> Draw:
    """Draw a standard deviation that all channels share (the reference calls it variance)."""
    gates, uniform = sample_gated(key, num_channels, 1, gate=gate)
    low, high = sigma_range
    sigma = jnp.broadcast_to(low + (high - low) * uniform[0, 0], (num_channels,))
    return Draw(
        gates, NoiseValue(sigma, jax.random.split(jax.random.fold_in(key, 1), num_channels))
    )


def apply_noise(
    volume: Float[Array, "*spatial"], sigma: Float[Array, ""], noise: Float[Array, "*spatial"]
) -> Float[Array, "*spatial"]:
    """Add standard normal `noise` times `sigma`."""
    return volume + sigma * noise


def sample_blur(
    key: PRNGKeyArray,
    num_channels: int,
    num_axes: int,
    *,
    gate: Gate,
    p_channel: float,
    sigma_range: Range,
    same_axes: bool = False,
) -> Draw:
    """Draw a width for each channel and, unless `same_axes`, each axis; in voxels."""
    num_values = 1 if same_axes else num_axes
    gates, uniform = sample_gated(key, num_channels, num_values, gate=gate, p_channel=p_channel)
    low, high = sigma_range
    sigmas = jnp.broadcast_to(low + (high - low) * uniform, (num_channels, num_axes))
    return Draw(gates, sigmas)


def blur_radius(sigma: float) -> int:
    """Give the number of taps on either side, floor(3 sigma + 1/4) (spec 04 §6.6)."""
    return int(np.floor(3 * sigma + 0.25))


def apply_blur(
    volume: Float[Array, "*spatial"], sigmas: Float[Array, "axis"], *, max_radius: int = 4
) -> Float[Array, "*spatial"]:
    """Blur along each axis in turn; borders are reflected without repeating the edge voxel.

    `max_radius` is the static size of the window: `blur_radius` of the largest possible sigma.
    """
    for axis in range(volume.ndim):
        taps = gaussian_taps(sigmas[axis], jnp.floor(3 * sigmas[axis] + 0.25), max_radius)
        volume = convolve_axis(volume, taps, axis, border="reflect")
    return volume


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


def sample_multiplier(
    key: PRNGKeyArray,
    num_channels: int,
    *,
    gate: Gate,
    value_range: Range,
    p_channel: float = 1.0,
) -> Draw:
    """Draw a factor around 1 for each channel: of brightness, of contrast, or a gamma."""
    gates, uniform = sample_gated(key, num_channels, 2, gate=gate, p_channel=p_channel)
    return Draw(gates, two_sided(uniform, value_range))


def apply_brightness(
    volume: Float[Array, "*spatial"], factor: Float[Array, ""]
) -> Float[Array, "*spatial"]:
    """Multiply by `factor`."""
    return volume * factor


def sample_shift(
    key: PRNGKeyArray, num_channels: int, *, gate: Gate, sigma: float, p_channel: float
) -> Draw:
    """Draw a normally distributed shift of the brightness for each channel."""
    gates, uniform = sample_gated(key, num_channels, 1, gate=gate, p_channel=p_channel)
    # The generator can return 0, whose quantile is infinite.
    return Draw(gates, sigma * ndtri(jnp.maximum(uniform[:, 0], 2.0**-24)))


def apply_shift(
    volume: Float[Array, "*spatial"], shift: Float[Array, ""]
) -> Float[Array, "*spatial"]:
    """Add `shift`."""
    return volume + shift


def apply_contrast(
    volume: Float[Array, "*spatial"], factor: Float[Array, ""], *, clip: bool = True
) -> Float[Array, "*spatial"]:
    """Scale the distance from the mean; `clip` keeps the range that the channel had."""
    mean = _mean(volume)
    scaled = mean + factor * (volume - mean)
    if not clip:
        return scaled
    return jnp.clip(scaled, volume.min(), volume.max())


def sample_low_resolution(
    key: PRNGKeyArray,
    num_channels: int,
    num_axes: int,
    *,
    gate: Gate,
    p_channel: float,
    scale_range: Range,
    dummy_2d: bool = False,
) -> Draw:
    """Draw one zoom factor for each channel; axis 0 stays as it is with `dummy_2d`."""
    gates, uniform = sample_gated(key, num_channels, 1, gate=gate, p_channel=p_channel)
    low, high = scale_range
    scales = jnp.broadcast_to(low + (high - low) * uniform, (num_channels, num_axes))
    if dummy_2d:
        scales = scales.at[:, 0].set(1.0)
    return Draw(gates, scales)


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


def apply_low_resolution(
    volume: Float[Array, "*spatial"], scales: Float[Array, "axis"]
) -> Float[Array, "*spatial"]:
    """Down-sample to the nearest voxel, then up-sample linearly to the same shape.

    Both are separable and become one blend of two voxels an axis. The nearest index follows
    float32 arithmetic, as in the reference (spec 04 §6.9).
    """
    for axis, size in enumerate(volume.shape):
        low_size = low_resolution_size(size, scales[axis])
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


def apply_gamma(
    volume: Float[Array, "*spatial"], gamma: Float[Array, ""], *, invert: bool = False
) -> Float[Array, "*spatial"]:
    """Raise the rescaled channel to `gamma`, then restore its mean and standard deviation.

    `invert` does so on the negated channel. Nothing is clipped at the end (spec 04 §6.10).
    """
    if invert:
        return -apply_gamma(-volume, gamma)
    mean, std = mean_and_std(volume)
    low = volume.min()
    extent = volume.max() - low
    curved = ((volume - low) / jnp.maximum(extent, 1e-7)) ** gamma * extent + low
    new_mean, new_std = mean_and_std(curved)
    return (curved - new_mean) * (std / jnp.maximum(new_std, 1e-7)) + mean


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
