"""Voxels of each class, sampled for training's forced foreground (spec 02 §4.7)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from panther_jax.plans.labels import Labels, LabelValue
from panther_jax.preprocessing.cropping import OUTSIDE

LOCATIONS_SEED = 1234
MAX_LOCATIONS = 10_000
MIN_COVERAGE = 0.01
SEARCHED_AT_ONCE = 1 << 18


def location_requests(labels: Labels) -> tuple[LabelValue, ...]:
    """List the classes and regions whose locations are sampled, in order (spec 02 §4.7)."""
    requests: tuple[LabelValue, ...] = labels.regions or labels.foreground_ids
    if labels.ignore_id is not None:
        requests = (*requests, (OUTSIDE, *labels.ids))  # all that is annotated
    return requests


def class_locations(
    label: Integer[np.ndarray, "z y x"],
    labels: Labels,
    *,
    max_locations: int = MAX_LOCATIONS,
    min_coverage: float = MIN_COVERAGE,
) -> tuple[tuple[LabelValue, Integer[np.ndarray, "_ 3"]], ...]:
    """Sample voxel coordinates z, y, x of each class or region, int32; empty where it is absent."""
    return sample_locations(
        label, location_requests(labels), max_locations=max_locations, min_coverage=min_coverage
    )


def sample_locations(
    label: Integer[np.ndarray, "z y x"],
    requests: Sequence[LabelValue],
    *,
    max_locations: int = MAX_LOCATIONS,
    min_coverage: float = MIN_COVERAGE,
) -> tuple[tuple[LabelValue, Integer[np.ndarray, "_ 3"]], ...]:
    """Sample the locations of ``requests`` with the reference's seed and order (spec 02 §4.7)."""
    random = np.random.RandomState(LOCATIONS_SEED)
    flat = label.reshape(-1)
    found = []
    for request in requests:
        values = request if isinstance(request, tuple) else (request,)
        # grouped by label in the order of the request, not in the order of voxels
        pool = np.concatenate([_where(flat, value) for value in values])
        if pool.size:
            least = int(np.ceil(pool.size * min_coverage))
            count = max(min(max_locations, pool.size), least)
            pool = pool[random.choice(pool.size, count, replace=False)]
        coordinates = np.stack(np.unravel_index(pool, label.shape), axis=1)
        found.append((request, coordinates.astype(np.int32)))
    return tuple(found)


def _where(flat: np.ndarray, value: int) -> np.ndarray:
    """Indices of a value, searched for in parts that fit the cache."""
    starts = range(0, flat.size, SEARCHED_AT_ONCE)
    parts = [np.flatnonzero(flat[start : start + SEARCHED_AT_ONCE] == value) for start in starts]
    for start, part in zip(starts, parts, strict=True):
        part += start
    return np.concatenate(parts)
