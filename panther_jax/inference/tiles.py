"""Where the tiles of a sliding window lie and what each of their voxels weighs (spec 05 §2-§4)."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

IMPORTANCE_MAXIMUM = 10.0  # spec 05 §4.1
IMPORTANCE_SIGMA = 1 / 8  # of the tile size

Starts = tuple[tuple[int, ...], ...]


def tile_starts(size: tuple[int, ...], tile: tuple[int, ...], step: float) -> Starts:
    """Positions of the tiles along each axis (spec 05 §3).

    ``step`` is the largest distance of two tiles as a fraction of the tile. The first tile starts
    at 0, the last ends at ``size``; in between equidistant, rounded half to even.

    Raises:
        ValueError: if the step is not in (0, 1], or the tile is larger than ``size``.
    """
    if not 0 < step <= 1:
        raise ValueError(f"step size is {step}; expected a fraction of the tile in (0, 1]")
    if len(size) != len(tile) or any(n < k for n, k in zip(size, tile, strict=True)):
        raise ValueError(f"tile {tile} does not fit in {size}; pad the image to at least the tile")
    return tuple(_axis_starts(n, k, step) for n, k in zip(size, tile, strict=True))


def _axis_starts(size: int, tile: int, step: float) -> tuple[int, ...]:
    count = math.ceil((size - tile) / (tile * step)) + 1
    stride = (size - tile) / (count - 1) if count > 1 else 0.0
    return tuple(round(stride * i) for i in range(count))


def importance_map(
    tile: tuple[int, ...], *, maximum: float = IMPORTANCE_MAXIMUM, dtype: Any = np.float16
) -> Float[np.ndarray, "..."]:
    """Gaussian weight of each voxel of a tile, centred at ``tile // 2`` (spec 05 §4).

    Evaluated in float64, then cast to float32 and to ``dtype``; what the cast makes 0 becomes the
    smallest weight that is not.
    """
    exponent = np.zeros((1,) * len(tile))
    for axis, size in enumerate(tile):
        offset = (np.arange(size) - size // 2) / (size * IMPORTANCE_SIGMA)
        shape = tuple(size if a == axis else 1 for a in range(len(tile)))
        exponent = exponent + (offset**2).reshape(shape)
    # Through float32: the reference's sums over whole maps show that it rounds twice.
    weights = (maximum * np.exp(-0.5 * exponent)).astype(np.float32).astype(dtype)
    weights[weights == 0] = weights[weights > 0].min()
    return weights


def mirror_combinations(axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """All non-empty subsets of the mirror axes, by size, then lexicographically (spec 05 §5.3)."""
    ordered = sorted(axes)
    sizes = range(1, len(ordered) + 1)
    return tuple(c for n in sizes for c in itertools.combinations(ordered, n))


def weight_sum(
    size: tuple[int, ...], starts: Starts, weights: Float[np.ndarray, "z y x"]
) -> Float[np.ndarray, "size_z size_y size_x"]:
    """Sum of the weights of all tiles at each voxel, float32."""
    # The tiles form a grid, so the sum over all of them can be taken one axis after the other.
    total = weights.astype(np.float32)
    for axis, positions in enumerate(starts):
        shape = (*total.shape[:axis], size[axis], *total.shape[axis + 1 :])
        summed = np.zeros(shape, np.float32)
        for start in positions:
            window = [slice(None)] * len(size)
            window[axis] = slice(start, start + total.shape[axis])
            summed[tuple(window)] += total
        total = summed
    return total


def padded_size(size: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    """Size (z, y, x) after padding to at least a tile of two or three axes."""
    window = (1,) * (3 - len(tile)) + tuple(tile)
    return tuple(max(n, k) for n, k in zip(size, window, strict=True))


def pad_to_tile(
    image: Float[np.ndarray, "channel z y x"], window: tuple[int, ...]
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Pad with 0, centred, to at least the window; also where the image is in the result."""
    deficits = [max(k - n, 0) for n, k in zip(image.shape[1:], window, strict=True)]
    before = [d // 2 for d in deficits]  # spec 05 §2: an odd remainder goes to the high end
    widths = [(0, 0), *((b, d - b) for b, d in zip(before, deficits, strict=True))]
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    image = image.astype(np.float32, copy=False)
    return (np.pad(image, widths) if any(deficits) else image), inner


def batches(starts: Starts, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Give tile positions (batch, 3), last axis fastest, and how many of a batch count.

    The last batch is filled up with its last position.
    """
    positions = itertools.product(*starts)
    while chosen := list(itertools.islice(positions, batch)):
        count = len(chosen)
        chosen += chosen[-1:] * (batch - count)
        yield np.asarray(chosen, np.int32), count
