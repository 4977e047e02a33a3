"""Downloaded archives and merged datasets as raw datasets in nnU-Net layout (spec 02 §3.13).

Cases are converted one by one: images are copied as they are, label maps recoded to PANTHER's
labels (1 tumour, 2 pancreas) on their own grid. A case is there when its label map is; what is
there is left alone, so running a conversion again continues it.
"""

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Integer

from panther_jax.imageio import (
    DatasetError,
    RawDataset,
    check_geometry,
    label_values,
    read_image,
    read_label,
    scan_raw,
    write_image,
    write_label,
)
from panther_jax.log import write_json
from panther_jax.plans import LabelValue, read_json
from panther_jax.store import (
    NUM_FOLDS,
    SPLITS,
    Split,
    StoreWriteError,
    make_splits,
    read_splits,
    splits_to_json,
)
from panther_jax.workers import Failure, map_cases

PROVENANCE = "conversion.json"
PANTHER_LABELS: Mapping[str, LabelValue] = {"background": 0, "tumor": 1, "pancreas": 2}
TUMOR_LABELS: Mapping[str, LabelValue] = {"background": 0, "tumor": 1}
TASK1_CASE = re.compile(r".*_0001")
SEARCH_DEPTH = 3

Task = Literal["t1", "t2"]
Progress = Callable[[str, int, int], None]

logger = logging.getLogger("panther_jax")


class ConversionError(ValueError):
    """Cases that cannot be converted; the message lists them all."""


@dataclass(frozen=True)
class Recoding:
    """New value of each label value; ``other`` is that of any further one, None refuses it."""

    values: tuple[tuple[int, int], ...]
    other: int | None = None

    def apply(self, label: Integer[np.ndarray, "z y x"]) -> Integer[np.ndarray, "z y x"]:
        """Recode a label map.

        Raises:
            DatasetError: naming values that have no new one.
        """
        table = dict(self.values)
        present = label_values(label)[0].tolist()
        unknown = [v for v in present if v not in table]
        if unknown and self.other is None:
            raise DatasetError(f"label values {unknown} are not known; expected {sorted(table)}")
        result = np.full_like(label, self.other or 0)
        for value in present:
            if value in table:
                result[label == value] = table[value]
        return result


# spec 02 §3.13; PANORAMA -> PANTHER is PANORAMA -> MSD, then the swap
IDENTITY = Recoding(((0, 0), (1, 1), (2, 2)))
MSD = Recoding(((0, 0), (1, 2), (2, 1)))
PANORAMA = Recoding(((0, 0), (1, 1), (4, 2), (5, 2)), other=0)


@dataclass(frozen=True)
class SourceCase:
    """One case of a source: an image file a channel, its label file, how that is recoded."""

    id: str
    images: tuple[Path, ...]
    label: Path
    recoding: Recoding


@dataclass(frozen=True)
class Conversion:
    """A dataset to be made. ``dataset`` is its dataset.json, but for the number of cases.

    ``problems`` are those of cases that lack a file, by id; ``provenance`` tells one conversion
    from another; ``splits`` are written too, unless there are none.
    """

    cases: tuple[SourceCase, ...]
    dataset: Mapping[str, Any]
    problems: Mapping[str, tuple[str, ...]]
    provenance: Mapping[str, Any]
    splits: tuple[Split, ...] = ()


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


def _name(path: Path) -> str:
    return str(path.resolve())


# --------------------------------------------------------------------------------------- merging


def merged_source(
    inputs: Sequence[Path], *, tumor_only: bool = False, task1_in_all: bool = False
) -> Conversion:
    """Put raw datasets together; labels are matched by name to those of the first.

    With ``tumor_only``, all but the label ``tumor`` becomes background. Splits are made a dataset
    and joined fold by fold; with ``task1_in_all``, cases of task 1 (``…_0001``) train in every fold
    and validate in none (spec 02 §3.13).

    Raises:
        DatasetError: if names clash, or channels or labels do not match.
    """
    scanned = [scan_raw(folder) for folder in inputs]
    raws = [raw for raw, _ in scanned]
    owner: dict[str, list[str]] = {}
    for raw in raws:
        for case in raw.cases:
            owner.setdefault(case.id, []).append(str(raw.folder))
    clashes = [f"  {i}: {' and '.join(f)}" for i, f in sorted(owner.items()) if len(f) > 1]
    if clashes:
        raise DatasetError(
            "\n".join([f"{len(clashes)} case names are in two datasets:", *clashes])
            + "\n  Rename the cases of one dataset; nothing was written."
        )
    problems = {
        key if key in owner else f"{raw.name}/{key}": texts
        for raw, found in scanned
        for key, texts in found.items()
    }
    cases = []
    for raw in raws:
        recoding = _merged_recoding(raw, raws[0], tumor_only)
        for case in raw.cases:
            if case.id not in problems:
                assert case.label is not None, case.id
                cases.append(SourceCase(case.id, case.images, case.label, recoding))
    first = raws[0].dataset
    dataset = {
        "channel_names": first.get("channel_names", first.get("modality")),
        **({"labels": dict(TUMOR_LABELS)} if tumor_only else raws[0].labels.to_dataset_json()),
        "file_ending": raws[0].file_ending,
        "description": f"merged from {', '.join(raw.name for raw in raws)}",
    }
    return Conversion(
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        dataset=dataset,
        problems=problems,
        provenance={
            "converter": "merge",
            "sources": [_name(raw.folder) for raw in raws],
            "tumor_only": tumor_only,
            "task1_in_all": task1_in_all,
        },
        splits=merged_splits(raws, task1_in_all=task1_in_all),
    )


def _merged_recoding(raw: RawDataset, first: RawDataset, tumor_only: bool) -> Recoding:
    channels = [r.dataset.get("channel_names", r.dataset.get("modality")) for r in (raw, first)]
    if channels[0] != channels[1]:
        raise DatasetError(
            f"{raw.folder} has channels {channels[0]}, {first.folder} {channels[1]}; only datasets "
            "of the same channels can be merged"
        )
    names, wanted = dict(raw.labels.names), dict(first.labels.names)
    if tumor_only:
        tumor = names.get("tumor")
        if not isinstance(tumor, int):
            raise DatasetError(
                f"{raw.folder}: --tumor-only needs a label 'tumor' of one value, found {tumor!r}"
            )
        return Recoding(((tumor, 1),), other=0)
    if raw.labels.has_regions or first.labels.has_regions:
        if raw.labels != first.labels:
            raise DatasetError(f"{raw.folder} and {first.folder} declare different regions")
        return Recoding(tuple((v, v) for v in raw.labels.allowed_values))
    if set(names) != set(wanted):
        raise DatasetError(
            f"{raw.folder} has labels {sorted(names)}, {first.folder} {sorted(wanted)}; only "
            "datasets of the same labels can be merged (or all of them with --tumor-only)"
        )
    return Recoding(tuple((_one(names[n]), _one(wanted[n])) for n in names))


def _one(value: LabelValue) -> int:
    return value[0] if isinstance(value, tuple) else value


def merged_splits(raws: Sequence[RawDataset], *, task1_in_all: bool = False) -> tuple[Split, ...]:
    """Join the datasets' own splits, or nnU-Net's five folds of each, fold by fold.

    Empty if a dataset has neither splits nor enough cases for them.

    Raises:
        DatasetError: if numbers of folds differ, or with ``task1_in_all`` no case is of task 1, all
            are, or splits cannot be made.
    """
    parts, always = [], []
    for raw in raws:
        ids = [case.id for case in raw.cases]
        if task1_in_all:
            always += [i for i in ids if TASK1_CASE.fullmatch(i)]
            ids = [i for i in ids if not TASK1_CASE.fullmatch(i)]
        if ids:
            parts.append((raw, _splits_of(raw, ids)))
    if task1_in_all and (not always or not parts):
        raise DatasetError(
            f"--task1-in-all: {'no' if not always else 'every'} case is of task 1 (its name ends "
            "with _0001); merge both tasks"
        )
    if not all(splits for _, splits in parts):
        few = ", ".join(raw.name for raw, splits in parts if not splits)
        if task1_in_all:
            raise DatasetError(f"--task1-in-all: {few} has too few cases for {NUM_FOLDS} folds")
        logger.warning("no %s: %s has too few cases; train with --fold all", SPLITS, few)
        return ()
    counts = {raw.name: len(splits) for raw, splits in parts}
    if len(set(counts.values())) > 1:
        raise DatasetError(f"datasets have splits of different numbers of folds: {counts}")
    folds = zip(*(splits for _, splits in parts), strict=True)
    return tuple(
        (
            (*always, *(i for train, _ in fold for i in train)),
            tuple(i for _, val in fold for i in val),
        )
        for fold in folds
    )


def _splits_of(raw: RawDataset, ids: Sequence[str]) -> tuple[Split, ...]:
    path = raw.folder / SPLITS
    if path.is_file():
        kept = set(ids)
        return tuple(
            (tuple(i for i in train if i in kept), tuple(i for i in val if i in kept))
            for train, val in read_splits(path)
        )
    return make_splits(ids) if len(ids) >= NUM_FOLDS else ()


# -------------------------------------------------------------------------------------- converting


@dataclass(frozen=True)
class _Job:
    case: SourceCase
    out: Path
    ending: str
    link: bool


def convert(
    conversion: Conversion,
    out: Path,
    *,
    link: bool = False,
    workers: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Make the dataset ``out``; its dataset.json comes last. Cases already there are left alone.

    With ``link``, images are hard links to the source's where the file system allows.

    Raises:
        DatasetError: if ``out`` exists and is not this conversion's.
        ConversionError: listing every broken case, after all others are done.
        WorkerError, StoreWriteError: at once, if a worker fails or the disk is full.
    """
    _prepare(conversion, out, overwrite)
    ending = str(conversion.dataset["file_ending"])
    jobs = [(c.id, _Job(c, out, ending, link)) for c in conversion.cases]
    waiting = [(i, job) for i, job in jobs if not _is_there(job)]
    num_done, num_cases = len(jobs) - len(waiting), len(jobs)
    if num_done:
        logger.info("%s: %d of %d cases are already there", out, num_done, num_cases)
    broken = dict(conversion.problems)
    for case_id, result in map_cases(_convert_case, waiting, workers=workers):
        if isinstance(result, Failure):
            broken[case_id] = (result.message,)
            logger.error("case %s cannot be used: %s", case_id, result.message)
            continue
        num_done += 1
        if progress is not None:
            progress(case_id, num_done, num_cases)
    if num_done:
        _finish(conversion, out, num_done, set(broken))
    if broken:
        raise ConversionError(_all_broken(broken, num_done, out))


def _prepare(conversion: Conversion, out: Path, overwrite: bool) -> None:
    known = out / PROVENANCE
    if overwrite and (known.is_file() or (out / "dataset.json").is_file()):
        shutil.rmtree(out)
    if known.is_file():
        if read_json(known) != dict(conversion.provenance):
            raise DatasetError(
                f"{out} holds another conversion: {read_json(known)}\n  Wanted: "
                f"{dict(conversion.provenance)}\n  Pass --overwrite, or choose another --out."
            )
    elif out.exists() and any(out.iterdir()):
        raise DatasetError(f"{out} exists and is not empty; choose another --out")
    for name in ("imagesTr", "labelsTr"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_json(known, dict(conversion.provenance))


def _targets(job: _Job) -> tuple[list[Path], Path]:
    count = len(job.case.images)
    images = [job.out / "imagesTr" / f"{job.case.id}_{c:04d}{job.ending}" for c in range(count)]
    return images, job.out / "labelsTr" / f"{job.case.id}{job.ending}"


def _is_there(job: _Job) -> bool:
    images, label = _targets(job)
    return label.is_file() and all(p.is_file() for p in images)


def _convert_case(job: _Job) -> None:
    case = job.case
    image, geometry = read_image(case.images)
    label, label_geometry = read_label(case.label)
    check_geometry(case.id, label_geometry, geometry, paths=(case.label, case.images[0]))
    try:
        label = case.recoding.apply(label)
    except DatasetError as error:
        raise DatasetError(f"{error}\n  label: {case.label}") from None
    if not label.any():
        logger.warning("case %s: no labelled voxel is left", case.id)
    targets, label_target = _targets(job)
    try:
        for source, target, channel in zip(case.images, targets, image, strict=True):
            if source.name.endswith(job.ending):
                _place(source, target, job.link)
            else:
                write_image(target, _as_stored(channel), geometry)
        write_label(label_target, label, label_geometry)
    except (OSError, DatasetError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise StoreWriteError(
            number or errno.EIO,
            f"case {case.id!r} cannot be written to {job.out}: {error}. Free some space, and run "
            "the same command again: it continues.",
        ) from error


def _place(source: Path, target: Path, link: bool) -> None:
    temporary = target.with_name(f".{uuid.uuid4().hex[:8]}-{target.name}")
    try:
        if link:
            try:
                os.link(source.resolve(), temporary)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source, temporary)
        else:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _as_stored(channel: np.ndarray) -> np.ndarray:
    """Whole numbers that fit as int16, as scanners store them; else float32."""
    limits = np.iinfo(np.int16)
    if channel.min() < limits.min or channel.max() > limits.max:
        return channel
    whole = channel.astype(np.int16)
    return whole if np.array_equal(whole, channel) else channel


def _finish(conversion: Conversion, out: Path, num_cases: int, broken: set[str]) -> None:
    if conversion.splits:
        kept = [
            tuple(tuple(i for i in ids if i not in broken) for ids in fold)
            for fold in conversion.splits
        ]
        write_json(out / SPLITS, splits_to_json(kept))  # type: ignore[arg-type]
    header = {**conversion.dataset, "numTraining": num_cases, "name": out.resolve().name}
    write_json(out / "dataset.json", header)


def _all_broken(broken: Mapping[str, Sequence[str]], num_done: int, out: Path) -> str:
    listed = "\n".join(f"case {i!r}: {text}" for i in sorted(broken) for text in broken[i])
    return (
        f"{len(broken)} cases cannot be used; the other {num_done} are in {out}.\n{listed}\n"
        "Correct or remove them, and run the same command again: it does only these."
    )
