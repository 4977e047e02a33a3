"""Pancreatic lesions on CT (tumour cases of MSD Task07 and PANORAMA, dataset 999): the first stage.

Launch:    python -m panther_jax.train --config ct_pancreas.py --fold all
Try it:    python -m panther_jax.train --config ct_pancreas.py --demo
Arguments: ct_pancreas.py:aug=default,epochs=1000,lr=1e-3,
               schedule=poly,warmup=50,init=multitalent,val=all
           (aug default|da5[_ord0|_seg_ord0]|da5_fork[_ord0|_seg_ord0]|no_mirroring|none;
           schedule poly|poly_warmup|cosine; init t1|ct|multitalent|winner-t1|winner-ct|none;
           val all|task2)
Expected:  no published figure; its weights are what the MRI stages start from. Bundle them with
           python -m panther_jax.bundle --run data/runs/ct_pancreas --folds fold_all \
               --checkpoint best --out data/weights/ct_pancreas
Duration:  not measured here; batch 4 doubles the work of a step of the MRI stages.
Memory:    about 40 GB of device memory at batch 4 in bfloat16 (computed, not measured).

From the foundation weights, stem and heads fresh, at batch 4 on all cases (the reference fork's
`3d_fullres_bs4`, fold all). The winners took the 765 cases with a tumour (`datasets merge
--with-label tumor`) and handed on the best checkpoint, of a fold that validates on its own training
cases. Their foundation is called MultiTalentV2; `multitalent.py` says which file is public. Whether
they normalised CT by the dataset's statistics or by z-score is not published: by the channel name
it is the former, `--data.normalization ZScoreNormalization` gives the latter.
"""

from panther_jax.config import DataConfig, TrainConfig
from panther_jax.panther.recipe import panther_stage


def get_config(argument: str = "") -> TrainConfig:
    """The config of this stage; ``argument`` is described above."""
    return panther_stage(
        argument,
        init="multitalent",
        data=DataConfig(
            dataset="Dataset999_PancreasPretrain",
            modality="ct",
            configuration="3d_fullres_bs4",
            batch_size=4,
        ),
    )
