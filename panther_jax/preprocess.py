"""Preprocessing: crop to the nonzero region, normalise, resample, sample class locations -> store.

The order is transpose, crop, **normalise, then resample** (spec 02 §4). The pure functions at the
top are what prediction uses; below them is the command that fills a store, case by case.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer

from panther_jax import command
from panther_jax import store as store_files
from panther_jax.config import load_config
from panther_jax.cropping import OUTSIDE, crop_to_nonzero
from panther_jax.imageio import Case, RawCase, RawDataset, open_raw, read_case
from panther_jax.label_resampling import resample_label
from panther_jax.planning import fingerprint_if_needed, plans_from_config
from panther_jax.plans import (
    NORMALIZATIONS,
    Geometry,
    IntensityProperties,
    Labels,
    LabelValue,
    Plans,
    Properties,
    read_object,
)
from panther_jax.resampling import resample_image, target_shape
from panther_jax.store import StoredCase
from panther_jax.workers import Failure, map_cases

NORM_EPSILON = 1e-8
LOCATIONS_SEED = 1234
MAX_LOCATIONS = 10_000
MIN_COVERAGE = 0.01
SEARCHED_AT_ONCE = 1 << 18
MAX_VOXELS = 1 << 34  # 64 GiB a channel: no scan, but a spacing that is not in mm

logger = logging.getLogger("panther_jax")

Progress = Callable[[str, int, int], None]


class PreprocessError(ValueError):
    """Cases that cannot be preprocessed; the message lists them all."""


# ------------------------------------------------------------------------------------ one case


def normalize(
    channel: Float32[np.ndarray, "z y x"],
    scheme: str,
    *,
    intensity: IntensityProperties | None = None,
    inside: Bool[np.ndarray, "z y x"] | None = None,
    out: Float32[np.ndarray, "z y x"] | None = None,
) -> Float32[np.ndarray, "z y x"]:
    """Normalise one channel by the scheme of the plans (spec 02 §4.3).

    ``intensity`` is what CTNormalization needs; with ``inside``, z-score uses and changes only
    those voxels. The result goes into ``out`` if given, which may be ``channel`` itself.

    Raises:
        ValueError: if the scheme is unknown, lacks statistics, or does not fit the values.
    """
    out = np.empty_like(channel) if out is None else out
    if scheme == "NoNormalization":
        np.copyto(out, channel)
    elif scheme == "ZScoreNormalization":
        _zscore(channel, inside, out)
    elif scheme == "CTNormalization":
        if intensity is None:
            raise ValueError(
                "plans: CTNormalization needs foreground_intensity_properties_per_channel; make "
                "plans with panther_jax.planning, which measures them"
            )
        for source, target in zip(channel, out, strict=True):  # slices stay in the cache
            np.clip(source, intensity.percentile_00_5, intensity.percentile_99_5, out=target)
            target -= np.float32(intensity.mean)
            target /= np.float32(max(intensity.std, NORM_EPSILON))
    elif scheme == "RescaleTo01Normalization":
        np.subtract(channel, channel.min(), out=out)
        out /= np.float32(max(float(out.max()), NORM_EPSILON))
    elif scheme == "RGBTo01Normalization":
        if channel.min() < 0 or channel.max() > 255:
            raise ValueError(
                f"RGB channel holds values from {channel.min():g} to {channel.max():g}; expected "
                "0 to 255. Use another channel name in dataset.json if this is not an RGB image"
            )
        np.divide(channel, np.float32(255.0), out=out)
    else:
        raise ValueError(f"plans: normalization scheme {scheme!r} is not known")
    return out


def _zscore(channel: np.ndarray, inside: np.ndarray | None, out: np.ndarray) -> None:
    if inside is None or inside.all():
        spread = np.float32(max(float(channel.std()), NORM_EPSILON))
        np.subtract(channel, channel.mean(), out=out)
        out /= spread
        return
    np.copyto(out, channel)
    if inside.any():
        values = channel[inside]
        out[inside] = (values - values.mean()) / np.float32(max(values.std(), NORM_EPSILON))


def location_requests(labels: Labels) -> tuple[LabelValue, ...]:
    """List the classes and regions whose locations are sampled, in order (spec 02 §4.7)."""
    requests: tuple[LabelValue, ...] = labels.regions or labels.foreground_ids
    if labels.ignore_id is not None:
        requests = (*requests, (OUTSIDE, *labels.ids))  # all that is annotated
    return requests


def class_locations(
    label: Integer[np.ndarray, "z y x"],
    labels: Labels,
    *,
    max_locations: int = MAX_LOCATIONS,
    min_coverage: float = MIN_COVERAGE,
) -> tuple[tuple[LabelValue, Integer[np.ndarray, "_ 3"]], ...]:
    """Sample voxel coordinates z, y, x of each class or region, int32; empty where it is absent."""
    return sample_locations(
        label, location_requests(labels), max_locations=max_locations, min_coverage=min_coverage
    )


def sample_locations(
    label: Integer[np.ndarray, "z y x"],
    requests: Sequence[LabelValue],
    *,
    max_locations: int = MAX_LOCATIONS,
    min_coverage: float = MIN_COVERAGE,
) -> tuple[tuple[LabelValue, Integer[np.ndarray, "_ 3"]], ...]:
    """Sample the locations of ``requests`` with the reference's seed and order (spec 02 §4.7)."""
    random = np.random.RandomState(LOCATIONS_SEED)
    flat = label.reshape(-1)
    found = []
    for request in requests:
        values = request if isinstance(request, tuple) else (request,)
        # grouped by label in the order of the request, not in the order of voxels
        pool = np.concatenate([_where(flat, value) for value in values])
        if pool.size:
            least = int(np.ceil(pool.size * min_coverage))
            count = max(min(max_locations, pool.size), least)
            pool = pool[random.choice(pool.size, count, replace=False)]
        coordinates = np.stack(np.unravel_index(pool, label.shape), axis=1)
        found.append((request, coordinates.astype(np.int32)))
    return tuple(found)


def _where(flat: np.ndarray, value: int) -> np.ndarray:
    """Indices of a value, searched for in parts that fit the cache."""
    starts = range(0, flat.size, SEARCHED_AT_ONCE)
    parts = [np.flatnonzero(flat[start : start + SEARCHED_AT_ONCE] == value) for start in starts]
    for start, part in zip(starts, parts, strict=True):
        part += start
    return np.concatenate(parts)


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


def _preprocess_and_write(task: _Task) -> None:
    case = read_case(task.case, task.labels)
    stored = preprocess_case(case, task.plans, task.labels)
    store_files.write_stored(
        task.out, stored, reference=task.case.label, file_ending=task.file_ending
    )


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

    ``progress`` is called with the id of a case that is done, their number, and that of all.

    Raises:
        StoreError: if the store was made from other plans.
        PreprocessError: listing every broken case, after all others are done.
        WorkerError, StoreWriteError: at once, if a worker fails or the disk is full.
    """
    _check_plans(plans)
    store_files.prepare_store(out, plans, raw.dataset, fingerprint=fingerprint)
    store_files.write_splits(raw.folder, out, [case.id for case in raw.cases])
    tasks = [
        (case.id, _Task(case, plans, raw.labels, out, raw.file_ending))
        for case in raw.cases
        if not store_files.is_complete(out, case.id)
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
        if progress is not None:
            progress(case_id, num_done, num_cases)
    if broken:
        raise PreprocessError(_all_broken(sorted(broken), num_cases))


def _check_plans(plans: Plans) -> None:
    """Find what would fail at every case, before the store is made."""
    schemes, num_channels = plans.normalization, plans.arch.in_channels
    unknown = sorted(set(schemes) - set(NORMALIZATIONS))
    if unknown:
        raise PreprocessError(
            f"plans: normalization {', '.join(unknown)} is not known; expected one of "
            f"{', '.join(NORMALIZATIONS)}"
        )
    if not len(schemes) == len(plans.use_mask_for_norm) == num_channels:
        raise PreprocessError(
            f"plans: normalization_schemes {list(schemes)} and use_mask_for_norm "
            f"{list(plans.use_mask_for_norm)} must have an entry for each of {num_channels} "
            "channel(s) of the dataset"
        )
    _check_statistics(plans)


def _check_statistics(plans: Plans) -> None:
    num_channels = len(plans.normalization)
    if "CTNormalization" in plans.normalization and len(plans.intensity) != num_channels:
        raise PreprocessError(
            f"plans: CTNormalization needs intensity statistics of {num_channels} channel(s), "
            f"found {len(plans.intensity)}; make plans with panther_jax.planning, which measures "
            "them"
        )


def _all_broken(broken: Sequence[tuple[str, str]], num_cases: int) -> str:
    listed = "\n".join(f"case {case_id!r}: {message}" for case_id, message in broken)
    return (
        f"{len(broken)} of {num_cases} cases could not be preprocessed; the others are done.\n"
        f"{listed}\nCorrect or remove them, and run the same command again: it does only these."
    )


# -------------------------------------------------------------------------------------- command

EXAMPLE = """python -m panther_jax.preprocess --raw data/raw/Dataset901_PANTHER \\
      --config mri_t1 --out data/store/Dataset901_PANTHER/plans_3d --workers 4"""


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.preprocess",
        "Preprocess a raw dataset into a store. Running it again continues.",
        EXAMPLE,
    )
    parser.add_argument("--raw", type=Path, required=True, help="raw dataset, nnU-Net layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of the store")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--plans", type=Path, help="nnU-Net plans.json")
    source.add_argument("--config", help="training config, NAME[:ARG] or a file")
    parser.add_argument("--configuration", help="configuration in --plans, e.g. 3d_fullres")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    return parser


def _plans_and_fingerprint(
    arguments: argparse.Namespace, raw: RawDataset
) -> tuple[Plans, Mapping[str, Any] | None]:
    if arguments.plans is not None:
        beside = arguments.plans.parent / store_files.FINGERPRINT
        fingerprint = read_object(beside) if beside.is_file() else None
        plans = read_object(arguments.plans)
        return Plans.from_nnunet(plans, raw.dataset, arguments.configuration), fingerprint
    config, _ = load_config(arguments.config)
    fingerprint = fingerprint_if_needed(config, raw, arguments.out, workers=arguments.workers)
    return plans_from_config(config, raw.dataset, fingerprint), fingerprint


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    if arguments.workers < 0:
        parser.error(f"--workers must not be negative, found {arguments.workers}")
    if arguments.config is not None and arguments.configuration is not None:
        parser.error("--configuration belongs to --plans; a config names its own")

    def body() -> str:
        raw = open_raw(arguments.raw)
        plans, fingerprint = _plans_and_fingerprint(arguments, raw)
        preprocess(
            raw,
            plans,
            arguments.out,
            workers=arguments.workers,
            progress=lambda case_id, done, total: logger.info("[%d/%d] %s", done, total, case_id),
            fingerprint=fingerprint,
        )
        return str(arguments.out)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    raise SystemExit(main())
