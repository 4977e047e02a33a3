"""PANTHER tasks 1 and 2 together, the tumour alone (dataset 906).

Launch:    python -m panther_jax.train --config mri_combined_tumor_only.py --fold 0
Try it:    python -m panther_jax.train --config mri_combined_tumor_only.py --demo
Arguments: mri_combined_tumor_only.py:aug=default,epochs=1000,lr=1e-3,
               schedule=poly,warmup=50,init=ct,val=all
           (aug default|da5[_ord0|_seg_ord0]|da5_fork[_ord0|_seg_ord0]|no_mirroring|none;
           schedule poly|poly_warmup|cosine; init t1|ct|multitalent|winner-t1|winner-ct|none;
           val all|task2)
Expected:  no published figure of its own.
Duration:  not measured here; the reference's ResEnc-L takes about 35 h on one A100.
Memory:    about 20 GB of device memory at batch 2 in bfloat16 (computed, not measured).

As `mri_combined.py`, on `datasets merge --tumor-only`: one foreground class. In an ensemble with
models of tumour and pancreas its background is ambiguous and gets no weight (spec 05 §10.4).
"""

from panther_jax.config import DataConfig, TrainConfig
from panther_jax.panther.recipe import panther_stage


def get_config(argument: str = "") -> TrainConfig:
    """The config of this stage; ``argument`` is described above."""
    return panther_stage(
        argument, data=DataConfig(dataset="Dataset906_PANTHER_COMBINED_onlyTumor", modality="t2")
    )
