"""`import panther_jax`: what it offers, lazily, and the README's example as it stands."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import weight_files as made
from tiny import make_raw, write_scan

import panther_jax
from panther_jax.images.imageio import read_label

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, cwd=ROOT):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_offered_comes_without_jax():
    names = ", ".join(n for n in panther_jax.__all__ if n != "__version__")
    code = f"""
import sys
import panther_jax
assert 'numpy' not in sys.modules and panther_jax.__version__
from panther_jax import {names}
assert all(map(callable, ({names})))
print('jax' in sys.modules)
"""
    assert run_python(code).strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = panther_jax.nothing


@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "preprocess"])
def test_a_face_is_module_and_function_in_any_order(name):
    used = f"""
import panther_jax.library as library
library.{name} = lambda *given: given
assert panther_jax.{name}(1) == {name}(1) == (1,)
"""
    before = f"import panther_jax.{name}; from panther_jax.{name} import main"
    after = f"import panther_jax; from panther_jax import {name}"
    orders = (f"{before}; {after}", f"{after}; {before}")
    for order in orders:
        run_python(f"{order}{used}assert callable(main) and {name}.main is main")


def test_the_lazy_trainer_is_its_module():
    from panther_jax import train as real
    from panther_jax.library import LazyFace

    lazy = LazyFace("panther_jax.train")
    assert lazy.main is real.main
    lazy.added = 3
    assert real.added == 3
    del lazy.added
    assert not hasattr(real, "added") and not hasattr(lazy, "__wrapped__")


def test_what_is_replaced_in_the_lazy_trainer_comes_back(monkeypatch):
    from panther_jax.library import LazyFace

    lazy, real = LazyFace("panther_jax.train"), importlib.import_module("panther_jax.train")
    original = real.run_loop
    with monkeypatch.context() as patch:
        patch.setattr(lazy, "run_loop", None)
        assert real.run_loop is None
    assert real.run_loop is original
    with mock.patch.object(lazy, "run_loop", None):
        assert real.run_loop is None
    assert real.run_loop is original


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    make_raw(folder / "data" / "raw" / "Dataset001_Mine", num_cases=2)
    made.write_bundle(folder / "data" / "weights" / "mine")
    write_scan(folder / "scan.nii.gz")
    return folder


@pytest.mark.slow
def test_the_readmes_example(folder):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"## From Python\n.*?```python\n(.*?)```", text, re.DOTALL)
    run_python(example, cwd=folder)
    label, geometry = read_label(folder / "label.nii.gz")
    assert label.shape == geometry.shape_zyx == (20, 22, 18)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["num_cases"] == 2


def test_preprocess_takes_a_plans_file_and_train_takes_what_the_command_takes(folder, tmp_path):
    raw = folder / "data" / "raw" / "Dataset001_Mine"
    with pytest.raises(ValueError, match="either a config or a plans.json"):
        panther_jax.preprocess(raw, tmp_path / "store")
    plans = folder / "data" / "weights" / "mine" / "plans.json"
    store = panther_jax.preprocess(raw, tmp_path / "store", plans=plans)
    assert len(list(store.glob("case_*"))) >= 2
    with pytest.raises(ValueError, match=r"loss.kind: unknown loss 'fokal'"):
        panther_jax.train("smoke", root=tmp_path, overrides={"loss.kind": "fokal"})
    with pytest.raises(ValueError, match=r"overrides .* do not fit"):
        panther_jax.train("smoke", root=tmp_path, overrides={"optim.nothing": 1})


@pytest.mark.slow
def test_train_gives_the_folder_of_the_fold(tmp_path):
    overrides = {"loop.epochs": 1, "loop.steps_per_epoch": 2, "loop.validation_steps": 1}
    found = panther_jax.train("smoke", root=tmp_path, overrides=overrides, demo=True)
    assert found == tmp_path / "runs" / "smoke_demo" / "fold_0"
    assert json.loads((found / "run.json").read_text())["finished"]


def test_array_and_file_give_the_same(folder):
    from panther_jax.images.imageio import read_image

    predictor = panther_jax.load(folder / "data" / "weights" / "mine", dtype="float32")
    image, geometry = read_image([folder / "scan.nii.gz"])
    from_array = predictor.predict(image, geometry, probabilities=True)
    from_file = panther_jax.predict(predictor, str(folder / "scan.nii.gz"))
    np.testing.assert_array_equal(from_array.label, from_file.label)
    assert from_array.probabilities is not None and from_file.probabilities is None
    assert from_array.probabilities.shape == (3, *image.shape[1:])
    report = predictor.predict_folder(folder / "scan.nii.gz", tmp := folder / "out.nii.gz")
    assert not report.failed and tmp.is_file()


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "panther_jax" / "py.typed").is_file()
