"""On-device augmentation: every transform is a pair of `sample_*` and `apply_*` (spec 04)."""
