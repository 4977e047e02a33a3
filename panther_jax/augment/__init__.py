"""On-device augmentation: one class a transform, with `sample` and `apply` (spec 04)."""
