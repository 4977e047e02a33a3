"""A procedural abdominal phantom: body, organs, pancreas and tumour in CT, T1 or T2 contrast.

The anatomy is a list of organs, each a union of ellipsoids in patient coordinates (mm: x to the
left, y to the back, z to the head), drawn from ``(seed, case)`` alone. It is sampled only then on
a modality's grid, so the same seed gives the same anatomy in every modality and at every size.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from panther_jax.base.errors import DatasetError
from panther_jax.images.imageio import read_label
from panther_jax.images.raw_dataset import Case
from panther_jax.plans.geometry import Geometry

Modality = Literal["ct", "t1", "t2"]
Size = Literal["small", "full"]

MODALITIES = ("ct", "t1", "t2")
LABELS = {"background": 0, "tumor": 1, "pancreas": 2}
# What a foundation model of many organs learns: tissue to label, and the labels' names.
ORGANS = {
    "liver": 1, "spleen": 2, "cortex": 3, "medulla": 3, "artery": 4, "vein": 5, "bone": 6,
    "gut wall": 7, "gut": 7, "gas": 7, "pancreas": 8, "tumor": 8,
}  # fmt: skip
ORGAN_LABELS = {
    "background": 0, "liver": 1, "spleen": 2, "kidney": 3, "artery": 4, "vein": 5, "bone": 6,
    "gut": 7, "pancreas": 8,
}  # fmt: skip
# Spacing (mm) and shape, z y x.
GRIDS = {
    ("ct", "small"): ((3.5, 2.8, 2.8), (32, 104, 104)),
    ("t1", "small"): ((4.0, 2.6, 2.6), (28, 112, 112)),
    ("t2", "small"): ((3.0, 3.0, 3.0), (36, 96, 96)),
    ("ct", "full"): ((2.5, 0.8, 0.8), (120, 512, 512)),
    ("t1", "full"): ((3.0, 1.1875, 1.1875), (72, 258, 318)),
    ("t2", "full"): ((2.0, 1.2, 1.2), (100, 300, 320)),
}
# Mean intensity in CT (HU), T1 (fat-suppressed, arterial phase) and T2; relative texture. Tumour
# and pancreas share their intensities with other tissues: a threshold must not find them.
TISSUES = {
    "air": (-1000, 4, 4, 0.0),
    "fat": (-100, 55, 330, 0.06),
    "muscle": (58, 150, 75, 0.08),
    "bone": (260, 95, 150, 0.12),
    "disc": (90, 120, 110, 0.05),
    "csf": (15, 60, 560, 0.02),
    "artery": (190, 430, 25, 0.03),
    "vein": (160, 260, 45, 0.03),
    "cortex": (190, 340, 250, 0.04),
    "medulla": (150, 250, 290, 0.04),
    "liver": (108, 205, 115, 0.04),
    "bile": (12, 70, 560, 0.02),
    "spleen": (120, 260, 210, 0.04),
    "gut wall": (78, 185, 140, 0.06),
    "gas": (-900, 8, 6, 0.0),
    "lung": (-820, 18, 20, 0.1),
    "pancreas": (100, 255, 165, 0.07),
    "tumor": (64, 170, 265, 0.09),
}
GUT_CONTENT = {"ct": (5, 110), "t1": (60, 300), "t2": (90, 480)}  # a loop's level lies in between
NOISE = {"ct": 14.0, "t1": 14.0, "t2": 12.0}
# spec 02 §3.13: the codes of PANORAMA; the dataset's labels of them, and the tissues drawn for them
PANORAMA_TO_LABEL = (0, 1, 0, 0, 2, 2, 0)
PANORAMA_TISSUES = ("", "tumor", "vein", "artery", "pancreas", "bile", "bile")
ENDLESS = 1e4  # mm; the half-length of what leaves the image
SLAB_VOXELS = 2**21
PANCREAS_LINE = np.array(
    [  # centre x y z and radius, mm, from head to tail
        (-34, 8, -20, 12.5),
        (-30, 4, -8, 14.0),
        (-18, -5, 3, 10.5),
        (2, -10, 9, 10.0),
        (24, -6, 14, 11.0),
        (46, 8, 20, 10.5),
        (64, 22, 26, 9.0),
    ]
)

# ------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class Waves:
    """A smooth random field of unit variance: a sum of plane waves, defined everywhere."""

    vectors: np.ndarray  # (wave, 3), radians a mm, x y z
    phases: np.ndarray  # (wave,)


@dataclass(frozen=True)
class Organ:
    """A tissue that fills a union of ellipsoids; ``level`` picks an intensity for gut content."""

    tissue: str
    beads: np.ndarray  # (bead, 6): centre and radii, x y z, mm
    lobes_mm: float = 1.0
    in_cavity: bool = True
    level: float | None = None


@dataclass(frozen=True)
class Anatomy:
    """Organs in the order they are painted, later ones on top; how they are bent and placed."""

    organs: tuple[Organ, ...]
    warp: tuple[Waves, Waves, Waves]
    lobes: Waves
    warp_mm: float
    scale: float
    angle: float
    centre_xyz: np.ndarray


def draw_anatomy(seed: int, index: int) -> Anatomy:
    """Draw the anatomy of one case; a function of both numbers only."""
    rng = np.random.default_rng((seed, index))
    warp = (_draw_waves(rng, 8, (70, 180)), *(_draw_waves(rng, 8, (70, 180)) for _ in range(2)))
    return Anatomy(
        organs=(*_draw_frame(rng), *_draw_viscera(rng), *_draw_gut(rng), *_draw_pancreas(rng)),
        warp=(warp[0], warp[1], warp[2]),
        lobes=_draw_waves(rng, 32, (13, 32)),
        warp_mm=rng.uniform(2.0, 4.0),
        scale=rng.uniform(0.95, 1.06),
        angle=math.radians(rng.uniform(-6, 6)),
        centre_xyz=rng.uniform(-6, 6, 3),
    )


def _draw_waves(rng: np.random.Generator, count: int, lengths_mm: tuple[float, float]) -> Waves:
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = np.exp(rng.uniform(*np.log(lengths_mm).tolist(), size=count))
    return Waves(directions * (2 * np.pi / lengths)[:, None], rng.uniform(0, 2 * np.pi, count))


def _bead(
    rng: np.random.Generator, centre: Sequence[float], radii: Sequence[float], jitter_mm: float = 3
) -> np.ndarray:
    moved = np.asarray(centre) + rng.normal(scale=jitter_mm, size=3)
    return np.concatenate([moved, np.asarray(radii) * rng.uniform(0.93, 1.07, 3)])[None]


def _tube(points: Any, radii: Any, step_mm: float = 3.0) -> np.ndarray:
    from scipy.interpolate import PchipInterpolator

    points = np.asarray(points, float)
    at = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    fine = np.linspace(0, at[-1], max(2, round(at[-1] / step_mm)))
    radius = np.interp(fine, at, np.broadcast_to(radii, at.shape))
    return np.column_stack([PchipInterpolator(at, points)(fine), *(radius,) * 3])


def _moved(rng: np.random.Generator, points: Any, jitter_mm: float) -> np.ndarray:
    points = np.asarray(points, float)
    return points + rng.normal(scale=jitter_mm, size=3) + rng.normal(scale=2, size=points.shape)


def _draw_frame(rng: np.random.Generator) -> list[Organ]:
    wide, deep = rng.uniform(128, 142), rng.uniform(96, 109)
    fat, wall = rng.uniform(9, 18), rng.uniform(7, 10)
    shells = []
    for tissue, inset in (("fat", 0.0), ("muscle", fat), ("fat", fat + wall)):
        radii = (wide - 1.25 * inset, deep - inset, ENDLESS)
        shells.append(Organ(tissue, np.array([(0, 0, 0, *radii)]), in_cavity=False))
    spine = rng.normal(scale=2, size=2) + (0, deep - 44)
    period = rng.uniform(32, 38)
    first = rng.uniform(-0.5, 0.5)
    discs = [(*spine, (first + i) * period, 22, 17, 5) for i in range(-6, 7)]

    def column(x: float, y: float, rx: float, ry: float) -> np.ndarray:
        return np.array([(spine[0] + x, spine[1] + y, 0, rx, ry, ENDLESS)])

    parts = [
        ("muscle", np.concatenate([column(s * 36, 25, 25, 15) for s in (-1, 1)]), 1.5),
        ("muscle", np.concatenate([column(s * 34, 0, 15, 14) for s in (-1, 1)]), 1.5),
        ("bone", column(0, 0, 22, 17), 1.0),
        ("disc", np.array(discs), 0.5),
        ("bone", np.concatenate([column(0, 25, 14, 10), column(0, 38, 4, 9)]), 1.0),
        ("csf", column(0, 23, 8, 6.5), 0.3),
        ("artery", column(9, -26, *rng.uniform(8.5, 10.5, 2)), 0.5),
        ("vein", column(-17, -23, *rng.uniform(8, 12, 2)), 0.5),
    ]
    organs = [Organ(tissue, beads, lobes, False) for tissue, beads, lobes in parts]
    lungs = [_bead(rng, (s * 58, 5, 165), (52, 78, 82)) for s in (-1, 1)]
    return [*shells, *organs, Organ("lung", np.concatenate(lungs))]


def _draw_viscera(rng: np.random.Generator) -> list[Organ]:
    organs = []
    for centre in ((-58, 36, -20), (58, 36, -8)):
        kidney = _bead(rng, centre, (25, 24, 47), 4)
        for tissue, share in (("cortex", 1.0), ("medulla", 0.72), ("fat", 0.36)):
            organs.append(Organ(tissue, kidney * ([1] * 3 + [share] * 3), 2.0 - share))
    liver = (
        _bead(rng, (-73, -10, 30), (52, 66, 66), 4),
        _bead(rng, (-8, -52, 38), (50, 22, 30), 4),
    )
    organs.append(Organ("liver", np.concatenate(liver), 1.5))
    for _ in range(4):
        start = np.array((-45, -10, 42)) + rng.normal(scale=6, size=3)
        end = start + rng.uniform((-50, -40, -25), (-20, 35, 35))
        organs.append(Organ("vein", _tube([start, end], (5.0, 2.5)), 1.0))
    organs.append(Organ("bile", _bead(rng, (-50, -42, 0), (12, 15, 20), 5), 1.0))
    organs.append(Organ("spleen", _bead(rng, (86, 26, 34), (23, 34, 40), 5), 2.0))
    return organs


def _draw_gut(rng: np.random.Generator) -> list[Organ]:
    stomach = np.concatenate(
        [
            _bead(rng, (44, -44, 34), (36, 25, 35), 5),
            _tube(_moved(rng, [(24, -46, 8), (-4, -42, 2), (-28, -30, 4)], 3), (19, 15, 12)),
        ]
    )
    duodenum = [(-46, -10, 8), (-55, 4, -8), (-50, 14, -30), (-30, 18, -40), (-4, 16, -40)]
    transverse = [(-80, -36, -30), (-40, -58, -36), (0, -62, -42), (40, -58, -34), (80, -28, -20)]
    lumens = [
        (stomach, 4.0),
        (_tube(_moved(rng, duodenum, 3), 11.5), 3.5),
        (_tube(_moved(rng, transverse, 5), 15.0), 2.5),
        (_tube(_moved(rng, [(-80, -4, -130), (-82, -6, -30)], 4), 18.0), 2.5),
        (_tube(_moved(rng, [(86, 12, -130), (88, 14, -10)], 4), 13.0), 2.5),
    ]
    for low in (-130, -95, -60):
        for _ in range(7):
            centre = rng.uniform((-40, -50, low), (72, 4, low + 35))
            bend = centre + rng.normal(scale=16, size=3)
            lumens.append((_tube([centre, bend], rng.uniform(10, 15)), 3.0))
    organs = []
    for beads, wall in lumens:
        inner = beads - np.array([0] * 3 + [wall] * 3)
        organs.append(Organ("gut wall", beads, 1.5))
        organs.append(Organ("gut", inner, 1.5, level=rng.uniform()))
        if rng.uniform() < 0.3:  # gas rises to the front
            organs.append(Organ("gas", inner * ([1] * 3 + [0.6] * 3) - ([0, 4] + [0] * 4), 1.0))
    return organs


def _draw_pancreas(rng: np.random.Generator) -> list[Organ]:
    line = PANCREAS_LINE.copy()
    line[:, :3] += rng.normal(scale=3, size=3) + rng.normal(scale=2.5, size=(len(line), 3))
    line[:, 2] += rng.normal(scale=6) * np.linspace(-1, 1, len(line))  # how steeply it rises
    line[:, 3] *= rng.uniform(0.94, 1.1)
    beads = _tube(line[:, :3], line[:, 3].tolist())
    smv, sma = line[2, :3] + (8, 16, 0), line[2, :3] + (24, 22, 0)
    splenic = line[2:, :3] + (4, 13, 3)
    vessels = [
        Organ("vein", _tube([smv - (0, 0, 70), smv, smv + (-18, -2, 40)], 5.5), 0.5),
        Organ("artery", _tube([sma - (0, 0, 70), sma + (0, 10, 10)], 4.0), 0.3),
        Organ("vein", _tube(splenic, 4.0), 0.5),
    ]
    radius = rng.uniform(11.0, 17.0)
    at = beads[rng.integers(1, len(beads) - 1)]
    towards = rng.normal(size=3)
    towards[1] = -abs(towards[1])  # to the front: behind lie the vessels
    centre = at[:3] + towards / np.linalg.norm(towards) * rng.uniform(0, 0.6) * at[3]
    tumor = np.concatenate([centre, radius * rng.uniform(0.88, 1.14, 3)])[None]
    return [*vessels, Organ("pancreas", beads, 1.8), Organ("tumor", tumor, 1.6)]


# ------------------------------------------------------------------------------------ sampling


def _axis_steps(geometry: Geometry) -> np.ndarray:
    """Millimetres x y z that one voxel along z, y, x leads."""
    direction = np.reshape(geometry.direction, (3, 3))
    return direction.T[::-1] * np.asarray(geometry.spacing_zyx)[:, None]


def _slab(geometry: Geometry, start: int, stop: int) -> Geometry:
    origin = np.asarray(geometry.origin_xyz) + start * _axis_steps(geometry)[0]
    shape = (stop - start, *geometry.shape_zyx[1:])
    return Geometry(shape, geometry.spacing_zyx, tuple(origin.tolist()), geometry.direction)


def _field(waves: Waves, geometry: Geometry) -> np.ndarray:
    # A plane wave is a product over the axes, so a sum of waves is one matrix product.
    steps = _axis_steps(geometry) @ waves.vectors.T
    z, y, x = (
        np.exp(1j * np.arange(n)[:, None] * step[None])
        for n, step in zip(geometry.shape_zyx, steps, strict=True)
    )
    start = np.exp(1j * (waves.phases + waves.vectors @ np.asarray(geometry.origin_xyz)))
    rows = ((start * z)[:, None] * y).reshape(-1, len(start))
    rows = np.concatenate([rows.real, -rows.imag], 1).astype(np.float32)
    columns = np.concatenate([x.real, x.imag], 1).astype(np.float32)
    amplitude = np.float32(math.sqrt(2 / len(start)))
    return (amplitude * (rows @ columns.T)).reshape(geometry.shape_zyx)


def _anatomy_coordinates(anatomy: Anatomy, geometry: Geometry) -> list[np.ndarray]:
    steps, matrix = _axis_steps(geometry), _pose(anatomy)
    origin = matrix @ (np.asarray(geometry.origin_xyz) - anatomy.centre_xyz)
    z, y, x = (
        np.arange(n)[:, None] * (matrix @ step)
        for n, step in zip(geometry.shape_zyx, steps, strict=True)
    )
    return [
        (z[:, None, None, c] + y[None, :, None, c] + x[None, None, :, c] + origin[c]).astype("f4")
        + np.float32(anatomy.warp_mm) * _field(anatomy.warp[c], geometry)
        for c in range(3)
    ]


def _pose(anatomy: Anatomy) -> np.ndarray:
    cos, sin = math.cos(anatomy.angle), math.sin(anatomy.angle)
    return np.array([(cos, -sin, 0), (sin, cos, 0), (0, 0, 1)]) / anatomy.scale


def _organ_box(organ: Organ, anatomy: Anatomy, geometry: Geometry) -> tuple[slice, ...]:
    """Voxels that the organ can reach, warped and lobed; a part of the grid."""
    margin = 4 * anatomy.warp_mm + 4 * organ.lobes_mm + 2 * max(geometry.spacing_zyx)
    low = (organ.beads[:, :3] - organ.beads[:, 3:]).min(0) - margin
    high = (organ.beads[:, :3] + organ.beads[:, 3:]).max(0) + margin
    corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
    physical = corners @ np.linalg.inv(_pose(anatomy)).T + anatomy.centre_xyz
    index = (physical - geometry.origin_xyz) @ np.linalg.inv(_axis_steps(geometry))
    first = np.clip(np.floor(index.min(0)), 0, geometry.shape_zyx).astype(int)
    last = np.clip(np.ceil(index.max(0)) + 1, 0, geometry.shape_zyx).astype(int)
    return tuple(slice(a, b) for a, b in zip(first, last, strict=True))


def _depth(organ: Organ, coordinates: Sequence[np.ndarray], lobes: np.ndarray) -> np.ndarray:
    """Distance to the surface in mm, positive inside; rough for long ellipsoids."""
    depth = np.full(lobes.shape, -np.inf, np.float32)
    for bead in organ.beads.astype(np.float32):
        squares = sum(
            ((p - c) / r) ** 2 for p, c, r in zip(coordinates, bead, bead[3:], strict=False)
        )
        np.maximum(depth, (1 - np.sqrt(squares)) * bead[3:].min(), out=depth)
    return depth + np.float32(organ.lobes_mm) * lobes


def _paint(
    anatomy: Anatomy,
    geometry: Geometry,
    means: dict[str, float],
    *,
    gut: tuple[float, float],
    labels: dict[str, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean intensity, texture strength and label of each voxel; edges share voxels by volume."""
    image = np.full(geometry.shape_zyx, means["air"], np.float32)
    texture = np.zeros(geometry.shape_zyx, np.float32)
    label = np.zeros(geometry.shape_zyx, np.int16)
    coordinates = _anatomy_coordinates(anatomy, geometry)
    lobes = _field(anatomy.lobes, geometry)
    edge_mm = np.float32(np.mean(geometry.spacing_zyx))
    cavity = np.full(geometry.shape_zyx, -np.inf, np.float32)
    for number, organ in enumerate(anatomy.organs):
        box = _organ_box(organ, anatomy, geometry)
        if any(s.start >= s.stop for s in box):
            continue
        depth = _depth(organ, [c[box] for c in coordinates], lobes[box])
        if number == 2:
            cavity[box] = depth
        elif organ.in_cavity:
            depth = np.minimum(depth, cavity[box] - 1)
        share = np.clip(depth / edge_mm + np.float32(0.5), 0, 1)
        level = organ.level
        value = means[organ.tissue] if level is None else gut[0] + level * (gut[1] - gut[0])
        strength = 0.1 if level is not None else TISSUES[organ.tissue][3]
        image[box] += share * (np.float32(value) - image[box])
        texture[box] += share * (np.float32(strength) - texture[box])
        label[box][depth > 0] = labels.get(organ.tissue, 0)
    return image, texture, label


def _overlay(image: np.ndarray, texture: np.ndarray, codes: np.ndarray, means: dict) -> None:
    """Draw the structures of a PANORAMA label map into the image, with softened edges."""
    from scipy.ndimage import find_objects, gaussian_filter

    for code, box in enumerate(find_objects(codes.astype(np.int32)), start=1):
        if box is None:
            continue
        box = tuple(
            slice(max(0, s.start - 3), min(n, s.stop + 3))
            for s, n in zip(box, codes.shape, strict=True)
        )
        share = gaussian_filter((codes[box] == code).astype(np.float32), 0.6)
        tissue = PANORAMA_TISSUES[code]
        image[box] += share * (np.float32(means[tissue]) - image[box])
        texture[box] += share * (np.float32(TISSUES[tissue][3]) - texture[box])


def _finish(
    image: np.ndarray, texture: np.ndarray, geometry: Geometry, *, modality: Modality, key: tuple
) -> np.ndarray:
    """Add texture, bias field, gain and noise; round to int16."""
    rng = np.random.default_rng(key)
    waves, bias = _draw_waves(rng, 48, (6, 24)), _draw_waves(rng, 4, (260, 600))
    gain, bias_strength = rng.uniform(0.8, 1.3), rng.uniform(0.08, 0.18)
    noise = np.float32(NOISE[modality] * rng.uniform(0.85, 1.15))
    for start, stop in _slabs(geometry):
        part = _slab(geometry, start, stop)
        clean = image[start:stop] * (1 + texture[start:stop] * _field(waves, part))
        first = rng.standard_normal(clean.shape, np.float32) * noise
        if modality == "ct":
            image[start:stop] = np.maximum(clean + first, -1024)
            continue
        clean *= np.exp(np.float32(bias_strength) * _field(bias, part))
        second = rng.standard_normal(clean.shape, np.float32) * noise
        image[start:stop] = np.float32(gain) * np.hypot(clean + first, second)
    return np.rint(image).astype(np.int16)


def _slabs(geometry: Geometry) -> list[tuple[int, int]]:
    depth = geometry.shape_zyx[0]
    step = max(1, SLAB_VOXELS // math.prod(geometry.shape_zyx[1:]))
    return [(z, min(z + step, depth)) for z in range(0, depth, step)]


def make_phantom_case(
    index: int,
    *,
    modality: Modality = "t2",
    seed: int = 0,
    size: Size = "small",
    label_file: Path | None = None,
    organs: bool = False,
) -> Case:
    """Make one phantom case; image values are whole numbers.

    Labels are tumour and pancreas, or with ``organs`` those of :data:`ORGAN_LABELS`.

    With ``label_file``, a map in PANORAMA coding, its structures and geometry replace the drawn
    pancreas, tumour and grid; the body around them is drawn as ever.

    Raises:
        DatasetError: if the label map is not in PANORAMA coding.
    """
    anatomy = draw_anatomy(seed, index)
    column = MODALITIES.index(modality)
    rng = np.random.default_rng((seed, index, 1 + column))
    means = {t: v[column] * rng.normal(1, 0.03) for t, v in TISSUES.items()}
    codes = None
    if label_file is None:
        geometry, name = _draw_grid(rng, modality, size), f"phantom_{index:03d}"
    else:
        codes, geometry = read_label(label_file)
        anatomy = _around(anatomy, codes, geometry, label_file)
        name = label_file.name.removesuffix(".gz").rsplit(".", 1)[0]
    image, texture = (np.empty(geometry.shape_zyx, np.float32) for _ in range(2))
    label = np.empty(geometry.shape_zyx, np.int16)
    for start, stop in _slabs(geometry):
        part = _slab(geometry, start, stop)
        labels = ORGANS if organs else LABELS
        painted = _paint(anatomy, part, means, gut=GUT_CONTENT[modality], labels=labels)
        image[start:stop], texture[start:stop], label[start:stop] = painted
    if codes is not None:
        _overlay(image, texture, codes, means)
        label = np.array(PANORAMA_TO_LABEL, np.int16)[codes]
    key = (seed, index, 1 + column, 1)
    image = _finish(image, texture, geometry, modality=modality, key=key)
    return Case(name, image[None].astype(np.float32), label, geometry)


def _draw_grid(rng: np.random.Generator, modality: Modality, size: Size) -> Geometry:
    spacing, shape = GRIDS[modality, size]
    spacing = tuple(round(s * f, 4) for s, f in zip(spacing, _grid_factors(rng), strict=True))
    shape = tuple(int(n + d) for n, d in zip(shape, rng.integers(0, 3, 3) * 2, strict=True))
    extent = [-(n - 1) / 2 * s for n, s in zip(shape, spacing, strict=True)]
    origin = tuple(round(e, 3) for e in reversed(extent))
    return Geometry(shape, spacing, origin, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))


def _grid_factors(rng: np.random.Generator) -> tuple[float, float, float]:
    across, along = rng.uniform(0.97, 1.03, 2)
    return along, across, across


def _around(anatomy: Anatomy, codes: np.ndarray, geometry: Geometry, path: Path) -> Anatomy:
    """The anatomy without pancreas and its vessels, moved to where the map has its pancreas."""
    if codes.min() < 0 or codes.max() >= len(PANORAMA_TO_LABEL):
        raise DatasetError(
            f"{path}: label values {codes.min()} to {codes.max()}; expected PANORAMA's codes 0 to 6"
            "\n  1 tumour, 2 veins, 3 arteries, 4 pancreas, 5 duct, 6 bile duct: renumber the map."
        )
    inside = np.argwhere(codes > 0)
    middle = inside.mean(0) if len(inside) else np.asarray(geometry.shape_zyx) / 2
    at = np.asarray(geometry.origin_xyz) + middle @ _axis_steps(geometry)
    centre = at - np.linalg.inv(_pose(anatomy)) @ PANCREAS_LINE[:, :3].mean(0)
    kept = anatomy.organs[: -len(("portal vein", "artery", "splenic vein", "pancreas", "tumor"))]
    return dataclasses.replace(anatomy, organs=kept, centre_xyz=centre)
