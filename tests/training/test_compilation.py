"""A device with too little memory is named with its cure, when compiling and when running."""

import jax
import pytest

from panther_jax.config.schema import DataConfig
from panther_jax.training.compilation import compile_ahead, too_little_memory_named
from panther_jax.training.signals import TrainingError

DATA = DataConfig("Dataset902_Tiny", configuration="c", patch_size=(8, 16, 24), batch_size=3)
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4096 bytes."


class Step:
    """A jitted step that the compiler refuses."""

    def __init__(self, message):
        self.message = message

    def lower(self, *_arguments):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_step_is_compiled_for_its_arguments():
    assert compile_ahead(jax.jit(lambda x: x + 1), DATA, 2)(2) == 3


def test_memory_that_ends_while_compiling_is_named():
    with pytest.raises(TrainingError, match=r"\(8, 16, 24\) in batches of 3; lower --data.batch-"):
        compile_ahead(Step(EXHAUSTED), DATA)


def test_memory_that_ends_while_running_is_named():
    with (
        pytest.raises(TrainingError, match="keep cases out of it with --data.resident host"),
        too_little_memory_named(DATA),
    ):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)


def test_other_failures_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="^INTERNAL: broken"):
        compile_ahead(Step("INTERNAL: broken"), DATA)
