"""The nonzero region of an image, and the crop to it (spec 02 §4.2)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

OUTSIDE = -1
"""Label of background voxels outside the nonzero mask."""

Box = tuple[tuple[int, int], ...]


def nonzero_mask(
    image: Float[np.ndarray, "channel z y x"],
) -> tuple[Box, Bool[np.ndarray, "crop_z crop_y crop_x"]]:
    """Find the bounding box of all voxels that are nonzero in any channel, and the mask within it.

    Holes that no path of faces connects to the border belong to the mask (spec 02 §4.2). An image
    of zeros keeps its full extent.
    """
    from scipy import ndimage

    mask = np.zeros(image.shape[1:], bool)
    for channel in image:
        np.logical_or(mask, channel != 0, out=mask)
    if not mask.any():
        return tuple((0, n) for n in mask.shape), mask
    box = []
    for axis in range(mask.ndim):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        box.append((int(occupied[0]), int(occupied[-1]) + 1))
    mask = mask[box_slices(box)]
    if not mask.all():
        # the frame stands for the outside; a hole is empty and not connected to it
        framed = np.pad(~mask, 1, constant_values=True)
        empty = np.asarray(ndimage.label(framed)[0])  # type: ignore[index]
        mask = (empty != empty[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return tuple(box), mask


def crop_to_nonzero(
    image: Float[np.ndarray, "channel z y x"], label: Integer[np.ndarray, "z y x"] | None = None
) -> tuple[Float[np.ndarray, "channel crop_z crop_y crop_x"], Integer[np.ndarray, "..."], Box]:
    """Crop to the nonzero region; background outside its mask becomes -1 in the label (02 §4.2).

    Without a label the result's is int8: 0 in the mask, -1 outside. Arrays are copies.
    """
    box, mask = nonzero_mask(image)
    window = box_slices(box)
    if label is None:
        cropped = np.zeros(mask.shape, np.int8)
    else:
        cropped = label[window].astype(np.promote_types(label.dtype, np.int8))
    cropped[(cropped == 0) & ~mask] = OUTSIDE
    return np.array(image[(slice(None), *window)], order="C"), cropped, box


def box_slices(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """A box of half-open ``(low, high)`` pairs as slices."""
    return tuple(slice(low, high) for low, high in box)
