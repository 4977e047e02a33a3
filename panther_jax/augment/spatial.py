"""Spatial transforms: rotation, scaling, crop, elastic deformation, flips, mask (spec 04 §6).

`Warp`, `Reorientation` and `Mirror` are what a policy consists of, beside its intensity transforms.
Volumes have no channel axis here: one channel, or the label, at a time.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from panther_jax.augment.transform import Example, PatchGeometry, Range, between, two_sided

Interpolation = Literal["linear", "nearest", "cubic"]

FAMILY = "geometry"
# The reference scores labels in units of 1/1000 and keeps them as float16 (spec 04 §6.3).
_SCORE_SCALE = 1000.0
_NO_CANDIDATE = np.iinfo(np.int32).max


class SpatialDraw(NamedTuple):
    """Parameters of one spatial transform; `resample` False means an exact crop."""

    resample: Bool[Array, ""]
    angles: Float[Array, "axis"]
    scales: Float[Array, "axis"]


class Resampling(NamedTuple):
    """What a spatial transform does to positions, to an image channel and to the label."""

    matrix: Callable[[Array, Array], Array]
    """From angles and scales, as `affine_matrix`."""
    image: Callable[[Array, tuple[Array, ...]], Array]
    """From a volume and the sampling grid, as `resample_linear`."""
    label: Callable[[Array, tuple[Array, ...]], Array]
    crop_start: Callable[[int, int], int]
    """First voxel of an untransformed patch, from input and patch size of an axis."""


class Orientation(NamedTuple):
    """For each axis of the output the axis of the input it runs along, and whether backwards."""

    source_axes: Int[Array, "axis"]
    flips: Bool[Array, "axis"]


class AxisCorners(NamedTuple):
    """The two neighbours of a sampling position along one axis: clamped index, weight, inside."""

    index: tuple[Array, Array]
    weight: tuple[Array, Array]
    inside: tuple[Array, Array]


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Rotation, scaling and crop: draws, and makes the patch of all channels and the label."""

    family: ClassVar[str] = FAMILY
    min_scale: float = 0.85
    """Divisor of the initial patch; the default's real smallest scale is 0.7 (spec 04 §2)."""
    scale_range: Range = (0.7, 1.4)
    same_scale: bool = True
    """One scale for all axes."""
    two_sided_scale: bool = False
    """Half of the scales are below 1 (the fork's law, spec 04 §5)."""
    p_rotation: float = 0.2
    p_rotation_axis: float = 1.0
    """Probability of each axis of a sample that is rotated."""
    p_scale: float = 0.2
    image_interpolation: Interpolation = "linear"
    label_interpolation: Interpolation = "linear"

    def sample(self, key: PRNGKeyArray, patch: PatchGeometry) -> SpatialDraw:
        """Draw angles and scales; independent gates, plain uniform laws (spec 04 §3.1, §4)."""
        num_axes = len(patch.patch_size) - patch.dummy_2d
        uniform = jax.random.uniform(key, (2 + (3 + self.two_sided_scale) * num_axes,))
        rotate, rescale = uniform[0] < self.p_rotation, uniform[1] < self.p_scale
        of_angle, of_axis, of_scale, *of_side = uniform[2:].reshape(-1, num_axes)
        angles = between(of_angle, patch.rotation_range_rad)
        angles = jnp.where(rotate & (of_axis < self.p_rotation_axis), angles, 0.0)
        if self.same_scale:
            of_scale = jnp.broadcast_to(of_scale[0], (num_axes,))
        if self.two_sided_scale:
            scales = two_sided(jnp.stack([of_side[0], of_scale], axis=-1), self.scale_range)
        else:
            scales = between(of_scale, self.scale_range)
        return SpatialDraw(rotate | rescale, angles, jnp.where(rescale, scales, 1.0))

    def resampling(
        self, *, label_ids: tuple[int, ...] | None = None, pad_label: int = -1
    ) -> Resampling:
        """Give what positions, image and label undergo; `label_ids` need not name -1.

        Raises:
            ValueError: for an interpolation or a `pad_label` that there is not.
        """
        return resampling(
            self.image_interpolation,
            self.label_interpolation,
            pad_label=pad_label,
            label_ids=None if label_ids is None else (-1, *label_ids),
        )

    def apply(
        self,
        volumes: tuple[Float[Array, "..."], ...],
        label: Int[Array, "..."],
        draw: SpatialDraw,
        patch: PatchGeometry,
        *,
        label_ids: tuple[int, ...] | None = None,
        pad_label: int = -1,
    ) -> tuple[tuple[Float[Array, "..."], ...], Int[Array, "..."]]:
        """Make the patch, as `apply_spatial`."""
        return apply_spatial(
            volumes,
            label,
            draw,
            patch_size=patch.patch_size,
            how=self.resampling(label_ids=label_ids, pad_label=pad_label),
            dummy_2d=patch.dummy_2d,
            pad_label=pad_label,
        )

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the largest rotations and the extreme scales."""
        turned, smallest, largest = patch.rotation_range_rad[1], *self.scale_range
        degrees = round(math.degrees(turned))
        scales = f"{smallest:g}, 1, {largest:g}"
        shown = {
            f"rotation -{degrees}° in plane": ((-turned, 0.0, 0.0), (1.0,) * 3),
            f"rotation +{degrees}° in plane": ((turned, 0.0, 0.0), (1.0,) * 3),
            f"rotation +{degrees}° all axes": ((turned,) * 3, (1.0,) * 3),
            "dummy 2-D: 135°": ((0.75 * math.pi, 0.0, 0.0), (1.0,) * 3),
            f"scale {smallest:g} (larger)": ((0.0,) * 3, (smallest,) * 3),
            f"scale {largest:g} (smaller)": ((0.0,) * 3, (largest,) * 3),
        }
        if not self.same_scale:
            shown[f"scale {scales}"] = ((0.0,) * 3, (smallest, 1.0, largest))
        if self.image_interpolation != "linear":
            title = f"{self.image_interpolation}: {degrees}°, scale {smallest:g}"
            shown = {title: ((turned, 0.0, 0.0), (smallest,) * 3)}
        for title, (angles, factors) in shown.items():
            draw = SpatialDraw(jnp.asarray(True), jnp.asarray(angles), jnp.asarray(factors))
            yield Example(title, draw)


@dataclass(frozen=True, kw_only=True)
class Reorientation:
    """Quarter turns and transpositions of the axes that have the most frequent size (spec 04 §4).

    Drawn apart, applied to channels and label in one pass.
    """

    family: ClassVar[str] = FAMILY
    p_rot90: float
    p_transpose: float

    def sample(
        self, rot90_key: PRNGKeyArray, transpose_key: PRNGKeyArray, patch: PatchGeometry
    ) -> Orientation | None:
        """Draw a quarter turn and what transposition follows; None for a patch that has none."""
        valid_axes = valid_rotation_axes(patch.patch_size)
        if not valid_axes or self.p_rot90 == self.p_transpose == 0:
            return None
        num_axes = len(patch.patch_size)
        turn, turns, plane = sample_rot90(rot90_key, valid_axes, p=self.p_rot90)
        transpose, order = sample_transpose(transpose_key, num_axes, valid_axes, p=self.p_transpose)
        turned = rot90_orientation(jnp.where(turn, turns, 0), plane, num_axes)
        order = jnp.where(transpose, order, jnp.arange(num_axes))
        return Orientation(turned.source_axes[order], turned.flips[order])

    def apply(self, volume: Shaped[Array, "..."], value: Orientation) -> Shaped[Array, "..."]:
        """Turn one channel or the label."""
        return apply_orientation(volume, value)

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give a quarter turn and a transposition of the last two axes that allow them."""
        num_axes, plane = len(patch.patch_size), valid_rotation_axes(patch.patch_size)[-2:]
        if not plane:
            return
        for title, turns in (("rot90, k = 1", 1), ("transpose", 3)):
            turned = rot90_orientation(jnp.int32(turns), jnp.asarray(plane), num_axes)
            if title == "transpose":
                turned = turned._replace(flips=jnp.zeros(num_axes, bool))
            yield Example(title, turned)


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """Flips, with probability 1/2 for each axis."""

    family: ClassVar[str] = FAMILY
    max_axes: int = 3
    """How many axes, from the first, may be flipped; in 2-D one less where this is 2."""

    def axes(self, num_axes: int) -> tuple[int, ...]:
        """Give the axes that may be flipped."""
        if self.max_axes == 2 and num_axes == 2:
            return (0,)  # spec 04 §2: onlyMirror01 flips axis 0 alone in 2-D
        return tuple(range(min(self.max_axes, num_axes)))

    def sample(self, key: PRNGKeyArray, patch: PatchGeometry) -> Bool[Array, "axis"]:
        """Draw for each axis whether it is flipped."""
        num_axes = len(patch.patch_size)
        allowed = np.isin(np.arange(num_axes), patch.mirror_axes)
        return jax.random.bernoulli(key, 0.5, (num_axes,)) & allowed

    def apply(self, volume: Shaped[Array, "*patch"], value: Bool[Array, "axis"]) -> Array:
        """Flip one channel or the label."""
        return apply_mirror(volume, value)

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the flip of each axis."""
        num_axes = len(patch.patch_size)
        for axis in reversed(patch.mirror_axes):
            title = f"mirror {'zyx'[-num_axes:][axis]}"
            yield Example(title, jnp.asarray(np.arange(num_axes) == axis))


def affine_matrix(
    angles: Float[Array, "axis"], scales: Float[Array, "axis"]
) -> Float[Array, "axis axis"]:
    """Build A of spec 04 §6.2: Rz Ry Rx diag(scales), column vectors, axes in array order.

    In 2-D only the last angle counts.
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if angles.shape[0] == 2:
        rotation = jnp.array([[cos[1], -sin[1]], [sin[1], cos[1]]])
        return rotation * scales
    (cx, cy, cz), (sx, sy, sz) = cos, sin
    # Written out: a matrix product would run in reduced precision on some accelerators.
    rotation = jnp.array(
        [
            [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
            [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
            [-sy, cy * sx, cy * cx],
        ]
    )
    return rotation * scales


def sampling_grid(
    matrix: Float[Array, "axis axis"],
    input_size: tuple[int, ...],
    patch_size: tuple[int, ...],
    offsets: Float[Array, "*patch axis"] | None = None,
) -> tuple[Float[Array, "*patch"], ...]:
    """Give, for each axis, the input position of every output voxel (voxel indices).

    The centre of the patch falls on the centre of the input. `offsets`, if any, displace before
    the matrix acts, and their mean effect is removed (spec 04 §6.2).
    """
    num_axes = len(patch_size)
    centred = [
        jnp.asarray(np.arange(size) - (size - 1) / 2, jnp.float32).reshape(
            [-1 if other == axis else 1 for other in range(num_axes)]
        )
        for axis, size in enumerate(patch_size)
    ]
    if offsets is not None:
        centred = [u + offsets[..., axis] for axis, u in enumerate(centred)]
    grid = []
    for row, size in enumerate(input_size):
        position = sum(matrix[row, axis] * u for axis, u in enumerate(centred))
        position = jnp.broadcast_to(position, patch_size)
        if offsets is not None:
            position = position - position.mean()
        grid.append(position + (size - 1) / 2)
    return tuple(grid)


def elastic_offsets(
    white_noise: Float[Array, "axis *patch"],
    scales: Float[Array, "axis"],
    magnitudes: Float[Array, "axis"],
) -> Float[Array, "*patch axis"]:
    """Smooth white noise into displacements in voxels (spec 04 §6.4).

    `scales` are the width of the smoothing as a share of the axis, `magnitudes` the largest
    displacement. Off in every pipeline that nnU-Net ships.
    """
    patch_size = white_noise.shape[1:]
    frequencies = np.meshgrid(*(np.fft.fftfreq(size) for size in patch_size), indexing="ij")
    squared = jnp.asarray(sum(f**2 for f in frequencies), jnp.float32)
    displacements = []
    for axis, size in enumerate(patch_size):
        # The width of this axis' displacement holds in all directions.
        transfer = jnp.exp(-2 * jnp.pi**2 * (scales[axis] * size) ** 2 * squared)
        smooth = jnp.fft.ifftn(jnp.fft.fftn(white_noise[axis]) * transfer).real
        smooth = smooth / jnp.abs(smooth).max() * jnp.maximum(magnitudes[axis], 1e-8)
        displacements.append(smooth)
    return jnp.stack(displacements, axis=-1)


def resample_linear(
    volume: Float[Array, "*input"], grid: tuple[Float[Array, "*patch"], ...]
) -> Float[Array, "*patch"]:
    """Interpolate linearly; neighbours outside the volume count as 0, so the rim fades."""
    return map_coordinates(volume, grid, order=1, mode="constant", cval=0.0)


def resample_nearest(
    volume: Shaped[Array, "*input"], grid: tuple[Float[Array, "*patch"], ...], fill: int | float
) -> Shaped[Array, "*patch"]:
    """Take the nearest voxel, half to even; `fill` outside."""
    index = jnp.zeros(grid[0].shape, jnp.int32)
    inside = jnp.ones(grid[0].shape, bool)
    for position, size in zip(grid, volume.shape, strict=True):
        nearest = jnp.round(position).astype(jnp.int32)
        inside = inside & (nearest >= 0) & (nearest < size)
        index = index * size + jnp.clip(nearest, 0, size - 1)
    values = volume.reshape(-1).at[index].get(mode="promise_in_bounds")
    return jnp.where(inside, values, jnp.asarray(fill, volume.dtype))


def resample_label_linear(
    label: Int[Array, "*input"],
    grid: tuple[Float[Array, "*patch"], ...],
    *,
    pad_label: int = -1,
    label_ids: tuple[int, ...] | None = None,
    half_precision: bool = True,
) -> Int[Array, "*patch"]:
    """Give each voxel the label with the largest sum of interpolation weights (spec 04 §6.3).

    At a tie (of float16 scores) the nearest voxel's label, if tied, else the smallest.
    `label_ids` name every value that `label` can hold, which makes it faster; a value left out
    is never returned. None accepts any labels. `half_precision` False leaves scores unrounded.
    """
    axes = _neighbours(grid, label.shape)
    flat = label.reshape(-1)
    corner_labels, weights = [], []
    for corner in itertools.product((0, 1), repeat=len(grid)):
        pairs = list(zip(axes, corner, strict=True))
        inside = _all(axis.inside[side] for axis, side in pairs)
        value = _take(flat, axes, corner, label.shape).astype(jnp.int32)
        corner_labels.append(jnp.where(inside, value, pad_label))
        weights.append(_product(axis.weight[side] for axis, side in pairs))
    candidates = corner_labels if label_ids is None else sorted({*label_ids, pad_label})
    scores = [_score(candidate, corner_labels, weights) for candidate in candidates]
    if half_precision:
        # Not `astype(float16)`: XLA may drop a pair of conversions, never a reduce_precision.
        scores = [lax.reduce_precision(s, exponent_bits=5, mantissa_bits=10) for s in scores]
    best = _largest(scores)
    nearest = resample_nearest(label, grid, pad_label).astype(jnp.int32)
    nearest_is_best = jnp.zeros(nearest.shape, bool)
    smallest = jnp.full(nearest.shape, _NO_CANDIDATE)
    for candidate, score in zip(candidates, scores, strict=True):
        is_best = score == best
        smallest = jnp.where(is_best, jnp.minimum(smallest, candidate), smallest)
        nearest_is_best = nearest_is_best | (is_best & (nearest == candidate))
    return jnp.where(nearest_is_best, nearest, smallest).astype(label.dtype)


def crop_start(size: int, patch_size: int) -> int:
    """Give the first voxel of the centre, n//2 - p//2 (spec 04 §6.1)."""
    return size // 2 - patch_size // 2


def centre_crop(
    volume: Shaped[Array, "*input"],
    patch_size: tuple[int, ...],
    fill: int | float = 0,
    *,
    start_of: Callable[[int, int], int] = crop_start,
) -> Shaped[Array, "*patch"]:
    """Cut the centre; `fill` where the patch sticks out."""
    starts = [start_of(n, p) for n, p in zip(volume.shape, patch_size, strict=True)]
    slices, padding = [], []
    for start, size, n in zip(starts, patch_size, volume.shape, strict=True):
        slices.append(slice(max(start, 0), min(start + size, n)))
        padding.append((max(-start, 0), max(start + size - n, 0)))
    cropped = volume[tuple(slices)]
    if not any(before or after for before, after in padding):
        return cropped
    return jnp.pad(cropped, padding, constant_values=fill)


def resampling(
    image: Interpolation,
    label: Interpolation,
    *,
    pad_label: int = -1,
    label_ids: tuple[int, ...] | None = None,
) -> Resampling:
    """Give nnU-Net's resampling with these interpolations, "linear" or "nearest" (spec 04 §6.3).

    Raises:
        ValueError: for an interpolation that nnU-Net has not.
    """
    images = {"linear": resample_linear, "nearest": partial(resample_nearest, fill=0)}
    labels = {
        "linear": partial(resample_label_linear, pad_label=pad_label, label_ids=label_ids),
        "nearest": partial(resample_nearest, fill=pad_label),
    }
    for name in (image, label):
        if name not in images:
            raise ValueError(f"interpolation {name!r} is none of {', '.join(images)}")
    return Resampling(affine_matrix, images[image], labels[label], crop_start)


def apply_spatial(
    volumes: tuple[Float[Array, "..."], ...],
    label: Int[Array, "..."],
    draw: SpatialDraw,
    *,
    patch_size: tuple[int, ...],
    how: Resampling,
    dummy_2d: bool = False,
    pad_label: int = -1,
    offsets: Float[Array, "*patch axis"] | None = None,
) -> tuple[tuple[Float[Array, "..."], ...], Int[Array, "..."]]:
    """Rotate, scale and crop all channels and the label to `patch_size`.

    Without rotation and scaling the result is the exact centre crop, and under `lax.cond` the
    gather is skipped. With `dummy_2d` each slice of axis 0 is transformed alike, in its plane.

    Raises:
        ValueError: with `dummy_2d`, if axis 0 has another size than the patch.
    """
    if dummy_2d and label.shape[0] != patch_size[0]:
        raise ValueError(
            f"patch of {label.shape[0]} slices where the patch size is {patch_size}: with dummy-2D "
            "augmentation axis 0 is not cropped; cut initial patches with patch_geometry"
        )
    in_plane_size = patch_size[1:] if dummy_2d else patch_size

    def resample(volumes, label):
        shape = label.shape[1:] if dummy_2d else label.shape
        grid = sampling_grid(how.matrix(draw.angles, draw.scales), shape, in_plane_size, offsets)
        of_channel, of_label = how.image, how.label
        if dummy_2d:
            of_channel, of_label = (jax.vmap(f, (0, None)) for f in (of_channel, of_label))
        return tuple(of_channel(volume, grid) for volume in volumes), of_label(label, grid)

    def crop(volumes, label):
        cut = partial(centre_crop, patch_size=patch_size, start_of=how.crop_start)
        return tuple(cut(volume) for volume in volumes), cut(label, fill=pad_label)

    return lax.cond(draw.resample, resample, crop, volumes, label)


def valid_rotation_axes(patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """Give the axes that quarter turns and transpositions may act on: the most frequent size.

    Empty where all sizes differ (spec 04 §4).
    """
    counts = [patch_size.count(size) for size in patch_size]
    if max(counts) == 1:
        return ()
    return tuple(axis for axis, count in enumerate(counts) if count == max(counts))


def sample_rot90(
    key: PRNGKeyArray, valid_axes: tuple[int, ...], *, p: float
) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, "2"]]:
    """Draw whether to turn, how many quarter turns, and in which plane (axes ascending)."""
    uniform = jax.random.uniform(key, (3,))
    planes = np.array(list(itertools.combinations(valid_axes, 2)))
    turns = jnp.floor(4 * uniform[1]).astype(jnp.int32)
    plane = jnp.floor(len(planes) * uniform[2]).astype(jnp.int32)
    return uniform[0] < p, turns, jnp.asarray(planes)[plane]


def sample_transpose(
    key: PRNGKeyArray, num_axes: int, valid_axes: tuple[int, ...], *, p: float
) -> tuple[Bool[Array, ""], Int[Array, "axis"]]:
    """Draw whether to transpose, and the order of the axes (the identity included)."""
    uniform = jax.random.uniform(key, (2,))
    orders = []
    for permuted in itertools.permutations(valid_axes):
        order = np.arange(num_axes)
        order[list(valid_axes)] = permuted
        orders.append(order)
    chosen = jnp.floor(len(orders) * uniform[1]).astype(jnp.int32)
    return uniform[0] < p, jnp.asarray(np.array(orders))[chosen]


def rot90_orientation(turns: Int[Array, ""], plane: Int[Array, "2"], num_axes: int) -> Orientation:
    """Express `rot90(x, turns, plane)` (from the first axis towards the second) as a gather."""
    first, second = plane[0], plane[1]
    straight = jnp.arange(num_axes)
    swapped = straight.at[first].set(second).at[second].set(first)
    flips = jnp.zeros(num_axes, bool)
    flips = flips.at[first].set((turns == 1) | (turns == 2))
    flips = flips.at[second].set((turns == 2) | (turns == 3))
    return Orientation(jnp.where(turns % 2 == 1, swapped, straight), flips)


def apply_orientation(
    volume: Shaped[Array, "..."], orientation: Orientation
) -> Shaped[Array, "..."]:
    """Permute and flip axes of equal size, in one pass over the volume; the shape stays."""
    index = 0
    strides = np.array([math.prod(volume.shape[axis + 1 :]) for axis in range(volume.ndim)])
    for axis, size in enumerate(volume.shape):
        forward = jnp.arange(size)
        along = jnp.where(orientation.flips[axis], size - 1 - forward, forward)
        along = along * jnp.asarray(strides)[orientation.source_axes[axis]]
        index = index + along.reshape([-1] + [1] * (volume.ndim - axis - 1))
    return volume.reshape(-1).at[index].get(mode="promise_in_bounds")


def apply_mirror(
    volume: Shaped[Array, "*patch"], flips: Bool[Array, "axis"]
) -> Shaped[Array, "*patch"]:
    """Flip the axes that are marked, in one pass over the volume."""
    return apply_orientation(volume, Orientation(jnp.arange(volume.ndim), flips))


def apply_mask(
    volume: Float[Array, "*patch"], label: Int[Array, "*patch"]
) -> Float[Array, "*patch"]:
    """Set to 0 what lies outside the nonzero mask, label < 0; before -1 is replaced."""
    return jnp.where(label < 0, 0.0, volume)


def _neighbours(grid: tuple[Array, ...], shape: tuple[int, ...]) -> list[AxisCorners]:
    axes = []
    for position, size in zip(grid, shape, strict=True):
        below = jnp.floor(position)
        above_weight = position - below
        lower = below.astype(jnp.int32)
        upper = lower + 1
        axes.append(
            AxisCorners(
                index=(jnp.clip(lower, 0, size - 1), jnp.clip(upper, 0, size - 1)),
                weight=(1 - above_weight, above_weight),
                inside=((lower >= 0) & (lower < size), (upper >= 0) & (upper < size)),
            )
        )
    return axes


def _take(flat: Array, axes: list[AxisCorners], corner: tuple, shape: tuple[int, ...]) -> Array:
    index = axes[0].index[corner[0]]
    for axis, side, size in zip(axes[1:], corner[1:], shape[1:], strict=True):
        index = index * size + axis.index[side]
    return flat.at[index].get(mode="promise_in_bounds")


def _score(candidate: Array | int, labels: list[Array], weights: list[Array]) -> Array:
    total = jnp.zeros_like(weights[0])
    for label, weight in zip(labels, weights, strict=True):
        total = total + jnp.where(label == candidate, _SCORE_SCALE * weight, 0.0)
    return total


def _product(factors) -> Array:
    first, *others = factors
    for factor in others:
        first = first * factor
    return first


def _all(conditions) -> Array:
    first, *others = conditions
    for condition in others:
        first = first & condition
    return first


def _largest(scores: list[Array]) -> Array:
    best = scores[0]
    for score in scores[1:]:
        best = jnp.maximum(best, score)
    return best
