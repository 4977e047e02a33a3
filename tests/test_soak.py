"""The soak's own measure: it sees growth where there is some, and none where there is none."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.soak import Sample, Sampler, growth, line

MIB = 1 << 20


def made(values):
    return [Sample(float(i), v, 10, 4) for i, v in enumerate(values)]


def test_growth_is_between_the_second_fifth_and_the_last():
    flat = growth(made([5 * MIB] * 10 + [90 * MIB] + [50 * MIB] * 39))  # a start, and a peak
    assert flat["bytes"]["growth"] == 0 and flat["peak_bytes"] == 90 * MIB
    leak = growth(made([i * MIB for i in range(100)]))
    assert leak["bytes"]["growth"] == 60 * MIB and leak["files"]["growth"] == 0
    assert "+60.0 MiB" in line("predict", 100, leak)
    with pytest.raises(ValueError, match="too few"):
        growth(made([1, 2, 3]))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux only")
def test_the_sampler_sees_memory_and_files(tmp_path):
    held, opened = [], []
    with Sampler(0.005) as sampler:
        for number in range(25):
            held.append(b"1" * (4 * MIB))
            opened.append((tmp_path / str(number)).open("w"))
            time.sleep(0.01)
    for file in opened:
        file.close()
    found = growth(sampler.samples)
    assert found["bytes"]["growth"] > 20 * MIB and found["files"]["growth"] > 5


def test_the_command_has_help():
    command = [sys.executable, "-m", "benchmarks.soak", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0 and "--cases" in done.stdout
