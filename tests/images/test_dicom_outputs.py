"""Segmentations and structure sets, read back by readers that share no code with the writers."""

import dataclasses
import itertools
import os
import re
import shutil
import subprocess

import dicom_files as made
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import Stack
from dicom_readers import (
    LABELS,
    contours_of,
    grid,
    masks_of_rtstruct,
    masks_of_seg,
    require_contours_at_voxel_sides,
    require_equal,
)
from pydicom.sr.codedict import codes

from panther_jax.images import dicom_objects, outlines
from panther_jax.images.dicom_files import DicomError
from panther_jax.images.dicom_objects import ModelDescription
from panther_jax.images.dicom_seg import write_seg
from panther_jax.images.dicom_series import find_series
from panther_jax.images.rtstruct import write_rtstruct
from panther_jax.plans.labels import Labels

REGIONS = Labels((("background", 0), ("whole_pancreas", (1, 2)), ("lesion", (2,))), (1, 2))
MODEL = ModelDescription("mri_t2", "1.2.3", "0123456789abcdef" * 4)
AXES = [
    (np.eye(3)[list(order)] * np.array(signs)[:, None])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
KEPT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID",
        "StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName",
        "StudyDescription", "FrameOfReferenceUID")  # fmt: skip
PRIVATE = (b"ller", b"PID-4711", b"19500102", b"20260203", b"ACC-12345", b"House", b"Hospital",
           b"S99", b"Maker", b"Mueller")  # fmt: skip


def phantom(shape):
    """Two classes with holes, a hole in a hole, islands, corners that touch, and borders."""
    label = np.zeros(shape, np.uint8)
    label[1:5, 1:12, 1:12] = 2
    label[2, 3:10, 3:10] = 0
    label[2, 5:8, 5:8] = 2
    label[2, 6, 6] = 0
    label[3, 2:4, 2:4] = 0
    label[3, 6:9, 2] = 0
    label[3, 5, 5] = label[3, 6, 6] = label[3, 7, 5] = 0
    label[3, 9, 9:11] = 1
    label[4, 4:8, 4:8] = 1
    label[0, :3, :4] = label[-1, -2:, -5:] = 1
    label[5, ::2, ::2] = label[5, 1::2, 1::2] = 2
    label[-1, 0, :] = 2
    return label


def series_of(folder):
    (series,) = find_series(folder).series
    return series


def write_both(folder, label, labels=LABELS, **options):
    series = series_of(folder)
    for name, write in (("seg", write_seg), ("rt", write_rtstruct)):
        write(label, series, labels, MODEL, folder.parent / f"{folder.name}.{name}.dcm", **options)
    return tuple(folder.parent / f"{folder.name}.{name}.dcm" for name in ("seg", "rt"))


@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("number", range(len(AXES)))
def test_all_orientations_come_back_where_they_were(number, oblique, tmp_path):
    """The voxels are equal, and what lies left of the patient stays left."""
    axes = AXES[number] @ (made.turned().T if oblique else np.eye(3))
    shape = (7, 13, 12)
    stack = Stack(made.phantom(shape), tuple(axes[0]), tuple(axes[1]), step=tuple(2.5 * axes[2]))
    made.write(tmp_path / "a", stack, seed=number)
    image = grid(tmp_path / "a")
    label = phantom(shape)
    # a ball in the patient: off the middle along each axis, most of all to the left (x > 0)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    index = np.stack(np.indices(shape)[::-1], axis=-1) * np.array(image.GetSpacing())
    place = index @ direction.T + np.array(image.GetOrigin())
    middle = place.reshape(-1, 3).mean(axis=0)
    centre = middle + [5.0, 2.0, -1.5]
    ball = np.linalg.norm(place - centre, axis=-1) < 3.2
    assert ball.sum() > 20
    label[label == 1] = 0
    label[ball] = 1
    seg, rtstruct = write_both(tmp_path / "a", label)
    require_equal(masks_of_seg(seg, image), label)
    require_equal(masks_of_rtstruct(rtstruct, image), label)
    require_contours_at_voxel_sides(rtstruct, image)
    points = np.concatenate(
        [np.array([c["points"][a] for a in "xyz"], float).T for c in contours_of(rtstruct)[1]]
    )
    extent = (points.min(axis=0) + points.max(axis=0)) / 2
    assert np.abs(extent - centre).max() < 2.5 and (points[:, 0] > middle[0]).all()


@pytest.mark.parametrize("modality", ["EMR", "ECT"])
def test_frames_of_enhanced_files_are_referred_to(modality, tmp_path):
    single = Stack(
        made.phantom((7, 13, 12)), *made.turned()[:2].tolist(), modality=modality[1:],
        rescale=(1.0, 0.0),
    )  # fmt: skip
    made.write(tmp_path / "single", single)
    stack = dataclasses.replace(single, modality=modality)
    made.write_enhanced(tmp_path / "a" / "e.dcm", stack, order=[3, 1, 0, 2, 5, 6, 4])
    image, label = grid(tmp_path / "single"), phantom((7, 13, 12))
    seg, rtstruct = write_both(tmp_path / "a", label)
    require_equal(masks_of_seg(seg, image), label)
    require_equal(masks_of_rtstruct(rtstruct, image), label)
    source = pydicom.dcmread(tmp_path / "a" / "e.dcm")
    for roi in pydicom.dcmread(rtstruct).ROIContourSequence:
        for contour in roi.ContourSequence:
            (referred,) = contour.ContourImageSequence
            assert referred.ReferencedSOPInstanceUID == source.SOPInstanceUID
            frame = source.PerFrameFunctionalGroupsSequence[referred.ReferencedFrameNumber - 1]
            position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
            normal = np.cross(stack.row, stack.column)
            first = np.array(contour.ContourData[:3], float)
            assert abs((first - position) @ normal) < 1e-3


def test_the_reader_of_highdicom_finds_the_same(tmp_path):
    highdicom = pytest.importorskip("highdicom")
    stack = Stack(made.phantom((7, 13, 12)))
    made.write(tmp_path / "a", stack)
    label = np.minimum(phantom((7, 13, 12)), 2)
    seg, _ = write_both(tmp_path / "a", label, REGIONS)
    read = highdicom.seg.segread(seg)
    found = read.get_pixels_by_source_instance(
        [f"{stack.series}.{k + 1}" for k in range(7)],
        segment_numbers=[1, 2],
        ignore_spatial_locations=True,
        assert_missing_frames_are_empty=True,
    )
    require_equal({1: found[..., 0] > 0, 2: found[..., 1] > 0}, label, REGIONS)
    image = grid(tmp_path / "a")
    require_equal(masks_of_seg(seg, image), label, REGIONS)


@pytest.mark.parametrize("smooth", [False, True])
def test_outlines_hold_what_the_mask_holds(smooth):
    """Any mask, down to single voxels: area, centres inside and outside, one polygon an island."""
    from matplotlib.path import Path
    from scipy import ndimage
    from skimage.draw import polygon2mask

    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = rng.random(rng.integers(1, 12, 2)) < rng.random()
        polygons = outlines.outlines(mask, smooth=smooth)
        found, area = np.zeros(mask.shape, bool), 0.0
        for polygon in polygons:
            inside = polygon2mask(mask.shape, polygon)
            assert not (found & inside).any()
            found |= inside
            rows, columns = polygon.T
            area += (columns @ np.roll(rows, -1) - rows @ np.roll(columns, -1)) / 2
            if not smooth:  # by another's rule too
                centres = np.stack(np.indices(mask.shape), axis=-1).reshape(-1, 2)
                closed = Path(np.vstack([polygon, polygon[:1]]), closed=True)
                again = closed.contains_points(centres).reshape(mask.shape)
                np.testing.assert_array_equal(again, inside)
        np.testing.assert_array_equal(found, mask)
        assert len(polygons) == ndimage.label(mask)[1]
        assert smooth or area == pytest.approx(mask.sum())


def test_a_keyhole_goes_up_and_back_along_one_line():
    mask = np.ones((5, 5), bool)
    mask[2, 2] = False
    (polygon,) = outlines.outlines(mask)
    steps = np.abs(polygon - np.roll(polygon, 1, axis=0))
    assert ((steps > 0).sum(axis=1) == 1).all()
    edges = [
        frozenset({tuple(a), tuple(b)})
        for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True)
    ]
    twice = [e for e in edges if edges.count(e) == 2]
    assert set(twice) == {frozenset({(-0.5, 1.5), (1.5, 1.5)})} and len(polygon) == 11


def test_a_radiotherapy_program_finds_the_same(tmp_path):
    """Plastimatch, which planning research uses, rasterises every voxel as it was."""
    if shutil.which("plastimatch") is None:
        pytest.skip("plastimatch is not installed (package plastimatch)")
    shape = (12, 64, 60)
    made.write(tmp_path / "a", Stack(made.phantom(shape), modality="CT", rescale=(1.0, 0.0)))
    z, y, x = np.indices(shape)
    pancreas = ((z - 5) / 4.2) ** 2 + ((y - 30) / 20) ** 2 + ((x - 28) / 17) ** 2 < 1
    tumor = ((z - 6) / 2.2) ** 2 + ((y - 35) / 6) ** 2 + ((x - 24) / 5) ** 2 < 1
    label = np.where(tumor, 1, 2 * pancreas).astype(np.uint8)
    label[4:8, 20:24, 30:34] = 0
    _, rtstruct = write_both(tmp_path / "a", label)
    command = ["plastimatch", "convert", "--input", rtstruct, "--referenced-ct", tmp_path / "a"]
    command += ["--output-prefix", tmp_path / "out", "--prefix-format", "nii.gz"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for name, value in (("tumor", 1), ("pancreas", 2)):
        image = sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image) > 0, label == value)
        np.testing.assert_allclose(image.GetOrigin(), (-30, 20, 5))


# ----------------------------------------------------------------------------------- attributes


@pytest.fixture
def written(tmp_path):
    stack = Stack(made.phantom((7, 13, 12)))
    made.write(tmp_path / "a", stack)
    paths = write_both(tmp_path / "a", phantom((7, 13, 12)))
    return stack, [pydicom.dcmread(p) for p in paths]


def test_patient_and_study_are_carried_over(written):
    stack, objects = written
    source = made.single(stack, 0)
    for dataset in objects:
        for name in KEPT:
            assert str(dataset.get(name)) == str(source.get(name)), name
        assert dataset.SeriesInstanceUID not in (source.SeriesInstanceUID, "")
        assert "research" in dataset.SeriesDescription.lower()
        assert dataset.Manufacturer == "panther_jax" and "InstitutionName" not in dataset


def test_what_the_source_lacks_is_empty(tmp_path):
    for path in made.write(tmp_path / "a", Stack(made.phantom((3, 6, 6)))):
        dataset = pydicom.dcmread(path)
        for name in ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            del dataset[name]
        del dataset.ReferringPhysicianName, dataset.SpecificCharacterSet, dataset.StudyDescription
        dataset.save_as(path)
    for path in write_both(tmp_path / "a", np.ones((3, 6, 6), np.uint8)):
        dataset = pydicom.dcmread(path)
        assert dataset.PatientID == made.NUMBER and "StudyDescription" not in dataset
        for name in ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            assert name in dataset and not dataset.get(name), name


def test_references_are_valid(written):
    stack, (seg, rtstruct) = written
    uids = {f"{stack.series}.{k + 1}" for k in range(7)}
    (frame,) = rtstruct.ReferencedFrameOfReferenceSequence
    (study,) = frame.RTReferencedStudySequence
    (series,) = study.RTReferencedSeriesSequence
    assert frame.FrameOfReferenceUID == stack.frame and series.SeriesInstanceUID == stack.series
    assert study.ReferencedSOPInstanceUID == stack.study
    assert {i.ReferencedSOPInstanceUID for i in series.ContourImageSequence} == uids
    numbers = [r.ROINumber for r in rtstruct.StructureSetROISequence]
    assert numbers == [r.ReferencedROINumber for r in rtstruct.ROIContourSequence]
    assert numbers == [r.ReferencedROINumber for r in rtstruct.RTROIObservationsSequence]
    for roi in rtstruct.ROIContourSequence:
        for contour in roi.ContourSequence:
            (image,) = contour.ContourImageSequence
            assert image.ReferencedSOPClassUID == made.CLASSES["MR"]
            k = int(image.ReferencedSOPInstanceUID.rsplit(".", 1)[1]) - 1
            z = np.array(contour.ContourData[2::3], float)
            np.testing.assert_allclose(z, stack.position(k)[2], atol=1e-3)
            assert len(z) == contour.NumberOfContourPoints
    (referred,) = seg.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == stack.series
    assert {i.ReferencedSOPInstanceUID for i in referred.ReferencedInstanceSequence} == uids


def test_segments_say_what_they_are_and_what_made_them(written):
    _, (seg, rtstruct) = written
    tumor, pancreas = seg.SegmentSequence
    assert tumor.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes.SCT.Neoplasm.value
    assert pancreas.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes.SCT.Pancreas.value
    assert tumor.AnatomicRegionSequence[0].CodeValue == codes.SCT.Pancreas.value
    (algorithm,) = tumor.SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmName == "panther_jax mri_t2" and algorithm.AlgorithmVersion == "1.2.3"
    assert MODEL.weights_sha256 in algorithm.AlgorithmParameters
    assert MODEL.weights_sha256 in rtstruct.StructureSetDescription
    assert "research" in rtstruct.StructureSetDescription
    assert [r.ROIName for r in rtstruct.StructureSetROISequence] == ["tumor", "pancreas"]
    assert [list(r.ROIDisplayColor) for r in rtstruct.ROIContourSequence] == [
        [255, 59, 48],
        [52, 199, 255],
    ]
    observed = [r.RTROIInterpretedType for r in rtstruct.RTROIObservationsSequence]
    assert observed == ["", "ORGAN"] and rtstruct.ApprovalStatus == "UNAPPROVED"


@pytest.mark.parametrize(
    ("name", "category", "kind"),
    [
        ("PDAC lesion", "MorphologicallyAbnormalStructure", "Neoplasm"),
        ("veins", "AnatomicalStructure", "Vein"),
        ("arteries", "AnatomicalStructure", "Artery"),
        ("pancreas_parenchyma", "AnatomicalStructure", "Pancreas"),
        ("pancreatic duct", "AnatomicalStructure", "PancreaticDuct"),
        ("common_bile_duct", "AnatomicalStructure", "CommonBileDuct"),
        ("something", "Tissue", "Tissue"),
    ],
)
def test_codes_are_those_of_the_standard(name, category, kind):
    (segment,) = dicom_objects.segments(Labels((("background", 0), (name, 1))))
    for found, expected in ((segment.category, category), (segment.kind, kind)):
        code = getattr(codes.SCT, expected)
        assert (found.value, found.meaning) == (code.value, code.meaning)


def test_a_class_without_a_voxel_has_no_contours(tmp_path):
    made.write(tmp_path / "a", Stack(made.phantom((3, 6, 6))))
    for label in (np.zeros((3, 6, 6), np.uint8), np.full((3, 6, 6), 2, np.uint8)):
        seg, rtstruct = write_both(tmp_path / "a", label)
        require_equal(masks_of_seg(seg, grid(tmp_path / "a")), label)
        assert contours_of(rtstruct)[1] == [] and len(contours_of(rtstruct)) == 2


def test_names_in_any_script_survive(tmp_path):
    for charset, name in (("ISO_IR 192", "Μαρία^Ж"), ("ISO_IR 100", "Müller^Jörg")):
        folder = tmp_path / charset.replace(" ", "")
        for path in made.write(folder, Stack(made.phantom((3, 6, 6)))):
            dataset = pydicom.dcmread(path)
            dataset.SpecificCharacterSet, dataset.PatientName = charset, name
            dataset.save_as(path)
        for path in write_both(folder, np.ones((3, 6, 6), np.uint8)):
            assert str(pydicom.dcmread(path).PatientName) == name


# ------------------------------------------------------------------------------------- privacy


@pytest.mark.parametrize("modality", ["MR", "CT", "EMR", "ECT"])
def test_anonymous_files_hold_nothing_of_the_patient(modality, tmp_path):
    extra = {} if modality[0] == "E" else {"ImageComments": "Mueller", "StationName": "Hospital"}
    stack = Stack(made.phantom((7, 13, 12)), modality=modality, extra=extra, rescale=(1.0, 0.0))
    if modality[0] == "E":
        made.write_enhanced(tmp_path / "a" / "e.dcm", stack)
    else:
        made.write(tmp_path / "a", stack)
    label = phantom((7, 13, 12))
    plain = write_both(tmp_path / "a", label)
    assert all(PRIVATE[1] in path.read_bytes() for path in plain)
    (tmp_path / "again").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "again" / "a")
    hidden = write_both(tmp_path / "again" / "a", label, anonymous=True)
    for path, before in zip(hidden, plain, strict=True):
        content = path.read_bytes()
        assert not [word for word in PRIVATE if word in content]
        dataset, named = pydicom.dcmread(path), pydicom.dcmread(before)
        assert dataset.PatientIdentityRemoved == "YES" and not dataset.StudyDate
        assert dataset.PatientID.startswith("ANON-")
        assert dataset.StudyInstanceUID == named.StudyInstanceUID
        assert dataset.get("PixelData") == named.get("PixelData")


# -------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_written_is_named(tmp_path):
    made.write(tmp_path / "a", Stack(made.phantom((3, 6, 6))))
    made.write(tmp_path / "b", Stack(made.phantom((1, 6, 6))))
    made.write(tmp_path / "c", Stack(made.phantom((3, 6, 6)), extra={"FrameOfReferenceUID": ""}))
    for write in (write_seg, write_rtstruct):
        arguments = LABELS, MODEL, tmp_path / "out.dcm"
        with pytest.raises(DicomError, match=r"label map of shape \(3, 6, 7\), series of"):
            write(np.ones((3, 6, 7), np.uint8), series_of(tmp_path / "a"), *arguments)
        with pytest.raises(DicomError, match="single slice"):
            write(np.ones((1, 6, 6), np.uint8), series_of(tmp_path / "b"), *arguments)
        with pytest.raises(DicomError, match="frame of reference.*(?s:.)*--format nifti"):
            write(np.ones((3, 6, 6), np.uint8), series_of(tmp_path / "c"), *arguments)
    series = series_of(tmp_path / "a")
    gone = series.slices[0].path
    gone.unlink()
    with pytest.raises(DicomError, match=f"{gone.name}: cannot be read"):
        write_rtstruct(np.ones((3, 6, 6), np.uint8), series, *arguments)
    assert not (tmp_path / "out.dcm").exists()


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    made.write(tmp_path / "a", Stack(made.phantom((3, 6, 6))))
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "a.dcm"
    for write in (write_seg, write_rtstruct):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(OSError) as error:
                write(np.ones((3, 6, 6), np.uint8), series_of(tmp_path / "a"), LABELS, MODEL, path)
            assert str(path) in str(error.value)
        assert list(path.parent.iterdir()) == []


# ---------------------------------------------------------------------------------- the standard


@pytest.mark.parametrize("anonymous", [False, True])
@pytest.mark.parametrize("modality", ["MR", "CT", "EMR", "ECT"])
def test_dciodvfy_finds_no_error(modality, anonymous, tmp_path):
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (package dicom3tools)")
    stack = Stack(made.phantom((7, 13, 12)), modality=modality, rescale=(1.0, 0.0))
    if modality[0] == "E":
        made.write_enhanced(tmp_path / "a" / "e.dcm", stack, order=[3, 1, 0, 2, 5, 6, 4])
    else:
        made.write(tmp_path / "a", stack)
    label = phantom((7, 13, 12))
    for number, masked in enumerate((label, np.where(label == 1, 0, label))):
        for path in write_both(tmp_path / "a", masked, anonymous=anonymous):
            done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, timeout=60)
            said = done.stdout + done.stderr
            assert re.search("Segmentation|RTStructureSet", said), said
            assert "Error" not in said, (number, said)
