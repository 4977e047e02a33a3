import importlib.util
import json

import numpy as np
import pytest
import weight_files as made
from weight_files import write_bundle

from panther_jax.base.errors import CheckpointError
from panther_jax.base.folds import FoldsError
from panther_jax.ensembles.specification import EnsembleError, EnsembleSpec, MemberSpec
from panther_jax.inference import members
from panther_jax.network.unet import walk
from panther_jax.weights import models
from panther_jax.weights.models import ModelError, load_model


def equal_trees(a, b):
    flat = [{"/".join(p): np.asarray(x) for p, x in walk(tree)} for tree in (a, b)]
    return flat[0].keys() == flat[1].keys() and all(
        np.array_equal(flat[0][k], flat[1][k]) for k in flat[0]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a_run"
    params, _ = made.write_run(folder, made.RESIDUAL)
    return folder, params


def test_a_run(run):
    folder, params = run
    model = load_model(folder)
    assert (model.name, model.folds, model.mirror_axes) == ("a_run", ("0",), (0, 1, 2))
    assert model.plans.patch_size == (16, 16, 16) and model.num_channels == 1
    assert equal_trees(model.params[0], params)
    best = load_model(folder, checkpoint="best", folds=("0",), name="other")
    assert best.name == "other" and not equal_trees(best.params[0], params)


def test_a_run_without_the_fold_or_checkpoint(run, tmp_path, caplog):
    with pytest.raises(FoldsError, match="no final checkpoint of fold 3; there are: 0"):
        load_model(run[0], folds=("3",))
    made.write_run(tmp_path / "short", made.RESIDUAL, kinds={"best": 1})
    with caplog.at_level("WARNING", "panther_jax"):
        model = load_model(tmp_path / "short")
    assert model.folds == ("0",) and "the best one is taken" in caplog.text
    assert load_model(tmp_path / "short", checkpoint="best").folds == ("0",)
    made.write_run(tmp_path / "begun", made.RESIDUAL, kinds={"latest": 1})
    with pytest.raises(FoldsError, match="no final checkpoint of fold; there are: none"):
        load_model(tmp_path / "begun")


def test_a_run_whose_plans_were_changed(tmp_path):
    made.write_run(tmp_path / "run", made.RESIDUAL)
    plans = made.make_plans(made.PLAIN).to_nnunet()
    (tmp_path / "run" / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(
        ModelError,
        match="(?s)another architecture.*conv1/conv/kernel: .1, 3, 3, 4, 4., expected none",
    ):
        load_model(tmp_path / "run")


def test_a_bundle(tmp_path):
    model = load_model(write_bundle(tmp_path / "b"))
    assert (model.name, model.folds, model.mirror_axes) == ("b", ("0", "1"), (0, 2))
    assert equal_trees(model.params[1], made.random_params(made.RESIDUAL, 1))
    assert load_model(tmp_path / "b", folds=("1",)).folds == ("1",)
    with pytest.raises(FoldsError, match="no fold 7; there are: 0, 1"):
        load_model(tmp_path / "b", folds=("7",))
    assert load_model(write_bundle(tmp_path / "single", folds=("",))).folds == ("",)
    with pytest.raises(ModelError, match="configuration '3d_fullres', not '2d'"):
        load_model(tmp_path / "b", configuration="2d")


def test_a_damaged_bundle(tmp_path):
    folder = write_bundle(tmp_path / "b")
    weights = folder / "fold_1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="fold_1.safetensors is damaged"):
        load_model(folder)


def test_what_is_no_model(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match="is no model"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="--folds 0"):
        load_model(run[0] / "fold_0")


@pytest.mark.torch
def test_an_nnunet_model_folder(tmp_path):
    pytest.importorskip("torch")
    folder = made.write_model_folder(tmp_path / "m", made.RESIDUAL, folds=("0", "1", "all"))
    model = load_model(folder)
    assert (model.folds, model.mirror_axes) == (("0", "1"), (0, 1, 2))
    assert equal_trees(model.params[1], made.random_params(made.RESIDUAL, 1))
    assert load_model(folder, folds=("all",)).folds == ("0", "1")
    assert load_model(folder, folds=("fold_all",)).folds == ("all",)
    with pytest.raises(FoldsError, match="no checkpoint_final.pth of fold 4"):
        load_model(folder, folds=("4",))
    (folder / "plans.json").write_text(json.dumps(made.make_plans(made.PLAIN).to_nnunet()))
    with pytest.raises(ValueError, match="checkpoint_final.pth"):
        load_model(folder)


def test_an_nnunet_model_folder_without_torch(tmp_path, monkeypatch):
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").write_bytes(b"")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda n: None if n == "torch" else find(n)
    )
    with pytest.raises(ModuleNotFoundError, match="pip install.*import_nnunet"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------ ensembles


def test_one_model_is_no_combination(tmp_path):
    folder = write_bundle(tmp_path / "b")
    ensemble = members.load_models([folder], mirror=True, step_size=0.7)
    (member,) = ensemble.members
    assert ensemble.combination is None and ensemble.labels == member.model.labels
    assert (member.mirror_axes, member.step_size) == ((0, 2), 0.7)
    assert members.load_models([folder]).members[0].mirror_axes == ()
    twice = members.load_models([folder, folder])
    assert [m.model.name for m in twice.members] == ["b (1)", "b (2)"]
    assert twice.combination is not None


def test_members_that_do_not_go_together(tmp_path):
    first = write_bundle(tmp_path / "first")
    two_channels = made.dataclasses.replace(made.RESIDUAL, in_channels=2)
    dataset = {**made.DATASET, "channel_names": {"0": "CT", "1": "PET"}}
    other = write_bundle(tmp_path / "other", two_channels, dataset=dataset)
    with pytest.raises(ModelError, match="takes 1 channel.*'other' 2"):
        members.load_models([first, other])
    flat = write_bundle(tmp_path / "larger", patch=32)
    spec = EnsembleSpec((MemberSpec("a", first), MemberSpec("b", flat)), combine="logits")
    with pytest.raises(EnsembleError, match="(?s)'a' and 'b' differ in patch_size.*probabilities"):
        members.load_ensemble(spec)
    with pytest.raises(EnsembleError, match="no axis"):
        members.load_ensemble(
            EnsembleSpec((MemberSpec("f", write_flat(tmp_path), mirror_axes=(2,)),))
        )
    with pytest.raises(EnsembleError, match="model 'gone' cannot be used: .*does not exist"):
        members.load_ensemble(EnsembleSpec((MemberSpec("gone", tmp_path / "gone"),)))


def write_flat(tmp_path):
    return write_bundle(tmp_path / "flat", made.FLAT, configuration="2d")
