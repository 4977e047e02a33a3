"""Metrics that survive a crash, durations, tables, time left."""

import io
import json
import math

import pytest

from panther_jax.base import console, files
from panther_jax.training import records


def row(step, **entries):
    return {"step": step, **entries}


def test_metrics_are_appended_and_cut_back_on_resume(tmp_path):
    path = tmp_path / "fold_0" / "metrics.jsonl"
    metrics = records.MetricsFile(path)
    for step in (3, 6, 9):
        metrics.append(row(step, loss=float(step), dice={"tumor": math.nan}))
    with path.open("a") as file:
        file.write('{"step": 12, "lo')  # the process was killed while it wrote
    assert [r["step"] for r in records.read_metrics(path)] == [3, 6, 9]
    assert records.read_metrics(path)[0]["dice"] == {"tumor": None}
    resumed = records.MetricsFile(path, resume_step=6)
    resumed.append(row(9))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert "loss" not in lines[2]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    files.write_json(path, {"a": 1})

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    try:
        files.write_json(path, {"a": 2})
    except OSError:
        pass
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_log_lines_go_where_standard_error_is_now(monkeypatch, capsys):
    closed = io.StringIO()
    monkeypatch.setattr(console.sys, "stderr", closed)
    console.setup_logging()
    monkeypatch.undo()
    closed.close()
    console.LOGGER.info("a line")
    assert capsys.readouterr().err == "a line\n"


def test_durations_and_tables():
    assert console.duration(59.6) == "1:00"
    assert console.duration(3 * 3600 + 62) == "3:01:02"
    text = console.table(["Dice", "tumor"], [["case_1", "0.5"], ["a", "-"]])
    assert text.splitlines() == ["Dice    tumor", "------  -----", "case_1    0.5", "a           -"]


def test_time_left_counts_steps_and_not_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    progress = console.Progress(10, first=2, label="step")
    now[0] += 6.0
    progress.update(4)
    assert progress.left == 18.0  # 2 steps took 6 s, 6 are left
    clock = records.Clock(progress)
    with clock.paused():
        now[0] += 50.0
    assert progress.left == 18.0
    with clock.waiting():
        now[0] += 2.0
    now[0] += 2.0
    assert clock.end_epoch() == {"seconds": 54.0, "wait_share": round(2 / 54, 4)}
    assert clock.since_save() == 54.0


def test_tensorboard_gets_every_number_at_its_step():
    written = []

    class Writer:
        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    records.write_scalars(
        Writer(), row(6, epoch=1, loss=0.5, ema=None, pseudo_dice={"tumor": 0.25, "step": 6})
    )
    assert written == [("loss", 0.5, 6), ("pseudo_dice/tumor", 0.25, 6)]


def test_tensorboard_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(console.sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"panther-jax\[tensorboard\]"):
        records.tensorboard_writer(tmp_path)
