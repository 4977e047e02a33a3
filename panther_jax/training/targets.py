"""Labels into training targets: outside voxels, regions, lower resolutions (spec 04 §6.15)."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from panther_jax.plans.labels import Labels

OUTSIDE = -1


def remove_outside(label: Int[Array, "*grid"]) -> Int[Array, "*grid"]:
    """Turn the -1 that marks voxels outside the image into background."""
    return jnp.where(label == OUTSIDE, 0, label)


def to_regions(label: Int[Array, "*grid 1"], labels: Labels) -> Bool[Array, "*grid region"]:
    """Turn labels into one boolean channel a region, in order, the ignore map last if there is one.

    Raises:
        ValueError: if the labels declare no regions.
    """
    if not labels.has_regions:
        raise ValueError("to_regions: the data set declares no regions; use the labels as they are")
    regions = [r if isinstance(r, tuple) else (r,) for r in labels.regions]
    if labels.ignore_id is not None:
        regions.append((labels.ignore_id,))
    # Row k holds the k-th id of every region (its first again where it has fewer), so that all
    # channels come from comparisons that broadcast over the last axis.
    longest = max(map(len, regions))
    rows = ([r[min(k, len(r) - 1)] for r in regions] for k in range(longest))
    return functools.reduce(operator.or_, (label == jnp.asarray(row, jnp.int32) for row in rows))


def deep_supervision_targets(
    label: Shaped[Array, "batch *spatial channel"], output_strides: Sequence[tuple[int, ...]]
) -> tuple[Shaped[Array, "batch *_ channel"], ...]:
    """Down-sample labels (or regions) to each output's resolution, nearest-exact, dtype kept.

    ``output_strides`` are the factors of ``ArchSpec.output_strides``; a factor of all ones hands
    the label through. Sizes are ``round(size / factor)``, half to even.
    """
    return tuple(_downsample(label, factors) for factors in output_strides)


def _downsample(label: Array, factors: tuple[int, ...]) -> Array:
    assert len(factors) == label.ndim - 2, (factors, label.shape)
    for axis, factor in enumerate(factors, start=1):
        if factor != 1:
            label = _take(label, nearest_exact_index(label.shape[axis], factor), axis)
    return label


def nearest_exact_index(size: int, factor: int) -> Int[np.ndarray, "_"]:
    """Positions that nearest-exact down-sampling by ``factor`` keeps of an axis.

    In float32 like the reference: other arithmetic picks other voxels at some sizes (04 §6.9).
    """
    new_size = round(size * (1.0 / factor))
    assert new_size >= 1, f"an axis of {size} voxels vanishes at factor {factor}"
    ratio = np.float32(size) / np.float32(new_size)
    centres = np.arange(new_size, dtype=np.float32) + np.float32(0.5)
    return np.minimum(np.floor(centres * ratio).astype(np.int64), size - 1)


def _take(values: Array, index: np.ndarray, axis: int) -> Array:
    steps = np.unique(np.diff(index))
    if steps.size > 1:
        return jnp.take(values, index, axis=axis, mode="clip")
    # Evenly spaced (always so if the factor divides the size): a strided slice, cheaper than gather
    step = int(steps[0]) if steps.size else 1
    return jax.lax.slice_in_dim(values, int(index[0]), int(index[-1]) + 1, step, axis)
