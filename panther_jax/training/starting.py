"""Where training starts: this fold's last checkpoint, else the starting weights, else at random."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from panther_jax.config.places import Fold
from panther_jax.config.schema import ConfigError, LoopConfig, TrainConfig
from panther_jax.devices.mesh import replicate
from panther_jax.network import unet
from panther_jax.plans.plans import Plans
from panther_jax.store.store import Store
from panther_jax.training.provenance import beginning
from panther_jax.training.sampling import INIT_STREAM, fold_code
from panther_jax.training.step import seed_key
from panther_jax.weights.checkpoint import Checkpoints, Counters, TrainState
from panther_jax.weights.start import load_start
from panther_jax.weights.transfer import transfer

LOGGER = logging.getLogger("panther_jax")


def find_state(
    config: TrainConfig,
    store: Store,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
    *,
    fold: Fold,
    bundle: Path | None,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, Counters, dict[str, Any]]:
    """The state to go on from, on all devices, and what run.json says of a beginning.

    Raises:
        ConfigError: if calls of several steps do not reach the step of the last checkpoint.
        CheckpointError: if the checkpoints or the bundle cannot be read.
    """
    key = seed_key(config.loop.seed, fold_code(fold), INIT_STREAM)
    params = unet.init_params(store.plans.arch, key)
    fresh = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    fresh = replicate(fresh, mesh)
    resumed = _resumed(checkpoints, fresh, config.loop)
    if resumed is not None:
        return (*resumed, {})
    if bundle is None:
        return fresh, Counters(), beginning(config, store, None)
    started, origin = _from_bundle(bundle, fresh, config.init.stem, plans=store.plans, fold=fold)
    return replicate(started, mesh), Counters(), beginning(config, store, origin)


def _resumed(
    checkpoints: Checkpoints, fresh: TrainState, plan: LoopConfig
) -> tuple[TrainState, Counters] | None:
    found = checkpoints.restore("final", fresh) or checkpoints.restore("latest", fresh)
    if found is None:
        return None
    step = found[1].step
    if step % plan.steps_per_call:
        raise ConfigError(
            f"the run stopped after step {step}, which calls of {plan.steps_per_call} steps do not "
            f"reach\n  Go on with --loop.steps-per-call 1, or another divisor of {step}."
        )
    checkpoints.drop_after(step)
    LOGGER.info("resuming after step %d of %d", step, plan.total_steps)
    return found


def _from_bundle(
    bundle: Path, fresh: TrainState, stem: Literal["copy", "reinit"], *, plans: Plans, fold: Fold
) -> tuple[TrainState, dict[str, Any]]:
    loaded = load_start(bundle, fold=fold, stem=stem)
    name = next((n for n in (str(fold), "", "all") if n in loaded.params), None)
    name = next(iter(loaded.params)) if name is None else name
    result = transfer(loaded.params[name], fresh.params, stem=stem)
    LOGGER.info("starting weights %s%s: %s", bundle, f", fold {name}" * bool(name), result.report())
    for what in ("patch_size", "spacing", "normalization"):
        theirs, ours = getattr(loaded.plans, what), getattr(plans, what)
        if theirs != ours:
            LOGGER.warning("%s of the starting weights was %s, now it is %s", what, theirs, ours)
    started = dataclasses.replace(fresh, params=jax.tree.map(jnp.asarray, result.params))
    checksums = loaded.provenance.get("sha256", {})
    return started, {"bundle": str(bundle), "fold": name, "sha256": checksums}
