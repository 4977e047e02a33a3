"""Exporting: the real nnU-Net loads, predicts with, starts from and continues what we write."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import weight_files as made

torch = pytest.importorskip("torch")
from panther_jax.base.errors import CheckpointError
from panther_jax.network import unet
from weight_conversion import export_nnunet, import_nnunet, mapping, torch_files, verify

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # nnU-Net's own warnings
ENTRIES = {
    "network_weights",
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
}


@pytest.fixture(scope="module")
def nnunet():
    return pytest.importorskip("nnunetv2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of SGD and its export: (folder, exported, parameters, optimiser state)."""
    root = tmp_path_factory.mktemp("run")
    params, opt_state = made.write_run(root / "run", made.RESIDUAL)
    export_nnunet.export(root / "run", root / "out")
    return root / "run", root / "out", params, opt_state


def predictor_of(folder, folds, checkpoint="checkpoint_final.pth"):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    return predictor


def predicted(predictor, image, spacing):
    result = predictor.predict_single_npy_array(
        image, {"spacing": spacing}, None, None, save_or_return_probabilities=True
    )
    return result


# ---------------------------------------------------------------------------- prediction, by them


@pytest.mark.golden
def test_the_reference_predicts_the_same_with_our_export(golden, tmp_path, nnunet):
    tested = 0
    folders = {p.parent.parent for p in golden.glob("*/**/fold_*/checkpoint_final.pth")}
    for number, folder in enumerate(sorted(folders)):
        bundle, exported = tmp_path / f"{number}b", tmp_path / f"{number}x"
        import_nnunet.read_model_folder(folder).save(bundle)
        arguments = ["--model", str(bundle), "--out", str(exported)]
        assert export_nnunet.main(arguments) == 0
        plans = import_nnunet.read_model_folder(folder).bundle().plans
        edge = [3 if len(plans.patch_size) == 2 else plans.patch_size[0], *plans.patch_size[-2:]]
        edge[-1] += 3  # two tiles
        shape = (plans.arch.in_channels, *edge)
        image = np.random.default_rng(number).standard_normal(shape, np.float32)
        spacing = [1.0] * (3 - len(plans.spacing)) + list(plans.spacing)
        results = [predicted(predictor_of(f, None), image, spacing) for f in (folder, exported)]
        for theirs, ours in zip(*results, strict=True):
            np.testing.assert_array_equal(theirs, ours)
        assert len(np.unique(results[0][0])) > 1, "an empty prediction shows nothing"
        tested += 1
    assert tested


def test_the_reference_predicts_with_an_exported_run(run, nnunet):
    folder, exported, params, _ = run
    predictor = predictor_of(exported, (0,))
    assert predictor.allowed_mirroring_axes == (0, 1, 2)
    image = np.random.default_rng(0).standard_normal((1, 1, 16, 16, 16), np.float32)
    predictor.network.eval()
    with torch.no_grad():
        theirs = predictor.network(torch.from_numpy(image)).numpy()
    ours = verify.port_logits(made.RESIDUAL, params, image)[0]
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)  # as the reference cases
    labels = predicted(predictor, image[0], [1.0, 1.0, 1.0])[0]
    assert labels.shape == (16, 16, 16)


# -------------------------------------------------------------------------------- what is written


def test_all_entries_and_names_are_written(run):
    folder, exported, params, _ = run
    files = sorted(str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file())
    assert files == [
        "dataset.json",
        "fold_0/checkpoint_best.pth",
        "fold_0/checkpoint_final.pth",
        "plans.json",
    ]
    # No NumPy scalars: torch's safe loader needs no additions.
    content = torch.load(exported / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert set(content) == ENTRIES
    keys = mapping.names_of(made.RESIDUAL).keys
    assert list(content["network_weights"]) == [key for key, _ in keys]
    assert content["current_epoch"] == 3 and content["trainer_name"] == "nnUNetTrainer"
    assert content["init_args"]["fold"] == 0
    assert content["init_args"]["configuration"] == "3d_fullres"
    assert content["inference_allowed_mirroring_axes"] == (0, 1, 2)
    logging = content["logging"]
    assert {len(values) for values in logging.values()} == {3} and len(logging) == 8
    assert logging["ema_fg_dice"] == pytest.approx([0.1, 0.2, 0.3])
    assert math.isnan(logging["dice_per_class_or_region"][0][1])
    assert logging["epoch_end_timestamps"] == [2.0, 4.0, 6.0]


def test_the_best_checkpoint_is_of_its_own_epoch(run):
    _, exported, params, _ = run
    best = torch_files.read_checkpoint(exported / "fold_0" / "checkpoint_best.pth")
    final = torch_files.read_checkpoint(exported / "fold_0" / "checkpoint_final.pth")
    assert best.entries["current_epoch"] == 1 and final.entries["current_epoch"] == 3
    assert {len(v) for v in best.entries["logging"].values()} == {1}
    name = "encoder.stem.convs.0.conv.weight"
    stem = np.asarray(params["encoder"]["stem"]["conv"]["kernel"])
    np.testing.assert_array_equal(final.weights[name], np.moveaxis(stem, (-1, -2), (0, 1)))
    assert not np.array_equal(best.weights[name], final.weights[name])


def test_an_unfinished_run_is_exported_as_latest(tmp_path):
    made.write_run(tmp_path / "run", made.FLAT, steps=2, kinds={"latest": 2}, policy="no_mirroring")
    written = export_nnunet.export(tmp_path / "run", tmp_path / "out", trainer="nnUNetTrainer1e3")
    assert [p.name for p in written] == ["checkpoint_latest.pth"]
    content = torch.load(written[0], weights_only=True)
    assert content["inference_allowed_mirroring_axes"] is None
    assert content["trainer_name"] == "nnUNetTrainer1e3"
    recorded = {"inference_allowed_mirroring_axes": [0]}  # what the run says itself comes first
    (tmp_path / "run" / "fold_0" / "run.json").write_text(json.dumps(recorded))
    assert export_nnunet.open_model(tmp_path / "run").mirror_axes == (0,)


def test_what_cannot_be_exported_is_said(tmp_path, capsys):
    def fails(*arguments):
        assert export_nnunet.main([*map(str, arguments)]) == 1
        return capsys.readouterr().err

    out = tmp_path / "out"
    made.write_run(tmp_path / "run", made.FLAT, steps=1)
    assert "does not exist" in fails("--model", tmp_path / "no", "--out", out)
    assert "is one fold of a run" in fails("--model", tmp_path / "run/fold_0", "--out", out)
    assert "there are: 0" in fails("--model", tmp_path / "run", "--out", out, "--folds", 4)
    assert "neither a run" in fails("--model", tmp_path, "--out", out)
    bad = ("--model", tmp_path / "run", "--out", out, "--trainer", "os.system")
    assert "not the name of a class" in fails(*bad)
    (tmp_path / "empty" / "fold_0" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "plans.json", "dataset.json"):
        (tmp_path / "empty" / name).write_text((tmp_path / "run" / name).read_text())
    assert "holds no checkpoint" in fails("--model", tmp_path / "empty", "--out", out)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))
    out.mkdir()
    assert "--overwrite" in fails("--model", tmp_path / "run", "--out", out)


def test_an_incomplete_bundle_is_not_exported(tmp_path):
    folder = made.write_model_folder(tmp_path / "m", made.RESIDUAL)
    import_nnunet.read_model_folder(folder, stem="reinit").save(tmp_path / "b")
    with pytest.raises(CheckpointError, match="the bundle has no stem"):
        export_nnunet.export(tmp_path / "b", tmp_path / "x")


# ------------------------------------------------------------------------------ training, by them


LOAD = """
import json, sys
from pathlib import Path
import numpy as np, torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plans = json.loads((folder / "plans.json").read_text())
    plans["continue_training"] = True  # their command puts this in (spec 07 §7.3)
    dataset = json.loads((folder / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.load_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    found = {}
    for name, parameter in trainer.network.named_parameters():
        found["weight " + name] = parameter.detach().numpy()
        found["momentum " + name] = trainer.optimizer.state[parameter]["momentum_buffer"].numpy()
    group = trainer.optimizer.param_groups[0]
    settings = {k: group[k] for k in ("momentum", "nesterov", "initial_lr", "weight_decay")}
    np.savez(sys.argv[2], **found)
    print("\\n" + json.dumps({"epoch": trainer.current_epoch, **settings}))
"""


def call(*arguments, **environment):
    done = subprocess.run(
        [*map(str, arguments)],
        env={**os.environ, "nnUNet_compile": "f", **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_their_trainer_takes_over_weights_momentum_and_epoch(run, tmp_path, nnunet):
    _, exported, params, opt_state = run
    script, arrays = tmp_path / "load.py", tmp_path / "found.npz"
    script.write_text(LOAD)
    folders = {f"nnUNet_{n}": tmp_path / n for n in ("raw", "preprocessed", "results")}
    data = tmp_path / "preprocessed" / "Dataset777_Tiny" / "TinyPlans_3d_fullres"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()  # the trainer looks at the kind of files there, at no content
    printed = call(sys.executable, script, exported, arrays, **folders)
    settings = json.loads(printed.splitlines()[-1])
    assert settings == {
        "epoch": 3, "momentum": 0.99, "nesterov": True, "initial_lr": 0.02, "weight_decay": 3e-5,
    }  # fmt: skip
    trace = next(part.trace for part in opt_state if hasattr(part, "trace"))
    weights = mapping.to_state(params, made.RESIDUAL)
    buffers = mapping.to_state(trace, made.RESIDUAL)
    found = np.load(arrays)
    names = {mapping.canonical_name(n.split()[1]): n.split()[1] for n in found.files}
    assert names.keys() == weights.keys()
    for name, theirs in names.items():
        np.testing.assert_array_equal(found[f"weight {theirs}"], weights[name])
        np.testing.assert_array_equal(found[f"momentum {theirs}"], buffers[name])
        assert np.abs(buffers[name]).max() > 0


def test_other_optimisers_leave_their_state_out_and_say_so(tmp_path, capsys):
    made.write_run(tmp_path / "run", made.FLAT, optimizer="adamw", steps=1)
    assert export_nnunet.main(["--model", str(tmp_path / "run"), "--out", str(tmp_path / "x")]) == 0
    assert "adamw" in capsys.readouterr().err
    path = tmp_path / "x" / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    assert content["optimizer_state"]["state"] == {}
    assert content["optimizer_state"]["param_groups"][0]["momentum"] == 0.99


TRAIN = """
import sys, torch
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

original = nnUNetTrainer.__init__

def short(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
    original(self, plans, configuration, fold, dataset_json, device)
    self.num_epochs = int(sys.argv[3])
    self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1

nnUNetTrainer.__init__ = short
if __name__ == "__main__":
    continues = sys.argv[2] == "--c"
    start = {"continue_training": True} if continues else {"pretrained_weights": sys.argv[2]}
    run_training("777", "3d_fullres", int(sys.argv[1]), "nnUNetTrainer", "TinyPlans",
                 device=torch.device("cpu"), **start)
"""


@pytest.mark.slow
def test_their_training_command_continues_and_starts_from_our_export(run, tmp_path, nnunet):
    import SimpleITK as sitk

    folder, *_ = run
    raw, ready = (tmp_path / n / "Dataset777_Tiny" for n in ("raw", "preprocessed"))
    for path in (raw / "imagesTr", raw / "labelsTr", ready):
        path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(5):
        labels = np.zeros((20, 20, 20), np.uint8)
        labels[5:12, 5:12, 5:12], labels[12:16, 5:12, 5:12] = 1, 2
        image = sitk.GetImageFromArray(rng.standard_normal(labels.shape, np.float32))
        sitk.WriteImage(image, raw / "imagesTr" / f"c{i}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(labels), raw / "labelsTr" / f"c{i}.nii.gz")
    for path in (raw, ready):
        (path / "dataset.json").write_text(json.dumps({**made.DATASET, "numTraining": 5}))
    (ready / "TinyPlans.json").write_text((folder / "plans.json").read_text())
    (ready / "dataset_fingerprint.json").write_text("{}")
    results = tmp_path / "results" / "Dataset777_Tiny" / "nnUNetTrainer__TinyPlans__3d_fullres"
    export_nnunet.export(folder, results)
    environment = {
        "nnUNet_raw": raw.parent,
        "nnUNet_preprocessed": ready.parent,
        "nnUNet_results": results.parent.parent,
        "nnUNet_n_proc_DA": 0,
        "nnUNet_def_n_proc": 1,
    }
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    bin_folder = os.path.dirname(sys.executable)
    preprocess = os.path.join(bin_folder, "nnUNetv2_preprocess")
    what = ("-d", 777, "-plans_name", "TinyPlans", "-c", "3d_fullres", "-np", 1)
    call(preprocess, *what, **environment)
    continued = call(sys.executable, script, 0, "--c", 4, **environment)
    assert "Epoch 3" in continued and "Epoch 0" not in continued and "Training done" in continued
    after = torch_files.read_checkpoint(results / "fold_0" / "checkpoint_final.pth")
    assert after.entries["current_epoch"] == 4
    assert len(after.entries["logging"]["train_losses"]) == 4
    best = results / "fold_0" / "checkpoint_best.pth"
    started = call(sys.executable, script, 1, best, 1, **environment)
    assert "Epoch 0" in started and "Training done" in started
    # What nnU-Net has trained comes back in.
    bundle = import_nnunet.read_model_folder(results, folds=["0", "1"]).bundle()
    assert set(bundle.params) == {"0", "1"} and bundle.plans.arch == made.RESIDUAL


# -------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("name", ["residual", "plain", "flat", "dropout"])
def test_verify_finds_that_the_networks_agree(tmp_path, name, nnunet):
    folder = made.write_model_folder(tmp_path / "m", made.NETWORKS[name])
    differences = verify.compare(folder)
    assert len(differences) == made.NETWORKS[name].num_stages - 1
    assert all(d.largest < 2e-4 and d.magnitude > 0.1 for d in differences)
    # The state dict that we write has exactly the names, in order, that their network has.
    weights = torch_files.read_checkpoint(folder / "fold_0" / "checkpoint_final.pth").weights
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    block = made.NETWORKS[name].to_nnunet()
    network = get_network_from_plans(
        block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"], 1, 3
    )
    assert list(network.state_dict()) == list(weights)


def test_verify_finds_a_difference(tmp_path, capsys, nnunet):
    folder = made.write_model_folder(tmp_path / "m", made.RESIDUAL)
    imported = import_nnunet.read_model_folder(folder)
    imported.save(tmp_path / "same")
    both = ["--model-folder", str(folder), "--bundle"]
    assert verify.main([*both, str(tmp_path / "same")]) == 0
    assert "the networks agree" in capsys.readouterr().out
    tree = jax.tree.map(np.array, imported.params["0"])
    kernel = tree["decoder"]["transpconvs"]["0"]["kernel"]
    tree["decoder"]["transpconvs"]["0"]["kernel"] = kernel[::-1].copy()  # the flip of spec 01 §2.4
    imported.params["0"] = tree
    imported.save(tmp_path / "flipped")
    assert verify.main([*both, str(tmp_path / "flipped")]) == 1
    assert "the networks disagree" in capsys.readouterr().err
    assert dict(unet.walk(tree))
