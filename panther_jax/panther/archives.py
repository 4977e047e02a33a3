"""The cascade's downloads as raw data sets: PANTHER, MSD, PANORAMA (spec 02 §3.13)."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from panther_jax.base.errors import DatasetError
from panther_jax.images.conversion import Conversion, Recoding, SourceCase, _name
from panther_jax.plans.labels import LabelValue

PANTHER_LABELS: Mapping[str, LabelValue] = {"background": 0, "tumor": 1, "pancreas": 2}
SEARCH_DEPTH = 3

Task = Literal["t1", "t2"]

logger = logging.getLogger("panther_jax")
# spec 02 §3.13; PANORAMA -> PANTHER is PANORAMA -> MSD, then the swap
IDENTITY = Recoding(((0, 0), (1, 1), (2, 2)))
MSD = Recoding(((0, 0), (1, 2), (2, 1)))
PANORAMA = Recoding(((0, 0), (1, 1), (4, 2), (5, 2)), other=0)


# -------------------------------------------------------------------------------------- sources


def panther_source(source: Path, task: Task) -> Conversion:
    """Find the labelled cases of a task in the folder of the downloaded challenge data.

    Raises:
        FileNotFoundError, DatasetError: if there is no imagesTr and labelsTr, or more than one.
    """
    images_folder = _find_folder(source, "imagestr", task)
    labels_folder = _find_folder(source, "labelstr", task)
    images = {p.name.removesuffix("_0000.mha"): p for p in _files(images_folder, "_0000.mha")}
    labels = {p.name.removesuffix(".mha"): p for p in _files(labels_folder, ".mha")}
    name = {"t1": "task 1: T1 MRI", "t2": "task 2: T2 MR-Linac"}[task]
    header = _header("MRI", ".mha", f"PANTHER challenge, {name} (Zenodo 15192302)")
    provenance = {"converter": "panther", "task": task, "source": _name(source)}
    return _paired(images, labels, IDENTITY, header=header, provenance=provenance)


def msd_source(source: Path) -> Conversion:
    """Find the training cases of MSD Task07 (Pancreas).

    Raises:
        FileNotFoundError, DatasetError: if there is no imagesTr and labelsTr, or more than one.
    """
    ending = ".nii.gz"
    folders = [_find_folder(source, name, None) for name in ("imagestr", "labelstr")]
    images, labels = ({p.name.removesuffix(ending): p for p in _files(f, ending)} for f in folders)
    header = _header("CT", ending, "Medical Segmentation Decathlon, Task07 Pancreas")
    provenance = {"converter": "msd", "source": _name(source)}
    return _paired(images, labels, MSD, header=header, provenance=provenance)


def panorama_source(source: Path, *, manual_only: bool = False) -> Conversion:
    """Find the cases of PANORAMA that have both a scan and a label map, in any folders below.

    Scans end with ``_0000.nii.gz``; all other ``.nii.gz`` files are label maps, of which a manual
    one replaces an automatic one. Batches that are not downloaded are simply not there.

    Raises:
        FileNotFoundError: if no scan has a label map.
    """
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    problems: dict[str, tuple[str, ...]] = {}
    for path in sorted(_visible(source.rglob("*.nii.gz")), key=_automatic):
        stem = path.name.removesuffix(".nii.gz")
        found, case_id = (images, stem[:-5]) if stem.endswith("_0000") else (labels, stem)
        automatic = found is labels and _automatic(path)[0]
        if automatic and (manual_only or case_id in labels):
            continue
        if case_id in found:
            problems[case_id] = (f"two files of one name: {found[case_id]} and {path}",)
        found.setdefault(case_id, path)
    both = sorted(set(images) & set(labels))
    if not both:
        raise FileNotFoundError(
            f"{source}: {len(images)} scans (CASE_0000.nii.gz) and {len(labels)} label maps "
            "(CASE.nii.gz), none of them of the same case\n  Unpack the batches of the scans and "
            "the repository panorama_labels below one folder."
        )
    logger.info(
        "PANORAMA: %d cases; %d scans without label map and %d label maps without scan left out",
        *(len(both), len(images) - len(both), len(labels) - len(both)),
    )
    cases = tuple(
        SourceCase(i, (images[i],), labels[i], PANORAMA) for i in both if i not in problems
    )
    provenance = {"converter": "panorama", "manual_only": manual_only, "source": _name(source)}
    header = _header("CT", ".nii.gz", "PANORAMA, pancreas and PDAC lesion")
    return Conversion(cases, header, problems, provenance)


def _automatic(path: Path) -> tuple[bool, str]:
    return any("automatic" in part.casefold() for part in path.parts), str(path)


def _header(channel: str, ending: str, description: str) -> dict[str, Any]:
    return {
        "channel_names": {"0": channel},
        "labels": dict(PANTHER_LABELS),
        "file_ending": ending,
        "description": description,
    }


def _paired(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    recoding: Recoding,
    *,
    header: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Conversion:
    problems: dict[str, tuple[str, ...]] = {}
    for case_id in sorted(set(images) ^ set(labels)):
        path, missing = (
            (images[case_id], "label map") if case_id in images else (labels[case_id], "image")
        )
        problems[case_id] = (f"no {missing} for {path}",)
    cases = tuple(
        SourceCase(i, (images[i],), labels[i], recoding) for i in sorted(set(images) & set(labels))
    )
    return Conversion(cases, header, problems, provenance)


def _find_folder(source: Path, name: str, task: Task | None) -> Path:
    """The one folder of a name, in any case, at most a few levels below the source."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder; pass that of the unpacked download")
    levels = ["*/" * depth for depth in range(SEARCH_DEPTH)]
    below = [p for level in levels for p in source.glob(f"{level}*") if p.is_dir()]
    found = [p for p in below if p.name.casefold() == name]
    if task is not None:
        # the archive's folders are PANTHER_Task1 and PANTHER_Task2; a renamed one is taken as told
        other = {"t1": "2", "t2": "1"}[task]
        found = [p for p in found if not _names_task(p, source, other)]
        if len(found) > 1:
            found = [p for p in found if _names_task(p, source, task[1])]
    if len(found) != 1:
        what = "no folder" if not found else f"{len(found)} folders"
        raise DatasetError(
            f"{source}: {what} named {name!r} (in any case)"
            + (f" of task {task[1]}" if task else "")
            + f" at most {SEARCH_DEPTH} levels below; expected one\n  Unpack the archive, and pass "
            "the folder that it makes."
        )
    return found[0]


def _names_task(path: Path, source: Path, number: str) -> bool:
    below = path.resolve().relative_to(source.resolve().parent)
    return re.search(rf"task[ _-]?{number}", str(below), re.IGNORECASE) is not None


def _files(folder: Path, ending: str) -> list[Path]:
    files = [p for p in _visible(folder.iterdir()) if p.name.endswith(ending)]
    if not files:
        raise FileNotFoundError(f"{folder} holds no file that ends with {ending!r}")
    return files


def _visible(paths: Iterable[Path]) -> Iterable[Path]:
    return (p for p in paths if p.is_file() and not p.name.startswith("."))  # leavings of macOS
