"""Downloaded weights are used by their name: to predict with, and to start from."""

import json

import jax.numpy as jnp
import numpy as np
import published_layout as layout
import pytest
import weight_files as made
from record_server import Zenodo, serve

from panther_jax import predict, predict_challenge
from panther_jax.base.errors import CheckpointError
from panther_jax.config.places import Places
from panther_jax.images import imageio, phantom_dataset
from panther_jax.network.unet import walk
from panther_jax.training import starting
from panther_jax.weights import __main__ as command
from panther_jax.weights.checkpoint import TrainState
from panther_jax.weights.models import load_model
from panther_jax.weights.names import named_start
from panther_jax.weights.public import KNOWN
from panther_jax.weights.show import find_models
from panther_jax.weights.start import load_start

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with the winner's weights, downloaded from a stand-in of their record."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("data")
    files = {f"{name}.zip": layout.winners_archive(name, top="") for name in layout.MODELS}
    with pytest.MonkeyPatch.context() as patch, serve(Zenodo(files)) as zenodo:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("PANTHER_JAX_ZENODO_API", zenodo.address)
        assert command.main(["get", "winner-t1", "--root", str(root), "--quiet"]) == 0
    return root


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw") / "Dataset901_Phantom"
    phantom_dataset.make_phantom(raw, modality="t1", num_cases=1)
    (path,) = (raw / "imagesTr").iterdir()
    return path


def path_of(root, name):
    return root / "weights" / "winner-t1" / name / layout.model_folder(name)


def test_predict_by_name(root, scan, tmp_path):
    shared = ["--input", str(scan), "--folds", "0", "5"]
    named = [*shared, "--output", str(tmp_path / "a.mha"), "--root", str(root)]
    assert predict.main(["--model", "winner-t1", *named]) == 0
    pathed = [*shared, "--output", str(tmp_path / "b.mha"), "--checkpoint", "best"]
    assert predict.main(["--model", str(path_of(root, "winner-t1")), *pathed]) == 0
    a, b = (imageio.read_label(tmp_path / name)[0] for name in ("a.mha", "b.mha"))
    np.testing.assert_array_equal(a, b)
    assert len(np.unique(a)) > 1


def test_all_six_members_and_the_published_checkpoint(root):
    model = load_model(path_of(root, "winner-t1"), checkpoint="best")
    assert model.folds == ("0", "1", "2", "3", "4", "5")
    assert model.plans.spacing == layout.SPACING and model.plans.batch_size == 4


def test_a_name_that_is_not_there(tmp_path, scan, capfd):
    arguments = ["--model", "winner-t2", "--input", str(scan), "--output", str(tmp_path / "o")]
    assert predict.main([*arguments, "--root", str(tmp_path)]) == 1
    told = capfd.readouterr().err
    assert f"python -m panther_jax.weights get winner-t2 --root {tmp_path}" in told


def test_the_container_command_by_name(root, scan, tmp_path):
    case = tmp_path / "in" / predict_challenge.TASKS["t1"].input_folder / "case.mha"
    case.parent.mkdir(parents=True)
    image, geometry = imageio.read_image([scan])
    imageio.write_image(case, image[0], geometry)
    places = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    arguments = ["--task", "t1", "--model", "winner-t1", "--folds", "3", "--root", str(root)]
    assert predict_challenge.main([*arguments, *places]) == 0
    mask, _ = imageio.read_label(tmp_path / "out" / predict_challenge.OUTPUT_FOLDER / "case.mha")
    assert set(np.unique(mask)) <= {0, 1}


def test_training_starts_from_a_name(root, tmp_path):
    folder = named_start("winner-ct", Places(root))
    assert folder == path_of(root, "winner-ct")
    start = load_start(folder, fold=3, stem="reinit")
    assert set(start.params) == {"all"} and start.absent == ("stem",)
    (name,) = start.provenance["sha256"]
    assert name == "fold_all/checkpoint_best.pth"
    params = made.random_params(made.RESIDUAL, seed=9)
    fresh = TrainState(jnp.zeros((), jnp.int32), params, ())
    state, origin = starting._from_bundle(
        folder, fresh, "reinit", plans=made.make_plans(made.RESIDUAL), fold=3
    )
    assert origin == {"bundle": str(folder), "fold": "all", "sha256": start.provenance["sha256"]}
    new, old, source = (
        {"/".join(p): np.asarray(x) for p, x in walk(tree)}
        for tree in (state.params, params, start.params["all"])
    )
    taken = [k for k in new if not k.startswith(("decoder/heads/", "encoder/stem/"))]
    assert 0 < len(taken) < len(new)
    assert all(np.array_equal(new[k], (source if k in taken else old)[k]) for k in new)
    member = load_start(named_start("winner-t1", Places(root)), fold=5, stem="copy")
    assert set(member.params) == {"5"} and member.absent == ()


def test_foundation_weights_with_several_stems_and_heads(tmp_path):
    import torch

    stems, heads = {"035": 1, "221": 2}, {"035": 4, "221": 2}
    plans = made.make_plans(made.RESIDUAL).to_nnunet()
    content = made.checkpoint(made.RESIDUAL, trainer_name="MultiTalent_trainer_multistems_4000ep")
    content["network_weights"] = made.multi_state(made.RESIDUAL, stems, heads)
    content["init_args"] |= {"dataset_json": {"dataset_ids": ["035", "221"]}, "plans": plans}
    folder = tmp_path / KNOWN["multitalent"].model_folder
    (folder / "fold_all").mkdir(parents=True)
    torch.save(content, folder / "fold_all" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(plans))
    start = load_start(folder, fold=0, stem="reinit")
    assert set(start.params) == {"all"} and set(start.absent) == {"stem", "heads"}
    (found,) = find_models(tmp_path)
    assert found.trainer == "MultiTalent_trainer_multistems_4000ep" and found.labels == ()


def test_a_start_that_has_no_checkpoint(tmp_path):
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_latest.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds neither checkpoint_best.pth nor"):
        load_start(tmp_path, fold=0, stem="copy")


def test_best_before_final_unless_published_otherwise(tmp_path):
    import torch

    folder = made.write_model_folder(tmp_path / "Dataset619_x", made.RESIDUAL, folds=("all",))
    best = made.checkpoint(made.RESIDUAL, 7)
    torch.save(best, folder / "fold_all" / "checkpoint_best.pth")

    def taken():
        return list(load_start(folder, fold="all", stem="copy").provenance["sha256"])

    assert taken() == ["fold_all/checkpoint_best.pth"]
    (tmp_path / "download.json").write_text('{"record": "13753413"}')
    assert taken() == ["fold_all/checkpoint_final.pth"]
