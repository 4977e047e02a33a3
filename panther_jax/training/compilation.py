"""The steps of a run as programs; a device with too little memory is named with its cure."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from panther_jax.base.console import announced
from panther_jax.config.schema import DataConfig
from panther_jax.training.signals import TrainingError


def compile_ahead(step: Any, data: DataConfig, *arguments: Any) -> Any:
    """Compile a jitted step for its arguments, timed.

    Raises:
        TrainingError: if the device has too little memory.
    """
    with announced("compiling the training step"), too_little_memory_named(data):
        return step.lower(*arguments).compile()


@contextlib.contextmanager
def too_little_memory_named(data: DataConfig) -> Iterator[None]:
    """Say in the user's words that a program does not fit: when it is compiled, or first runs.

    Raises:
        TrainingError: in place of what JAX raises when memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"not enough device memory for patches of {data.patch_size} in batches of "
            f"{data.batch_size}; lower --data.batch-size or --data.patch-size, or keep cases out "
            "of it with --data.resident host"
        ) from error
