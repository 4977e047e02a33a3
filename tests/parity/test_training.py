"""Live: folders that the installed nnU-Net preprocessed are trained on, and runs go back to it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from planar import planar_smoke
from tiny import make_raw

torch = pytest.importorskip("torch")
import jax

from panther_jax import predict, train
from panther_jax.config.schema import LossConfig
from panther_jax.images.imageio import read_label
from panther_jax.network import unet
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.labels import Labels
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import open_store, read_stored
from panther_jax.training import losses, targets
from panther_jax.training.records import read_metrics
from panther_jax.weights.checkpoint import Checkpoints
from weight_conversion import export_nnunet, mapping, torch_files

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAME = "Dataset902_Tiny"
SHAPE, SPACING = (12, 24, 24), (7.0, 6.0, 6.0)
SIZES = {"3d_fullres": (8, 16, 16), "2d": (16, 16)}
# In a process of its own: it warns a lot, and starts processes.
REFERENCE = """
import sys
if __name__ == "__main__":
    if sys.argv[1] == "preprocess":
        from nnunetv2.experiment_planning.plan_and_preprocess_api import (
            extract_fingerprints, plan_experiments, preprocess
        )
        extract_fingerprints([902], num_processes=1)
        plan_experiments([902])
        preprocess([902], "nnUNetPlans", ("2d", "3d_fullres"), (1, 1), verbose=False)
    else:
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        predictor = nnUNetPredictor(
            device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(sys.argv[2], (0,))
        predictor.predict_from_files_sequential(sys.argv[3], sys.argv[4])
"""


def run_reference(root, *arguments):
    script = root / "reference.py"
    script.write_text(REFERENCE)
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    folders = {name: str(root / name) for name in names}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **folders, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """nnU-Net's folders; the networks of its plans are then made small."""
    pytest.importorskip("nnunetv2")
    pytest.importorskip("blosc2")
    root = tmp_path_factory.mktemp("nnunet")
    make_raw(root / "nnUNet_raw" / NAME, shape=SHAPE, spacing=SPACING)
    run_reference(root, "preprocess")
    path = root / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    for name, patch in SIZES.items():
        entry = plans["configurations"][name]
        axes = len(patch)
        entry |= {"patch_size": list(patch), "batch_size": 2}
        entry["architecture"]["arch_kwargs"] |= {
            "n_stages": 3,
            "features_per_stage": [4, 6, 8],
            "kernel_sizes": [[3] * axes] * 3,
            "strides": [[1] * axes, [2] * axes, [2] * axes],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
        }
    path.write_text(json.dumps(plans))
    return root


def as_older_release(root, kind, out, configuration="3d_fullres"):
    """The folder as older releases left it: ``.npz`` archives, or those unpacked to ``.npy``."""
    dataset = out / NAME
    shutil.copytree(root / "nnUNet_preprocessed" / NAME, dataset)
    folder = dataset / f"nnUNetPlans_{configuration}"
    if kind == "b2nd":
        return folder
    import blosc2

    for path in sorted(folder.glob("*_seg.b2nd")):
        case = path.name.removesuffix("_seg.b2nd")
        image = np.asarray(blosc2.open(str(folder / f"{case}.b2nd"), mode="r")[:])
        label = np.asarray(blosc2.open(str(path), mode="r")[:])
        np.savez_compressed(folder / f"{case}.npz", data=image, seg=label)
        if kind == "npy":
            np.save(folder / f"{case}.npy", image)
            np.save(folder / f"{case}_seg.npy", label)
        path.unlink()
        (folder / f"{case}.b2nd").unlink()
    return folder


SHORT = [
    "--loop.epochs", "1", "--loop.steps-per-epoch", "2", "--augment.policy", "none",
    "--validation.checkpoints", "final", "--validation.mirror",
    "--loop.no-compilation-cache",
    "--loop.compute-dtype", "float32",
]  # fmt: skip


def trained(out, *arguments):
    """A short run of the smoke config, as a user types it: its folder."""
    command = ["--config", "smoke", "--root", out / "root", "--workdir", out / "run", "--quiet"]
    assert train.main([str(a) for a in (*command, *arguments, *SHORT)]) == 0
    return out / "run"


def weights(run):
    return jax.tree.leaves(Checkpoints(run / "fold_0" / "checkpoints").read("final")[0])


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("b2nd")
    return trained(out, "--store", as_older_release(reference, "b2nd", out))


def test_the_plans_of_a_preprocessed_folder_decide(run, reference):
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["patch_size"] == [8, 16, 16] and config["arch"]["features"] == [4, 6, 8]
    assert config["arch"]["network"] == "PlainConvUNet"
    assert config["data"]["dataset"] == NAME
    assert len(read_metrics(run / "fold_0" / "metrics.jsonl")) == 1
    summary = json.loads((run / "fold_0" / "validation_final" / "summary.json").read_text())
    (case,) = summary["metric_per_case"]
    assert "gt_segmentations" in case["reference_file"]


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize("resident", ["host", "stream"])
def test_every_kind_of_file_trains_the_same_network(run, reference, tmp_path, kind, resident):
    folder = as_older_release(reference, kind, tmp_path)
    other = trained(tmp_path, "--store", folder, "--data.resident", resident)
    for a, b in zip(weights(run), weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_are_read_as_patches_need_them(run, reference, tmp_path):
    folder = as_older_release(reference, "b2nd", tmp_path)
    other = trained(tmp_path, "--store", folder, "--data.resident", "stream")
    for a, b in zip(weights(run), weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_plans_train_on_raw_data_and_the_run_goes_back(reference, tmp_path, configuration):
    """As nnU-Net preprocesses; what its predictor makes of the exported run, ours makes too."""
    plans = reference / "nnUNet_preprocessed" / NAME / "nnUNetPlans.json"
    raw = reference / "nnUNet_raw" / NAME
    made = trained(tmp_path, "--from-plans", f"{plans}:{configuration}", "--raw", raw)
    config = json.loads((made / "config.json").read_text())
    assert tuple(config["data"]["patch_size"]) == SIZES[configuration]
    assert config["data"]["batch_size"] == 2 and config["loss"]["batch_dice"] == (
        configuration == "2d"
    )
    ours = open_store(tmp_path / "root" / "store" / NAME / f"nnUNetPlans_{configuration}")
    theirs = open_store(plans.parent / f"nnUNetPlans_{configuration}")
    for case in theirs.case_ids:
        a, b = read_stored(ours, case), read_stored(theirs, case)
        np.testing.assert_allclose(a.image, np.asarray(b.image), atol=1e-4)
        assert (a.label == np.asarray(b.label)).mean() > 0.999

    exported = tmp_path / "exported"
    assert export_nnunet.main(["--model", str(made), "--out", str(exported)]) == 0
    source = tmp_path / "in"
    source.mkdir()
    for case in fold_cases(ours, 0)[1]:
        shutil.copy(raw / "imagesTr" / f"{case}_0000.mha", source)
    (tmp_path / "theirs").mkdir()
    run_reference(reference, "predict", exported, source, tmp_path / "theirs")
    arguments = ["--model", made, "--input", source, "--output", tmp_path / "ours", "--quiet"]
    options = ["--mirror", "--accumulate", "reference"]
    assert predict.main([str(a) for a in (*arguments, *options)]) == 0
    predicted = sorted((tmp_path / "theirs").glob("*.mha"))
    assert predicted
    for path in predicted:
        expected, _ = read_label(path)
        assert len(np.unique(expected)) > 1, "an empty prediction shows nothing"
        np.testing.assert_array_equal(read_label(tmp_path / "ours" / path.name)[0], expected)


def test_a_planar_step_has_the_references_loss_and_gradient():
    """A 2-D network that nnU-Net's builder makes: same weights, same slices, same gradient."""
    pytest.importorskip("nnunetv2")
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    config = planar_smoke()
    arch = ArchSpec(
        "ResidualEncoderUNet",
        in_channels=1,
        num_outputs=3,
        features=config.arch.features,
        kernel_sizes=config.arch.kernel_sizes,
        strides=config.arch.strides,
        blocks=config.arch.blocks,
        decoder_convs=config.arch.decoder_convs,
    )
    block = arch.to_nnunet()
    network = get_network_from_plans(
        block["network_class_name"],
        block["arch_kwargs"],
        block["_kw_requires_import"],
        1,
        3,
        deep_supervision=True,
    )
    params = unet.init_params(arch, jax.random.key(3))
    tensors = mapping.to_state(params, arch)
    network.load_state_dict(torch_files.make_state_dict(tensors, mapping.names_of(arch).keys))
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 16, 16, 1)).astype(np.float32)
    label = rng.integers(0, 3, (2, 16, 16, 1)).astype(np.int32)

    logits = network(torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
    weighting = losses.deep_supervision_weights(len(logits))
    theirs = sum(
        weight
        * torch.nn.functional.cross_entropy(
            out, torch.from_numpy(label[:, :: 2**i, :: 2**i, 0].astype(np.int64))
        )
        for i, (out, weight) in enumerate(zip(logits, weighting, strict=True))
    )
    theirs.backward()
    labels = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
    loss_fn = losses.deep_supervised(
        losses.make_loss(LossConfig(kind="ce"), labels, batch_dice=True), weighting
    )
    net = unet.build(arch, unet.Execution("xla", exact_stats=True))
    whole = jax.numpy.asarray(label)
    small = [jax.numpy.asarray(label[:, :: 2**i, :: 2**i]) for i in range(len(logits))]
    assert [s.shape for s in small] == [
        t.shape for t in targets.deep_supervision_targets(whole, arch.output_strides)
    ]

    def objective(params):
        return loss_fn(unet.apply(net, params, jax.numpy.asarray(image)), tuple(small))

    ours, grads = jax.value_and_grad(objective)(params)
    assert float(ours) == pytest.approx(float(theirs.detach()), abs=1e-5)
    found = mapping.to_state(grads, arch)
    compared = 0
    for name, parameter in network.named_parameters():
        canonical = mapping.canonical_name(name)
        if parameter.grad is not None and canonical in found:
            np.testing.assert_allclose(
                found[canonical], parameter.grad.numpy(), atol=2e-5, err_msg=name
            )
            compared += 1
    assert compared > 20
