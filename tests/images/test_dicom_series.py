"""Series are found, told apart and read as SimpleITK reads them; what is no volume is named."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import dicom_files as made
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import Stack
from pydicom.data import get_testdata_file

from panther_jax.images import dicom_files, dicom_series
from panther_jax.images.dicom_files import DicomError
from panther_jax.images.dicom_series import find_series, listing, read_series, select
from panther_jax.images.geometry import geometry_differences

AXES = [
    (np.eye(3)[list(order)] * np.array(signs)[:, None])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
PRIVATE = ("ller", "J\xf6rg", made.NUMBER, "19500102", "ACC-12345", "House", "General Hospital")


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Let caplog hear, whatever a command run before did to the logger."""
    monkeypatch.setattr(dicom_series.LOGGER, "propagate", True)


def read_by_itk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    return sitk.GetArrayFromImage(image), image


def require_equal(folder):
    """Read the only series of a folder; equal to what SimpleITK's series reader gives."""
    (series,) = find_series(folder).series
    image, geometry = read_series(series)
    array, theirs = read_by_itk(folder)
    assert image.dtype == np.float32 and image.shape == (1, *array.shape)
    np.testing.assert_array_equal(image[0], array.astype(np.float32))
    # headers hold 6 to 8 decimals
    np.testing.assert_allclose(geometry.spacing_zyx[::-1], theirs.GetSpacing(), atol=2e-6)
    np.testing.assert_allclose(geometry.origin_xyz, theirs.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(geometry.direction, theirs.GetDirection(), atol=1e-6)
    return series, image, geometry


@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("number", range(len(AXES)))
def test_all_orientations_read_as_simpleitk_does(number, oblique, tmp_path):
    """48 ways to lay rows, columns and the order of slices; files in shuffled order."""
    axes = AXES[number] @ (made.turned().T if oblique else np.eye(3))
    stack = Stack(
        made.phantom((4, 6, 5), seed=number),
        row=tuple(axes[0]),
        column=tuple(axes[1]),
        step=tuple(2.5 * axes[2]),  # against the normal in half of them
    )
    made.write(tmp_path, stack, seed=number)
    _, image, geometry = require_equal(tmp_path)
    forward = np.linalg.det(axes) > 0
    np.testing.assert_array_equal(image[0], stack.voxels[:: 1 if forward else -1])
    # a voxel is where its own header puts it
    k, i, j = 3, 4, 2
    index = np.array([j, i, k if forward else 3 - k]) * geometry.spacing_zyx[::-1]
    place = geometry.origin_xyz + np.array(geometry.direction).reshape(3, 3) @ index
    expected = stack.position(k) + i * 1.5 * axes[1] + j * 1.25 * axes[0]
    np.testing.assert_allclose(place, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_values_of_each_type_and_rescaling_by_slice(dtype, tmp_path):
    rescale = tuple((0.5 + 0.25 * k, -1000.0 + k) for k in range(7))
    for name, modality, pairs in (("ct", "CT", (1.0, -1024.0)), ("mr", "MR", rescale)):
        stack = Stack(made.phantom(dtype=dtype), modality=modality, rescale=pairs)
        made.write(tmp_path / name, stack)
        _, image, _ = require_equal(tmp_path / name)
    expected = np.stack([stack.voxels[k].astype(float) * s + i for k, (s, i) in enumerate(rescale)])
    np.testing.assert_array_equal(image[0], expected.astype(np.float32))


@pytest.mark.parametrize("modality", ["EMR", "ECT"])
def test_enhanced_files_read_as_single_ones_do(modality, tmp_path):
    stack = Stack(
        made.phantom(),
        *made.turned()[:2].tolist(),
        modality=modality[1:],
        rescale=tuple((1.0 + k, -5.0) for k in range(7)),
    )
    made.write(tmp_path / "single", stack)
    several = dataclasses.replace(stack, modality=modality)
    made.write_enhanced(tmp_path / "enhanced" / "a.dcm", several, order=[3, 1, 0, 2, 5, 6, 4])
    single, enhanced = (
        read_series(find_series(tmp_path / n).series[0]) for n in ("single", "enhanced")
    )
    np.testing.assert_array_equal(enhanced[0], single[0])
    assert geometry_differences(enhanced[1], single[1]) == ()
    (alone,) = find_series(tmp_path / "enhanced" / "a.dcm").series
    assert alone.size == "10 x 12 x 7"


def test_high_bits_that_belong_to_an_overlay_are_not_voxels(tmp_path):
    stack = Stack(made.phantom(dtype=np.uint16))
    for k in range(7):
        dataset = made.single(stack, k)
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.PixelData = (stack.voxels[k] | 0x8000).tobytes()
        dataset.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    _, image, _ = require_equal(tmp_path)
    np.testing.assert_array_equal(image[0], stack.voxels)


# ---------------------------------------------------------------------------------- compression


def test_lossless_jpeg_is_read_by_gdcm(tmp_path):
    """Written by SimpleITK: pydicom has no decoder for what most archives compress with."""
    voxels = made.phantom((3, 16, 18), dtype=np.uint16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k, plane in enumerate(voxels):
        image = sitk.GetImageFromArray(plane)
        tags = {
            "0008|0060": "CT", "0008|0018": f"1.2.3.{k + 1}", "0020|000e": "1.2.3.9",
            "0020|000d": "1.2.3.8", "0020|0052": "1.2.3.7", "0020|0032": f"0\\0\\{2 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0", "0028|1053": "2", "0028|1052": "-1000",
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL", "0008|0016": made.CLASSES["CT"],
        }  # fmt: skip
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        image.SetSpacing((1.5, 2.5))
        writer.SetFileName(str(tmp_path / f"{k}.dcm"))
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.Execute(image)
    header = pydicom.dcmread(tmp_path / "0.dcm", stop_before_pixels=True)
    assert header.file_meta.TransferSyntaxUID in dicom_files.ITK_DECODES
    require_equal(tmp_path)


@pytest.mark.parametrize("syntax", [pydicom.uid.RLELossless, pydicom.uid.JPEGLSLossless])
def test_what_pydicom_decodes_is_read(syntax, tmp_path):
    stack = Stack(made.phantom(dtype=np.uint16), rescale=(2.0, 1.0))
    for k in range(7):
        dataset = made.single(stack, k)
        dataset.compress(syntax)
        dataset.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    _, image, _ = require_equal(tmp_path)
    np.testing.assert_array_equal(image[0], 2.0 * stack.voxels + 1)


def test_other_compressions_are_named(tmp_path):
    stack = Stack(made.phantom(dtype=np.uint16))
    for k in range(7):
        dataset = made.single(stack, k)
        dataset.PixelData = pydicom.encaps.encapsulate([b"\x00\x01"])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        dataset.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    with pytest.raises(
        DicomError, match=r"High-Throughput JPEG 2000.*1\.2\.840\.10008\.1\.2\.4\.2"
    ):
        read_series(find_series(tmp_path).series[0])


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "CT_small.dcm",
    ],
)
def test_real_files_of_pydicom(name, tmp_path):
    """One slice is refused as a volume; moved copies of it make one, with its own values."""
    source = get_testdata_file(name, download=False)
    shutil.copy(source, tmp_path / "0.dcm")
    (series,) = find_series(tmp_path).series
    assert "single slice" in series.problem
    original = pydicom.dcmread(source)
    for k in (1, 2):
        dataset = pydicom.dcmread(source)
        dataset.SOPInstanceUID += f".{k}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, round(z + 4.0 * k, 3)]
        dataset.save_as(tmp_path / f"{k}.dcm")
    _, image, _ = require_equal(tmp_path)
    slope = float(original.get("RescaleSlope", 1))
    shift = float(original.get("RescaleIntercept", 0))
    np.testing.assert_array_equal(image[0, 1], original.pixel_array * slope + shift)


def test_a_real_enhanced_ct():
    """Its normal points to the feet: SimpleITK keeps the file's order with a mirrored direction."""
    source = get_testdata_file("eCT_Supplemental.dcm", download=False)
    if source is None:
        pytest.skip("pydicom-data is not installed")
    (series,) = find_series(Path(source)).series
    image, geometry = read_series(series)
    theirs = sitk.ReadImage(source)
    np.testing.assert_array_equal(image[0, ::-1], sitk.GetArrayFromImage(theirs))
    axes = np.array(geometry.direction).reshape(3, 3)
    assert np.linalg.det(axes) == pytest.approx(1)
    last = geometry.origin_xyz + axes[:, 2] * geometry.spacing_zyx[0]
    np.testing.assert_allclose(last, theirs.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(geometry.spacing_zyx[::-1], theirs.GetSpacing(), atol=1e-6)


@pytest.mark.parametrize("name", ["rtstruct.dcm", "rtdose.dcm", "SC_rgb_rle.dcm", "test-SR.dcm"])
def test_real_files_that_are_no_volume(name, tmp_path):
    shutil.copy(get_testdata_file(name, download=False), tmp_path / "a.dcm")
    try:
        (series,) = find_series(tmp_path).series
    except DicomError as error:
        assert "holds no DICOM image" in str(error)
    else:
        with pytest.raises(DicomError, match="modality|colour"):
            read_series(series)


# ------------------------------------------------------------------------------- what is refused


def refused(folder, *words, number=0):
    """The problem of a series, which read_series raises; it names nothing of the patient."""
    series = find_series(folder).series[number]
    with pytest.raises(DicomError) as error:
        read_series(series)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n  " in text, f"no remedy: {text}"
    assert not any(word in text for word in (*PRIVATE, series.uid)), text
    return text


def test_missing_slices(tmp_path):
    made.write(tmp_path, Stack(made.phantom((9, 4, 4))), only=set(range(9)) - {3, 6, 7})
    refused(tmp_path, "3 slice(s) are missing", "after slice 3 of 6", "5 mm")


def test_uneven_spacing(tmp_path):
    stack = Stack(made.phantom((5, 4, 4)))
    for k, path in enumerate(made.write(tmp_path, stack)):
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient[2] += 0.4 * (k == 4)
        dataset.save_as(path)
    refused(tmp_path, "not evenly spaced (2.5 to 2.9 mm)")


def test_rounded_positions_are_even(tmp_path):
    stack = Stack(made.phantom((5, 4, 4)))
    for k, path in enumerate(made.write(tmp_path, stack)):
        dataset = pydicom.dcmread(path)
        dataset.ImagePositionPatient[2] += 0.004 * (k % 2)
        dataset.save_as(path)
    assert find_series(tmp_path).series[0].problem == ""


def test_gantry_tilt(tmp_path):
    made.write(tmp_path, Stack(made.phantom(), modality="CT", step=(0.0, 0.6, 2.5)))
    refused(tmp_path, "not stacked straight", "3.6 mm", "13.5 degrees")


def test_a_single_slice_and_a_localizer(tmp_path):
    made.write(tmp_path / "one", Stack(made.phantom((1, 4, 4))))
    refused(tmp_path / "one", "single slice")
    kind = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    made.write(tmp_path / "scout", Stack(made.phantom(), extra=kind))
    refused(tmp_path / "scout", "localizer")


def test_a_localizer_inside_a_series_is_left_out_and_said(tmp_path, caplog):
    made.write(tmp_path, Stack(made.phantom()))
    scout = made.single(Stack(made.phantom((1, 20, 20))), 0)
    scout.ImageType, scout.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], "1.2.3.4.5.99"
    scout.save_as(tmp_path / "scout", enforce_file_format=True)
    (series,) = find_series(tmp_path).series
    assert series.size == "10 x 12 x 7" and "1 localizer" in series.notes[0]
    with caplog.at_level("WARNING", logger="panther_jax"):
        read_series(series)
    assert "localizer" in caplog.text


def test_copies_of_files_count_once(tmp_path):
    for path in made.write(tmp_path / "a", Stack(made.phantom())):
        (tmp_path / "b").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "b" / path.name)
    (series,) = find_series(tmp_path).series
    assert series.problem == "" and "7 second copies" in series.notes[0]


def test_slices_on_each_other_that_nothing_tells_apart(tmp_path):
    stack = Stack(made.phantom())
    made.write(tmp_path, stack)
    for k in range(7):
        dataset = made.single(stack, k)
        dataset.SOPInstanceUID += ".7"
        dataset.save_as(tmp_path / f"again{k}", enforce_file_format=True)
    refused(tmp_path, "7 of its 14 slices lie where another one lies")


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("EchoTime", (80.0, 9.5)),
        ("AcquisitionNumber", (2, 1)),
        ("TemporalPositionIdentifier", (1, 2, 3)),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"])),
    ],
)
def test_several_volumes_in_a_series_are_chosen_one_by_one(attribute, values, tmp_path):
    stacks = [
        Stack(made.phantom(seed=number), extra={attribute: value})
        for number, value in enumerate(values)
    ]
    for number, stack in enumerate(stacks):
        for k in range(7):
            dataset = made.single(stack, k)
            dataset.SOPInstanceUID += f".{number}"
            dataset.save_as(tmp_path / f"{k}-{number}", enforce_file_format=True)
    found = find_series(tmp_path)
    assert [s.part for s in found.series] == list(range(1, len(values) + 1))
    (whole,) = select(found)
    with pytest.raises(DicomError, match=f"holds {len(values)} volumes: #1 {attribute}"):
        read_series(whole)
    ascending = sorted(range(len(values)), key=lambda n: values[n])
    for place, number in enumerate(ascending, start=1):
        (part,) = select(found, [f"1.2.3.4.5#{place}"])
        assert select(found, [f"1#{place}"]) == select(found, [part.code]) == (part,)
        np.testing.assert_array_equal(read_series(part)[0][0], stacks[number].voxels)


def test_mixed_orientations_are_volumes_of_their_own(tmp_path):
    axial, sagittal = Stack(made.phantom()), Stack(made.phantom(seed=1), (0, 1, 0), (0, 0, -1))
    made.write(tmp_path, axial)
    for k in range(7):
        dataset = made.single(sagittal, k)
        dataset.SOPInstanceUID += ".7"
        dataset.save_as(tmp_path / f"s{k}", enforce_file_format=True)
    found = find_series(tmp_path)
    assert sorted(s.part_name for s in found.series) == ["axial slices", "sagittal slices"]
    assert all(s.problem == "" for s in found.series)
    (whole,) = select(found, ["1"])
    assert "2 volumes" in whole.problem


def test_what_a_volume_cannot_be_made_of(tmp_path):
    def write(name, change, every=True):
        for k in range(7):
            dataset = made.single(Stack(made.phantom()), k)
            if every or k == 2:
                change(dataset)
            (tmp_path / name).mkdir(exist_ok=True)
            dataset.save_as(tmp_path / name / str(k), enforce_file_format=True)
        return tmp_path / name

    def without(keyword):
        return lambda dataset: delattr(dataset, keyword)

    def having(**values):
        return lambda dataset: [setattr(dataset, k, v) for k, v in values.items()]

    refused(write("a", without("ImagePositionPatient")), "7 of 7 slices", "position")
    refused(write("b", without("PixelSpacing"), every=False), "1 of 7 slices", "spacing")
    refused(write("c", having(Modality="US")), "modality is US")
    refused(write("d", having(PhotometricInterpretation="MONOCHROME1")), "MONOCHROME1")
    refused(write("e", having(FrameOfReferenceUID="1.9"), every=False), "frames of reference")
    refused(write("f", having(Rows=10), every=False), "several sizes", "(10, 10), (12, 10)")
    refused(write("g", having(PixelSpacing=[1.5, 1.3]), every=False), "pixel spacings")
    refused(write("h", having(RescaleSlope=0, RescaleIntercept=1)), "slope is 0")
    refused(write("i", having(ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0])), "right angles")
    refused(write("j", having(PixelSpacing=[0, 1])), "not positive")


def test_damaged_files_are_named(tmp_path, caplog):
    paths = made.write(tmp_path, Stack(made.phantom()))
    (tmp_path / "notes.txt").write_text("Patient Mueller")
    cut = paths[3].read_bytes()
    paths[3].write_bytes(cut[:-10])
    found = find_series(tmp_path)
    assert [path.name for path, _ in found.unreadable] == ["notes.txt"]
    assert "notes.txt: is no DICOM file" in listing(found)
    with pytest.raises(DicomError, match=f"(?s){paths[3].name}: the voxels.*complete"):
        read_series(found.series[0])
    paths[3].write_bytes(cut[:200])
    with caplog.at_level("WARNING", logger="panther_jax"):
        dicom_series.warn_of_unreadable(find_series(tmp_path))
    assert f"{paths[3].name}: " in caplog.text and "2 file(s)" in caplog.text
    for path in paths:
        path.unlink()
    with pytest.raises(DicomError, match=r"(?s)holds no DICOM image.*notes\.txt"):
        find_series(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_series(tmp_path / "nothing")


def test_doubts_are_said(tmp_path):
    extra = {"SpacingBetweenSlices": 1.25, "InversionTime": lambda k: 100.0 + 50 * (k == 3)}
    made.write(tmp_path, Stack(made.phantom(), extra=extra))
    notes = find_series(tmp_path).series[0].notes
    assert "says 1.25 mm between slices, they are 2.5 mm apart" in notes[0]
    assert "differ in InversionTime" in notes[1]


# --------------------------------------------------------------------------- several in a folder


def test_the_series_of_a_folder_are_listed_and_chosen(tmp_path):
    first = Stack(made.phantom(), series="1.2.3.4.51", number=2)
    second = Stack(made.phantom((5, 4, 6), seed=1), series="1.2.3.4.52", number=1, modality="CT")
    made.write(tmp_path / "deep" / "er", first)
    made.write(tmp_path / "deep", second)
    found = find_series(tmp_path)
    assert [(s.number, s.modality, s.size) for s in found.series] == [
        (1, "CT", "6 x 4 x 5"),
        (2, "MR", "10 x 12 x 7"),
    ]
    text = listing(found)
    assert all(word in text for word in ("T2 TSE", "1.2.3.4.51", "1.2.3.4.52", "10 x 12 x 7"))
    assert not any(word in text for word in (made.NUMBER, "House", "19500102"))
    assert select(found) == found.series
    assert select(found, ["2"]) == select(found, ["1.2.3.4.51"]) == found.series[1:]
    assert select(found, [found.series[0].code]) == found.series[:1]
    with pytest.raises(DicomError) as error:
        select(found, ["1.2.3"])
    assert found.series[0].code in str(error.value) and "1.2.3.4" not in str(error.value)
