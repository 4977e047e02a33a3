"""Images that a model was not made for: constant ones, and intensities far from its training's."""

import numpy as np
from jaxtyping import Float

from panther_jax.plans.plans import IntensityProperties, Plans

MAX_LOOKED_AT = 1 << 20  # voxels of a channel; every n-th of a larger one
CT_SCHEME = "CTNormalization"
NEGATIVE_SHARE = 0.05  # air around a body in Hounsfield units is far more
# Scales of MR differ by a factor of ten from scanner to scanner, and are normalised.
MAX_SCALE = 50.0


def doubts(image: Float[np.ndarray, "channel z y x"], plans: Plans) -> tuple[str, ...]:
    """What speaks against predicting an image with a model of these plans, one line each.

    A warning and no refusal: an image may be unusual and right.
    """
    found = []
    for number, channel in enumerate(image):
        flat = channel.reshape(-1)
        values = flat[:: flat.size // MAX_LOOKED_AT + 1]
        low, high = float(flat.min()), float(flat.max())
        where = f"channel {number}: " if len(image) > 1 else ""
        if low == high:
            found.append(
                f"{where}the image is empty, all voxels are {low:g}; is it the right file, and was "
                "it exported whole?"
            )
            continue
        scheme = plans.normalization[min(number, len(plans.normalization) - 1)]
        known = plans.intensity[number] if number < len(plans.intensity) else None
        if known is not None and (text := _unlike(values, known, scheme, low)):
            found.append(
                f"{where}{text}; is this model made for such images, and their unit right?"
            )
    return tuple(found)


def _unlike(
    values: Float[np.ndarray, " voxel"], known: IntensityProperties, scheme: str, low: float
) -> str:
    """How intensities differ from the foreground's of the training, or nothing."""
    inside = values[values != 0] if values.any() else values
    first, median, last = (float(v) for v in np.percentile(inside, (0.5, 50, 99.5)))
    range_text = (
        f"intensities from {first:g} to {last:g}, in training {known.percentile_00_5:g} to "
        f"{known.percentile_99_5:g}"
    )
    if scheme == CT_SCHEME:
        if last < known.percentile_00_5 or first > known.percentile_99_5:
            return range_text
        if low >= 0:
            return f"{range_text}: no value below 0, so not Hounsfield units of a CT"
        return ""
    share = float(np.mean(values < min(known.min, 0.0)))
    if known.min >= 0 and share > NEGATIVE_SHARE:
        return f"{range_text}: {share:.0%} of voxels are negative, as in a CT, in training none"
    ours = max(abs(first), abs(last), abs(median))
    theirs = max(abs(known.percentile_00_5), abs(known.percentile_99_5))
    if theirs > 0 and not 1 / MAX_SCALE <= ours / theirs <= MAX_SCALE:
        return range_text
    return ""
