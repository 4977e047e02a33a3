"""Pictures of a run: its curves, and its predictions over the images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

CLASS_COLOURS = ("#ff3b30", "#34c7ff", "#ffd60a", "#30d158", "#bf5af2", "#ff9f0a")
MAX_OVERLAYS = 6


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
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=80)
    plt.close(figure)
    os.replace(temporary, path)


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
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=80)
    plt.close(figure)
    os.replace(temporary, path)
