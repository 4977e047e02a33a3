"""Connected components: the largest of a class, the organisers' filter (spec 05 §11, §13)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from panther_jax.plans.labels import LabelValue

Step = tuple[int, ...]
"""Labels whose union is reduced to its largest component."""
LARGEST_COMPONENT = "remove_all_but_largest_component_from_segmentation"  # nnU-Net's name of it
MIN_COMPONENT_VOXELS = 10  # spec 05 §13.2
MIN_PANCREAS_SHARE = 0.15


# ---------------------------------------------------------------------------------- components


def keep_largest_component(
    label_map: Integer[np.ndarray, "..."], labels: LabelValue | Sequence[Any]
) -> Integer[np.ndarray, "..."]:
    """Set voxels of ``labels`` to 0 outside the largest component of their union (spec 05 §11.1).

    Neighbours touch at a corner or nearer. Of components of equal, largest size all stay.
    """
    result = label_map.copy()
    mask = np.isin(label_map, flat_labels(labels))
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return result
    inside = mask[box[0]]
    components = _components(inside, np.ones((3,) * mask.ndim))
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    result[box[0]][inside & (sizes[components] < sizes.max())] = 0
    return result


def flat_labels(labels: Any) -> Step:
    """One label, a region, or a list of either, as the labels in it, ascending.

    Raises:
        TypeError: if something else is in it.
    """
    if isinstance(labels, (list, tuple)):
        return tuple(sorted({value for part in labels for value in flat_labels(part)}))
    if not isinstance(labels, int):
        raise TypeError(f"label {labels!r} is not an integer")
    return (labels,)


def filter_components(
    tumor_mask: Bool[np.ndarray, "z y x"],
    pancreas_mask: Bool[np.ndarray, "_ _ _"],
    *,
    min_voxels: int = MIN_COMPONENT_VOXELS,
    min_share: float = MIN_PANCREAS_SHARE,
) -> Bool[np.ndarray, "z y x"]:
    """Keep components of enough voxels, enough of which lie in the pancreas (spec 05 §13.2).

    Neighbours share a face. Both limits are inclusive; the share is of the component.

    Raises:
        ValueError: if the masks are on different grids.
    """
    if tumor_mask.shape != pancreas_mask.shape:
        raise ValueError(
            f"tumour mask of shape {tumor_mask.shape}, pancreas mask of {pancreas_mask.shape}; "
            "resample the pancreas onto the tumour's grid"
        )
    components = _components(tumor_mask, None)
    sizes = np.bincount(components.ravel())
    inside = np.bincount(components[pancreas_mask], minlength=len(sizes))
    # a quotient, not a product: it alone is exact at the limit
    keep = (sizes >= min_voxels) & (inside / np.maximum(sizes, 1) >= min_share)
    keep[0] = False
    return keep[components]


def _components(mask: np.ndarray, structure: np.ndarray | None) -> np.ndarray:
    found: Any = ndimage.label(mask, structure)
    return found[0]
