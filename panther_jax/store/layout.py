"""Names of the files in a store."""

from panther_jax.images.splits import SPLITS

PLANS, DATASET = "plans.json", "dataset.json"
FINGERPRINT = "dataset_fingerprint.json"
REFERENCES = "references"
SOURCES = "provenance/sources.json"  # in a folder: any other JSON of a store is a case
RESERVED = (PLANS, DATASET, SPLITS, FINGERPRINT)
