"""The public MultiTalent foundation weights (Zenodo record 13753413), where the cascade starts.

Launch:    python -m weight_conversion.import_nnunet --model-folder FOLDER --folds all \
               --stem reinit --out data/weights/multitalent
           (this stage is imported, not trained here; the CT stage starts from it:
           python -m panther_jax.train --config ct_pancreas.py --init multitalent)
Expected:  nothing of its own; it saves the later stages most of their training.
Duration:  seconds; its authors trained 4000 epochs at batch 24.
Which:     the archive is named MultiTalentV2_challengeversion and the winners' readme calls it
           MultiTalentV2; but the winners' list of jobs calls a model of 4000 epochs, batch 24 and
           z-score, as in this file, V1, and their V2 has 6000 epochs at batch 16 by its folder's
           name. That V2 may not be public; figures with it need not be reached from this one.
Memory:    the import needs about one gigabyte.

ResEnc-L at 1 mm with 192-voxel patches and z-score normalisation: the architecture, grid and batch
of the public plans (spec 01 §4.1). Patch, spacing and network are those that a config has where it
says nothing, so every stage fits the weights. Stem and heads are one a dataset in the file and
never transferred.
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
            batch_size=24,
            normalization=("ZScoreNormalization",),
            resampling="torch",
        ),
        arch=ArchConfig(),  # what is the default here is this network
        loss=LossConfig(batch_dice=True),
        loop=LoopConfig(epochs=4000),
        init=InitConfig(bundle=None, stem="reinit"),
    )
