"""The whole pipeline at toy size: it learns nothing, but stops, resumes and repeats exactly."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import make_raw

from panther_jax import bundle, train
from panther_jax.base import files
from panther_jax.config.loading import apply_overrides, load_config
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError, LoopConfig
from panther_jax.images import imageio
from panther_jax.network import unet
from panther_jax.panther import states
from panther_jax.panther.cases import TASK2_CASE
from panther_jax.store.folds import fold_cases
from panther_jax.training import feeding, sampling, signals, validation
from panther_jax.training import step as step_module
from panther_jax.training.data import prepare_store
from panther_jax.training.options import Options
from panther_jax.training.records import read_metrics
from panther_jax.weights.bundle import load_bundle, params_sha256
from panther_jax.weights.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parent.parent


def options(root, raw, **changes):
    return Options(**{"fold": 0, "root": root, "raw": raw, **changes})


pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw(tmp_path_factory.mktemp("raw") / "Dataset902_Tiny")


@pytest.fixture(scope="module")
def smoke():
    config, _ = load_config("smoke")
    return dataclasses.replace(
        config, loop=dataclasses.replace(config.loop, compilation_cache=False)
    )


@pytest.fixture(scope="module")
def store(raw, smoke, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return prepare_store(smoke, options(root, raw), Places(root))


@pytest.fixture(scope="module")
def finished(store, smoke, tmp_path_factory):
    """A run of six steps in one go: its folder and what the command prints."""
    folder = tmp_path_factory.mktemp("run") / "fold_0"
    folder.mkdir()
    return folder, train.train_fold(smoke, store, folder, fold=0, bundle=None)


def final_params(folder):
    """Leaves of the final checkpoint, by path, read without knowing their shapes."""
    import orbax.checkpoint as ocp

    path = next(p for p in (folder / "checkpoints" / "final").iterdir() if p.name.isdigit())
    restored = ocp.StandardCheckpointer().restore(path / "params")
    return {"/".join(p): np.asarray(leaf) for p, leaf in unet.walk(restored)}


def assert_same_training(folder, other):
    a, b = final_params(folder), final_params(other)
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    timed = ("seconds", "wait_share")
    rows = [
        [
            {k: v for k, v in row.items() if k not in timed}
            for row in read_metrics(f / "metrics.jsonl")
        ]
        for f in (folder, other)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_a_run_leaves_what_the_design_promises(finished, store):
    folder, tables = finished
    assert Checkpoints(folder / "checkpoints").steps("final") == (6,)
    assert Checkpoints(folder / "checkpoints").steps("latest") == (3,)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [(r["epoch"], r["step"]) for r in rows] == [(0, 3), (1, 6)]
    assert all(np.isfinite(r["train_loss"]) for r in rows)
    assert (folder / "progress.png").stat().st_size > 10_000
    cases = fold_cases(store, 0)[1]
    for name in ("final", "best"):
        validated = folder / f"validation_{name}"
        assert sorted(p.name for p in validated.glob("*.mha")) == [f"{c}.mha" for c in cases]
        summary = json.loads((validated / "summary.json").read_text())
        assert set(summary["mean"]) == {"1", "2"}
        assert (validated / "overlay.png").stat().st_size > 5_000
        panther = json.loads((validated / "panther.json").read_text())
        assert [c["subject"] for c in panther["per_subject"]] == list(cases)
    assert all(f"{c} " in tables for c in cases) and "validation_best" in tables
    assert json.loads((folder / "run.json").read_text())["finished"]


def test_a_run_becomes_a_bundle_that_the_next_stage_starts_from(finished, store, smoke, tmp_path):
    run = tmp_path / "first"
    shutil.copytree(finished[0], run / "fold_0")
    files.write_json(run / "config.json", smoke.to_json())
    for name in ("plans.json", "dataset.json"):
        shutil.copy(store.folder / name, run / name)
    out = tmp_path / "weights"
    assert bundle.main(["--run", str(run), "--out", str(out), "--quiet"]) == 0
    loaded = load_bundle(out)
    trained = Checkpoints(run / "fold_0" / "checkpoints").read("final")[0]
    assert params_sha256(loaded.params["0"]) == params_sha256(trained)
    about = json.loads((run / "fold_0" / "run.json").read_text())
    record = loaded.provenance["checkpoints"]["0"]
    assert record["params_sha256"] == about["params_sha256"] == params_sha256(trained)
    assert record["step"] == 6 and set(record["metrics"]) == {"1", "2"}
    bundled = states.Bundled(out, run, "0", "final")
    assert states.bundle_state(bundled).status == "done"

    second = tmp_path / "second" / "fold_0"
    second.mkdir(parents=True)
    short = dataclasses.replace(
        smoke, loop=dataclasses.replace(smoke.loop, epochs=1, steps_per_epoch=1)
    )
    train.train_fold(short, store, second, fold=0, bundle=out)
    wanted = states.Training(second, short, out, store.folder)
    assert states.training_state(wanted).status == "done"
    assert states.training_state(dataclasses.replace(wanted, settings=smoke)).status == "stale"
    provenance = json.loads((out / "provenance.json").read_text())
    (out / "provenance.json").write_text(json.dumps({**provenance, "sha256": {"other": "x"}}))
    assert states.training_state(wanted).status == "stale"


def test_a_bundle_needs_a_finished_run(finished, tmp_path, capsys):
    run = tmp_path / "run"
    assert bundle.main(["--run", str(run), "--out", str(tmp_path / "x"), "--quiet"]) == 1
    assert "not a run" in capsys.readouterr().err
    (run / "fold_3" / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for more, message in ((["--folds", "1"], "has no fold 1"), ([], "no final checkpoint")):
        assert bundle.main(["--run", str(run), "--out", str(tmp_path / "x"), *more]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "names, which, expected",
    [
        (("10001_0001", "10303"), "all", ("10001_0001", "10303")),
        (("10001_0001", "10303"), TASK2_CASE, ("10303",)),
    ],
)
def test_cases_of_task_2_are_told_by_name(names, which, expected):
    assert validation.cases_to_validate(names, which) == expected


def test_no_case_of_task_2_is_an_error():
    with pytest.raises(ValueError, match="--validation.cases all"):
        validation.cases_to_validate(("10001_0001",), TASK2_CASE)


def test_label_maps_lie_on_the_raw_grid(finished, store):
    from panther_jax.images.imageio import read_label

    folder, _ = finished
    for path in (folder / "validation_final").glob("*.mha"):
        prediction, geometry = read_label(path)
        reference, expected = read_label(store.reference(path.stem))
        assert prediction.shape == reference.shape
        np.testing.assert_allclose(geometry.spacing_zyx, expected.spacing_zyx)
        np.testing.assert_allclose(geometry.origin_xyz, expected.origin_xyz)
        assert set(np.unique(prediction)) <= {0, 1, 2}


def test_running_again_does_only_what_is_missing(finished, store, smoke, monkeypatch):
    folder, tables = finished
    before = {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")}

    def refuse(*_args):
        raise AssertionError("a finished run trained again")

    monkeypatch.setattr(train, "run_loop", refuse)
    removed = folder / "validation_best" / "summary.json"
    removed.unlink()
    assert train.train_fold(smoke, store, folder, fold=0, bundle=None) == tables
    assert removed.is_file()
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")}


def test_a_signal_saves_and_the_run_resumes_exactly(finished, store, smoke, tmp_path, monkeypatch):
    folder = tmp_path / "fold_0"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(signals.StopRequest, "listen", lambda self: setattr(self, "by", "SIGTERM"))
        with pytest.raises(signals.Interrupted, match="SIGTERM after step 1 of 6"):
            train.train_fold(smoke, store, folder, fold=0, bundle=None)
    assert Checkpoints(folder / "checkpoints").steps("latest") == (1,)  # in the middle of an epoch
    train.train_fold(smoke, store, folder, fold=0, bundle=None)
    assert_same_training(finished[0], folder)


def test_signals_are_heard():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number in handlers:
            stop = signals.StopRequest()
            stop.listen()
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 5
            while stop.by is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stop.by == number.name
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def with_fields(config, data=None, **loop):
    """The config with other fields of the data and of the loop."""
    replace = dataclasses.replace
    only_final = replace(config.validation, checkpoints=("final",))
    return replace(
        config,
        data=replace(config.data, **(data or {})),
        loop=replace(config.loop, **loop),
        validation=only_final,
    )


def trained(config, store, folder):
    """A run in a new folder; returns it."""
    folder.mkdir(parents=True)
    train.train_fold(config, store, folder, fold=0, bundle=None)
    return folder


def test_cases_on_the_device_train_the_same_network(finished, store, smoke, tmp_path):
    config = with_fields(smoke, {"resident": "device"})
    assert_same_training(finished[0], trained(config, store, tmp_path / "fold_0"))


@pytest.fixture(scope="module")
def three_a_call(store, smoke, tmp_path_factory):
    """A run of two epochs, two calls each: its config and folder."""
    config = with_fields(smoke, {"resident": "device"}, steps_per_epoch=6, steps_per_call=3)
    return config, trained(config, store, tmp_path_factory.mktemp("calls") / "fold_0")


def test_several_steps_a_call_take_the_same_steps(three_a_call, store, tmp_path):
    single = with_fields(three_a_call[0], steps_per_call=1)
    folders = trained(single, store, tmp_path / "fold_0"), three_a_call[1]
    one, three = (final_params(folder) for folder in folders)
    for name in one:
        # Another program rounds otherwise; twelve steps of AdamW at 1e-3 move weights by 1e-2.
        np.testing.assert_allclose(one[name], three[name], atol=1e-5, err_msg=name)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in folders]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [6, 12]
    for a, b in zip(*rows, strict=True):
        for name in ("train_loss", "validation_loss"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


def test_cases_on_the_host_send_the_batches_of_a_call_together(three_a_call, store, tmp_path):
    config = with_fields(three_a_call[0], {"resident": "stream"})
    assert_same_training(three_a_call[1], trained(config, store, tmp_path / "fold_0"))


def test_a_signal_between_calls_saves_and_the_run_resumes_exactly(
    three_a_call, store, tmp_path, monkeypatch
):
    config, folder = three_a_call[0], tmp_path / "fold_0"
    with monkeypatch.context() as patch:
        patch.setattr(signals.StopRequest, "listen", lambda self: setattr(self, "by", "SIGTERM"))
        with pytest.raises(signals.Interrupted, match="SIGTERM after step 3 of 12"):
            trained(config, store, folder)
    assert Checkpoints(folder / "checkpoints").steps("latest") == (3,)  # amid the first epoch
    train.train_fold(config, store, folder, fold=0, bundle=None)
    assert_same_training(three_a_call[1], folder)


def test_a_step_that_calls_do_not_reach_is_not_resumed_from(store, smoke, tmp_path, monkeypatch):
    folder = tmp_path / "fold_0"
    with monkeypatch.context() as patch:
        patch.setattr(signals.StopRequest, "listen", lambda self: setattr(self, "by", "SIGTERM"))
        with pytest.raises(signals.Interrupted, match="after step 1 of 6"):
            trained(with_fields(smoke), store, folder)
    with pytest.raises(ConfigError, match=r"(?s)after step 1, .* calls of 3 .*steps-per-call 1"):
        train.train_fold(with_fields(smoke, steps_per_call=3), store, folder, fold=0, bundle=None)
    assert Checkpoints(folder / "checkpoints").steps("latest") == (1,)


@pytest.mark.parametrize("residence, per_call", [("host", 1), ("device", 5)])
def test_twenty_steps_compile_once(store, smoke, tmp_path, monkeypatch, residence, per_call):
    traces = []
    original = step_module.make_train_step

    def counted(task):
        step = original(task)

        def traced(state, batch, key):
            traces.append(batch)
            return step(state, batch, key)

        return traced

    monkeypatch.setattr(step_module, "make_train_step", counted)
    length = {"epochs": 4, "steps_per_epoch": 5, "steps_per_call": per_call}
    config = with_fields(smoke, {"resident": residence}, **length)
    folder = trained(config, store, tmp_path / "fold_0")
    assert len(read_metrics(folder / "metrics.jsonl")) == 4
    assert len(traces) == 1


@pytest.mark.parametrize("per_call", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    store, smoke, tmp_path, monkeypatch, per_call
):
    original = sampling.BatchSource.__getitem__

    def broken(self, index):
        batch = dict(original(self, index))
        if index == 1 and self.sampling.stream == sampling.TRAIN_STREAM:
            batch["image"] = np.full_like(batch["image"], np.nan)
        return batch

    monkeypatch.setattr(sampling.BatchSource, "__getitem__", broken)
    folder = tmp_path / "fold_0"
    with pytest.raises(
        signals.TrainingError, match=r"(?s)loss.* of step 2 is not finite.*--optim.lr"
    ):
        trained(with_fields(smoke, steps_per_call=per_call), store, folder)
    assert Checkpoints(folder / "checkpoints").steps("latest") == ()


def test_a_first_step_that_lacks_memory_is_named_with_its_cure(store, smoke, tmp_path, monkeypatch):
    """A program may compile and still find no memory when it first runs."""

    def exhausted(*_arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    monkeypatch.setattr(
        train, "compile_step", lambda loop, _state: dataclasses.replace(loop, train_step=exhausted)
    )
    with pytest.raises(signals.TrainingError, match="not enough device memory .*--data.batch-size"):
        trained(with_fields(smoke), store, tmp_path / "fold_0")
    assert Checkpoints(tmp_path / "fold_0" / "checkpoints").steps("latest") == ()


def test_devices_share_the_batch_and_agree(store, smoke):
    """One and two devices take the same step, to rounding."""
    results = []
    for count in (1, 2):
        mesh = jax.make_mesh(
            (count, 1),
            ("data", "space"),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=jax.devices()[:count],
        )
        task = step_module.make_task(smoke, store, unet.Execution(), mesh)
        made = feeding.make_streams(smoke, store, 0, initial_patch=(8, 24, 24), mesh=mesh)
        stream = made.train(0)
        place = jax.NamedSharding(mesh, jax.P())
        params = unet.init_params(task.net.arch, jax.random.key(0))
        state = train.TrainState(jax.numpy.int32(0), params, task.optimizer.init(params))
        state = jax.device_put(state, place)
        step = jax.jit(step_module.make_train_step(task))
        key = jax.device_put(step_module.seed_key(0, 0, 0), place)
        losses = []
        for _ in range(3):
            state, values = step(state, next(stream), key)
            losses.append(float(values["loss"]))
        results.append(losses)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)  # float32 sums in another order


# ------------------------------------------------------------------------------ as a user types


def command(root, raw, *more, config="smoke.py"):
    return [
        sys.executable, "-m", "panther_jax.train", "--config", config, "--root", str(root),
        "--raw", str(raw), *more,
    ]  # fmt: skip


def environment(cache):
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**kept, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}


@pytest.mark.slow
def test_six_steps_equal_three_and_three_with_a_kill_between(raw, tmp_path):
    env = environment(tmp_path / "cache")
    whole = command(tmp_path, raw, "--workdir", str(tmp_path / "whole"))
    done = subprocess.run(whole, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "validation_final" in done.stdout and "pancreas" in done.stdout
    assert "epoch 2/2" in done.stderr and "left" in done.stderr

    killed = command(tmp_path, raw, "--workdir", str(tmp_path / "killed"))
    process = subprocess.Popen(killed, env=env, cwd=ROOT, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "fold_0" / "checkpoints" / "latest" / "3"
    deadline = time.monotonic() + 200
    while not checkpoint.is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "fold_0" / "checkpoints" / "final").exists()
    done = subprocess.run(killed, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3 of 6" in done.stderr
    assert_same_training(tmp_path / "whole" / "fold_0", tmp_path / "killed" / "fold_0")


@pytest.fixture
def run_main(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "train_fold", lambda *_args, **_kwargs: "trained")

    def run(*arguments):
        try:
            code = train.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


CACHE_OFF = "--loop.no-compilation-cache"


def test_the_command_prints_the_folder_and_the_table(run_main, raw, tmp_path):
    base = ["--config", "smoke.py", "--root", tmp_path, "--raw", raw, CACHE_OFF]
    code, out, err = run_main(*base, "--loop.seed", "3")
    assert code == 0 and out.startswith(str(tmp_path / "runs" / "smoke" / "fold_0"))
    assert "trained" in out and "panther_jax 0" in err
    workdir = tmp_path / "runs" / "smoke"
    assert json.loads((workdir / "config.json").read_text())["loop"]["seed"] == 3
    record = json.loads((workdir / "fold_0" / "run.json").read_text())
    assert record["seed"] == 3 and len(record["config_sha256"]) == 64 and record["packages"]["jax"]
    assert (workdir / "fold_0" / "log.txt").is_file()

    code, _, err = run_main(*base)
    assert code == 1 and "loop.seed: 3 -> 0" in err and "--allow-config-change" in err
    assert run_main(*base, "--allow_config_change")[0] == 0
    assert run_main(*base, "--log.every-steps", "5")[0] == 0  # does not touch the training
    assert run_main(*base, "--loop.seed=4", "--restart")[0] == 0


def test_where_cases_are_and_who_cuts_them_may_change_between_sessions(run_main, raw, tmp_path):
    base = ["--config", "smoke.py", "--root", tmp_path, "--raw", raw, CACHE_OFF]
    assert run_main(*base, "--data.resident", "host")[0] == 0
    stored = tmp_path / "runs" / "smoke" / "config.json"
    before = json.loads(stored.read_text())
    assert before["loop"].pop("steps_per_call") == 1  # as of a version without that field
    stored.write_text(json.dumps(before))
    changed = ("--data.resident", "device", "--data.num-threads", "7")
    code, _, err = run_main(*base, *changed, "--data.prefetch-batches", "9")
    assert code == 0 and "config changed" not in err
    code, _, err = run_main(*base, "--loop.steps-per-call", "3")
    assert code == 1 and "loop.steps_per_call: 1 -> 3" in err
    code, _, err = run_main(*base, "--loop.steps-per-call", "2")
    assert code == 2 and "must divide loop.steps_per_epoch 3" in err


def test_dry_run_shows_everything_and_writes_nothing(run_main, tmp_path):
    code, out, _ = run_main(
        "--config", "mri_t2:init=none", "--root", tmp_path / "data", "--dry-run", CACHE_OFF
    )
    assert code == 0 and not list(tmp_path.iterdir())
    assert '"lr": 0.001' in out and "102,350,575" in out and "GiB" in out
    assert str(tmp_path / "data" / "runs" / "mri_t2_init_none" / "fold_0") in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "nothing"], 2, "config 'nothing' not found"),
        ([], 2, "--config is required"),
        (["--config", "smoke", "--fold", "first"], 2, "--fold must be a number or all"),
        (["--config", "smoke", "--loop.epoch", "3"], 2, "--loop.epoch"),
        (["--config", "smoke", "--optim.lr", "0"], 2, "optim.lr must be positive"),
        (
            ["--config", "smoke", "--init", "gone", CACHE_OFF],
            1,
            "starting weights 'gone' not found",
        ),
        (["--config", "smoke", CACHE_OFF], 1, "raw data set Dataset902_PANTHER_HR not found"),
        (["--config", "smoke", "--raw", "gone", CACHE_OFF], 1, "gone"),
        (["--config", "smoke", "--store", "gone", CACHE_OFF], 1, "gone is not a store"),
        (
            [
                "--config",
                "smoke",
                "--raw",
                "{raw}",
                "--data.patch-size",
                "8",
                "16",
                "18",
                CACHE_OFF,
            ],
            1,
            "not divisible by the network's strides",
        ),
    ],
)
def test_mistakes_get_one_message_and_an_exit_code(
    run_main, raw, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    filled = [str(a).format(raw=raw) for a in arguments]
    found, out, err = run_main(*filled, "--root", tmp_path / "data")
    assert found == code and message in err, err
    assert "Traceback" not in err and not out
    assert not (tmp_path / "data" / "runs").exists()


def missing_label(raw):
    (raw / "labelsTr" / "case_1.mha").unlink()


def undeclared_value(raw):
    label, geometry = imageio.read_label(raw / "labelsTr" / "case_1.mha")
    imageio.write_label(raw / "labelsTr" / "case_1.mha", label + 5, geometry)


def other_grid(raw):
    label, geometry = imageio.read_label(raw / "labelsTr" / "case_1.mha")
    moved = dataclasses.replace(geometry, origin_xyz=(9.0, 9.0, 9.0))
    imageio.write_label(raw / "labelsTr" / "case_1.mha", label, moved)


def truncated_image(raw):
    path = raw / "imagesTr" / "case_1_0000.mha"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_label, "case_1: missing label"),
        (undeclared_value, "case 'case_1': label values 5"),
        (other_grid, "case 'case_1': label origin"),
        (truncated_image, "case_1_0000.mha"),
    ],
)
def test_broken_data_stop_the_run_before_it_begins(run_main, tmp_path, damage, message):
    damaged = make_raw(tmp_path / "Dataset902_Damaged")
    damage(damaged)
    code, out, err = run_main(
        "--config", "smoke", "--raw", damaged, "--root", tmp_path / "data", CACHE_OFF
    )
    assert code == 1 and message in err and "Traceback" not in err and not out, err
    assert not (tmp_path / "data" / "runs").exists()
    store = tmp_path / "data" / "store" / "Dataset902_Damaged"
    assert not list(store.rglob("case_1*")) and not list(store.rglob("*.tmp"))


def test_help_shows_the_fields_of_the_config(run_main):
    code, out, _ = run_main("--config", "mri_t2.py", "--help")
    assert code == 0 and "--demo" in out and "--optim.lr" in out and "0.001" in out


def test_overrides_reach_the_loop_config(smoke):
    changed = apply_overrides(smoke, ["--loop.epochs", "5"], prog="train")
    assert changed.loop == dataclasses.replace(smoke.loop, epochs=5)
    assert isinstance(changed.loop, LoopConfig)
