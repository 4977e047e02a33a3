"""Cases of any source as a raw data set in nnU-Net's layout: labels recoded, images as they are."""

import contextlib
import errno
import glob
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from panther_jax.base import sources
from panther_jax.base.errors import PantherError, WriteError
from panther_jax.base.files import move, read_object, write_json, writing
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
RECORD = "record"
"""Key of the provenance that holds what each case was made from."""
REMOVED = "removed"
"""Folder of the dataset to which cases go whose source is gone."""
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

    Cases whose source changed since are made again; those whose source is gone are moved aside.

    With ``link``, images are hard links to the source's where the file system allows.

    Raises:
        DatasetError: if ``out`` exists and is not this conversion's.
        ConversionError: listing every broken case, after all others are done.
        WorkerError, WriteError: at once, if a worker fails or the disk is full.
    """
    known = _prepare(conversion, out, overwrite)
    ending = str(conversion.dataset["file_ending"])
    jobs = [(c.id, _Job(c, out, ending, link)) for c in conversion.cases]
    _set_aside(out, [i for i in known if i not in dict(jobs)], ending)
    records = _unchanged(dict(jobs), known, out)
    waiting = [(i, job) for i, job in jobs if i not in records]
    num_done, num_cases = len(jobs) - len(waiting), len(jobs)
    if num_done:
        logger.info("%s: %d of %d cases are already there", out, num_done, num_cases)
    broken = dict(conversion.problems)
    try:
        for case_id, result in map_cases(_convert_case, waiting, workers=workers):
            if isinstance(result, Failure):
                broken[case_id] = (result.message,)
                logger.error("case %s cannot be used: %s", case_id, result.message)
                continue
            num_done += 1
            records[case_id] = result
            if progress is not None:
                progress(case_id, num_done, num_cases)
    finally:  # also what an interrupted conversion has made is there
        _write_provenance(conversion, out, records)
    if num_done:
        _finish(conversion, out, num_done, set(broken))
    if broken:
        raise ConversionError(_all_broken(broken, num_done, out))


def _prepare(conversion: Conversion, out: Path, overwrite: bool) -> sources.Records:
    """Make the folders; gives what earlier calls recorded of the cases that they made."""
    known = out / PROVENANCE
    found: sources.Records = {}
    if overwrite and (known.is_file() or (out / "dataset.json").is_file()):
        shutil.rmtree(out)
    if known.is_file():
        stored = read_object(known)
        record = stored.pop(RECORD, None)
        if stored != dict(conversion.provenance):
            raise DatasetError(
                f"{out} holds another conversion: {stored}\n  Wanted: "
                f"{dict(conversion.provenance)}\n  Pass --overwrite, or choose another --out."
            )
        found = sources.from_json(record, known) if record is not None else {}
    elif out.exists() and any(out.iterdir()):
        raise DatasetError(f"{out} exists and is not empty; choose another --out")
    for name in ("imagesTr", "labelsTr"):
        (out / name).mkdir(parents=True, exist_ok=True)
    _write_provenance(conversion, out, found)
    return found


def _write_provenance(conversion: Conversion, out: Path, records: sources.Records) -> None:
    write_json(out / PROVENANCE, {**conversion.provenance, RECORD: sources.to_json(records)})


def _taken(case: SourceCase, known: sources.Record | None = None) -> sources.Record:
    """What a case is made from: its files, and how its label is recoded."""
    images = {f"image_{channel:04d}": path for channel, path in enumerate(case.images)}
    record = sources.taken({**images, "label": case.label}, known)
    return {**record, "recoding": {"sha256": f"{case.recoding.values} {case.recoding.other}"}}


def _unchanged(jobs: Mapping[str, "_Job"], known: sources.Records, out: Path) -> sources.Records:
    """The records of the cases that are there and whose sources are the same; names the others."""
    there = [i for i, job in jobs.items() if _is_there(job)]
    records, changed = {}, {}
    for case_id in there:
        if case_id not in known:
            changed[case_id] = "no record of its source"
            continue
        try:
            now = _taken(jobs[case_id].case, known[case_id])
        except OSError as error:  # named when it is converted
            changed[case_id] = str(error.strerror)
            continue
        why = sources.difference(sources.digests(known[case_id]), sources.digests(now))
        if why:
            changed[case_id] = why
        else:
            records[case_id] = now
    if changed:
        logger.warning(
            "%s: %d of %d cases changed: %s; they are made again",
            *(out, len(changed), len(jobs)),
            sources.named(f"{i} ({why})" for i, why in sorted(changed.items())),
        )
    for case_id in changed:
        images, label = _targets(jobs[case_id])
        for path in (label, *images):
            path.unlink()
    added = sorted(set(jobs) - set(there) - set(known))
    if known and added:
        logger.warning("%s: %d case(s) are new: %s", out, len(added), sources.named(added))
    return records


def _set_aside(out: Path, gone: Sequence[str], ending: str) -> None:
    """Move cases whose source is gone out of the dataset; there may be no other copy of them."""
    for case_id in gone:
        files = [*(out / "imagesTr").glob(f"{glob.escape(case_id)}_[0-9][0-9][0-9][0-9]{ending}")]
        for path in (*files, out / "labelsTr" / f"{case_id}{ending}"):
            if not path.is_file():
                continue
            target = out / REMOVED / path.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            move(path, target)
    if gone:
        logger.warning(
            "%s: the source of %d case(s) is gone; they are moved to %s: %s",
            *(out, len(gone), out / REMOVED, sources.named(sorted(gone))),
        )


def _targets(job: _Job) -> tuple[list[Path], Path]:
    count = len(job.case.images)
    images = [job.out / "imagesTr" / f"{job.case.id}_{c:04d}{job.ending}" for c in range(count)]
    return images, job.out / "labelsTr" / f"{job.case.id}{job.ending}"


def _is_there(job: _Job) -> bool:
    images, label = _targets(job)
    return label.is_file() and all(p.is_file() for p in images)


def _convert_case(job: _Job) -> sources.Record:
    case = job.case
    record = _taken(case)
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
    return record


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
