"""The challenge's container contract: one case in, one mask out, in time (spec 05 §12)."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from panther_jax.base.errors import PantherError
from panther_jax.base.files import require_writable, writing
from panther_jax.evaluation.components import filter_components, flat_labels, keep_largest_component
from panther_jax.evaluation.metrics import TUMOR_NAMES
from panther_jax.inference.loading import predict
from panther_jax.panther import roi
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels

LOGGER = logging.getLogger("panther_jax")
PANCREAS_NAMES = ("pancreas", "pancreatic")
ROI_MARGIN_MM = 30.0  # spec 05 §13.3
SHARE_OF_LIMIT = 0.9  # of the time that is left: export and writing come after the network
MIN_SAMPLES = 3  # calls of the network before its pace is believed; the first one compiles


class ChallengeError(PantherError, RuntimeError):
    """The container's input is not what the challenge promises, or the output cannot be written."""


@dataclass(frozen=True)
class ChallengeTask:
    """What differs between the two tasks (spec 05 §12.1)."""

    input_folder: Path
    checkpoint: str


# ----------------------------------------------------------------------------------- one case


@dataclass(frozen=True)
class Recipe:
    """How a case becomes a mask: the predictor, and what is done before and after it.

    ``roi_model`` finds the pancreas first, and only its surroundings are predicted (§13.3).
    ``filter_model`` finds the pancreas in which components must lie (§13.2). They may be one.
    """

    model: Any
    roi_model: Any = None
    roi_margin_mm: float = ROI_MARGIN_MM
    filter_model: Any = None
    largest_component: bool = False


def segment(
    recipe: Recipe,
    image: Float[np.ndarray, "channel z y x"],
    geometry: Geometry,
    *,
    deadline: float | None = None,
) -> Bool[np.ndarray, "z y x"]:
    """The tumour's mask on the image's grid.

    Where the pancreas is not found, the whole image is predicted and nothing is filtered. At the
    pace of a ``deadline`` (of ``time.monotonic``), fewer folds predict.
    """
    pancreas = None
    if recipe.roi_model is not None:
        pancreas = _pancreas(recipe.roi_model, image, geometry)
    box = _box(pancreas, geometry, recipe.roi_margin_mm)
    cut, cut_geometry = roi.crop(image, geometry, box) if box else (image, geometry)
    label = _predict_in_time(recipe.model, cut, cut_geometry, deadline)
    mask = tumor_mask(label, recipe.model.labels)
    if box:
        mask = roi.paste(mask.astype(np.uint8), box, geometry.shape_zyx) > 0
    if recipe.filter_model is not None:
        if recipe.filter_model is not recipe.roi_model:
            pancreas = _pancreas(recipe.filter_model, image, geometry)
        assert pancreas is not None
        mask = _filtered(mask, pancreas)
    if recipe.largest_component:
        mask = keep_largest_component(mask.astype(np.uint8), 1) > 0
    return mask


def tumor_mask(label: Integer[np.ndarray, "z y x"], labels: Labels) -> Bool[np.ndarray, "z y x"]:
    """Voxels of the label or region named tumor (tumour, lesion), whatever its value.

    Raises:
        ChallengeError: if the model has no such label.
    """
    return np.isin(label, _values(labels, TUMOR_NAMES))


def _pancreas(model: Any, image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Pancreas and the tumour in it."""
    label = predict(model, image, geometry).label
    names = (*PANCREAS_NAMES, *TUMOR_NAMES)
    _values(model.labels, PANCREAS_NAMES)  # a tumour alone does not show where the pancreas is
    return np.isin(label, _values(model.labels, names))


def _values(labels: Labels, names: Sequence[str]) -> tuple[int, ...]:
    found = [value for name, value in labels.classes if name.casefold() in names]
    if not found:
        raise ChallengeError(
            f"the model has no label named {names[0]!r}, only {[n for n, _ in labels.classes]}\n"
            "  Pass the model that was trained for it, or rename the label in its dataset.json."
        )
    return flat_labels(found)


def _box(pancreas: np.ndarray | None, geometry: Geometry, margin_mm: float) -> roi.Box | None:
    if pancreas is None:
        return None
    box = roi.region_of_interest(pancreas, geometry, geometry, margins_mm_zyx=(margin_mm,) * 3)
    if box is None:
        LOGGER.warning("no pancreas found: the whole image is predicted")
        return None
    LOGGER.info("region of interest %s of %s (z, y, x)", box, geometry.shape_zyx)
    return box


def _filtered(mask: np.ndarray, pancreas: np.ndarray) -> np.ndarray:
    if not pancreas.any():
        LOGGER.warning("no pancreas found: no component is removed")
        return mask
    kept = filter_components(mask, pancreas)
    LOGGER.info("component filter: %d of %d voxels stay", kept.sum(), mask.sum())
    return kept


# --------------------------------------------------------------------------------- time limit


class _TooSlow(Exception):
    """At the measured pace the deadline would be missed."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        super().__init__()


def _predict_in_time(
    predictor: Any, image: np.ndarray, geometry: Geometry, deadline: float | None
) -> np.ndarray:
    """Predict; where that would take too long, start again with as many folds as there is time."""
    num_folds = _num_folds(predictor)
    if deadline is None or num_folds == 1:
        return predict(predictor, image, geometry).label
    try:
        return predict(predictor, image, geometry, progress=_watch(deadline)).label
    except _TooSlow as slow:
        left = max(deadline - time.monotonic(), 0.0) * SHARE_OF_LIMIT
        fewer = min(max(int(num_folds * left / slow.seconds), 1), num_folds - 1)
        LOGGER.warning(
            "%d folds would take %.0f s and %.0f s are left: predicting with %d",
            num_folds, slow.seconds, left, fewer,
        )  # fmt: skip
        return predict(_with_folds(predictor, fewer), image, geometry).label


def _watch(deadline: float) -> Callable[[int, int], None]:
    """Make a progress callback that raises when the pace is too slow."""
    samples: list[tuple[float, int]] = []

    def watch(done: int, total: int) -> None:
        samples.append((time.monotonic(), done))
        if len(samples) <= MIN_SAMPLES:
            return
        (first_time, first_done), (now, _) = samples[0], samples[-1]
        each = (now - first_time) / max(done - first_done, 1)
        if (total - done) * each > (deadline - now) * SHARE_OF_LIMIT:
            raise _TooSlow(total * each)

    return watch


def _num_folds(predictor: Any) -> int:
    members = predictor.ensemble.members
    return len(members[0].model.folds) if len(members) == 1 else 1


def _with_folds(predictor: Any, count: int) -> Any:
    """The same predictor with its first folds only."""
    (member,) = predictor.ensemble.members
    model = member.model
    fewer = dataclasses.replace(model, folds=model.folds[:count], params=model.params[:count])
    ensemble = dataclasses.replace(
        predictor.ensemble, members=(dataclasses.replace(member, model=fewer),)
    )
    return type(predictor)(ensemble, predictor.settings)


# -------------------------------------------------------------------------------- input, output


def find_input(folder: Path, task: ChallengeTask) -> Path:
    """The one image of the case.

    Raises:
        ChallengeError: if there is none, or more than one.
    """
    where = folder / task.input_folder
    found = sorted(p for p in where.glob("*.mha") if not p.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found[:20])
        raise ChallengeError(
            f"{where} holds {len(found)} images, expected one: {names}\n"
            "  The container predicts one case a run; for many, use panther_jax.predict."
        )
    others = [f"{p.parent.name}/{p.name}" for p in sorted(folder.glob("images/*/*"))[:20]]
    raise ChallengeError(
        f"{where} holds no image *.mha; below {folder / 'images'} there is: "
        f"{', '.join(others) or 'nothing'}\n"
        "  Put the case there, or choose the other --task."
    )


def prepare_output(path: Path, *, overwrite: bool) -> None:
    """Make sure, before the work, that the mask can be written.

    Raises:
        ChallengeError: if it exists, or its folder cannot be written.
    """
    if path.exists() and not overwrite:
        raise ChallengeError(f"{path} exists; pass --overwrite, or another --output")
    try:
        require_writable(path.parent)
    except OSError as error:
        raise ChallengeError(f"{path.parent} cannot be written: {error.strerror}") from None


def write_mask(path: Path, mask: Bool[np.ndarray, "z y x"], geometry: Geometry) -> None:
    """Write 0 and 1 as uint8, uncompressed, with the geometry as it is; whole or not at all."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(geometry.spacing_zyx[::-1])
    image.SetOrigin(geometry.origin_xyz)
    image.SetDirection(geometry.direction)
    try:
        with writing(path) as temporary:
            sitk.WriteImage(image, str(temporary), useCompression=False)
    except RuntimeError as error:
        raise ChallengeError(f"{path} cannot be written: {error}".splitlines()[0]) from None
