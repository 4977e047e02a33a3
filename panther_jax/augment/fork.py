"""Transforms of the winning fork's DA5 where they differ from nnU-Net's (spec 04 §5).

Cubic splines for the image and for low resolution, other borders, clipping and rounding.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from panther_jax.augment import intensity, local, spatial

FAMILY = "the winning fork's DA5"
# The inverse of the cubic B-spline's samples (1, 4, 1)/6 decays by this factor a voxel.
_POLE = np.sqrt(3.0) - 2.0
_REACH = 13  # |pole|^13 = 4e-8, below float32


def affine_matrix(
    angles: Float[Array, "axis"], scales: Float[Array, "axis"]
) -> Float[Array, "axis axis"]:
    """Build diag(scales) (Rx Ry Rz)^T; in 2-D only the last angle counts (spec 04 §6.2)."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if angles.shape[0] == 2:
        rotation = jnp.array([[cos[1], sin[1]], [-sin[1], cos[1]]])
        return scales[:, None] * rotation
    (cx, cy, cz), (sx, sy, sz) = cos, sin
    # Written out: a matrix product would run in reduced precision on some accelerators.
    rotation = jnp.array(
        [
            [cy * cz, cx * sz + sx * sy * cz, sx * sz - cx * sy * cz],
            [-cy * sz, cx * cz - sx * sy * sz, sx * cz + cx * sy * sz],
            [sy, -sx * cy, cx * cy],
        ]
    )
    return scales[:, None] * rotation


def resampling(
    image: spatial.Interpolation,
    label: spatial.Interpolation,
    *,
    label_ids: tuple[int, ...] | None = None,
) -> spatial.Resampling:
    """Give the resampling of image ("cubic" or "nearest") and label; -1 outside.

    Raises:
        ValueError: for an interpolation that the fork has not.
    """
    images = {"cubic": resample_cubic, "nearest": partial(resample_nearest, fill=0)}
    labels = {
        "linear": partial(resample_label_linear, label_ids=label_ids),
        "nearest": partial(resample_nearest, fill=-1),
    }
    if image not in images or label not in labels:
        raise ValueError(
            f"interpolation {image!r} of the image, {label!r} of the label: "
            f"the fork has {', '.join(images)} and {', '.join(labels)}"
        )
    return spatial.Resampling(affine_matrix, images[image], labels[label], crop_start)


def crop_start(size: int, patch_size: int) -> int:
    """Give the first voxel of the centre; nnU-Net's is one further if only `size` is even."""
    return (size - patch_size) // 2


def spline_coefficients(volume: Float[Array, "*spatial"]) -> Float[Array, "*spatial"]:
    """Turn samples into coefficients of the cubic B-spline through them, mirrored at the borders.

    The recursive filter of the textbooks as a window of 27 voxels: equal in float32, and parallel.
    """
    taps = jnp.asarray(_spline_taps(np.arange(-_REACH, _REACH + 1)))
    for axis, size in enumerate(volume.shape):
        if size > 1:
            volume = intensity.convolve_axis(volume, taps, axis, border="reflect")
    return volume


def resample_cubic(
    volume: Float[Array, "*input"], grid: tuple[Float[Array, "*patch"], ...]
) -> Float[Array, "*patch"]:
    """Interpolate with the cubic spline; 0 wherever a position lies beyond the outer voxels."""
    flat = spline_coefficients(volume).reshape(-1)
    sizes = volume.shape
    knots = [jnp.floor(position) for position in grid]
    fractions = [position - knot for position, knot in zip(grid, knots, strict=True)]

    def tap(axis: int, step) -> tuple[Array, Array]:
        index, last = knots[axis].astype(jnp.int32) + step, sizes[axis] - 1
        index = jnp.abs(index)  # mirror at the first voxel, then at the last
        index = jnp.clip(jnp.where(index > last, 2 * last - index, index), 0, last)
        return index, _b_spline(jnp.abs(fractions[axis] - step))

    def blend(axis: int, index: Array) -> Array:
        if axis == len(sizes):
            return flat.at[index].get(mode="promise_in_bounds")
        total = jnp.zeros((), volume.dtype)
        for step in range(-1, 3):
            along, weight = tap(axis, step)
            total = total + weight * blend(axis + 1, index * sizes[axis] + along)
        return total

    def add_plane(step, total):  # a loop: 64 gathers at once take seconds to compile
        along, weight = tap(0, step)
        return total + weight * blend(1, along)

    # "like": under shard_map what a loop starts from has to differ between devices, too.
    nothing = jnp.zeros_like(flat, shape=grid[0].shape)
    total = lax.fori_loop(-1, 3, add_plane, nothing)
    return jnp.where(_between_voxels(grid, sizes), total, 0.0)


def resample_nearest(
    volume: Shaped[Array, "*input"], grid: tuple[Float[Array, "*patch"], ...], fill: int | float
) -> Shaped[Array, "*patch"]:
    """Take the nearest voxel, halves up; `fill` beyond the centres of the outer voxels."""
    index = jnp.zeros(grid[0].shape, jnp.int32)
    for position, size in zip(grid, volume.shape, strict=True):
        nearest = jnp.floor(position + 0.5).astype(jnp.int32)
        index = index * size + jnp.clip(nearest, 0, size - 1)
    values = volume.reshape(-1).at[index].get(mode="promise_in_bounds")
    return jnp.where(_between_voxels(grid, volume.shape), values, jnp.asarray(fill, volume.dtype))


def resample_label_linear(
    label: Int[Array, "*input"],
    grid: tuple[Float[Array, "*patch"], ...],
    *,
    label_ids: tuple[int, ...] | None = None,
) -> Int[Array, "*patch"]:
    """Give the label with the largest interpolation weights, scores not rounded; -1 outside."""
    best = spatial.resample_label_linear(label, grid, label_ids=label_ids, half_precision=False)
    return jnp.where(_between_voxels(grid, label.shape), best, jnp.asarray(-1, label.dtype))


@dataclass(frozen=True, kw_only=True)
class Warp(spatial.Warp):
    """Rotation and scaling by cubic splines; half of the scales are below 1."""

    family: ClassVar[str] = FAMILY
    two_sided_scale: bool = True
    image_interpolation: spatial.Interpolation = "cubic"

    def resampling(
        self, *, label_ids: tuple[int, ...] | None = None, pad_label: int = -1
    ) -> spatial.Resampling:
        """Give the fork's resampling.

        Raises:
            ValueError: if `pad_label` is not -1, with which the fork pads labels.
        """
        if pad_label != -1:
            raise ValueError(f"seg_pad_label {pad_label}: the da5_fork policies pad labels with -1")
        label_ids = None if label_ids is None else (-1, *label_ids)
        return resampling(self.image_interpolation, self.label_interpolation, label_ids=label_ids)


@dataclass(frozen=True, kw_only=True)
class Blur(intensity.Blur):
    """Blur with a wider window; edge voxels are repeated at the borders."""

    family: ClassVar[str] = FAMILY
    name: ClassVar[str] = "wide blur"
    reach: ClassVar[tuple[float, float]] = (4, 0.5)
    border: ClassVar[Literal["reflect", "symmetric"]] = "symmetric"


@dataclass(frozen=True, kw_only=True)
class LowResolution(intensity.LowResolution):
    """Down-sampling to the nearest voxel, up-sampling by cubic splines, edge voxels repeated."""

    family: ClassVar[str] = FAMILY
    name: ClassVar[str] = "cubic low res."

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, "axis"]) -> Array:
        """Sample down and up: separable, one matrix an axis; keeps to the small volume's range."""
        result, kept = volume, volume
        for axis, size in enumerate(volume.shape):
            low_size = intensity.low_resolution_size(size, value[axis])
            source = jnp.asarray(_kept_voxels(size))[low_size]
            operator = _up_and_down(source, low_size)
            product = jnp.tensordot(operator, result, ((1,), (axis,)), precision="highest")
            result = jnp.moveaxis(product, 0, axis)
            kept = jnp.take(kept, source, axis, mode="clip")
        return jnp.clip(result, kept.min(), kept.max())


@dataclass(frozen=True, kw_only=True)
class Gamma(intensity.Gamma):
    """Gamma that restores the population's deviation."""

    family: ClassVar[str] = FAMILY
    name: ClassVar[str] = "gamma, fork"

    def curved(self, volume: Float[Array, "*spatial"], gamma: Float[Array, ""]) -> Array:
        """Raise to the power `gamma`."""
        mean, std = intensity.mean_and_std(volume, ddof=0)
        low = volume.min()
        extent = volume.max() - low + 1e-7
        share = (volume - low) / extent
        curved = intensity.raised(share, gamma, extent) + low
        new_mean, new_std = intensity.mean_and_std(curved, ddof=0)
        return (curved - new_mean) / (new_std + 1e-8) * std + mean


@dataclass(frozen=True, kw_only=True)
class BlankRectangles(local.BlankRectangles):
    """One to five boxes that may reach a full third and never touch voxel 0."""

    family: ClassVar[str] = FAMILY
    max_count: ClassVar[int] = 5
    first_voxel: ClassVar[int] = 1
    below_third: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class Sharpen(local.Sharpen):
    """Sharpening with zeros beyond the borders, that keeps the range."""

    family: ClassVar[str] = FAMILY
    name: ClassVar[str] = "clipped sharpening"
    border: ClassVar[Literal["edge", "constant"]] = "constant"

    def apply(self, volume: Float[Array, "*spatial"], value: Float[Array, ""]) -> Array:
        """Subtract the Laplacian times the strength, and clip."""
        return jnp.clip(super().apply(volume, value), volume.min(), volume.max())


def _between_voxels(grid: tuple[Array, ...], sizes: tuple[int, ...]) -> Array:
    # SciPy's mode "constant": nothing is interpolated across the border (spec 04 §5).
    inside = jnp.ones(grid[0].shape, bool)
    for position, size in zip(grid, sizes, strict=True):
        inside = inside & (position >= 0) & (position <= size - 1)
    return inside


def _b_spline(distance: Array) -> Array:
    near = 2 / 3 - distance**2 * (1 - distance / 2)
    return jnp.where(distance < 1, near, jnp.maximum(2 - distance, 0) ** 3 / 6)


def _kept_voxels(size: int) -> Int[np.ndarray, "low_size voxel"]:
    """Row m: the voxels that down-sampling to m keeps, the last one repeated; halves round up.

    A table in float64, because the reference's rounding at exact halves decides.
    """
    table = np.zeros((size + 1, size), np.int32)
    for low_size in range(1, size + 1):
        position = (np.arange(low_size) + 0.5) * (size / low_size) - 0.5
        kept = np.floor(np.clip(position, 0, size - 1) + 0.5).astype(np.int32)
        table[low_size] = np.pad(kept, (0, size - low_size), mode="edge")
    return table


def _up_and_down(source: Array, low_size: Array) -> Array:
    """Matrix (voxel, voxel): the spline through the kept voxels at the original positions."""
    size = source.shape[0]
    # Position (i + 1/2) m/n - 1/2 in units of 1/(2n): exact in integers.
    position = (2 * np.arange(size) + 1) * low_size - size
    knot = jnp.floor_divide(position, 2 * size)
    fraction = (position - knot * 2 * size).astype(jnp.float32) / (2 * size)
    steps = np.arange(-1, 3)
    weights = _b_spline(jnp.abs(fraction[:, None] - steps))
    offsets = np.arange(-_REACH - 1, _REACH + 3)  # of the voxels that the coefficients see
    filters = _spline_taps(offsets[:, None] - steps)
    of_offset = (weights[:, None, :] * filters).sum(-1)
    seen = source[jnp.clip(knot[:, None] + offsets, 0, low_size - 1)]
    chosen = seen[..., None] == np.arange(size)
    return jnp.where(chosen, of_offset[..., None], 0.0).sum(1)


def _spline_taps(steps: np.ndarray) -> np.ndarray:
    taps = -6 * _POLE / (1 - _POLE**2) * _POLE ** np.abs(steps)
    return np.where(np.abs(steps) <= _REACH, taps, 0.0).astype(np.float32)
