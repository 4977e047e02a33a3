"""One training step and one validation step: pure functions, and what they are made of.

All randomness of a step is a function of (seed, fold, stream, step, position in the batch).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import Array, Key

from panther_jax.augment import policies
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.devices.compiler import compiled
from panther_jax.devices.mesh import split_patches
from panther_jax.network import unet
from panther_jax.plans.labels import Labels
from panther_jax.store.store import Store
from panther_jax.training import losses, optim, targets
from panther_jax.training.resident import AnyBatch, Batch
from panther_jax.weights.checkpoint import TrainState


@dataclass(frozen=True)
class Task:
    """What the steps of a run have in common: network, loss, optimiser, augmentation.

    ``split`` lays patches out over the devices; a patch is augmented whole and split after.
    ``patch`` says how large they are cut for it, and which axes it flips.
    """

    net: unet.Net
    labels: Labels
    loss_fn: Callable[[tuple[Array, ...], tuple[Array, ...]], Array]
    split: Callable[[Array], Array]
    augment: Callable[..., tuple[Array, Array]]
    patch: policies.PatchGeometry
    optimizer: optax.GradientTransformation
    clip_norm: float
    deep_supervision: bool

    def targets(self, label: Array) -> tuple[Array, ...]:
        """Targets of every supervised output, highest resolution first; -1 must be gone."""
        if self.labels.has_regions:
            label = targets.to_regions(label, self.labels)
        strides = self.net.arch.output_strides
        return targets.deep_supervision_targets(
            label, strides if self.deep_supervision else strides[:1]
        )

    def outputs(self, params: unet.Params, image: Array) -> tuple[Array, ...]:
        """Logits of every supervised output, highest resolution first."""
        return unet.apply(self.net, params, image, full_only=not self.deep_supervision)


def make_train_step(
    task: Task,
) -> Callable[[TrainState, AnyBatch, Key[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """Make the update: cut, augment, predict, loss, clip, optimise.

    Pure; jit it, donating the state.
    """

    def train_step(
        state: TrainState, batch: AnyBatch, seed_key: Key[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(seed_key, state.step)
        patches: Batch = batch.cut()
        image, label = task.augment(key, patches.image, patches.label)
        image, label = task.split(image), task.split(label)
        wanted = task.targets(label)

        def objective(params: unet.Params) -> Array:
            return task.loss_fn(task.outputs(params, image), wanted)

        loss, grads = jax.value_and_grad(objective)(state.params)
        grads, norm = optim.clip_by_global_norm(grads, task.clip_norm)
        updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), {"loss": loss, "grad_norm": norm}

    return train_step


def make_train_steps(
    task: Task,
) -> Callable[[TrainState, AnyBatch, Key[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """Make several updates in one: batches and what is returned have a leading axis of steps."""
    train_step = make_train_step(task)

    def train_steps(
        state: TrainState, batches: AnyBatch, seed_key: Key[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        def one(state: TrainState, drawn: Any) -> tuple[TrainState, dict[str, Array]]:
            return train_step(state, batches.of(drawn), seed_key)

        return jax.lax.scan(one, state, batches.drawn)

    return train_steps


def make_validation_step(
    task: Task,
) -> Callable[[unet.Params, AnyBatch], tuple[Array, tuple[Array, Array, Array]]]:
    """Make the online validation: loss and voxel counts of a batch (spec 03 §5.1)."""

    def validation_step(
        params: unet.Params, batch: AnyBatch
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        patches: Batch = batch.cut()
        wanted = task.targets(targets.remove_outside(task.split(patches.label)))
        outputs = task.outputs(params, task.split(patches.image))
        return (
            task.loss_fn(outputs, wanted),
            losses.pseudo_dice_counts(outputs[0], wanted[0], task.labels),
        )

    return validation_step


def compiled_steps(task: Task, steps_per_call: int) -> tuple[Any, Any]:
    """The training step, of one or several updates, and the validation step, as JAX programs."""
    make_step = make_train_steps if steps_per_call > 1 else make_train_step
    train_step = compiled(make_step(task), donate_argnums=0)
    return train_step, compiled(make_validation_step(task))


def make_task(
    config: TrainConfig, store: Store, execution: unet.Execution, mesh: jax.sharding.Mesh
) -> Task:
    """Put a run's network, loss, optimiser and augmentation together."""
    plans = store.plans
    if plans.arch.dropout_rate:
        raise ConfigError("the plans ask for dropout, which training does not support; remove it")
    plans.arch.check_patch(plans.patch_size)
    batch_dice = plans.batch_dice if config.loss.batch_dice is None else config.loss.batch_dice
    one_output = losses.make_loss(config.loss, store.labels, batch_dice=batch_dice)
    if config.loss.deep_supervision:
        loss_fn = losses.deep_supervised(
            one_output, losses.deep_supervision_weights(plans.arch.num_stages - 1)
        )
    else:
        loss_fn = losses.deep_supervised(one_output, (1.0,))
    schedule = optim.make_schedule(config.optim, config.loop.epochs, config.loop.steps_per_epoch)
    masked = tuple(c for c, used in enumerate(plans.use_mask_for_norm) if used)
    return Task(
        net=unet.build(plans.arch, execution),
        labels=store.labels,
        loss_fn=loss_fn,
        split=split_patches(mesh),
        augment=_shared_out(
            policies.make_batch_augment(
                config.augment.policy,
                patch_size=plans.patch_size,
                mask_channels=masked,
                label_ids=store.labels.allowed_values,
            ),
            mesh,
        ),
        patch=policies.patch_geometry(config.augment.policy, plans.patch_size),
        optimizer=optim.make_optimizer(config.optim, schedule),
        clip_norm=config.optim.clip_norm,
        deep_supervision=config.loss.deep_supervision,
    )


def _shared_out(augment_batch: Callable[..., Any], mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """Augment each device's samples on it; a sample's key is of its place in the global batch."""

    def local(key: Array, image: Array, label: Array) -> tuple[Array, Array]:
        offset = jax.lax.axis_index("data") * image.shape[0]
        return augment_batch(key, image, label, offset)

    in_batch = jax.P("data")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(jax.P(), in_batch, in_batch), out_specs=(in_batch, in_batch)
    )


def seed_key(seed: int, fold: int, stream: int) -> Key[Array, ""]:
    """The key of a stream of a fold (spec 07 §7.6)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), fold), stream)
