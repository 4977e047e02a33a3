"""The cascade's graph, its states, and what is written for a cluster."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import weight_files

from panther_jax import stages
from panther_jax.config import loading
from panther_jax.config.schema import ConfigError
from panther_jax.ensembles import specification
from panther_jax.panther import chain, runner, states
from panther_jax.panther import stages as stage_table
from panther_jax.panther.chain import Plan, Step
from panther_jax.panther.states import State
from panther_jax.store.identity import store_identity
from panther_jax.training.options import Options
from panther_jax.training.settings import resolve

DONE = State("done")


def plan(root, **changes):
    return Plan(**{"task": "t2", "root": root, "folds": ("0", "1"), **changes})


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def finish_training(folder, *, weights="w", start=None, **about):
    """A fold as training leaves it; ``start`` is a bundle's folder and its checksums."""
    origin = None if start is None else {"bundle": str(start[0]), "sha256": start[1]}
    values = {"finished": True, "params_sha256": weights, "starting_weights": origin, **about}
    write(folder / "run.json", values)
    write(folder / "validation_final" / "summary.json", {})


def named(steps):
    return {step.name: step for step in steps}


def test_the_chain_goes_from_weights_over_task_1_to_the_report(tmp_path):
    steps = chain.cascade(plan(tmp_path, foundation="/models/multitalent"))
    names = [step.name for step in steps]
    assert names == [
        "weights/multitalent",
        "store/Dataset999_PancreasPretrain/nnUNetResEncUNetLPlans_3d_fullres_bs4",
        "cascade_ct_pancreas fold all",
        "weights/cascade_ct_pancreas",
        "store/Dataset901_PANTHER/nnUNetResEncUNetLPlans_3d_fullres_iso1x1x1",
        "cascade_mri_t1 fold all",
        "weights/cascade_mri_t1",
        "store/Dataset902_PANTHER_HR/nnUNetResEncUNetLPlans_3d_fullres_iso1x1x1",
        "cascade_mri_t2_aug_da5_fork fold 0",
        "cascade_mri_t2_aug_da5_fork fold 1",
        "cascade_mri_t2_aug_da5_fork cross-validation",
        "cascade_mri_t2 fold 0",
        "cascade_mri_t2 fold 1",
        "cascade_mri_t2 cross-validation",
        "ensembles/cascade_t2.json",
        "reports/cascade_t2.html",
    ]
    for number, step in enumerate(steps):
        assert set(step.needs) <= set(names[:number]) and step.argv
        lacks_data = step.name.startswith("store/")
        assert step.state.status == ("missing" if lacks_data else "to do")
    line = {name: " ".join(step.argv) for name, step in named(steps).items()}
    ct = line["cascade_ct_pancreas fold all"]
    assert f"--init {tmp_path}/weights/multitalent" in ct and "--fold all" in ct
    handed = line["weights/cascade_ct_pancreas"]
    assert "--folds fold_all --checkpoint best" in handed
    t1 = line["cascade_mri_t1 fold all"]
    assert f"--config mri_t1.py --root {tmp_path} --fold all" in t1
    assert f"--init {tmp_path}/weights/cascade_ct_pancreas" in t1
    assert "save-probabilities" not in t1
    mri = line["cascade_mri_t2_aug_da5_fork fold 1"]
    assert "--config mri_t2.py:aug=da5_fork" in mri and "--fold 1" in mri
    assert f"--workdir {tmp_path}/runs/cascade_mri_t2_aug_da5_fork" in mri
    assert f"--init {tmp_path}/weights/cascade_mri_t1" in mri and "save-probabilities" in mri


def test_task_1_has_six_members_of_which_five_are_cross_validated(tmp_path):
    steps = named(chain.cascade(plan(tmp_path, task="t1", folds=())))
    folds = [n for n in steps if n.startswith("cascade_mri_t1 fold")]
    assert folds == [f"cascade_mri_t1 fold {k}" for k in (0, 1, 2, 3, 4, "all")]
    validation = steps["cascade_mri_t1 cross-validation"]
    assert validation.needs == tuple(folds[:5])
    assert not any("fold_all" in word for word in validation.argv)
    assert "weights/cascade_mri_t1" not in steps  # nothing after it needs them
    only_all = named(chain.cascade(plan(tmp_path, task="t1", folds=("all",))))
    assert not any("cross-validation" in n or n.startswith("reports/") for n in only_all)


@pytest.mark.parametrize("stage", list(stage_table.stages().values()), ids=lambda s: s.name)
def test_every_row_of_the_table_has_a_config_and_a_chain_of_its_own(stage, tmp_path):
    settings, _ = loading.load_config(stage.spec(stage.variants[0]))
    assert stage.start is None or stage.start in stage_table.stages()
    assert stage.handed_on.variant in ("", *stage.variants)
    if stage.imported:
        with pytest.raises(ConfigError, match="is imported, not trained"):
            chain.cascade(plan(tmp_path, task=stage.name))
        return
    default = loading.load_config(stage.config)[0].init.bundle
    assert default == stage_table.stages()[stage.start].weights  # by hand as in the chain
    assert settings.data.source  # a missing data set is told how to get
    steps = chain.cascade(plan(tmp_path, task=stage.name, folds=()))
    trained = [s for s in steps if f"--config {stage.config}" in " ".join(s.argv)]
    assert len(trained) == 1 + len(stage.variants) * len(stage.folds)  # one makes the store


def test_a_stage_more_is_one_row_and_a_config(tmp_path, monkeypatch):
    known = stage_table.stages()
    more = stage_table.Stage("t3", "smoke.py", "t3", start="t2", folds=("0",))
    monkeypatch.setattr(chain, "stages", lambda: {**known, "t3": more})
    steps = named(chain.cascade(plan(tmp_path, task="t3", folds=())))
    assert {"cascade_smoke fold 0", "weights/cascade_mri_t2", "cascade_mri_t2 fold all"} <= {*steps}
    last = " ".join(steps["cascade_smoke fold 0"].argv)
    assert f"--init {tmp_path}/weights/cascade_mri_t2" in last


def test_without_foundation_weights_the_way_to_get_them_is_named(tmp_path):
    missing = chain.cascade(plan(tmp_path))[0]
    assert missing.state.status == "missing" and "13753413" in missing.state.why
    with pytest.raises(runner.StageError, match="13753413"):
        runner.run_steps([missing])
    scratch = named(chain.cascade(plan(tmp_path, foundation="none")))
    assert "weights/multitalent" not in scratch
    assert "--init none" in " ".join(scratch["cascade_ct_pancreas fold all"].argv)


def test_a_stage_that_starts_from_given_weights_has_nothing_trained_before_it(tmp_path):
    given = tmp_path / "published"
    given.mkdir()
    steps = named(chain.cascade(plan(tmp_path, starts={"t2": str(given)})))
    assert not any("ct_pancreas" in name or "mri_t1" in name for name in steps)
    assert f"--init {given}" in " ".join(steps["cascade_mri_t2 fold 0"].argv)
    steps = named(chain.cascade(plan(tmp_path, starts={"t1": str(given)})))
    assert "weights/cascade_mri_t1" in steps and "weights/cascade_ct_pancreas" not in steps
    assert f"--init {given}" in " ".join(steps["cascade_mri_t1 fold all"].argv)
    scratch = named(chain.cascade(plan(tmp_path, starts={"t2": "none"})))
    assert "--init none" in " ".join(scratch["cascade_mri_t2 fold 0"].argv)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        chain.cascade(plan(tmp_path, starts={"t2": "nowhere"}))
    with pytest.raises(ConfigError, match="--start ct: this chain goes t1 -> t2"):
        chain.cascade(plan(tmp_path, starts={"t1": str(given), "ct": str(given)}))


def test_which_weights_are_handed_on_is_an_option(tmp_path):
    hand = stage_table.HandedOn(fold="2", checkpoint="final")
    steps = named(chain.cascade(plan(tmp_path, handed_on={"t1": hand})))
    assert "cascade_mri_t1 fold 2" in steps and "cascade_mri_t1 fold all" not in steps
    assert "--folds 2 --checkpoint final" in " ".join(steps["weights/cascade_mri_t1"].argv)
    with pytest.raises(ConfigError, match="--hand-on t2"):
        chain.cascade(plan(tmp_path, handed_on={"t2": hand}))


def test_overrides_reach_every_training_and_demo_shortens_the_last_stages(tmp_path):
    steps = chain.cascade(plan(tmp_path, demo=True, overrides=("--loop.seed", "5")))
    trainings = [s for s in steps if s.argv[0] == "panther_jax.train"]
    assert len([s for s in trainings if "--fold" in s.argv]) == 7
    for step in trainings:
        assert "--demo" in step.argv and step.argv[-2:] == ("--loop.seed", "5")
    assert sum("--loop.epochs" in s.argv for s in trainings) == 5 + 2  # and the stores of both


# -------------------------------------------------------------------------------- what is done


def training(root, *, spec="mri_t2.py", start=None, overrides=(), fold="0"):
    """A fold in demo size as the chain wants it, and a store for it."""
    options = Options(
        fold=0, root=root, config=spec, init=str(start) if start else "none", demo=True
    )
    settings, _ = resolve(options, overrides)
    store = root / "store"
    write(store / "dataset.json", {"numTraining": 1})
    return states.Training(root / "runs" / "r" / f"fold_{fold}", settings, start, store)


def begun(wanted):
    """What ``run.json`` holds of a fold that began as wanted."""
    config, data = wanted.settings.to_json(), store_identity(wanted.store)
    return {"config": config, "data_sha256": data}


def test_a_fold_is_done_when_trained_and_validated(tmp_path):
    start = tmp_path / "weights" / "ct"
    wanted = training(tmp_path, start=start)
    assert states.training_state(wanted).status == "to do"
    write(start / "provenance.json", {"sha256": {"fold_all.safetensors": "one"}})
    origin = (start, {"fold_all.safetensors": "one"})
    finish_training(wanted.folder, start=origin, **begun(wanted))
    assert states.training_state(wanted).status == "done"
    (wanted.folder / "validation_final" / "summary.json").unlink()
    assert states.training_state(wanted).status == "to do"


def test_a_fold_from_scratch_is_not_the_chains(tmp_path):
    """The README's first command, then the chain, were it under the same name."""
    start = tmp_path / "weights" / "t1"
    write(start / "provenance.json", {"sha256": {"fold_all.safetensors": "one"}})
    scratch, wanted = training(tmp_path), training(tmp_path, start=start)
    finish_training(wanted.folder, **begun(scratch))
    state = states.training_state(wanted)
    assert state.status == "stale" and "from scratch" in state.why and str(start) in state.why
    finish_training(wanted.folder, start=(start, {"x": "one"}), **begun(wanted))
    state = states.training_state(scratch)
    assert state.status == "stale" and "now it starts from scratch" in state.why
    own = plan(tmp_path, demo=True).run_folder("mri_t2.py")
    assert own.name == "cascade_mri_t2_demo"


def test_changed_or_other_starting_weights_are_noticed_and_named(tmp_path):
    start, other = tmp_path / "weights" / "ct", tmp_path / "weights" / "t1"
    write(start / "provenance.json", {"sha256": {"fold_all.safetensors": "two"}})
    wanted = training(tmp_path, start=start)
    finish_training(wanted.folder, start=(start, {"fold_all.safetensors": "one"}), **begun(wanted))
    state = states.training_state(wanted)
    assert state.status == "stale" and f"{start}, which has changed" in state.why
    finish_training(wanted.folder, start=(other, {"fold_all.safetensors": "one"}), **begun(wanted))
    assert f"trained from {other}, now" in states.training_state(wanted).why
    # the same weights elsewhere are the same weights
    finish_training(wanted.folder, start=(other, {"fold_all.safetensors": "two"}), **begun(wanted))
    assert states.training_state(wanted).status == "done"
    step = Step("fold 0", ("x",), (), lambda: state)
    with pytest.raises(runner.StageError, match="--restart-stale"):
        runner.run_steps([step])
    runner.run_steps([step], runner.Running(keep_stale=True))


def test_another_config_or_other_data_make_a_fold_stale(tmp_path):
    wanted = training(tmp_path)
    finish_training(wanted.folder, **begun(wanted))
    assert states.training_state(wanted).status == "done"
    longer = training(tmp_path, overrides=("--loop.epochs", "99"))
    state = states.training_state(longer)
    assert state.status == "stale" and "loop.epochs: 16 -> 99" in state.why
    # what does not touch the training may differ
    other = training(
        tmp_path, overrides=("--validation.step-size", "0.7", "--log.every-steps", "3")
    )
    assert states.training_state(other).status == "done"
    write(wanted.store / "case_0.json", {"voxel_counts": {"1": 5}})
    state = states.training_state(wanted)
    assert state.status == "stale" and "other data" in state.why
    # without a record of its own a fold has the config of its run
    write(wanted.folder / "run.json", {"finished": True})
    write(wanted.folder.parent / "config.json", longer.settings.to_json())
    assert "loop.epochs: 99 -> 16" in states.training_state(wanted).why


def test_weights_of_another_network_are_named_before_training(tmp_path):
    start = weight_files.write_bundle(tmp_path / "weights" / "tiny")
    state = states.training_state(training(tmp_path, start=start))
    assert state.status == "missing" and f"{start} are weights of another network" in state.why


def test_a_bundle_follows_its_run_fold_and_checkpoint(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "weights" / "ct"
    wanted = states.Bundled(folder, run, "all", "best")

    def bundled(fold="all", source=run, **entry):
        known = {"params_sha256": "one", "checkpoint": "best", **entry}
        write(folder / "provenance.json", {"source": str(source), "checkpoints": {fold: known}})
        return states.bundle_state(wanted)

    assert states.bundle_state(wanted).status == "to do"
    finish_training(run / "fold_all", weights="one")
    assert bundled().status == "done"
    assert "final checkpoint" in bundled(checkpoint="final").why
    assert bundled("0").status == bundled(source=tmp_path / "other").status == "to do"
    bundled()
    finish_training(run / "fold_all", weights="two")
    state = states.bundle_state(wanted)
    assert state.status == "to do" and str(run) in state.why


def test_what_is_derived_is_made_again_when_its_source_is_newer(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    source.write_text("1")
    assert states.derived(output, [source]).status == "to do"
    output.write_text("1")
    os.utime(source, ns=(10, 10))
    os.utime(output, ns=(20, 20))
    assert states.derived(output, [source, tmp_path / "absent"]).status == "done"
    os.utime(source, ns=(30, 30))
    assert states.derived(output, [source]).status == "to do"


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


def test_devices_are_those_that_are_visible(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner.deal_devices(2) == [None, None]  # no devices: jobs share the processor
    for name in ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert runner.deal_devices(2) == ["2", "10"] and runner.deal_devices(1) == [None]
    with pytest.raises(runner.StageError, match="--jobs 3: there are 2 visible"):
        runner.deal_devices(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8a, 7")
    assert runner.deal_devices(2) == ["5", "GPU-8a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runner.deal_devices(2) == [None, None]


def test_steps_of_a_layer_run_side_by_side_each_with_a_device(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a")
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
    assert devices == {"3", "GPU-8a"}


def test_what_a_layer_changes_is_seen_by_the_next(tmp_path, monkeypatch):
    """A step that was done before its weights were made again is not skipped."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    first = make_step(tmp_path / "first")
    stale = State("stale", "its weights changed")
    second = Step(
        "second", ("x",), ("first",), lambda: stale if (tmp_path / "first").exists() else DONE
    )
    with pytest.raises(runner.StageError, match="second is out of date: its weights changed"):
        runner.run_steps([first, second])


def test_a_store_is_done_when_every_case_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "is_complete", lambda _, name: name != "broken")
    assert states.store_state(tmp_path).status == "to do"
    assert states.store_state(tmp_path, "get it there") == State("missing", "get it there")
    write(tmp_path / "dataset.json", {"numTraining": 2})
    for name, status in (("one", "to do"), ("broken", "to do"), ("two", "done")):
        (tmp_path / f"{name}.locations.npz").touch()
        assert states.store_state(tmp_path).status == status


def test_a_step_that_leaves_nothing_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(runner.StageError, match="left nothing"):
        runner.run_steps([make_step(tmp_path / "empty", "pass")])


def test_the_graph_is_drawn_with_what_is_done_and_what_is_missing(tmp_path, capsys):
    start = tmp_path / "weights" / "multitalent"
    write(start / "provenance.json", {"sha256": {"fold_all.safetensors": "one"}})
    settings, _ = loading.load_config("ct_pancreas.py")
    finish_training(
        tmp_path / "runs" / "cascade_ct_pancreas" / "fold_all",
        start=(start, {"fold_all.safetensors": "one"}),
        config=settings.to_json(),
    )
    code = stages.main(["--task", "t2", "--root", str(tmp_path), "--folds", "0", "--dry-run"])
    graph, _, missing = capsys.readouterr().out.partition("\n\n")
    lines = graph.splitlines()
    assert code == 0 and len(lines) == 14
    state = {line.strip("│└├─ ").split("  ")[0]: line.split("  ")[-1].strip() for line in lines}
    assert state["cascade_ct_pancreas fold all (joins 2)"] == "done"
    assert state["weights/cascade_ct_pancreas"] == "to do"
    assert "raw data set Dataset901_PANTHER not found" in missing and "--task t1" in missing


def test_commands_are_printed_for_what_is_left(tmp_path, capsys):
    arguments = ["--task", "t1", "--root", str(tmp_path), "--folds", "0", "--print-commands"]
    assert stages.main(arguments) == 1 and "13753413" in capsys.readouterr().err
    arguments += ["--demo", "--name", "mine", "--start", "t1=none", "--hand-on"]
    assert stages.main(arguments[:-1]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(" -m panther_jax." in line for line in lines)
    assert "--prepare-only" in lines[0] and "mri_t1.py:aug=da5_fork" in lines[1]
    assert f"{tmp_path}/runs/mine_mri_t1_demo" in lines[3]
    for wrong, message in (
        (["--hand-on", "ct=x"], "a fold's number or all"),
        (["--start", "t1"], "expected STAGE=VALUE"),
        (["--name", "../x"], "a chain's name"),
        (["--start", "t2=none"], "--start t2"),
    ):
        assert stages.main([*arguments[:6], *wrong]) != 0
        assert message in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "task, folds", [("t1", ("0", "1", "2", "3", "4", "fold_all")), ("t2", (*"01234",))]
)
def test_the_published_members_are_those_of_the_cascade(task, folds):
    """One model folder a task, six and five members, best checkpoints (spec 03 §7.7)."""
    file = Path(__file__).parents[2] / "configs" / "ensembles" / f"task{task[1]}.json"
    (member,) = specification.read_ensemble(file).members
    stage = stage_table.stages()[task]
    root = file.parent.parent.parent
    run = plan(Path("data"), task=task).run_folder(stage.config)
    assert member.model.resolve().relative_to(root) == run
    assert member.folds == folds and len(folds) == len(stage.folds)
    assert member.checkpoint == "best" and member.mirror_axes == ()


def test_the_guides_example_of_an_ensemble_names_every_key_and_can_be_read(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "cascade.md").read_text(encoding="utf-8")
    (tmp_path / "e.json").write_text(guide.partition("```json\n")[2].partition("```")[0])
    first, second = specification.read_ensemble(tmp_path / "e.json").members
    assert first.folds[-1] == "fold_all" and second.class_weights[1] == ("tumor", 0.5)
    for key in (*specification.MEMBER_KEYS, *specification.ENSEMBLE_KEYS):
        assert f"`{key}`" in guide.partition("| key |")[2], key
