"""Synthetic DICOM series: any grid, CT or MR, single files or one enhanced file."""

import dataclasses

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "ECT": "1.2.840.10008.5.1.4.1.1.2.1",
    "EMR": "1.2.840.10008.5.1.4.1.1.4.1",
}
NAME, NUMBER = "Müller^Jörg", "PID-4711"
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


@dataclasses.dataclass(frozen=True)
class Stack:
    """What a series is made of; positions are those of ``origin`` plus k times ``step``."""

    voxels: np.ndarray  # stored values, z y x
    row: tuple = AXIAL[0]
    column: tuple = AXIAL[1]
    origin: tuple = (-30.0, 20.0, 5.0)
    spacing: tuple = (2.5, 1.5, 1.25)  # z y x
    modality: str = "MR"
    step: tuple | None = None  # None: the normal times the spacing
    rescale: tuple | None = None  # slope, intercept; or one pair a slice
    study: str = "1.2.3.4"
    series: str = "1.2.3.4.5"
    frame: str = "1.2.3.4.6"
    number: int = 3
    extra: dict = dataclasses.field(default_factory=dict)

    @property
    def steps(self):
        if self.step is not None:
            return np.array(self.step)
        return np.cross(self.row, self.column) * self.spacing[0]

    def position(self, k):
        return [round(float(v), 6) for v in np.array(self.origin) + k * self.steps]

    def rescale_of(self, k):
        if self.rescale is None:
            return None
        return self.rescale[k] if isinstance(self.rescale[0], tuple) else self.rescale


def patient_study(dataset, stack):
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.PatientName, dataset.PatientID = NAME, NUMBER
    dataset.PatientBirthDate, dataset.PatientSex = "19500102", "M"
    dataset.StudyInstanceUID, dataset.StudyID = stack.study, "S99"
    dataset.StudyDate, dataset.StudyTime = "20260203", "101112"
    dataset.AccessionNumber, dataset.ReferringPhysicianName = "ACC-12345", "House^Gregory"
    dataset.InstitutionName = "General Hospital"
    dataset.StudyDescription = "Abdomen Mueller"
    dataset.SeriesDate, dataset.SeriesTime = "20260203", "101113"


def header(stack, sop_class, instance):
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    patient_study(dataset, stack)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, instance
    dataset.Modality = stack.modality.removeprefix("E")
    dataset.SeriesInstanceUID, dataset.SeriesNumber = stack.series, stack.number
    dataset.SeriesDescription = "T2 TSE Mueller"
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = stack.frame, ""
    dataset.Manufacturer = "Maker"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if stack.modality == "CT" else "M"]
    array = stack.voxels
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = array.shape[-2:]
    bits = 8 * array.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(array.dtype.kind == "i")
    return dataset


def single(stack, k):
    """Slice k of a series as a dataset."""
    dataset = header(stack, CLASSES[stack.modality], f"{stack.series}.{k + 1}")
    dataset.InstanceNumber = k + 1
    dataset.ImagePositionPatient = stack.position(k)
    dataset.ImageOrientationPatient = [round(float(v), 8) for v in (*stack.row, *stack.column)]
    dataset.PixelSpacing = list(stack.spacing[1:])
    dataset.SliceThickness = stack.spacing[0]
    if stack.modality == "MR":
        dataset.ScanningSequence, dataset.SequenceVariant = "SE", "NONE"
        dataset.ScanOptions, dataset.MRAcquisitionType = "", "2D"
        dataset.EchoTime, dataset.RepetitionTime, dataset.EchoTrainLength = 80.0, 3000.0, 1
    rescale = stack.rescale_of(k)
    if rescale is not None:
        dataset.RescaleSlope, dataset.RescaleIntercept = rescale
    for name, value in stack.extra.items():
        setattr(dataset, name, value(k) if callable(value) else value)
    dataset.PixelData = np.ascontiguousarray(stack.voxels[k]).tobytes()
    return dataset


def names(count, seed):
    """Shuffled file names, so that no order of names or numbers is that of the slices."""
    return [f"IM{i:04d}" for i in np.random.default_rng(seed).permutation(count)]


def write(folder, stack, *, seed=0, only=None):
    """Write a series as one file a slice; returns the paths, slice by slice."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, name in enumerate(names(len(stack.voxels), seed)):
        path = folder / name
        if only is None or k in only:
            single(stack, k).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def enhanced(stack, order=None):
    """All slices as the frames of one enhanced dataset, in the order given."""
    order = list(range(len(stack.voxels)) if order is None else order)
    dataset = header(stack, CLASSES[stack.modality], f"{stack.series}.1")
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.InstanceNumber, dataset.NumberOfFrames = 1, len(order)
    dataset.ContentDate, dataset.ContentTime = "20260203", "101114"
    shared = pydicom.Dataset()
    measures, plane = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(stack.spacing[1:]), stack.spacing[0]
    plane.ImageOrientationPatient = [round(float(v), 8) for v in (*stack.row, *stack.column)]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dimension = generate_uid()
    organization = pydicom.Dataset()
    organization.DimensionOrganizationUID = dimension
    dataset.DimensionOrganizationSequence = [organization]
    index = pydicom.Dataset()
    index.DimensionIndexPointer, index.FunctionalGroupPointer = 0x00209057, 0x00209111
    index.DimensionOrganizationUID = dimension
    dataset.DimensionIndexSequence = [index]
    frames = []
    for k in order:
        frame, place, content = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = stack.position(k)
        content.StackID, content.InStackPositionNumber = "1", k + 1
        content.DimensionIndexValues = [k + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [place], [content]
        rescale = stack.rescale_of(k)
        if rescale is not None:
            values = pydicom.Dataset()
            values.RescaleSlope, values.RescaleIntercept = rescale
            values.RescaleType = "US"
            frame.PixelValueTransformationSequence = [values]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.PixelData = np.ascontiguousarray(stack.voxels[order]).tobytes()
    return dataset


def write_enhanced(path, stack, order=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    enhanced(stack, order).save_as(path, enforce_file_format=True)
    return path


def phantom(shape=(7, 12, 10), seed=0, dtype=np.int16):
    """Noise with a gradient: no two axes or directions look alike."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(shape)
    return (100 * z + 10 * y + x + rng.integers(0, 50, shape)).astype(dtype)


def turned(degrees=(12.0, -20.0, 31.0)):
    """A rotation matrix that leaves no axis where it was."""
    a, b, c = np.deg2rad(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return x @ y @ z
