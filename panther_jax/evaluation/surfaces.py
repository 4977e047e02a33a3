"""Surfaces of masks, and distances between them (spec 06 §2). NumPy and SciPy only.

Surfaces are made of elements at the corners of voxels (*nodes*), with areas from a table over the
eight voxels around a node.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from scipy import spatial

_TERM_UNIT = 1 / 8  # of the table's numbers, spec 06 §2.2
_CONTOUR_STEPS = ((0, 0), (0.5, 0.5), (0, 1), (1, 0), (1, 1))  # in units of the two spacings
_CONTOUR_KIND = (0, 1, 1, 2, 1, 3, 4, 1, 1, 4, 3, 1, 2, 1, 1, 0)  # index above, by code

# ----------------------------------------------------------------------------- surface elements


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distances between two surfaces in mm, with the area of the element that each belongs to.

    Both directions are sorted by distance, then area. Where the other mask is empty, distances are
    infinite; an empty mask has no elements.
    """

    reference_to_prediction: np.ndarray
    prediction_to_reference: np.ndarray
    reference_areas: np.ndarray
    prediction_areas: np.ndarray


def surface_element_areas(spacing: tuple[float, ...]) -> Float[np.ndarray, " codes"]:
    """Area (length in 2-D) of a surface element by neighbour code, spacing in array axis order.

    256 codes for three axes, 16 for two (spec 06 §2.2, §2.3).

    Raises:
        ValueError: if there are not two or three spacings.
    """
    return np.array(_area_table(tuple(float(s) for s in spacing)))


@lru_cache(maxsize=64)
def _area_table(spacing: tuple[float, ...]) -> tuple[float, ...]:
    if len(spacing) == 2:
        lengths = [math.hypot(a * spacing[0], b * spacing[1]) for a, b in _CONTOUR_STEPS]
        return tuple(lengths[kind] for kind in _CONTOUR_KIND)
    if len(spacing) != 3:
        raise ValueError(f"spacing {spacing} must have two or three axes")
    s0, s1, s2 = spacing
    faces = (s1 * s2, s0 * s2, s0 * s1)
    return tuple(_area(terms, faces) for terms in _surface_terms())


def _area(terms: Sequence[Sequence[int]], faces: tuple[float, float, float]) -> float:
    lengths = (
        count * math.sqrt(sum((n * face) ** 2 for n, face in zip(normal, faces, strict=True)))
        for *normal, count in terms
    )
    return sum(lengths, 0.0) * _TERM_UNIT


@cache
def _surface_terms() -> tuple[tuple[tuple[int, ...], ...], ...]:
    text = (resources.files("panther_jax.evaluation") / "surfel_terms.json").read_text(
        encoding="utf-8"
    )
    return tuple(tuple(tuple(t) for t in terms) for terms in json.loads(text)["terms"])


@dataclass(frozen=True, eq=False)
class Surface:
    """The surface elements of a mask: their nodes on the grid of corners, and their areas."""

    nodes: Integer[np.ndarray, "node axis"]
    areas: Float[np.ndarray, " node"]
    spacing: tuple[float, ...]

    @cached_property
    def tree(self) -> Any:
        """A search tree of the nodes in mm."""
        # unbalanced trees are built faster and are no slower on grid points
        places = self.nodes * np.array(self.spacing)
        return spatial.KDTree(places, balanced_tree=False, compact_nodes=False)


def find_surface(mask: Bool[np.ndarray, "..."], spacing: tuple[float, ...]) -> Surface:
    """Surface elements of a mask (spec 06 §2.1), spacing in array axis order.

    Raises:
        ValueError: if the number of spacings is not that of the axes.
    """
    if len(spacing) != mask.ndim:
        raise ValueError(f"{len(spacing)} spacings {spacing} for {mask.ndim} axes")
    areas = surface_element_areas(spacing)
    box = bounding_box(mask)
    codes = _neighbour_codes(mask[box])
    places = np.flatnonzero((codes != 0) & (codes != len(areas) - 1))
    nodes = np.stack(np.unravel_index(places, codes.shape), axis=1)
    corner = np.array([b.start for b in box])
    return Surface(nodes + corner, areas[codes.ravel()[places]], spacing)


def surface_distances(
    reference_mask: Bool[np.ndarray, "..."],
    prediction_mask: Bool[np.ndarray, "..."],
    spacing: tuple[float, ...],
) -> SurfaceDistances:
    """Distances between the surfaces of two masks (spec 06 §2.4), spacing in array axis order.

    Raises:
        ValueError: if shapes or the number of spacings do not agree.
    """
    check_shapes(reference_mask, prediction_mask)
    return distances_between(
        find_surface(reference_mask, spacing), find_surface(prediction_mask, spacing)
    )


def distances_between(reference: Surface, prediction: Surface) -> SurfaceDistances:
    """As :func:`surface_distances`, of surfaces that were found before."""
    to_prediction = _directed(reference, prediction)
    to_reference = _directed(prediction, reference)
    return SurfaceDistances(to_prediction[0], to_reference[0], to_prediction[1], to_reference[1])


def check_shapes(reference: np.ndarray, prediction: np.ndarray) -> None:
    """Raise ValueError unless two masks or label maps have one shape."""
    if reference.shape != prediction.shape:
        raise ValueError(
            f"prediction has shape {prediction.shape}, its reference {reference.shape}; "
            "predictions must be on the grid of the raw image"
        )


def bounding_box(*arrays: Shaped[np.ndarray, "..."]) -> tuple[slice, ...]:
    """The smallest box around all voxels that are not 0 in arrays of one shape.

    Of no size where there are none.
    """
    num_axes, box = arrays[0].ndim, []
    while len(box) < num_axes:
        rest = tuple(range(1, num_axes - len(box)))
        found = [np.flatnonzero(array.any(axis=rest)) for array in arrays]
        ends = [int(i) for rows in found if len(rows) for i in (rows[0], rows[-1])]
        if not ends:
            return (slice(0, 0),) * num_axes
        box.append(slice(min(ends), max(ends) + 1))
        # their shadow along the axis
        arrays = tuple(np.asarray(array[box[-1]].any(axis=0)) for array in arrays)
    return tuple(box)


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """One bit for each voxel around a node, the first corner in the highest bit."""
    codes = np.pad(mask, 1).astype(np.uint8)
    for bits, axis in enumerate(reversed(range(mask.ndim))):  # pairs, then pairs of pairs, ...
        before = tuple(slice(None, -1) if a == axis else slice(None) for a in range(mask.ndim))
        after = tuple(slice(1, None) if a == axis else slice(None) for a in range(mask.ndim))
        codes = (codes[before] << (1 << bits)) | codes[after]
    return codes


def _directed(surface: Surface, other: Surface) -> tuple[np.ndarray, np.ndarray]:
    """Distances of a surface's nodes to the nearest node of the other, sorted, with areas."""
    if len(surface.nodes) and len(other.nodes):
        _, nearest = other.tree.query(surface.nodes * np.array(surface.spacing))
        # From whole steps, not from the tree's places: a distance of just 5 mm must be just that.
        steps = (surface.nodes - other.nodes[nearest]) * np.array(surface.spacing)
        distances = np.sqrt(np.add.reduce((steps * steps).T, axis=0))
    else:
        distances = np.full(surface.areas.shape, np.inf)
    order = np.lexsort((surface.areas, distances))
    return distances[order], surface.areas[order]
