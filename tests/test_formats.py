"""Stores, runs, bundles and their like that version 0.1 wrote are still read, to the same values.

``data/formats_0.1.zip`` holds one of each, how they were made, and what that version read of them.
"""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from panther_jax import bundle, evaluate, postprocess, predict, report, train
from panther_jax.ensembles.specification import read_ensemble
from panther_jax.images.imageio import read_label
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import open_store, read_stored
from panther_jax.training.records import read_metrics
from panther_jax.weights.bundle import load_bundle, params_sha256
from panther_jax.weights.checkpoint import Checkpoints

ARCHIVE = Path(__file__).parent / "data" / "formats_0.1.zip"
RAW = Path("data/raw/Dataset902_Tiny")
STORE = Path("data/store/Dataset902_Tiny/nnUNetResEncUNetLPlans_tiny")
RUN = Path("data/runs/tiny_run")
FOLD = RUN / "fold_0"
BUNDLE = Path("data/weights/tiny")
TRAIN = "--config tiny_run.py --root data --init none --fold 0 --quiet".split()
MIN_EQUAL = 0.999  # of 4000 voxels: one on a border may fall to the other class elsewhere


pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The working directory holds the old files; gives what version 0.1 read of them."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("nnUNet_raw", raising=False)
    return json.loads(Path("expected.json").read_text())


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def counts(path):
    return np.bincount(read_label(path)[0].ravel(), minlength=3).tolist()


def assert_same_label_maps(folder, expected):
    """Every label map of ``expected`` is in ``folder`` too, but for rounding."""
    paths = sorted(expected.glob("*.mha"))
    assert paths and [p.name for p in paths] == sorted(p.name for p in folder.glob("*.mha"))
    for path in paths:
        (found, place), (wanted, old_place) = read_label(folder / path.name), read_label(path)
        assert place == old_place
        assert set(np.unique(wanted)) == {0, 1, 2}
        assert found.shape == wanted.shape and np.mean(found == wanted) >= MIN_EQUAL


def test_a_store_opens_and_every_case_reads(old):
    store = open_store(STORE)
    assert list(store.case_ids) == list(old["store"])
    for name, expected in old["store"].items():
        case = read_stored(store, name)
        assert list(case.image.shape) == expected["shape"]
        assert [case.image.min(), case.image.max()] == expected["image_range"]
        assert sha256(case.image) == expected["image_sha256"]
        assert sha256(case.label) == expected["label_sha256"]
        assert np.bincount(np.ravel(case.label)).tolist() == expected["label_counts"]
        sums = {str(key): found.sum(0).tolist() for key, found in case.locations}
        assert sums == expected["location_sums"]
        assert counts(store.reference(name)) == expected["label_counts"]
    assert fold_cases(store, 1) == (("case_1", "case_2"), ("case_0",))


def test_the_checkpoints_of_a_run_are_read(old):
    checkpoints = Checkpoints(FOLD / "checkpoints")
    for kind, expected in old["checkpoints"].items():
        params, opt_state, counters = checkpoints.read(kind)
        assert counters.step == expected["step"] == checkpoints.steps(kind)[-1]
        assert params_sha256(params) == expected["params_sha256"]
        assert len(jax.tree.leaves(opt_state)) > 2 * len(jax.tree.leaves(params)), "two moments"


def test_a_finished_run_is_done(old, capsys):
    before = {p: p.read_bytes() for p in (FOLD / "checkpoints").rglob("*") if p.is_file()}
    maps = {p: p.read_bytes() for p in FOLD.glob("validation_*/*.mha")}
    assert train.main(TRAIN) == 0
    assert "validation_final (final checkpoint, step 120)" in capsys.readouterr().out
    assert before and maps and all(p.read_bytes() == b for p, b in (before | maps).items())
    assert [r["step"] for r in read_metrics(FOLD / "metrics.jsonl")] == [40, 80, 120]


def assert_epochs(old, num_epochs):
    """The learning curves but for rounding, which training makes larger."""
    rows = read_metrics(FOLD / "metrics.jsonl")
    assert len(rows) == num_epochs
    for row, expected in zip(rows, old["epochs"], strict=False):
        assert (row["epoch"], row["step"]) == (expected["epoch"], expected["step"])
        assert row["lr"] == pytest.approx(expected["lr"], rel=1e-6)
        for name in ("train_loss", "validation_loss"):
            assert row[name] == pytest.approx(expected[name], abs=0.02)


@pytest.mark.slow
def test_a_run_goes_on_from_its_latest_checkpoint(old):
    for kind in ("final", "best"):
        shutil.rmtree(FOLD / "checkpoints" / kind)
    for path in FOLD.glob("validation_*"):
        shutil.rmtree(path)
    assert train.main(TRAIN) == 0
    assert Checkpoints(FOLD / "checkpoints").steps("final") == (120,)
    assert_epochs(old, 3)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_epochs(old):
    more = ["--loop.epochs", "4", "--allow-config-change"]
    assert train.main([*TRAIN, *more]) == 0
    assert Checkpoints(FOLD / "checkpoints").steps("final") == (160,)
    assert_epochs(old, 4)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--model", RUN], "predictions"),
        (["--model", BUNDLE], "predictions"),
        (["--ensemble", "ensemble.json"], "ensemble_predictions"),
    ],
    ids=["run", "bundle", "ensemble"],
)
def test_an_old_model_predicts_as_it_did(old, arguments, folder):
    where = ["--input", RAW / "imagesTr", "--output", "new", "--quiet"]
    assert predict.main([str(a) for a in (*arguments, *where)]) == 0
    for name, expected in old["label_counts"][folder].items():
        assert counts(Path(folder) / f"{name}.mha") == expected
    assert_same_label_maps(Path("new"), Path(folder))


def test_a_bundle_loads_and_is_what_the_run_makes_today(old):
    loaded = load_bundle(BUNDLE)
    assert params_sha256(loaded.params["0"]) == old["bundle"]
    assert loaded.provenance["checkpoints"]["0"]["params_sha256"] == old["bundle"]
    assert bundle.main(["--run", str(RUN), "--out", "again", "--quiet"]) == 0
    assert params_sha256(load_bundle(Path("again")).params["0"]) == old["bundle"]


def test_an_ensemble_file_is_read(old):
    spec = read_ensemble(Path("ensemble.json"))
    first, second = spec.members
    assert (first.name, first.checkpoint, first.weight) == ("run", "best", 1.0)
    assert [m.model.resolve() for m in spec.members] == [RUN.resolve(), BUNDLE.resolve()]
    assert dict(second.class_weights) == {"background": 1.0, "tumor": 2.0, "pancreas": 1.0}
    assert spec.combine == "probabilities" and spec.decision.kind == "argmax"


def test_label_maps_without_records_are_not_trusted(old):
    """Version 0.1 kept no records: what lacks is predicted, what is there is refused by name."""
    before = {p: p.read_bytes() for p in Path("predictions").glob("*.mha")}
    Path("predictions/case_1.mha").unlink()
    where = ["--input", str(RAW / "imagesTr"), "--output", "predictions", "--quiet"]
    assert predict.main(["--model", str(RUN), *where]) == 1
    record = json.loads(Path("predictions/predict.json").read_text())
    assert list(record["done"]) == ["case_1"] and record["skipped"] == []
    assert set(record["failed"]) == {"case_0", "case_2"}
    assert all("no record says what made it" in text for text in record["failed"].values())
    assert all(p.read_bytes() == b for p, b in before.items() if p.stem != "case_1")
    assert predict.main(["--model", str(RUN), *where, "--overwrite"]) == 0
    assert predict.main(["--model", str(RUN), *where]) == 0
    record = json.loads(Path("predictions/predict.json").read_text())
    assert record["skipped"] == ["case_0", "case_1", "case_2"]


def test_postprocessing_is_replayed(old):
    where = ["--input", "noisy", "--output", "new", "--quiet"]
    steps = ["--postprocessing", "postprocessing/postprocessing.json"]
    assert postprocess.main(["apply", *where, *steps]) == 0
    for name, expected in old["label_counts"]["cleaned"].items():
        assert counts(Path("new") / f"{name}.mha") == expected
        assert counts(Path("noisy") / f"{name}.mha") != expected


def test_runs_are_evaluated(old):
    """The scores are as recorded, and the ones that the run's own validation wrote."""
    output = ["--output", "scores.json", "--quiet"]
    assert evaluate.main(["--runs", str(FOLD), *output]) == 0
    (case,) = json.loads(Path("scores.json").read_text())["per_subject"]
    for name, expected in old["panther"].items():
        found = case[name]
        assert found == (expected if name == "subject" else pytest.approx(expected, rel=1e-6))


def test_a_report_is_rendered(old):
    assert report.main(["--run", str(RUN), "--output", "report.html", "--quiet"]) == 0
    page = Path("report.html").read_text()
    assert "case_2" in page and f"{old['panther']['volumetric_dice']:.3f}" in page


@pytest.mark.torch
def test_a_run_is_exported_to_nnunet_and_comes_back(old):
    from weight_conversion import export_nnunet, import_nnunet

    exported = Path("nnUNetTrainer__nnUNetResEncUNetLPlans__tiny")
    assert export_nnunet.main(["--model", str(RUN), "--out", str(exported), "--quiet"]) == 0
    arguments = ["--model-folder", str(exported), "--out", "back", "--quiet"]
    assert import_nnunet.main(arguments) == 0
    assert params_sha256(load_bundle(Path("back")).params["0"]) == old["bundle"]
