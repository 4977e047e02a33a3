"""nnU-Net's own preprocessed folders read as they are: ``.b2nd``, ``.npz``, ``.npy``, and ``.pkl``.

The only place where a pickle is read or written (00 §0.3). It is read by an unpickler that builds
builtin containers, numbers and numeric NumPy arrays, and nothing else: whatever else a file names
is refused before anything of it runs.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base.errors import FileError, StoreError
from panther_jax.base.files import read_json, read_object
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import LabelValue
from panther_jax.plans.plans import Plans, resolve_configuration
from panther_jax.store.compressed import (
    DAMAGES,
    CompressedArray,
    damaged,
    open_b2nd,
    open_npz,
)
from panther_jax.store.pickles import read_pickle

DATASET = "dataset.json"
GROUND_TRUTHS = "gt_segmentations"
PLANS_KEYS = ("plans_name", "configurations", "transpose_forward")

logger = logging.getLogger("panther_jax")


@dataclass(frozen=True)
class NnunetFolder:
    """A preprocessed folder: its plans and dataset.json lie in the folder above."""

    folder: Path
    plans: Plans
    dataset: dict[str, Any]
    case_ids: tuple[str, ...]


@dataclass(frozen=True)
class NnunetCase:
    """What nnU-Net stored of a case; locations are z, y, x in the order of the file."""

    image: np.ndarray | CompressedArray
    label: np.ndarray | CompressedArray
    locations: tuple[tuple[LabelValue, np.ndarray], ...]
    properties: Properties


# ------------------------------------------------------------------------------------- folders


def is_nnunet_folder(folder: Path) -> bool:
    """Tell whether a folder holds cases as nnU-Net stores them."""
    return folder.is_dir() and bool(_case_ids(folder))


def open_folder(folder: Path) -> NnunetFolder:
    """Read plans, dataset.json and the list of cases.

    Several plans can share a folder; those that it is named after are taken, and the log says so.

    Raises:
        FileNotFoundError: if no plans in the folder above make this folder.
    """
    folder = folder.resolve()
    dataset = read_object(folder.parent / DATASET)
    plans, configuration = _plans_of(folder)
    return NnunetFolder(
        folder, Plans.from_nnunet(plans, dataset, configuration), dataset, _case_ids(folder)
    )


def _case_ids(folder: Path) -> tuple[str, ...]:
    return tuple(
        sorted(p.stem for p in folder.glob("*.pkl") if _array_file(folder, p.stem) is not None)
    )


def _array_file(folder: Path, case_id: str) -> Path | None:
    # spec 02 §4.8: an unpacked .npy lies beside its .npz and holds the same
    files = (folder / f"{case_id}{ending}" for ending in (".b2nd", ".npy", ".npz"))
    return next((f for f in files if f.is_file()), None)


def _plans_of(folder: Path) -> tuple[dict[str, Any], str]:
    found = []
    for path in sorted(folder.parent.glob("*.json")):
        plans = _plans_json(path)
        for name in plans.get("configurations", ()):
            entry = resolve_configuration(plans, name)
            if entry.get("data_identifier") == folder.name:
                named_after = f"{plans['plans_name']}_{name}" == folder.name
                inherited = "inherits_from" in entry
                found.append((not named_after, inherited, path.name, name, plans))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds cases of nnU-Net, but no plans file in {folder.parent} has a "
            f"configuration with data_identifier {folder.name!r}\n  Copy the plans (and "
            "dataset.json) there, under the folder's own name."
        )
    found.sort(key=lambda item: item[:4])
    _, _, file, name, plans = found[0]
    if len(found) > 1:
        others = ", ".join(f"{i[2]} {i[3]}" for i in found[1:])
        logger.info("%s: taken for %s of %s (also made by %s)", folder, name, file, others)
    return plans, name


def _plans_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileError:
        return {}
    return value if isinstance(value, dict) and all(k in value for k in PLANS_KEYS) else {}


# --------------------------------------------------------------------------------------- cases


def read_folder_case(source: NnunetFolder, case_id: str) -> NnunetCase:
    """Open one case; ``.npy`` files are memory-mapped, compressed ones decompressed when indexed.

    Raises:
        StoreError: if a file is missing, damaged, or not what nnU-Net writes.
        ModuleNotFoundError: naming what reads ``.b2nd`` files, where it is not installed.
    """
    path = _array_file(source.folder, case_id)
    if path is None:
        raise StoreError(f"case {case_id!r} is not in {source.folder}; run nnU-Net's preprocessing")
    opening = {".b2nd": _open_b2nd, ".npz": _open_npz, ".npy": _open_npy}[path.suffix]
    try:
        image, label = opening(path)
    except DAMAGES as error:
        raise damaged(path, error) from None
    _check_arrays(image, label, path)
    pickled = path.with_suffix(".pkl")
    entry = read_pickle(pickled)
    try:
        properties = _properties(entry, source.plans)
        locations = _locations(entry.get("class_locations") or {})
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreError(
            f"{pickled} is not what nnU-Net's SimpleITKIO leads to: {type(error).__name__}: {error}"
            "\n  Preprocess the raw dataset with panther_jax.preprocess instead."
        ) from None
    plane = replace(label, lead=(0,)) if isinstance(label, CompressedArray) else label[0]
    return NnunetCase(image, plane, locations, properties)


def reference_file(source: NnunetFolder, case_id: str) -> Path:
    """The copy of the raw label map that nnU-Net keeps beside its preprocessed folders."""
    return source.folder.parent / GROUND_TRUTHS / f"{case_id}{source.dataset['file_ending']}"


def _open_b2nd(path: Path) -> tuple[CompressedArray, CompressedArray]:
    return open_b2nd(path), open_b2nd(path.with_name(f"{path.stem}_seg.b2nd"))


def _open_npz(path: Path) -> tuple[CompressedArray, CompressedArray]:
    return open_npz(path, "data"), open_npz(path, "seg")


def _open_npy(path: Path) -> tuple[np.ndarray, np.ndarray]:
    files = (path, path.with_name(f"{path.stem}_seg.npy"))
    image, label = (np.load(f, mmap_mode="r", allow_pickle=False) for f in files)
    return image, label


def _check_arrays(
    image: np.ndarray | CompressedArray, label: np.ndarray | CompressedArray, path: Path
) -> None:
    fits = image.ndim == 4 and label.shape == (1, *image.shape[1:])
    if not fits or image.dtype != np.float32 or label.dtype.kind != "i":
        raise StoreError(
            f"{path}: image {image.dtype} {image.shape}, label {label.dtype} {label.shape}; "
            "expected float32 (channel, z, y, x) and integers (1, z, y, x)"
        )


def _properties(entry: Mapping[str, Any], plans: Plans) -> Properties:
    shape = tuple(int(n) for n in entry["shape_before_cropping"])
    sitk = entry["sitk_stuff"]
    geometry = Geometry(
        shape_zyx=tuple(shape[a] for a in plans.transpose_backward),
        spacing_zyx=tuple(float(s) for s in entry["spacing"]),
        origin_xyz=tuple(float(o) for o in sitk["origin"]),
        direction=tuple(float(d) for d in sitk["direction"]),
    )
    box = tuple((int(low), int(high)) for low, high in entry["bbox_used_for_cropping"])
    cropped = tuple(int(n) for n in entry["shape_after_cropping_and_before_resampling"])
    return Properties(geometry, shape, box, cropped)


def _locations(found: Mapping[Any, Any]) -> tuple[tuple[LabelValue, np.ndarray], ...]:
    result = []
    for key, rows in found.items():
        value = tuple(int(k) for k in key) if isinstance(key, (tuple, list)) else int(key)
        # rows are (channel, z, y, x); an absent class has an empty list
        coordinates = np.asarray(rows, np.int32).reshape(-1, 4)[:, 1:]
        result.append((value, np.ascontiguousarray(coordinates)))
    return tuple(result)
