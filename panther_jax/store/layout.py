"""Names of the files in a store."""

from panther_jax.images.splits import SPLITS

PLANS, DATASET = "plans.json", "dataset.json"
FINGERPRINT = "dataset_fingerprint.json"
REFERENCES = "references"
RESERVED = (PLANS, DATASET, SPLITS, FINGERPRINT)
