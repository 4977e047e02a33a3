"""The foundation weights that the cascade starts from: MultiTalentV2 (Zenodo record 13753413).

Launch:    python -m weight_conversion.import_nnunet --model-folder FOLDER --folds all \
               --stem reinit --out data/weights/multitalent
           (this stage is imported, not trained here; the CT stage starts from it:
           python -m panther_jax.train --config ct_pancreas.py --init multitalent)
Expected:  nothing of its own; it saves the later stages most of their training.
Duration:  seconds; its authors trained 4000 epochs at batch 24.
Memory:    the import needs about one gigabyte.

ResEnc-L at 1 mm with 192-voxel patches and z-score normalisation: the architecture, grid and batch
of the public plans (spec 01 §4.1), written out so that every stage built on the weights can be
checked against them. Stem and heads are one a dataset in the file and never transferred.
"""

from panther_jax.config import (
    ArchConfig,
    DataConfig,
    InitConfig,
    LoopConfig,
    LossConfig,
    TrainConfig,
)


def get_config() -> TrainConfig:
    """The setting of the public checkpoints."""
    return TrainConfig(
        data=DataConfig(
            dataset="Dataset619_nativemultistem",
            modality="ct",
            plans_name="nnUNetResEncUNetL1x1x1_Plans_znorm_bs24",
            configuration="3d_fullres",
            spacing_mm=(1.0, 1.0, 1.0),
            patch_size=(192, 192, 192),
            batch_size=24,
            normalization=("ZScoreNormalization",),
            resampling="torch",
        ),
        arch=ArchConfig(
            network="ResidualEncoderUNet",
            features=(32, 64, 128, 256, 320, 320),
            kernel_sizes=((3, 3, 3),) * 6,
            strides=((1, 1, 1),) + ((2, 2, 2),) * 5,
            blocks=(1, 3, 4, 6, 6, 6),
            decoder_convs=(1, 1, 1, 1, 1),
        ),
        loss=LossConfig(batch_dice=True),
        loop=LoopConfig(epochs=4000),
        init=InitConfig(bundle=None, stem="reinit"),
    )
