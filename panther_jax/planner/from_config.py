"""The plans of a training config."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panther_jax.base.errors import PlansError
from panther_jax.base.files import read_json, write_json
from panther_jax.config.schema import TrainConfig
from panther_jax.images.raw_dataset import RawDataset
from panther_jax.planner.fingerprint import RECORD, fingerprint_changes, recorded_fingerprint
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import (
    IntensityProperties,
    Plans,
    Resampler,
    normalization_schemes,
)
from panther_jax.preprocessing.normalization import needs_statistics
from panther_jax.store.layout import FINGERPRINT

logger = logging.getLogger("panther_jax")


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
    resampling = resamplers(data.resampling)
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
        resampling_image=resampling["resampling_image"],
        resampling_label=resampling["resampling_label"],
        resampling_logits=resampling["resampling_logits"],
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
    return any(map(needs_statistics, _normalization(config, dataset)))


def fingerprint_if_needed(
    config: TrainConfig, raw: RawDataset, store_folder: Path, *, workers: int
) -> dict[str, Any] | None:
    """Read the fingerprint kept in the store, else extract and keep it; None if none is needed."""
    if not needs_fingerprint(config, raw.dataset):
        return None
    path = store_folder / FINGERPRINT
    if path.is_file():
        kept = read_json(path)
        if RECORD not in kept or not fingerprint_changes(kept, raw, path):
            return kept
    logger.info("measuring the intensities of %d cases", len(raw.cases))
    fingerprint = recorded_fingerprint(raw, workers=workers)
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


def resamplers(kind: str) -> dict[str, Resampler]:
    """The resampling fields of plans: ``torch`` or ``spline`` for cases, spline for logits."""
    return {
        "resampling_image": _resampler(kind, order=3, is_seg=False),
        "resampling_label": _resampler(kind, order=1, is_seg=True),
        "resampling_logits": _resampler("spline", order=1, is_seg=False),
    }


def _resampler(kind: str, *, order: int, is_seg: bool) -> Resampler:
    kwargs: dict[str, Any] = {"is_seg": is_seg}
    if kind == "torch":
        kwargs |= {"force_separate_z": False, "memefficient_seg_resampling": False}
        return Resampler("resample_torch_fornnunet", tuple(sorted(kwargs.items())))
    kwargs |= {"order": order, "order_z": 0, "force_separate_z": None}
    return Resampler("resample_data_or_seg_to_shape", tuple(sorted(kwargs.items())))
