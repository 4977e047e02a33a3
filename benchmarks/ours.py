"""Our side of the training benchmarks: a process that runs steps when asked (harness.serving)."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, networks
from panther_jax.augment import policies
from panther_jax.config.schema import LossConfig, OptimConfig
from panther_jax.devices.compiler import compiled
from panther_jax.network import unet
from panther_jax.plans.labels import Labels
from panther_jax.training import losses, optim, resident, step
from panther_jax.weights.checkpoint import TrainState

EPOCHS, STEPS_PER_EPOCH = 1000, 250


def make_task(size: networks.Size, dtype: str = "auto", policy: str = "none") -> step.Task:
    """A training task as ``panther_jax.train`` makes it, without a store."""
    labels = Labels.from_dataset_json(networks.DATASET)
    config = OptimConfig()
    count = size.arch.num_stages - 1
    one_output = losses.make_loss(LossConfig(), labels, batch_dice=False)
    return step.Task(
        net=unet.build(size.arch, unet.Execution.auto(dtype)),
        labels=labels,
        loss_fn=losses.deep_supervised(one_output, networks.supervision_weights(count)),
        split=lambda patches: patches,
        augment=policies.make_batch_augment(
            policy, patch_size=size.patch, label_ids=labels.allowed_values
        ),
        optimizer=optim.make_optimizer(
            config, optim.make_schedule(config, EPOCHS, STEPS_PER_EPOCH)
        ),
        clip_norm=config.clip_norm,
        deep_supervision=count > 1,
    )


def make_state(size: networks.Size, task: step.Task) -> TrainState:
    """The state that training starts from."""
    params = unet.init_params(size.arch, jax.random.key(0))
    return TrainState(jnp.zeros((), jnp.int32), params, task.optimizer.init(params))


def train_step(size: networks.Size, task: step.Task) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step, and arguments for it."""
    image, label = (jnp.asarray(a) for a in networks.make_batch(size))
    arguments = make_state(size, task), resident.Batch(image, label), jax.random.key(1)
    return compiled(step.make_train_step(task), donate_argnums=0), arguments


class Works:
    """Forward pass, gradient and step of a size, each compiled when first asked for."""

    def __init__(self, size: networks.Size, dtype: str):
        self.size, self.task = size, make_task(size, dtype)
        self.compile_seconds: dict[str, float] = {}
        self._made: dict[str, Callable[[], Any]] = {}

    def get(self, name: str) -> Callable[[], Any]:
        """The work as a function that returns when the device is done."""
        if name not in self._made:
            self._made[name] = getattr(self, f"_{name}")()
        return self._made[name]

    def _compiled(self, name: str, function: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        self.compile_seconds[name] = time.perf_counter() - start
        return compiled

    def _inputs(self) -> tuple[Any, Any, tuple[Any, ...]]:
        image, label = networks.make_batch(self.size)
        wanted = networks.make_targets(self.size, label)
        if not self.task.deep_supervision:
            wanted = wanted[:1]
        params = unet.init_params(self.size.arch, jax.random.key(0))
        return params, jnp.asarray(image), tuple(jnp.asarray(t) for t in wanted)

    def _forward(self) -> Callable[[], Any]:
        params, image, _ = self._inputs()
        run = self._compiled("forward", compiled(self.task.outputs), params, image)
        return lambda: jax.block_until_ready(run(params, image))

    def _gradient(self) -> Callable[[], Any]:
        params, image, wanted = self._inputs()

        def objective(params: Any, image: Any, wanted: Any) -> Any:
            return self.task.loss_fn(self.task.outputs(params, image), wanted)

        function = compiled(jax.value_and_grad(objective))
        run = self._compiled("gradient", function, params, image, wanted)
        return lambda: jax.block_until_ready(run(params, image, wanted))

    def _step(self) -> Callable[[], Any]:
        function, (state, batch, key) = train_step(self.size, self.task)
        run = self._compiled("step", function, state, batch, key)
        held = [state]

        def once() -> Any:
            held[0], metrics = run(held[0], batch, key)
            return jax.block_until_ready(metrics["loss"])

        return once


def serve_works(size: Mapping[str, Any], dtype: str) -> Callable[..., Any]:
    """Answer ``("time", work, calls)``, ``("loss",)``, ``("save", path)``, ``("facts",)``."""
    works = Works(networks.Size.from_json(size), dtype)

    def handle(what: str, *arguments: Any) -> Any:
        if what == "time":
            name, calls = arguments
            return harness.timed(works.get(name), calls)
        if what == "loss":
            return float(works.get("gradient")()[0])
        if what == "save":
            return save_weights(works.size, arguments[0])
        return {
            "device": jax.devices()[0].device_kind,
            "dtype": works.task.net.execution.dtype,
            "compile_seconds": works.compile_seconds,
            "peak_bytes": device_peak() or harness.peak_bytes(),
        }

    return handle


def save_weights(size: networks.Size, path: str) -> None:
    """Write the weights that :class:`Works` starts from, for the peer."""
    from weight_conversion import mapping

    params = unet.init_params(size.arch, jax.random.key(0))
    state: dict[str, Any] = dict(mapping.to_state(params, size.arch))
    np.savez(path, **state)


def device_peak() -> int:
    """Peak of memory on the accelerator; 0 on a CPU."""
    return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
