"""Post-processing equals the reference: components, the search for them, the pancreas filter."""

import ast
import json
import re

import numpy as np
import pytest
from scipy import ndimage

from panther_jax.evaluation.components import filter_components, flat_labels, keep_largest_component
from panther_jax.evaluation.postprocessing import (
    PostprocessError,
    determine_postprocessing,
    postprocess,
    read_postprocessing,
)
from panther_jax.images.imageio import read_label, write_label
from panther_jax.plans.geometry import Geometry
from panther_jax.postprocess import main

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def geometry_of(shape):
    return Geometry(shape, (2.0, 1.0, 1.0), (1.0, 2.0, 3.0), IDENTITY)


# ------------------------------------------------------------------------------------ golden


def labels_named(name):
    """Labels of a golden array's name: `label1`, `list_1_2`, `region_12`."""
    kind, rest = re.fullmatch(r"(label|list|region)_?(.+)", name).groups()
    digits = [int(d) for d in re.findall(r"\d", rest)]
    return digits[0] if kind == "label" else tuple(digits) if kind == "region" else digits


@pytest.mark.golden
def test_golden_components(golden):
    arrays = np.load(golden / "inference" / "components.npz")
    compared = 0
    for key in arrays.files:
        source, _, name = key.partition("_")
        if name:
            found = keep_largest_component(arrays[source], labels_named(name))
            np.testing.assert_array_equal(found, arrays[key], err_msg=key)
            assert found.dtype == arrays[key].dtype
            compared += 1
    assert compared > 0


@pytest.mark.golden
def test_golden_search(golden, tmp_path):
    folder = golden / "inference" / "postprocessing"
    expected = json.loads((folder / "pred" / "postprocessing.json").read_text())
    classes = [ast.literal_eval(k) for k in expected["input_folder"]["mean"]]
    files = sorted((folder / "pred").glob("*.nii.gz"))
    search = determine_postprocessing(files, folder / "ref", classes=classes)
    found = json.loads(json.dumps(search.to_json()))
    for key in ("postprocessing_fns", "postprocessing_kwargs"):
        assert found[key] == expected[key]
    for when in ("input_folder", "postprocessed"):
        assert found[when]["mean"].keys() == expected[when]["mean"].keys()
        means = [
            (found[when]["foreground_mean"], expected[when]["foreground_mean"]),
            *((found[when]["mean"][k], v) for k, v in expected[when]["mean"].items()),
        ]
        for one, other in means:
            assert one == pytest.approx(other, abs=1e-9, nan_ok=True)
    for path in files:
        wanted, _ = read_label(folder / "pred" / "postprocessed" / path.name)
        np.testing.assert_array_equal(postprocess(read_label(path)[0], search.steps), wanted)


@pytest.mark.golden
def test_golden_component_filter(golden):
    arrays = np.load(golden / "inference" / "baseline_helpers.npz")
    tumor, pancreas = arrays["filter_tumour"] > 0, arrays["filter_pancreas"] > 0
    assert ndimage.label(tumor)[1] == int(arrays["filter_num_components"])
    np.testing.assert_array_equal(filter_components(tumor, pancreas), arrays["filter_out"] > 0)


# -------------------------------------------------------------------------------- components


def test_the_largest_component_touches_at_corners_and_ties_stay():
    image = np.zeros((6, 6, 6), np.uint8)
    image[0, 0, 0] = image[1, 1, 1] = 1  # two voxels, diagonal
    image[5, 5, 5] = image[5, 5, 4] = 2  # two more of another label
    image[3, 0, 5] = 1
    kept = keep_largest_component(image, (1, 2))
    assert kept[1, 1, 1] == 1 and kept[5, 5, 4] == 2 and kept[3, 0, 5] == 0
    assert image[3, 0, 5] == 1  # the input is left alone
    only = keep_largest_component(image, 1)
    assert only[3, 0, 5] == 0 and only[5, 5, 5] == 2
    np.testing.assert_array_equal(keep_largest_component(image, 7), image)
    flat = keep_largest_component(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]), 1)
    assert flat.sum() == 2


def test_labels_regions_and_lists_of_them_are_flattened():
    assert flat_labels(3) == (3,)
    assert flat_labels([(1, 2), [2], 5]) == (1, 2, 5)


@pytest.mark.parametrize(
    ("num_voxels", "num_inside", "kept"),
    [(10, 2, True), (9, 9, False), (20, 3, True), (20, 2, False), (100, 15, True), (60, 9, True)],
)
def test_limits_of_the_component_filter_are_inclusive(num_voxels, num_inside, kept):
    tumor, pancreas = np.zeros((2, 3, 3, 120), bool)
    tumor[1, 1, 5 : 5 + num_voxels] = True
    pancreas[1, 1, : 5 + num_inside] = True
    tumor[0, 0, 0] = True  # shares no face with the other
    found = filter_components(tumor, pancreas)
    assert found.sum() == (num_voxels if kept else 0)
    with pytest.raises(ValueError, match="resample the pancreas"):
        filter_components(tumor, pancreas[1:])


# ------------------------------------------------------------------------------------ search


@pytest.fixture
def dataset(tmp_path):
    """Two classes: class 1 with islands far away, class 2 right as it is, in two parts."""
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MRI"},
                "labels": {"background": 0, "tumor": 1, "pancreas": 2},
                "numTraining": 2,
                "file_ending": ".mha",
            }
        )
    )
    for number in range(2):
        reference = np.zeros((8, 16, 16), np.uint8)
        reference[2:5, 2:6, 2:6], reference[2:4, 10:12, 3:6] = 1, 2
        reference[6:7, 10:12, 10 : 12 + number] = 2
        prediction = reference.copy()
        prediction[7, 15, 14:] = 1
        write_label(tmp_path / "ref" / f"case_{number}.mha", reference, geometry_of((8, 16, 16)))
        write_label(tmp_path / "pred" / f"case_{number}.mha", prediction, geometry_of((8, 16, 16)))
    return tmp_path


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out.strip(), captured.err


def test_commands_search_and_replay(dataset, capsys):
    # `_` and `-` are alike
    status, out, err = run(
        capsys, "determine", "--predictions", dataset / "pred", "--references", dataset / "ref",
        "--output", dataset / "out", "--dataset_json", dataset / "dataset.json",
    )  # fmt: skip
    assert status == 0 and out == str(dataset / "out" / "postprocessing.json")
    assert "largest component of 1" in err
    steps = read_postprocessing(dataset / "out" / "postprocessing.json")
    assert steps == ((1,),)  # all at once would remove a part of class 2
    summary = json.loads((dataset / "out" / "postprocessed" / "summary.json").read_text())
    assert summary["mean"]["1"]["Dice"] == 1.0
    assert all("postprocessed" in case["prediction_file"] for case in summary["metric_per_case"])
    status, out, _ = run(
        capsys, "apply", "--input", dataset / "pred", "--output", dataset / "clean",
        "--postprocessing", dataset / "out" / "postprocessing.json",
    )  # fmt: skip
    assert status == 0 and out == str(dataset / "clean")
    for path in sorted((dataset / "ref").iterdir()):
        wanted, geometry = read_label(path)
        for folder in ("clean", "out/postprocessed"):
            found, same = read_label(dataset / folder / path.name)
            np.testing.assert_array_equal(found, wanted)
            assert same == geometry


def test_nothing_is_accepted_where_nothing_helps(dataset):
    files = sorted((dataset / "ref").iterdir())
    search = determine_postprocessing(files, dataset / "ref", classes=[1, 2])
    assert search.chain == () and search.to_json()["postprocessing_fns"] == []
    # A class that is nowhere has no Dice (NaN), which is no gain either.
    search = determine_postprocessing(files, dataset / "ref", classes=[3])
    assert search.chain == ()


def test_all_at_once_is_recorded_as_a_list_of_labels(dataset):
    """As the reference writes it, also for one label and for regions (it was run to see)."""
    files = sorted((dataset / "pred").iterdir())
    assert determine_postprocessing(files, dataset / "ref", classes=[1]).chain == ([1],)
    for path in files:
        label_map, geometry = read_label(path)
        label_map[6] = 0  # now class 2 is in one part
        label_map[2:4, 6:10, 3:6] = 2  # and touches class 1
        reference = label_map.copy()
        reference[7] = 0
        write_label(path, label_map, geometry)
        write_label(dataset / "ref" / path.name, reference, geometry)
    search = determine_postprocessing(files, dataset / "ref", classes=[(1, 2), (1,)])
    assert search.chain == ([1, 2],) and search.steps == ((1, 2),)


def test_user_errors_are_one_message(dataset, capsys):
    predictions, references = dataset / "pred", dataset / "ref"
    options = ["--predictions", predictions, "--references", references]
    assert run(capsys, "determine", *options)[0] == 0  # dataset.json is found above
    status, _, err = run(capsys, "determine", *options)
    assert status == 1 and "pass --overwrite" in err
    twice = ["--predictions", predictions, predictions, *options[2:], "--output", dataset / "new"]
    status, _, err = run(capsys, "determine", *twice)
    assert status == 1 and "predicted twice: case_0.mha" in err
    (references / "case_1.mha").unlink()
    status, _, err = run(capsys, "determine", *options, "--overwrite")
    assert status == 1 and "no reference for case_1.mha" in err
    (references / "case_1.mha").write_text("broken")
    status, _, err = run(capsys, "determine", *options, "--overwrite")
    assert status == 1 and "case_1.mha" in err and "Traceback" not in err
    status, _, err = run(
        capsys, "apply", "--input", dataset / "nowhere", "--output", dataset / "x",
        "--postprocessing", predictions / "postprocessing.json",
    )  # fmt: skip
    assert status == 1 and "is not a folder" in err
    for wrong in (["determine"], ["apply", "--input", predictions], ["both"]):
        with pytest.raises(SystemExit) as stopped:
            run(capsys, *wrong)
        assert stopped.value.code == 2


def test_the_other_files_are_done_if_one_is_broken(dataset, capsys):
    (dataset / "pred" / "case_0.mha").write_text("broken")
    (dataset / "p.json").write_text(
        json.dumps(
            {
                "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
                "postprocessing_kwargs": [{"labels_or_regions": [[1, 2], 1]}],
            }
        )
    )
    status, _, err = run(
        capsys, "apply", "--input", dataset / "pred", "--output", dataset / "clean",
        "--postprocessing", dataset / "p.json",
    )  # fmt: skip
    assert status == 1 and "1 of 2 files" in err and "case_0.mha" in err
    assert [p.name for p in (dataset / "clean").iterdir()] == ["case_1.mha"]


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"postprocessing_fns": ["os.system"], "postprocessing_kwargs": [{}]},
        {"postprocessing_fns": [], "postprocessing_kwargs": [{}]},
        {
            "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
            "postprocessing_kwargs": [{"labels": 1}],
        },
        {
            "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
            "postprocessing_kwargs": [{"labels_or_regions": "tumor"}],
        },
    ],
)
def test_broken_postprocessing_files_are_refused(content, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(PostprocessError, match="p.json"):
        read_postprocessing(tmp_path / "p.json")
