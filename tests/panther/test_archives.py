"""Converters keep voxels and geometry and recode labels; merging never loses a case."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IDENTITY, make_raw

from panther_jax import datasets, preprocess
from panther_jax.base.errors import DatasetError
from panther_jax.images import imageio, merging, raw_dataset, splits
from panther_jax.images.geometry import geometry_differences
from panther_jax.plans.geometry import Geometry
from panther_jax.store import store

# axes swapped and flipped, off-centre: what a careless conversion loses
GEOMETRY = Geometry(
    (6, 7, 8), (2.5, 0.75, 0.8), (-12.5, 3.25, 100.0), (0.0, -1, 0, 1, 0, 0, 0, 0, -1)
)


def run(*arguments):
    try:
        return datasets.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def volume(seed, values):
    """An image, and a label map that holds every one of the values."""
    random = np.random.default_rng(seed)
    label = random.choice(values, GEOMETRY.shape_zyx).astype(np.int16)
    label.flat[: len(values)] = values
    return random.integers(-1000, 1000, GEOMETRY.shape_zyx).astype(np.int16), label


def write_pair(image_path, label_path, seed, values):
    image, label = volume(seed, values)
    imageio.write_image(image_path, image, GEOMETRY)
    imageio.write_label(label_path, label, GEOMETRY)


def panther_download(folder):
    """Both tasks, with the unlabelled scans and the folder names of the archive."""
    for task, ids in (("1", ["10000_0001", "10003_0001"]), ("2", ["10303"])):
        root = folder / f"PANTHER_Task{task}"
        for seed, case_id in enumerate(ids):
            image = root / "ImagesTr" / f"{case_id}_0000.mha"
            write_pair(image, root / "LabelsTr" / f"{case_id}.mha", seed, [0, 1, 2])
    unlabeled = folder / "PANTHER_Task1" / "ImagesTr_unlabeled" / "10500_0002_0000.mha"
    imageio.write_image(unlabeled, volume(9, [0])[0], GEOMETRY)
    return folder


def msd_download(folder):
    root = folder / "Task07_Pancreas"
    for seed, case_id in enumerate(["pancreas_001", "pancreas_004"]):
        name = f"{case_id}.nii.gz"
        write_pair(root / "imagesTr" / name, root / "labelsTr" / name, seed, [0, 1, 2])
    for name in ("imagesTr", "labelsTr"):
        (root / name / "._pancreas_001.nii.gz").write_bytes(b"macOS")
    return folder


def panorama_download(folder):
    labels = folder / "panorama_labels"
    values = list(range(7))
    write_pair(
        folder / "batch_1" / "100000_00001_0000.nii.gz",
        labels / "manual_labels" / "100000_00001.nii.gz",
        0,
        values,
    )
    write_pair(
        folder / "batch_2" / "100001_00001_0000.nii.gz",
        labels / "automatic_labels" / "100001_00001.nii.gz",
        1,
        values,
    )
    # a manual label replaces an automatic one; labels of batches not downloaded are left out
    for case_id in ("100000_00001", "100999_00001"):
        file = labels / "automatic_labels" / f"{case_id}.nii.gz"
        imageio.write_label(file, volume(5, values)[1], GEOMETRY)
    return folder


def check_case(raw, case_id, seed, values, recode):
    case = {c.id: c for c in raw.cases}[case_id]
    found = raw_dataset.read_case(case, raw.labels)
    image, label = volume(seed, values)
    np.testing.assert_array_equal(found.image[0], image)
    np.testing.assert_array_equal(found.label, np.vectorize(recode.get)(label))
    written, _ = imageio.read_label(case.label)
    # NIfTI holds its matrix in float32
    assert geometry_differences(found.geometry, GEOMETRY) == ()
    assert geometry_differences(imageio.read_label(case.label)[1], GEOMETRY) == ()
    assert written.shape == GEOMETRY.shape_zyx


def test_panther(tmp_path, capsys):
    source = panther_download(tmp_path / "download")
    same = {0: 0, 1: 1, 2: 2}
    for task, ids in (("t1", ["10000_0001", "10003_0001"]), ("t2", ["10303"])):
        out = tmp_path / f"Dataset90{task[1]}"
        assert run("panther", "--source", source, "--task", task, "--out", out) == 0
        assert capsys.readouterr().out.strip() == str(out)
        raw = raw_dataset.open_raw(out)
        assert [c.id for c in raw.cases] == ids and raw.file_ending == ".mha"
        assert raw.dataset["labels"] == {"background": 0, "tumor": 1, "pancreas": 2}
        assert raw.dataset["numTraining"] == len(ids)
        assert raw.dataset["channel_names"] == {"0": "MRI"}
        for seed, case_id in enumerate(ids):
            check_case(raw, case_id, seed, [0, 1, 2], same)
    inner = source / "PANTHER_Task2"
    assert run("panther", "--source", inner, "--task", "t1", "--out", tmp_path / "x") == 1
    assert "no folder named 'imagestr'" in capsys.readouterr().err
    assert run("panther", "--source", inner, "--task", "t2", "--out", tmp_path / "x") == 0


def test_msd(tmp_path):
    out = tmp_path / "Dataset007"
    assert run("msd", "--source", msd_download(tmp_path / "download"), "--out", out) == 0
    raw = raw_dataset.open_raw(out)
    assert [c.id for c in raw.cases] == ["pancreas_001", "pancreas_004"]
    assert raw.dataset["channel_names"] == {"0": "CT"}
    for seed, case in enumerate(raw.cases):
        check_case(raw, case.id, seed, [0, 1, 2], {0: 0, 1: 2, 2: 1})


@pytest.mark.parametrize("manual_only", [False, True])
def test_panorama(tmp_path, manual_only):
    out, source = tmp_path / "Dataset008", panorama_download(tmp_path / "download")
    options = ["--manual-only"] if manual_only else []
    assert run("panorama", "--source", source, "--out", out, *options) == 0
    raw = raw_dataset.open_raw(out)
    recode = {0: 0, 1: 1, 2: 0, 3: 0, 4: 2, 5: 2, 6: 0}
    ids = ["100000_00001"] if manual_only else ["100000_00001", "100001_00001"]
    assert [c.id for c in raw.cases] == ids
    for seed, case_id in enumerate(ids):
        check_case(raw, case_id, seed, list(range(7)), recode)


def test_panorama_labels_of_real_lesions(sample_data, tmp_path):
    """Real label maps with made-up scans: every voxel of lesion, parenchyma and duct arrives."""
    files = sorted((sample_data / "panorama_labels").glob("*.nii.gz"))[:2]
    if not files:
        pytest.skip("no PANORAMA label maps")
    for path in files:
        label, geometry = imageio.read_label(path)
        source = tmp_path / "download" / "manual_labels" / path.name
        imageio.write_label(source, label, geometry)
        scan = tmp_path / "download" / path.name.replace(".nii.gz", "_0000.nii.gz")
        imageio.write_image(scan, label.astype(np.int16), geometry)
    out = tmp_path / "Dataset008"
    assert run("panorama", "--source", tmp_path / "download", "--out", out) == 0
    for path in files:
        label, geometry = imageio.read_label(path)
        found, kept = imageio.read_label(out / "labelsTr" / path.name)
        np.testing.assert_array_equal(found == 1, label == 1)
        np.testing.assert_array_equal(found == 2, (label == 4) | (label == 5))
        assert geometry_differences(kept, geometry) == ()


# --------------------------------------------------------------------------------------- merging


def named_raw(folder, names, **options):
    """A tiny dataset whose cases have the given names."""
    make_raw(folder, num_cases=len(names), **options)
    for number, name in enumerate(names):
        for sub, old, new in (
            ("imagesTr", f"case_{number}_0000.mha", f"{name}_0000.mha"),
            ("labelsTr", f"case_{number}.mha", f"{name}.mha"),
        ):
            (folder / sub / old).rename(folder / sub / new)
    return folder


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    tumor_only=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_merging_never_loses_a_case(sizes, tumor_only, tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    inputs, expected = [], {}
    for number, size in enumerate(sizes):
        names = [f"d{number}_{i}" for i in range(size)]
        folder = named_raw(root / f"Dataset{number:03d}_In", names, shape=(6, 6, 6))
        inputs.append(folder)
        expected |= {name: folder for name in names}
    out = root / "Dataset999_Out"
    options = ["--tumor-only"] if tumor_only else []
    assert run("merge", "--inputs", *inputs, "--out", out, *options) == 0
    raw = raw_dataset.open_raw(out)
    assert [c.id for c in raw.cases] == sorted(expected)
    assert raw.dataset["numTraining"] == len(expected)
    for case in raw.cases:
        source = expected[case.id]
        image = source / "imagesTr" / case.images[0].name
        assert case.images[0].read_bytes() == image.read_bytes()
        label, _ = imageio.read_label(source / "labelsTr" / case.label.name)
        found, _ = imageio.read_label(case.label)
        np.testing.assert_array_equal(found, label == 1 if tumor_only else label)


def test_labels_are_matched_by_name(tmp_path):
    msd_coding = {"background": 0, "pancreas": 1, "tumor": 2}
    a = named_raw(tmp_path / "Dataset001_A", ["a"])
    b = named_raw(tmp_path / "Dataset002_B", ["b"], labels=msd_coding)
    for options, recode in (([], {0: 0, 1: 2, 2: 1}), (["--tumor-only"], {0: 0, 1: 0, 2: 1})):
        out = tmp_path / f"Dataset9{len(options)}"
        assert run("merge", "--inputs", a, b, "--out", out, *options) == 0
        stored, _ = imageio.read_label(b / "labelsTr" / "b.mha")
        found, _ = imageio.read_label(out / "labelsTr" / "b.mha")
        np.testing.assert_array_equal(found, np.vectorize(recode.get)(stored))


def test_what_cannot_be_merged_is_refused(tmp_path, capsys):
    a = named_raw(tmp_path / "Dataset001_A", ["x", "y"])
    b = named_raw(tmp_path / "Dataset002_B", ["y", "z"])
    out = tmp_path / "out"
    assert run("merge", "--inputs", a, b, "--out", out) == 1
    message = capsys.readouterr().err
    assert "1 case names are in two datasets" in message and "y: " in message
    other = {"background": 0, "tumor": 1, "duct": 2}
    c = named_raw(tmp_path / "Dataset003_C", ["c"], labels=other)
    assert run("merge", "--inputs", a, c, "--out", out) == 1
    assert "only datasets of the same labels" in capsys.readouterr().err
    assert run("merge", "--inputs", a, "--out", out, "--task1-in-all") == 1
    assert "no case is of task 1" in capsys.readouterr().err
    assert not out.exists()
    header = json.loads((c / "dataset.json").read_text())
    (c / "dataset.json").write_text(json.dumps(header | {"channel_names": {"0": "CT"}}))
    with pytest.raises(DatasetError, match="same channels"):
        merging.merged_source([a, c])


def test_other_endings_are_converted(tmp_path):
    a = named_raw(tmp_path / "Dataset001_A", ["a"])
    source = msd_download(tmp_path / "download")
    run("msd", "--source", source, "--out", tmp_path / "Dataset002_B")
    header = tmp_path / "Dataset002_B" / "dataset.json"
    header.write_text(header.read_text().replace('"CT"', '"MRI"'))
    out = tmp_path / "Dataset999"
    assert run("merge", "--inputs", a, tmp_path / "Dataset002_B", "--out", out) == 0
    check_case(raw_dataset.open_raw(out), "pancreas_004", 1, [0, 1, 2], {0: 0, 1: 2, 2: 1})


def task_sets(tmp_path):
    t1 = named_raw(tmp_path / "Dataset901_A", [f"1{i:04d}_0001" for i in range(7)], shape=(6, 6, 6))
    t2 = named_raw(tmp_path / "Dataset902_B", [f"103{i:02d}" for i in range(6)], shape=(6, 6, 6))
    return t1, t2


def test_splits_of_merged_sets(tmp_path):
    t1, t2 = task_sets(tmp_path)
    raws = [raw_dataset.open_raw(folder) for folder in (t1, t2)]
    one, two = (splits.make_splits([c.id for c in raw.cases]) for raw in raws)
    assert run("merge", "--inputs", t1, t2, "--out", tmp_path / "Dataset903") == 0
    joined = splits.read_splits(tmp_path / "Dataset903" / "splits_final.json")
    assert joined == tuple(((*a[0], *b[0]), (*a[1], *b[1])) for a, b in zip(one, two, strict=True))
    assert run("merge", "--inputs", t1, t2, "--out", tmp_path / "x", "--task1-in-all") == 0
    in_all = splits.read_splits(tmp_path / "x" / "splits_final.json")
    task1 = tuple(c.id for c in raws[0].cases)
    assert in_all == tuple(((*task1, *train), val) for train, val in two)
    # splits that a dataset brings along are kept
    own = [{"train": ["10300", "10301"], "val": ["10302"]}]
    (t2 / "splits_final.json").write_text(json.dumps(own))
    assert merging.merged_splits([raw_dataset.open_raw(t2)]) == ((("10300", "10301"), ("10302",)),)
    with pytest.raises(DatasetError, match="different numbers of folds"):
        merging.merged_splits(raws)


def test_cases_without_a_label_are_left_out(tmp_path, capsys):
    a = named_raw(tmp_path / "Dataset001_A", ["a1", "a2", "a3"])
    coding = {"background": 0, "pancreas": 1, "tumor": 2}  # the label is found by its name
    b = named_raw(tmp_path / "Dataset002_B", [f"b{i}" for i in range(6)], labels=coding)
    for folder, case, value in ((a, "a2", 1), (b, "b0", 2), (b, "b4", 2)):
        path = folder / "labelsTr" / f"{case}.mha"
        label, geometry = imageio.read_label(path)
        label[label == value] = 0
        imageio.write_label(path, label, geometry)
    out = tmp_path / "Dataset999"
    (a / "splits_final.json").write_text(json.dumps([{"train": ["a1", "a2"], "val": ["a3"]}]))
    (b / "splits_final.json").write_text(json.dumps([{"train": ["b1", "b0"], "val": ["b4", "b5"]}]))
    assert run("merge", "--inputs", a, b, "--out", out, "--with-label", "tumor") == 0
    assert "Dataset002_B: 4 of 6 cases hold tumor" in capsys.readouterr().err
    raw = raw_dataset.open_raw(out)
    assert [c.id for c in raw.cases] == ["a1", "a3", "b1", "b2", "b3", "b5"]
    assert raw.dataset["numTraining"] == 6
    assert splits.read_splits(out / "splits_final.json") == ((("a1", "b1"), ("a3", "b5")),)
    assert run("merge", "--inputs", a, b, "--out", tmp_path / "x", "--with-label", "duct") == 1
    assert "no label 'duct'; there are: background, tumor, pancreas" in capsys.readouterr().err
    assert run("merge", "--inputs", a, b, "--out", out) == 1  # another conversion lies there
    assert "holds another conversion" in capsys.readouterr().err


# ------------------------------------------------------------------------- resuming, broken cases


def test_a_conversion_continues_and_is_not_overwritten(tmp_path, capsys):
    source, out = msd_download(tmp_path / "download"), tmp_path / "Dataset007"
    assert run("msd", "--source", source, "--out", out) == 0
    kept = out / "labelsTr" / "pancreas_001.nii.gz"
    times = kept.stat().st_mtime_ns
    (out / "labelsTr" / "pancreas_004.nii.gz").unlink()
    capsys.readouterr()
    assert run("msd", "--source", source, "--out", out) == 0
    messages = capsys.readouterr().err
    assert "1 of 2 cases are already there" in messages and "converted pancreas_004" in messages
    assert kept.stat().st_mtime_ns == times
    assert run("panorama", "--source", panorama_download(tmp_path / "p"), "--out", out) == 1
    assert "holds another conversion" in capsys.readouterr().err
    assert run("panorama", "--source", tmp_path / "p", "--out", out, "--overwrite") == 0
    assert len(raw_dataset.open_raw(out).cases) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert run("msd", "--source", source, "--out", tmp_path / "mine", "--overwrite") == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_links_share_the_file(tmp_path):
    source, out = msd_download(tmp_path / "download"), tmp_path / "Dataset007"
    assert run("msd", "--source", source, "--out", out, "--link") == 0
    image = source / "Task07_Pancreas" / "imagesTr" / "pancreas_001.nii.gz"
    assert (out / "imagesTr" / "pancreas_001_0000.nii.gz").samefile(image)


def bad_inputs(folder):
    """A dataset with one case of every kind of damage, and two sound ones; case -> its message."""
    names = ["colour", "cut", "empty", "four_d", "good", "infinite", "nan", "other_size", "sound"]
    names += ["undeclared", "zero_spacing"]
    make_raw(folder, num_cases=len(names))
    import SimpleITK as sitk

    label_ids = {}
    for number, name in enumerate(names):
        label, geometry = imageio.read_label(folder / "labelsTr" / f"case_{number}.mha")
        image, _ = imageio.read_image([folder / "imagesTr" / f"case_{number}_0000.mha"])
        label_ids[name] = (image[0], label, geometry)
    for sub in ("imagesTr", "labelsTr"):
        shutil.rmtree(folder / sub)
    for name, (image, label, geometry) in label_ids.items():
        image_path = folder / "imagesTr" / f"{name}_0000.nii.gz"
        if name in ("nan", "infinite"):
            image[0, 0, 0] = np.nan if name == "nan" else np.inf
        if name in ("colour", "four_d"):
            image_path.parent.mkdir(parents=True, exist_ok=True)
            stacked = np.stack([image] * 3, axis=-1 if name == "colour" else 0)
            made = sitk.GetImageFromArray(stacked.astype(np.float32), isVector=name == "colour")
            sitk.WriteImage(made, str(image_path))
        else:
            imageio.write_image(image_path, image, geometry)
        if name == "cut":
            image_path.write_bytes(image_path.read_bytes()[:-200])
        if name == "zero_spacing":
            set_nifti_spacing(image_path, 0.0)
        if name == "other_size":
            shape = (5, 5, 5)
            label, geometry = label[:5, :5, :5], Geometry(shape, (1.0,) * 3, (0.0,) * 3, IDENTITY)
        label = label * {"empty": 0, "undeclared": 3}.get(name, 1)
        imageio.write_label(folder / "labelsTr" / f"{name}.nii.gz", label, geometry)
    header = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(header | {"file_ending": ".nii.gz"}))
    return {
        "colour": "each voxel holds 3 values",
        "cut": "cannot be read",
        "four_d": "4 dimensions",
        "infinite": "NaN or infinite",
        "nan": "NaN or infinite",
        "other_size": "label shape (5, 5, 5) voxels differs",
        "undeclared": "not",
        "zero_spacing": "is not positive",
    }


def set_nifti_spacing(path, value):
    import gzip
    import struct

    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", data, 80, value)
    path.write_bytes(gzip.compress(bytes(data)))


def test_every_bad_input_is_named_and_the_others_are_done(tmp_path, capsys):
    raw = tmp_path / "Dataset001_Bad"
    expected = bad_inputs(raw)
    assert run("check", raw) == 1
    check_messages(capsys.readouterr().err, expected, "{}: ")
    out = tmp_path / "Dataset002_Merged"
    assert run("merge", "--inputs", raw, "--out", out) == 1
    check_messages(capsys.readouterr().err, expected, "case {!r}: ")
    assert [c.id for c in raw_dataset.open_raw(out).cases] == ["empty", "good", "sound"]
    stored = tmp_path / "store"
    arguments = ["--raw", str(raw), "--config", "smoke.py", "--out", str(stored)]
    assert preprocess.main(arguments) == 1
    check_messages(capsys.readouterr().err, expected, "case {!r}: ")
    assert store.stored_ids(stored) == ("empty", "good", "sound")


def check_messages(text, expected, *forms):
    """Each case is listed with what is wrong with it, and no sound case is."""
    for case_id, message in expected.items():
        assert any(form.format(case_id) in text for form in forms), case_id
        lines = [line for line in text.splitlines() if case_id in line]
        assert any(message in line for line in lines), f"{case_id}: {message} not in\n{text}"
    for case_id in ("good", "sound"):
        assert not any(form.format(case_id) in text for form in forms)


def test_empty_labels_fail_a_check_unless_meant(tmp_path, capsys):
    raw = make_raw(tmp_path / "Dataset001_Toy", num_cases=2)
    path = raw / "labelsTr" / "case_1.mha"
    label, geometry = imageio.read_label(path)
    imageio.write_label(path, label * 0, geometry)
    assert run("check", raw) == 1
    assert "without foreground: case_1" in capsys.readouterr().err
    assert run("check", raw, "--allow-empty", "--quiet") == 0


def test_repeated_labels_are_named(tmp_path, capsys):
    raw = make_raw(tmp_path / "Dataset001_Toy", num_cases=1)
    path = raw / "dataset.json"
    text = path.read_text()
    for old, new, message in (
        ('"tumor": 1,', '"tumor": 1, "tumor": 1,', "'tumor' occurs twice"),
        ('"pancreas": 2', '"pancreas": 1', "labels tumor and pancreas share the value 1"),
        ('"background": 0, ', "", "'background': 0 is mandatory"),
        ('"pancreas": 2', '"pancreas": 3', "consecutive"),
        ('"labels": ', '"label": ', "key 'labels' is missing"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        assert run("check", raw) == 1
        assert message in capsys.readouterr().err


def test_a_file_without_its_counterpart_is_named(tmp_path, capsys):
    source, out = msd_download(tmp_path / "download"), tmp_path / "Dataset007"
    (source / "Task07_Pancreas" / "labelsTr" / "pancreas_001.nii.gz").unlink()
    assert run("msd", "--source", source, "--out", out) == 1
    message = capsys.readouterr().err
    assert "case 'pancreas_001': no label map for" in message and "the other 1 are in" in message
    assert [c.id for c in raw_dataset.open_raw(out).cases] == ["pancreas_004"]
