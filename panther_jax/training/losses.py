"""Dice and cross-entropy losses, deep supervision, and the online validation Dice (spec 03 §2, §5).

Arrays are channels-last. Inside, channels are handled as a tuple of arrays: a reduction over a last
axis of two or three values is slow on every backend, a loop over channels fuses into one pass.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from panther_jax.config.schema import LOSSES, ConfigError, LossConfig
from panther_jax.plans.labels import Labels

DICE_EPSILON = 1e-8
EMA_DECAY = 0.9
LABEL_KINDS = ("ce", "topk", "dice_topk")  # not defined for regions

Scalar = Float[Array, ""]
Channels = tuple[Float[Array, "batch *spatial"], ...]
LossFn = Callable[[Array, Array], Array]

# ------------------------------------------------------------------------------------- one term


def split_log_softmax(logits: Float[Array, "batch *spatial channel"]) -> Channels:
    """Compute the float32 log-softmax over all channels, one array a channel."""
    channels = tuple(logits[..., c].astype(jnp.float32) for c in range(logits.shape[-1]))
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, channels))
    log_sum = jnp.log(functools.reduce(operator.add, (jnp.exp(x - largest) for x in channels)))
    return tuple((x - largest) - log_sum for x in channels)


def soft_dice(
    probabilities: Channels,
    members: tuple[Bool[Array, "batch *spatial"], ...],
    mask: Bool[Array, "batch *spatial"] | None,
    *,
    batch_dice: bool,
    smooth: float = 1e-5,
) -> Scalar:
    """Negative mean soft Dice of the channels given; leave out the background by not passing it.

    ``members`` are the voxels of each channel's class, ``mask`` the voxels that count. With 0/1
    members this is the older tp/fp/fn form too, as 2tp + fp + fn = sum(p) + sum(y) (spec 03 §2.1).
    """

    def total(values: Shaped[Array, "batch *spatial"]) -> Float[Array, "batch"]:
        counted = values if mask is None else jnp.where(mask, values, 0)
        return jnp.sum(counted, axis=tuple(range(1, values.ndim)), dtype=jnp.float32)

    overlap = jnp.stack(
        [total(jnp.where(y, p, 0)) for p, y in zip(probabilities, members, strict=True)]
    )
    predicted = jnp.stack([total(p) for p in probabilities])
    present = jnp.stack([total(y) for y in members])
    if batch_dice:
        overlap, predicted, present = (jnp.sum(s, axis=1) for s in (overlap, predicted, present))
    denominator = jnp.maximum(present + predicted + smooth, DICE_EPSILON)
    return -jnp.mean((2 * overlap + smooth) / denominator)


def voxel_cross_entropy(
    log_probabilities: Channels,
    label: Int[Array, "batch *spatial"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, "batch *spatial"]:
    """Cross entropy a voxel; 0 where the label is no channel and nothing is smoothed."""
    picked = (jnp.where(label == c, log_p, 0) for c, log_p in enumerate(log_probabilities))
    entropy = -functools.reduce(operator.add, picked)
    if not label_smoothing:
        return entropy
    uniform = -functools.reduce(operator.add, log_probabilities) / len(log_probabilities)
    return (1 - label_smoothing) * entropy + label_smoothing * uniform


def cross_entropy(
    log_probabilities: Channels,
    label: Int[Array, "batch *spatial"],
    mask: Bool[Array, "batch *spatial"] | None = None,
) -> Scalar:
    """Mean cross entropy of the voxels that count; 0 if none does."""
    return _masked_mean(voxel_cross_entropy(log_probabilities, label), mask)


def topk_cross_entropy(
    log_probabilities: Channels,
    label: Int[Array, "batch *spatial"],
    mask: Bool[Array, "batch *spatial"] | None = None,
    *,
    percent: float = 10.0,
    label_smoothing: float = 0.0,
) -> Scalar:
    """Mean of the largest ``percent`` of the voxels' cross entropies, over the whole batch.

    Voxels that do not count contribute 0 but stay in the list (spec 03 §2.5). The number kept is
    truncated, and at least one.
    """
    entropy = voxel_cross_entropy(log_probabilities, label, label_smoothing=label_smoothing)
    if mask is not None:
        entropy = jnp.where(mask, entropy, 0)
    return _mean_of_largest(entropy, max(1, int(entropy.size * percent / 100)))


def bce_with_logits(
    logits: Float[Array, "batch *spatial channel"],
    target: Bool[Array, "batch *spatial channel"],
    mask: Bool[Array, "batch *spatial"] | None = None,
) -> Scalar:
    """Mean binary cross entropy over voxels and channels.

    With a mask the sum over all channels is divided by the number of voxels that count, so the
    value is larger by the number of channels (a quirk of the reference, spec 03 §2.4).
    """
    entropy = jax.nn.softplus(logits) - jnp.where(target, logits, 0)
    if mask is None:
        return jnp.mean(entropy)
    counted = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask[..., None], entropy, 0)) / jnp.maximum(counted, DICE_EPSILON)


def _masked_mean(
    values: Float[Array, "batch *spatial"], mask: Bool[Array, "batch *spatial"] | None
) -> Scalar:
    if mask is None:
        return jnp.mean(values)
    counted = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(counted, 1)


def _mean_of_largest(values: Float[Array, "*grid"], count: int) -> Scalar:
    # The threshold is found by bisection on the bits of the (non-negative) floats, 31 counting
    # passes: far cheaper than a sort, and a plain sum when the batch is sharded. NaN sorts highest
    # and so reaches the loss. Ties at the threshold share what is left to fill.
    bits = jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(values)), jnp.int32)

    def set_bit(i: Int[Array, ""] | int, threshold: Int[Array, ""]) -> Int[Array, ""]:
        candidate = threshold | (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum(bits >= candidate) >= count, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 31, set_bit, jnp.int32(0))
    above, tied = bits > threshold, bits == threshold
    share = (count - jnp.sum(above)) / jnp.sum(tied)
    total = jnp.sum(jnp.where(above, values, 0)) + share * jnp.sum(jnp.where(tied, values, 0))
    return total / count


# ------------------------------------------------------------------------------- one resolution


def label_loss(
    logits: Float[Array, "batch *spatial channel"],
    label: Int[Array, "batch *spatial 1"],
    config: LossConfig,
    *,
    batch_dice: bool,
    ignore_id: int | None = None,
    include_background: bool = False,
) -> Scalar:
    """The loss ``config.kind`` of mutually exclusive labels (spec 03 §2.3, §2.5).

    Weights apply to the combined kinds; a term of weight 0 is not evaluated. ``topk`` kinds read
    ``topk_percent`` and ``label_smoothing``, the others do not. If every voxel is ignored, the
    cross entropy is 0 and the Dice loss -1.
    """
    log_p = split_log_softmax(logits)
    label = label[..., 0]
    mask = None if ignore_id is None else label != ignore_id
    total = jnp.zeros((), jnp.float32)
    for term, weight in _terms(config):
        if term == "dice":
            first = 0 if include_background else 1
            value = soft_dice(
                tuple(jnp.exp(x) for x in log_p[first:]),
                tuple(label == c for c in range(first, len(log_p))),
                mask,
                batch_dice=batch_dice,
                smooth=config.smooth,
            )
        elif term == "ce":
            value = cross_entropy(log_p, label, mask)
        else:
            value = topk_cross_entropy(
                log_p,
                label,
                mask,
                percent=config.topk_percent,
                label_smoothing=config.label_smoothing,
            )
        total += weight * value
    return total


def region_loss(
    logits: Float[Array, "batch *spatial channel"],
    target: Bool[Array, "batch *spatial target_channel"],
    config: LossConfig,
    *,
    batch_dice: bool,
    has_ignore: bool = False,
    include_background: bool = True,
) -> Scalar:
    """The loss ``config.kind`` of overlapping regions: Dice and binary cross entropy (§2.4).

    With ``has_ignore`` the last target channel marks the voxels to leave out.
    """
    logits = logits.astype(jnp.float32)
    mask = None
    if has_ignore:
        target, mask = target[..., :-1], ~target[..., -1]
    total = jnp.zeros((), jnp.float32)
    for term, weight in _terms(config):
        if term == "dice":
            kept = range(0 if include_background else 1, logits.shape[-1])
            value = soft_dice(
                tuple(jax.nn.sigmoid(logits[..., c]) for c in kept),
                tuple(target[..., c] for c in kept),
                mask,
                batch_dice=batch_dice,
                smooth=config.smooth,
            )
        else:
            value = bce_with_logits(logits, target, mask)
        total += weight * value
    return total


def _terms(config: LossConfig) -> tuple[tuple[str, float], ...]:
    names = {"dice_ce": ("ce", "dice"), "dice_topk": ("topk", "dice")}.get(config.kind)
    if names is None:
        return ((config.kind, 1.0),)
    pairs = zip(names, (config.weight_ce, config.weight_dice), strict=True)
    return tuple((name, weight) for name, weight in pairs if weight != 0)


@dataclass(frozen=True)
class About:
    """What a loss may know besides logits and target: the labels, and how Dice sums.

    ``batch_dice``: over the batch, else a sample.
    """

    labels: Labels
    batch_dice: bool


@LOSSES.add("dice_topk")
@LOSSES.add("topk")
@LOSSES.add("ce")
@LOSSES.add("dice")
@LOSSES.add("dice_ce")
def reference_loss(logits: Array, target: Array, config: LossConfig, about: About) -> Scalar:
    """The reference's losses, of the terms that ``config.kind`` names, for labels or regions."""
    labels = about.labels
    if not labels.has_regions:
        return label_loss(
            logits, target, config, batch_dice=about.batch_dice, ignore_id=labels.ignore_id
        )
    return region_loss(
        logits,
        target,
        config,
        batch_dice=about.batch_dice,
        has_ignore=labels.ignore_id is not None,
    )


def require_loss(config: LossConfig) -> None:
    """Make sure that there is a loss of the config's kind.

    Raises:
        ConfigError: listing the kinds there are.
    """
    if config.kind not in LOSSES.names:
        raise ConfigError(f"loss.kind: {LOSSES.unknown(config.kind)}")


def make_loss(config: LossConfig, labels: Labels, *, batch_dice: bool) -> LossFn:
    """Make the loss of one resolution, ``(logits, target) -> scalar``, for these labels.

    ``logits`` are ``(batch, *spatial, channel)``. ``target`` holds integer labels, ``(batch,
    *spatial, 1)``, or for regions booleans, ``(batch, *spatial, region)`` with the ignore map last.
    Kind ``dice_ce`` is Dice and binary cross entropy for regions. Unlike the reference, ``dice``
    leaves out ignored voxels too, and ``ce`` of a fully ignored batch is 0 rather than NaN.

    Raises:
        ConfigError: if there is no loss of this kind, or it is not defined for regions.
    """
    require_loss(config)
    if labels.has_regions and config.kind in LABEL_KINDS:
        raise ConfigError(
            f"loss.kind {config.kind!r} needs mutually exclusive labels, but the data set declares "
            "regions; use 'dice_ce' or 'dice'"
        )
    return functools.partial(
        LOSSES.find(config.kind), config=config, about=About(labels, batch_dice)
    )


# ----------------------------------------------------------------------------- deep supervision


def deep_supervision_weights(count: int, *, last: float = 0.0) -> tuple[float, ...]:
    """Weights of ``count`` outputs, highest resolution first: 1/2^i, the last replaced, sum 1.

    ``last=1e-6`` (before normalisation) is what the reference uses under DDP without compilation.

    Raises:
        ValueError: if there are fewer than two outputs.
    """
    if count < 2:
        raise ValueError(
            f"deep supervision needs at least two outputs, the network has {count}; "
            "set loss.deep_supervision to False"
        )
    weights = [*(0.5**i for i in range(count - 1)), last]
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def deep_supervised(
    loss_fn: LossFn, weights: Sequence[float]
) -> Callable[[Sequence[Array], Sequence[Array]], Array]:
    """Sum a loss over the outputs of all resolutions; outputs of weight 0 are not evaluated."""

    def loss(logits: Sequence[Array], targets: Sequence[Array]) -> Array:
        terms = zip(weights, logits, targets, strict=True)
        return functools.reduce(operator.add, (w * loss_fn(x, y) for w, x, y in terms if w != 0))

    return loss


# ---------------------------------------------------------------------------- online validation


def pseudo_dice_counts(
    logits: Float[Array, "batch *spatial channel"],
    target: Shaped[Array, "batch *spatial target_channel"],
    labels: Labels,
) -> tuple[Int[Array, "class"], Int[Array, "class"], Int[Array, "class"]]:
    """Count true positive, false positive and false negative voxels of a batch, a class.

    Targets as for :func:`make_loss`; classes are ``labels.classes``. Regions are predicted where
    the probability exceeds one half. Exact (int32) up to 2^31 voxels a batch.
    """
    if labels.has_regions:
        count = len(labels.regions)
        predicted = [logits[..., c] > 0 for c in range(count)]
        members = [target[..., c] for c in range(count)]
        mask = None if labels.ignore_id is None else ~target[..., -1]
    else:
        best, label = jnp.argmax(logits, axis=-1), target[..., 0]
        predicted = [best == c for c in labels.foreground_ids]
        members = [label == c for c in labels.foreground_ids]
        mask = None if labels.ignore_id is None else label != labels.ignore_id

    def total(voxels: Bool[Array, "batch *spatial"]) -> Int[Array, ""]:
        return jnp.sum(voxels if mask is None else voxels & mask, dtype=jnp.int32)

    pairs = list(zip(predicted, members, strict=True))
    tp = jnp.stack([total(p & y) for p, y in pairs])
    fp = jnp.stack([total(p & ~y) for p, y in pairs])
    fn = jnp.stack([total(~p & y) for p, y in pairs])
    return tp, fp, fn


def pseudo_dice(
    tp: Num[np.ndarray, "class"], fp: Num[np.ndarray, "class"], fn: Num[np.ndarray, "class"]
) -> Float[np.ndarray, "class"]:
    """Dice a class from the counts of an epoch, float64; NaN where a class is absent from both."""
    tp, fp, fn = (np.asarray(n, np.float64) for n in (tp, fp, fn))
    voxels = 2 * tp + fp + fn
    return np.divide(2 * tp, voxels, out=np.full_like(voxels, np.nan), where=voxels > 0)


def mean_foreground_dice(dice: Float[np.ndarray, "class"]) -> float:
    """Mean over the classes that occurred; NaN if none did."""
    present = dice[~np.isnan(dice)]
    return float(present.mean()) if present.size else math.nan


def ema_update(
    previous: float | None, value: float, *, nan_propagates: bool = False
) -> float | None:
    """Update the moving average of the epochs' mean pseudo-Dice; ``None`` means none yet.

    A NaN leaves the average as it was. With ``nan_propagates`` it spoils it for good, as in the
    reference (spec 00 §0.3, 03 §5.2).
    """
    if not nan_propagates:
        if math.isnan(value):
            return previous
        if previous is not None and math.isnan(previous):
            previous = None
    return value if previous is None else EMA_DECAY * previous + (1 - EMA_DECAY) * value
