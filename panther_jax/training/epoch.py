"""What is known at the end of an epoch: losses of its steps, online validation, the row of both."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from panther_jax.base.console import Progress, duration
from panther_jax.config.schema import TrainConfig
from panther_jax.plans.labels import Labels
from panther_jax.training import losses, optim
from panther_jax.training.resident import AnyBatch
from panther_jax.training.signals import TrainingError
from panther_jax.weights.checkpoint import Counters

LOGGER = logging.getLogger("panther_jax")
WAIT_SHARE_HINT = 0.10
OnlineValidation = Callable[[AnyBatch], tuple[Array, tuple[Array, Array, Array]]]


def collect_losses(
    counters: Counters, pending: Sequence[Mapping[str, Array]], done: int
) -> Counters:
    """Fetch the losses of the last steps, up to step ``done``, and count them.

    Raises:
        TrainingError: naming the first step whose loss or gradient is not finite.
    """
    calls = jax.device_get(list(pending))
    fetched = {name: np.hstack([call[name] for call in calls]).tolist() for name in calls[0]}
    rows = zip(*fetched.values(), strict=True)
    by_step = [dict(zip(fetched, row, strict=True)) for row in rows]
    for number, values in enumerate(by_step, start=done - len(by_step) + 1):
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{' and '.join(bad)} of step {number} is not finite "
                f"({', '.join(f'{n} {v:g}' for n, v in values.items())}); the steps before were.\n"
                "  The last checkpoint is from before. Lower --optim.lr, or look for broken "
                "intensities with `python -m panther_jax.datasets check`."
            )
    return dataclasses.replace(
        counters, step=done, epoch_losses=(*counters.epoch_losses, *fetched["loss"])
    )


def validate_online(
    config: TrainConfig,
    labels: Labels,
    step: OnlineValidation,
    batches: Iterator[AnyBatch],
    counters: Counters,
) -> dict[str, Any]:
    """The epoch's row of metrics.jsonl, but for its times (spec 03 §5.1-5.3)."""
    plan = config.loop
    epoch = counters.step // plan.steps_per_epoch - 1
    results = jax.device_get([step(next(batches)) for _ in range(plan.validation_steps)])
    tp, fp, fn = (np.sum([counts[i] for _, counts in results], axis=0) for i in range(3))
    dice = losses.pseudo_dice(tp, fp, fn)
    mean = losses.mean_foreground_dice(dice)
    names = [name for name, _ in labels.classes]
    return {
        "step": counters.step,
        "epoch": epoch,
        "train_loss": float(np.mean(counters.epoch_losses)),
        "validation_loss": float(np.mean([loss for loss, _ in results])),
        "pseudo_dice": {name: float(d) for name, d in zip(names, dice, strict=True)},
        "mean_pseudo_dice": mean,
        "ema": losses.ema_update(counters.ema, mean),
        "lr": optim.learning_rate(config.optim, plan.epochs)(epoch),
    }


def after_epoch(counters: Counters, row: Mapping[str, Any]) -> tuple[Counters, bool]:
    """The counters after an epoch, and whether it is the best so far."""
    # spec 03 §5.3: a strictly better average; the first epoch always counts.
    ema = row["ema"]
    improved = counters.best_step is None or (
        ema is not None and (counters.best_ema is None or ema > counters.best_ema)
    )
    changed = {"best_ema": ema, "best_step": counters.step} if improved else {}
    return dataclasses.replace(counters, ema=ema, epoch_losses=(), **changed), improved


def tell_epoch(row: Mapping[str, Any], epochs: int, progress: Progress) -> None:
    """Log an epoch's row in one line, and a hint if the device waited for data."""
    dice = " ".join(
        f"{name} {'-' if math.isnan(d) else f'{d:.3f}'}" for name, d in row["pseudo_dice"].items()
    )
    LOGGER.info(
        "epoch %d/%d: training loss %.4f, validation loss %.4f, pseudo-Dice %s, lr %.5f, "
        "%.1f s, waiting for data %.0f %%, left %s",
        row["epoch"] + 1,
        epochs,
        row["train_loss"],
        row["validation_loss"],
        dice,
        row["lr"],
        row["seconds"],
        100 * row["wait_share"],
        duration(progress.left),
    )
    if row["wait_share"] > WAIT_SHARE_HINT:
        LOGGER.info(
            "  the device waited for data; raise --data.num-threads or --data.prefetch-batches, "
            "or set --data.resident device, or host"
        )
