"""Intensity normalisation of one channel (spec 02 §4.3): a scheme of the plans is one function.

A scheme is found by the name that plans give it; a user's file adds one with
:func:`normalization`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32

from panther_jax.base import plugins
from panther_jax.base.registry import Registry
from panther_jax.plans.plans import IntensityProperties

NORM_EPSILON = 1e-8


@runtime_checkable
class Normalize(Protocol):
    """Normalise one channel (z, y, x) into ``out``, which may be the channel itself.

    ``intensity`` are statistics of the data set's foreground, None where they were not measured;
    ``inside`` are the voxels that count, None if all do.
    """

    def __call__(
        self,
        channel: np.ndarray,
        out: np.ndarray,
        *,
        intensity: IntensityProperties | None,
        inside: np.ndarray | None,
    ) -> None:
        """Normalise."""


@dataclass(frozen=True)
class Scheme:
    """A way to normalise, and whether it needs statistics of the data set's foreground."""

    normalize: Normalize
    needs_statistics: bool = False


NORMALIZATIONS: Registry[Scheme] = Registry(
    "normalization",
    remedy=f"{plugins.HINT}; "
    "@panther_jax.preprocessing.normalization.normalization('NAME') above a function adds one",
)
"""Normalisation schemes by the name that plans have for them."""

Function = TypeVar("Function", bound=Callable[..., None])


def normalization(name: str, *, needs_statistics: bool = False) -> Callable[[Function], Function]:
    """Give a decorator that makes a function (see :class:`Normalize`) the scheme of a name.

    With ``needs_statistics`` intensities of the data set are measured before its first case is
    preprocessed.

    Raises:
        ValueError: for a name that another function has.
    """

    def remember(function: Function) -> Function:
        NORMALIZATIONS.add(name)(Scheme(function, needs_statistics))
        return function

    return remember


def needs_statistics(scheme: str) -> bool:
    """Whether a scheme needs the data set's intensity statistics; an unknown one does not."""
    found = NORMALIZATIONS.added(scheme)
    return found is not None and found.needs_statistics


# ------------------------------------------------------------------------------------ one case


def normalize(
    channel: Float32[np.ndarray, "z y x"],
    scheme: str,
    *,
    intensity: IntensityProperties | None = None,
    inside: Bool[np.ndarray, "z y x"] | None = None,
    out: Float32[np.ndarray, "z y x"] | None = None,
) -> Float32[np.ndarray, "z y x"]:
    """Normalise one channel by the scheme of the plans (spec 02 §4.3).

    ``intensity`` is what CTNormalization needs; with ``inside``, z-score uses and changes only
    those voxels. The result goes into ``out`` if given, which may be ``channel`` itself.

    Raises:
        ValueError: if the scheme is unknown, lacks statistics, or does not fit the values.
    """
    out = np.empty_like(channel) if out is None else out
    found = NORMALIZATIONS.added(scheme)
    if found is None:
        raise ValueError(f"plans: {NORMALIZATIONS.unknown(scheme)}")
    found.normalize(channel, out, intensity=intensity, inside=inside)
    return out


# ------------------------------------------------------------------------------------- schemes


@normalization("CTNormalization", needs_statistics=True)
def _ct(
    channel: np.ndarray,
    out: np.ndarray,
    *,
    intensity: IntensityProperties | None,
    inside: np.ndarray | None,
) -> None:
    if intensity is None:
        raise ValueError(
            "plans: CTNormalization needs foreground_intensity_properties_per_channel; make "
            "plans with panther_jax.planning, which measures them"
        )
    for source, target in zip(channel, out, strict=True):  # slices stay in the cache
        np.clip(source, intensity.percentile_00_5, intensity.percentile_99_5, out=target)
        target -= np.float32(intensity.mean)
        target /= np.float32(max(intensity.std, NORM_EPSILON))


@normalization("NoNormalization")
def _unchanged(channel: np.ndarray, out: np.ndarray, **_: object) -> None:
    np.copyto(out, channel)


@normalization("RescaleTo01Normalization")
def _rescale(channel: np.ndarray, out: np.ndarray, **_: object) -> None:
    np.subtract(channel, channel.min(), out=out)
    out /= np.float32(max(float(out.max()), NORM_EPSILON))


@normalization("RGBTo01Normalization")
def _rgb(channel: np.ndarray, out: np.ndarray, **_: object) -> None:
    if channel.min() < 0 or channel.max() > 255:
        raise ValueError(
            f"RGB channel holds values from {channel.min():g} to {channel.max():g}; expected "
            "0 to 255. Use another channel name in dataset.json if this is not an RGB image"
        )
    np.divide(channel, np.float32(255.0), out=out)


@normalization("ZScoreNormalization")
def _zscore(
    channel: np.ndarray,
    out: np.ndarray,
    *,
    intensity: IntensityProperties | None,
    inside: np.ndarray | None,
) -> None:
    if inside is None or inside.all():
        spread = np.float32(max(float(channel.std()), NORM_EPSILON))
        np.subtract(channel, channel.mean(), out=out)
        out /= spread
        return
    np.copyto(out, channel)
    if inside.any():
        values = channel[inside]
        out[inside] = (values - values.mean()) / np.float32(max(values.std(), NORM_EPSILON))
