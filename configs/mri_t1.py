"""PANTHER task 1: pancreatic tumours on diagnostic T1 scans, which task 2 starts from.

Launch:    python -m panther_jax.train --config mri_t1.py --fold 0
Try it:    python -m panther_jax.train --config mri_t1.py --demo
Arguments: mri_t1.py:aug=default,epochs=1000,lr=1e-3,
               schedule=poly,warmup=50,init=ct,val=all
           (aug default|da5[_ord0|_seg_ord0]|da5_fork[_ord0|_seg_ord0]|no_mirroring|none;
           schedule poly|poly_warmup|cosine; init t1|ct|multitalent|winner-t1|winner-ct|none;
           val all|task2)
Expected:  tumour Dice 0.661 in five-fold cross-validation, for the challenge winner's best ensemble
           of such models; default augmentation gave the best boundaries (MASD 5.46 mm, HD95
           17.33 mm; arXiv 2508.21775). On the closed test of 30 cases 0.727, HD95 8.60 mm, MASD
           1.67 mm (its leaderboard).
Duration:  not measured here; the reference's ResEnc-L takes about 35 h on one A100.
Memory:    about 20 GB of device memory at batch 2 in bfloat16 (computed, not measured).

ResEnc-L at 1 mm with 192-voxel patches, started from the CT stage with a fresh stem and fresh
heads, SGD at 1e-3 (the reference fork's `nnUNetTrainer1e3`). The published model has six members:
folds 0 to 4 and a sixth, which is taken to be `--fold all` here (what it is was not published).
"""

from panther_jax.config import DataConfig, TrainConfig
from panther_jax.panther.recipe import panther_stage


def get_config(argument: str = "") -> TrainConfig:
    """The config of this stage; ``argument`` is described above."""
    return panther_stage(argument, data=DataConfig(dataset="Dataset901_PANTHER", modality="t1"))
