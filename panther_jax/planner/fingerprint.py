"""The fingerprint of a raw data set: shapes, spacings, foreground intensities (spec 02 §2)."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from panther_jax.base import sources
from panther_jax.base.errors import DatasetError
from panther_jax.base.files import read_object, write_text
from panther_jax.base.workers import Failure, map_cases
from panther_jax.images.raw_dataset import Case, RawCase, RawDataset, read_case
from panther_jax.plans.labels import Labels
from panther_jax.preprocessing.cropping import crop_to_nonzero
from panther_jax.store.layout import FINGERPRINT
from panther_jax.store.sources import case_files

SAMPLE_BUDGET = 10**8
SAMPLE_SEED = 1234
PERCENTILES = (0.5, 50.0, 99.5)
RECORD = "sources"
"""Key of what a fingerprint was measured on; nnU-Net's files have none."""

logger = logging.getLogger("panther_jax")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CaseFingerprint:
    """What one case adds to a fingerprint; ``samples`` are foreground intensities, a channel."""

    shape_after_crop: tuple[int, ...]
    spacing_zyx: tuple[float, ...]
    relative_size: float
    samples: tuple[Float32[np.ndarray, " sample"], ...]


@dataclass(frozen=True)
class _Task:
    case: RawCase
    labels: Labels
    num_samples: int


def case_fingerprint(case: Case, num_samples: int) -> CaseFingerprint:
    """Measure one case: crop, and sample its foreground with replacement (spec 02 §2).

    Foreground is every label above 0, the ignore label included.

    Raises:
        DatasetError: if the case has no label.
    """
    if case.label is None:
        raise DatasetError(f"case {case.id!r} has no label map; the fingerprint needs one")
    image, label, _ = crop_to_nonzero(case.image, case.label)
    foreground = label > 0
    random = np.random.RandomState(SAMPLE_SEED)  # one a case, shared by its channels in turn
    samples = []
    for channel in image:
        pixels = channel[foreground]
        count = num_samples if pixels.size else 0
        samples.append(pixels[random.randint(0, pixels.size, size=count)] if count else pixels[:0])
    return CaseFingerprint(
        shape_after_crop=tuple(image.shape[1:]),
        spacing_zyx=case.geometry.spacing_zyx,
        relative_size=image[0].size / case.image[0].size,
        samples=tuple(samples),
    )


def extract_fingerprint(
    raw: RawDataset,
    *,
    budget: int = SAMPLE_BUDGET,
    workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure all training cases: the content of nnU-Net's ``dataset_fingerprint.json``.

    ``budget`` is the number of intensities sampled over all cases, a channel.

    Raises:
        DatasetError: listing every broken case, or if no case has foreground.
        WorkerError: naming the case, if a worker fails.
    """
    num_samples = int(budget // len(raw.cases))
    tasks = [(case.id, _Task(case, raw.labels, num_samples)) for case in raw.cases]
    found: dict[str, Any] = {}
    for case_id, result in map_cases(_read_and_measure, tasks, workers=workers):
        found[case_id] = result
        if progress is not None:
            progress(case_id, len(found), len(tasks))
    broken = [(i, r.message) for i, r in sorted(found.items()) if isinstance(r, Failure)]
    if broken:
        listed = "\n".join(f"case {case_id!r}: {message}" for case_id, message in broken)
        raise DatasetError(f"{len(broken)} of {len(tasks)} cases cannot be read\n{listed}")
    cases = [found[case.id] for case in raw.cases]
    return {
        "foreground_intensity_properties_per_channel": {
            str(channel): _intensity([case.samples[channel] for case in cases], raw)
            for channel in range(raw.num_channels)
        },
        "median_relative_size_after_cropping": float(np.median([c.relative_size for c in cases])),
        "shapes_after_crop": [list(case.shape_after_crop) for case in cases],
        "spacings": [list(case.spacing_zyx) for case in cases],
    }


def _read_and_measure(task: _Task) -> CaseFingerprint:
    return case_fingerprint(read_case(task.case, task.labels), task.num_samples)


def _intensity(samples: Sequence[np.ndarray], raw: RawDataset) -> dict[str, float]:
    values = np.concatenate(samples)
    if not values.size:
        raise DatasetError(
            f"{raw.folder}: no case has a voxel labelled above 0; expected foreground to measure"
        )
    low, median, high = np.percentile(values, PERCENTILES)
    return {
        "max": float(values.max()),
        "mean": float(values.mean()),
        "median": float(median),
        "min": float(values.min()),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
        "std": float(values.std()),
    }


def dataset_fingerprint(
    raw: RawDataset,
    folder: Path,
    *,
    workers: int = 0,
    clean: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read the fingerprint in ``folder``, else measure the dataset and write it there.

    Raises:
        DatasetError: if it is of another number of cases, or cases cannot be read.
    """
    path = folder / FINGERPRINT
    if path.is_file() and not clean:
        fingerprint = read_object(path)
        if RECORD in fingerprint:
            if not fingerprint_changes(fingerprint, raw, path):
                return fingerprint
            return _measured(raw, path, workers=workers, progress=progress)
        num_measured = len(fingerprint.get("spacings", ()))
        if num_measured != len(raw.cases):
            raise DatasetError(
                f"{path} is of {num_measured} cases, {raw.folder} has {len(raw.cases)}; pass "
                "--clean to measure again"
            )
        return fingerprint
    return _measured(raw, path, workers=workers, progress=progress)


def _measured(
    raw: RawDataset, path: Path, *, workers: int, progress: Progress | None
) -> dict[str, Any]:
    fingerprint = recorded_fingerprint(raw, workers=workers, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(fingerprint, indent=4, sort_keys=True))
    return fingerprint


def recorded_fingerprint(
    raw: RawDataset, *, workers: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """As :func:`extract_fingerprint`, with the record of the files that were measured."""
    record = sources.to_json(sources.take_all({c.id: case_files(c) for c in raw.cases}, {}))
    return {**extract_fingerprint(raw, workers=workers, progress=progress), RECORD: record}


def fingerprint_changes(
    fingerprint: Mapping[str, Any], raw: RawDataset, path: Path
) -> sources.Changes:
    """How the cases differ from those that a fingerprint with a record was measured on; told.

    Raises:
        FileError: if the record is damaged, or of a newer version.
    """
    known = sources.from_json(fingerprint[RECORD], path)
    now = sources.take_all({case.id: case_files(case) for case in raw.cases}, known)
    found = sources.changes(
        {i: sources.digests(r) for i, r in known.items()},
        {i: sources.digests(r) for i, r in now.items()},
    )
    if found:
        logger.warning("%s was measured on other cases (%s): measuring again", path, found)
    return found
