"""Planning: the fingerprint of a raw dataset, and the plans of a training config (spec 02 §2-3)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from panther_jax.config import TrainConfig
from panther_jax.cropping import crop_to_nonzero
from panther_jax.imageio import Case, DatasetError, RawCase, RawDataset, read_case
from panther_jax.plans import (
    ArchSpec,
    IntensityProperties,
    Labels,
    Plans,
    PlansError,
    Resampler,
    normalization_schemes,
    read_json,
)
from panther_jax.store import FINGERPRINT, write_json
from panther_jax.workers import Failure, map_cases

SAMPLE_BUDGET = 10**8
SAMPLE_SEED = 1234
PERCENTILES = (0.5, 50.0, 99.5)

logger = logging.getLogger("panther_jax")


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
    raw: RawDataset, *, budget: int = SAMPLE_BUDGET, workers: int = 0
) -> dict[str, Any]:
    """Measure all training cases: the content of nnU-Net's ``dataset_fingerprint.json``.

    ``budget`` is the number of intensities sampled over all cases, a channel.

    Raises:
        DatasetError: listing every broken case, or if no case has foreground.
        WorkerError: naming the case, if a worker fails.
    """
    num_samples = int(budget // len(raw.cases))
    tasks = [(case.id, _Task(case, raw.labels, num_samples)) for case in raw.cases]
    found = dict(map_cases(_read_and_measure, tasks, workers=workers))
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


# ----------------------------------------------------------------------------- plans of a config


def plans_from_config(
    config: TrainConfig, dataset: Mapping[str, Any], fingerprint: Mapping[str, Any] | None = None
) -> Plans:
    """Make the plans that a training config describes; ``dataset`` is the raw dataset.json.

    Raises:
        PlansError: if channels and normalisation do not match, or CTNormalization lacks a
            ``fingerprint``.
    """
    data = config.data
    labels = Labels.from_dataset_json(dataset)
    normalization = _normalization(config, dataset)
    intensity = _intensity_properties(fingerprint) if needs_fingerprint(config, dataset) else ()
    return Plans(
        dataset_name=data.dataset,
        plans_name=data.plans_name,
        configuration=data.configuration,
        spacing=data.spacing_mm,
        patch_size=data.patch_size,
        batch_size=data.batch_size,
        batch_dice=bool(config.loss.batch_dice),
        normalization=normalization,
        use_mask_for_norm=(False,) * len(normalization),
        resampling_image=_resampler(data.resampling, order=3, is_seg=False),
        resampling_label=_resampler(data.resampling, order=1, is_seg=True),
        resampling_logits=_resampler("spline", order=1, is_seg=False),
        arch=ArchSpec(
            network=config.arch.network,
            in_channels=len(normalization),
            num_outputs=labels.num_outputs,
            features=config.arch.features,
            kernel_sizes=config.arch.kernel_sizes,
            strides=config.arch.strides,
            blocks=config.arch.blocks,
            decoder_convs=config.arch.decoder_convs,
        ),
        intensity=intensity,
        data_identifier=data.data_identifier,
    )


def needs_fingerprint(config: TrainConfig, dataset: Mapping[str, Any]) -> bool:
    """Tell whether a channel is normalised by the dataset's intensity statistics."""
    return "CTNormalization" in _normalization(config, dataset)


def fingerprint_if_needed(
    config: TrainConfig, raw: RawDataset, store_folder: Path, *, workers: int
) -> dict[str, Any] | None:
    """Read the fingerprint kept in the store, else extract and keep it; None if none is needed."""
    if not needs_fingerprint(config, raw.dataset):
        return None
    path = store_folder / FINGERPRINT
    if path.is_file():
        return read_json(path)
    logger.info("measuring the intensities of %d cases", len(raw.cases))
    fingerprint = extract_fingerprint(raw, workers=workers)
    write_json(path, fingerprint)
    return fingerprint


def _normalization(config: TrainConfig, dataset: Mapping[str, Any]) -> tuple[str, ...]:
    channels = dataset.get("channel_names", dataset.get("modality"))
    if not channels:
        raise PlansError("dataset.json: 'channel_names' is missing")
    given = config.data.normalization
    if given is None:
        return normalization_schemes(channels)
    if len(given) != len(channels):
        raise PlansError(
            f"data.normalization names {len(given)} scheme(s), the dataset has {len(channels)} "
            f"channel(s): {channels}"
        )
    return given


def _intensity_properties(
    fingerprint: Mapping[str, Any] | None,
) -> tuple[IntensityProperties, ...]:
    if fingerprint is None:
        raise PlansError(
            "CTNormalization needs the dataset's intensity statistics; pass the fingerprint that "
            "planning.extract_fingerprint measures, or choose data.normalization"
        )
    channels = fingerprint["foreground_intensity_properties_per_channel"]
    return tuple(
        IntensityProperties(**{k: float(v) for k, v in channels[key].items()})
        for key in sorted(channels, key=int)
    )


def _resampler(kind: str, *, order: int, is_seg: bool) -> Resampler:
    kwargs: dict[str, Any] = {"is_seg": is_seg}
    if kind == "torch":
        kwargs |= {"force_separate_z": False, "memefficient_seg_resampling": False}
        return Resampler("resample_torch_fornnunet", tuple(sorted(kwargs.items())))
    kwargs |= {"order": order, "order_z": 0, "force_separate_z": None}
    return Resampler("resample_data_or_seg_to_shape", tuple(sorted(kwargs.items())))
