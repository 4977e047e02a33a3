"""Train one stage, one fold: ``python -m panther_jax.train --config mri_t2.py``.

Read from top to bottom: the step, the loop around it, what is prepared before, the command line.
A run resumes by itself; all randomness is a function of (seed, fold, stream, step, position).
"""

import dataclasses
import functools
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from panther_jax.augment import policies
from panther_jax.base.console import Progress, announced, duration
from panther_jax.base.errors import PantherError
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.devices import processes
from panther_jax.devices.compiler import compiled
from panther_jax.devices.mesh import make_mesh, replicate
from panther_jax.library import Face
from panther_jax.network import unet
from panther_jax.plans.plans import Plans
from panther_jax.reporting.pictures import plot_progress
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import Store
from panther_jax.training import feeding, launch, losses, optim, provenance, sampling, signals
from panther_jax.training.options import Fold
from panther_jax.training.records import (
    Clock,
    MetricsFile,
    read_metrics,
    tensorboard_writer,
    write_scalars,
)
from panther_jax.training.resident import AnyBatch
from panther_jax.training.step import (
    Task,
    make_task,
    make_train_step,
    make_train_steps,
    make_validation_step,
    seed_key,
)
from panther_jax.training.validation import cases_to_validate, validate_checkpoints
from panther_jax.weights.bundle import params_sha256
from panther_jax.weights.checkpoint import Checkpoints, Counters, TrainState
from panther_jax.weights.start import load_start
from panther_jax.weights.transfer import transfer

LOGGER = logging.getLogger("panther_jax")
WAIT_SHARE_HINT = 0.10


class TrainingError(PantherError, RuntimeError):
    """Training cannot go on; the message says from where."""


# ----------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Loop:
    """Everything the loop works with besides the state.

    ``records`` is where metrics and pictures go: the fold's folder, or where nobody looks for all
    processes but the first.
    """

    config: TrainConfig
    task: Task
    records: Path
    checkpoints: Checkpoints
    metrics: MetricsFile
    stop: signals.StopRequest
    train_step: Callable[..., Any]
    validation_step: Callable[..., Any]
    streams: feeding.Streams
    key: Key[Array, ""]
    board: Any = None


def run_loop(loop: Loop, state: TrainState, counters: Counters) -> tuple[TrainState, Counters]:
    """Train from ``counters.step`` to the end, ``steps_per_call`` at a time; saves as it goes.

    Raises:
        TrainingError: if loss or gradients stop being finite; nothing of that is saved.
        runs.Interrupted: after a signal, with the state saved.
    """
    plan, first = loop.config.loop, counters.step
    per_call = plan.steps_per_call
    clock = Clock(Progress(plan.total_steps, first=first, label="step"))
    stream, validation = loop.streams.train(first), loop.streams.validation(first)
    pending: list[Mapping[str, Array]] = []
    with jax.transfer_guard("disallow"):
        for done in range(first + per_call, plan.total_steps + 1, per_call):
            with clock.waiting():
                batch = next(stream)
            state, call_metrics = loop.train_step(state, batch, loop.key)
            pending.append(call_metrics)
            epoch_ends = done % plan.steps_per_epoch == 0
            stop, save = _asked(loop, clock, done)
            if epoch_ends or save or len(pending) * per_call >= loop.config.log.every_steps:
                counters, pending = _collect(counters, pending, done), []
                clock.progress.update(done, f"loss {counters.epoch_losses[-1]:.3f}")
            if epoch_ends:
                counters = _end_epoch(loop, state, counters, validation, clock)
                save = save or _save_due(done, plan)
            if save:
                loop.checkpoints.save("latest", state, counters)
                clock.saved()
            if stop and done < plan.total_steps:
                raise signals.Interrupted(
                    f"stopped by {loop.stop.by or 'another process'} after step {done} of "
                    f"{plan.total_steps}; all is saved\n  Run the same command again to go on."
                )
    clock.progress.close()
    loop.checkpoints.save("final", state, counters)
    return state, counters


def _asked(loop: Loop, clock: Clock, done: int) -> tuple[bool, bool]:
    """Whether to stop, and whether to save now; all processes get the same answer."""
    plan = loop.config.loop
    if jax.process_count() > 1 and done % loop.config.log.every_steps >= plan.steps_per_call:
        return False, False  # they would have to wait for each other at every call
    late = clock.since_save() > 60 * plan.checkpoint_minutes
    stop, save = processes.any_process(bool(loop.stop.by), late)
    return stop, save or stop


def _save_due(done: int, plan: Any) -> bool:
    epoch = done // plan.steps_per_epoch
    return epoch % plan.checkpoint_every_epochs == 0 and done < plan.total_steps


def _collect(counters: Counters, pending: Sequence[Mapping[str, Array]], done: int) -> Counters:
    """Fetch the losses of the last steps; the first that is not finite ends the run."""
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


def _end_epoch(
    loop: Loop,
    state: TrainState,
    counters: Counters,
    validation: Iterator[AnyBatch],
    clock: Clock,
) -> Counters:
    """Validate online, write the epoch's row and picture, save the best; the new counters."""
    with clock.paused():
        row, improved = _validate_epoch(loop, state, counters, validation)
        row |= clock.end_epoch()
        loop.metrics.append(row)
        if loop.board is not None:
            write_scalars(loop.board, row)
        _tell(row, loop.config.loop.epochs, clock.progress)
        plot_progress(read_metrics(loop.metrics.path), loop.records / "progress.png")
        counters = dataclasses.replace(
            counters,
            ema=row["ema"],
            best_ema=row["ema"] if improved else counters.best_ema,
            best_step=counters.step if improved else counters.best_step,
            epoch_losses=(),
        )
        if improved:
            loop.checkpoints.save("best", state, counters)
    return counters


def _validate_epoch(
    loop: Loop,
    state: TrainState,
    counters: Counters,
    validation: Iterator[AnyBatch],
) -> tuple[dict[str, Any], bool]:
    """The row of metrics.jsonl, and whether this epoch is the best so far."""
    plan = loop.config.loop
    epoch = counters.step // plan.steps_per_epoch - 1
    results = jax.device_get(
        [loop.validation_step(state.params, next(validation)) for _ in range(plan.validation_steps)]
    )
    tp, fp, fn = (np.sum([counts[i] for _, counts in results], axis=0) for i in range(3))
    dice = losses.pseudo_dice(tp, fp, fn)
    mean = losses.mean_foreground_dice(dice)
    ema = losses.ema_update(counters.ema, mean)
    # spec 03 §5.3: a strictly better average; the first epoch always counts.
    improved = counters.best_step is None or (
        ema is not None and (counters.best_ema is None or ema > counters.best_ema)
    )
    names = [name for name, _ in loop.task.labels.classes]
    row = {
        "step": counters.step,
        "epoch": epoch,
        "train_loss": float(np.mean(counters.epoch_losses)),
        "validation_loss": float(np.mean([loss for loss, _ in results])),
        "pseudo_dice": {name: float(d) for name, d in zip(names, dice, strict=True)},
        "mean_pseudo_dice": mean,
        "ema": ema,
        "lr": optim.learning_rate(loop.config.optim, plan.epochs)(epoch),
    }
    return row, improved


def _tell(row: Mapping[str, Any], epochs: int, progress: Progress) -> None:
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


# ------------------------------------------------------------------------- what comes before it


def prepare(
    config: TrainConfig, store: Store, folder: Path, *, fold: Fold, bundle: Path | None
) -> tuple[Loop, TrainState, Counters]:
    """Load the cases, compile the steps, and find the state to start from.

    The order: this fold's last checkpoint; else the starting weights; else random ones.
    """
    arch, patch_size = store.plans.arch, store.plans.patch_size
    batch_size = config.data.batch_size
    mesh = make_mesh(config.devices, batch_size=batch_size, patch_size=patch_size, arch=arch)
    execution = unet.Execution.auto(config.loop.compute_dtype, space=mesh.shape["space"])
    task = make_task(config, store, execution, mesh)
    checkpoints = Checkpoints(folder / "checkpoints")
    key_of = functools.partial(seed_key, config.loop.seed, sampling.fold_code(fold))
    params = unet.init_params(arch, key_of(sampling.INIT_STREAM))
    fresh = TrainState(jnp.zeros((), jnp.int32), params, task.optimizer.init(params))
    fresh = replicate(fresh, mesh)
    resumed = checkpoints.restore("final", fresh) or checkpoints.restore("latest", fresh)
    if resumed is not None:
        state, counters = resumed
        _require_whole_calls(counters.step, config.loop.steps_per_call)
        checkpoints.drop_after(counters.step)
        LOGGER.info("resuming after step %d of %d", counters.step, config.loop.total_steps)
    else:
        state, counters, origin = fresh, Counters(), None
        if bundle is not None:
            state, origin = _started_from(
                bundle, state, config.init.stem, plans=store.plans, fold=fold
            )
            state = replicate(state, mesh)
        provenance.record(folder, provenance.beginning(config, store, origin))
    records = folder if processes.is_primary() else Path(tempfile.mkdtemp(prefix="panther_jax_"))
    metrics = MetricsFile(records / "metrics.jsonl", resume_step=counters.step)
    patch = policies.patch_geometry(config.augment.policy, patch_size)
    made = feeding.make_streams(
        config, store, fold, initial_patch=patch.initial_patch_size, mesh=mesh
    )
    make_step = make_train_steps if config.loop.steps_per_call > 1 else make_train_step
    loop = Loop(
        config=config,
        task=task,
        records=records,
        checkpoints=checkpoints,
        metrics=metrics,
        stop=signals.StopRequest(),
        train_step=compiled(make_step(task), donate_argnums=0),
        validation_step=compiled(make_validation_step(task)),
        streams=made,
        board=tensorboard_writer(records / "tensorboard") if config.log.tensorboard else None,
        key=replicate(key_of(sampling.TRAIN_STREAM), mesh),
    )
    return loop, state, counters


def _require_whole_calls(step: int, per_call: int) -> None:
    if step % per_call:
        raise ConfigError(
            f"the run stopped after step {step}, which calls of {per_call} steps do not reach\n"
            f"  Go on with --loop.steps-per-call 1, or another divisor of {step}."
        )


def _started_from(
    bundle: Path, state: TrainState, stem: Literal["copy", "reinit"], *, plans: Plans, fold: Fold
) -> tuple[TrainState, dict[str, Any]]:
    loaded = load_start(bundle, fold=fold, stem=stem)
    name = next((n for n in (str(fold), "", "all") if n in loaded.params), None)
    name = next(iter(loaded.params)) if name is None else name
    result = transfer(loaded.params[name], state.params, stem=stem)
    LOGGER.info("starting weights %s%s: %s", bundle, f", fold {name}" * bool(name), result.report())
    for what in ("patch_size", "spacing", "normalization"):
        theirs, ours = getattr(loaded.plans, what), getattr(plans, what)
        if theirs != ours:
            LOGGER.warning("%s of the starting weights was %s, now it is %s", what, theirs, ours)
    started = dataclasses.replace(state, params=jax.tree.map(jnp.asarray, result.params))
    checksums = loaded.provenance.get("sha256", {})
    return started, {"bundle": str(bundle), "fold": name, "sha256": checksums}


def compile_step(loop: Loop, state: TrainState) -> Loop:
    """Compile the training step ahead of the loop, timed; out of memory is named with its cure.

    Raises:
        TrainingError: if the device has too little memory.
    """
    data = loop.config.data
    batch = next(loop.streams.train(0))
    try:
        with announced("compiling the training step"):
            train_step = loop.train_step.lower(state, batch, loop.key).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"not enough device memory for patches of {data.patch_size} in batches of "
            f"{data.batch_size}; lower --data.batch-size or --data.patch-size, or keep cases out "
            "of it with --data.resident host"
        ) from error
    return dataclasses.replace(loop, train_step=train_step)


# -------------------------------------------------------------------------------- after training


def train_fold(
    config: TrainConfig, store: Store, folder: Path, *, fold: Fold, bundle: Path | None
) -> str:
    """Train and validate one fold in ``folder``; what is done already is not done again."""
    start = time.monotonic()
    geometry = policies.patch_geometry(config.augment.policy, store.plans.patch_size)
    about = {
        "inference_allowed_mirroring_axes": list(geometry.mirror_axes),
        "training_cases": list(fold_cases(store, fold)[0]),
    }
    provenance.record(folder, about)
    loop, state, counters = prepare(config, store, folder, fold=fold, bundle=bundle)
    template = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    if counters.step < config.loop.total_steps:
        loop = compile_step(loop, state)
        loop.stop.listen()
        state, counters = run_loop(loop, state, counters)
        loop.stop.after_training()
    elif not loop.checkpoints.steps("final"):
        loop.checkpoints.save("final", state, counters)
    provenance.record(folder, {"params_sha256": params_sha256(state.params)})
    net, checkpoints = loop.task.net, loop.checkpoints
    del loop, state  # the cases and the state make room for predicting
    tables = validate_checkpoints(
        store,
        net,
        checkpoints,
        template,
        folder,
        settings=config.validation,
        mirror_axes=geometry.mirror_axes,
        case_ids=cases_to_validate(fold_cases(store, fold)[1], config.validation.cases),
        trained_on=fold_cases(store, fold)[0],
    )
    provenance.record(
        folder, {"finished": True, "seconds_last_session": round(time.monotonic() - start)}
    )
    return tables


# ---------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return launch.main(train_fold, sys.argv[1:] if argv is None else argv)


sys.modules[__name__].__class__ = Face  # panther_jax.train is a function too


if __name__ == "__main__":
    sys.exit(main())
