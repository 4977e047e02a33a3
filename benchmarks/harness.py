"""What all benchmarks share: interleaved runs, medians with spread, the machine, a JSON file.

The parent process stays small; what is measured runs in a process of its own (:func:`measure`), so
that neither import time nor memory of one candidate touches the other.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
Setting = Literal["cpu", "gpu", "toy"]
"""Sizes for a CPU, for a GPU, and so small that only the code is tried out."""
SETTINGS: tuple[Setting, ...] = ("cpu", "gpu", "toy")
LIBRARIES = ("jax", "jaxlib", "flax", "torch", "nnunetv2", "numpy")
MEMORY_PROBE = """
import json, sys, time
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
status = open("/proc/self/status").read() if sys.platform == "linux" else ""
peak = next((int(l.split()[1]) * 1024 for l in status.splitlines() if l.startswith("VmHWM")), 0)
print(json.dumps({{"seconds": seconds, "peak_bytes": peak}}))
"""


@dataclass(frozen=True)
class Measurement:
    """One run: seconds, and the process's peak of resident memory in bytes (0 if not measured)."""

    seconds: float
    peak_bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """Runs of one candidate: median and range of seconds, largest memory peak."""

    name: str
    median_seconds: float
    min_seconds: float
    max_seconds: float
    peak_bytes: int
    runs: int

    def line(self) -> str:
        """One line for people."""
        memory = f", peak {self.peak_bytes / 2**20:.0f} MiB" if self.peak_bytes else ""
        return (
            f"{self.name}: {self.median_seconds:.3g} s "
            f"({self.min_seconds:.3g} to {self.max_seconds:.3g}, {self.runs} runs){memory}"
        )


class Skipped(RuntimeError):
    """A suite that cannot run here, with the reason."""


def require(*modules: str) -> None:
    """Raise :class:`Skipped` if a module is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed here")


def interleaved(
    candidates: Mapping[str, Callable[[], Measurement]], rounds: int, *, warm_up: bool = True
) -> dict[str, tuple[Measurement, ...]]:
    """Run each candidate once a round, in alternating order, after one round of warming up."""
    names = list(candidates)
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for number in range(0 if warm_up else 1, rounds + 1):
        for name in names if number % 2 else reversed(names):
            measurement = candidates[name]()
            if number:
                found[name].append(measurement)
    return {name: tuple(values) for name, values in found.items()}


def measure(code: str, *arguments: str, timeout_seconds: float = 600) -> Measurement:
    """Run Python code in a fresh process, from the repository's root; its imports count.

    Raises:
        RuntimeError: with the end of its standard error, if it fails.
    """
    probe = MEMORY_PROBE.format(code=code)
    found = run_python("-c", probe, *arguments, timeout_seconds=timeout_seconds)
    return Measurement(**json.loads(found.splitlines()[-1]))


def run_python(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> str:
    """Run Python with these arguments in the repository's root; returns its standard output.

    Raises:
        RuntimeError: with the end of its standard error, if it fails.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
        env=env,
    )
    if done.returncode:
        raise RuntimeError(f"benchmark process failed:\n{done.stderr[-2000:]}")
    return done.stdout


# ------------------------------------------------------------------------ processes that answer


def environment(**changes: str) -> dict[str, str]:
    """The environment of a benchmark process: all cores for every library, as users have it."""
    ours = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # others measure beside it
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    return {**inherited, **ours, **changes}


def cores() -> int:
    """Cores that a process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(target: str, arguments: Sequence[Any]) -> None:
    """Answer requests, a JSON list of arguments a line: the other side of :func:`serving`.

    ``target`` is ``module:function``; the function makes the one that answers. What libraries print
    goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        module, function = target.split(":")
        handle = getattr(importlib.import_module(module), function)(*arguments)
        tell(value=None)
        for line in sys.stdin:
            tell(value=handle(*json.loads(line)))
    except Exception as error:
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename.startswith(str(ROOT)):  # the peer's lines are none of our business
                print(f"{frame.filename}:{frame.lineno} {frame.line}", file=sys.stderr)
        tell(error=f"{type(error).__name__}: {error}")


@contextmanager
def serving(
    target: str,
    *arguments: Any,
    timeout_seconds: float = 900,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Callable[..., Any]]:
    """Start a process that answers; gives the function that asks it, with a request's arguments.

    ``variables`` are added to the environment. The process and its children end with the block.

    Raises:
        RuntimeError: with what the process said, if it fails or does not answer in time.
    """
    code = "import sys, json; from benchmarks import harness; "
    code += "harness.serve(sys.argv[1], json.loads(sys.argv[2]))"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code, target, json.dumps(arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(**(variables or {})),
            start_new_session=True,
        )
        assert server.stdin is not None and server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def answer() -> Any:
            ready, _, _ = select.select([answers], [], [], timeout_seconds)
            line = answers.readline() if ready else ""
            found = json.loads(line) if line else {"error": "no answer"}
            if "error" in found:
                log.seek(0)
                raise RuntimeError(f"{target}: {found['error']}\n{log.read()[-2000:]}")
            return found["value"]

        def ask(*request: Any) -> Any:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            return answer()

        try:
            answer()
            yield ask
        finally:
            requests.close()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                pass
            _end(server)
            answers.close()


def _end(server: "subprocess.Popen[str]") -> None:
    """End a process with the workers that it started."""
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    server.wait(30)


def peak_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(n.split()[1]) * 1024 for n in lines if n.startswith("VmHWM")), 0)


def timed(work: Callable[[], Any], calls: int) -> float:
    """Seconds a call of work that returns when it is done."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def calls_for(seconds: float, *, block_seconds: float = 1.0, most: int = 50) -> int:
    """Calls of so many seconds each that make a block worth timing."""
    return max(1, min(most, round(block_seconds / max(seconds, 1e-6))))


# ----------------------------------------------------------------------------------- results


def summarize(name: str, measurements: Sequence[Measurement]) -> Summary:
    """Median and range."""
    seconds = [m.seconds for m in measurements]
    return Summary(
        name,
        statistics.median(seconds),
        min(seconds),
        max(seconds),
        max(m.peak_bytes for m in measurements),
        len(seconds),
    )


def ratio(ours: Sequence[Measurement], peer: Sequence[Measurement]) -> tuple[float, float, float]:
    """Median, smallest and largest of peer seconds over ours, round by round; above 1: faster."""
    ratios = [p.seconds / o.seconds for o, p in zip(ours, peer, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(ratios: tuple[float, float, float]) -> dict[str, float]:
    """A ratio as the JSON files hold it."""
    return dict(zip(("median", "min", "max"), ratios, strict=True))


def versions() -> dict[str, str]:
    """Versions of the libraries that matter, of those installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def accelerator() -> str | None:
    """Name of the first GPU as the driver tells it; None without one."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": cores(),
        "accelerator": accelerator(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def git_commit() -> str | None:
    """The commit measured, with ``+`` if the working tree differs; None outside a repository.

    Results themselves do not count.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", ":!benchmarks/results") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()


def write_result(
    output: Path, suite: str, summaries: Sequence[Summary], facts: Mapping[str, Any]
) -> Path:
    """Write ``<output>/<suite>.json``: the summaries, the facts, machine, commit, date."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{suite}.json"
    result = {
        "suite": suite,
        "results": [asdict(s) for s in summaries],
        **facts,
        "machine": machine(),
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
