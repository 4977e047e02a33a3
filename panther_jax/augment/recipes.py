"""The augmentation policies in numbers: which transforms, how likely, how strong (spec 04 §3-5).

`find_policy` is the one place where a name becomes a policy, of the package's own (`BUILT_IN`) or
one that a user's file has registered with `panther_jax.config.POLICIES`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from panther_jax.augment import fork
from panther_jax.augment.intensity import (
    Blur,
    Brightness,
    BrightnessShift,
    Contrast,
    Gamma,
    LowResolution,
    Noise,
)
from panther_jax.augment.local import BlankRectangles, Gradient, LocalGamma, Median, Sharpen
from panther_jax.augment.spatial import Mirror, Reorientation, Warp
from panther_jax.augment.transform import Transform
from panther_jax.config import POLICIES


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy as data, in the order in which it is applied; see spec 04 §3 for the numbers."""

    warp: Warp | None = field(default_factory=Warp)
    """Rotation, scaling and crop; None for the centre crop alone."""
    reorientation: Reorientation | None = None
    """Quarter turns and transpositions."""
    transforms: tuple[Transform, ...] = ()
    """Changes of the intensities, one after the other."""
    mirror: Mirror = field(default_factory=Mirror)
    allow_dummy_2d: bool = True
    """Whether far-from-cubic patches are transformed slice by slice (spec 04 §2)."""


def find_policy(name: str) -> Policy:
    """Give the policy of a name.

    Raises:
        ValueError: for an unknown name, listing the known ones, or one whose function makes none.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    make = POLICIES.added(name)
    if make is None:
        raise ValueError(POLICIES.unknown(name))
    policy = make()
    if not isinstance(policy, Policy):
        raise ValueError(
            f"augmentation policy {name!r}: {make.__qualname__}() returned "
            f"{type(policy).__name__}, expected a panther_jax.augment.recipes.Policy"
        )
    return policy


# spec 04 §3.1, steps 2-8
_DEFAULT = Policy(
    transforms=(
        Noise(gate=(0.0, 0.1), sigma_range=(0.0, 0.1)),
        Blur(gate=(0.0, 0.2), p_channel=0.5, sigma_range=(0.5, 1.0)),
        Brightness(gate=(0.0, 0.15), factor_range=(0.75, 1.25)),
        Contrast(gate=(0.0, 0.15), factor_range=(0.75, 1.25)),
        LowResolution(gate=(0.0, 0.25), p_channel=0.5, scale_range=(0.5, 1.0)),
        Gamma(gate=(0.0, 0.1), gamma_range=(0.7, 1.5), invert=True),
        Gamma(gate=(0.0, 0.3), gamma_range=(0.7, 1.5)),
    )
)
_NO_MIRROR = Mirror(max_axes=0)

_DA5_WARP = Warp(
    min_scale=0.7,
    scale_range=(0.7, 1.43),
    same_scale=False,
    p_rotation=0.4,
    p_rotation_axis=0.5,
)
_DA5_WINDOWS = (
    Gradient(gate=(0.0, 0.3), p_channel=0.5, amount_ranges=((-5.0, -1.0), (1.0, 5.0))),
    LocalGamma(gate=(0.0, 0.3), p_channel=0.5, amount_ranges=((0.01, 0.8), (1.5, 4.0))),
)
# spec 04 §4, steps 1-15
_DA5 = Policy(
    warp=_DA5_WARP,
    reorientation=Reorientation(p_rot90=0.5, p_transpose=0.5),
    transforms=(
        Median(gate=(0.0, 0.1), p_channel=0.5),
        Blur(
            gate=(0.1, 0.2),
            p_channel=0.5,
            sigma_range=(0.3, 1.5),
            same_axes=True,
            is_alternative=True,
        ),
        Noise(gate=(0.0, 0.1), sigma_range=(0.0, 0.1)),
        BrightnessShift(gate=(0.0, 0.1), p_channel=0.5, sigma=0.5),
        Contrast(gate=(0.0, 0.1), p_channel=0.5, factor_range=(0.5, 2.0)),
        Contrast(
            gate=(0.1, 0.2),
            p_channel=0.5,
            factor_range=(0.5, 2.0),
            clip=False,
            is_alternative=True,
        ),
        LowResolution(gate=(0.0, 0.15), p_channel=0.5, scale_range=(0.25, 1.0)),
        # Both inverted, unlike the default (spec 04 §4, steps 9 and 10).
        Gamma(gate=(0.0, 0.1), gamma_range=(0.7, 1.5), invert=True),
        Gamma(gate=(0.0, 0.1), gamma_range=(0.7, 1.5), invert=True),
        BlankRectangles(gate=(0.0, 0.4), p_channel=0.5),
        *_DA5_WINDOWS,
        Sharpen(gate=(0.0, 0.2), p_channel=0.5, strength_range=(0.1, 1.0)),
    ),
)

# spec 04 §5: the probabilities and ranges of §4, but which of two alternatives it is, is drawn once
# a batch: given that it is chosen, the gate is twice the joint probability.
_DA5_FORK = dataclasses.replace(
    _DA5,
    warp=fork.Warp(
        min_scale=0.7,
        scale_range=(0.7, 1.43),
        same_scale=False,
        p_rotation=0.4,
        p_rotation_axis=0.5,
    ),
    transforms=(
        Median(gate=(0.0, 0.2), p_channel=0.5, batch_choice=(0, 0)),
        fork.Blur(
            gate=(0.0, 0.2),
            p_channel=0.5,
            sigma_range=(0.3, 1.5),
            same_axes=True,
            batch_choice=(0, 1),
        ),
        Noise(gate=(0.0, 0.1), sigma_range=(0.0, 0.1)),
        BrightnessShift(gate=(0.0, 0.1), p_channel=0.5, sigma=0.5),
        Contrast(gate=(0.0, 0.2), p_channel=0.5, factor_range=(0.5, 2.0), batch_choice=(1, 0)),
        Contrast(
            gate=(0.0, 0.2),
            p_channel=0.5,
            factor_range=(0.5, 2.0),
            clip=False,
            batch_choice=(1, 1),
        ),
        fork.LowResolution(gate=(0.0, 0.15), p_channel=0.5, scale_range=(0.25, 1.0)),
        fork.Gamma(gate=(0.0, 0.1), gamma_range=(0.7, 1.5), invert=True),
        fork.Gamma(gate=(0.0, 0.1), gamma_range=(0.7, 1.5), invert=True),
        fork.BlankRectangles(gate=(0.0, 0.4), p_channel=0.5),
        *_DA5_WINDOWS,
        fork.Sharpen(gate=(0.0, 0.2), p_channel=0.5, strength_range=(0.1, 1.0)),
    ),
)


def _interpolated(policy: Policy, **interpolations: str) -> Policy:
    assert policy.warp is not None
    return dataclasses.replace(policy, warp=dataclasses.replace(policy.warp, **interpolations))


_SEG_ORD0 = {"label_interpolation": "nearest"}
_ORD0 = {"image_interpolation": "nearest", "label_interpolation": "nearest"}

BUILT_IN: Mapping[str, Policy] = MappingProxyType(
    {
        "default": _DEFAULT,
        "no_mirroring": dataclasses.replace(_DEFAULT, mirror=_NO_MIRROR),
        "only_mirror_01": dataclasses.replace(_DEFAULT, mirror=Mirror(max_axes=2)),
        "no_dummy_2d": dataclasses.replace(_DEFAULT, allow_dummy_2d=False),
        "seg_ord0": _interpolated(_DEFAULT, **_SEG_ORD0),
        "seg_ord0_no_mirroring": dataclasses.replace(
            _interpolated(_DEFAULT, **_SEG_ORD0), mirror=_NO_MIRROR
        ),
        "none": Policy(warp=None, mirror=_NO_MIRROR),
        "da5": _DA5,
        "da5_ord0": _interpolated(_DA5, **_ORD0),
        "da5_seg_ord0": _interpolated(_DA5, **_SEG_ORD0),
        "da5_fork": _DA5_FORK,
        "da5_fork_ord0": _interpolated(_DA5_FORK, **_ORD0),
        "da5_fork_seg_ord0": _interpolated(_DA5_FORK, **_SEG_ORD0),
    }
)
"""The package's own; `panther_jax.config.POLICIES` has the same names, without JAX."""
