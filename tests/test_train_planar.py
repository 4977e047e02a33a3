"""Training in 2-D, end to end: slices are drawn, resumed, shared out, validated, predicted."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planar import PATCH, planar_smoke
from tiny import make_raw

from panther_jax import predict, train
from panther_jax.augment import policies
from panther_jax.base.files import write_json
from panther_jax.config.loading import load_config
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError, DevicesConfig, TrainConfig
from panther_jax.devices.mesh import make_mesh, replicate
from panther_jax.images.imageio import read_label
from panther_jax.network import unet
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import read_stored
from panther_jax.training import feeding, signals
from panther_jax.training.data import prepare_store
from panther_jax.training.dry_run import describe
from panther_jax.training.options import Options
from panther_jax.training.records import read_metrics
from panther_jax.training.step import make_task, make_train_step, seed_key
from panther_jax.weights.checkpoint import Checkpoints

SHAPE, SPACING = (9, 24, 24), (7.0, 6.0, 5.0)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "Dataset902_Tiny"
    return make_raw(folder, shape=SHAPE, spacing=SPACING)


@pytest.fixture(scope="module")
def config():
    return planar_smoke()


@pytest.fixture(scope="module")
def store(raw, config, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return prepare_store(config, Options(fold=0, root=root, raw=raw), Places(root))


@pytest.fixture(scope="module")
def run(store, config, tmp_path_factory):
    """A whole run of six steps: its folder."""
    return trained(config, store, tmp_path_factory.mktemp("planar"))


def trained(config, store, run):
    (run / "fold_0").mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", config.to_json())
    for name in ("plans.json", "dataset.json"):
        shutil.copy(store.folder / name, run / name)
    train.train_fold(config, store, run / "fold_0", fold=0, bundle=None)
    return run


def assert_same_training(run, other):
    found, wanted = (
        Checkpoints(r / "fold_0" / "checkpoints").read("final")[0] for r in (run, other)
    )
    leaves = jax.tree.leaves(found)
    assert len(leaves) > 20
    for a, b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [
        [row["train_loss"] for row in read_metrics(r / "fold_0" / "metrics.jsonl")]
        for r in (run, other)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_slices_keep_their_distance(store):
    assert store.plans.spacing == (6.0, 6.0) and store.plans.patch_size == PATCH
    assert store.plans.arch.ndim == 2
    case = read_stored(store, store.case_ids[0])
    assert case.label.shape == (9, 24, 20)


def test_whole_cases_are_validated_slice_by_slice(run, store):
    cases = fold_cases(store, 0)[1]
    assert len(read_metrics(run / "fold_0" / "metrics.jsonl")) == 2
    for name in ("final", "best"):
        folder = run / "fold_0" / f"validation_{name}"
        summary = json.loads((folder / "summary.json").read_text())
        assert len(summary["metric_per_case"]) == len(cases)
        for case in cases:
            assert read_label(folder / f"{case}.mha")[0].shape == SHAPE
        assert (folder / "overlay.png").stat().st_size > 5_000


def test_a_run_that_was_stopped_ends_with_the_same_bits(run, store, config, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(signals.StopRequest, "listen", lambda self: setattr(self, "by", "SIGTERM"))
        with pytest.raises(signals.Interrupted, match="after step 1 of 6"):
            trained(config, store, stopped)
    assert_same_training(run, trained(config, store, stopped))


@pytest.mark.parametrize("resident", ["device", "stream"])
def test_where_the_slices_come_from_changes_nothing(run, store, config, tmp_path, resident):
    data = dataclasses.replace(config.data, resident=resident)
    only = dataclasses.replace(config.validation, checkpoints=("final",))
    other = dataclasses.replace(config, data=data, validation=only)
    assert_same_training(run, trained(other, store, tmp_path / resident))


def test_predict_makes_the_label_maps_of_the_validation(run, store, raw, tmp_path):
    case = fold_cases(store, 0)[1][0]
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(raw / "imagesTr" / f"{case}_0000.mha", source)
    arguments = ["--model", run, "--input", source, "--output", tmp_path / "out", "--mirror"]
    assert predict.main([str(a) for a in (*arguments, "--quiet")]) == 0
    found, _ = read_label(tmp_path / "out" / f"{case}.mha")
    expected, _ = read_label(run / "fold_0" / "validation_final" / f"{case}.mha")
    assert len(np.unique(expected)) > 1
    # validation adds tiles in the same order, in another program
    assert (found == expected).mean() > 0.999


def one_step(config, store, shape=(1, 1), steps=1):
    """Losses of the first steps on a mesh, and the parameters after them."""
    settings = dataclasses.replace(config, devices=DevicesConfig(*shape))
    plans = store.plans
    mesh = make_mesh(
        settings.devices,
        batch_size=settings.data.batch_size,
        patch_size=plans.patch_size,
        arch=plans.arch,
    )
    execution = unet.Execution.auto("float32", space=shape[1])
    task = make_task(settings, store, execution, mesh)
    geometry = policies.patch_geometry(settings.augment.policy, plans.patch_size)
    made = feeding.make_streams(
        settings, store, 0, initial_patch=geometry.initial_patch_size, mesh=mesh
    )
    stream = made.train(0)
    params = unet.init_params(plans.arch, jax.random.key(0))
    state = train.TrainState(jnp.int32(0), params, task.optimizer.init(params))
    state, key = replicate(state, mesh), replicate(seed_key(0, 0, 0), mesh)
    step, losses = jax.jit(make_train_step(task)), []
    for _ in range(steps):
        state, values = step(state, next(stream), key)
        losses.append(float(values["loss"]))
    return losses, jax.device_get(state.params)


@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (2, 4)])
def test_devices_share_slices_and_agree(store, config, shape):
    losses, params = one_step(config, store, steps=3)
    others, other = one_step(config, store, shape, steps=3)
    np.testing.assert_allclose(others, losses, atol=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["default", "da5", "da5_fork"])
def test_every_family_of_augmentation_trains_on_slices(store, policy):
    (loss,), _ = one_step(planar_smoke(policy=policy), store)
    assert np.isfinite(loss) and 0 < loss < 3
    geometry = policies.patch_geometry(policy, PATCH)
    assert geometry.mirror_axes == (0, 1) and not geometry.dummy_2d
    assert all(n > p for n, p in zip(geometry.initial_patch_size, PATCH, strict=True))


def test_a_config_that_mixes_axes_is_refused_by_name(config):
    solid, _ = load_config("smoke")
    with pytest.raises(ConfigError, match=r"(?s)patch_size 2.*arch.strides 3.*mri_t2_2d.py"):
        TrainConfig(data=config.data, arch=solid.arch)
    strides = (*config.arch.strides[:2], (2, 2, 2))
    with pytest.raises(ConfigError, match=r"arch.strides 2 and 3"):
        TrainConfig(data=config.data, arch=dataclasses.replace(config.arch, strides=strides))


def test_the_dry_run_of_a_planar_config_counts_its_memory(tmp_path):
    settings, _ = load_config("mri_t2_2d")
    assert settings.data.patch_size == (320, 320) and settings.init.bundle is None
    text = describe(settings, Options(0, tmp_path), Places(tmp_path), tmp_path / "run")
    assert "parameters      105,918,322" in text and "about 5." in text
