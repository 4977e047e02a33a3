"""Checkpoints of a run, bundles, any model's weights, and those that others published."""
