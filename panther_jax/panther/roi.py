"""Regions of interest and grids: a mask's box in another image, crops, resampling (spec 05 §13).

Grids of different spacing share the centre of their first voxel (§13.4), not its corner.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, Num

from panther_jax.plans.geometry import Geometry

Box = tuple[tuple[int, int], ...]
"""Start and stop of each axis z, y, x; half-open."""


def resample(
    image: Num[np.ndarray, "z y x"],
    geometry: Geometry,
    spacing_zyx: tuple[float, ...],
    *,
    is_label: bool = False,
    outside: float = 0.0,
) -> tuple[Num[np.ndarray, "new_z new_y new_x"], Geometry]:
    """Resample to a spacing: cubic B-spline, nearest neighbour for label maps; float32 or as it is.

    Sizes are rounded half to even; ``outside`` fills voxels that rounding put beyond the image.
    """
    shape = tuple(
        round(n * old / new)
        for n, old, new in zip(image.shape, geometry.spacing_zyx, spacing_zyx, strict=True)
    )
    wanted = Geometry(
        tuple(max(n, 1) for n in shape), spacing_zyx, geometry.origin_xyz, geometry.direction
    )
    return _onto(image, geometry, wanted, is_label=is_label, outside=outside), wanted


def resample_mask_onto(
    mask: Bool[np.ndarray, "z y x"], geometry: Geometry, wanted: Geometry
) -> Bool[np.ndarray, "new_z new_y new_x"]:
    """A mask on another grid, by physical position, nearest neighbour; nothing outside."""
    return _onto(mask.astype(np.uint8), geometry, wanted, is_label=True, outside=0.0) > 0


def _onto(
    image: np.ndarray, geometry: Geometry, wanted: Geometry, *, is_label: bool, outside: float
) -> np.ndarray:
    import SimpleITK as sitk

    source = sitk.GetImageFromArray(image if is_label else image.astype(np.float32, copy=False))
    source.SetSpacing(geometry.spacing_zyx[::-1])
    source.SetOrigin(geometry.origin_xyz)
    source.SetDirection(geometry.direction)
    found = sitk.Resample(
        source,
        wanted.shape_zyx[::-1],
        sitk.Transform(),
        sitk.sitkNearestNeighbor if is_label else sitk.sitkBSpline,
        wanted.origin_xyz,
        wanted.spacing_zyx[::-1],
        wanted.direction,
        outside,
        source.GetPixelID(),
    )
    return sitk.GetArrayFromImage(found)


def region_of_interest(
    mask: Bool[np.ndarray, "z y x"],
    mask_geometry: Geometry,
    geometry: Geometry,
    *,
    margins_mm_zyx: Sequence[float | int],
) -> Box | None:
    """The box in the image of ``geometry`` around a mask on another grid; None if it is empty.

    The mask's first and last voxels, as points, to the nearest index; margins rounded down to
    voxels. The high side is one voxel shorter than the low one, as the organisers' is (§13.3).
    """
    if not mask.any():
        return None
    found = [np.flatnonzero(mask.any(axis=tuple(o for o in range(3) if o != a))) for a in range(3)]
    corners = [tuple(int(f[end]) for f in found) for end in (0, -1)]
    points = [_index_of(_point_of(corner, mask_geometry), geometry) for corner in corners]
    box = []
    for axis, size in enumerate(geometry.shape_zyx):
        margin = math.floor(margins_mm_zyx[axis] / geometry.spacing_zyx[axis])
        low, high = sorted(point[axis] for point in points)
        start = min(max(0, low - margin), size - 1)
        box.append((start, max(min(size, high + margin), start + 1)))
    return tuple(box)


def _point_of(index_zyx: Sequence[int], geometry: Geometry) -> np.ndarray:
    direction = np.reshape(geometry.direction, (3, 3))
    steps = np.array(index_zyx[::-1]) * geometry.spacing_zyx[::-1]
    return np.array(geometry.origin_xyz) + direction @ steps


def _index_of(point_xyz: np.ndarray, geometry: Geometry) -> tuple[int, ...]:
    direction = np.reshape(geometry.direction, (3, 3))
    steps = np.linalg.solve(direction, point_xyz - np.array(geometry.origin_xyz))
    # ITK rounds half up; the tolerance keeps a whole number what the two products made of it.
    index = np.floor(steps / geometry.spacing_zyx[::-1] + 0.5 + 1e-9)
    return tuple(int(i) for i in index[::-1])


def crop(
    image: Num[np.ndarray, "channel z y x"], geometry: Geometry, box: Box
) -> tuple[Num[np.ndarray, "channel new_z new_y new_x"], Geometry]:
    """Cut a box out of an image; its origin moves along."""
    origin: Any = _point_of([start for start, _ in box], geometry)
    cut = image[(slice(None), *(slice(*side) for side in box))]
    moved = Geometry(
        cut.shape[1:], geometry.spacing_zyx, tuple(map(float, origin)), geometry.direction
    )
    return cut, moved


def paste(
    label: Integer[np.ndarray, "z y x"], box: Box, shape_zyx: tuple[int, ...]
) -> Integer[np.ndarray, "new_z new_y new_x"]:
    """Put a label map back where it was cut out; background elsewhere."""
    whole = np.zeros(shape_zyx, label.dtype)
    whole[tuple(slice(*side) for side in box)] = label
    return whole
