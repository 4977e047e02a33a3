"""Label maps as DICOM segmentations: one binary segment a class, on the frames of the series."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from panther_jax.base.files import writing
from panther_jax.images import dicom_files, dicom_objects
from panther_jax.images.dicom_files import DicomError
from panther_jax.images.dicom_objects import (
    LONG,
    MANUFACTURER,
    PANCREAS,
    RESEARCH,
    Code,
    ModelDescription,
    Segment,
)
from panther_jax.images.dicom_series import Series
from panther_jax.plans.labels import Labels

SERIES_NUMBER_OFFSET = 9000  # behind those of the scanner


def write_seg(
    label: Integer[np.ndarray, "z y x"],
    series: Series,
    labels: Labels,
    model: ModelDescription,
    path: Path,
    *,
    anonymous: bool = False,
) -> None:
    """Write a label map on the grid of ``series`` as a DICOM segmentation.

    Classes that are regions may overlap. Frames without a voxel of a segment are left out, as the
    standard allows. The file appears complete or not at all.

    Raises:
        DicomError: if the series has no frame of reference or spreads over several multi-frame
            files, or the label map is not on its grid.
        ModuleNotFoundError: if highdicom is not installed.
    """
    library = highdicom()
    dicom_objects.require_fitting(label, series)
    found = dicom_objects.segments(labels)
    carried = dicom_objects.carried_over(series, anonymous=anonymous)
    sources, masks = _aligned(label, series, found)
    with dicom_files.silently():
        try:
            made = library.seg.Segmentation(
                source_images=sources,
                pixel_array=masks,
                segmentation_type="BINARY",
                segment_descriptions=[_description(s, model) for s in found],
                series_instance_uid=dicom_objects.new_uid(),
                series_number=SERIES_NUMBER_OFFSET + series.number,
                sop_instance_uid=dicom_objects.new_uid(),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=model.name[:LONG],
                software_versions=model.version[:LONG],
                # must not be empty; the weights are what tells one such device from another
                device_serial_number=model.weights_sha256[:LONG],
                content_label="SEGMENTATION",
                content_description=RESEARCH,
                series_description=f"{RESEARCH}: {model.algorithm}"[:LONG],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DicomError(
                f"{series.name}: its headers make no segmentation ({type(error).__name__})\n"
                "  Write a structure set (--format rtstruct) or NIfTI instead."
            ) from error
        # only now: highdicom refuses values that are not to the standard, and quotes them
        made.update(carried)
        with writing(path) as temporary:
            made.save_as(temporary, enforce_file_format=True)


def highdicom() -> Any:
    """The package highdicom.

    Raises:
        ModuleNotFoundError: naming the extra that brings it.
    """
    dicom_files.pydicom()
    try:
        import highdicom as found
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "DICOM segmentations need highdicom: pip install 'panther-jax[dicom]'"
        ) from None
    return found


def _aligned(
    label: np.ndarray, series: Series, segments: Sequence[Segment]
) -> tuple[list[Any], Bool[np.ndarray, "frame y x segment"]]:
    """Headers as highdicom takes them, and the masks in the order of their frames."""
    headers = dicom_objects.source_headers(series)
    masks = np.stack([s.mask(label) for s in segments], axis=-1)
    if series.slices[0].frame is None:
        return [headers[s.path] for s in series.slices], masks
    if len(headers) > 1:
        raise DicomError(
            f"{series.name}: it spreads over {len(headers)} multi-frame files, and a segmentation "
            "refers to one\n  Write a structure set (--format rtstruct) or NIfTI instead."
        )
    (header,) = headers.values()
    # the file may hold frames of other volumes, and in any order
    frames = np.zeros((int(header.NumberOfFrames), *masks.shape[1:]), bool)
    for mask, entry in zip(masks, series.slices, strict=True):
        frames[entry.frame] = mask
    return [header], frames


def _description(segment: Segment, model: ModelDescription) -> Any:
    from pydicom.sr.codedict import codes

    library = highdicom()
    algorithm = library.AlgorithmIdentificationSequence(
        name=model.algorithm,
        family=codes.DCM.ArtificialIntelligence,
        version=model.version[:LONG],
        source=MANUFACTURER,
        parameters={"weights_sha256": model.weights_sha256},
    )
    return library.seg.SegmentDescription(
        segment_number=segment.number,
        segment_label=segment.name,
        segmented_property_category=_concept(segment.category),
        segmented_property_type=_concept(segment.kind),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        anatomic_regions=[_concept(Code(*PANCREAS))] if segment.is_neoplasm else None,
        display_color=library.color.CIELabColor.from_rgb(*segment.colour),
    )


def _concept(code: Code) -> Any:
    from pydicom.sr.coding import Code as Concept

    return Concept(code.value, "SCT", code.meaning)
