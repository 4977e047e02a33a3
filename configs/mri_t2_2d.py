"""PANTHER task 2 slice by slice: nnU-Net's `2d` configuration on T2 MR-Linac scans.

Launch:    python -m panther_jax.train --config mri_t2_2d.py --fold 0
Try it:    python -m panther_jax.train --config mri_t2_2d.py --demo
Arguments: those of mri_t2.py, e.g. mri_t2_2d.py:aug=da5,epochs=250
           (init none: weights of a 3-D network do not fit)
Expected:  not measured; the challenge winners trained in 3-D alone.
Duration:  not measured.
Memory:    about 6 GB of device memory at batch 12 in bfloat16 (computed, not measured).

Slices along z keep their distance, in plane cases are resampled to 1 mm. What makes a config 2-D is
two values in `spacing_mm`, `patch_size` and in each kernel and stride; batches, augmentation,
validation and prediction follow.
"""

import dataclasses

from panther_jax.config import ArchConfig, DataConfig, TrainConfig
from panther_jax.panther.recipe import panther_stage


def get_config(argument: str = "") -> TrainConfig:
    """The config of this stage; ``argument`` is described above."""
    recipe = panther_stage(argument, data=DataConfig(dataset="Dataset902_PANTHER_HR"), init="none")
    return dataclasses.replace(
        recipe,
        data=DataConfig(
            dataset="Dataset902_PANTHER_HR",
            modality="t2",
            configuration="2d",
            spacing_mm=(1.0, 1.0),
            patch_size=(320, 320),
            batch_size=12,
        ),
        arch=ArchConfig(
            features=(32, 64, 128, 256, 512, 512, 512),
            kernel_sizes=((3, 3),) * 7,
            strides=((1, 1),) + ((2, 2),) * 6,
            blocks=(1, 3, 4, 6, 6, 6, 6),
            decoder_convs=(1,) * 6,
        ),
        loss=dataclasses.replace(recipe.loss, batch_dice=True),
    )
