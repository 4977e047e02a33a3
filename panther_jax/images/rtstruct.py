"""Label maps as RT structure sets: closed contours on the slices of the series, in mm.

A contour runs along the sides of the voxels (:mod:`panther_jax.images.outlines`) in the plane of
its own slice: position and orientation are those of the slice's header, so that nothing depends on
how the volume was put together.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Integer

from panther_jax.base.files import writing
from panther_jax.images import dicom_files, dicom_objects
from panther_jax.images.dicom_files import Slice
from panther_jax.images.dicom_objects import (
    LONG,
    MANUFACTURER,
    RESEARCH,
    SHORT,
    Code,
    ModelDescription,
    Segment,
)
from panther_jax.images.dicom_seg import SERIES_NUMBER_OFFSET
from panther_jax.images.dicom_series import Series
from panther_jax.images.outlines import outlines
from panther_jax.plans.labels import Labels

# The study component class, retired, is what planning systems expect here.
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
DECIMALS = 4  # of coordinates in mm
LABEL = "panther_jax"


def write_rtstruct(
    label: Integer[np.ndarray, "z y x"],
    series: Series,
    labels: Labels,
    model: ModelDescription,
    path: Path,
    *,
    anonymous: bool = False,
    smooth: bool = False,
) -> None:
    """Write a label map on the grid of ``series`` as an RT structure set, one ROI a class.

    A class without a voxel is an ROI without contours. ``smooth`` cuts the corners of voxels. The
    file appears complete or not at all.

    Raises:
        DicomError: if the series has no frame of reference, or the label map is not on its grid.
        ModuleNotFoundError: if pydicom is not installed.
    """
    dicom_files.pydicom()
    dicom_objects.require_fitting(label, series)
    carried = dicom_objects.carried_over(series, anonymous=anonymous)
    with dicom_files.silently():
        dataset = _structure_set(series, carried.StudyInstanceUID, model)
        dataset.update(carried)
        rois = dicom_objects.segments(labels)
        dataset.StructureSetROISequence = [_roi(s, series, model) for s in rois]
        dataset.ROIContourSequence = [_contours(s, label, series, smooth=smooth) for s in rois]
        dataset.RTROIObservationsSequence = [_observation(s) for s in rois]
        with writing(path) as temporary:
            dataset.save_as(temporary, enforce_file_format=True)


def _item(**attributes: Any) -> Any:
    dataset = dicom_files.pydicom().Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


# ----------------------------------------------------------------------------------- the frame


def _structure_set(series: Series, study_uid: str, model: ModelDescription) -> Any:
    """Everything but patient, study and the ROIs."""
    dicom = dicom_files.pydicom()
    now = datetime.datetime.now()
    day, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset = _item(
        SOPClassUID=dicom.uid.RTStructureSetStorage,
        SOPInstanceUID=dicom_objects.new_uid(),
        InstanceCreationDate=day,
        InstanceCreationTime=time,
        Modality="RTSTRUCT",
        SeriesInstanceUID=dicom_objects.new_uid(),
        SeriesNumber=SERIES_NUMBER_OFFSET + series.number,
        SeriesDescription=f"{RESEARCH}: {model.algorithm}"[:LONG],
        OperatorsName="",
        Manufacturer=MANUFACTURER,
        ManufacturerModelName=model.name[:LONG],
        SoftwareVersions=model.version[:LONG],
        FrameOfReferenceUID=series.frame_of_reference,
        PositionReferenceIndicator="",
        InstanceNumber=1,
        StructureSetLabel=LABEL[:SHORT],
        StructureSetName=model.algorithm,
        StructureSetDescription=_made_by(model),
        StructureSetDate=day,
        StructureSetTime=time,
        ApprovalStatus="UNAPPROVED",
        ReferencedFrameOfReferenceSequence=[_references(series, study_uid)],
    )
    dataset.file_meta = dicom.dataset.FileMetaDataset()
    # explicit lengths of text end at 64 kB, which a contour of a few thousand points exceeds
    dataset.file_meta.TransferSyntaxUID = dicom.uid.ImplicitVRLittleEndian
    return dataset


def _made_by(model: ModelDescription) -> str:
    return (
        f"{RESEARCH}. Made by {MANUFACTURER} {model.version}, model {model.name}, weights sha256 "
        f"{model.weights_sha256}. To be checked by a physician."
    )[:1024]


def _references(series: Series, study_uid: str) -> Any:
    """The frame of reference with study, series and all images of the volume."""
    images = list({s.sop_uid: _image(s, with_frame=False) for s in series.slices}.values())
    of_series = _item(SeriesInstanceUID=series.uid, ContourImageSequence=images)
    of_study = _item(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=study_uid,
        RTReferencedSeriesSequence=[of_series],
    )
    return _item(
        FrameOfReferenceUID=series.frame_of_reference, RTReferencedStudySequence=[of_study]
    )


def _image(entry: Slice, *, with_frame: bool = True) -> Any:
    image = _item(ReferencedSOPClassUID=entry.sop_class, ReferencedSOPInstanceUID=entry.sop_uid)
    if with_frame and entry.frame is not None:
        image.ReferencedFrameNumber = entry.frame + 1
    return image


# ------------------------------------------------------------------------------------ the ROIs


def _roi(segment: Segment, series: Series, model: ModelDescription) -> Any:
    return _item(
        ROINumber=segment.number,
        ReferencedFrameOfReferenceUID=series.frame_of_reference,
        ROIName=segment.name,
        ROIDescription=RESEARCH,
        ROIGenerationAlgorithm="AUTOMATIC",
        ROIGenerationDescription=model.algorithm,
    )


def _observation(segment: Segment) -> Any:
    """What the ROI is; whether a tumour is a target volume is for a physician to say."""
    item = _item(
        ObservationNumber=segment.number,
        ReferencedROINumber=segment.number,
        ROIObservationLabel=segment.name[:SHORT],
        RTROIIdentificationCodeSequence=[_concept(segment.kind)],
        RTROIInterpretedType="" if segment.is_neoplasm else "ORGAN",
        ROIInterpreter="",
    )
    return item


def _concept(code: Code) -> Any:
    return _item(CodeValue=code.value, CodingSchemeDesignator="SCT", CodeMeaning=code.meaning)


def _contours(segment: Segment, label: np.ndarray, series: Series, *, smooth: bool) -> Any:
    mask = segment.mask(label)
    found = [
        _contour(_in_patient(points, entry), entry)
        for plane, entry in zip(mask, series.slices, strict=True)
        if plane.any()
        for points in outlines(plane, smooth=smooth)
    ]
    for number, contour in enumerate(found, start=1):
        contour.ContourNumber = number
    item = _item(ROIDisplayColor=list(segment.colour), ReferencedROINumber=segment.number)
    if found:
        item.ContourSequence = found
    return item


def _in_patient(
    points: Float64[np.ndarray, "point 2"], entry: Slice
) -> Float64[np.ndarray, "point 3"]:
    """From row and column to x, y, z in mm, by the slice's own header."""
    along_row, along_column = np.array(entry.orientation[:3]), np.array(entry.orientation[3:])
    between_rows, between_columns = entry.spacing
    return (
        np.array(entry.position)
        + points[:, 1:] * between_columns * along_row
        + points[:, :1] * between_rows * along_column
    )


def _contour(points: np.ndarray, entry: Slice) -> Any:
    return _item(
        ContourImageSequence=[_image(entry)],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
        ContourData=_decimals(points.ravel().tolist()),
    )


def _decimals(values: Sequence[float]) -> list[str]:
    return [f"{round(v, DECIMALS) + 0.0:.{DECIMALS}f}" for v in values]
