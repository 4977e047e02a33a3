"""Models are found by content and described."""

import json

import published_layout as layout
import pytest
import weight_files as made
from weight_files import write_bundle

from panther_jax.weights import __main__ as command
from panther_jax.weights.show import find_models, require_models, show


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


@pytest.mark.torch
def test_folders_of_nnunet_at_any_depth(tmp_path):
    write(tmp_path / "a" / "b", layout.model_files("winner-t1", extra_folds=["all"]))
    write(tmp_path, layout.model_files("winner-ct"))
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden", layout.model_files("winner-t2", folds=["0"]))
    ct, t1 = find_models(tmp_path)
    assert (ct.folds, t1.folds["5"]) == ({"all": ("best",)}, ("best",))
    assert list(t1.folds) == ["0", "1", "2", "3", "4", "5", "all"]
    assert t1.path == tmp_path / "a" / "b" / layout.model_folder("winner-t1")
    assert (t1.kind, t1.trainer, t1.plans, t1.configuration, t1.dataset) == (
        "nnunet",
        layout.TRAINER,
        "nnUNetResEncUNetLPlansPancCTMultiTalentV2",
        "3d_fullres_iso1x1x1",
        "Dataset901_PANTHER",
    )
    assert t1.labels == ("background", "tumor", "pancreas") and t1.channels == ("MRI",)
    text = show(tmp_path / "a")
    assert "0 1 2 3 4 5 all (best)" in text and "nnUNetTrainer1e3" in text and "not noted" in text


@pytest.mark.torch
def test_a_folder_whose_name_says_nothing(tmp_path):
    made.write_model_folder(tmp_path / "model", made.RESIDUAL)
    (tmp_path / "model" / "dataset.json").unlink()
    (found,) = find_models(tmp_path)
    assert found.trainer == "nnUNetTrainer" and found.configuration == "3d_fullres"
    assert found.notes == ("dataset.json is missing",) and found.labels == ()


def test_bundles_and_runs(tmp_path, capsys):
    write_bundle(tmp_path / "weights" / "mine", folds=("0", "all"))
    made.write_run(tmp_path / "runs" / "a_run", made.RESIDUAL)
    assert command.main(["show", str(tmp_path), "--json"]) == 0
    run, bundle = json.loads(capsys.readouterr().out)
    assert run["kind"] == "run" and run["folds"] == {"0": ["best", "final"]}
    assert bundle["kind"] == "bundle" and set(bundle["folds"]) == {"0", "all"}
    assert bundle["labels"] == ["background", "lesion", "pancreas"]
    assert command.main(["show", str(tmp_path)]) == 0
    assert "0 (best, final)" in capsys.readouterr().out


def test_damaged_files_are_noted_not_fatal(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", folds=("0",))
    (bundle / "plans.json").write_text("{")
    (bundle / "dataset.json").write_text('{"labels": {"a\\u001b[2J": 1}}')
    (found,) = find_models(tmp_path)
    assert "plans.json is not valid JSON" in found.notes[0] and found.plans is None
    assert "\x1b" not in found.to_text() and "a?[2J" in found.to_text()


def test_nothing_there(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_models(tmp_path / "no")
    (tmp_path / "archive.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="(?s)no model in .*holds: archive.zip"):
        require_models(tmp_path)
    assert command.main(["show", str(tmp_path)]) == 1
