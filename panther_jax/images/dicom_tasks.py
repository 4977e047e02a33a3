"""DICOM in the prediction of a folder: its series as tasks, and the outputs of each."""

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer

import panther_jax
from panther_jax.images import dicom_files, dicom_seg, dicom_series, imageio, rtstruct
from panther_jax.images.cases import Task
from panther_jax.images.dicom_files import DicomError
from panther_jax.images.dicom_objects import ModelDescription
from panther_jax.images.dicom_series import Series
from panther_jax.images.endings import split_ending
from panther_jax.images.raw_dataset import RawCase
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels

LOGGER = logging.getLogger("panther_jax")
ENDINGS = {"nifti": ".nii.gz", "dicom-seg": ".seg.dcm", "rtstruct": ".rtstruct.dcm"}
FORMATS = tuple(ENDINGS)


@dataclass(frozen=True)
class DicomOptions:
    """What a user chooses: series by UID, number or code (none: all), formats, anonymity."""

    series: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("nifti",)
    anonymous: bool = False


@dataclass(frozen=True)
class Writing:
    """How label maps of series are written: formats, classes, by which model, with whose name."""

    labels: Labels
    model: ModelDescription
    formats: tuple[str, ...] = ("nifti",)
    anonymous: bool = False


@dataclass(frozen=True)
class DicomTask(Task):
    """A series to predict; it is named by its code, not by its patient."""

    series: Series | None = None
    writing: Writing | None = None

    @property
    def stem(self) -> str:
        """Name of the outputs without their endings."""
        return self.case.id

    @property
    def outputs(self) -> dict[str, Path]:
        """The file of each format."""
        assert self.writing is not None, "made with what it writes"
        folder = self.output.parent
        return {f: folder / f"{self.stem}{ENDINGS[f]}" for f in self.writing.formats}

    @property
    def key(self) -> str:
        """What the record of its outputs is kept under."""
        return self.case.id

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its label map, one a format."""
        return tuple(self.outputs.values())

    @property
    def sources(self) -> dict[str, tuple[Path, ...]]:
        """Its slices together; names of files may tell a patient's name, and are kept out."""
        return {"series": self.case.images}

    @property
    def writes(self) -> dict[str, object]:
        """What changes its files beside the label map in them: whether they name the patient."""
        assert self.writing is not None, "made with what it writes"
        told = any(name != "nifti" for name in self.writing.formats)
        return {"anonymous": self.writing.anonymous} if told else {}

    def read(self) -> tuple[Float32[np.ndarray, "channel z y x"], Geometry]:
        """The series' voxels and grid."""
        assert self.series is not None, "made of a series"
        return dicom_series.read_series(self.series)

    def write(self, label: Integer[np.ndarray, "z y x"], geometry: Geometry) -> None:
        """Write the label map in all its formats; each file is whole or not there."""
        assert self.series is not None and self.writing is not None
        write_outputs(label, self.series, self.writing, self.outputs)


def holds_dicom(source: Path, made: Collection[str] = ()) -> bool:
    """Tell whether a source is a DICOM file, or a folder of such and of no other image files.

    Files named in ``made`` are predictions of earlier calls, and do not count.
    """
    if source.is_file():
        return not split_ending(source.name)[1] and dicom_files.is_dicom(source)
    if not source.is_dir() or any(
        split_ending(p.name)[1] and p.name not in made for p in source.iterdir()
    ):
        return False
    return any(dicom_files.is_dicom(path) for path in dicom_files.all_files(source))


def list_series(source: Path) -> str:
    """The series of a folder as a table.

    Raises:
        FileNotFoundError, ModuleNotFoundError, DicomError: as :func:`dicom_series.find_series`.
    """
    return dicom_series.listing(dicom_series.find_series(source))


def find_tasks(
    source: Path,
    output: Path,
    writing: Writing,
    *,
    wanted: Sequence[str] = (),
    num_channels: int = 1,
) -> tuple[DicomTask, ...]:
    """List the series of a DICOM file or folder as tasks, with outputs in the folder ``output``.

    Series that are no volume are listed with their problem, so that the others are predicted.

    Raises:
        FileNotFoundError: if the source is missing.
        ModuleNotFoundError: if pydicom is, or highdicom where it is needed.
        DicomError: if there is no series, none by a name of ``wanted``, the model takes several
            channels, or the output is a file.
    """
    if num_channels != 1:
        raise DicomError(
            f"the model takes {num_channels} channels, a DICOM series is one\n  Convert the series "
            "to one grid, as CASE_0000.nii.gz, CASE_0001.nii.gz, ..., and give that folder."
        )
    if "dicom-seg" in writing.formats:
        dicom_seg.highdicom()  # find out before the work, not after
    if output.is_file() or split_ending(output.name)[1] or output.suffix == ".dcm":
        raise DicomError(
            "with DICOM as --input, --output is a folder: files in it are named by the series' code"
        )
    found = dicom_series.find_series(source)
    dicom_series.warn_of_unreadable(found)
    chosen = dicom_series.select(found, wanted)
    for series in chosen:
        LOGGER.info("%s: %s voxels", series.name, series.size)
    return tuple(_task(series, output, writing) for series in chosen)


def _task(series: Series, output: Path, writing: Writing) -> DicomTask:
    stem = f"series_{series.code}"
    files = tuple(dict.fromkeys(s.path for s in series.slices))
    first = output / f"{stem}{ENDINGS[writing.formats[0]]}"
    problem = f"{series.name}: {series.problem}" if series.problem else ""
    return DicomTask(RawCase(stem, files, None), first, problem, series, writing)


def write_outputs(
    label: Integer[np.ndarray, "z y x"],
    series: Series,
    writing: Writing,
    paths: dict[str, Path],
) -> None:
    """Write a label map of a series in the formats that ``paths`` names.

    Raises:
        DicomError: if it cannot be written as one of them.
        ModuleNotFoundError: if pydicom or highdicom is missing.
    """
    assert series.geometry is not None, "a predicted series has a geometry"
    arguments = series, writing.labels, writing.model
    for name, path in paths.items():
        if name == "nifti":
            imageio.write_label(path, label, series.geometry)
        elif name == "dicom-seg":
            dicom_seg.write_seg(label, *arguments, path, anonymous=writing.anonymous)
        else:
            rtstruct.write_rtstruct(label, *arguments, path, anonymous=writing.anonymous)


def describe_model(names: Sequence[str], checksums: Sequence[str]) -> ModelDescription:
    """Describe the models that predict together, by name and the SHA-256 of each set of weights.

    One set of weights keeps its own checksum; several have that of all of theirs.
    """
    if len(checksums) == 1:
        whole = checksums[0]
    else:
        whole = hashlib.sha256("\n".join(checksums).encode()).hexdigest()
    return ModelDescription("+".join(names), panther_jax.__version__, whole)
