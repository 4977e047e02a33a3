"""Cases of any source as a raw data set in nnU-Net's layout: labels recoded, images as they are."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from panther_jax.base.errors import PantherError, WriteError
from panther_jax.base.files import read_json, write_json, writing
from panther_jax.base.workers import Failure, map_cases
from panther_jax.images.geometry import check_geometry
from panther_jax.images.imageio import (
    DatasetError,
    label_values,
    read_image,
    read_label,
    write_image,
    write_label,
)
from panther_jax.images.splits import SPLITS, Split, splits_to_json

PROVENANCE = "conversion.json"
Progress = Callable[[str, int, int], None]

logger = logging.getLogger("panther_jax")


class ConversionError(PantherError, ValueError):
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


def _name(path: Path) -> str:
    return str(path.resolve())


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
        WorkerError, WriteError: at once, if a worker fails or the disk is full.
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
    except DatasetError as error:  # SimpleITK does not say why
        raise WriteError(
            errno.EIO,
            f"case {case.id!r} cannot be written to {job.out}: {error}. Free some space, and run "
            "the same command again: it continues.",
        ) from error


def _place(source: Path, target: Path, link: bool) -> None:
    with writing(target) as temporary:
        if link:
            with contextlib.suppress(OSError):  # another file system, or one without hard links
                os.link(source.resolve(), temporary)
                return
        shutil.copyfile(source, temporary)


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
