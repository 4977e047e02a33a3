"""Plans of a network of two stages, for tests that look at what surrounds a network."""

from typing import Any

from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.plans import Plans, Resampler


def toy_arch(num_outputs: int) -> ArchSpec:
    return ArchSpec(
        network="PlainConvUNet",
        in_channels=1,
        num_outputs=num_outputs,
        features=(4, 8),
        kernel_sizes=((3, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (2, 2, 2)),
        blocks=(1, 1),
        decoder_convs=(1,),
    )


def toy_plans(resampler: Resampler, *, num_outputs: int = 3, **changes: Any) -> Plans:
    """``resampler`` is that of images, labels and logits, where ``changes`` name no other."""
    fields = {
        "dataset_name": "Dataset001_Test",
        "plans_name": "plans",
        "configuration": "test",
        "spacing": (2.0, 1.0, 1.0),
        "patch_size": (8, 8, 8),
        "batch_size": 2,
        "batch_dice": False,
        "normalization": ("ZScoreNormalization",),
        "use_mask_for_norm": (False,),
        "resampling_image": resampler,
        "resampling_label": resampler,
        "resampling_logits": resampler,
        "arch": toy_arch(num_outputs),
    }
    return Plans(**{**fields, **changes})
