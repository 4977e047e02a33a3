"""Kill commands at any moment, start them again, and compare with a run that was left alone.

Commands run in processes forked from one that has imported everything. A kill comes at the n-th
change of a file under the watched folder (`Kill(event=n)`: between any two steps of a checkpoint's
write, of a store's, of an export), or after some time (`Kill(seconds=t)`), as SIGKILL.

By hand, with as many kills as wanted:  PYTHONPATH=.:tests python tests/fault_harness.py 30
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = (
    "fault_harness", "panther_jax.train", "panther_jax.predict", "panther_jax.inference.predictor",
    "panther_jax.bundle", "panther_jax.preprocess", "orbax.checkpoint", "grain", "tyro",
    "matplotlib.figure", "SimpleITK", "weight_conversion.export_nnunet",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink"}
TIMED = ("seconds", "wait_share")
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Kill:
    """When SIGKILL comes: at a change of a file, or after some seconds; never if neither is set."""

    event: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Limits:
    """What a process may do: file size in bytes, what is wrong with its clock."""

    file_bytes: int | None = None
    clock: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit code (-9 if it was killed), its output, changes of files seen."""

    code: int
    out: str
    err: str
    events: int


# -------------------------------------------------------------------------------- the processes


def context() -> Any:
    """Processes forked from a small server that has imported everything and started nothing."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(PRELOAD))
    return made


def run(
    module: str,
    argv: Sequence[object],
    *,
    watched: Path,
    kill: Kill | None = None,
    limits: Limits | None = None,
    stop_after: tuple[str, int] | None = None,
) -> Outcome:
    """Run a command's ``main`` in a process of its own.

    ``stop_after``: a text, and the signal that is sent as soon as standard error holds it.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err", "events")]
        for path in files:
            path.touch()
        arguments = (module, [str(a) for a in argv], str(watched), kill or Kill(), limits, files)
        process = context().Process(target=_child, args=arguments)
        process.start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        if stop_after is not None:
            while process.is_alive() and stop_after[0] not in files[1].read_text():
                time.sleep(0.02)
            if process.is_alive():
                os.kill(process.pid, stop_after[1])
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{module} hangs:\n{files[1].read_text()}")
        out, err, events = (path.read_text(errors="replace") for path in files)
        return Outcome(process.exitcode, out, err, len(events))


def _child(
    module: str,
    argv: list[str],
    watched: str,
    kill: Kill,
    limits: Limits | None,
    files: list[Path],
) -> None:
    for path, descriptor in zip(files, (1, 2), strict=False):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    events = os.open(files[2], os.O_WRONLY | os.O_APPEND)
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "MPLBACKEND": "Agg"}
    os.chdir(ROOT)
    _watch(watched, kill, events)
    _apply(limits or Limits())
    import importlib

    import jax

    if jax.config.jax_compilation_cache_dir is None and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    code = importlib.import_module(module).main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # orderly ends are what the kills are for


def _watch(watched: str, kill: Kill, events: int) -> None:
    """Count changes of files, and kill this process at one of them or after some time."""
    lock, seen = threading.Lock(), [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = arguments[1] if event == "os.rename" else arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        if not os.fsdecode(path).startswith(watched):
            return
        with lock:
            seen[0] += 1
            if seen[0] == kill.event:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(events, b".")

    sys.addaudithook(hook)
    if kill.seconds is not None:
        timer = threading.Timer(kill.seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


def _apply(limits: Limits) -> None:
    if limits.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    true_time, start = time.time, time.monotonic()
    if limits.clock == "jumps":  # a year back and forth, every tenth of a second
        time.time = lambda: true_time() + 3.2e7 * (int(10 * time.monotonic()) % 3 - 1)
    elif limits.clock == "stands":  # a virtual machine that was asleep
        time.monotonic = lambda: start


# ------------------------------------------------------------------------------------ survival


def survive(
    module: str, argv: Sequence[object], kills: Sequence[Kill], *, watched: Path
) -> list[Outcome]:
    """Run a command, killed as told, then left alone; raises if it does not come to its end."""
    outcomes = []
    for kill in kills:
        outcomes.append(run(module, argv, watched=watched, kill=kill))
        if outcomes[-1].code not in (0, -signal.SIGKILL):
            raise AssertionError(f"{kill}: exit code {outcomes[-1].code}\n{outcomes[-1].err}")
        problems = unreadable(watched)
        if problems:
            raise AssertionError(f"{kill}: unreadable files {problems}")
    outcomes.append(run(module, argv, watched=watched))
    if outcomes[-1].code:
        raise AssertionError(f"after {kills}: exit code {outcomes[-1].code}\n{outcomes[-1].err}")
    return outcomes


def unreadable(folder: Path) -> list[str]:
    """Files under their final names that cannot be read; temporary ones are nobody's."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(p.startswith(".") or "orbax-checkpoint-tmp" in p for p in path.parts)
        if hidden or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".npy", ".npz"):
                arrays = np.load(path, allow_pickle=False)
                [arrays[name] for name in getattr(arrays, "files", ())]
            elif path.suffix == ".mha":
                from panther_jax.images.imageio import read_image

                read_image([path])
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def lost_steps(outcomes: Sequence[Outcome]) -> list[int]:
    """Steps that each restart did again: the last one told of before it, less where it resumed."""
    lost, reached = [], 0
    for outcome in outcomes:
        for line in outcome.err.splitlines():
            if line.startswith("resuming after step "):
                lost.append(reached - int(line.split()[3]))
                reached = int(line.split()[3])
            elif line.startswith("epoch ") and " training loss " in line:
                epoch = int(line.split()[1].partition("/")[0])
                reached = epoch * STEPS_PER_EPOCH
    return lost


def differences(whole: Path, killed: Path) -> list[str]:
    """What differs between the folders of two trained folds that should be equal bit for bit."""
    from panther_jax.weights.checkpoint import Checkpoints

    found = []
    for kind in ("final", "best", "latest"):
        a, b = (Checkpoints(f / "checkpoints").read(kind) for f in (whole, killed))
        assert a is not None and b is not None, kind
        import jax

        leaves = [jax.tree.leaves(state[:2]) for state in (a, b)]
        same = len(leaves[0]) == len(leaves[1]) and all(
            np.array_equal(x, y) for x, y in zip(*leaves, strict=True)
        )
        if not same or a[2] != b[2]:
            found.append(f"{kind} checkpoint")
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIMED}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (whole, killed)
    ]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    for path in sorted(whole.glob("validation_*/*")):
        other = killed / path.relative_to(whole)
        if path.suffix == ".mha" and path.read_bytes() != other.read_bytes():
            found.append(str(path.relative_to(whole)))
    scores = [
        [case["metrics"] for case in json.loads(f.read_text())["metric_per_case"]]
        for folder in (whole, killed)
        for f in sorted(folder.glob("validation_*/summary.json"))
    ]
    if scores[: len(scores) // 2] != scores[len(scores) // 2 :]:
        found.append("summary.json")
    return found


def same_files(a: Path, b: Path) -> list[str]:
    """Names of files that differ between two folders, or that only one of them has."""
    files = [
        {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (a, b)
    ]
    return sorted(n for n in {*files[0], *files[1]} if files[0].get(n) != files[1].get(n))


# ------------------------------------------------------------------------------------ training

EPOCHS, STEPS_PER_EPOCH = 4, 2


def training(workdir: Path, store: Path) -> list[object]:
    """A training of a few steps with a checkpoint an epoch."""
    return [
        "--config", "smoke.py", "--store", store, "--workdir", workdir, "--loop.epochs", EPOCHS,
        "--loop.steps-per-epoch", STEPS_PER_EPOCH,
    ]  # fmt: skip


def make_store(folder: Path) -> tuple[Path, Path]:
    """A tiny raw data set and its store."""
    from tiny import make_raw

    from panther_jax.config.loading import load_config
    from panther_jax.images import raw_dataset
    from panther_jax.planner import from_config
    from panther_jax.preprocessing import pipeline

    raw = make_raw(folder / "raw")
    config, _ = load_config(str(ROOT / "configs" / "smoke.py"))
    opened = raw_dataset.open_raw(raw)
    plans = from_config.plans_from_config(config, opened.dataset, None)
    pipeline.preprocess(opened, plans, folder / "store")
    return raw, folder / "store"


@contextlib.contextmanager
def compilation_cache(folder: Path) -> Iterator[None]:
    """What one process compiles, the next ones load."""
    before = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["JAX_COMPILATION_CACHE_DIR"]
        if before is not None:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = before


def campaign(count: int, folder: Path, *, seed: int = 0, chain: int = 5) -> dict[str, Any]:
    """Kill trainings ``count`` times at random moments, ``chain`` times each run; a summary."""
    draw = random.Random(seed)
    _, store = make_store(folder)
    whole = folder / "whole"
    before = run("panther_jax.train", training(whole, store), watched=whole)
    assert before.code == 0, before.err
    start = time.monotonic()
    again = run("panther_jax.train", training(folder / "timed", store), watched=folder / "timed")
    seconds = time.monotonic() - start
    report: dict[str, Any] = {"events": again.events, "seconds": seconds, "kills": 0, "lost": []}
    number = 0
    while report["kills"] < count:
        workdir = folder / f"killed_{number}"
        number += 1
        kills = [
            Kill(event=draw.randint(1, 2 * again.events // chain))
            if draw.random() < 0.7
            else Kill(seconds=draw.uniform(0.3, 1.0) * seconds)
            for _ in range(min(chain, count - report["kills"]))
        ]
        outcomes = survive("panther_jax.train", training(workdir, store), kills, watched=workdir)
        died = sum(o.code == -signal.SIGKILL for o in outcomes)
        report["kills"] += died
        report["lost"] += lost_steps(outcomes)
        problems = differences(whole / "fold_0", workdir / "fold_0")
        assert not problems, (kills, problems)
        print(f"run {number}: {died} kills survived, lost steps {lost_steps(outcomes)}", flush=True)
    report["most_lost"] = max(report["lost"], default=0)
    return report


def main() -> None:
    """Kill many times and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="number of kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, compilation_cache(Path(folder) / "xla"):
        report = campaign(arguments.count, Path(folder), seed=arguments.seed)
    print(json.dumps({**report, "steps_per_interval": STEPS_PER_EPOCH}))
    assert report["most_lost"] <= STEPS_PER_EPOCH


if __name__ == "__main__":
    main()
