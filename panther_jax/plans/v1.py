"""Plans of nnU-Net v2's first releases, which describe a network without an ``architecture`` block.

The one place that knows them: whatever reads plans turns them into today's form here.
"""

from collections.abc import Mapping
from typing import Any

from panther_jax.base.errors import PlansError
from panther_jax.plans.architecture import NETWORK_MODULE


def with_architecture(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration with an ``architecture`` block: its own, else one made of old keys.

    Raises:
        PlansError: if the configuration describes no network at all.
    """
    if "architecture" in entry:
        return dict(entry)
    return {**entry, "architecture": architecture_of(entry)}


def architecture_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture block of a configuration that predates it (spec 01 §1.1).

    Raises:
        PlansError: naming the entry that is missing or cannot be used.
    """
    try:
        convs = [int(n) for n in entry["n_conv_per_stage_encoder"]]
        base, limit = int(entry["UNet_base_num_features"]), int(entry["unet_max_num_features"])
        name = str(entry.get("UNet_class_name", "PlainConvUNet"))
        ndim = len(entry["patch_size"])
        blocks = "n_blocks_per_stage" if name == "ResidualEncoderUNet" else "n_conv_per_stage"
        return {
            "network_class_name": NETWORK_MODULE + name,
            "arch_kwargs": {
                "n_stages": len(convs),
                "features_per_stage": [min(base * 2**s, limit) for s in range(len(convs))],
                "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
                "kernel_sizes": entry["conv_kernel_sizes"],
                "strides": entry["pool_op_kernel_sizes"],
                blocks: convs,
                "n_conv_per_stage_decoder": entry["n_conv_per_stage_decoder"],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }
    except KeyError as error:
        raise PlansError(
            f"plans: the configuration has no 'architecture', and {error.args[0]!r} of the older "
            "format is missing too\n  Copy the plans.json of the model, or make plans anew with "
            "panther_jax.planning."
        ) from None
    except (TypeError, ValueError) as error:
        raise PlansError(
            f"plans: the configuration has no 'architecture', and its network in the older format "
            f"cannot be used: {error}"
        ) from None
