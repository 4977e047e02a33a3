"""Preprocessing: crop to the nonzero region, normalise, resample, sample class locations -> store.

The order is transpose, crop, **normalise, then resample** (spec 02 §4). The pure functions at the
top are what prediction uses; below them is the command that fills a store, case by case.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from panther_jax.base import sources
from panther_jax.base.errors import PantherError
from panther_jax.base.workers import Failure, map_cases
from panther_jax.images import splits
from panther_jax.images.raw_dataset import Case, RawCase, RawDataset, read_case
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import Labels, LabelValue
from panther_jax.plans.plans import Plans
from panther_jax.preprocessing.cropping import crop_to_nonzero
from panther_jax.preprocessing.label_resampling import resample_label
from panther_jax.preprocessing.locations import class_locations
from panther_jax.preprocessing.normalization import NORMALIZATIONS, needs_statistics, normalize
from panther_jax.preprocessing.resampling import resample_image, target_shape
from panther_jax.store import sources as store_sources
from panther_jax.store import store
from panther_jax.store.store import StoredCase

MAX_VOXELS = 1 << 34  # 64 GiB a channel: no scan, but a spacing that is not in mm

logger = logging.getLogger("panther_jax")

Progress = Callable[[str, int, int], None]


class PreprocessError(PantherError, ValueError):
    """Cases that cannot be preprocessed; the message lists them all."""


@dataclass(frozen=True)
class _Prepared:
    image: np.ndarray
    label: np.ndarray
    properties: Properties
    resampling: dict[str, Any]


def preprocess_image(
    image: Float[np.ndarray, "channel z y x"], geometry: Geometry | Sequence[float], plans: Plans
) -> tuple[Float32[np.ndarray, "channel new_z new_y new_x"], Properties]:
    """Preprocess an image for prediction; ``geometry`` may be just the spacing z, y, x in mm.

    Raises:
        ValueError: if channels do not match the plans, or a size would become zero.
    """
    if not isinstance(geometry, Geometry):
        shape = tuple(int(n) for n in image.shape[1:])
        identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        spacing = tuple(float(s) for s in geometry)
        geometry = Geometry(shape, spacing, (0.0, 0.0, 0.0), identity)
    prepared = _prepare(image, None, geometry, plans)
    return _resampled_image(prepared, plans), prepared.properties


def preprocess_case(case: Case, plans: Plans, labels: Labels) -> StoredCase:
    """Preprocess a training case: image, label map and class locations on the plans' grid.

    Raises:
        ValueError: if the case has no label, channels do not match the plans, or a size would
            become zero.
    """
    if case.label is None:
        raise ValueError(f"case {case.id!r} has no label map; training needs one")
    prepared = _prepare(case.image, _narrow(case.label), case.geometry, plans)
    with ThreadPoolExecutor(1) as beside:
        labelled = beside.submit(_resampled_label, prepared, plans, labels)
        image = _resampled_image(prepared, plans)
    label, locations = labelled.result()
    return StoredCase(case.id, image, label, locations, prepared.properties)


def _narrow(label: np.ndarray) -> np.ndarray:
    dtype = np.int16 if label.max() > np.iinfo(np.int8).max else np.int8
    return label.astype(dtype, copy=False)


def _prepare(
    image: np.ndarray, label: np.ndarray | None, geometry: Geometry, plans: Plans
) -> _Prepared:
    """Transpose, crop and normalise: all that precedes resampling."""
    if image.shape[0] != len(plans.normalization):
        raise ValueError(
            f"image has {image.shape[0]} channel(s), the plans expect {len(plans.normalization)}"
        )
    forward = plans.transpose_forward
    image = image.transpose(0, *(a + 1 for a in forward)).astype(np.float32, copy=False)
    label = None if label is None else label.transpose(forward)
    spacing = tuple(geometry.spacing_zyx[a] for a in forward)
    shape = tuple(image.shape[1:])
    cropped, label, box = crop_to_nonzero(image, label)
    properties = Properties(geometry, shape, box, tuple(cropped.shape[1:]))
    for index, scheme in enumerate(plans.normalization):
        normalize(
            cropped[index],
            scheme,
            out=cropped[index],
            intensity=plans.intensity[index] if index < len(plans.intensity) else None,
            # spec 02 §4.3: labelled voxels outside the nonzero mask count as inside
            inside=label >= 0 if plans.use_mask_for_norm[index] else None,
        )
    # spec 02 §4.1: slices of a 2-D configuration keep their distance
    wanted = plans.spacing if len(plans.spacing) == 3 else (spacing[0], *plans.spacing)
    new_shape = target_shape(properties.shape_before_resampling, spacing, wanted)
    if 0 in new_shape or math.prod(new_shape) > MAX_VOXELS:
        raise ValueError(
            f"{properties.shape_before_resampling} voxels of {spacing} mm would become {new_shape} "
            f"at {wanted} mm; check the spacing in the image's header, and that of the plans"
        )
    resampling = {"new_shape": new_shape, "spacing": spacing, "new_spacing": wanted}
    return _Prepared(cropped, label, properties, resampling)


def _resampled_image(prepared: _Prepared, plans: Plans) -> np.ndarray:
    image = resample_image(prepared.image, resampler=plans.resampling_image, **prepared.resampling)
    return np.ascontiguousarray(image, dtype=np.float32)


def _resampled_label(
    prepared: _Prepared, plans: Plans, labels: Labels
) -> tuple[np.ndarray, tuple[tuple[LabelValue, np.ndarray], ...]]:
    label = resample_label(prepared.label, resampler=plans.resampling_label, **prepared.resampling)
    return _narrow(label), class_locations(label, labels)


# ------------------------------------------------------------------------------ over many cases


@dataclass(frozen=True)
class _Task:
    case: RawCase
    plans: Plans
    labels: Labels
    out: Path
    file_ending: str


def _preprocess_and_write(task: _Task) -> sources.Record:
    # before reading: a file that changes in between is found changed at the next look
    record = sources.taken(store_sources.case_files(task.case))
    case = read_case(task.case, task.labels)
    stored = preprocess_case(case, task.plans, task.labels)
    store.write_stored(
        task.out,
        stored,
        reference=task.case.label,
        file_ending=task.file_ending,
        sources=sources.digests(record),
    )
    return record


def preprocess(
    raw: RawDataset,
    plans: Plans,
    out: Path,
    *,
    workers: int = 0,
    progress: Progress | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> None:
    """Fill the store ``out`` from a raw dataset; cases already there, whole, are left alone.

    Cases that changed since are done again, those that are gone leave the store.

    ``progress`` is called with the id of a case that is done, their number, and that of all.

    Raises:
        StoreError: if the store was made from other plans, or another dataset.
        PreprocessError: listing every broken case, after all others are done.
        WorkerError, WriteError: at once, if a worker fails or the disk is full.
    """
    _check_plans(plans)
    store.prepare_store(out, plans, raw.dataset, fingerprint=fingerprint)
    records = store_sources.bring_up_to_date(out, raw)
    splits.write_splits(raw.folder, out, [case.id for case in raw.cases])
    tasks = [
        (case.id, _Task(case, plans, raw.labels, out, raw.file_ending))
        for case in raw.cases
        if not store.is_complete(out, case.id)
    ]
    num_done, num_cases = len(raw.cases) - len(tasks), len(raw.cases)
    if num_done:
        logger.info("%s: %d of %d cases are already there", out, num_done, num_cases)
    broken = []
    for case_id, result in map_cases(_preprocess_and_write, tasks, workers=workers):
        if isinstance(result, Failure):
            broken.append((case_id, result.message))
            logger.error("case %s cannot be used: %s", case_id, result.message)
            continue
        num_done += 1
        records[case_id] = result
        if progress is not None:
            progress(case_id, num_done, num_cases)
    store_sources.write_sources(out, records)
    if broken:
        raise PreprocessError(_all_broken(sorted(broken), num_cases))


def _check_plans(plans: Plans) -> None:
    """Find what would fail at every case, before the store is made."""
    schemes, num_channels = plans.normalization, plans.arch.in_channels
    for scheme in schemes:
        if scheme not in NORMALIZATIONS.names:
            raise PreprocessError(f"plans: {NORMALIZATIONS.unknown(scheme)}")
    if not len(schemes) == len(plans.use_mask_for_norm) == num_channels:
        raise PreprocessError(
            f"plans: normalization_schemes {list(schemes)} and use_mask_for_norm "
            f"{list(plans.use_mask_for_norm)} must have an entry for each of {num_channels} "
            "channel(s) of the dataset"
        )
    _check_statistics(plans)


def _check_statistics(plans: Plans) -> None:
    num_channels = len(plans.normalization)
    needing = [scheme for scheme in plans.normalization if needs_statistics(scheme)]
    if needing and len(plans.intensity) != num_channels:
        raise PreprocessError(
            f"plans: {needing[0]} needs intensity statistics of {num_channels} channel(s), "
            f"found {len(plans.intensity)}; make plans with panther_jax.planning, which measures "
            "them"
        )


def _all_broken(broken: Sequence[tuple[str, str]], num_cases: int) -> str:
    listed = "\n".join(f"case {case_id!r}: {message}" for case_id, message in broken)
    return (
        f"{len(broken)} of {num_cases} cases could not be preprocessed; the others are done.\n"
        f"{listed}\nCorrect or remove them, and run the same command again: it does only these."
    )
