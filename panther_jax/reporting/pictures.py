"""Pictures of a run: its curves, and its predictions over the images."""

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Num, Shaped

from panther_jax.base.files import writing
from panther_jax.plans.geometry import Geometry

CLASS_COLOURS = ("#ff3b30", "#34c7ff", "#ffd60a", "#30d158", "#bf5af2", "#ff9f0a")
MAX_OVERLAYS = 6
MARGIN_MM, LEAST_VIEW_MM = 30.0, 140.0
PLANES = ("axial", "coronal", "sagittal")
_SIDES = (("R", "A"), ("R", "S"), ("A", "S"))  # left and top of each plane as displayed


def plot_progress(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw progress.png from the epoch rows of a metrics file (spec 03 §5.4): three panels.

    Losses with pseudo-Dice and its moving average, epoch duration, learning rate.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    epochs = [r["epoch"] for r in rows]
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 11), sharex=True)
    marker = "." if len(epochs) < 40 else None
    top.plot(epochs, _column(rows, "train_loss"), "b", marker=marker, label="training loss")
    top.plot(epochs, _column(rows, "validation_loss"), "r", marker=marker, label="validation loss")
    top.set_ylabel("loss")
    right = top.twinx()
    right.plot(epochs, _column(rows, "mean_pseudo_dice"), "g:", label="pseudo-Dice")
    right.plot(
        epochs, _column(rows, "ema"), "g", marker=marker, label="pseudo-Dice, moving average"
    )
    for name in rows[0]["pseudo_dice"] if rows else ():
        values = [_number(r["pseudo_dice"].get(name)) for r in rows]
        right.plot(epochs, values, ":", alpha=0.6, label=f"pseudo-Dice {name}")
    right.set_ylabel("Dice")
    right.set_ylim(0, 1)
    lines = [*top.get_lines(), *right.get_lines()]
    top.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="center right")
    middle.plot(epochs, _column(rows, "seconds"), "k", marker=marker)
    middle.set_ylabel("epoch duration [s]")
    middle.set_ylim(bottom=0)
    bottom.plot(epochs, _column(rows, "lr"), "k", marker=marker)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("epoch")
    figure.tight_layout()
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [_number(r.get(name)) for r in rows]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


@dataclass(frozen=True)
class Overlay:
    """One slice of a case: image, reference and prediction on one grid, and what it scored."""

    title: str
    image: Float[np.ndarray, "y x"]
    reference: Integer[np.ndarray, "y x"]
    prediction: Integer[np.ndarray, "y x"]
    aspect: float = 1.0
    """Height of a voxel over its width."""


def best_slice(reference: Integer[np.ndarray, "z y x"], classes: Sequence[int]) -> int:
    """The slice that shows most of the first class that there is; else the middle one."""
    for label in classes:
        areas = (reference == label).sum((1, 2))
        if areas.any():
            return int(areas.argmax())
    return reference.shape[0] // 2


def plot_overlays(overlays: Sequence[Overlay], classes: Mapping[str, int], path: Path) -> None:
    """Draw cases side by side: reference outlined solid, prediction dashed, a colour a class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    shown = overlays[:MAX_OVERLAYS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 4 * rows), squeeze=False)
    colours = dict(zip(classes, CLASS_COLOURS * len(classes), strict=False))
    for axis in axes.flat:
        axis.axis("off")
    for axis, overlay in zip(axes.flat, shown, strict=False):
        low, high = np.percentile(overlay.image, (1, 99))
        axis.imshow(overlay.image, cmap="gray", vmin=low, vmax=high, aspect=overlay.aspect)
        for name, value in classes.items():
            for mask, style in ((overlay.reference, "-"), (overlay.prediction, "--")):
                if (mask == value).any():
                    axis.contour(
                        mask == value, [0.5], colors=colours[name], linestyles=style, linewidths=1.2
                    )
        axis.set_title(overlay.title, fontsize=9)
    handles = [Line2D([], [], color=colours[name], label=name) for name in classes]
    handles += [
        Line2D([], [], color="gray", label="reference"),
        Line2D([], [], color="gray", linestyle="--", label="prediction"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------- three planes


@dataclass(frozen=True)
class Mask:
    """What to outline: whose it is (an index of colours), and whether it is the main thing."""

    who: int
    strong: bool
    voxels: Bool[np.ndarray, "z y x"]


@dataclass(frozen=True)
class View:
    """A slice to display, row by row from its top left, with outlines as SVG paths in pixels."""

    plane: str
    number: int
    """Slice, counted from 1 in the direction feet to head, front to back, right to left."""
    num_slices: int
    png: bytes
    shape: tuple[int, int]
    spacing: tuple[float, float]
    """Height and width of a pixel in mm."""
    sides: tuple[str, str]
    """Letters of the left and of the top side: R, A, S; empty where not known."""
    outlines: tuple[tuple[int, bool, str], ...]
    """``(who, strong, path)``."""


def three_planes(
    image: Num[np.ndarray, "z y x"],
    masks: Sequence[Mask],
    geometry: Geometry,
    *,
    window: tuple[float, float] | None = None,
) -> tuple[View, ...]:
    """Axial, coronal and sagittal slice through what the strong masks show, as radiologists look.

    Each is the slice with the largest area of the first strong mask that is not empty, cut to the
    surroundings of all strong masks. Oblique images are shown along their nearest axes; an image
    of one slice is shown as it is. ``window`` are the values shown black and white; by default the
    1st and the 99.5th percentile.
    """
    low, high = window or tuple(float(p) for p in np.percentile(image, (1.0, 99.5)))
    grey = np.clip((image.astype(np.float32) - low) / max(high - low, 1e-6) * 255, 0, 255)
    flat = len(geometry.direction) != 9
    axes, flipped = ((0, 1, 2), (False,) * 3) if flat else patient_axes(geometry)
    turn = _turned(axes, flipped)
    grey = turn(grey.astype(np.uint8))
    turned = [Mask(m.who, m.strong, turn(m.voxels)) for m in masks]
    spacing = tuple(geometry.spacing_zyx[a] for a in axes)
    strong = [m.voxels for m in turned if m.strong and m.voxels.any()]
    box = _surroundings(strong, grey.shape, spacing)
    views = []
    for axis in range(1 if flat else 3):
        index = _largest_slice(strong[0], axis) if strong else grey.shape[axis] // 2
        views.append(_view(grey, turned, axis=axis, index=index, box=box, spacing=spacing))
    if flat:
        return tuple(replace(v, plane="slice", sides=("", "")) for v in views)
    return tuple(views)


def patient_axes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Array axes that run nearest to (feet-head, front-back, right-left), and which are reversed.

    ITK's space has x to the patient's left, y to the back, z to the head.
    """
    matrix = np.reshape(geometry.direction, (3, 3))  # columns: index axes x, y, z
    choices = itertools.permutations(range(3))
    best = max(choices, key=lambda p: sum(abs(matrix[row, column]) for row, column in enumerate(p)))
    axes = tuple(2 - best[row] for row in (2, 1, 0))
    return axes, tuple(bool(matrix[row, best[row]] < 0) for row in (2, 1, 0))


def outline_path(mask: Bool[np.ndarray, "y x"]) -> str:
    """The edges of a mask's pixels as an SVG path, runs of edges merged; pixel (0, 0) at 0, 0."""
    padded = np.pad(mask, 1)
    parts = []
    for y, x, length in _runs(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        parts.append(f"M{x} {y}h{length}")
    for x, y, length in _runs((padded[1:-1, 1:] != padded[1:-1, :-1]).T):
        parts.append(f"M{x} {y}v{length}")
    return "".join(parts)


def grey_png(pixels: Shaped[np.ndarray, "y x"]) -> bytes:
    """An 8-bit grey image as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _turned(axes: tuple[int, ...], flipped: tuple[bool, ...]) -> Callable[[Any], Any]:
    reverse = tuple(slice(None, None, -1 if flip else 1) for flip in flipped)
    return lambda array: array.transpose(axes)[reverse]


def _surroundings(
    masks: Sequence[np.ndarray], shape: tuple[int, ...], spacing: tuple[float, ...]
) -> tuple[slice, ...]:
    """The box around all masks with a margin, of a least size; the whole without masks."""
    if not masks:
        return tuple(slice(0, n) for n in shape)
    union = np.any(masks, axis=0)
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        inside = np.flatnonzero(union.any(axis=others))
        length = (inside[-1] + 1 - inside[0]) * spacing[axis]
        margin = max(MARGIN_MM, (LEAST_VIEW_MM - length) / 2) / spacing[axis]
        low, high = round(inside[0] - margin), round(inside[-1] + 1 + margin)
        box.append(slice(max(0, low), min(shape[axis], high)))
    return tuple(box)


def _largest_slice(mask: np.ndarray, axis: int) -> int:
    others = tuple(a for a in range(3) if a != axis)
    return int(mask.sum(axis=others).argmax())


def _view(
    grey: np.ndarray,
    masks: Sequence[Mask],
    *,
    axis: int,
    index: int,
    box: tuple[slice, ...],
    spacing: tuple[float, ...],
) -> View:
    def cut(array: np.ndarray) -> np.ndarray:
        where: list[Any] = list(box)
        where[axis] = index
        plane = array[tuple(where)]
        return plane if axis == 0 else plane[::-1]  # the head is up

    pixels = cut(grey)
    outlines = tuple(
        (m.who, m.strong, path) for m in masks if (path := outline_path(cut(m.voxels)))
    )
    rest = [s for a, s in enumerate(spacing) if a != axis]
    return View(
        plane=PLANES[axis],
        number=index + 1,
        num_slices=grey.shape[axis],
        png=grey_png(pixels),
        shape=(pixels.shape[0], pixels.shape[1]),
        spacing=(rest[0], rest[1]),
        sides=_SIDES[axis],
        outlines=outlines,
    )


def _runs(edges: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Row, first column and length of every run of true values, row by row."""
    padded = np.pad(edges.astype(np.int8), ((0, 0), (1, 1)))
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    _, ends = np.nonzero(change == -1)
    yield from zip(rows.tolist(), starts.tolist(), (ends - starts).tolist(), strict=True)
