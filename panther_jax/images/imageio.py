"""Reading and writing of medical images with their geometry."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer, Num

from panther_jax.base.errors import DatasetError
from panther_jax.base.files import move, writing
from panther_jax.images import formats
from panther_jax.images.endings import lowered, require_utf8
from panther_jax.images.geometry import _numbers, geometry_differences
from panther_jax.plans.geometry import Geometry

MAX_COUNTED = 1 << 16
COUNTED_AT_ONCE = 1 << 14

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
            examples = ", ".join(str(v) for v in np.unique(array[broken])[:5])
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
    """The voxels of a file, as they are stored but with three axes, and their geometry."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    require_utf8(path)
    twin = path.with_name(path.name.removesuffix(".gz"))
    if twin != path and twin.exists():
        # Known of ITK's NIfTI reader: it takes the voxels of the uncompressed file.
        raise DatasetError(f"{path}: {twin.name} lies beside it\n  Remove one of the two.")
    array, geometry = formats.find_format(path).read(path)
    if array.ndim != 3 or array.shape != geometry.shape_zyx or 0 in array.shape:
        raise DatasetError(
            f"{path}: its reader gave an array of shape {array.shape} and a geometry of shape "
            f"{geometry.shape_zyx}; expected z, y, x in both\n  Correct the reader."
        )
    if not all(0 < s < np.inf for s in geometry.spacing_zyx):
        raise DatasetError(
            f"{path}: spacing {_numbers(geometry.spacing_zyx)} mm (z y x); expected positive "
            "numbers\n  Fix the header, or convert the image again from its source."
        )
    return array, geometry


def _require_finite(array: np.ndarray, path: Path) -> None:
    if num_lost := array.size - int(np.count_nonzero(np.isfinite(array))):
        raise formats.not_finite(path, num_lost, array.size)


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
    path = Path(path)
    require_utf8(path)
    if array.shape != geometry.shape_zyx:
        raise DatasetError(
            f"{path}: array of shape {array.shape}, geometry of shape {geometry.shape_zyx} (z y x)"
        )
    try:
        with writing(path) as temporary:
            written = temporary.with_name(lowered(path.name))
            formats.find_format(path).write(written, array, geometry)
            move(written, temporary)
    except RuntimeError as error:
        raise DatasetError(f"{path}: cannot be written: {error}".splitlines()[0]) from error
