"""The name under which older configs import :mod:`panther_jax.panther.recipe`."""

from panther_jax.panther.recipe import KEYS, panther_stage

__all__ = ["KEYS", "panther_stage"]
