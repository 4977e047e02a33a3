"""Readers of what we write as DICOM that share no code with the writers."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from panther_jax.plans.labels import Labels

LABELS = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))


def grid(folder):
    """The series' grid, as SimpleITK reads it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


# ---------------------------------------------------------------------------- independent readers


def masks_of_seg(path, image):
    """Masks by segment number, each frame laid where its own position puts it: pydicom alone."""
    dataset = pydicom.dcmread(path)
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    shape = image.GetSize()[::-1]
    found = {int(s.SegmentNumber): np.zeros(shape, bool) for s in dataset.SegmentSequence}
    shared = dataset.SharedFunctionalGroupsSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    matrix = np.array(image.GetDirection()).reshape(3, 3)
    np.testing.assert_allclose(orientation.reshape(2, 3), matrix.T[:2], atol=1e-6)
    spacing = [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing]
    np.testing.assert_allclose(spacing, image.GetSpacing()[1::-1], atol=1e-6)
    for frame, groups in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        place = [float(v) for v in groups.PlanePositionSequence[0].ImagePositionPatient]
        index = image.TransformPhysicalPointToContinuousIndex(place)
        np.testing.assert_allclose(index, [0, 0, round(index[2])], atol=1e-3)
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[int(number)][round(index[2])] |= frame > 0
    return found


def contours_of(path):
    """Contours by ROI number, as the reader of dcmrtstruct2nii takes them."""
    dataset = pydicom.dcmread(path)
    return {
        int(roi.ReferencedROINumber): [
            {
                "type": contour.ContourGeometricType,
                "points": {axis: contour.ContourData[i::3] for i, axis in enumerate("xyz")},
            }
            for contour in roi.get("ContourSequence", [])
        ]
        for roi in dataset.ROIContourSequence
    }


def masks_of_rtstruct(path, image):
    """Masks by ROI number, rasterised by dcmrtstruct2nii."""
    rasteriser = pytest.importorskip("dcmrtstruct2nii.adapters.convert.rtstructcontour2mask")
    convert = rasteriser.DcmPatientCoords2Mask().convert
    return {
        number: sitk.GetArrayFromImage(convert(contours, image, 0, 1)).astype(bool)
        for number, contours in contours_of(path).items()
    }


def require_contours_at_voxel_sides(path, image):
    """Every vertex in the plane of a slice, half a voxel from the centres beside it."""
    for contours in contours_of(path).values():
        for contour in contours:
            points = np.array([contour["points"][axis] for axis in "xyz"], float).T
            index = np.array([image.TransformPhysicalPointToContinuousIndex(p) for p in points])
            np.testing.assert_allclose(index[:, 2], np.rint(index[0, 2]), atol=1e-3)
            np.testing.assert_allclose(index[:, :2] - 0.5, np.rint(index[:, :2] - 0.5), atol=1e-3)


def require_equal(found, label, labels=LABELS):
    for number, (_, value) in enumerate(labels.classes, start=1):
        np.testing.assert_array_equal(found[number], np.isin(label, value))


# ---------------------------------------------------------------------------------------- proofs
