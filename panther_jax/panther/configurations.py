"""PANTHER's configurations of a dataset's plans, and plans taken from another dataset.

The challenge's winners trained every stage with the network and grid of the MultiTalent weights
(spec 02 §3.12); their plans files are not published, so what is not known is an option here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from panther_jax.base.errors import PlansError
from panther_jax.config.schema import ArchConfig, DataConfig
from panther_jax.planner.rules import Resampling, reader_writer, resampling_entries
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.labels import Labels

ISO = "3d_fullres_iso1x1x1"


def multitalent_arch(num_channels: int, num_outputs: int) -> ArchSpec:
    """Give the ResEnc-L of the MultiTalent weights: six stages, isotropic (spec 02 §3.12).

    It is the network of a config that says nothing else.
    """
    return ArchSpec(
        in_channels=num_channels, num_outputs=num_outputs, **dataclasses.asdict(ArchConfig())
    )


def panther_configurations(
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    *,
    resampling: Resampling = "torch",
    normalization: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Describe PANTHER's two configurations as children of the plans' ``3d_fullres``.

    1 mm isotropic, patches of 192 voxels, batch 2 (and ``_bs4``), the network of the MultiTalent
    weights. The published facts leave ``resampling`` and, for CT, ``normalization`` open (spec 02
    §3.12); None derives the latter from the channel names.

    Raises:
        PlansError: if the plans have no ``3d_fullres``, or schemes do not match the channels.
    """
    if "3d_fullres" not in plans["configurations"]:
        raise PlansError("plans: PANTHER's configurations need a 3d_fullres; are the images 2-D?")
    parent = plans["configurations"]["3d_fullres"]
    schemes = list(normalization or parent["normalization_schemes"])
    if len(schemes) != len(parent["normalization_schemes"]):
        raise PlansError(
            f"{len(schemes)} normalisation scheme(s) {schemes} for "
            f"{len(parent['normalization_schemes'])} channel(s)"
        )
    labels = Labels.from_dataset_json(dataset)
    iso = {
        "inherits_from": "3d_fullres",
        "data_identifier": f"{plans['plans_name']}_{ISO}",
        "spacing": list(DataConfig.spacing_mm),
        "patch_size": list(DataConfig.patch_size),
        "batch_size": DataConfig.batch_size,
        "batch_dice": False,
        "normalization_schemes": schemes,
        "use_mask_for_norm": [False] * len(schemes),
        **resampling_entries(resampling, logits=False),
        "architecture": multitalent_arch(len(schemes), labels.num_outputs).to_nnunet(),
    }
    return {ISO: iso, f"{ISO}_bs4": {"inherits_from": ISO, "batch_size": 4}}


def move_plans(
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    *,
    dataset_name: str,
    plans_name: str | None = None,
) -> dict[str, Any]:
    """Give a dataset the plans of another, as nnU-Net's own command does (spec 02 §3.11).

    Grid, patch, network and intensity statistics stay those of the source.
    """
    old = str(plans["plans_name"])
    new = plans_name or old
    moved = dict(plans) | {
        "dataset_name": dataset_name,
        "plans_name": new,
        "image_reader_writer": reader_writer(dataset),
        "configurations": {k: dict(v) for k, v in plans["configurations"].items()},
    }
    for entry in moved["configurations"].values() if new != old else ():
        identifier = entry.get("data_identifier")
        if identifier is not None:
            own = identifier.startswith(old)
            entry["data_identifier"] = new + (identifier[len(old) :] if own else f"_{identifier}")
    return moved
