"""Spawned worker processes, a case each: broken data are collected, a death is named at once.

No fork: JAX is multi-threaded (spec 07 §7.6). The functions that workers run must not import JAX.
Not concurrent.futures: when a process dies its executor fails every pending case alike and tells
neither which case nor what exit code, and before Python 3.14 nothing public ends a busy worker.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from panther_jax.base import plugins
from panther_jax.base.errors import PantherError, WriteError

EXIT_SECONDS = 5.0


class WorkerError(PantherError, RuntimeError):
    """A worker process failed or died; the message names the case and holds the traceback."""


@dataclass(frozen=True)
class Failure:
    """A case that is broken: its data cannot be used."""

    message: str


def map_cases(
    function: Callable[[Any], Any], tasks: Sequence[tuple[str, Any]], *, workers: int
) -> Iterator[tuple[str, Any]]:
    """Yield ``(case id, function(task) or Failure)`` as cases finish, from spawned processes.

    A case whose data are at fault (ValueError, FileNotFoundError) yields a :class:`Failure`. Any
    other exception, or a process that dies, stops everything at once. With fewer than two workers
    all runs in this process.

    Raises:
        WorkerError: naming the case, with the original traceback.
        WriteError: if the disk is full.
    """
    if workers < 2 or len(tasks) < 2:
        for case_id, task in tasks:
            yield case_id, _unpacked(case_id, _attempt(function, task))
        return
    with _Pool(function, min(workers, len(tasks))) as pool:
        yield from pool.map(tasks)


def _attempt(function: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    try:
        return "done", function(task)
    except WriteError as error:
        return "storage", (error.errno, error.strerror)
    except (ValueError, FileNotFoundError) as error:
        return "broken", Failure(str(error))
    except Exception:
        return "failed", traceback.format_exc()


def _unpacked(case_id: str, outcome: tuple[str, Any]) -> Any:
    status, value = outcome
    if status == "storage":
        raise WriteError(*value)
    if status == "failed":
        raise WorkerError(f"case {case_id!r} failed:\n{value}")
    return value


class _Pool:
    """Spawned processes with a pipe each: a death is seen at once and named, never waited for."""

    def __init__(self, function: Callable[[Any], Any], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Any, Any] = {}
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        threading = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        with _environment(threading, plugins.environment()):
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process

    def map(self, tasks: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        waiting, idle = list(reversed(tasks)), list(self._processes)
        busy: dict[Any, str] = {}
        while waiting or busy:
            while waiting and idle:
                connection, (case_id, task) = idle.pop(), waiting.pop()
                busy[connection] = case_id
                with contextlib.suppress(OSError):  # a dead worker: seen on reading, just below
                    connection.send(task)
            for ready in multiprocessing.connection.wait(list(busy)):
                case_id = busy.pop(ready)
                try:
                    outcome = ready.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    raise _died(self._processes[ready], case_id) from None
                idle.append(ready)
                yield case_id, _unpacked(case_id, outcome)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *exception: Any) -> None:
        for connection, process in self._processes.items():
            connection.close()  # an idle worker sees the end and leaves
            if exception[0] is not None:
                process.terminate()
        for process in self._processes.values():
            process.join(EXIT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _died(process: Any, case_id: str) -> WorkerError:
    process.join(EXIT_SECONDS)
    killed = process.exitcode is not None and process.exitcode < 0
    hint = "most likely memory ran out: try again with fewer --workers" if killed else "see above"
    return WorkerError(
        f"case {case_id!r}: its worker process died (exit code {process.exitcode}); {hint}"
    )


def _serve(function: Callable[[Any], Any], connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds: temporary files are removed
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(function, task))


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str], values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes started meanwhile; defaults where there is none."""
    added = {k: v for k, v in defaults.items() if k not in os.environ} | dict(values)
    before = {key: os.environ.get(key) for key in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
