"""Cases in device memory, and patches cut out of them inside the compiled step (spec 07 §7.6).

A case is written out as lines of 1024 voxels, x fastest, and starts a line; those of all cases
follow each other in one array. The host sends where a patch lies, 28 bytes; what is cut equals
:class:`batches.BatchSource` bit by bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from panther_jax.training.sampling import IMAGE_PADDING, LABEL_PADDING, Outline, PatchCase

LINE_BITS = 10
LINE = 1 << LINE_BITS
MAX_CASE_VOXELS = 2**31 - 1
"""Voxels are numbered within their case, and lines over all cases, in int32."""

Case = TypeVar("Case", bound=PatchCase)

# ------------------------------------------------------------------------------------- batches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Patches on the device: ``image`` (B, *patch, C) float32, ``label`` (B, *patch, 1).

    Several batches have a leading axis of steps.
    """

    image: Any
    label: Any

    def cut(self) -> "Batch":
        """The patches: they are there."""
        return self

    @property
    def drawn(self) -> Any:
        """What differs from step to step."""
        return self

    def of(self, drawn: Any) -> "Batch":
        """The batch of one step, with its part of :attr:`drawn`."""
        return drawn


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidentCases:
    """All cases on the device: ``image`` (C, lines, 1024) float32, ``label`` (lines, 1024)."""

    image: Any
    label: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UncutBatch:
    """Patches yet to be cut: ``boxes`` (B, 7) as of :class:`batches.BoxSource`.

    Several batches have a leading axis of steps.
    """

    cases: ResidentCases
    boxes: Any
    patch: tuple[int, ...] = field(metadata={"static": True})
    mesh: jax.sharding.Mesh = field(metadata={"static": True})

    def cut(self) -> Batch:
        """Cut each device's samples on it."""

        def local(cases: ResidentCases, boxes: Array) -> tuple[Array, Array]:
            return jax.vmap(lambda box: cut_patch(cases, box, self.patch))(boxes)

        in_batch = jax.P("data")
        patches = jax.shard_map(
            local, mesh=self.mesh, in_specs=(jax.P(), in_batch), out_specs=(in_batch, in_batch)
        )(self.cases, self.boxes)
        # The patches are made once, not again by each of their readers.
        return Batch(*jax.lax.optimization_barrier(patches))

    @property
    def drawn(self) -> Any:
        """What differs from step to step: the cases do not."""
        return self.boxes

    def of(self, drawn: Any) -> "UncutBatch":
        """The batch of one step, with its part of :attr:`drawn`."""
        return replace(self, boxes=drawn)


AnyBatch = Batch | UncutBatch

# ------------------------------------------------------------------------------------- cutting


def cut_patch(
    cases: ResidentCases, box: Int[Array, "7"], patch: tuple[int, ...]
) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """Cut one patch: image (*patch, C) float32 and label (*patch, 1) int16.

    Outside the case the image is 0 and the label -1, or 0 if the box misses the case altogether.
    """
    first_line, shape, start = box[0], box[1:4], box[4:7]
    size = (1, *patch) if len(patch) == 2 else patch
    coordinates, inside, missed = [], jnp.array(True), jnp.array(False)
    for axis, extent in enumerate(size):
        along = [1, 1, 1]
        along[axis] = extent
        voxels = (start[axis] + jnp.arange(extent, dtype=jnp.int32)).reshape(along)
        inside &= (voxels >= 0) & (voxels < shape[axis])
        missed |= (start[axis] + extent <= 0) | (start[axis] >= shape[axis])
        coordinates.append(jnp.clip(voxels, 0, shape[axis] - 1))
    z, y, x = coordinates
    voxel = (z * shape[1] + y) * shape[2] + x
    line, column = first_line + (voxel >> LINE_BITS), voxel & (LINE - 1)
    image = _read(cases.image, (slice(None), line, column))
    label = _read(cases.label, (line, column)).astype(jnp.int16)
    image = jnp.where(inside, image, jnp.float32(IMAGE_PADDING))
    # spec 03 §4.3: the reference leaves a box that misses the case at zero
    label = jnp.where(inside, label, jnp.where(missed, 0, LABEL_PADDING).astype(jnp.int16))
    image, label = jnp.moveaxis(image, 0, -1), label[..., None]
    return (image[0], label[0]) if len(patch) == 2 else (image, label)


def _read(lines: Array, index: Any) -> Array:
    return lines.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


# ------------------------------------------------------------------------------------- filling


def resident_bytes(cases: Sequence[PatchCase]) -> int:
    """Bytes of device memory that cases take."""
    voxel = 4 * cases[0].image.shape[0] + _label_type(cases).itemsize
    return LINE * voxel * sum(_num_lines(case) for case in cases)


def write_lines(
    cases: dict[str, Case],
) -> tuple[ResidentCases, Mapping[str, Outline]]:
    """Write cases out as lines in host memory; empties ``cases`` as it goes, to need it once."""
    count = sum(_num_lines(case) for case in cases.values())
    num_channels = next(iter(cases.values())).image.shape[0]
    image = np.zeros((num_channels, count * LINE), np.float32)
    label = np.zeros(count * LINE, _label_type(tuple(cases.values())))
    outlines, first = {}, 0
    for name in tuple(cases):
        case = cases.pop(name)
        begin, end = first * LINE, first * LINE + case.label.size
        image[:, begin:end] = np.asarray(case.image).reshape(num_channels, -1)
        label[begin:end] = np.asarray(case.label).reshape(-1)
        outlines[name] = Outline(first, case.label.shape, case.locations)
        first += _num_lines(case)
    lines = ResidentCases(image.reshape(num_channels, -1, LINE), label.reshape(-1, LINE))
    return lines, outlines


def _num_lines(case: PatchCase) -> int:
    return -(-case.label.size // LINE)


def _label_type(cases: Sequence[PatchCase]) -> np.dtype:
    return np.dtype(np.int8 if all(c.label.dtype == np.int8 for c in cases) else np.int16)
