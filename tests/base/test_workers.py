"""Worker processes: broken data are collected, defects and deaths named at once, nothing hangs."""

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from panther_jax.base import workers
from panther_jax.base.errors import WriteError
from panther_jax.base.files import writing


def work(task: str) -> Any:
    if task == "broken":
        raise ValueError("broken data")
    if task == "defect":
        raise TypeError("a defect")
    if task == "die":
        os._exit(9)
    if task == "sleep":
        time.sleep(60)
    if task.startswith("write "):
        path = Path(task.removeprefix("write "))
        with writing(path) as temporary:
            temporary.write_bytes(b"half")
            time.sleep(60)
    if task.startswith("full when "):
        folder = Path(task.removeprefix("full when "))
        while not list(folder.glob(".*.tmp")):
            time.sleep(0.05)
        raise WriteError(errno.ENOSPC, "the disk is full")
    return task.upper(), os.getpid(), "jax" in sys.modules


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_defect_without_workers_names_the_case_too() -> None:
    with pytest.raises(workers.WorkerError, match="(?s)'b' failed.*Traceback.*a defect"):
        list(workers.map_cases(work, [("a", "x"), ("b", "defect")], workers=1))


def test_workers_name_broken_cases_and_go_on(importable: None) -> None:
    tasks = [("a", "x"), ("b", "broken"), ("c", "y"), ("d", "z")]
    found = dict(workers.map_cases(work, tasks, workers=2))
    assert found["b"] == workers.Failure("broken data")
    assert [found[i][0] for i in "acd"] == ["X", "Y", "Z"]
    assert os.getpid() not in {found[i][1] for i in "acd"}
    assert not any(found[i][2] for i in "acd")  # no JAX in a worker


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("defect", workers.WorkerError, "(?s)'b' failed.*Traceback.*a defect"),
        ("die", workers.WorkerError, "'b': its worker process died .exit code 9"),
    ],
)
def test_failing_worker_stops_all_within_seconds(
    importable: None, fault: str, error: type[Exception], message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message):
        list(workers.map_cases(work, [("a", "sleep"), ("b", fault)], workers=2))
    assert time.monotonic() - start < 20  # the sleeper would take 60


def test_full_disk_in_one_worker_leaves_nothing_half_written_by_another(
    importable: None, tmp_path: Path
) -> None:
    tasks = [("a", f"write {tmp_path / 'a.npy'}"), ("b", f"full when {tmp_path}")]
    with pytest.raises(WriteError, match="the disk is full"):
        list(workers.map_cases(work, tasks, workers=2))
    assert not list(tmp_path.iterdir())
