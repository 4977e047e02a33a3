"""Learning-rate schedules, gradient clipping and optimisers of nnU-Net (spec 03 §3)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from panther_jax.config.schema import OptimConfig

POLY_EXPONENT = 0.9
CLIP_EPSILON = 1e-6
ADAM_BETA1 = 0.9
ADAM_BETA2 = 0.999
ADAM_EPSILON = 1e-8
UNUSED_HEAD = "decoder/heads/0"

Schedule = Callable[[Any], Any]

# ------------------------------------------------------------------------------------ schedules


def learning_rate(config: OptimConfig, epochs: int) -> Callable[[int], float]:
    """Make the learning rate of an epoch 0 <= e < ``epochs``, a double (spec 03 §3.3).

    ``poly_warmup`` has the full rate twice, in the last epoch of warm-up and the one after;
    ``cosine_warmup`` starts one cosine step late and ends at exactly 0. Both are the reference's.
    """
    lr, warmup = config.lr, config.warmup_epochs

    def poly(step: int, span: int) -> float:
        return lr * (1 - step / span) ** POLY_EXPONENT

    def cosine(step: int, span: int) -> float:
        return lr * (1 + math.cos(math.pi * step / span)) / 2

    def rate(epoch: int) -> float:
        assert 0 <= epoch < epochs, f"epoch {epoch} of {epochs}"
        if config.schedule.endswith("_warmup") and epoch < warmup:
            return lr * (epoch + 1) / warmup
        match config.schedule:
            case "poly":
                return poly(epoch, epochs)
            case "poly_warmup":
                return poly(epoch - warmup, epochs - warmup)
            case "cosine":
                return cosine(epoch, epochs)
            case "cosine_warmup":
                return cosine(epoch - warmup + 1, epochs - warmup)
            case "constant":
                return lr

    return rate


def make_schedule(config: OptimConfig, epochs: int, steps_per_epoch: int) -> Schedule:
    """Make the learning rate of a step, constant within an epoch, float32; for use inside jit.

    A function of the step alone, hence exact after a resume. Steps past the end keep the last rate.
    """
    rate = learning_rate(config, epochs)
    table = np.asarray([rate(epoch) for epoch in range(epochs)], np.float32)

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        epoch = jnp.clip(jnp.asarray(step) // steps_per_epoch, 0, epochs - 1)
        return jnp.asarray(table)[epoch]

    return schedule


# ------------------------------------------------------------------------------------ optimiser


def clip_by_global_norm(
    grads: PyTree[Float[Array, "..."]], max_norm: float
) -> tuple[PyTree[Float[Array, "..."]], Float[Array, ""]]:
    """Scale gradients by ``min(1, max_norm / (norm + 1e-6))``; also return the norm before.

    A norm that is not finite makes the gradients NaN: the caller decides what to do about it.
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    factor = jnp.minimum(1.0, max_norm / (norm + CLIP_EPSILON))
    return jax.tree.map(lambda g: g * factor, grads), norm


def make_optimizer(config: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Make the optimiser; it does **not** clip, call :func:`clip_by_global_norm` on its input.

    ``sgd``: decay coupled to the gradient, Nesterov momentum, rate outside the buffer. ``adam``:
    the same decay. ``adamw``: decoupled, with or without amsgrad. Decay acts on all parameters;
    ``schedule`` is given the number of updates made so far, which the state counts. With
    ``skip_unused_head`` the lowest-resolution head (``decoder/heads/0``, if it is not the only
    head) is neither updated nor decayed and its buffers stay 0.
    """
    trainable = _trainable if config.skip_unused_head else None
    decay = optax.add_decayed_weights(config.weight_decay, mask=trainable)
    match config.optimizer:
        case "sgd":
            parts = [decay, optax.trace(config.momentum, nesterov=True)]
        case "adam":
            parts = [decay, optax.scale_by_adam(ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON)]
        case "adamw":
            adam = optax.scale_by_adam(ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON)
            parts = [scale_by_amsgrad() if config.amsgrad else adam, decay]
    if config.skip_unused_head:
        parts.insert(0, optax.masked(optax.set_to_zero(), _unused))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


class AmsgradState(NamedTuple):
    """Updates made, first moment, second moment and the largest second moment so far."""

    count: Array
    mean: Any
    square: Any
    largest_square: Any


def scale_by_amsgrad() -> optax.GradientTransformation:
    """Scale by Adam with amsgrad; the maximum is taken of the *uncorrected* second moment.

    ``optax.scale_by_amsgrad`` takes it of the corrected one, which differs (spec 03 §3.4).
    """

    def init(params: optax.Params) -> AmsgradState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]
        return AmsgradState(jnp.zeros((), jnp.int32), *zeros)

    def update(
        updates: optax.Updates, state: AmsgradState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AmsgradState]:
        del params
        count = state.count + 1
        mean = _decayed(state.mean, updates, ADAM_BETA1)
        square = _decayed(state.square, jax.tree.map(jnp.square, updates), ADAM_BETA2)
        largest = jax.tree.map(jnp.maximum, state.largest_square, square)
        mean_share, square_share = (_bias(beta, count) for beta in (ADAM_BETA1, ADAM_BETA2))
        scaled = jax.tree.map(
            lambda m, v: m / mean_share / (jnp.sqrt(v) / jnp.sqrt(square_share) + ADAM_EPSILON),
            mean,
            largest,
        )
        return scaled, AmsgradState(count, mean, square, largest)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _decayed(average: Any, values: Any, beta: float) -> Any:
    return jax.tree.map(lambda a, x: beta * a + (1 - beta) * x, average, values)


def _bias(beta: float, count: Array) -> Array:
    # 1 - beta^count without the cancellation that costs five digits at count 1
    return -jnp.expm1(count * math.log(beta))


def _unused(params: Any) -> Any:
    """True at the parameters of the lowest-resolution head, if it is not the only one."""

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path[:3], simple=True, separator="/")

    group = UNUSED_HEAD.rpartition("/")[0] + "/"
    names = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    alone = len({n for n in names if n.startswith(group)}) < 2
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not alone and name(path) == UNUSED_HEAD, params
    )


def _trainable(params: Any) -> Any:
    return jax.tree.map(lambda unused: not unused, _unused(params))
