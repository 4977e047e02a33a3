"""The benchmarks' shared parts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import bench_train_step, gpu, harness, networks, run, summary

MACHINE = {"cpu": "Some CPU", "cores": 2, "load_average": [0.1, 0.1, 0.1]}


def test_runs_are_interleaved_and_the_warm_up_is_dropped():
    order = []

    def candidate(name, seconds):
        def once():
            order.append(name)
            return harness.Measurement(seconds * len(order))

        return once

    found = harness.interleaved({"a": candidate("a", 1.0), "b": candidate("b", 1.0)}, 3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [m.seconds for m in found["a"]] == [3.0, 6.0, 7.0]
    assert harness.ratio(found["a"], found["b"]) == pytest.approx((8 / 7, 5 / 6, 4 / 3))
    summary = harness.summarize("a", found["a"])
    assert (summary.median_seconds, summary.min_seconds, summary.max_seconds) == (6.0, 3.0, 7.0)


def test_a_process_is_measured_with_its_memory():
    small = harness.measure("x = 1")
    large = harness.measure("x = b'1' * (200 * 2**20)\ntime.sleep(0.2)")
    assert large.seconds >= 0.2
    if small.peak_bytes:
        assert large.peak_bytes - small.peak_bytes > 190 * 2**20
    with pytest.raises(RuntimeError, match="no such luck"):
        harness.measure("raise SystemExit('no such luck')")


def test_results_say_where_they_come_from(tmp_path):
    summary = harness.summarize("a", [harness.Measurement(1.0, 5)])
    path = harness.write_result(tmp_path / "new", "suite", [summary], {"setting": "tiny"})
    found = json.loads(path.read_text())
    assert found["results"][0]["median_seconds"] == 1.0 and found["setting"] == "tiny"
    assert found["machine"]["cores"] >= 1 and "git_commit" in found


def test_the_command_lists_its_suites(capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in run.suites()) and "import" in run.suites()
    with pytest.raises(SystemExit) as caught:
        run.main(["--suite", "no-such-suite"])
    assert caught.value.code == 2


def test_without_a_warm_up_every_round_counts():
    found = harness.interleaved({"a": lambda: harness.Measurement(1.0)}, 3, warm_up=False)
    assert len(found["a"]) == 3


def make_answerer(offset):
    """What the process of the next test serves."""

    def answer(what, *numbers):
        print("noise that libraries make")
        if what == "fail":
            raise ValueError("no such luck")
        return offset + sum(numbers)

    return answer


def test_a_process_answers_until_it_fails():
    paths = {"PYTHONPATH": os.pathsep.join((str(harness.ROOT), str(harness.ROOT / "tests")))}
    with harness.serving("test_benchmarks:make_answerer", 10, variables=paths) as ask:
        assert ask("add", 1, 2) == 13 and ask("add") == 10
        with pytest.raises(RuntimeError, match="no such luck"):
            ask("fail")
    with pytest.raises(RuntimeError, match="no_such_function"):
        with harness.serving("benchmarks.harness:no_such_function"):
            pass


def test_what_a_suite_needs_and_is_missing_is_named(monkeypatch):
    harness.require("json")
    monkeypatch.setitem(sys.modules, "missing_library", None)
    with pytest.raises(harness.Skipped, match="missing_library"):
        harness.require("json", "missing_library")


def test_blocks_are_long_enough_and_not_too_long():
    assert harness.calls_for(0.1) == 10 and harness.calls_for(30.0) == 1
    assert harness.calls_for(1e-9, most=7) == 7


def test_flops_are_those_of_the_specification():
    # spec 08 §8.3.1: 9687 GFLOP for ResEnc-L at 192^3, batch 2, 3 classes
    assert networks.forward_flops(networks.FULL) / 1e9 == pytest.approx(9687, rel=1e-3)
    single = networks.Size("one", (4, 4), (1, 1), (8, 8, 8), 1, num_outputs=2)
    full, half = 8**3, 4**3
    by_hand = (
        full * 27 * (4 + 4 * 4 * 2)  # stem, first stage
        + half * 27 * (4 * 4 * 2)  # second stage, no change of channels
        + full * (4 * 4 + 27 * 8 * 4 + 4 * 2)  # transposed, decoder, head
    )
    assert networks.forward_flops(single) == 2 * by_hand


def test_both_sides_get_the_same_data():
    size = networks.TINY
    (image, label), (again, _) = networks.make_batch(size), networks.make_batch(size)
    np.testing.assert_array_equal(image, again)
    assert image.shape == label.shape == (2, 8, 16, 16, 1)
    assert set(np.unique(label)) == {0, 1, 2}
    shapes = [t.shape[1:4] for t in networks.make_targets(size, label)]
    assert shapes == [(8, 16, 16), (4, 8, 8)]
    assert networks.Size.from_json(json.loads(json.dumps(size.to_json()))) == size
    assert networks.supervision_weights(3) == pytest.approx((2 / 3, 1 / 3, 0))
    assert networks.make_plans(size).arch == size.arch


def test_the_fastest_variant_is_taken_work_by_work():
    seconds = {"a": {"forward": 1.0, "step": 3.0}, "b": {"forward": 2.0, "step": 2.0}}
    assert bench_train_step.fastest(seconds) == {"forward": "a", "step": "b"}


def test_the_size_fits_the_memory():
    sizes = bench_train_step.GPU_SIZES
    assert bench_train_step.largest_that_fits(140 * 2**30, sizes) == networks.FULL
    assert bench_train_step.largest_that_fits(24 * 2**30, sizes) == sizes[1]
    assert bench_train_step.largest_that_fits(0, sizes) == sizes[-1]
    assert bench_train_step.peak_flops("NVIDIA H200", "gpu") == 790e12
    assert bench_train_step.peak_flops("NVIDIA H200", "cpu") is None


def test_errors_are_relative_and_nan_is_no_small_error():
    assert gpu.relative_error([np.array([3.0, 4.0])], [np.array([3.0, 3.0])]) == pytest.approx(
        1 / 18**0.5
    )
    assert gpu.relative_error(np.array([np.nan]), np.array([1.0])) == float("inf")


def write_suite(folder, suite, **facts):
    summaries = [
        harness.Summary("a", 2.0, 1.0, 3.0, 0, 3),
        harness.Summary("b", 4.0, 3.0, 5.0, 0, 3),
    ]
    return harness.write_result(folder, suite, summaries, {"setting": "tiny", **facts})


def make_row(what, met, ratio=2.0, goal: float | None = 1.5):
    spread = {"median": ratio, "min": ratio / 2, "max": ratio * 2}
    return {"what": what, "ours": 1.0, "peer": ratio, "ratio": spread, "goal": goal, "met": met}


def test_the_page_shows_every_suite_with_met_and_open(tmp_path):
    write_suite(tmp_path, "export", rows=[make_row("export", True), make_row("slow", False, 0.5)])
    write_suite(tmp_path, "new", rows=[make_row("ungraded", None, goal=None)])
    write_suite(
        tmp_path,
        "evaluate",
        peer_seconds_over_ours={"median": 12.0, "min": 8.0, "max": 13.0},
        met=True,
    )
    write_suite(tmp_path / "gpu", "export", rows=[make_row("on the card", True)])
    (tmp_path / "other.json").write_text("[1]")
    path = summary.write(tmp_path, {"predict": "skipped: no peer"})
    text = path.read_text()
    assert "| export | 1.00 | 2.00 | 2.00 (1.00 to 4.00) | 1.50 | met |" in text
    assert "| slow | 1.00 | 0.500 | 0.500 (0.250 to 1.00) | 1.50 | **open** |" in text
    assert "12.0 (8.00 to 13.0)" in text and "- predict: skipped: no peer" in text
    assert "3 of 4 goals met, 1 open" in text
    assert text.index("## export") < text.index("## new") < text.index("## export, on a GPU")
    assert (tmp_path / summary.PICTURE).stat().st_size > 1000


def test_a_busy_machine_and_uncommitted_changes_are_told():
    result = {"machine": MACHINE, "git_commit": "0123456789abcdef+", "date": "2026-01-02T03:04:05"}
    quiet = summary.machine_line(result)
    assert "0123456789 with changes not committed" in quiet and "load" not in quiet
    busy = {**result, "machine": {**MACHINE, "load_average": [5.0, 0, 0]}}
    assert "load average 5" in summary.machine_line(busy)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (0.0, "0"), (1234.5, "1234"), (12.34, "12.3"),
     (0.01234, "0.0123"), (0.000001234, "0.00000")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert summary.number(value) == text


def test_a_suite_that_fails_does_not_stop_the_others(monkeypatch, tmp_path):
    def run_suite(name, output, setting):
        if name == "import":
            raise harness.Skipped("no peer")
        if name == "export":
            raise ValueError("broken")
        return "  fine"

    monkeypatch.setattr(run, "run_suite", run_suite)
    with pytest.raises(run.SuiteError) as caught:
        run.report(("import", "export", "compile"), tmp_path, "toy")
    text = str(caught.value)
    assert "import skipped: no peer" in text and "export failed: ValueError: broken" in text
    assert "compile, 0:00\n  fine" in text
    assert "no peer" in (tmp_path / summary.PAGE).read_text()


def test_the_gpu_script_loads_without_the_libraries_of_the_host():
    blocked = ("SimpleITK", "grain", "tyro", "dm_pix", "skimage", "matplotlib", "nnunetv2", "torch")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from pathlib import Path
from benchmarks import gpu, harness, ours, run
for name in gpu.SUITES:
    try:
        run.run_suite(name, Path("."), "toy") if name not in ("compile",) else None
    except harness.Skipped as reason:
        print(name, reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=harness.ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [n for n in gpu.SUITES if n != "compile"]
