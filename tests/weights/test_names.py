"""A model's name: an existing path, a known name, or neither."""

from pathlib import Path

import published_layout as layout
import pytest
from weight_files import write_bundle

from panther_jax.weights import names
from panther_jax.weights.names import AmbiguousModel, ModelNotFound, resolve_model


def fake(folder, dataset=None):
    """A folder with the names of a model in it."""
    (folder / "fold_0").mkdir(parents=True)
    (folder / "fold_0" / "checkpoint_best.pth").write_bytes(b"")
    if dataset:
        (folder / "plans.json").write_text(f'{{"dataset_name": "{dataset}"}}')
    return folder


def test_an_existing_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake(tmp_path / "data" / "weights" / "winner-t1" / "Dataset901_x")
    Path("winner-t1").mkdir()
    assert resolve_model("winner-t1", Path("data")) == Path("winner-t1")
    assert resolve_model(tmp_path / "winner-t1", Path("data")) == tmp_path / "winner-t1"
    assert names.published_checkpoint("winner-t1") is None


def test_a_known_name_by_path_by_plans_or_alone(tmp_path):
    weights = tmp_path / "weights"
    fake(weights / "winner-t2" / "x" / "Dataset902_y" / "z")
    fake(weights / "winner-t2" / "x" / "Dataset901_y" / "z")
    found = resolve_model("winner-t2", tmp_path)
    assert found == weights / "winner-t2" / "x" / "Dataset902_y" / "z"
    fake(weights / "winner-ct" / "one", "Dataset999_q")
    fake(weights / "winner-ct" / "two", "Dataset901_q")
    assert resolve_model("winner-ct", tmp_path) == weights / "winner-ct" / "one"
    fake(weights / "baseline" / "anything")
    assert resolve_model("baseline", tmp_path) == weights / "baseline" / "anything"
    write_bundle(weights / "multitalent", folds=("all",))
    assert resolve_model("multitalent", tmp_path) == weights / "multitalent"


@pytest.mark.parametrize("other", ["winner-ct", "zenodo-17212158"])
def test_another_download_of_the_same_record_serves(tmp_path, other):
    path = fake(tmp_path / "weights" / other / layout.model_folder("winner-t1"))
    assert resolve_model("winner-t1", tmp_path) == path
    with pytest.raises(ModelNotFound):
        resolve_model("winner-t2", tmp_path)


def test_several_models_are_listed(tmp_path):
    for name in ("a", "b"):
        fake(tmp_path / "weights" / "baseline" / name)
    with pytest.raises(AmbiguousModel, match="(?s)2 models.*baseline/a\n.*baseline/b\n.*Name one"):
        resolve_model("baseline", tmp_path)


def test_missing_weights_say_how_to_get_them(tmp_path):
    command = f"python -m panther_jax.weights get winner-t1 --root {tmp_path}"
    with pytest.raises(ModelNotFound, match=command):
        resolve_model("winner-t1", tmp_path)
    with pytest.raises(ModelNotFound, match="get multitalent`, or name"):
        resolve_model("multitalent", Path("data"))


def test_what_is_no_name(tmp_path):
    assert resolve_model("some/folder", tmp_path) == Path("some/folder")
    assert resolve_model("mri_t2", tmp_path) == Path("mri_t2")
    with pytest.raises(ModelNotFound, match="did you mean winner-t1"):
        resolve_model("winner_t1", tmp_path)


def test_the_published_checkpoint():
    assert names.published_checkpoint("winner-t1", "winner-t2") == "best"
    assert names.published_checkpoint("multitalent") == "final"
    assert names.published_checkpoint("winner-t1", "multitalent") is None
    assert names.published_checkpoint("winner-t1", Path("mine")) is None
    assert names.published_checkpoint() is None
