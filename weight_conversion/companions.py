"""What nnU-Net reads beside the weights of a model: complete plans, validation, its data folders.

A run's own plans say what training needs; nnU-Net also wants the intensities of every channel, and
its commands look for label maps, splits and plans in places of theirs.
"""

import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panther_jax.base.console import announced
from panther_jax.base.errors import PantherError
from panther_jax.base.files import read_object, write_json
from panther_jax.config.places import Places
from panther_jax.images.raw_dataset import RawDataset, open_raw
from panther_jax.plans.plans import NORMALIZATION_BY_CHANNEL, Plans
from panther_jax.store.layout import FINGERPRINT

LOGGER = logging.getLogger("panther_jax")
INTENSITY = "foreground_intensity_properties_per_channel"
NUMBERS = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
USES_INTENSITY = NORMALIZATION_BY_CHANNEL["ct"]
DATASET_NAME = re.compile(r"Dataset\d{3}_\w+")
VALIDATIONS = ("validation_final", "validation_best")


class ExportError(PantherError, ValueError):
    """A run or bundle that cannot be exported."""


@dataclass(frozen=True)
class Sources:
    """Where a model's data is: the raw data set and the store, each None where it is not known."""

    raw: Path | None = None
    store: Path | None = None

    def fingerprint(self, *, measure: bool = False, workers: int = 1) -> dict[str, Any] | None:
        """The fingerprint kept in the store, else of the raw data set if it is to be measured.

        Raises:
            DatasetError: naming the cases that cannot be read.
        """
        kept = None if self.store is None else self.store / FINGERPRINT
        if kept is not None and kept.is_file():
            return read_object(kept)
        if not measure or self.raw is None:
            return None
        from panther_jax.planner.fingerprint import extract_fingerprint

        raw: RawDataset = open_raw(self.raw)
        with announced(f"measuring the intensities of {len(raw.cases)} cases of {self.raw}"):
            return extract_fingerprint(raw, workers=workers)


def find_sources(
    model: Path, dataset_name: str, raw: Path | None = None, store: Path | None = None
) -> Sources:
    """The data named, else that which a run was trained on, as it recorded or as it lies.

    Raises:
        FileNotFoundError: if what was named does not exist.
    """
    for path, what in ((raw, "--raw"), (store, "--store")):
        if path is not None and not path.is_dir():
            raise FileNotFoundError(f"{what} {path} is not a folder")
    for record in sorted(model.glob("fold_*/run.json")):
        about = read_object(record)
        store = store or _folder(about.get("store"))
        raw = raw or _folder(about.get("raw"))
    store = store or _store_of_references(model)
    return Sources(raw or _raw_of(store, dataset_name), store)


def _folder(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and Path(value).is_dir() else None


def _store_of_references(model: Path) -> Path | None:
    """The store whose label maps the validation compared with."""
    for path in sorted(model.glob("fold_*/validation_*/summary.json")):
        for case in read_object(path).get("metric_per_case", ())[:1]:
            folder = Path(str(case.get("reference_file"))).parent.parent
            if (folder / "plans.json").is_file():
                return folder
    return None


def _raw_of(store: Path | None, dataset_name: str) -> Path | None:
    """The raw data set of the store's root (``ROOT/store/NAME/...``), or of ``nnUNet_raw``."""
    root = Path() if store is None else Path(*store.resolve().parts[:-3])
    try:
        return Places(root).raw(dataset_name)
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------------------------- what it says


def complete_dataset(dataset: Mapping[str, Any], num_cases: int | None) -> dict[str, Any]:
    """A dataset.json with all entries that nnU-Net reads."""
    complete = {"file_ending": ".nii.gz", **dataset}
    if "channel_names" not in complete and "modality" in complete:
        complete["channel_names"] = complete.pop("modality")
    if num_cases is not None:
        complete.setdefault("numTraining", num_cases)
    return complete


def complete_plans(
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    fingerprint: Mapping[str, Any] | None,
    *,
    model: Path,
) -> dict[str, Any]:
    """Plans with the intensities of every channel and, where measured, the median case.

    Without measurements, a channel whose normalisation uses none gets NaN, and the log says so.

    Raises:
        ExportError: if the normalisation of a channel needs what is not known.
    """
    read = Plans.from_nnunet(plans, dataset)
    known = plans.get(INTENSITY) or {}
    measured = (fingerprint or {}).get(INTENSITY) or {}
    channels = {}
    unknown = []
    for number, scheme in enumerate(read.normalization):
        entry = known.get(str(number)) or measured.get(str(number))
        if entry is None:
            unknown.append((number, scheme))
            entry = dict.fromkeys(NUMBERS, math.nan)
        channels[str(number)] = dict(entry)
    _tell_of_unknown(model, unknown)
    return {
        **_medians(read, fingerprint),
        **plans,
        INTENSITY: channels,
        "configurations": {
            read.configuration: {
                **_median_size(read, fingerprint),
                **plans["configurations"][read.configuration],
            }
        },
    }


def lacks_intensity(plans: Mapping[str, Any]) -> bool:
    """Whether plans hold no intensities of some channel."""
    entries = plans["configurations"].values()
    known = plans.get(INTENSITY) or {}
    return any(len(known) < len(entry.get("normalization_schemes", ())) for entry in entries)


def _tell_of_unknown(model: Path, unknown: Sequence[tuple[int, str]]) -> None:
    if not unknown:
        return
    named = ", ".join(f"{number} ({scheme})" for number, scheme in unknown)
    remedy = (
        "name the raw data set with --raw, or the store with --store if it holds the fingerprint"
    )
    if any(scheme == USES_INTENSITY for _, scheme in unknown):
        raise ExportError(
            f"{model}: the intensities of channel {named} are not known, and nnU-Net normalises by "
            f"them\n  To measure them, {remedy}."
        )
    LOGGER.warning(
        "%s: the intensities of channel %s are not known and are written as NaN; the "
        "normalisation uses none, so that predictions are the same\n  To measure them, %s.",
        model,
        named,
        remedy,
    )


def _medians(plans: Plans, fingerprint: Mapping[str, Any] | None) -> dict[str, Any]:
    import numpy as np

    if fingerprint is None:
        return {}
    order = list(plans.transpose_forward)
    shapes, spacings = (
        np.median(np.asarray(fingerprint[key], float), axis=0)[order]
        for key in ("shapes_after_crop", "spacings")
    )
    return {
        "original_median_spacing_after_transp": [float(s) for s in spacings],
        "original_median_shape_after_transp": [round(float(n)) for n in shapes],
    }


def _median_size(plans: Plans, fingerprint: Mapping[str, Any] | None) -> dict[str, Any]:
    """The median case in voxels of the network's grid; of 2-D configurations, of its slices."""
    import numpy as np

    if fingerprint is None:
        return {}
    order = list(plans.transpose_forward)[-len(plans.spacing) :]
    shapes, spacings = (
        np.asarray(fingerprint[key], float)[:, order] for key in ("shapes_after_crop", "spacings")
    )
    sizes = np.round(shapes * spacings / np.asarray(plans.spacing))
    return {"median_image_size_in_voxels": [float(n) for n in np.median(sizes, axis=0)]}


# ------------------------------------------------------------------------------------ validation


def copy_validation(fold: Path, target: Path, *, final: Path, ending: str) -> bool:
    """Copy a fold's validation to ``target``, with its paths as they are at ``final``.

    Label maps (``ending``), probabilities and nnU-Net's summary; whether there was one.
    """
    found = next((f for n in VALIDATIONS if (f := fold / n / "summary.json").is_file()), None)
    if found is None:
        return False
    summary = read_object(found)
    target.mkdir(parents=True)
    for case in summary["metric_per_case"]:
        name = Path(case["prediction_file"]).name
        case["prediction_file"] = str(final / name)
        stem = name.removesuffix(ending)
        for kind in (ending, ".npz", ".pkl"):
            path = found.parent / f"{stem}{kind}"
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    write_json(target / "summary.json", summary)
    return True


# ---------------------------------------------------------------------------------- preprocessed


def write_preprocessed(
    folder: Path,
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    *,
    sources: Sources,
    fingerprint: Mapping[str, Any] | None,
) -> Path:
    """Put plans, dataset.json, splits and label maps where nnU-Net's training commands look.

    ``folder`` is that of ``nnUNet_preprocessed``. What is there stays; the configuration is added
    to plans that are there. Returns the folder of the data set.

    Raises:
        ExportError: if plans of this name hold another configuration of this name.
    """
    target = folder / plans["dataset_name"]
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{plans['plans_name']}.json"
    there = read_object(path) if path.is_file() else dict(plans)
    for name, entry in plans["configurations"].items():
        if there["configurations"].get(name, entry) != entry:
            raise ExportError(
                f"{path} holds another configuration {name!r}; move that file away, or train under "
                "another --data.plans-name"
            )
    merged = {**there, "configurations": {**there["configurations"], **plans["configurations"]}}
    write_json(path, merged)
    for name, value in (("dataset.json", dataset), (FINGERPRINT, fingerprint)):
        if value is not None and not (target / name).is_file():
            write_json(target / name, value)
    if sources.store is not None:
        for name, goal in (
            ("splits_final.json", "splits_final.json"),
            ("references", "gt_segmentations"),
        ):
            _copy_missing(sources.store / name, target / goal)
    return target


def _copy_missing(source: Path, target: Path) -> None:
    if target.exists() or not source.exists():
        return
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
