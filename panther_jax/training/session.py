"""The process that a run lives in: JAX set up, the run's other processes joined and left."""

import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import panther_jax
from panther_jax.config.loading import ConfigSource
from panther_jax.config.schema import TrainConfig
from panther_jax.training.options import Options
from panther_jax.training.provenance import device_name
from panther_jax.training.signals import LostProcess

LOGGER = logging.getLogger("panther_jax")
Result = TypeVar("Result")


def set_up_jax(settings: TrainConfig, *, deterministic: bool) -> None:
    """Options of XLA, to be set before JAX finds its devices, and the compilation cache."""
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if settings.loop.compilation_cache:
        from panther_jax.devices import compiler

        compiler.use_compilation_cache()


def greet(source: ConfigSource, workdir: Path) -> None:
    """Log which versions run where, with which config, into which folder."""
    LOGGER.info(
        "panther_jax %s, JAX %s on %s\nconfig %s\nwork directory %s",
        panther_jax.__version__,
        importlib.metadata.version("jax"),
        device_name(),
        source.path,
        workdir,
    )


def join(options: Options) -> bool:
    """Join the other processes of the run, if there are any; whether this is the first one."""
    from panther_jax.devices import processes

    if _several(options):
        processes.connect(options.coordinator, options.num_processes, options.process_id)
    return processes.is_primary()


def one_by_one(what: str, make: Callable[[], Result]) -> Result:
    """Let the first process do something on disk; the others then find it done."""
    from panther_jax.devices import processes

    if processes.is_primary():
        result = make()
        processes.wait_for_all(what)
        return result
    processes.wait_for_all(what)
    return make()


@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
    """Log the traceback of what goes wrong inside; a process that is gone is named as such.

    Raises:
        LostProcess: in place of what JAX raises when another process died.
    """
    from panther_jax.devices import processes

    try:
        yield
    except Exception as error:
        LOGGER.debug("stopped", exc_info=error)
        if not processes.lost_process(error):
            raise
        raise LostProcess(
            "another process of this run is gone, so this one cannot go on\n  Start all of them "
            "again with the same commands: the run resumes from its last checkpoint, also on "
            "another number of devices."
        ) from error


def leave(options: Options, code: int) -> None:
    """End a failed process of several at once; one that is alone is left to end by itself."""
    if code and _several(options):
        # An orderly end would wait for the other processes, of which one may be gone.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)


def _several(options: Options) -> bool:
    return bool(options.distributed or options.coordinator)
