"""Meshes and processes: who computes what does not change the numbers."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_raw

from panther_jax import train
from panther_jax.config.loading import load_config
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError, DevicesConfig
from panther_jax.devices import processes
from panther_jax.devices.mesh import make_mesh, positions, put_batch, replicate, space_sizes
from panther_jax.network import unet
from panther_jax.training import data, feeding, options
from panther_jax.training.records import read_metrics
from panther_jax.training.step import make_task, make_train_step, make_train_steps, seed_key
from panther_jax.weights.checkpoint import Checkpoints

STEPS = [3 * epoch for epoch in range(1, 9)]
MESHES = ((1, 1), (2, 1), (1, 4), (2, 4))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw(tmp_path_factory.mktemp("raw") / "Dataset902_Tiny", shape=(20, 24, 24))


@pytest.fixture(scope="module")
def config():
    smoke, _ = load_config("smoke")
    return dataclasses.replace(
        smoke,
        data=dataclasses.replace(smoke.data, patch_size=(16, 16, 16)),
        augment=dataclasses.replace(smoke.augment, policy="none"),  # it takes long to compile
    )


@pytest.fixture(scope="module")
def store(config, raw, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return data.prepare_store(config, options.Options(fold=0, root=root, raw=raw), Places(root))


# ---------------------------------------------------------------------------------------- mesh


def compiled_training(config, store, shape):
    """A call compiled for a mesh, its first state and key, its stream of batches on devices."""
    settings = dataclasses.replace(config, devices=DevicesConfig(*shape))
    several = settings.loop.steps_per_call > 1
    arch, patch = store.plans.arch, store.plans.patch_size
    mesh = make_mesh(settings.devices, batch_size=2, patch_size=patch, arch=arch)
    assert (mesh.shape["data"], mesh.shape["space"]) == shape
    task = make_task(settings, store, unet.Execution(), mesh)
    made = feeding.make_streams(settings, store, 0, initial_patch=patch, mesh=mesh)
    placed = made.train(0)
    params = unet.init_params(arch, jax.random.key(0))
    state = train.TrainState(jnp.int32(0), params, task.optimizer.init(params))
    state = replicate(state, mesh)
    key = replicate(seed_key(0, 0, 0), mesh)
    batch = next(placed)
    make = make_train_steps if several else make_train_step
    step = jax.jit(make(task)).lower(state, batch, key).compile()
    return step, state, key, batch, placed


@pytest.fixture(scope="module")
def trained(config, store):
    """Losses, parameters and program after five steps on every mesh."""
    results = {}
    for shape in MESHES:
        step, state, key, batch, placed = compiled_training(config, store, shape)
        losses = []
        for number in range(5):
            batch = next(placed) if number else batch
            state, values = step(state, batch, key)
            losses.append(float(values["loss"]))
        results[shape] = (losses, jax.device_get(state.params), step.as_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES[1:])
def test_every_mesh_trains_the_same_network(trained, shape):
    expected, params, _ = trained[1, 1]
    losses, other, _ = trained[shape]
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_neighbours_exchange_halos_and_nothing_is_gathered(trained):
    for shape in MESHES:
        program = trained[shape][2]
        permutes = len(re.findall(r"collective-permute(?:-start)?\(", program))
        assert (permutes > 10) == (shape[1] > 1)
        assert "all-gather" not in program
        assert ("all-reduce(" in program) == (shape != (1, 1))


@pytest.mark.slow
def test_several_steps_a_call_with_cases_on_every_device_of_a_mesh(trained, config, store):
    replace = dataclasses.replace
    settings = replace(
        config,
        data=replace(config.data, resident="device"),
        loop=replace(config.loop, steps_per_call=3),
    )
    call, state, key, batch, placed = compiled_training(settings, store, (2, 4))
    losses = []
    for number in range(2):
        state, values = call(state, next(placed) if number else batch, key)
        losses += np.asarray(values["loss"]).tolist()
    np.testing.assert_allclose(losses[:5], trained[1, 1][0], atol=1e-5)
    assert "all-gather" not in call.as_text()


def test_patches_are_split_where_every_resolution_has_a_slice_for_each(store):
    arch = store.plans.arch  # three stages: the lowest resolution is a quarter
    assert space_sizes((16, 16, 16), arch) == (1, 2, 4)
    assert space_sizes((24, 8, 8), arch) == (1, 2, 3, 4, 6)


@pytest.mark.parametrize(
    "wanted, batch_size, message",
    [
        (DevicesConfig(data=3), 4, r"(?s)does not divide batches of 4.*\[1, 2, 4\]"),
        (DevicesConfig(space=8), 2, "split over 1, 2, 4"),
        (DevicesConfig(data=16), 16, "more than the 8 device"),
        (DevicesConfig(data=8, space=4), 8, "more than the 8 device"),
    ],
)
def test_impossible_meshes_are_refused_with_what_is_possible(store, wanted, batch_size, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(wanted, batch_size=batch_size, patch_size=(16, 16, 16), arch=store.plans.arch)


def test_accelerators_are_all_used_or_the_batch_is_refused(store, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arguments = {"patch_size": (16, 16, 16), "arch": store.plans.arch}
    for batch_size, shape in ((8, (8, 1)), (2, (2, 4)), (4, (4, 2)), (6, (2, 4))):
        mesh = make_mesh(DevicesConfig(), batch_size=batch_size, **arguments)
        assert tuple(mesh.shape.values()) == shape
    with pytest.raises(ConfigError, match="batch sizes that they can: 2, 4, 6, 8"):
        make_mesh(DevicesConfig(), batch_size=3, **arguments)
    fewer = make_mesh(DevicesConfig(data=3, space=1), batch_size=3, **arguments)
    assert tuple(fewer.shape.values()) == (3, 1)


def test_a_single_process_makes_the_whole_batch(store):
    mesh = make_mesh(
        DevicesConfig(data=2, space=2),
        batch_size=6,
        patch_size=(16, 16, 16),
        arch=store.plans.arch,
    )
    assert positions(mesh, 6) == tuple(range(6))
    values = np.arange(6.0)[:, None]
    placed = put_batch({"image": values}, mesh, 6)["image"]
    np.testing.assert_array_equal(placed, values)
    assert processes.any_process(True, False) == (True, False)


# ----------------------------------------------------------------------------------- processes


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(raw, root, cache, *more):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    argv = ["--config", "smoke.py", "--raw", str(raw), "--root", str(root), "--loop.epochs", "8"]
    argv += ["--validation.checkpoints", "final"]
    return subprocess.Popen(
        [sys.executable, "-m", "panther_jax.train", *argv, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(raw, root, cache, *more):
    address = f"127.0.0.1:{free_port()}"
    common = ("--coordinator", address, "--num-processes", "2", "--process-id")
    return [start(raw, root, cache, *common, str(i), *more) for i in range(2)]


def final_params(root):
    found = Checkpoints(root / "runs" / "smoke" / "fold_0" / "checkpoints").read("final")
    assert found is not None and found[2].step == 24
    return jax.tree.leaves(found[0])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What several processes compile is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(raw, cache, tmp_path_factory):
    """A run of two processes from beginning to end: its root and what both said."""
    root = tmp_path_factory.mktemp("undisturbed")
    pair = start_two(raw, root, cache)
    outputs = [process.communicate(timeout=240)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    return root, outputs


@pytest.mark.slow
def test_two_processes_leave_one_log_and_one_validation(undisturbed):
    root, outputs = undisturbed
    fold = root / "runs" / "smoke" / "fold_0"
    assert [r["step"] for r in read_metrics(fold / "metrics.jsonl")] == STEPS
    assert "epoch 8/8" in outputs[0] and "epoch" not in outputs[1]
    assert (fold / "validation_final" / "summary.json").is_file()


@pytest.mark.slow
def test_two_processes_cut_their_own_samples_several_steps_a_call(
    undisturbed, raw, cache, tmp_path
):
    more = ("--data.resident", "device", "--loop.steps-per-call", "3")
    pair = start_two(raw, tmp_path, cache, *more)
    outputs = [process.communicate(timeout=240)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "stay in device memory" in outputs[0]
    metrics = tmp_path / "runs" / "smoke" / "fold_0" / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(metrics)] == STEPS
    # Another program rounds otherwise; 24 steps carry the rounding on.
    for a, b in zip(final_params(undisturbed[0]), final_params(tmp_path), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_one_of_two_processes_dies_and_the_run_goes_on_alone(undisturbed, raw, cache, tmp_path):
    """It ends with a message, resumes in one process, and gets where nothing had happened."""
    pair = start_two(raw, tmp_path, cache)
    metrics = tmp_path / "runs" / "smoke" / "fold_0" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while len(read_metrics(metrics)) < 2:  # the first epoch's checkpoint is complete then
        assert time.monotonic() < deadline and pair[0].poll() is None, pair[0].communicate()[0]
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output = pair[0].communicate(timeout=120)[0]
    pair[1].communicate()
    assert time.monotonic() - killed < 60
    assert pair[0].returncode not in (0, None), output
    assert "another process of this run is gone" in output
    assert "Traceback" not in output
    assert 3 <= read_metrics(metrics)[-1]["step"] < 24

    resumed = start(raw, tmp_path, cache)
    text = resumed.communicate(timeout=240)[0]
    assert resumed.returncode == 0 and "resuming after step" in text, text
    assert [r["step"] for r in read_metrics(metrics)] == STEPS
    # Two devices and one add up in another order; 24 steps carry the rounding on.
    for a, b in zip(final_params(undisturbed[0]), final_params(tmp_path), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
