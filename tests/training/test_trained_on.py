"""A fold goes on only with the data that it was trained on."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import make_raw

from panther_jax.config.loading import load_config
from panther_jax.config.schema import ConfigError
from panther_jax.images.raw_dataset import open_raw
from panther_jax.planner.from_config import plans_from_config
from panther_jax.preprocessing.pipeline import preprocess
from panther_jax.store.store import open_store
from panther_jax.training.trained_on import DATA, check_data

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.py")


def made(folder):
    raw = open_raw(folder / "raw")
    preprocess(raw, plans_from_config(load_config(SMOKE)[0], raw.dataset), folder / "store")
    return open_store(folder / "store")


@pytest.fixture
def folder(tmp_path):
    make_raw(tmp_path / "raw", num_cases=6)
    check_data(tmp_path / "fold_0", made(tmp_path), 0, allow_change=False)
    (tmp_path / "fold_0" / "validation_final").mkdir()
    (tmp_path / "fold_0" / "validation_final" / "summary.json").write_text("{}")
    return tmp_path


def paths(folder, case):
    return (
        folder / "raw" / "imagesTr" / f"{case}_0000.mha",
        folder / "raw" / "labelsTr" / f"{case}.mha",
    )


def change_label(folder):
    shutil.copy(paths(folder, "case_2")[1], paths(folder, "case_1")[1])


def remove(folder):
    for path in paths(folder, "case_2"):
        path.unlink()


def add(folder):
    for old, new in zip(paths(folder, "case_2"), paths(folder, "case_9"), strict=True):
        shutil.copy(old, new)


def other_splits(folder):
    path = folder / "store" / "splits_final.json"
    splits = json.loads(path.read_text())
    path.write_text(json.dumps(splits[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_label, "1 case.s. changed: case_1"),
        (remove, "2 removed: case_0, case_2"),
        (add, "added: case_9"),
        (other_splits, "validation cases"),
    ],
)
def test_other_data_are_refused_or_told(folder, change, message, caplog):
    change(folder)
    store, fold = made(folder), folder / "fold_0"
    with pytest.raises(ConfigError, match=f"(?s)fold_0 was trained on other.*{message}.*--restart"):
        check_data(fold, store, 0, allow_change=False)
    assert (fold / "validation_final" / "summary.json").is_file()
    check_data(fold, store, 0, allow_change=True)
    assert not (fold / "validation_final" / "summary.json").exists()
    assert any("the data changed" in text for text in caplog.messages)
    check_data(fold, store, 0, allow_change=False)


def test_the_same_data_go_on(folder):
    check_data(folder / "fold_0", made(folder), 0, allow_change=False)
    assert (folder / "fold_0" / "validation_final" / "summary.json").is_file()


def test_a_run_of_an_older_version_is_compared_by_its_training_cases(folder):
    (folder / "fold_0" / DATA).unlink()
    run = {"training_cases": ["case_0", "zz"]}
    (folder / "fold_0" / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="removed: zz"):
        check_data(folder / "fold_0", made(folder), 0, allow_change=False)


def test_a_newer_note_is_refused(folder):
    (folder / "fold_0" / DATA).write_text('{"version": 99}')
    with pytest.raises(ConfigError, match="(?s)data.json: version 99.*Use the version"):
        check_data(folder / "fold_0", made(folder), 0, allow_change=False)
