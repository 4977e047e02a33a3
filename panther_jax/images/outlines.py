"""Outlines of a mask along the edges of its voxels, with holes joined to them by keyholes.

Each voxel is a square around its centre; an outline runs along the sides of squares, so that the
area inside is the mask's, and a centre is never nearer to it than half a voxel. Voxels that share
but a corner are separate islands.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64
from scipy import ndimage

Vertex = tuple[int, int]  # row, column of a corner of voxels: half a voxel before that centre
Loop = list[Vertex]  # closed, in steps of one voxel, the inside on the right hand


def outlines(
    mask: Bool[np.ndarray, "row column"], *, smooth: bool = False
) -> list[Float64[np.ndarray, "point 2"]]:
    """Outline each island of a slice's mask by one closed polygon, in order of their first voxel.

    Points are row and column in voxels, whole numbers at centres. With ``smooth`` the corners are
    cut from the middle of one side to that of the next, as contours at a half do; all centres
    stay on their side.
    """
    islands = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=islands)
    found = []
    for number, box in enumerate(ndimage.find_objects(islands), start=1):
        loop, ends = _with_keyholes(_loops(islands[box] == number))
        points = np.array(loop, np.float64) - 0.5
        if smooth:
            points = (points + np.roll(points, -1, axis=0)) / 2
        turns = _turns(points)
        if not smooth:  # both ways of a cut have the same points
            turns |= np.array([vertex in ends for vertex in loop])
        found.append(points[turns] + [box[0].start, box[1].start])
    return found


def _loops(island: np.ndarray) -> list[Loop]:
    """All boundaries of one island: that around it, and those around its holes."""
    ahead: dict[Vertex, list[Vertex]] = {}
    padded = np.pad(island, 1)
    # of each side: which neighbour lies beyond it, where the side begins, and its direction
    for beyond, begin, way in (
        ((-1, 0), (0, 0), (0, 1)),
        ((0, 1), (0, 1), (1, 0)),
        ((1, 0), (1, 1), (0, -1)),
        ((0, -1), (1, 0), (-1, 0)),
    ):
        rows, columns = slice(1 + beyond[0], None), slice(1 + beyond[1], None)
        neighbour = padded[rows, columns][: island.shape[0], : island.shape[1]]
        for row, column in np.argwhere(island & ~neighbour).tolist():
            ahead.setdefault((row + begin[0], column + begin[1]), []).append(way)
    loops = []
    while ahead:
        loops.append(_followed(ahead))
    return loops


def _followed(ahead: dict[Vertex, list[Vertex]]) -> Loop:
    """Follow one boundary to where it began, and take its sides away."""
    start = vertex = next(iter(ahead))
    way, loop = ahead[start][0], []
    while True:
        loop.append(vertex)
        ways = ahead[vertex]
        # where two boundaries meet, the turn to the right stays with the same voxel
        right = way[1], -way[0]
        way = right if right in ways else ways[0]
        ways.remove(way)
        if not ways:
            del ahead[vertex]
        vertex = vertex[0] + way[0], vertex[1] + way[1]
        if vertex == start and not _goes_on(ahead.get(start), way):
            return loop


def _goes_on(ways: list[Vertex] | None, way: Vertex) -> bool:
    """Whether a boundary that is back at its first vertex only passes it here."""
    return ways is not None and (way[1], -way[0]) in ways


def _area(loop: Loop) -> float:
    rows, columns = np.array(loop, np.float64).T
    return float(columns @ np.roll(rows, -1) - rows @ np.roll(columns, -1)) / 2


def _with_keyholes(loops: list[Loop]) -> tuple[Loop, set[Vertex]]:
    """Join holes to the outer boundary, each by a cut of no width straight up from its top.

    What a cut first meets is the outer boundary or that of a hole higher up, joined before. The
    ends of the cuts are returned too.
    """
    outer = [loop for loop in loops if _area(loop) > 0]
    assert len(outer) == 1, "an island has one outer boundary"
    joined, boundary = outer[0], {vertex for loop in loops for vertex in loop}
    ends: set[Vertex] = set()
    for hole in sorted((loop for loop in loops if _area(loop) < 0), key=min):
        top = min(hole)
        cut = list(_upwards(top, boundary))
        first = hole.index(top)
        around = [*hole[first:], *hole[:first], top]
        at = joined.index(cut[-1])
        joined = [*joined[: at + 1], *cut[-2::-1], *around, *cut, *joined[at + 1 :]]
        ends |= {top, cut[-1]}
    return joined, ends


def _upwards(vertex: Vertex, boundary: set[Vertex]) -> Iterator[Vertex]:
    """Vertices above one, up to the first that lies on a boundary."""
    row, column = vertex
    while True:
        row -= 1
        yield row, column
        if (row, column) in boundary:
            return


def _turns(points: np.ndarray) -> np.ndarray:
    """Which points are not between two steps of one direction."""
    into, onward = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return np.abs(into - onward).max(axis=1) > 1e-9
