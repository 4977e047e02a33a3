"""Checkpoints are complete or invisible, damaged ones passed over; weights start by the rules."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panther_jax.base.errors import CheckpointError
from panther_jax.network import unet
from panther_jax.plans.architecture import ArchSpec
from panther_jax.weights import transfer
from panther_jax.weights.bundle import load_bundle, save_bundle
from panther_jax.weights.checkpoint import Checkpoints, Counters, TrainState

ARCH = ArchSpec(
    "ResidualEncoderUNet",
    in_channels=1,
    num_outputs=3,
    features=(4, 6),
    kernel_sizes=((3, 3, 3),) * 2,
    strides=((1, 1, 1), (2, 2, 2)),
    blocks=(1, 1),
    decoder_convs=(1,),
)


def make_state(step=0, seed=0):
    params = unet.init_params(ARCH, jax.random.key(seed))
    optimizer = optax.adamw(1e-3)
    return TrainState(jnp.int32(step), params, optimizer.init(params))


def assert_equal(a, b):
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves[0]) == len(leaves[1])
    for x, y in zip(*leaves, strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_state_and_counters_come_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore("latest", make_state()) is None
    counters = Counters(7, 0.1 + 0.2, 0.3, 5, (1 / 3, 2 / 3))
    checkpoints.save("latest", make_state(7, seed=1), counters)
    state, found = checkpoints.restore("latest", make_state())
    assert_equal(state, make_state(7, seed=1))
    assert found == counters
    assert jax.tree.structure(state) == jax.tree.structure(make_state())


def test_the_latest_two_and_one_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        for kind in ("latest", "best"):
            checkpoints.save(kind, make_state(step), Counters(step))
    assert checkpoints.steps("latest") == (2, 3)
    assert checkpoints.steps("best") == (3,)
    checkpoints.drop_after(2)
    assert checkpoints.steps("best") == () and checkpoints.steps("latest") == (2, 3)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save("latest", make_state(step, seed=step), Counters(step))
    for path in (tmp_path / "latest" / "2" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    state, counters = checkpoints.restore("latest", make_state())
    assert counters.step == 1
    assert_equal(state, make_state(1, seed=1))
    shutil.rmtree(tmp_path / "latest" / "1" / "params")
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints .*can be read\n.*--restart"
    ):
        checkpoints.restore("latest", make_state())


def test_an_unfinished_save_is_invisible(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("latest", make_state(1), Counters(1))
    shutil.copytree(tmp_path / "latest" / "1", tmp_path / "latest" / "2.orbax-checkpoint-tmp-123")
    assert checkpoints.steps("latest") == (1,)


def test_a_full_disk_is_named_and_spares_what_is_there(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("latest", make_state(1), Counters(1))

    def full(*_args, **_kwargs):
        (tmp_path / "latest" / "2.orbax-checkpoint-tmp-1").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match=r"step 2 .*the disk is full .*MiB free"):
            checkpoints.save("latest", make_state(2), Counters(2))
    assert [p.name for p in (tmp_path / "latest").iterdir()] == ["1"]
    assert checkpoints.restore("latest", make_state())[1].step == 1


def write_bundle(folder, seed=1):
    params = unet.init_params(ARCH, jax.random.key(seed))
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumor": 1, "pancreas": 2},
    }
    resampling = {"name": "resample_torch_fornnunet", "kwargs": {}}
    entry = {
        "batch_size": 2,
        "patch_size": [8, 8, 8],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": ARCH.to_nnunet(),
        **{f"resampling_fn_{k}": resampling["name"] for k in ("data", "seg", "probabilities")},
    }
    plans = {
        "dataset_name": "Dataset001_Toy",
        "plans_name": "toy",
        "transpose_forward": [0, 1, 2],
        "configurations": {"3d_fullres": entry},
    }
    save_bundle(
        folder, params={"": params}, plans=plans, dataset=dataset, provenance={"source": "test"}
    )
    return params


def test_bundles_come_back_bit_for_bit_and_notice_damage(tmp_path):
    params = write_bundle(tmp_path / "toy")
    bundle = load_bundle(tmp_path / "toy")
    assert_equal(bundle.params[""], params)
    assert bundle.plans.arch == ARCH and bundle.labels.num_outputs == 3
    assert bundle.provenance["source"] == "test"
    with pytest.raises(CheckpointError, match="exists"):
        write_bundle(tmp_path / "toy")
    weights = tmp_path / "toy" / "params.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged: its SHA-256"):
        load_bundle(tmp_path / "toy")
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_bundle(tmp_path / "toy")
    (tmp_path / "toy" / "plans.json").unlink()
    with pytest.raises(CheckpointError, match="not a bundle: it holds no plans.json"):
        load_bundle(tmp_path / "toy")


@pytest.mark.parametrize(("stem", "fresh_tensors"), [("reinit", 4 + 2), ("copy", 2)])
def test_heads_start_fresh_always_and_the_stem_by_choice(stem, fresh_tensors):
    source = unet.init_params(ARCH, jax.random.key(1))
    fresh = unet.init_params(ARCH, jax.random.key(2))
    result = transfer.transfer(source, fresh, stem=stem)
    assert len(result.skipped) == fresh_tensors
    assert len(result.loaded) + fresh_tensors == len(jax.tree.leaves(fresh))
    origin = {"/".join(p): leaf for p, leaf in unet.walk(source)}
    target = {"/".join(p): leaf for p, leaf in unet.walk(fresh)}
    for path, leaf in unet.walk(result.params):
        name = "/".join(path)
        expected = target if name in result.skipped else origin
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_weights_that_do_not_fit_are_tabulated_and_nothing_is_taken():
    source = json.loads(json.dumps(jax.tree.map(lambda a: list(a.shape), unet.param_shapes(ARCH))))
    source = jax.tree.map(
        lambda s: np.zeros(s, np.float32), source, is_leaf=lambda s: isinstance(s, list)
    )
    kernel = source["decoder"]["transpconvs"]["0"]
    kernel["kernel"] = np.zeros((1, 2, 2, 6, 4), np.float32)
    del source["encoder"]["stages"]["1"]["blocks"]["0"]["conv1"]["norm"]["scale"]
    fresh = unet.init_params(ARCH, jax.random.key(0))
    with pytest.raises(CheckpointError) as error:
        transfer.transfer(source, fresh, stem="copy")
    text = str(error.value)
    assert "1 missing, 1 of another shape" in text
    assert "decoder/transpconvs/0/kernel: (1, 2, 2, 6, 4) -> (2, 2, 2, 6, 4)" in text
    assert "missing: encoder/stages/1/blocks/0/conv1/norm/scale" in text
