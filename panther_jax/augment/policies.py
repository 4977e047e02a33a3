"""Augmentation policies at work: patch geometry, and the functions of a sample and of a batch.

`patch_geometry` tells the loader which patches to cut, `make_augment` and `make_batch_augment`
give the pure functions that run on the device. The numbers of a policy are in `recipes`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from panther_jax.augment import fork, intensity, local, spatial
from panther_jax.augment.recipes import PolicySpec, Step, policy_spec

AugmentFn = Callable[..., tuple[Array, Array]]

_SPATIAL_STREAM, _MIRROR_STREAM, _ROT90_STREAM, _TRANSPOSE_STREAM, _FIRST_STEP_STREAM = range(5)
# Below the place of any sample in a batch and the stream of any transform, modulo 2^32.
_BATCH_STREAM = np.uint32(0xFFFFFFFF)
_DUMMY_2D_RATIO = 3.0
_ANISOTROPIC_2D_RATIO = 1.5


@dataclass(frozen=True)
class PatchGeometry:
    """What the patch size and the policy decide before any pixel is read (spec 04 §2)."""

    patch_size: tuple[int, ...]
    initial_patch_size: tuple[int, ...]
    """Size to cut from the case, large enough for rotation and most scaling."""
    rotation_range_rad: tuple[float, float]
    dummy_2d: bool
    """Whether spatial transforms act on the slices of axis 0."""
    mirror_axes: tuple[int, ...]
    """Axes that are flipped in training and may be mirrored at inference."""


class SampleDraws(NamedTuple):
    """All parameters of one sample."""

    warp: spatial.SpatialDraw
    steps: tuple[intensity.Draw, ...]
    flips: Bool[Array, "axis"]
    orientation: spatial.Orientation | None
    """Quarter turn, then transposition; None where the policy or the patch has none."""


def patch_geometry(policy: str, patch_size: tuple[int, ...]) -> PatchGeometry:
    """Derive rotation range, dummy 2-D, mirror axes and initial patch size (spec 04 §2).

    Raises:
        ValueError: for an unknown policy or a patch that is not 2-D or 3-D.
    """
    spec = policy_spec(policy)
    patch_size = tuple(int(size) for size in patch_size)
    num_axes = len(patch_size)
    if num_axes not in (2, 3) or min(patch_size) < 1:
        raise ValueError(f"patch size {patch_size}: expected two or three positive sizes")
    dummy_2d = False
    if num_axes == 2:
        anisotropic = max(patch_size) / min(patch_size) > _ANISOTROPIC_2D_RATIO
        angle = math.pi / 12 if anisotropic else math.pi
    else:
        dummy_2d = spec.allow_dummy_2d and max(patch_size) / patch_size[0] > _DUMMY_2D_RATIO
        angle = math.pi if dummy_2d else math.pi / 6
    num_mirror = min(spec.max_mirror_axes, num_axes)
    if spec.max_mirror_axes == 2 and num_axes == 2:
        num_mirror = 1  # spec 04 §2: onlyMirror01 flips axis 0 alone in 2-D
    initial = patch_size
    if spec.augment:
        initial = _initial_patch_size(patch_size, angle, spec.min_scale)
        if dummy_2d:
            initial = (patch_size[0], *initial[1:])
    return PatchGeometry(
        patch_size=patch_size,
        initial_patch_size=initial,
        rotation_range_rad=(-angle, angle),
        dummy_2d=dummy_2d,
        mirror_axes=tuple(range(num_mirror)),
    )


def sample_draws(
    key: PRNGKeyArray,
    num_channels: int,
    spec: PolicySpec,
    geometry: PatchGeometry,
    *,
    batch_key: PRNGKeyArray | None = None,
) -> SampleDraws:
    """Draw every parameter of one sample; each transform has its own stream of the key.

    `batch_key`, the same for all samples of a batch, decides what is chosen once a batch; without
    it the sample is a batch of its own.
    """
    num_axes = len(geometry.patch_size)
    streams = _streams(spec.steps)
    if batch_key is None:
        batch_key = jax.random.fold_in(key, _BATCH_STREAM)
    # All at once: each separate hash of a key would be compiled on its own.
    keys = jax.vmap(partial(jax.random.fold_in, key))(
        jnp.arange(_FIRST_STEP_STREAM + len(spec.steps))
    )
    return SampleDraws(
        warp=spatial.sample_spatial(
            keys[_SPATIAL_STREAM],
            num_axes - geometry.dummy_2d,
            rotation_range_rad=geometry.rotation_range_rad,
            scale_range=spec.scale_range,
            p_rotation=spec.p_rotation,
            p_scale=spec.p_scale,
            p_rotation_axis=spec.p_rotation_axis,
            same_scale=spec.same_scale,
            two_sided_scale=spec.fork,
        ),
        steps=tuple(
            _chosen(step, sample_step(step, keys[stream], num_channels, geometry), batch_key)
            for step, stream in zip(spec.steps, streams, strict=True)
        ),
        flips=spatial.sample_mirror(keys[_MIRROR_STREAM], num_axes, geometry.mirror_axes),
        orientation=_sample_orientation(keys, spec, geometry.patch_size),
    )


def sample_step(
    step: Step, key: PRNGKeyArray, num_channels: int, geometry: PatchGeometry
) -> intensity.Draw:
    """Draw gates and parameters of one intensity transform for all channels."""
    num_axes = len(geometry.patch_size)
    gate, p_channel = step.gate, step.p_channel
    match step.kind:
        case "noise":
            return intensity.sample_noise(
                key, num_channels, gate=gate, sigma_range=step.value_range
            )
        case "blur":
            return intensity.sample_blur(
                key,
                num_channels,
                num_axes,
                gate=gate,
                p_channel=p_channel,
                sigma_range=step.value_range,
                same_axes=step.same_axes,
            )
        case "low_resolution":
            return intensity.sample_low_resolution(
                key,
                num_channels,
                num_axes,
                gate=gate,
                p_channel=p_channel,
                scale_range=step.value_range,
                dummy_2d=geometry.dummy_2d,
            )
        case "shift":
            return intensity.sample_shift(
                key, num_channels, gate=gate, sigma=step.value_range[1], p_channel=p_channel
            )
        case "median" | "rectangles" | "gradient" | "local_gamma" | "sharpen":
            return _sample_local_step(step, key, num_channels, geometry.patch_size)
    return intensity.sample_multiplier(
        key, num_channels, gate=gate, value_range=step.value_range, p_channel=p_channel
    )


def _sample_local_step(
    step: Step, key: PRNGKeyArray, num_channels: int, patch_size: tuple[int, ...]
) -> intensity.Draw:
    chances = {"gate": step.gate, "p_channel": step.p_channel}
    match step.kind:
        case "median":
            return local.sample_median(key, num_channels, **chances)
        case "rectangles":
            return local.sample_rectangles(key, num_channels, patch_size, fork=step.fork, **chances)
        case "sharpen":
            return local.sample_sharpen(
                key, num_channels, strength_range=step.value_range, **chances
            )
    ranges = (step.value_range, step.second_range)
    return local.sample_window(key, num_channels, patch_size, amount_ranges=ranges, **chances)


def apply_step(step: Step, volume: Float[Array, "*spatial"], value) -> Float[Array, "*spatial"]:
    """Apply one intensity transform to one channel, with parameters from `sample_step`."""
    if step.fork and step.kind != "rectangles":
        return _apply_fork_step(step, volume, value)
    match step.kind:
        case "noise":
            noise = jax.random.normal(value.key, volume.shape, volume.dtype)
            return intensity.apply_noise(volume, value.sigma, noise)
        case "blur":
            radius = intensity.blur_radius(step.value_range[1])
            return intensity.apply_blur(volume, value, max_radius=radius)
        case "brightness":
            return intensity.apply_brightness(volume, value)
        case "shift":
            return intensity.apply_shift(volume, value)
        case "contrast" | "contrast_unclipped":
            return intensity.apply_contrast(volume, value, clip=step.kind == "contrast")
        case "low_resolution":
            return intensity.apply_low_resolution(volume, value)
        case "median":
            return local.apply_median(volume, value)
        case "rectangles":
            return local.apply_rectangles(volume, value)
        case "gradient":
            return local.apply_gradient(volume, value)
        case "local_gamma":
            return local.apply_local_gamma(volume, value)
        case "sharpen":
            return local.apply_sharpen(volume, value)
    return intensity.apply_gamma(volume, value, invert=step.kind == "gamma_inverted")


def _apply_fork_step(step: Step, volume: Array, value) -> Array:
    match step.kind:
        case "blur":
            radius = fork.blur_radius(step.value_range[1])
            return fork.apply_blur(volume, value, max_radius=radius)
        case "low_resolution":
            return fork.apply_low_resolution(volume, value)
        case "sharpen":
            return fork.apply_sharpen(volume, value)
    return fork.apply_gamma(volume, value, invert=step.kind == "gamma_inverted")


def apply_draws(
    image: Float[Array, "*input channel"],
    label: Int[Array, "*input 1"],
    draws: SampleDraws,
    *,
    spec: PolicySpec,
    geometry: PatchGeometry,
    label_ids: tuple[int, ...] | None = None,
    pad_label: int = -1,
) -> tuple[Float[Array, "*patch channel"], Int[Array, "*patch 1"]]:
    """Apply the random part of the pipeline to one sample, with parameters from `sample_draws`.

    The label still holds -1 afterwards. `label_ids` are the labels of the data set; -1 need not
    be among them.
    """
    volumes = tuple(image[..., channel] for channel in range(image.shape[-1]))
    volumes, label = spatial.apply_spatial(
        volumes,
        label[..., 0],
        draws.warp,
        patch_size=geometry.patch_size,
        how=resampling(spec, label_ids=label_ids, pad_label=pad_label),
        dummy_2d=geometry.dummy_2d,
        pad_label=pad_label,
    )
    volumes = list(volumes)
    if draws.orientation is not None:
        volumes = [spatial.apply_orientation(volume, draws.orientation) for volume in volumes]
        label = spatial.apply_orientation(label, draws.orientation)
    for step, draw in zip(spec.steps, draws.steps, strict=True):
        for channel, volume in enumerate(volumes):
            value = jax.tree.map(lambda leaf, channel=channel: leaf[channel], draw.value)
            volumes[channel] = lax.cond(
                draw.gate[channel], partial(apply_step, step), _untouched, volume, value
            )
    # DA5 flips before its local transforms; their laws are symmetric, so the order is free.
    if geometry.mirror_axes:
        volumes = [spatial.apply_mirror(volume, draws.flips) for volume in volumes]
        label = spatial.apply_mirror(label, draws.flips)
    return jnp.stack(volumes, axis=-1), label[..., None]


def resampling(
    spec: PolicySpec, *, label_ids: tuple[int, ...] | None = None, pad_label: int = -1
) -> spatial.Resampling:
    """Give a policy's resampling; `label_ids` and `pad_label` as in `apply_draws`.

    Raises:
        ValueError: if the policy is the fork's, which pads labels with -1, and `pad_label` is not.
    """
    kinds = (spec.image_interpolation, spec.label_interpolation)
    label_ids = None if label_ids is None else (-1, *label_ids)
    if not spec.fork:
        return spatial.resampling(*kinds, pad_label=pad_label, label_ids=label_ids)
    if pad_label != -1:
        raise ValueError(f"seg_pad_label {pad_label}: the da5_fork policies pad labels with -1")
    return fork.resampling(*kinds, label_ids=label_ids)


def make_augment(
    policy: str,
    *,
    patch_size: tuple[int, ...],
    mask_channels: tuple[int, ...] = (),
    label_ids: tuple[int, ...] | None = None,
    seg_pad_label: int = -1,
) -> AugmentFn:
    """Make the function (key, image, label, batch_key=None) -> (image, label) of one sample.

    Image (*initial patch, channel) float32 and label (*initial patch, 1) integer, with -1 outside
    the nonzero mask and outside the case, become (*patch, channel) and (*patch, 1). Channels in
    `mask_channels` are set to 0 where the label is -1 (`Plans.use_mask_for_norm`); then -1
    becomes 0. `label_ids`, all labels of the data set including an ignore label, make it faster.
    `seg_pad_label` 0 gives the border of the PANTHER fork (spec 04 §3.2). `batch_key`: see
    `sample_draws`.

    Raises:
        ValueError: for an unknown policy or a patch that is not 2-D or 3-D.
    """
    geometry, spec = patch_geometry(policy, patch_size), policy_spec(policy)
    finish = partial(_finish, mask_channels=mask_channels)

    def crop_only(key, image, label, batch_key=None):
        crop = partial(spatial.centre_crop, patch_size=geometry.patch_size)
        image = jax.vmap(crop, in_axes=-1, out_axes=-1)(image)
        return finish(image, crop(label[..., 0], fill=seg_pad_label)[..., None])

    def augment(key, image, label, batch_key=None):
        draws = sample_draws(key, image.shape[-1], spec, geometry, batch_key=batch_key)
        apply = partial(apply_draws, spec=spec, geometry=geometry)
        return finish(*apply(image, label, draws, label_ids=label_ids, pad_label=seg_pad_label))

    return augment if spec.augment else crop_only


def make_batch_augment(
    policy: str,
    *,
    patch_size: tuple[int, ...],
    mask_channels: tuple[int, ...] = (),
    label_ids: tuple[int, ...] | None = None,
    seg_pad_label: int = -1,
    mapping: Literal["map", "vmap"] = "map",
) -> Callable[..., tuple[Array, Array]]:
    """Make the function (key, images, labels, offset=0) -> (images, labels) of a batch.

    Sample i uses `fold_in(key, i + offset)`; `offset` is the position of the first sample in the
    global batch. What a policy chooses once a batch depends on `key` alone. `mapping` "map" runs
    sample after sample and skips transforms that are not drawn; "vmap" computes all of them for
    all samples. Otherwise as `make_augment`.

    Raises:
        ValueError: for an unknown policy or a patch that is not 2-D or 3-D.
    """
    augment = make_augment(
        policy,
        patch_size=patch_size,
        mask_channels=mask_channels,
        label_ids=label_ids,
        seg_pad_label=seg_pad_label,
    )

    def augment_batch(key, images, labels, offset=0):
        batch_key = jax.random.fold_in(key, _BATCH_STREAM)

        def of_sample(sample):
            position, image, label = sample
            return augment(jax.random.fold_in(key, position), image, label, batch_key)

        samples = (jnp.arange(images.shape[0]) + offset, images, labels)
        return jax.vmap(of_sample)(samples) if mapping == "vmap" else lax.map(of_sample, samples)

    return augment_batch


def _finish(image: Array, label: Array, mask_channels: tuple[int, ...]) -> tuple[Array, Array]:
    if mask_channels:
        masked = jax.vmap(spatial.apply_mask, (-1, None), -1)(image, label[..., 0])
        flagged = np.isin(np.arange(image.shape[-1]), mask_channels)
        image = jnp.where(flagged, masked, image)
    return image, jnp.where(label == -1, 0, label).astype(label.dtype)


def _untouched(volume: Array, value) -> Array:
    return volume


def _chosen(step: Step, draw: intensity.Draw, batch_key: PRNGKeyArray) -> intensity.Draw:
    if step.batch_choice is None:
        return draw
    number, side = step.batch_choice
    second = jax.random.bernoulli(jax.random.fold_in(batch_key, number))
    return draw._replace(gate=draw.gate & (second == bool(side)))


def _streams(steps: tuple[Step, ...]) -> list[int]:
    streams: list[int] = []
    stream = _FIRST_STEP_STREAM - 1
    for step in steps:
        stream += not step.is_alternative
        streams.append(stream)
    return streams


def _sample_orientation(
    keys: Array, spec: PolicySpec, patch_size: tuple[int, ...]
) -> spatial.Orientation | None:
    valid_axes = spatial.valid_rotation_axes(patch_size)
    if not valid_axes or spec.p_rot90 == spec.p_transpose == 0:
        return None
    num_axes = len(patch_size)
    turn, turns, plane = spatial.sample_rot90(keys[_ROT90_STREAM], valid_axes, p=spec.p_rot90)
    transpose, order = spatial.sample_transpose(
        keys[_TRANSPOSE_STREAM], num_axes, valid_axes, p=spec.p_transpose
    )
    turned = spatial.rot90_orientation(jnp.where(turn, turns, 0), plane, num_axes)
    order = jnp.where(transpose, order, jnp.arange(num_axes))
    return spatial.Orientation(turned.source_axes[order], turned.flips[order])


def _initial_patch_size(
    patch_size: tuple[int, ...], angle: float, min_scale: float
) -> tuple[int, ...]:
    # spec 04 §2: asymmetric in the order of the axes, kept so; truncated.
    angle = min(math.pi / 2, angle)
    cos, sin = math.cos(angle), math.sin(angle)
    if len(patch_size) == 2:
        v0, v1 = patch_size
        extents = (max(v0, v0 * cos + v1 * sin), max(v1, abs(v1 * cos - v0 * sin)))
    else:
        v0, v1, v2 = patch_size
        extents = (
            max(v0, abs(v0 * cos - v2 * sin), v0 * cos + v1 * sin),
            max(v1, v1 * cos + v2 * sin, abs(v1 * cos - v0 * sin)),
            max(v2, abs(v2 * cos - v1 * sin), v0 * sin + v2 * cos),
        )
    return tuple(int(extent / min_scale) for extent in extents)
