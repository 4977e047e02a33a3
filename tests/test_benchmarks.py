"""The benchmarks' shared parts."""

import json

import pytest

from benchmarks import harness, run


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
