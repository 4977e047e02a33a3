"""What plans decide of a training config, and plans with what a config changes of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panther_jax.base.errors import PlansError
from panther_jax.base.files import read_object
from panther_jax.config.schema import ArchConfig, ConfigError, TrainConfig
from panther_jax.planner.from_config import resamplers
from panther_jax.plans.plans import Plans, resolve_configuration

ARCH_FIELDS = tuple(f.name for f in dataclasses.fields(ArchConfig))
ARRAY_FIELDS = (
    "spacing",
    "normalization",
    "use_mask_for_norm",
    "transpose_forward",
    "resampling_image",
    "resampling_label",
)
"""Fields of plans on which preprocessed arrays depend."""


def read_plans(spec: str, dataset: Mapping[str, Any] | None = None) -> Plans:
    """The plans that ``PLANS[:CONFIGURATION]`` names, a file and one configuration of it.

    Without ``dataset``, its dataset.json, channels and labels of the network are placeholders.

    Raises:
        FileNotFoundError: if there is no such file.
        PlansError: if it holds several configurations and none is named, or a cascade's last stage.
    """
    path, configuration = Path(spec), None
    if not path.is_file() and ":" in spec:
        name, _, configuration = spec.rpartition(":")
        path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"--from-plans: {path} is no file\n  Name an nnU-Net plans file, e.g. "
            "nnUNet_preprocessed/Dataset004_Hippocampus/nnUNetPlans.json:2d"
        )
    plans = read_object(path)
    names = list(plans.get("configurations") or ())
    if configuration is None and len(names) > 1:
        raise PlansError(
            f"{path} holds several configurations; name one, e.g. --from-plans {path}:{names[0]}\n"
            f"  There are: {', '.join(names)}"
        )
    chosen = configuration if configuration is not None else next(iter(names), "")
    entry = resolve_configuration(plans, chosen)
    if entry.get("previous_stage"):
        raise PlansError(
            f"{path}: configuration {chosen!r} takes predictions of {entry['previous_stage']!r} "
            "as input, which training does not support; name another one"
        )
    if dataset is None:
        channels = {str(i): "" for i in range(len(entry.get("normalization_schemes") or ()))}
        dataset = {"channel_names": channels, "labels": {"background": 0, "foreground": 1}}
    return Plans.from_nnunet(plans, dataset, chosen)


def config_from_plans(config: TrainConfig, plans: Plans) -> TrainConfig:
    """The config with all that plans say; what is left of it is the recipe.

    Plans decide the data set, the voxel grid, patch and batch, normalisation, resampling, the
    network, and whether the Dice sums over the batch.
    """
    data = dataclasses.replace(
        config.data,
        dataset=plans.dataset_name or config.data.dataset,
        plans_name=plans.plans_name,
        configuration=plans.configuration,
        spacing_mm=plans.spacing,
        patch_size=plans.patch_size,
        batch_size=plans.batch_size,
        normalization=plans.normalization,
        resampling=_kind(plans),
    )
    return dataclasses.replace(
        config,
        data=data,
        arch=ArchConfig(**{name: getattr(plans.arch, name) for name in ARCH_FIELDS}),
        loss=dataclasses.replace(config.loss, batch_dice=plans.batch_dice),
    )


def plans_with_config(plans: Plans, config: TrainConfig) -> Plans:
    """The plans with whatever the config says otherwise: an option outweighs the plans."""
    data = config.data
    arch = {name: getattr(config.arch, name) for name in ARCH_FIELDS}
    changed: dict[str, Any] = {
        "plans_name": data.plans_name,
        "configuration": data.configuration,
        "spacing": data.spacing_mm,
        "patch_size": data.patch_size,
        "batch_size": data.batch_size,
        "normalization": data.normalization or plans.normalization,
        "arch": dataclasses.replace(plans.arch, **arch),
    }
    if config.loss.batch_dice is not None:
        changed["batch_dice"] = config.loss.batch_dice
    if data.resampling != _kind(plans):
        changed |= resamplers(data.resampling)
    return dataclasses.replace(plans, **changed)


def require_same_arrays(stored: Plans, wanted: Plans, folder: Path) -> None:
    """Make sure that cases preprocessed by one are what the other asks for.

    Raises:
        ConfigError: naming the fields that differ.
    """
    different = [
        f"{name}: {getattr(stored, name)} -> {getattr(wanted, name)}"
        for name in ARRAY_FIELDS
        if getattr(stored, name) != getattr(wanted, name)
    ]
    if different:
        raise ConfigError(
            f"the cases of {folder} were preprocessed by other plans (stored -> wanted):\n  "
            + "\n  ".join(different)
            + "\n  Leave out the options that change these, or preprocess anew: pass --raw instead "
            "of --store."
        )


def _kind(plans: Plans) -> Any:
    return "torch" if plans.resampling_image.name == "resample_torch_fornnunet" else "spline"
