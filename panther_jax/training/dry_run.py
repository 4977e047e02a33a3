"""What a run would be: ``--dry-run`` shows it and does nothing."""

import dataclasses
import json
import math
from pathlib import Path

from panther_jax.config.places import Places
from panther_jax.config.schema import TrainConfig
from panther_jax.planner import from_config
from panther_jax.training.options import Options
from panther_jax.training.provenance import device_name


def describe(settings: TrainConfig, options: Options, places: Places, workdir: Path) -> str:
    """What ``--dry-run`` prints: config, paths, device, parameters, estimated memory."""
    from panther_jax.network.unet import count_params

    typical = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumor": 1, "pancreas": 2},
    }
    no_statistics = dataclasses.replace(settings.data, normalization=("NoNormalization",))
    plain = dataclasses.replace(settings, data=no_statistics)
    arch = from_config.plans_from_config(plain, typical, None).arch
    parameters = count_params(arch)
    slots = {"sgd": 1, "adam": 2, "adamw": 3}[settings.optim.optimizer]
    width = 4 if settings.loop.compute_dtype == "float32" or "cpu" in device_name() else 2
    activations = settings.data.batch_size * width * activation_values(settings)
    state = 4 * parameters * (2 + slots)
    dataset = options.raw or options.store or places.root / "raw" / settings.data.dataset
    return "\n".join(
        [
            json.dumps(settings.to_json(), indent=2),
            f"data            {dataset}",
            f"work directory  {places.fold(workdir, options.fold)}",
            f"device          {device_name()}",
            f"parameters      {parameters:,} (one input channel, three outputs)",
            f"memory          about {(state + activations) / 2**30:.1f} GiB: "
            f"{state / 2**30:.2f} state and gradients, {activations / 2**30:.1f} activations",
        ]
    )


def activation_values(settings: TrainConfig) -> int:
    """Values a sample kept for the backward pass: two a convolution output (spec 08 §8.3)."""
    arch, size = settings.arch, list(settings.data.patch_size)
    total, sizes = 0, []
    for stage, features in enumerate(arch.features):
        size = [-(-n // s) for n, s in zip(size, arch.strides[stage], strict=True)]
        sizes.append(math.prod(size))
        per_block = 2 if arch.network == "ResidualEncoderUNet" else 1
        total += 2 * per_block * arch.blocks[stage] * features * sizes[-1]
    for stage, convs in enumerate(reversed(arch.decoder_convs)):
        total += 2 * (convs + 1) * arch.features[stage] * sizes[stage]
    return total
