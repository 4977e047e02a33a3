import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metric_checks import RELATIVE, RELATIVE_FLOAT32_SPACING, assert_close, without_subject
from scipy.ndimage import gaussian_filter
from tiny import IDENTITY, LABELS

from panther_jax import evaluate
from panther_jax.base.console import LOGGER
from panther_jax.evaluation import comparison, metrics, scoring
from panther_jax.evaluation import scoring as scoring_module
from panther_jax.evaluation.folds import validation_folder
from panther_jax.images import imageio
from panther_jax.plans.geometry import Geometry

SHAPE, SPACING = (10, 14, 12), (3.0, 1.25, 0.8)


@pytest.fixture(autouse=True)
def no_handlers_left():
    """Commands log to the standard error of their test, which is closed after it."""
    yield
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)


def geometry(spacing=SPACING, shape=SHAPE, origin=(1.0, 2.0, 3.0)):
    return Geometry(tuple(shape), tuple(spacing), origin, IDENTITY)


def blobs(seed, shape=SHAPE):
    """A random label map: labels 0, 1 and 2."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    field /= np.abs(field).max()
    return np.where(field > 0.4, 1, np.where(field < -0.4, 2, 0)).astype(np.int16)


def folders(folder, *, num_cases=4, ending=".nii.gz", dataset=True):
    """References and predictions, ``references`` and ``predictions``, with dataset.json."""
    for name, first in (("references", 0), ("predictions", 100)):
        (folder / name).mkdir(parents=True)
        for number in range(num_cases):
            mixed = np.where(np.arange(SHAPE[2]) < 7, blobs(number), blobs(first + number))
            path = folder / name / f"case_{number}{ending}"
            imageio.write_label(path, mixed.astype(np.int16), geometry())
    if dataset:
        (folder / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    return folder / "predictions", folder / "references"


def run(*arguments):
    return evaluate.main([str(a) for a in arguments])


def evaluated(folder, *arguments):
    """The JSON of a run of the command."""
    output = folder / "result.json"
    code = run(*arguments, "--output", output, "--overwrite", "--quiet")
    return code, json.loads(output.read_text())


# ---------------------------------------------------------------------------------- golden


def write_masks(folder, golden, ending):
    """The masks of the reference cases as files: a folder of predictions and references a case."""
    index = json.loads((golden / "evaluation" / "panther_metrics.json").read_text())
    arrays = np.load(golden / "evaluation" / "masks.npz")
    for case, entry in index["cases"].items():
        grid = geometry(entry["spacing_xyz"][::-1], entry["shape_zyx"])
        for name in ("gt", "pred"):
            path = folder / case / name / f"{case}{ending}"
            imageio.write_label(path, arrays[f"{case}__{name}"], grid)
    return index


@pytest.mark.golden
@pytest.mark.parametrize(
    ("column", "preset", "ending", "relative"),
    [
        ("organisers", "organisers", ".mha", RELATIVE),
        ("fork_evaluate_local", "fork_a", ".nii.gz", RELATIVE),
    ],
)
def test_files_are_scored_as_by_the_scripts(golden, tmp_path, column, preset, ending, relative):
    index = write_masks(tmp_path, golden, ending)
    assert index["cases"]
    for case, entry in index["cases"].items():
        found = scoring_module.evaluate(
            tmp_path / case / "pred",
            tmp_path / case / "gt",
            scoring=scoring_module.Scoring(preset=preset),
        )
        expected = entry[column]
        subject = expected["per_subject"][0] if "per_subject" in expected else expected
        assert not found.failed
        panther = found.scores[0].panther
        assert_close(panther, without_subject(subject), relative, f"{case}/{column}")
        if "aggregates" in expected:
            aggregates = metrics.panther_aggregate(found.per_subject)
            assert_close(aggregates, expected["aggregates"], relative, case)


@pytest.mark.golden
def test_a_folder_is_pooled_as_by_the_organisers(golden, tmp_path):
    index = write_masks(tmp_path, golden, ".mha")
    for name in ("gt", "pred"):
        (tmp_path / name).mkdir()
        for case in index["aggregates"]["members"]:
            shutil.copy(tmp_path / case / name / f"{case}.mha", tmp_path / name)
    arguments = ("--predictions", tmp_path / "pred", "--references", tmp_path / "gt")
    code, found = evaluated(tmp_path, *arguments, "--preset", "organisers")
    expected = index["aggregates"]["organisers"]
    assert code == 0 and found["spacing_order"] == "organisers"
    assert_close(found["aggregates"], expected["aggregates"])
    assert [c["subject"] for c in found["per_subject"]] == [
        c["subject"] for c in expected["per_subject"]
    ]


def write_folds(run_folder, golden):
    """The label maps of the reference cases as the validations of a cross-validation."""
    index = json.loads((golden / "evaluation" / "panther_metrics.json").read_text())["labelmaps"]
    arrays = np.load(golden / "evaluation" / "labelmaps.npz")
    for fold, cases in index["folds"].items():
        for case in cases:
            label = arrays[f"{case}__gt"]
            grid = geometry(index["spacing_xyz"][::-1], label.shape)
            imageio.write_label(run_folder / "references" / f"{case}.nii.gz", label, grid)
            path = run_folder / "run" / fold / "validation_final" / f"{case}.nii.gz"
            imageio.write_label(path, arrays[f"{case}__pred"], grid)
    (run_folder / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    return index


@pytest.mark.golden
@pytest.mark.parametrize(
    ("column", "preset"),
    [
        ("fork_evaluate_local", "fork_a"),
        ("fork_separatefolds_aggregate_any_label", "fork_b"),
    ],
)
def test_cross_validations_are_scored_as_by_the_forks(golden, tmp_path, column, preset):
    index = write_folds(tmp_path, golden)
    code, found = evaluated(
        tmp_path,
        "--runs",
        *sorted((tmp_path / "run").glob("fold_*")),
        "--references",
        tmp_path / "references",
        "--preset",
        preset,
    )
    assert code == 0
    expected = index[column]
    # files hold float32 spacings, as the scripts read them, but some of their sums are float32 too
    assert_close(found["aggregates"], expected["aggregates"], RELATIVE_FLOAT32_SPACING)
    by_name = {c["subject"]: c for c in found["per_subject"]}
    assert list(by_name) == [c["subject"] for c in expected["per_subject"]]
    for entry in expected["per_subject"]:
        values = {k: by_name[entry["subject"]][k] for k in without_subject(entry)}
        assert_close(values, without_subject(entry), RELATIVE_FLOAT32_SPACING, entry["subject"])
    assert {n: f["subjects"] for n, f in found["folds"].items()} == index["folds"]
    scored = {"fork_a": ("label 1", 1), "fork_b": ("any label", None)}[preset]
    assert found["label"] == dict(zip(("name", "value"), scored, strict=True))
    if preset == "fork_b":
        for fold, aggregates in index["fork_separatefolds_per_fold"].items():
            values = found["folds"][fold]["aggregates"]
            assert_close(values, aggregates, RELATIVE_FLOAT32_SPACING, fold)


@pytest.mark.golden
def test_the_summary_of_files_equals_nnunet(golden, tmp_path):
    """Labels and regions; the means do not depend on where the files lie."""
    write_folds(tmp_path, golden)
    ids = {"background": 0, "tumor": 1, "pancreas": 2}
    regions = {"background": 0, "both": [1, 2], "tumor": [1]}
    compared = 0
    for name, labels, order in (
        ("nnunet_summary_labels_1_2.json", ids, None),
        ("nnunet_summary_regions_12_1.json", regions, [2, 1]),
    ):
        expected = json.loads((golden / "evaluation" / name).read_text())
        declared = {"labels": labels} | ({"regions_class_order": order} if order else {})
        (tmp_path / "dataset.json").write_text(json.dumps(declared))
        code, _ = evaluated(
            tmp_path, "--runs", tmp_path / "run", "--references", tmp_path / "references"
        )
        summary = json.loads((tmp_path / "result.summary.json").read_text())
        assert code == 0
        assert_close(summary["mean"], expected["mean"], where=name)
        assert_close(summary["foreground_mean"], expected["foreground_mean"], where=name)
        compared += 1
    assert compared == 2


# --------------------------------------------------------------------------------- live peers


# the library is older than the SciPy and setuptools that it runs with here
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", ["geometric", "organisers"])
def test_scores_equal_the_surface_distance_library(tmp_path, order):
    library = pytest.importorskip("surface_distance")
    predictions, references = folders(tmp_path, ending=".mha")
    _, found = evaluated(
        tmp_path,
        *("--predictions", predictions, "--references", references, "--spacing-order", order),
    )
    spacing = SPACING if order == "geometric" else SPACING[::-1]
    for case in found["per_subject"]:
        masks = [
            imageio.read_label(folder / f"{case['subject']}.mha")[0] == 1
            for folder in (references, predictions)
        ]
        surfaces = library.compute_surface_distances(*masks, spacing)
        expected = {
            "volumetric_dice": library.compute_dice_coefficient(*masks),
            "surface_dice": library.compute_surface_dice_at_tolerance(surfaces, 5.0),
            "hausdorff95": library.compute_robust_hausdorff(surfaces, 95),
            "masd": sum(library.compute_average_surface_distance(surfaces)) / 2,
            "gt_volume": masks[0].sum() * math.prod(SPACING),
            "pred_volume": masks[1].sum() * math.prod(SPACING),
        }
        values = {k: case[k] for k in expected}
        assert_close(values, {k: float(v) for k, v in expected.items()}, 1e-12, case["subject"])


@pytest.mark.torch
def test_the_summary_equals_that_of_nnunets_command(tmp_path):
    pytest.importorskip("nnunetv2")
    command = Path(sys.executable).parent / "nnUNetv2_evaluate_simple"
    if not command.is_file():
        pytest.skip("nnUNetv2_evaluate_simple is not installed beside Python")
    predictions, references = folders(tmp_path)
    theirs = tmp_path / "theirs.json"
    arguments = [references, predictions, "-l", "1", "2", "-o", theirs, "-np", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [str(a) for a in [command, *arguments]],
        check=True,
        capture_output=True,
        env=environment,
        timeout=120,
    )
    code, _ = evaluated(tmp_path, "--predictions", predictions, "--references", references)
    assert code == 0
    expected = json.loads(theirs.read_text())
    found = json.loads((tmp_path / "result.summary.json").read_text())
    assert_close(found, expected, where="summary.json")


# ----------------------------------------------------------------------------------- command


def test_the_command_writes_json_csv_and_a_summary(tmp_path, capsys):
    predictions, references = folders(tmp_path)
    arguments = ("--predictions", predictions, "--references", references)
    output = tmp_path / "new" / "scores.json"
    assert run(*arguments, "--output", output) == 0
    text, log = capsys.readouterr()
    found = json.loads(output.read_text())
    assert found["format"] == scoring.FORMAT and found["num_cases"] == 4 and not found["failed"]
    assert found["label"] == {"name": "tumor", "value": 1} and found["spacing_order"] == "geometric"
    for case in found["per_subject"]:
        assert f"{case['subject']}  {case['volumetric_dice']:.3f}" in text
    low, high = found["intervals"]["of"]["mean_volumetric_dice"]
    assert low < found["aggregates"]["mean_volumetric_dice"] < high
    assert str(output) in text and "4/4" in log
    with (output.parent / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["subject"] for r in rows] == [c["subject"] for c in found["per_subject"]]
    for row, case in zip(rows, found["per_subject"], strict=True):
        assert float(row["masd"]) == case["masd"]
        assert float(row["dice_pancreas"]) == case["classes"]["pancreas"]
    summary = json.loads((output.parent / "scores.summary.json").read_text())
    assert_close(found["classes"]["pancreas"], summary["mean"]["2"])
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "scores.csv",
        "scores.json",
        "scores.summary.json",
    ]

    assert run(*arguments, "--output", output) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run(*arguments, "--output", output, "--overwrite") == 0


def test_workers_do_not_change_anything(tmp_path):
    predictions, references = folders(tmp_path, num_cases=3)
    results = [
        evaluated(
            tmp_path,
            *("--predictions", predictions, "--references", references, "--workers", n),
        )[1]
        for n in (1, 2)
    ]
    for result in results:
        del result["date"]
    assert results[0] == results[1]


def test_label_and_dataset_json(tmp_path, capsys):
    predictions, references = folders(tmp_path, dataset=False)
    arguments = ("--predictions", predictions, "--references", references)
    plain = evaluated(tmp_path, *arguments)[1]
    assert plain["label"]["value"] == 1 and list(plain["classes"]) == ["tumor"]
    second = evaluated(tmp_path, *arguments, "--label", "2")[1]
    declared = tmp_path / "other.json"
    regions = {"background": 0, "whole": [1, 2], "lesion": [1]}
    declared.write_text(json.dumps({"labels": regions, "regions_class_order": [2, 1]}))
    arguments = (*arguments, "--dataset-json", declared)
    lesion = evaluated(tmp_path, *arguments)[1]
    assert lesion["label"] == {"name": "lesion", "value": [1]}
    assert lesion["aggregates"] == plain["aggregates"]
    whole = evaluated(tmp_path, *arguments, "--label", "Whole")[1]
    for entry, one, two in zip(*(r["per_subject"] for r in (whole, plain, second)), strict=True):
        assert entry["gt_volume"] == pytest.approx(one["gt_volume"] + two["gt_volume"])
    capsys.readouterr()
    assert run(*arguments, "--label", "liver") == 2
    assert "whole ((1, 2)), lesion ((1,))" in capsys.readouterr().err


def break_cases(predictions, references):
    """Five broken cases beside a sound one; returns what the message about each must say."""
    files = [f"case_{n}.nii.gz" for n in range(6)]
    (predictions / files[1]).unlink()
    (references / files[2]).unlink()
    label, grid = imageio.read_label(predictions / files[3])
    moved = Geometry(grid.shape_zyx, grid.spacing_zyx, (9.0, 2.0, 3.0), grid.direction)
    imageio.write_label(predictions / files[3], label, moved)
    data = (predictions / files[4]).read_bytes()
    (predictions / files[4]).write_bytes(data[: len(data) // 2])
    label, grid = imageio.read_label(predictions / files[5])
    label[0, 0, 0] = 7
    imageio.write_label(predictions / files[5], label, grid)
    return {
        "case_1": ("no prediction for", "--allow-missing"),
        "case_2": ("no reference for", "Add its label map"),
        "case_3": ("prediction origin (9.0, 2.0, 3.0) mm differs", "copy the header"),
        "case_4": ("cannot be read", "Copy or export it again"),
        "case_5": ("holds the labels [7]", "Renumber"),
    }


@pytest.mark.parametrize("num_workers", [1, 2])
def test_broken_cases_are_listed_and_the_others_done(tmp_path, capsys, num_workers):
    predictions, references = folders(tmp_path, num_cases=6)
    expected = break_cases(predictions, references)
    arguments = ("--predictions", predictions, "--references", references)
    code, found = evaluated(tmp_path, *arguments, "--workers", num_workers)
    text, log = capsys.readouterr()
    assert code == 1 and "case_0" in text and "5 case(s) could not be scored" in log
    assert [c["subject"] for c in found["per_subject"]] == ["case_0"]
    assert list(found["failed"]) == list(expected)
    for case, parts in expected.items():
        for part in parts:
            assert part in found["failed"][case] and part in log, case
    assert "Traceback" not in log


def test_shape_mismatch_and_twins(tmp_path):
    predictions, references = folders(tmp_path, num_cases=3)
    label = imageio.read_label(predictions / "case_0.nii.gz")[0][:-1]
    imageio.write_label(predictions / "case_0.nii.gz", label, geometry(shape=label.shape))
    imageio.write_label(references / "case_1.mha", blobs(1), geometry())
    arguments = ("--predictions", predictions, "--references", references)
    for preset in ("default", "fork_b"):
        code, found = evaluated(tmp_path, *arguments, "--preset", preset)
        assert code == 1 and [c["subject"] for c in found["per_subject"]] == ["case_2"]
        assert "shape (9, 14, 12)" in found["failed"]["case_0"]
        assert "Remove all but one" in found["failed"]["case_1"]


def test_references_without_prediction_may_be_left_out(tmp_path):
    predictions, references = folders(tmp_path, num_cases=3)
    (predictions / "case_1.nii.gz").unlink()
    arguments = ("--predictions", predictions, "--references", references)
    assert evaluated(tmp_path, *arguments)[0] == 1
    code, found = evaluated(tmp_path, *arguments, "--allow-missing")
    assert code == 0 and [c["subject"] for c in found["per_subject"]] == ["case_0", "case_2"]


def test_geometry_by_preset(tmp_path):
    """Origins matter to us only; the organisers look at spacings, more closely (spec 06 §4.1)."""
    predictions, references = folders(tmp_path, num_cases=2)
    label = imageio.read_label(predictions / "case_0.nii.gz")[0]
    imageio.write_label(predictions / "case_0.nii.gz", label, geometry(origin=(1.0, 2.5, 3.0)))
    label = imageio.read_label(predictions / "case_1.nii.gz")[0]
    near = (SPACING[0] + 5e-4, *SPACING[1:])
    imageio.write_label(predictions / "case_1.nii.gz", label, geometry(near))
    arguments = ("--predictions", predictions, "--references", references)
    assert list(evaluated(tmp_path, *arguments)[1]["failed"]) == ["case_0"]
    found = evaluated(tmp_path, *arguments, "--preset", "fork_b")[1]
    assert list(found["failed"]) == ["case_1"]


def test_nothing_to_score(tmp_path, capsys):
    predictions, references = folders(tmp_path, num_cases=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("--predictions", empty, "--references", empty) == 1
    assert "no case could be scored" in capsys.readouterr().err
    assert run("--predictions", tmp_path / "none", "--references", references) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert run("--compare", predictions, predictions) == 2
    assert "--references" in capsys.readouterr().err
    for wrong in (
        ["--predictions", predictions],
        ["--predictions", predictions, "--references", references, "--workers", "-1"],
        ["--runs", predictions, "--preset", "fork_a", "--label", "1"],
        [],
    ):
        with pytest.raises(SystemExit) as caught:
            run(*wrong)
        assert caught.value.code == 2


# ----------------------------------------------------------------------------- cross-validation


def make_run(run_folder, raw, *, folds=2, shift=0, checkpoint="final"):
    """A cross-validation over the cases of ``folders``, each in one fold."""
    predictions, references = raw
    for number, path in enumerate(sorted(predictions.iterdir())):
        target = run_folder / f"fold_{number % folds}" / f"validation_{checkpoint}"
        label, grid = imageio.read_label(path)
        imageio.write_label(target / path.name, np.roll(label, shift, axis=2), grid)
    for fold in run_folder.glob("fold_*"):
        folder = fold / f"validation_{checkpoint}"
        entries = [
            {"prediction_file": str(p), "reference_file": str(references / p.name), "metrics": {}}
            for p in sorted(folder.glob("*.nii.gz"))
        ]
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": entries}))
    return run_folder


def test_a_cross_validation_is_pooled_and_by_fold(tmp_path, capsys):
    raw = folders(tmp_path, num_cases=5)
    made = make_run(tmp_path / "run", raw)
    code, found = evaluated(tmp_path, "--runs", *sorted(made.glob("fold_*")))
    assert code == 0 and found["name"] == "run" and found["checkpoint"] == "final"
    whole = evaluated(tmp_path, "--predictions", raw[0], "--references", raw[1])[1]
    assert found["aggregates"] == whole["aggregates"]
    assert found["folds"]["fold_0"]["subjects"] == ["case_0", "case_2", "case_4"]
    dice = {c["subject"]: c["volumetric_dice"] for c in whole["per_subject"]}
    assert found["folds"]["fold_1"]["aggregates"]["mean_volumetric_dice"] == pytest.approx(
        (dice["case_1"] + dice["case_3"]) / 2, rel=1e-12
    )
    assert "fold_1" in capsys.readouterr().out
    assert evaluated(tmp_path, "--runs", made)[1]["aggregates"] == whole["aggregates"]

    assert run("--runs", made, "--checkpoint", "best") == 1
    assert "not validated" in capsys.readouterr().err
    missing = made / "fold_0" / "validation_final" / "case_2.nii.gz"
    missing.unlink()
    assert run("--runs", made) == 1
    assert "case_2: no prediction" in capsys.readouterr().err


def test_the_fold_of_all_cases_is_scored_only_alone_and_said_to_be_trained_on(tmp_path, capsys):
    made = make_run(tmp_path / "run", folders(tmp_path, num_cases=3))
    shutil.copytree(made / "fold_0", made / "fold_all")
    found = evaluated(tmp_path, "--runs", *sorted(made.glob("fold_*")))[1]
    assert {*found["folds"]} == {"fold_0", "fold_1"} and not found["trained_on"]
    assert run("--runs", made) == 0
    assert "fold_all is left out" in capsys.readouterr().err
    alone = evaluated(tmp_path, "--runs", made / "fold_all")[1]
    assert alone["trained_on"] == ["fold_all"]
    text = capsys.readouterr().out
    assert "validated on the cases that it was trained on" in text and "all (trained on)" in text
    assert run("--compare", made / "fold_all", made) == 0
    assert "validated on the cases that it was trained on" in capsys.readouterr().err


def test_a_case_in_two_folds_is_refused(tmp_path, capsys):
    made = make_run(tmp_path / "run", folders(tmp_path, num_cases=3))
    shutil.copytree(made / "fold_0", made / "fold_7")
    assert run("--runs", made) == 1
    log = capsys.readouterr().err
    assert "2 case(s) were validated in two folds: case_0 (fold_0 and fold_7)" in log
    other = make_run(tmp_path / "other", (tmp_path / "predictions", tmp_path / "references"))
    assert run("--runs", made / "fold_0", other / "fold_1") == 1
    assert "2 runs" in capsys.readouterr().err


def test_nnunets_own_validation_folders_are_read(tmp_path):
    made = make_run(tmp_path / "run", folders(tmp_path, num_cases=2), folds=1)
    fold = made / "fold_0"
    (fold / "validation_final").rename(fold / "validation")
    assert validation_folder(fold, "final").name == "validation"
    with pytest.raises(FileNotFoundError, match="validation_best"):
        validation_folder(fold, "best")
    (fold / "validation_final").mkdir()  # the fork: then `validation` is the best checkpoint's
    assert validation_folder(fold, "best").name == "validation"
    assert validation_folder(fold, "final").name == "validation_final"


def test_two_runs_are_compared_over_common_cases(tmp_path, capsys):
    raw = folders(tmp_path, num_cases=9)
    good = make_run(tmp_path / "good", raw)
    bad = make_run(tmp_path / "bad", raw, shift=3)
    for fold in good.glob("fold_0"):
        (fold / "validation_final" / "case_8.nii.gz").unlink()
        summary = fold / "validation_final" / "summary.json"
        entries = json.loads(summary.read_text())["metric_per_case"][:-1]
        summary.write_text(json.dumps({"metric_per_case": entries}))
    output = tmp_path / "comparison.json"
    assert run("--compare", bad, good, "--output", output) == 0
    text = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["num_cases"] == 8 and found["only_in_a"] == ["case_8"]
    assert "only in bad: case_8" in text and found["sentence"] in text
    by_name = {m["metric"]: m for m in found["metrics"]}
    dice = by_name["mean_volumetric_dice"]
    assert dice["difference"] == pytest.approx(dice["candidate"] - dice["baseline"])
    assert dice["low"] < dice["difference"] < dice["high"] and dice["low"] > 0
    assert dice["p"] == 2 / 2**8 and dice["verdict"] == "better"  # better in each of eight cases
    assert "good is better in Dice" in found["sentence"]

    files = []
    for path in (bad, good):
        files.append(tmp_path / f"{path.name}.json")
        assert run("--runs", path, "--output", files[-1], "--quiet") == 0
    assert run("--compare", *files, "--output", output, "--overwrite") == 0
    assert json.loads(output.read_text())["metrics"] == found["metrics"]
    assert run("--compare", files[0], tmp_path / "dataset.json") == 1
    assert "was not written by" in capsys.readouterr().err
    changed = json.loads(files[0].read_text()) | {"preset": "fork_a"}
    files[0].write_text(json.dumps(changed))
    assert run("--compare", *files) == 1
    assert "preset is fork_a in bad" in capsys.readouterr().err


def test_help_has_an_example():
    done = subprocess.run(
        [sys.executable, "-m", "panther_jax.evaluate", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(comparison.__file__).parents[2])},
    )
    assert "example:" in done.stdout and "--spacing-order" in done.stdout
