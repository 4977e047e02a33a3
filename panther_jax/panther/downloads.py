"""How to get the data sets and weights of the cascade, as messages say it where one is missing."""

PANTHER = (
    "download Zenodo record 15192302 (PANTHER) and convert it with "
    "`python -m panther_jax.datasets panther --task {}`"
)
DATASETS = {
    "Dataset901": PANTHER.format("t1"),
    "Dataset902": PANTHER.format("t2"),
    "Dataset903": "merge tasks 1 and 2 with `python -m panther_jax.datasets merge`",
    "Dataset906": "merge tasks 1 and 2 with `python -m panther_jax.datasets merge --tumor-only`",
    "Dataset999": "convert MSD Task07 and PANORAMA with `python -m panther_jax.datasets "
    "msd|panorama`, then join their tumour cases with `... merge --with-label tumor`",
}
WEIGHTS = {
    "multitalent": "Download MultiTalentV2_challengeversion.zip (Zenodo record 13753413), unpack "
    "it and import its model folder (the one\n  that holds fold_all) with `python -m "
    "weight_conversion.import_nnunet --stem reinit --out data/weights/multitalent`",
    "ct_pancreas": "Train the CT stage and bundle it, `python -m panther_jax.bundle --run "
    "data/runs/ct_pancreas --folds fold_all\n  --checkpoint best --out data/weights/ct_pancreas`, "
    "or name the published ones (Zenodo record 17212158) with --init",
    "mri_t1": "Train task 1 on all cases and bundle it, `python -m panther_jax.bundle --run "
    "data/runs/mri_t1 --folds fold_all\n  --checkpoint best --out data/weights/mri_t1`, name the "
    "published ones (Zenodo record 17212158) with --init,\n  or start from the CT stage with "
    "mri_t2.py:init=ct",
}


def dataset_source(name: str) -> str:
    """How to get a raw data set of the cascade, by the number in its name; empty for others."""
    return DATASETS.get(name.partition("_")[0], "")


def weights_source(bundle: str | None) -> str:
    """How to get a bundle of the cascade, by its name; empty for others."""
    return WEIGHTS.get(bundle or "", "")
