"""Reading and writing of medical images with their geometry."""

import logging
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer, Num

from panther_jax.base.errors import DatasetError
from panther_jax.base.files import writing
from panther_jax.images.geometry import _numbers, geometry_differences
from panther_jax.images.integrity import count_not_finite, require_complete
from panther_jax.plans.geometry import Geometry

MAX_COUNTED = 1 << 16
COUNTED_AT_ONCE = 1 << 14
# spec 02 §1.3: a 2-D image becomes one slice, so thick that resampling leaves its axis alone.
SLICE_THICKNESS_FACTOR = 999.0

logger = logging.getLogger("panther_jax")


# ------------------------------------------------------------------------------------- reading


def read_image(paths: Sequence[Path]) -> tuple[Float32[np.ndarray, "channel z y x"], Geometry]:
    """Read one image file a channel; the geometry is that of the first.

    2-D files become one slice (spec 02 §1.3). Channels whose origin or direction differ are only
    warned about, as in the reference.

    Raises:
        FileNotFoundError: if a file is missing.
        DatasetError: if a file cannot be read or used, or shape or spacing differ between channels.
    """
    if not paths:
        raise DatasetError("no image files given; pass one path a channel")
    channels, first = [], None
    for path in paths:
        array, geometry = _read_array(Path(path))
        first = first or geometry
        _check_channel(first, geometry, Path(paths[0]), Path(path))
        with np.errstate(over="ignore"):  # too large a value becomes inf, refused just below
            channels.append(np.ascontiguousarray(array, dtype=np.float32))
        if array.dtype.kind == "f":
            _require_finite(channels[-1], Path(path))
    assert first is not None
    return channels[0][None] if len(channels) == 1 else np.stack(channels), first


def read_label(
    path: Path, *, unsigned: bool = False
) -> tuple[Integer[np.ndarray, "z y x"], Geometry]:
    """Read a label map as int16, or int32 where a value needs it; floats must hold whole numbers.

    With ``unsigned`` a file of uint8 is left as it is, which takes half the time.

    Raises:
        FileNotFoundError: if the file is missing.
        DatasetError: if the file cannot be read, or holds a value that is not a whole number.
    """
    path = Path(path)
    array, geometry = _read_array(path)
    if array.dtype.kind == "f":
        _require_finite(array, path)
        broken = array != np.rint(array)
        if broken.any():
            examples = ", ".join(f"{v:g}" for v in np.unique(array[broken])[:5])
            raise DatasetError(
                f"{path}: {int(broken.sum())} label voxels are not whole numbers ({examples}, ...)"
                "\n  Labels are integers; was the map resampled with interpolation? Redo it with "
                "nearest neighbour."
            )
    if unsigned and array.dtype == np.uint8:
        return array, geometry
    low, high = array.min(), array.max()
    for dtype in (np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.ascontiguousarray(array, dtype=dtype), geometry
    raise DatasetError(
        f"{path}: label values reach from {low} to {high}, more than 32 bits hold"
        "\n  Renumber the labels from 0."
    )


def label_values(
    label: Integer[np.ndarray, "z y x"],
) -> tuple[Integer[np.ndarray, " value"], Integer[np.ndarray, " value"]]:
    """List the values of a label map, ascending, and their numbers of voxels.

    As ``numpy.unique``, which sorts all voxels, but counting: label values are small.
    """
    low, high = int(label.min()), int(label.max())
    if high - low > MAX_COUNTED:
        return np.unique(label, return_counts=True)
    counts = np.zeros(high - low + 1, np.int64)
    for part in np.array_split(label.reshape(-1), label.size // COUNTED_AT_ONCE + 1):
        if (value := part.min()) == part.max():  # as most parts are
            counts[int(value) - low] += part.size
        else:
            counts += np.bincount(part.astype(np.intp) - low, minlength=counts.size)
    values = np.flatnonzero(counts)
    return values + low, counts[values]


def _read_array(path: Path) -> tuple[np.ndarray, Geometry]:
    import SimpleITK as sitk

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    twin = path.with_name(path.name.removesuffix(".gz"))
    if twin != path and twin.exists():
        # Known of ITK's NIfTI reader: it takes the voxels of the uncompressed file.
        raise DatasetError(f"{path}: {twin.name} lies beside it\n  Remove one of the two.")
    # ITK's own warnings (rounded NIfTI directions) go to stderr past Python; errors still raise.
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _require_scalar_3d(reader, path)
        require_complete(reader, path)
        image = reader.Execute()
        num_lost = count_not_finite(path)
    except (RuntimeError, OSError, EOFError, struct.error, zlib.error) as error:
        raise DatasetError(_unreadable(path, str(error))) from None
    if num_lost:
        raise _not_finite(path, num_lost, math.prod(image.GetSize()))
    return _with_geometry(sitk.GetArrayFromImage(image), image, path)


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


def _require_finite(array: np.ndarray, path: Path) -> None:
    if num_lost := array.size - int(np.count_nonzero(np.isfinite(array))):
        raise _not_finite(path, num_lost, array.size)


def _not_finite(path: Path, count: int, size: int) -> DatasetError:
    return DatasetError(
        f"{path}: {count} of {size} voxels are NaN or infinite"
        "\n  Replace them (by the background's value), or export the image again."
    )


def _check_channel(first: Geometry, other: Geometry, first_path: Path, path: Path) -> None:
    found = geometry_differences(other, first, names=("channel", "first channel"))
    hard = [d for d in found if " shape " in d or " spacing " in d]
    where = f"\n  first: {first_path}\n  other: {path}"
    if hard:
        raise DatasetError(
            f"channels do not fit: {'; '.join(hard)}{where}"
            "\n  Resample all channels of a case to one grid."
        )
    if found:
        logger.warning("%s%s", "; ".join(found), where)


# ------------------------------------------------------------------------------------- writing


def write_label(path: Path, label: Integer[np.ndarray, "z y x"], geometry: Geometry) -> None:
    """Write a label map, compressed: uint8 if its maximum is below 255, else uint16.

    The file appears complete or not at all.

    Raises:
        DatasetError: if the shape is not the geometry's, or a value does not fit.
    """
    low, high = (int(label.min()), int(label.max())) if label.size else (0, 0)
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise DatasetError(f"{path}: label values {low} to {high}; a label file holds 0 to 65535")
    # spec 02 §1.4: 255 itself is written as uint16
    _write(path, label.astype(np.uint8 if high < 255 else np.uint16), geometry)


def write_image(path: Path, image: Num[np.ndarray, "z y x"], geometry: Geometry) -> None:
    """Write one channel, compressed; float32 and int16 are kept, all else becomes float32.

    The file appears complete or not at all.

    Raises:
        DatasetError: if the shape is not the geometry's.
    """
    keep = image.dtype in (np.dtype(np.float32), np.dtype(np.int16))
    _write(path, image if keep else image.astype(np.float32), geometry)


def _write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    import SimpleITK as sitk

    path = Path(path)
    if array.shape != geometry.shape_zyx:
        raise DatasetError(
            f"{path}: array of shape {array.shape}, geometry of shape {geometry.shape_zyx} (z y x)"
        )
    ndim = len(geometry.origin_xyz)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array).reshape(array.shape[-ndim:]))
    image.SetSpacing(tuple(reversed(geometry.spacing_zyx[-ndim:])))
    image.SetOrigin(geometry.origin_xyz)
    image.SetDirection(geometry.direction)
    try:
        with writing(path) as temporary:
            sitk.WriteImage(image, str(temporary), useCompression=True)
    except RuntimeError as error:
        raise DatasetError(f"{path}: cannot be written: {error}".splitlines()[0]) from error
