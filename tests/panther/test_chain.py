"""The cascade's graph, its states, and what is written for a cluster."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from panther_jax import stages
from panther_jax.ensembles import specification
from panther_jax.panther import chain, runner
from panther_jax.panther.chain import Plan, State, Step


def plan(root, **changes):
    settings = {
        "task": "t2",
        "root": root,
        "folds": ("0", "1"),
        "specialists": chain.SPECIALISTS["t2"],
    }
    return Plan(**{**settings, **changes})


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def finish_training(folder, *, weights="w", start=None):
    origin = {"bundle": "b", "sha256": start} if start else None
    write(
        folder / "run.json",
        {"finished": True, "params_sha256": weights, "starting_weights": origin},
    )
    write(folder / "validation_final" / "summary.json", {})


def test_the_chain_goes_from_weights_to_report(tmp_path):
    steps = chain.cascade(plan(tmp_path, foundation="/models/multitalent"))
    names = [step.name for step in steps]
    assert names == [
        "weights/multitalent",
        "ct_pancreas fold all",
        "weights/ct_pancreas",
        "store/Dataset902_PANTHER_HR/nnUNetResEncUNetLPlans_3d_fullres_iso1x1x1",
        "mri_t2_aug_da5_fork fold 0",
        "mri_t2_aug_da5_fork fold 1",
        "mri_t2_aug_da5_fork cross-validation",
        "mri_t2 fold 0",
        "mri_t2 fold 1",
        "mri_t2 cross-validation",
        "ensembles/task2.json",
        "reports/task2.html",
    ]
    for number, step in enumerate(steps):
        assert set(step.needs) <= set(names[:number])
        assert step.state.status == "to do" and step.argv
    by_name = dict(zip(names, steps, strict=True))
    ct = " ".join(by_name["ct_pancreas fold all"].argv)
    assert f"--init {tmp_path}/weights/multitalent" in ct and "--fold all" in ct
    mri = " ".join(by_name["mri_t2_aug_da5_fork fold 1"].argv)
    assert "--config mri_t2.py:aug=da5_fork --fold 1" in mri
    assert f"--init {tmp_path}/weights/ct_pancreas" in mri and "save-probabilities" in mri


def test_without_foundation_weights_the_way_to_get_them_is_named(tmp_path):
    missing = chain.cascade(plan(tmp_path))[0]
    assert missing.state.status == "missing" and "13753413" in missing.state.why
    with pytest.raises(runner.StageError, match="13753413"):
        runner.run_steps([missing])
    scratch = chain.cascade(plan(tmp_path, foundation="none"))[0]
    assert scratch.name == "ct_pancreas fold all" and "--init none" in " ".join(scratch.argv)


def test_overrides_reach_every_training_and_demo_shortens_the_last_stage(tmp_path):
    steps = chain.cascade(plan(tmp_path, demo=True, overrides=("--loop.seed", "5")))
    trainings = [s for s in steps if s.argv[0] == "panther_jax.train"]
    assert len(trainings) == 7
    for step in trainings:
        assert "--demo" in step.argv and step.argv[-2:] == ("--loop.seed", "5")
    assert sum("--loop.epochs" in s.argv for s in trainings) == 4


def test_a_fold_is_done_when_trained_and_validated(tmp_path):
    fold, start = tmp_path / "run" / "fold_0", tmp_path / "weights" / "ct"
    assert chain.training_state(fold, start).status == "to do"
    write(start / "provenance.json", {"sha256": {"fold_all.safetensors": "one"}})
    finish_training(fold, start={"fold_all.safetensors": "one"})
    assert chain.training_state(fold, start).status == "done"
    assert chain.training_state(fold, None).status == "done"
    (fold / "validation_final" / "summary.json").unlink()
    assert chain.training_state(fold, start).status == "to do"


def test_changed_starting_weights_are_noticed_and_named(tmp_path):
    fold, start = tmp_path / "run" / "fold_0", tmp_path / "weights" / "ct"
    write(start / "provenance.json", {"sha256": {"fold_all.safetensors": "two"}})
    finish_training(fold, start={"fold_all.safetensors": "one"})
    state = chain.training_state(fold, start)
    assert state.status == "stale" and str(start) in state.why
    step = Step("fold 0", ("x",), (), lambda: state)
    with pytest.raises(runner.StageError, match="--restart-stale"):
        runner.run_steps([step])
    runner.run_steps([step], runner.Running(keep_stale=True))


def test_a_bundle_follows_its_run(tmp_path):
    run, bundle = tmp_path / "run", tmp_path / "weights" / "ct"
    assert chain.bundle_state(bundle, run, "all").status == "to do"
    finish_training(run / "fold_all", weights="one")
    write(bundle / "provenance.json", {"checkpoints": {"all": {"params_sha256": "one"}}})
    assert chain.bundle_state(bundle, run, "all").status == "done"
    finish_training(run / "fold_all", weights="two")
    state = chain.bundle_state(bundle, run, "all")
    assert state.status == "to do" and str(run) in state.why


def test_what_is_derived_is_made_again_when_its_source_is_newer(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    source.write_text("1")
    assert chain.derived(output, [source]).status == "to do"
    output.write_text("1")
    os.utime(source, ns=(10, 10))
    os.utime(output, ns=(20, 20))
    assert chain.derived(output, [source, tmp_path / "absent"]).status == "done"
    os.utime(source, ns=(30, 30))
    assert chain.derived(output, [source]).status == "to do"


def make_step(path, code="pathlib.Path(sys.argv[1]).touch()", needs=()):
    script = path.parent / f"{path.name}_module.py"
    script.write_text(f"import pathlib, sys\n{code}\n")
    return Step(
        path.name,
        (script.stem, str(path)),
        needs,
        lambda: State("done" if path.exists() else "to do"),
    )


def test_a_chain_runs_once_and_stops_at_the_first_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    first = make_step(tmp_path / "first")
    broken = make_step(tmp_path / "broken", "sys.exit(3)", ("first",))
    last = make_step(tmp_path / "last", needs=("broken",))
    with pytest.raises(
        runner.StageError, match="(?s)broken failed with exit code 3.*broken_module"
    ):
        runner.run_steps([first, broken, last])
    assert (tmp_path / "first").exists() and not (tmp_path / "last").exists()
    before = (tmp_path / "first").stat().st_mtime_ns
    (tmp_path / "broken_module.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[1]).touch()"
    )
    runner.run_steps([first, broken, last])
    after = [(tmp_path / n).stat().st_mtime_ns for n in ("first", "broken", "last")]
    assert after[0] == before
    runner.run_steps([first, broken, last])
    assert [(tmp_path / n).stat().st_mtime_ns for n in ("first", "broken", "last")] == after


def test_steps_of_a_layer_run_side_by_side_each_with_a_device(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    # Each waits for the other, so that both end only if they run at the same time.
    code = """
import os, time
here = pathlib.Path(sys.argv[1])
here.with_suffix(".device").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
for _ in range(600):
    if len(list(here.parent.glob("*.device"))) == 2: break
    time.sleep(0.05)
else: sys.exit(1)
here.touch()
"""
    steps = [make_step(tmp_path / "a", code), make_step(tmp_path / "b", code)]
    runner.run_steps(steps, runner.Running(jobs=2))
    devices = {p.read_text() for p in tmp_path.glob("*.device")}
    assert devices == {"0", "1"}


def test_a_store_is_done_when_every_case_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "is_complete", lambda _, name: name != "broken")
    assert chain.store_state(tmp_path).status == "to do"
    write(tmp_path / "dataset.json", {"numTraining": 2})
    for name, status in (("one", "to do"), ("broken", "to do"), ("two", "done")):
        (tmp_path / f"{name}.locations.npz").touch()
        assert chain.store_state(tmp_path).status == status


def test_a_step_that_leaves_nothing_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(runner.StageError, match="left nothing"):
        runner.run_steps([make_step(tmp_path / "empty", "pass")])


def test_the_graph_is_drawn_with_what_is_done(tmp_path, capsys):
    finish_training(tmp_path / "runs" / "ct_pancreas" / "fold_all")
    code = stages.main(["--task", "t2", "--root", str(tmp_path), "--folds", "0", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == 10
    state = {line.strip("│└├─ ").split("  ")[0]: line.split("  ")[-1].strip() for line in lines}
    assert state["ct_pancreas fold all"] == "done" and state["weights/ct_pancreas"] == "to do"
    assert "weights/multitalent" in lines[0] and "missing" in lines[0]


def test_commands_are_printed_for_what_is_left(tmp_path, capsys):
    write(tmp_path / "weights" / "multitalent" / "provenance.json", {})
    arguments = ["--task", "t1", "--root", str(tmp_path), "--folds", "0", "--print-commands"]
    assert stages.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all(" -m panther_jax." in line for line in lines)
    assert "--prepare-only" in lines[2] and "mri_t1.py:aug=da5_fork" in lines[3]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--folds", "a"],
        ["--restart-stale", "--keep-stale"],
        ["--nonsense"],
        ["surplus"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        stages.main(["--task", "t2", *arguments])
    assert caught.value.code == 2


def test_the_slurm_script_submits_layers_and_runs_its_lines(tmp_path):
    steps = [
        make_step(tmp_path / "a"),
        make_step(tmp_path / "b1", needs=("a",)),
        make_step(tmp_path / "b2", needs=("a",)),
        make_step(tmp_path / "c", needs=("b1", "b2")),
    ]
    assert [[s.name for s in layer] for layer in chain.layers(steps)] == [
        ["a"],
        ["b1", "b2"],
        ["c"],
    ]
    script = tmp_path / "cascade.sh"
    script.write_text(chain.slurm_script(steps, folder=tmp_path))
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho 4{"$#"}\n')
    (tools / "sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    subprocess.run(["bash", script, "--partition=gpu"], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [c.split("--array=")[1].split()[0] for c in calls] == ["0-0", "1-2", "3-3"]
    assert all("--partition=gpu" in call for call in calls)
    assert "afterok" not in calls[0] and "afterok:4" in calls[1] and "afterok:4" in calls[2]
    environment["SLURM_ARRAY_TASK_ID"] = "2"
    subprocess.run(["bash", script], env=environment, check=True)
    assert (tmp_path / "b2").exists() and not (tmp_path / "b1").exists()


@pytest.mark.parametrize("task", ["t1", "t2"])
def test_the_plain_mixes_name_the_runs_of_the_cascade(task):
    file = Path(__file__).parents[2] / "configs" / "ensembles" / f"task{task[1]}.json"
    members = specification.read_ensemble(file).members
    expected = [plan(Path("data"), task=task).run_folder(s) for s in chain.SPECIALISTS[task]]
    root = file.parent.parent.parent
    assert [m.model.resolve().relative_to(root) for m in members] == expected
    assert {m.checkpoint for m in members} == {"final" if task == "t1" else "best"}
    assert all(m.mirror_axes == () for m in members)
