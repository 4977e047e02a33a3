"""From logits on the network's grid to label maps and probabilities on the raw grid (spec 05 §7-8).

Resampled slab by slab along the first raw axis, slabs in threads: label maps need no more memory
than a few arrays of the image's size, however many classes there are (spec 05 §14).
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from scipy.special import expit

from panther_jax.base.files import write_json, writing
from panther_jax.plans.geometry import Properties
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans
from panther_jax.preprocessing.resampling import apply_operators, image_operators, resample_logits
from panther_jax.store.pickles import write_pickle

SLAB_VOXELS = 1 << 18
MAX_THREADS = 8

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class RawView:
    """The logits of a case as seen from its raw grid, inside the crop; axes are the raw ones.

    ``crop`` says where in the raw grid that is, ``shape`` how large.
    """

    shape: tuple[int, ...]
    crop: Slices
    raw_shape: tuple[int, ...]
    operators: tuple[np.ndarray | None, ...]
    first_axis: int  # of the network's grid: the one that is the first of the raw grid
    backward: tuple[int, ...]
    result: Any  # dtype of resampled logits
    whole: Callable[[np.ndarray], np.ndarray] | None  # for resamplers that cannot be split

    def prepared(self, head: np.ndarray) -> np.ndarray:
        """A class's logits, resampled as a whole if the plans' function needs it."""
        head = np.asarray(head)
        return head if self.whole is None else self.whole(head)

    def slabs(self) -> tuple[slice, ...]:
        """Ranges of the first axis to work on one at a time."""
        step = max(1, SLAB_VOXELS // max(1, self.shape[1] * self.shape[2]))
        return tuple(slice(s, min(s + step, self.shape[0])) for s in range(0, self.shape[0], step))

    def values(self, head: np.ndarray, rows: slice) -> np.ndarray:
        """Resampled logits of one class (as :meth:`prepared` gives it) on some raw slices."""
        operators = list(self.operators)
        operator, band = operators[self.first_axis], rows
        if operator is not None:
            part = operator[rows]
            columns = np.flatnonzero(part.any(axis=0))
            band = slice(int(columns[0]), int(columns[-1]) + 1)
            operators[self.first_axis] = part[:, band]
        index = [slice(None)] * 3
        index[self.first_axis] = band
        # spec 05 §7.3: float64 for float16 logits; float32 logits are exact to float32 at best
        dtype = np.float64 if head.dtype == np.float16 else np.float32
        found = apply_operators(head[tuple(index)], tuple(operators), dtype=dtype)
        return found.astype(self.result, copy=False).transpose(self.backward)

    def probabilities(self, heads: Sequence[np.ndarray], rows: slice, labels: Labels) -> np.ndarray:
        """Softmax over the classes, or a sigmoid a region, on some raw slices; float32."""
        found = np.stack([self.values(head, rows) for head in heads]).astype(np.float32, copy=False)
        if labels.has_regions:
            return expit(found, out=found)
        found -= found.max(axis=0)
        np.exp(found, out=found)
        found /= found.sum(axis=0)
        return found


def raw_view(head: Float[np.ndarray, "z y x"], properties: Properties, plans: Plans) -> RawView:
    """Prepare the way to the raw grid for logits like ``head``, one class of them."""
    raw_spacing = tuple(properties.geometry.spacing_zyx[a] for a in plans.transpose_forward)
    spacing = plans.spacing
    if len(spacing) == 2:  # spec 05 §7.1: slices keep their distance
        spacing = (raw_spacing[0], *spacing)
    shape, resampler = properties.shape_before_resampling, plans.resampling_logits
    grids = {"spacing": spacing, "new_spacing": raw_spacing}
    torch = resampler.name == "resample_torch_fornnunet"
    # Only linear interpolation and nearest neighbour need no clipping to the range of the whole.
    linear = torch or max(resampler.get("order", 3), resampler.get("order_z", 0)) <= 1

    def whole(values: np.ndarray) -> np.ndarray:
        return resample_logits(values[None], shape, resampler, **grids)[0]

    backward = plans.transpose_backward
    changes = head.shape != shape
    operators: tuple[np.ndarray | None, ...] = (None, None, None)
    if linear and changes:
        operators = image_operators(head.shape, shape, resampler, **grids)
    return RawView(
        shape=tuple(shape[a] for a in backward),
        crop=tuple(slice(*properties.crop_box[a]) for a in backward),
        raw_shape=tuple(properties.shape_before_crop[a] for a in backward),
        operators=operators,
        first_axis=backward[0],
        backward=backward,
        result=np.float32 if torch and changes else head.dtype,  # spec 05 §7.5
        whole=None if linear or not changes else whole,
    )


@contextmanager
def slab_threads(slabs: Sequence[slice]) -> Iterator[Callable[[Callable[[slice], None]], None]]:
    """Give a function that does a work for all slabs, side by side; an exception is raised there.

    The threads stay for all works: each new one would take memory that it does not give back.
    """
    if len(slabs) == 1:
        yield lambda work: work(slabs[0])
        return
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1, len(slabs))) as pool:
        yield lambda work: deque(pool.map(work, slabs), maxlen=0).clear()


def label_dtype(labels: Labels) -> Any:
    """Type of a label map: uint8, or uint16 from 255 foreground labels on (spec 05 §8.3)."""
    return np.uint8 if len(labels.foreground_ids) < 255 else np.uint16


def logits_to_label(
    logits: Iterable[Float[np.ndarray, "z y x"]],
    properties: Properties,
    plans: Plans,
    labels: Labels,
) -> Integer[np.ndarray, "raw_z raw_y raw_x"]:
    """Label map on the raw grid from logits on the network's grid, class after class.

    ``logits`` is an array (output, z, y, x), or gives the classes one by one. Resampled values are
    compared in the dtype of ``logits``; of equal ones the first class wins.
    """
    heads = iter(logits)
    first = next(heads)
    view = raw_view(first, properties, plans)
    raw = np.zeros(view.raw_shape, label_dtype(labels))
    inside = raw[view.crop]
    highest = np.empty(view.shape if not labels.has_regions else (0, 0, 0), view.result)
    with slab_threads(view.slabs()) as for_all_slabs:
        for index, head in enumerate(itertools.chain([first], heads)):
            head = view.prepared(head)
            if labels.has_regions:
                value = (labels.regions_class_order or ())[index]
                for_all_slabs(partial(_put_region, view, head, value, inside))
            else:
                for_all_slabs(partial(_put_highest, view, head, index, (inside, highest)))
    return raw


def _put_region(
    view: RawView, head: np.ndarray, value: int, inside: np.ndarray, rows: slice
) -> None:
    # spec 05 §8.2: strict, and after the sigmoid, whose float32 rounding has a say
    values = view.values(head, rows).astype(np.float32, copy=False)
    inside[rows][expit(values) > 0.5] = value


def _put_highest(
    view: RawView,
    head: np.ndarray,
    index: int,
    found: tuple[np.ndarray, np.ndarray],
    rows: slice,
) -> None:
    inside, highest = found
    values = view.values(head, rows)
    if index == 0:
        highest[rows] = values
        return
    higher = values > highest[rows]
    np.copyto(highest[rows], values, where=higher)
    inside[rows][higher] = index


def logits_to_probabilities(
    logits: Float[np.ndarray, "output z y x"], properties: Properties, plans: Plans, labels: Labels
) -> Float[np.ndarray, "output raw_z raw_y raw_x"]:
    """Probabilities, float32, on the raw grid from logits on the network's grid (spec 05 §8.3).

    Softmax over labels, or a sigmoid for each region. Outside the crop the background, output 0 of
    a label task, is 1 and all else 0.
    """
    view = raw_view(logits[0], properties, plans)
    heads = [view.prepared(head) for head in logits]
    raw = empty_probabilities(len(heads), view.raw_shape, labels)
    inside = raw[(slice(None), *view.crop)]

    def work(rows: slice) -> None:
        inside[:, rows] = view.probabilities(heads, rows, labels)

    with slab_threads(view.slabs()) as for_all_slabs:
        for_all_slabs(work)
    return raw


def empty_probabilities(
    num_outputs: int, raw_shape: tuple[int, ...], labels: Labels
) -> Float[np.ndarray, "output z y x"]:
    """Probabilities of a grid on which there is nothing but background."""
    raw = np.zeros((num_outputs, *raw_shape), np.float32)
    if not labels.has_regions:
        raw[0] = 1.0
    return raw


def save_probabilities(
    folder: Path,
    stem: str,
    probabilities: Float[np.ndarray, "output z y x"],
    properties: Properties,
) -> None:
    """Write ``STEM.npz`` and ``.pkl`` as nnU-Net's ensembler wants them, and our ``.json``.

    Each file appears complete or not at all, the ``.npz`` last.
    """
    write_json(folder / f"{stem}.json", properties.to_json())
    write_pickle(folder / f"{stem}.pkl", nnunet_properties(properties))
    with writing(folder / f"{stem}.npz") as temporary:
        np.savez_compressed(temporary, probabilities=probabilities)


def nnunet_properties(properties: Properties) -> dict[str, Any]:
    """The properties under the names, and in the types, that nnU-Net gives them (spec 05 §8.4)."""
    geometry = properties.geometry
    ndim = len(geometry.origin_xyz)
    return {
        "sitk_stuff": {
            "spacing": tuple(reversed(geometry.spacing_zyx[-ndim:])),
            "origin": geometry.origin_xyz,
            "direction": geometry.direction,
        },
        "spacing": list(geometry.spacing_zyx),
        "shape_before_cropping": properties.shape_before_crop,
        "bbox_used_for_cropping": [list(pair) for pair in properties.crop_box],
        "shape_after_cropping_and_before_resampling": properties.shape_before_resampling,
    }
