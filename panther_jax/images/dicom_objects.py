"""What DICOM segmentations and structure sets share.

The patient and study they belong to, the segments' codes and colours, the model that made them, and
a write that is whole or not there.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from panther_jax.images import dicom_files
from panther_jax.images.dicom_files import DicomError
from panther_jax.images.dicom_series import Series, require_usable
from panther_jax.plans.labels import Labels, LabelValue

MANUFACTURER = "panther_jax"
RESEARCH = "For research, not for clinical use"
# Type 2 of the standard: to be there, and empty where they are not known.
IDENTITY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "ReferringPhysicianName", "StudyID", "AccessionNumber",
)  # fmt: skip
MORE_OF_PATIENT_AND_STUDY = (
    "IssuerOfPatientID", "OtherPatientIDs", "PatientAge", "PatientSize", "PatientWeight",
    "StudyDescription",
)  # fmt: skip
DEIDENTIFIED = "Attributes of patient, study and site removed; UIDs kept"
# Of names, dates and free text nothing is among them.
TECHNICAL = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "Modality", "PositionReferenceIndicator", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "Rows", "Columns", "NumberOfFrames",
    "InstanceNumber", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "DimensionIndexSequence", "DimensionOrganizationSequence",
)  # fmt: skip
COLOURS = (
    (255, 59, 48), (52, 199, 255), (255, 214, 10), (48, 209, 88), (191, 90, 242), (255, 159, 10),
)  # fmt: skip
STRUCTURE = ("91723000", "Anatomical Structure")
ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
TISSUE = ("85756007", "Tissue")
PANCREAS, NEOPLASM = ("15776009", "Pancreas"), ("108369006", "Neoplasm")
# Words of a label's name, the most special first, and what it is in SNOMED CT.
KNOWN = (
    (("tumor", "tumour", "lesion", "neoplasm", "pdac", "carcinoma", "cancer"), ABNORMAL, NEOPLASM),
    (("bile duct",), STRUCTURE, ("79741001", "Common bile duct")),
    (("duct",), STRUCTURE, ("69930009", "Pancreatic duct")),
    (("arter",), STRUCTURE, ("51114001", "Artery")),
    (("vein",), STRUCTURE, ("29092000", "Vein")),
    (("pancreas", "pancreatic", "parenchyma"), STRUCTURE, PANCREAS),
)
LONG, SHORT = 64, 16  # characters of DICOM's text types LO and SH


@dataclass(frozen=True)
class ModelDescription:
    """The model that made a label map: its name, the program's version, its weights' SHA-256."""

    name: str
    version: str
    weights_sha256: str

    @property
    def algorithm(self) -> str:
        """Name of the algorithm in DICOM objects."""
        return f"{MANUFACTURER} {self.name}"[:LONG]


@dataclass(frozen=True)
class Code:
    """A SNOMED CT concept."""

    value: str
    meaning: str


@dataclass(frozen=True)
class Segment:
    """One class of a label map: name, label values, concept, colour (red, green, blue)."""

    number: int
    name: str
    value: LabelValue
    category: Code
    kind: Code
    colour: tuple[int, int, int]

    @property
    def is_neoplasm(self) -> bool:
        """Whether it is a tumour, of which the concept of its site belongs too."""
        return self.kind.value == NEOPLASM[0]

    def mask(self, label: Integer[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
        """Where the label map has this class."""
        return np.isin(label, self.value)


def segments(labels: Labels) -> tuple[Segment, ...]:
    """The classes of a label declaration in their order; numbers from 1."""
    found = []
    for number, (name, value) in enumerate(labels.classes, start=1):
        category, kind = _concept(name)
        colour = COLOURS[(number - 1) % len(COLOURS)]
        found.append(Segment(number, name[:LONG], value, Code(*category), Code(*kind), colour))
    return tuple(found)


def _concept(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    text = name.casefold().replace("_", " ")
    for words, category, kind in KNOWN:
        if any(word in text for word in words):
            return category, kind
    return TISSUE, TISSUE


# --------------------------------------------------------------------------- where they belong


def require_fitting(label: np.ndarray, series: Series) -> None:
    """Refuse what cannot be written as an object of a series.

    Raises:
        DicomError: if the series is no volume or has no frame of reference, or if the label map is
            not on its grid.
    """
    require_usable(series)
    assert series.geometry is not None, "a usable series has a geometry"
    if label.shape != series.geometry.shape_zyx:
        raise DicomError(
            f"{series.name}: label map of shape {label.shape}, series of "
            f"{series.geometry.shape_zyx} (z y x)\n  Give the label map on the series' own grid."
        )
    if not series.frame_of_reference:
        raise DicomError(
            f"{series.name}: its files name no frame of reference (0020,0052), which segmentations "
            "and structure sets must refer to\n  Export the original series; --format nifti works."
        )


def source_headers(series: Series) -> dict[Path, Any]:
    """Technical attributes of the files of a series, by path; of the patient nothing.

    Raises:
        DicomError: naming the file that cannot be read any more.
    """
    headers = {}
    for path in dict.fromkeys(s.path for s in series.slices):
        header = _read_again(path)
        with dicom_files.silently():
            for element in list(header):
                if element.keyword not in TECHNICAL:
                    del header[element.tag]
            for name in IDENTITY:
                setattr(header, name, "")
        headers[path] = header
    return headers


def carried_over(series: Series, *, anonymous: bool = False) -> Any:
    """The attributes of patient and study of a series, as a data set of their own.

    What its files lack of those that must be there is empty; nothing is made up. With ``anonymous``
    all are empty, but for a name and a number that stand for the study. Its UID stays as it is:
    without it the object would belong to no study.

    Raises:
        DicomError: naming the file that cannot be read any more.
    """
    source = _read_again(series.slices[0].path)
    with dicom_files.silently():
        carried = dicom_files.pydicom().Dataset()
        carried.StudyInstanceUID = source.StudyInstanceUID
        for name in IDENTITY:
            setattr(carried, name, "" if anonymous else source.get(name) or "")
        if anonymous:
            digest = hashlib.sha256(str(source.StudyInstanceUID).encode()).hexdigest()
            carried.PatientName = "Anonymous^Patient"
            carried.PatientID = f"ANON-{digest[:10]}"
            carried.PatientIdentityRemoved = "YES"
            carried.DeidentificationMethod = DEIDENTIFIED
            return carried
        for name in MORE_OF_PATIENT_AND_STUDY:
            if source.get(name) not in (None, ""):
                setattr(carried, name, source.get(name))
        if "SpecificCharacterSet" in source:
            carried.SpecificCharacterSet = source.SpecificCharacterSet
    return carried


def _read_again(path: Path) -> Any:
    try:
        return dicom_files.read_dataset(path)
    except DicomError as error:
        raise DicomError(f"{path.name}: {error}\n  Was it moved? Start again.") from None


def new_uid() -> str:
    """A UID that was never used."""
    return str(dicom_files.pydicom().uid.generate_uid(prefix=None))
