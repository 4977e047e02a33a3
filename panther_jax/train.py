"""Train one stage, one fold: ``python -m panther_jax.train --config mri_t2.py``.

Read from top to bottom: open the run, train and validate its fold, the loop, the end of an epoch.
A run resumes by itself; all randomness is a function of (seed, fold, stream, step, position).
"""

import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Key

from panther_jax.base import command
from panther_jax.base.console import Progress, setup_logging
from panther_jax.config.places import Fold, Places
from panther_jax.config.schema import TrainConfig
from panther_jax.devices import processes
from panther_jax.devices.mesh import make_mesh, replicate
from panther_jax.library import Face
from panther_jax.network import unet
from panther_jax.reporting.pictures import plot_progress
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import Store
from panther_jax.training import epoch, feeding, provenance, records, session, signals, starting
from panther_jax.training.compilation import compile_ahead, too_little_memory_named
from panther_jax.training.data import prepare_store
from panther_jax.training.dry_run import describe
from panther_jax.training.options import Options, parse
from panther_jax.training.records import Clock, MetricsFile, read_metrics
from panther_jax.training.resident import AnyBatch
from panther_jax.training.sampling import TRAIN_STREAM, fold_code
from panther_jax.training.settings import resolve
from panther_jax.training.step import Task, compiled_steps, make_task, seed_key
from panther_jax.training.validation import validate_fold
from panther_jax.training.workdir import open_workdir
from panther_jax.weights.bundle import params_sha256
from panther_jax.weights.checkpoint import Checkpoints, Counters, TrainState, abstract
from panther_jax.weights.names import named_start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options, overrides = parse(sys.argv[1:] if argv is None else argv)
    code = command.run(lambda: train(options, overrides), quiet=options.quiet, debug=options.debug)
    session.leave(options, code)
    return code


# ------------------------------------------------------------------------------------ the run


def train(options: Options, overrides: Sequence[str] = ()) -> str:
    """Open the run and train one fold; returns what the command prints."""
    config, source = resolve(options, overrides)
    session.set_up_jax(config, deterministic=options.deterministic)
    primary = session.join(options)
    quiet = options.quiet or not primary
    setup_logging(quiet=quiet)
    places = Places(options.root)
    workdir = options.workdir or places.run(source.run_name + ("_demo" if options.demo else ""))
    folder = places.fold(workdir, options.fold)
    session.greet(source, workdir)
    if options.dry_run:
        return describe(config, options, places, workdir)
    init = config.init
    bundle = named_start(init.bundle, places, source=init.source) if init.bundle else None
    with session.failures_explained():
        store = session.one_by_one("store", lambda: prepare_store(config, options, places))
        if options.prepare_only:
            return str(store.folder)
        if primary:
            open_workdir(workdir, folder, config, store, options)
        setup_logging(quiet=quiet, file=folder / "log.txt" if primary else None)
        provenance.record(folder, provenance.provenance(config, source, options, store))
        tables = train_fold(config, store, folder, fold=options.fold, bundle=bundle)
    return f"{folder}\n\n{tables}" if primary else ""


def train_fold(
    config: TrainConfig, store: Store, folder: Path, *, fold: Fold, bundle: Path | None
) -> str:
    """Train and validate one fold in ``folder``; what is done already is not done again."""
    start = time.monotonic()
    loop, state, counters = prepare(config, store, folder, fold=fold, bundle=bundle)
    if counters.step < config.loop.total_steps:
        loop = compile_step(loop, state)
        loop.stop.listen()
        state, counters = run_loop(loop, state, counters)
        loop.stop.after_training()
    elif not loop.checkpoints.steps("final"):
        loop.checkpoints.save("final", state, counters)
    provenance.record(folder, {"params_sha256": params_sha256(state.params)})
    checkpoints, template, axes = loop.checkpoints, abstract(state), loop.task.patch.mirror_axes
    del loop, state  # the cases and the state make room for predicting
    saved = {"checkpoints": checkpoints, "template": template}
    tables = validate_fold(config, store, folder, fold=fold, mirror_axes=axes, **saved)
    seconds = round(time.monotonic() - start)
    provenance.record(folder, {"finished": True, "seconds_last_session": seconds})
    return tables


# ----------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Loop:
    """Everything the loop works with besides the state.

    ``folder`` takes metrics and pictures: the fold's, or of other processes one nobody looks at.
    """

    config: TrainConfig
    task: Task
    folder: Path
    checkpoints: Checkpoints
    metrics: MetricsFile
    stop: signals.StopRequest
    train_step: Callable[..., Any]
    validation_step: Callable[..., Any]
    streams: feeding.Streams
    key: Key[Array, ""]
    board: Any = None


def prepare(
    config: TrainConfig, store: Store, folder: Path, *, fold: Fold, bundle: Path | None
) -> tuple[Loop, TrainState, Counters]:
    """Load the cases, make the steps, and find the state to start from."""
    plans, data = store.plans, config.data
    mesh = make_mesh(
        config.devices, batch_size=data.batch_size, patch_size=plans.patch_size, arch=plans.arch
    )
    execution = unet.Execution.auto(config.loop.compute_dtype, space=mesh.shape["space"])
    task = make_task(config, store, execution, mesh)
    checkpoints = Checkpoints(folder / "checkpoints")
    state, counters, origin = starting.find_state(
        config, store, task.optimizer, checkpoints, fold=fold, bundle=bundle, mesh=mesh
    )
    about = {
        "inference_allowed_mirroring_axes": list(task.patch.mirror_axes),
        "training_cases": list(fold_cases(store, fold)[0]),
    }
    provenance.record(folder, about | origin)
    here = folder if processes.is_primary() else Path(tempfile.mkdtemp(prefix="panther_jax_"))
    key = seed_key(config.loop.seed, fold_code(fold), TRAIN_STREAM)
    train_step, validation_step = compiled_steps(task, config.loop.steps_per_call)
    loop = Loop(
        config=config,
        task=task,
        folder=here,
        checkpoints=checkpoints,
        metrics=MetricsFile(here / "metrics.jsonl", resume_step=counters.step),
        stop=signals.StopRequest(),
        train_step=train_step,
        validation_step=validation_step,
        streams=feeding.make_streams(
            config, store, fold, initial_patch=task.patch.initial_patch_size, mesh=mesh
        ),
        board=records.tensorboard_writer(here / "tensorboard") if config.log.tensorboard else None,
        key=replicate(key, mesh),
    )
    return loop, state, counters


def compile_step(loop: Loop, state: TrainState) -> Loop:
    """Compile the training step ahead of the loop, so that a device too small is known at once."""
    batch = next(loop.streams.train(0))
    step = compile_ahead(loop.train_step, loop.config.data, state, batch, loop.key)
    return dataclasses.replace(loop, train_step=step)


def run_loop(loop: Loop, state: TrainState, counters: Counters) -> tuple[TrainState, Counters]:
    """Train from ``counters.step`` to the end, ``steps_per_call`` at a time; saves as it goes.

    Raises:
        TrainingError: if loss or gradients stop being finite, or memory does not suffice; nothing
            of that is saved.
        Interrupted: after a signal, with the state saved.
    """
    plan, first = loop.config.loop, counters.step
    per_call = plan.steps_per_call
    clock = Clock(Progress(plan.total_steps, first=first, label="step"))
    stream, validation = loop.streams.train(first), loop.streams.validation(first)
    pending: list[Mapping[str, Array]] = []
    with jax.transfer_guard("disallow"), too_little_memory_named(loop.config.data):
        for done in range(first + per_call, plan.total_steps + 1, per_call):
            with clock.waiting():
                batch = next(stream)
            state, call_metrics = loop.train_step(state, batch, loop.key)
            pending.append(call_metrics)
            epoch_ends = done % plan.steps_per_epoch == 0
            stop, save = _stop_or_save(loop, clock, done)
            if epoch_ends or save or len(pending) * per_call >= loop.config.log.every_steps:
                counters, pending = epoch.collect_losses(counters, pending, done), []
                clock.progress.update(done, f"loss {counters.epoch_losses[-1]:.3f}")
            if epoch_ends:
                counters = _end_epoch(loop, state, counters, validation, clock)
                regular = done % (plan.checkpoint_every_epochs * plan.steps_per_epoch) == 0
                save = save or (regular and done < plan.total_steps)
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


def _stop_or_save(loop: Loop, clock: Clock, done: int) -> tuple[bool, bool]:
    plan = loop.config.loop
    if jax.process_count() > 1 and done % loop.config.log.every_steps >= plan.steps_per_call:
        return False, False  # they would have to wait for each other at every call
    return loop.stop.asked(late=clock.since_save() > 60 * plan.checkpoint_minutes)


def _end_epoch(
    loop: Loop, state: TrainState, counters: Counters, batches: Iterator[AnyBatch], clock: Clock
) -> Counters:
    """Validate online, write the epoch's row and picture, save the best; the new counters."""
    step = functools.partial(loop.validation_step, state.params)
    with clock.paused():
        row = epoch.validate_online(loop.config, loop.task.labels, step, batches, counters)
        row |= clock.end_epoch()
        loop.metrics.append(row)
        if loop.board is not None:
            records.write_scalars(loop.board, row)
        epoch.tell_epoch(row, loop.config.loop.epochs, clock.progress)
        plot_progress(read_metrics(loop.metrics.path), loop.folder / "progress.png")
        counters, improved = epoch.after_epoch(counters, row)
        if improved:
            loop.checkpoints.save("best", state, counters)
    return counters


sys.modules[__name__].__class__ = Face  # panther_jax.train is a function too


if __name__ == "__main__":
    sys.exit(main())
