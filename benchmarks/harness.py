"""What all benchmarks share: interleaved runs, medians with spread, the machine, a JSON file.

The parent process stays small; what is measured runs in a process of its own (:func:`measure`), so
that neither import time nor memory of one candidate touches the other.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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


def interleaved(
    candidates: Mapping[str, Callable[[], Measurement]], rounds: int
) -> dict[str, tuple[Measurement, ...]]:
    """Run each candidate once a round, in alternating order, after one round of warming up."""
    names = list(candidates)
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for number in range(rounds + 1):
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
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE.format(code=code), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"benchmark process failed:\n{done.stderr[-2000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


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


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def git_commit() -> str | None:
    """The commit measured, with ``+`` if the working tree differs; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain") else "")
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
