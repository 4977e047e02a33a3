"""Geometry, labels, architecture and plans: frozen, checked, with JSON in and out."""

from panther_jax.base.errors import PlansError
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import IntensityProperties, Plans, Resampler

__all__ = [
    "ArchSpec",
    "Geometry",
    "IntensityProperties",
    "Labels",
    "Plans",
    "PlansError",
    "Properties",
    "Resampler",
]
