"""Overlays of validated cases for the report: finding image, reference and prediction, and views.

The image is looked for in the raw data set, else in the preprocessed store, whose voxels are put
back on the raw grid by the nearest one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from panther_jax.base.files import read_json
from panther_jax.evaluation.metrics import scored_label
from panther_jax.images import imageio, raw_dataset
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import LabelValue
from panther_jax.reporting import pictures
from panther_jax.reporting.pictures import Mask, View
from panther_jax.reporting.records import CaseRecord, RunRecord
from panther_jax.store.layout import REFERENCES

CT_WINDOW = (-160.0, 240.0)  # Hounsfield units, soft tissue of the abdomen


@dataclass(frozen=True)
class CaseViews:
    """Three planes of a case, with what a reader should know: notes, or why there are none."""

    views: tuple[View, ...]
    notes: tuple[str, ...]


def case_views(
    cases: Sequence[CaseRecord], runs: Sequence[RunRecord], *, raw: Path | None
) -> CaseViews:
    """Three planes of one case, with its reference and the prediction of each run outlined.

    ``cases`` are the same case in each of ``runs``. With one run all classes are outlined, with
    several only the scored one. What cannot be read leaves a note, never an error.
    """
    run, case = runs[0], cases[0]
    if run.labels is None:
        return CaseViews((), ("no overlay: the run's dataset.json cannot be used",))
    notes: list[str] = []
    reference = _label(_reference_file(case, run, raw), "reference", notes)
    predictions = [
        _label(c.prediction, f"prediction of {r.name}", notes)
        for c, r in zip(cases, runs, strict=True)
    ]
    grids = [found[1] for found in (reference, *predictions) if found is not None]
    if not grids:
        return CaseViews((), tuple(notes))
    geometry = grids[0]
    found = _image(case.id, run, raw, geometry)
    if isinstance(found, str):
        return CaseViews((), (*notes, found))
    image, note = found
    notes += [note] if note else []
    main = scored_label(run.labels)[1]
    others = [value for _, value in run.labels.classes if value != main] if len(runs) == 1 else []
    masks = []
    for who, labelled in enumerate((reference, *predictions)):
        if labelled is None:
            continue
        if labelled[0].shape != geometry.shape_zyx:
            notes.append(f"prediction of {runs[who - 1].name} is on another grid, and not shown")
            continue
        masks.append(Mask(who, True, _members(labelled[0], main)))
        masks += [Mask(who, False, _members(labelled[0], value)) for value in others]
    window = CT_WINDOW if _is_ct(run) else None
    views = pictures.three_planes(image, _drawn_last(masks), geometry, window=window)
    return CaseViews(views, tuple(notes))


def _drawn_last(masks: Sequence[Mask]) -> list[Mask]:
    """Main outlines over the others."""
    return sorted(masks, key=lambda m: m.strong)


def _members(label: np.ndarray, value: LabelValue) -> np.ndarray:
    return np.isin(label, value)


def _is_ct(run: RunRecord) -> bool:
    names = run.dataset.get("channel_names", run.dataset.get("modality", {}))
    return isinstance(names, dict) and str(names.get("0", "")).casefold() == "ct"


def _label(path: Path | None, what: str, notes: list[str]) -> tuple[np.ndarray, Geometry] | None:
    if path is None:
        notes.append(f"{what}: no file is known")
        return None
    try:
        return imageio.read_label(path)
    except (OSError, ValueError, RuntimeError) as error:
        notes.append(f"{what}: {_first_line(error)}")
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reference_file(case: CaseRecord, run: RunRecord, raw: Path | None) -> Path | None:
    """Where validation read it, else in the raw data set or in the store."""
    if case.reference is None:
        return None
    name, given = case.reference.name, case.reference
    choices = [given, *(f / "labelsTr" / name for f in raw_folders(run, raw))]
    choices += [f / REFERENCES / name for f in _stores(run)]
    return next((p for p in choices if p.is_file()), given)


# --------------------------------------------------------------------------------------- image


def raw_folders(run: RunRecord, raw: Path | None) -> tuple[Path, ...]:
    """Folders that may be the run's raw data set, best guess first; ``raw`` alone if given."""
    if raw is not None:
        return (raw,)
    name = Path(run.dataset_name).name
    folders = [run.folder.parent.parent / "raw" / name]
    for fold in run.folds:
        words = fold.info.get("command")
        words = [str(w) for w in words] if isinstance(words, list) else []
        folders += [Path(after) for word, after in zip(words, words[1:]) if word == "--raw"]  # noqa: B905
        folders += [Path(w.partition("=")[2]) for w in words if w.startswith("--raw=")]
    if os.environ.get("nnUNet_raw"):
        folders.append(Path(os.environ["nnUNet_raw"]) / name)
    return tuple(f for f in folders if f.is_dir())


def _stores(run: RunRecord) -> tuple[Path, ...]:
    """Folders that may be the run's store: the references' parent, or the usual place."""
    known = {
        case.reference.parent.parent
        for fold in run.folds
        for validation in fold.validations.values()
        for case in validation.cases
        if case.reference is not None and case.reference.parent.name == REFERENCES
    }
    usual = run.folder.parent.parent / "store" / Path(run.dataset_name).name
    return tuple(f for f in (*sorted(known), *sorted(usual.glob("*"))) if f.is_dir())


def _image(
    case_id: str, run: RunRecord, raw: Path | None, geometry: Geometry
) -> tuple[Float32[np.ndarray, "z y x"], str] | str:
    """The first channel on the label's grid, with a note; or why there is none."""
    reasons = []
    for folder in raw_folders(run, raw):
        try:
            found = next(c for c in raw_dataset.scan_raw(folder)[0].cases if c.id == case_id)
            image, image_geometry = imageio.read_image(found.images[:1])
        except StopIteration:
            reasons.append(f"{folder} has no case {case_id}")
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(_first_line(error))
        else:
            if image_geometry.shape_zyx == geometry.shape_zyx:
                return image[0], ""
            reasons.append(f"{found.images[0]} is not on the grid of the label maps")
    for store in _stores(run):
        try:
            image = _stored_image(store, case_id, run)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reasons.append(f"{store}: {_first_line(error)}")
        else:
            if image.shape == geometry.shape_zyx:
                return image, "image from the preprocessed store"
            reasons.append(f"{store} has the case on another grid")
    looked = "; ".join(reasons) or "neither raw data set nor store is where it was"
    return f"no overlay: the image is no longer there ({looked}); name the data set with --raw"


def _stored_image(store: Path, case_id: str, run: RunRecord) -> Float32[np.ndarray, "z y x"]:
    """The store's image on the raw grid, by nearest voxels; its minimum outside the crop.

    Raises:
        OSError, ValueError, KeyError, TypeError: if it is not there or does not fit.
    """
    image = np.load(store / f"{case_id}.image.npy", mmap_mode="r", allow_pickle=False)[0]
    properties = Properties.from_json(read_json(store / f"{case_id}.json")["properties"])
    backward: Any = run.plans.get("transpose_backward", (0, 1, 2))
    indices = []
    for (low, high), size in zip(properties.crop_box, image.shape, strict=True):
        indices.append(((np.arange(high - low) + 0.5) / (high - low) * size).astype(int))
    whole = np.full(properties.shape_before_crop, float(image.min()), np.float32)
    whole[tuple(slice(low, high) for low, high in properties.crop_box)] = image[np.ix_(*indices)]
    return whole.transpose(backward)
