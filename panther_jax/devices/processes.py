"""The processes that share a run."""

import jax
import numpy as np

from panther_jax.config.schema import ConfigError

HEARTBEAT_SECONDS = 30
SHUTDOWN_SECONDS = 10
LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "gloo",
    "heartbeat",
    "coordination service",
    "nccl",
    "deadline_exceeded",
    "barrier",
)


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the processes of a run; without arguments SLURM, GKE, or a TPU pod tell who they are.

    Raises:
        ConfigError: if the coordinator or the cluster cannot be found.
    """
    # On a CPU nothing else connects processes; ignored elsewhere.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of the run do not find each other: {str(error).splitlines()[0]}\n"
            "  Name them with --coordinator HOST:PORT --num-processes N --process-id K, or start "
            "them with srun, on GKE, or on a TPU pod with --distributed."
        ) from error


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag, true if it is in any process; the same answer everywhere."""
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    with jax.transfer_guard("allow"):
        gathered = multihost_utils.process_allgather(np.array(flags))
    wanted = np.asarray(gathered).reshape(-1, len(flags)).max(axis=0)
    return tuple(bool(flag) for flag in wanted.tolist())


def lost_process(error: BaseException) -> bool:
    """Whether an error of the runtime tells that another process is gone."""
    text = str(error).lower()
    return jax.process_count() > 1 and any(sign in text for sign in LOST)
