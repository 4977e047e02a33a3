"""Intensity normalisation of one channel (spec 02 §4.3)."""

import numpy as np
from jaxtyping import Bool, Float32

from panther_jax.plans.plans import IntensityProperties

NORM_EPSILON = 1e-8


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
    if scheme == "NoNormalization":
        np.copyto(out, channel)
    elif scheme == "ZScoreNormalization":
        _zscore(channel, inside, out)
    elif scheme == "CTNormalization":
        if intensity is None:
            raise ValueError(
                "plans: CTNormalization needs foreground_intensity_properties_per_channel; make "
                "plans with panther_jax.planning, which measures them"
            )
        for source, target in zip(channel, out, strict=True):  # slices stay in the cache
            np.clip(source, intensity.percentile_00_5, intensity.percentile_99_5, out=target)
            target -= np.float32(intensity.mean)
            target /= np.float32(max(intensity.std, NORM_EPSILON))
    elif scheme == "RescaleTo01Normalization":
        np.subtract(channel, channel.min(), out=out)
        out /= np.float32(max(float(out.max()), NORM_EPSILON))
    elif scheme == "RGBTo01Normalization":
        if channel.min() < 0 or channel.max() > 255:
            raise ValueError(
                f"RGB channel holds values from {channel.min():g} to {channel.max():g}; expected "
                "0 to 255. Use another channel name in dataset.json if this is not an RGB image"
            )
        np.divide(channel, np.float32(255.0), out=out)
    else:
        raise ValueError(f"plans: normalization scheme {scheme!r} is not known")
    return out


def _zscore(channel: np.ndarray, inside: np.ndarray | None, out: np.ndarray) -> None:
    if inside is None or inside.all():
        spread = np.float32(max(float(channel.std()), NORM_EPSILON))
        np.subtract(channel, channel.mean(), out=out)
        out /= spread
        return
    np.copyto(out, channel)
    if inside.any():
        values = channel[inside]
        out[inside] = (values - values.mean()) / np.float32(max(values.std(), NORM_EPSILON))
