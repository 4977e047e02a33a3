"""Checkpoints of a run, bundles, and the transfer of starting weights."""
