"""Predict the one case of a Grand Challenge container: ``python -m panther_jax.predict_challenge``.

The contract of the PANTHER containers (spec 05 §12): one image under ``images/<slug>`` of the
input folder, one mask of the tumour in ``images/pancreatic-tumor-segmentation``, same stem.
"""

import argparse
import dataclasses
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from panther_jax import command, roi
from panther_jax.combination import read_ensemble
from panther_jax.imageio import read_image
from panther_jax.metrics import TUMOR_NAMES
from panther_jax.plans import Geometry, Labels
from panther_jax.postprocess import filter_components, flat_labels, keep_largest_component
from panther_jax.predict import load, predict
from panther_jax.weights.names import published_checkpoint, resolve_model

LOGGER = logging.getLogger("panther_jax")

OUTPUT_FOLDER = Path("images") / "pancreatic-tumor-segmentation"
PANCREAS_NAMES = ("pancreas", "pancreatic")
FOLDS = ("0", "1", "2", "3", "4")
OF_ROI_FIRST = Path("-")  # the model of --component-filter, unless it is named
ROI_MARGIN_MM = 30.0  # spec 05 §13.3
SHARE_OF_LIMIT = 0.9  # of the time that is left: export and writing come after the network
MIN_SAMPLES = 3  # calls of the network before its pace is believed; the first one compiles


class ChallengeError(RuntimeError):
    """The container's input is not what the challenge promises, or the output cannot be written."""


@dataclass(frozen=True)
class ChallengeTask:
    """What differs between the two tasks (spec 05 §12.1)."""

    input_folder: Path
    checkpoint: str


TASKS = {
    "t1": ChallengeTask(Path("images") / "abdominal-t1-mri", "final"),
    "t2": ChallengeTask(Path("images") / "abdominal-t2-mri", "best"),
}


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
    probe = path.parent / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ChallengeError(f"{path.parent} cannot be written: {error.strerror}") from None


def write_mask(path: Path, mask: Bool[np.ndarray, "z y x"], geometry: Geometry) -> None:
    """Write 0 and 1 as uint8, uncompressed, with the geometry as it is; whole or not at all."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing(geometry.spacing_zyx[::-1])
    image.SetOrigin(geometry.origin_xyz)
    image.SetDirection(geometry.direction)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        sitk.WriteImage(image, str(temporary), useCompression=False)
        os.replace(temporary, path)
    except RuntimeError as error:
        raise ChallengeError(f"{path} cannot be written: {error}".splitlines()[0]) from None
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- command

EXAMPLE = """python -m panther_jax.predict_challenge --task t2 --model /opt/ml/model
  python -m panther_jax.predict_challenge --task t1 --model bundle --input in --output out \\
      --roi-first lowres_bundle --component-filter --time-limit 600"""


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.predict_challenge",
        "Predict the case of a PANTHER challenge container: one image in, one tumour mask out.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--task", choices=sorted(TASKS), required=True, help="t1: task 1, T1 MRI; t2: task 2, T2")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=Path, nargs="+", metavar="PATH",
        help="run, bundle, nnU-Net model folder, or known name; several: an ensemble",
    )  # fmt: skip
    what.add_argument("--ensemble", type=Path, metavar="SPEC.json", help="ensemble file")
    add("--root", type=Path, default=Path("data"), help="where known names are (default: data)")
    add("--input", type=Path, default=Path("/input"), help="default: %(default)s")
    add("--output", type=Path, default=Path("/output"), help="default: %(default)s")
    add("--folds", nargs="+", metavar="K", help="default: all that are there, in general 0 to 4")
    add("--checkpoint", choices=("final", "best"),
        help="default: final for t1, best for t2; of a known name the published one")  # fmt: skip
    add("--step-size", type=float, metavar="S", help="tile step, part of a tile (default: 0.5)")
    add("--mirror", action="store_true", help="average over mirrored images, 8 times the work")
    add("--roi-first", type=Path, metavar="MODEL",
        help="find the pancreas with it, predict only around it; whole image if none")  # fmt: skip
    add(
        "--roi-margin", type=float, default=ROI_MARGIN_MM, metavar="MM", help="default: %(default)s"
    )
    add("--component-filter", type=Path, nargs="?", const=OF_ROI_FIRST, metavar="MODEL",
        help="remove components outside the pancreas; MODEL or --roi-first's finds it")  # fmt: skip
    add("--largest-component", action="store_true", help="keep only the largest component")
    add("--time-limit", type=float, metavar="SECONDS",
        help="predict with fewer folds where all would take longer")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a mask that is there")
    return parser


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    step, limit = arguments.step_size, arguments.time_limit
    if step is not None and not 0 < step <= 1:
        parser.error(f"--step-size must be in (0, 1], found {step}")
    if limit is not None and not limit > 0:
        parser.error(f"--time-limit must be positive, found {limit}")
    if not 0 <= arguments.roi_margin < math.inf:
        parser.error(f"--roi-margin must not be negative, found {arguments.roi_margin}")
    if arguments.component_filter == OF_ROI_FIRST and arguments.roi_first is None:
        parser.error("--component-filter needs a MODEL that finds the pancreas, or --roi-first")
    given = [n for n in ("folds", "checkpoint", "step_size") if getattr(arguments, n) is not None]
    if arguments.ensemble is not None and (given or arguments.mirror):
        parser.error(
            "--folds, --checkpoint, --step-size and --mirror do not go with --ensemble: its file "
            "says so for each member"
        )


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.ensemble is not None:
        model = load(read_ensemble(arguments.ensemble))
    else:
        model = load(
            [resolve_model(m, arguments.root) for m in arguments.model],
            folds=arguments.folds or (),
            checkpoint=arguments.checkpoint
            or published_checkpoint(*arguments.model)
            or TASKS[arguments.task].checkpoint,
            mirror=arguments.mirror,
            step_size=arguments.step_size or 0.5,
        )
    for member in model.ensemble.members:
        if member.model.folds != FOLDS:
            LOGGER.info("%s: folds %s", member.model.name, " ".join(member.model.folds) or "-")
    _values(model.labels, TUMOR_NAMES)  # refuse before the work, not after
    roi_model = None if arguments.roi_first is None else _load_one(arguments.roi_first, arguments)
    filter_model = None
    if arguments.component_filter is not None:
        own = arguments.component_filter != OF_ROI_FIRST
        filter_model = _load_one(arguments.component_filter, arguments) if own else roi_model
    return Recipe(model, roi_model, arguments.roi_margin, filter_model, arguments.largest_component)


def _load_one(model: Path, arguments: argparse.Namespace) -> Any:
    checkpoint = published_checkpoint(model) or "final"
    return load(resolve_model(model, arguments.root), checkpoint=checkpoint)


def _run(arguments: argparse.Namespace, start: float) -> str:
    path = find_input(arguments.input, TASKS[arguments.task])
    output = arguments.output / OUTPUT_FOLDER / path.name
    prepare_output(output, overwrite=arguments.overwrite)
    from panther_jax import devices

    devices.use_compilation_cache()
    image, geometry = read_image([path])
    recipe = _recipe(arguments)
    loaded = time.monotonic()
    limit = arguments.time_limit
    mask = segment(recipe, image, geometry, deadline=None if limit is None else start + limit)
    predicted = time.monotonic()
    write_mask(output, mask, geometry)
    end = time.monotonic()
    LOGGER.info(
        "%s: %d tumour voxels; wall time %.1f s (read and load %.1f, predict %.1f, write %.1f)",
        path.name, int(mask.sum()), end - start, loaded - start, predicted - loaded,
        end - predicted,
    )  # fmt: skip
    if limit is not None and end - start > limit:
        LOGGER.warning("the time limit of %.0f s was exceeded", limit)
    return str(output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    start = time.monotonic()
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    _check(parser, arguments)
    return command.run(lambda: _run(arguments, start), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    raise SystemExit(main())
