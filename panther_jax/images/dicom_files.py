"""DICOM files: their headers as slices, frame by frame, and their voxels.

A slice is one image of a single-frame file or one frame of an enhanced (multi-frame) file; what
follows after this module does not need to know which. Nothing of a header but geometry and
technical attributes comes into a message, and of a file its name without the folders, which exports
name after patients: names and numbers of patients stay where they are.
"""

import contextlib
import locale
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from panther_jax.base.errors import DatasetError

MODALITIES = ("CT", "MR", "PT")
ONE_AT_A_TIME = threading.RLock()
PREAMBLE_BYTES, MAGIC = 128, b"DICM"
ENHANCED = {
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "Legacy Converted Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.128.1": "Legacy Converted Enhanced PET",
    "1.2.840.10008.5.1.4.1.1.130": "Enhanced PET",
}
# What several volumes of one series differ by, in the order in which it is tried.
MARKS = (
    "EchoNumbers",
    "EchoTime",
    "EffectiveEchoTime",
    "InversionTime",
    "DiffusionBValue",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "StackID",
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
    "TriggerTime",
    "ImageType",
    "FrameType",
    "AcquisitionTime",
)
# Those of the lossless JPEG family, which pydicom leaves to packages that are not in the extra.
ITK_DECODES = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
PIXEL_MODULE = (
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "PixelData",
)  # fmt: skip


class DicomError(DatasetError):
    """DICOM files that cannot be used; the message names the series or file and the remedy."""


@dataclass(frozen=True)
class Slice:
    """One image, or one frame (counted from 0) of a multi-frame file; lengths in mm.

    ``orientation`` holds the direction cosines of a row and of a column, ``spacing`` that between
    rows and that between columns; each is empty where the file does not say. ``marks`` are the
    attributes of :data:`MARKS` that the file has, as text.
    """

    path: Path
    frame: int | None
    sop_class: str
    sop_uid: str
    size: tuple[int, int]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    rescale: tuple[float, float]
    marks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Header:
    """What is needed of one file; ``problem`` says why it cannot be part of a volume."""

    path: Path
    series_uid: str
    series_number: int
    modality: str
    description: str
    frame_of_reference: str
    is_localizer: bool
    slices: tuple[Slice, ...]
    between_slices: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Headers:
    """Files of a folder: images, files that cannot be read with the reason, and what else is."""

    images: tuple[Header, ...]
    unreadable: tuple[tuple[Path, str], ...] = ()
    others: dict[str, int] = field(default_factory=dict)


def pydicom() -> Any:
    """The package pydicom.

    Raises:
        ModuleNotFoundError: naming the extra that brings it.
    """
    try:
        import pydicom as found
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "DICOM needs pydicom and highdicom: pip install 'panther-jax[dicom]'"
        ) from None
    return found


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """Keep pydicom's and highdicom's warnings back: they quote values of the headers."""
    # both settings are the process's: of two threads the one that ends last would leave its own
    with (
        ONE_AT_A_TIME,
        warnings.catch_warnings(),
        pydicom().config.disable_value_validation(),
    ):
        warnings.simplefilter("ignore")
        yield


def is_dicom(path: Path) -> bool:
    """Tell whether a file begins as DICOM files do."""
    try:
        with path.open("rb") as file:
            return file.read(PREAMBLE_BYTES + len(MAGIC))[PREAMBLE_BYTES:] == MAGIC
    except OSError:
        return False


def all_files(source: Path) -> tuple[Path, ...]:
    """The file itself, or all files below a folder but hidden ones, by name."""
    if source.is_file():
        return (source,)
    found = []
    for folder, below, names in os.walk(source):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return tuple(sorted(found))


# ------------------------------------------------------------------------------------- headers


def read_headers(source: Path) -> Headers:
    """Read the headers of a DICOM file, or of all files below a folder.

    Raises:
        FileNotFoundError: if the source is missing.
        ModuleNotFoundError: if pydicom is.
    """
    pydicom()
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; expected a folder of DICOM files")
    images, unreadable, others = [], [], {}
    for path in all_files(source):
        try:
            dataset = read_dataset(path)
            what = _other_object(dataset)
            if what:
                others[what] = others.get(what, 0) + 1
            else:
                images.append(_header(path, dataset))
        except DicomError as error:
            unreadable.append((path, str(error)))
        # a broken header raises nearly anything, and its text quotes values
        except Exception as error:
            reason = f"its header cannot be read ({type(error).__name__})"
            unreadable.append((path, reason))
    return Headers(tuple(images), tuple(unreadable), others)


def read_dataset(path: Path, *, voxels: bool = False) -> Any:
    """Read a file, by default without its voxels.

    Raises:
        DicomError: if it is no DICOM file or cannot be read; the path is left to the caller.
    """
    dicom = pydicom()
    try:
        with silently():
            return dicom.dcmread(path, stop_before_pixels=not voxels)
    except dicom.errors.InvalidDicomError:
        raise DicomError("is no DICOM file") from None
    except OSError as error:
        raise DicomError(f"cannot be read ({error.strerror or type(error).__name__})") from None


def _other_object(dataset: Any) -> str:
    """Name of the kind of a DICOM object that is no image; empty for images."""
    sop_class = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID", "")
    if not sop_class:
        raise DicomError("its header says no class of object; is it complete?")
    name = getattr(sop_class, "name", "") or str(sop_class)
    if "Rows" not in dataset or "Columns" not in dataset:
        if "Image Storage" in name:
            raise DicomError("its header is not complete")
        return name
    kinds = ("Segmentation", "RT ", "Presentation", "Registration", "Parametric")
    return name if any(kind in name for kind in kinds) else ""


def _header(path: Path, dataset: Any) -> Header:
    kind = [str(v).upper() for v in _values(dataset.get("ImageType"))]
    number = dataset.get("SeriesNumber")
    between = dataset.get("SpacingBetweenSlices")
    with silently():
        multi_frame = int(dataset.get("NumberOfFrames") or 1) > 1
        enhanced = "PerFrameFunctionalGroupsSequence" in dataset
        problem = _problem(dataset, multi_frame and not enhanced)
        slices = _frames(path, dataset) if enhanced else (_single(path, dataset),)
    return Header(
        path,
        str(dataset.SeriesInstanceUID),
        int(number) if number is not None else 0,
        str(dataset.get("Modality", "")),
        str(dataset.get("SeriesDescription", "")),
        str(dataset.get("FrameOfReferenceUID", "")),
        "LOCALIZER" in kind,
        slices,
        float(between) if between is not None else None,
        problem,
    )


def _problem(dataset: Any, frames_without_geometry: bool) -> str:
    if dataset.get("Modality") not in MODALITIES:
        return (
            f"its modality is {dataset.get('Modality', 'missing')}; a volume is made of "
            f"{', '.join(MODALITIES)}\n  Choose another series."
        )
    if dataset.get("SamplesPerPixel", 1) != 1:
        return "its images are in colour\n  Choose the series with the grey values."
    if dataset.get("PhotometricInterpretation") != "MONOCHROME2":
        return (
            f"its grey values are stored as {dataset.get('PhotometricInterpretation', 'unknown')}; "
            "expected MONOCHROME2\n  Export the original series, not one made for display."
        )
    if "ModalityLUTSequence" in dataset:
        return "its values need a look-up table\n  Export it with slope and intercept instead."
    if frames_without_geometry:
        return (
            "it is a multi-frame file of a kind without positions of its frames\n"
            "  Export it as an enhanced object, or as one file a slice."
        )
    return ""


def _single(path: Path, dataset: Any) -> Slice:
    marks = [(name, _text(dataset[name].value)) for name in MARKS if name in dataset]
    return Slice(
        path,
        None,
        str(dataset.SOPClassUID),
        str(dataset.SOPInstanceUID),
        (int(dataset.Rows), int(dataset.Columns)),
        _numbers(dataset.get("ImagePositionPatient")),
        _numbers(dataset.get("ImageOrientationPatient")),
        _numbers(dataset.get("PixelSpacing")),
        _rescale(dataset),
        tuple(marks),
    )


def _frames(path: Path, dataset: Any) -> tuple[Slice, ...]:
    """Frames of an enhanced object; what is shared by all of them stands in one place."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom().Dataset()])[0]
    found = []
    for index, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        groups = own, shared
        measures = _group(groups, "PixelMeasuresSequence")
        marks = [
            (name, _text(item[name].value))
            for name in MARKS
            for item in _mark_groups(own)
            if name in item
        ]
        position = _group(groups, "PlanePositionSequence").get("ImagePositionPatient")
        plane = _group(groups, "PlaneOrientationSequence").get("ImageOrientationPatient")
        found.append(
            Slice(
                path,
                index,
                str(dataset.SOPClassUID),
                str(dataset.SOPInstanceUID),
                (int(dataset.Rows), int(dataset.Columns)),
                _numbers(position),
                _numbers(plane),
                _numbers(measures.get("PixelSpacing")),
                _rescale(_group(groups, "PixelValueTransformationSequence")),
                tuple(marks),
            )
        )
    return tuple(found)


def _group(groups: Sequence[Any], name: str) -> Any:
    """A functional group of a frame: its own, else the shared one, else nothing."""
    for place in groups:
        if place.get(name):
            return place[name].value[0]
    return pydicom().Dataset()


def _mark_groups(own: Any) -> Iterator[Any]:
    """The functional groups of a frame, which hold what it may differ by."""
    for element in own:
        if element.VR == "SQ" and len(element.value):
            yield element.value[0]


def _rescale(dataset: Any) -> tuple[float, float]:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return (
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in _values(value))


def _text(value: Any) -> str:
    return "\\".join(str(v) for v in _values(value))


# -------------------------------------------------------------------------------------- voxels


def read_voxels(slices: Sequence[Slice]) -> Float32[np.ndarray, "z y x"]:
    """Read the voxels of slices of one size, each with its own slope and intercept.

    Raises:
        DicomError: naming the file whose voxels are incomplete or whose compression is not known.
    """
    volume = np.empty((len(slices), *slices[0].size), np.float32)
    opened: tuple[Path | None, Any] = None, None
    # by file, so that one of many frames is opened once
    for index in sorted(range(len(slices)), key=lambda i: str(slices[i].path)):
        entry = slices[index]
        if opened[0] != entry.path:
            opened = entry.path, _opened(entry.path)
        slope, intercept = entry.rescale
        stored = _decoded(opened[1], entry).astype(np.float64)
        with np.errstate(over="ignore"):  # too large a value becomes inf, refused by the caller
            volume[index] = stored if (slope, intercept) == (1, 0) else stored * slope + intercept
    return volume


def _opened(path: Path) -> Any:
    try:
        return read_dataset(path, voxels=True)
    except DicomError as error:
        raise DicomError(f"{path.name}: {error}\n  Copy or export it again.") from None


def _decoded(dataset: Any, entry: Slice) -> np.ndarray:
    """Stored values of a slice, without slope and intercept."""
    dicom = pydicom()
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise DicomError(
            f"{entry.path.name}: does not say how its voxels are stored; export it again"
        )
    if syntax in ITK_DECODES:
        return _decoded_by_itk(dataset, entry)
    try:
        with silently():
            found = dicom.pixels.pixel_array(dataset, index=entry.frame or 0)
    except NotImplementedError:
        raise _not_decoded(entry, syntax) from None
    except RuntimeError as error:  # of pydicom: no plugin, or the plugin failed
        if "missing dependencies" in str(error):
            raise _not_decoded(entry, syntax) from None
        raise _damaged(entry) from None
    except Exception:
        raise _damaged(entry) from None
    if found.shape != entry.size:
        raise _damaged(entry)
    return _stored_bits(found, dataset)


def _not_decoded(entry: Slice, syntax: Any) -> DicomError:
    name = getattr(syntax, "name", syntax)
    return DicomError(
        f"{entry.path.name}: its compression, {name} ({syntax}), cannot be read here"
        "\n  Export the series uncompressed, or install a decoder of it for pydicom."
    )


def _damaged(entry: Slice) -> DicomError:
    frame = "" if entry.frame is None else f" of frame {entry.frame + 1}"
    return DicomError(
        f"{entry.path.name}: the voxels{frame} cannot be read; is the file complete?\n"
        "  Copy or export it again."
    )


def _stored_bits(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Clear what stands in the unused high bits, such as overlays of old scanners."""
    unused = int(dataset.BitsAllocated) - int(dataset.get("BitsStored", dataset.BitsAllocated))
    if unused <= 0 or values.dtype.kind not in "iu" or int(dataset.BitsAllocated) < 8:
        return values
    # a shift up and down again extends the sign of signed values
    return (values << unused) >> unused


@contextlib.contextmanager
def _locale_kept() -> Iterator[None]:
    """GDCM leaves the process in the C locale, in which files of other tongues cannot be named."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _decoded_by_itk(dataset: Any, entry: Slice) -> np.ndarray:
    """Decode by GDCM, from a file of the pixel module alone, so that no value is rescaled."""
    import SimpleITK as sitk

    dicom = pydicom()
    bare = dicom.Dataset()
    for name in PIXEL_MODULE:
        bare[name] = dataset[name]
    bare.SOPClassUID = dicom.uid.SecondaryCaptureImageStorage
    bare.SOPInstanceUID = dicom.uid.generate_uid()
    if entry.frame is not None:
        count = int(dataset.NumberOfFrames)
        frame = dicom.encaps.get_frame(dataset.PixelData, entry.frame, number_of_frames=count)
        bare.PixelData = dicom.encaps.encapsulate([frame])
    bare.file_meta = dicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    with tempfile.TemporaryDirectory(prefix="panther_jax-") as folder:
        path = Path(folder) / "voxels.dcm"
        with silently():
            dicom.dcmwrite(path, bare, enforce_file_format=True)
        try:
            with _locale_kept():
                found = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
        except RuntimeError:
            raise _damaged(entry) from None
    if found.size != entry.size[0] * entry.size[1]:
        raise _damaged(entry)
    return found.reshape(entry.size)
