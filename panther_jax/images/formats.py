"""Image formats: how a file of each ending is read and written, and how it is known to be whole.

A format is one entry of :data:`FORMATS`, found by the ending of the file's name; a user's file adds
one. The package's own are ITK's, read by SimpleITK and checked for what ITK does not say.
"""

import contextlib
import functools
import math
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base import plugins
from panther_jax.base.errors import DatasetError
from panther_jax.base.registry import Registry
from panther_jax.images import integrity
from panther_jax.images.geometry import _numbers
from panther_jax.plans.geometry import Geometry

# spec 02 §1.3: a 2-D image becomes one slice, so thick that resampling leaves its axis alone.
SLICE_THICKNESS_FACTOR = 999.0


@dataclass(frozen=True)
class Format:
    """How files of one ending are read and written.

    ``read(path)`` gives the voxels (z, y, x) as they are stored, and their geometry; it raises
    DatasetError for a file that cannot be used. ``write(path, array, geometry)`` writes a whole
    file; ``path`` has the format's ending, and is moved to its place afterwards. Label maps come as
    uint8 or uint16, images as float32 or int16.
    """

    read: Callable[[Path], tuple[np.ndarray, Geometry]]
    write: Callable[[Path, np.ndarray, Geometry], None]


FORMATS: Registry[Format] = Registry(
    "image ending",
    remedy=f"{plugins.HINT}; "
    "panther_jax.images.formats.FORMATS.add('.ENDING')(Format(read, write)) adds one",
)
"""Image formats by the ending of their files, with its dot, in small letters."""


def image_ending(name: str) -> str:
    """The ending of an image's name, ``.nii.gz`` being one; empty if no format has it."""
    lower = name.lower()
    found = max((e for e in FORMATS.names if lower.endswith(e)), key=len, default="")
    return name[len(name) - len(found) :]


def find_format(path: Path) -> Format:
    """The format of a file; what no format claims is left to ITK."""
    ending = image_ending(path.name).lower()
    return FORMATS.find(ending) if ending else _itk()


# ----------------------------------------------------------------------------------------- ITK


def _itk(
    require_whole: Callable[[Path, int], None] | None = None,
    count_lost: Callable[[Path], int] | None = None,
) -> Format:
    """A format that ITK reads, with checks of its own.

    ``require_whole(path, voxel bytes)`` raises RuntimeError for a file that is cut; ``count_lost``
    counts voxels that ITK reads as 0 though they are NaN or infinite.
    """
    reading = functools.partial(_read_itk, require_whole=require_whole, count_lost=count_lost)
    return Format(reading, _write_itk)


def _read_itk(
    path: Path,
    *,
    require_whole: Callable[[Path, int], None] | None,
    count_lost: Callable[[Path], int] | None,
) -> tuple[np.ndarray, Geometry]:
    import SimpleITK as sitk

    # ITK's own warnings (rounded NIfTI directions) go to stderr past Python; errors still raise.
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    try:
        with _name_for_itk(path) as name:
            reader.SetFileName(str(name))
            reader.ReadImageInformation()
            _require_scalar_3d(reader, path)
            if require_whole is not None:
                voxel = sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
                require_whole(path, math.prod(reader.GetSize()) * voxel)
            image = reader.Execute()
        num_lost = 0 if count_lost is None else count_lost(path)
    except (RuntimeError, OSError, EOFError, struct.error, zlib.error) as error:
        raise DatasetError(_unreadable(path, str(error))) from None
    if num_lost:
        raise not_finite(path, num_lost, math.prod(image.GetSize()))
    return _with_geometry(sitk.GetArrayFromImage(image), image, path)


@contextlib.contextmanager
def _name_for_itk(path: Path) -> Iterator[Path]:
    """A name that ITK takes: it knows ``.nii.gz``, but not ``.NII.GZ``."""
    ending = image_ending(path.name)
    if ending == ending.lower():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"image{ending.lower()}")
        link.symlink_to(path.absolute())
        yield link


def _with_geometry(array: np.ndarray, image: Any, path: Path) -> tuple[np.ndarray, Geometry]:
    spacing = tuple(abs(s) for s in reversed(image.GetSpacing()))
    if not all(0 < s < np.inf for s in spacing):
        raise DatasetError(
            f"{path}: spacing {_numbers(spacing)} mm (z y x); expected positive numbers"
            "\n  Fix the header, or convert the image again from its source."
        )
    if array.ndim == 2:
        array, spacing = array[None], (SLICE_THICKNESS_FACTOR * max(spacing), *spacing)
    return array, Geometry(array.shape, spacing, image.GetOrigin(), image.GetDirection())


def _require_scalar_3d(reader: Any, path: Path) -> None:
    size = tuple(reversed(reader.GetSize()))
    if len(size) not in (2, 3):
        raise DatasetError(
            f"{path}: the image has {len(size)} dimensions, size {size}; expected 3"
            "\n  Split it into one 3-D file a channel, named CASE_0000, CASE_0001, ..."
        )
    components = reader.GetNumberOfComponents()
    if components != 1:
        raise DatasetError(
            f"{path}: each voxel holds {components} values (colour or vector image); expected 1"
            "\n  Convert it to one grey-value file a channel, named CASE_0000, CASE_0001, ..."
        )
    if 0 in size:
        raise DatasetError(f"{path}: the image is empty, size {size}\n  Export it again.")


def _unreadable(path: Path, error: str) -> str:
    # The last line of ITK's message says what happened; the rest names C++ sources.
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    reason = lines[-1] if lines else "unknown error"
    if "orthonormal" in error or "determinant" in error:
        remedy = "Its direction matrix is not a rotation: save it again with a corrected header."
    elif "spacing" in reason:
        remedy = "Spacing must be positive: fix the header, or convert the image again."
    else:
        remedy = "Is the file complete, and is its ending right? Copy or export it again."
    return f"{path}: cannot be read: {reason}\n  {remedy}"


def not_finite(path: Path, count: int, size: int) -> DatasetError:
    """The error of a file with voxels that are no numbers."""
    return DatasetError(
        f"{path}: {count} of {size} voxels are NaN or infinite"
        "\n  Replace them (by the background's value), or export the image again."
    )


def _write_itk(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    import SimpleITK as sitk

    ndim = len(geometry.origin_xyz)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array).reshape(array.shape[-ndim:]))
    image.SetSpacing(tuple(reversed(geometry.spacing_zyx[-ndim:])))
    image.SetOrigin(geometry.origin_xyz)
    image.SetDirection(geometry.direction)
    sitk.WriteImage(image, str(path), useCompression=True)


_NIFTI = _itk(integrity.require_whole_nifti, integrity.count_not_finite)
FORMATS.add(".nii.gz")(_NIFTI)
FORMATS.add(".nii")(_NIFTI)
FORMATS.add(".mha")(_itk(integrity.require_whole_mha))
FORMATS.add(".nrrd")(_itk(integrity.require_attached))
FORMATS.add(".gipl")(_itk(integrity.require_whole_gipl))
