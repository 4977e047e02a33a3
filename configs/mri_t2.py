"""PANTHER task 2: pancreatic tumours on T2 MR-Linac scans, the last stage of the cascade.

Launch:    python -m panther_jax.train --config mri_t2.py --fold 0
Try it:    python -m panther_jax.train --config mri_t2.py --demo
Arguments: mri_t2.py:aug=default,epochs=1000,lr=1e-3,
               schedule=poly,warmup=50,init=t1,val=all
           (aug default|da5[_ord0|_seg_ord0]|da5_fork[_ord0|_seg_ord0]|no_mirroring|none;
           schedule poly|poly_warmup|cosine; init t1|ct|multitalent|winner-t1|winner-ct|none;
           val all|task2)
Expected:  tumour Dice 0.523 in five-fold cross-validation, for the challenge winner's best ensemble
           of such models (arXiv 2508.21775), and 0.529, HD95 23.0 mm, MASD 5.13 mm on the closed
           test of 30 cases (its leaderboard); a single fold of fifty cases varies a lot around it.
Duration:  not measured here; the reference's ResEnc-L takes about 35 h on one A100.
Memory:    about 20 GB of device memory at batch 2 in bfloat16 (computed, not measured).

ResEnc-L at 1 mm with 192-voxel patches, started from task 1 with a fresh stem and fresh heads, SGD
at 1e-3 (the reference fork's `nnUNetTrainer1e3`). So the winners' readme and the name of their
published model have it; their list of jobs has task 2 straight from the CT stage, `init=ct`.
"""

from panther_jax.config import DataConfig, TrainConfig
from panther_jax.panther.recipe import panther_stage


def get_config(argument: str = "") -> TrainConfig:
    """The config of this stage; ``argument`` is described above."""
    return panther_stage(
        argument, init="t1", data=DataConfig(dataset="Dataset902_PANTHER_HR", modality="t2")
    )
