"""Augmentation policies at work: patch geometry, and the functions of a sample and of a batch.

`patch_geometry` tells the loader which patches to cut, `make_augment` and `make_batch_augment`
give the pure functions that run on the device; all take a policy's name, which `recipes` knows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from panther_jax.augment import spatial
from panther_jax.augment.recipes import Policy, find_policy
from panther_jax.augment.transform import Draw, PatchGeometry, Transform

AugmentFn = Callable[..., tuple[Array, Array]]

_WARP_STREAM, _MIRROR_STREAM, _ROT90_STREAM, _TRANSPOSE_STREAM, _FIRST_TRANSFORM_STREAM = range(5)
# Below the place of any sample in a batch and the stream of any transform, modulo 2^32.
_BATCH_STREAM = np.uint32(0xFFFFFFFF)
_DUMMY_2D_RATIO = 3.0
_ANISOTROPIC_2D_RATIO = 1.5


class SampleDraws(NamedTuple):
    """All parameters of one sample."""

    warp: spatial.SpatialDraw | None
    transforms: tuple[Draw, ...]
    flips: Bool[Array, "axis"]
    orientation: spatial.Orientation | None
    """Quarter turn, then transposition; None where the policy or the patch has none."""


def patch_geometry(policy: str, patch_size: tuple[int, ...]) -> PatchGeometry:
    """Derive rotation range, dummy 2-D, mirror axes and initial patch size (spec 04 §2).

    Raises:
        ValueError: for an unknown policy or a patch that is not 2-D or 3-D.
    """
    spec = find_policy(policy)
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
    initial = patch_size
    if spec.warp is not None:
        initial = _initial_patch_size(patch_size, angle, spec.warp.min_scale)
        if dummy_2d:
            initial = (patch_size[0], *initial[1:])
    return PatchGeometry(
        patch_size=patch_size,
        initial_patch_size=initial,
        rotation_range_rad=(-angle, angle),
        dummy_2d=dummy_2d,
        mirror_axes=spec.mirror.axes(num_axes),
    )


def sample_draws(
    key: PRNGKeyArray,
    num_channels: int,
    spec: Policy,
    geometry: PatchGeometry,
    *,
    batch_key: PRNGKeyArray | None = None,
) -> SampleDraws:
    """Draw every parameter of one sample; each transform has its own stream of the key.

    `batch_key`, the same for all samples of a batch, decides what is chosen once a batch; without
    it the sample is a batch of its own.
    """
    streams = _streams(spec.transforms)
    if batch_key is None:
        batch_key = jax.random.fold_in(key, _BATCH_STREAM)
    # All at once: each separate hash of a key would be compiled on its own.
    keys = jax.vmap(partial(jax.random.fold_in, key))(
        jnp.arange(_FIRST_TRANSFORM_STREAM + len(spec.transforms))
    )
    orientation = None
    if spec.reorientation is not None:
        of_parts = keys[_ROT90_STREAM], keys[_TRANSPOSE_STREAM]
        orientation = spec.reorientation.sample(*of_parts, geometry)
    return SampleDraws(
        warp=None if spec.warp is None else spec.warp.sample(keys[_WARP_STREAM], geometry),
        transforms=tuple(
            _chosen(transform, transform.sample(keys[stream], num_channels, geometry), batch_key)
            for transform, stream in zip(spec.transforms, streams, strict=True)
        ),
        flips=spec.mirror.sample(keys[_MIRROR_STREAM], geometry),
        orientation=orientation,
    )


def apply_draws(
    image: Float[Array, "*input channel"],
    label: Int[Array, "*input 1"],
    draws: SampleDraws,
    *,
    spec: Policy,
    geometry: PatchGeometry,
    label_ids: tuple[int, ...] | None = None,
    pad_label: int = -1,
) -> tuple[Float[Array, "*patch channel"], Int[Array, "*patch 1"]]:
    """Apply the random part of the pipeline to one sample, with parameters from `sample_draws`.

    The label still holds -1 afterwards. `label_ids` are the labels of the data set; -1 need not
    be among them.
    """
    volumes = tuple(image[..., channel] for channel in range(image.shape[-1]))
    label = label[..., 0]
    if spec.warp is None or draws.warp is None:
        cut = partial(spatial.centre_crop, patch_size=geometry.patch_size)
        volumes, label = tuple(map(cut, volumes)), cut(label, fill=pad_label)
    else:
        volumes, label = spec.warp.apply(
            volumes, label, draws.warp, geometry, label_ids=label_ids, pad_label=pad_label
        )
    volumes = list(volumes)
    if spec.reorientation is not None and draws.orientation is not None:
        reorient = partial(spec.reorientation.apply, value=draws.orientation)
        volumes, label = [reorient(volume) for volume in volumes], reorient(label)
    for transform, draw in zip(spec.transforms, draws.transforms, strict=True):
        change = partial(_changed, transform)
        for channel, volume in enumerate(volumes):
            value = jax.tree.map(lambda leaf, channel=channel: leaf[channel], draw.value)
            volumes[channel] = lax.cond(draw.gate[channel], change, _untouched, volume, value)
    # DA5 flips before its local transforms; their laws are symmetric, so the order is free.
    if geometry.mirror_axes:
        volumes = [spec.mirror.apply(volume, draws.flips) for volume in volumes]
        label = spec.mirror.apply(label, draws.flips)
    return jnp.stack(volumes, axis=-1), label[..., None]


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
    geometry, spec = patch_geometry(policy, patch_size), find_policy(policy)
    finish = partial(_finish, mask_channels=mask_channels)

    def augment(key, image, label, batch_key=None):
        draws = sample_draws(key, image.shape[-1], spec, geometry, batch_key=batch_key)
        apply = partial(apply_draws, spec=spec, geometry=geometry)
        return finish(*apply(image, label, draws, label_ids=label_ids, pad_label=seg_pad_label))

    return augment


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


def _untouched(volume: Array, value: Any) -> Array:
    return volume


def _changed(transform: Transform, volume: Array, value: Any) -> Array:
    changed = transform.apply(volume, value)
    if (changed.shape, changed.dtype) != (volume.shape, volume.dtype):
        raise ValueError(
            f"{type(transform).__name__}.apply returned {changed.dtype}{changed.shape} for a "
            f"channel of {volume.dtype}{volume.shape}; a transform keeps shape and type"
        )
    return changed


def _chosen(transform: Transform, draw: Draw, batch_key: PRNGKeyArray) -> Draw:
    if transform.batch_choice is None:
        return draw
    number, side = transform.batch_choice
    second = jax.random.bernoulli(jax.random.fold_in(batch_key, number))
    return draw._replace(gate=draw.gate & (second == bool(side)))


def _streams(transforms: tuple[Transform, ...]) -> list[int]:
    streams: list[int] = []
    stream = _FIRST_TRANSFORM_STREAM - 1
    for transform in transforms:
        stream += not transform.is_alternative
        streams.append(stream)
    return streams


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
