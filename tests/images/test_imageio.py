"""Reading and writing: the stored grid survives, and every bad file is named with its cure."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IDENTITY, make_raw

from panther_jax.base.errors import DatasetError
from panther_jax.images import imageio, raw_dataset
from panther_jax.images.geometry import geometry_differences
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels

LABELS = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
PIXELS = {"8-bit unsigned integer": np.uint8, "16-bit unsigned integer": np.uint16}


@pytest.mark.golden
def test_files_are_read_and_written_as_the_reference_does(golden, tmp_path):
    import SimpleITK as sitk

    folder = golden / "preprocessing"
    records = json.loads((folder / "io_records.json").read_text())
    arrays = np.load(folder / "io_arrays.npz")
    for name, record in records.items():
        image, geometry = imageio.read_image([folder / name])
        stem = name.split("/")[-1].split("_")[0]
        np.testing.assert_array_equal(image, arrays[stem])
        assert list(image.shape) == record["read_shape"]
        assert str(image.dtype) == record["read_dtype"]
        stored = record["properties"]["sitk_stuff"]
        # 1e-6: the headers hold float32 numbers.
        np.testing.assert_allclose(geometry.spacing_zyx, record["properties"]["spacing"], atol=1e-6)
        np.testing.assert_allclose(geometry.origin_xyz, stored["origin"], atol=1e-6)
        np.testing.assert_allclose(geometry.direction, stored["direction"], atol=1e-6)
        label = arrays[stem.replace("img", "seg")]
        path = tmp_path / "label.nii.gz"
        imageio.write_label(path, label.reshape(label.shape[-3:]), geometry)
        written = sitk.ReadImage(str(path))
        assert written.GetPixelIDTypeAsString() == record["written_pixel_type"]
        np.testing.assert_allclose(written.GetSpacing(), record["written_spacing"], atol=1e-6)
        np.testing.assert_allclose(written.GetOrigin(), record["written_origin"], atol=1e-5)
        np.testing.assert_allclose(written.GetDirection(), record["written_direction"], atol=1e-6)
        again, _ = imageio.read_label(path)
        np.testing.assert_array_equal(again, label.reshape(label.shape[-3:]))
    assert records


AXES = [
    np.eye(3)[list(p)] * np.array(s)[:, None]
    for p in itertools.permutations(range(3))
    for s in itertools.product((1, -1), repeat=3)
]


@settings(max_examples=25, deadline=None)
@given(
    direction=st.sampled_from(AXES),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    spacing=st.tuples(*[st.floats(0.25, 8)] * 3),
    ending=st.sampled_from([".mha", ".nii.gz", ".nrrd"]),
)
def test_any_orientation_survives(tmp_path_factory, direction, shape, spacing, ending):
    path = tmp_path_factory.mktemp("io") / f"image{ending}"
    geometry = Geometry(shape, spacing, (-3.5, 20.25, 7.0), tuple(direction.ravel().tolist()))
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    imageio.write_image(path, image, geometry)
    found, again = imageio.read_image([path])
    np.testing.assert_array_equal(found[0], image)
    assert geometry_differences(again, geometry) == ()
    np.testing.assert_allclose(again.spacing_zyx, spacing, rtol=1e-6)  # NIfTI: float32
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def box(shape=(3, 4, 5), value=1.0):
    return np.full(shape, value, np.float32)


def plain(shape=(3, 4, 5), spacing=(2.0, 1.0, 1.0)):
    return Geometry(shape, spacing, (0.0, 0.0, 0.0), IDENTITY)


def write_itk(path, array, *, vector=False):
    import SimpleITK as sitk

    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))


def test_bad_images_are_named(tmp_path):
    good = tmp_path / "good_0000.mha"
    imageio.write_image(good, box(), plain())

    def refused(path, *words, paths=None):
        with pytest.raises((DatasetError, FileNotFoundError)) as error:
            imageio.read_image(paths or [path])
        text = str(error.value)
        assert path.name in text and all(w in text for w in words), text

    refused(tmp_path / "gone.mha", "does not exist")
    for value in (np.nan, np.inf):
        array = box()
        array[1, 1, 1] = value
        imageio.write_image(tmp_path / "holes.mha", array, plain())
        refused(tmp_path / "holes.mha", "1")
    write_itk(tmp_path / "four.nii.gz", np.zeros((2, 3, 4, 5), np.float32))
    refused(tmp_path / "four.nii.gz", "4")
    write_itk(tmp_path / "rgb.mha", np.zeros((3, 4, 5, 3), np.uint8), vector=True)
    refused(tmp_path / "rgb.mha")
    (tmp_path / "text.nii.gz").write_text("not an image")
    refused(tmp_path / "text.nii.gz")
    (tmp_path / "empty.mha").write_bytes(b"")
    refused(tmp_path / "empty.mha")
    whole = good.read_bytes()
    (tmp_path / "cut.mha").write_bytes(whole[: len(whole) - 12])
    refused(tmp_path / "cut.mha")
    imageio.write_image(
        tmp_path / "whole.nii.gz", np.random.rand(8, 9, 10).astype(np.float32), plain((8, 9, 10))
    )
    packed = (tmp_path / "whole.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    refused(tmp_path / "cut.nii.gz")
    unpacked = gzip.decompress(packed)
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(unpacked[:-100]))
    refused(tmp_path / "short.nii.gz")
    other = tmp_path / "other_0001.mha"
    imageio.write_image(other, box((3, 4, 6)), plain((3, 4, 6)))
    refused(other, "(3, 4, 6)", paths=[good, other])


def test_bad_labels_are_named(tmp_path):
    imageio.write_image(tmp_path / "half.mha", box(value=0.5), plain())
    with pytest.raises(DatasetError, match=r"half.mha: 60 label voxels are not whole numbers"):
        imageio.read_label(tmp_path / "half.mha")
    with pytest.raises(DatasetError, match="-1 to -1"):
        imageio.write_label(tmp_path / "x.mha", np.full((3, 4, 5), -1), plain())
    with pytest.raises(DatasetError, match="shape"):
        imageio.write_label(tmp_path / "x.mha", np.zeros((3, 4, 4), int), plain())
    assert not (tmp_path / "x.mha").exists()


def test_cases_are_found_and_checked(tmp_path):
    raw = raw_dataset.open_raw(make_raw(tmp_path / "Dataset001_Toy", num_cases=3))
    assert [c.id for c in raw.cases] == ["case_0", "case_1", "case_2"]
    assert raw.num_channels == 1 and raw.file_ending == ".mha"
    case = raw_dataset.read_case(raw.cases[0], raw.labels)
    assert case.image.shape == (1, 12, 24, 24) and case.label.shape == (12, 24, 24)
    assert set(np.unique(case.label)) == {0, 1, 2}
    few = Labels((("background", 0), ("tumor", 1)))
    with pytest.raises(DatasetError, match=r"'case_0': label values 2 \(\d+ voxels\).*\[0, 1\]"):
        raw_dataset.read_case(raw.cases[0], few)


@pytest.mark.parametrize("values", [[0], [-1, 0, 1, 2], [0, 300, 40_000], [0, 1, 200_000]])
def test_label_values_are_counted(monkeypatch, values):
    label = np.sort(np.random.default_rng(0).choice(values, (7, 9, 11)).astype(np.int32), axis=0)
    for part in (2, 50, 10_000):  # parts of one value, of several, and the whole
        monkeypatch.setattr(imageio, "COUNTED_AT_ONCE", part)
        for array in (label, label.transpose(2, 0, 1)):
            found = imageio.label_values(array)
            for ours, numpys in zip(found, np.unique(label, return_counts=True), strict=True):
                np.testing.assert_array_equal(ours, numpys)


def test_a_label_on_another_grid_is_named(tmp_path):
    raw = raw_dataset.open_raw(make_raw(tmp_path / "Dataset001_Toy", num_cases=1))
    label, geometry = imageio.read_label(raw.cases[0].label)
    moved = Geometry(geometry.shape_zyx, (6.0, 6.0, 6.1), geometry.origin_xyz, geometry.direction)
    imageio.write_label(raw.cases[0].label, label, moved)
    with pytest.raises(DatasetError, match=r"case 'case_0': label spacing .*6.1.*differs from"):
        raw_dataset.read_case(raw.cases[0], raw.labels)
    close = Geometry(geometry.shape_zyx, (6.0, 6.0, 6.00001), geometry.origin_xyz, IDENTITY)
    imageio.write_label(raw.cases[0].label, label, close)
    assert raw_dataset.read_case(raw.cases[0], raw.labels).id == "case_0"


def test_what_is_missing_is_listed_all_at_once(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_Toy", num_cases=4)
    (folder / "labelsTr" / "case_1.mha").unlink()
    (folder / "imagesTr" / "case_2_0000.mha").rename(folder / "imagesTr" / "case_2_0001.mha")
    (folder / "imagesTr" / "stray.mha").write_bytes(b"")
    with pytest.raises(DatasetError) as error:
        raw_dataset.open_raw(folder)
    text = str(error.value)
    assert "case_1: missing label" in text and "case_2" in text and "stray_0000.mha" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels"),
        ({"labels": {"background": 1, "tumor": 0}}, "background"),
        ({"labels": {"background": 0, "tumor": 2}}, "consecutive"),
        ({"labels": {"background": 0, "tumor": "one"}}, "tumor"),
        ({"channel_names": None}, "channel_names"),
        ({"channel_names": {"1": "MRI"}}, "channel_names"),
        ({"file_ending": ".jpg"}, "file_ending"),
        ({"numTraining": None}, "numTraining"),
    ],
)
def test_a_dataset_json_that_cannot_be_used(tmp_path, change, message):
    folder = make_raw(tmp_path / "Dataset001_Toy", num_cases=1)
    dataset = json.loads((folder / "dataset.json").read_text()) | change
    text = json.dumps({k: v for k, v in dataset.items() if v is not None})
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        raw_dataset.open_raw(folder)
