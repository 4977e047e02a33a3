"""What ITK reads without a word: files that are cut, NIfTI voxels that are NaN or infinite.

Both become zeros in the image.
"""

import gzip
import logging
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

READ_BYTES = 1 << 22
GIPL_HEADER_BYTES = 256
NIFTI2_HEADER_BYTES = 540
# Format and offset of dim, pixdim, vox_offset, bitpix, datatype.
NIFTI1_LAYOUT = (("8h", 40), ("8f", 76), ("f", 108), ("h", 72), ("h", 70))
NIFTI2_LAYOUT = (("8q", 16), ("8d", 104), ("q", 168), ("h", 14), ("h", 12))
NIFTI_FLOATS = {16: "f4", 64: "f8"}

logger = logging.getLogger("panther_jax")


def require_whole_mha(path: Path, voxel_bytes: int) -> None:
    """Count the bytes of a MetaImage whose voxels take ``voxel_bytes``.

    Raises:
        RuntimeError: if the file is cut, or its voxels are in another one.
        OSError: if it cannot be read.
    """
    _require(*_mha_bytes(path, voxel_bytes))


def require_whole_nifti(path: Path, _voxel_bytes: int) -> None:
    """Count the bytes of a NIfTI file by its own header.

    Raises:
        RuntimeError: if the file is cut, or its header's spacing is not positive.
        OSError, EOFError, struct.error, zlib.error: if its header cannot be read.
    """
    _require(*_nifti_bytes(path))


def require_whole_gipl(path: Path, voxel_bytes: int) -> None:
    """Count the bytes of a GIPL file whose voxels take ``voxel_bytes``.

    Raises:
        RuntimeError: if the file is cut.
    """
    _require(GIPL_HEADER_BYTES + voxel_bytes, path.stat().st_size)


def _require(needed: int, found: int) -> None:
    if found < needed:
        raise RuntimeError(f"the file is cut: {found} of {needed} bytes are there")


def _mha_bytes(path: Path, voxel_bytes: int) -> tuple[int, int]:
    """Bytes of voxels that the header announces, and that follow it."""
    fields = {}
    with path.open("rb") as file:
        while "ElementDataFile" not in fields and (line := file.readline(1 << 16)):
            key, _, value = line.decode("latin1").partition("=")
            fields[key.strip()] = value.strip()
        offset = file.tell()
    if fields.get("ElementDataFile") != "LOCAL":
        raise RuntimeError(f"its voxels are in another file, {fields.get('ElementDataFile')!r}")
    if "HeaderSize" in fields:
        return 0, 0
    is_compressed = fields.get("CompressedData", "False").casefold() == "true"
    needed = int(fields.get("CompressedDataSize", 0)) if is_compressed else voxel_bytes
    return needed, path.stat().st_size - offset


def require_attached(path: Path, _voxel_bytes: int) -> None:
    """Refuse a NRRD header of another file: an image is one file.

    Raises:
        RuntimeError: if its voxels are in another file.
    """
    with path.open("rb") as file:
        while line := file.readline(1 << 16).strip():
            key, _, value = line.decode("latin1").partition(":")
            if key.strip().casefold() in ("data file", "datafile"):
                raise RuntimeError(f"its voxels are in another file, {value.strip()!r}")


@dataclass(frozen=True)
class _NiftiHeader:
    is_gzip: bool
    byte_order: str
    spacing_xyz: tuple[float, ...]
    offset: int
    voxel_bytes: int
    datatype: int


def _nifti_header(path: Path) -> _NiftiHeader:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with _opened(path, is_gzip) as file:
        header = file.read(NIFTI2_HEADER_BYTES)
    order = "<" if header[0] in (348 & 255, NIFTI2_HEADER_BYTES & 255) else ">"
    is_nifti2 = struct.unpack_from(order + "i", header)[0] == NIFTI2_HEADER_BYTES
    layout = NIFTI2_LAYOUT if is_nifti2 else NIFTI1_LAYOUT
    fields = (struct.unpack_from(order + f, header, at) for f, at in layout)
    dim, pixdim, offset, bits, datatype = fields
    size = math.prod(dim[1 : 1 + dim[0]])
    spacing = tuple(pixdim[1 : 1 + min(dim[0], 3)])
    voxel_bytes = size * bits[0] // 8
    return _NiftiHeader(is_gzip, order, spacing, int(offset[0]), voxel_bytes, datatype[0])


def _opened(path: Path, is_gzip: bool) -> Any:
    return gzip.open(path, "rb") if is_gzip else path.open("rb")


def _nifti_bytes(path: Path) -> tuple[int, int]:
    """Bytes that the header announces, itself included, and that are there, decompressed."""
    header = _nifti_header(path)
    # ITK takes 1 mm where the header says 0 or NaN.
    if not all(0 < abs(p) < math.inf for p in header.spacing_xyz):
        raise RuntimeError(f"spacing {header.spacing_xyz[::-1]} mm (z y x) is not positive")
    needed = header.offset + header.voxel_bytes
    return needed, _gzip_bytes(path, needed) if header.is_gzip else path.stat().st_size


def count_not_finite(path: Path) -> int:
    """Count the NaN and infinite voxels of a NIfTI file, which ITK reads as 0."""
    header = _nifti_header(path)
    if header.datatype not in NIFTI_FLOATS:
        return 0
    dtype = np.dtype(header.byte_order + NIFTI_FLOATS[header.datatype])
    count, left = 0, header.voxel_bytes
    with _opened(path, header.is_gzip) as file:
        file.read(header.offset)
        while left and (data := file.read(min(left, READ_BYTES))):
            count += int(np.count_nonzero(~np.isfinite(np.frombuffer(data, dtype))))
            left -= len(data)
    return count


def _gzip_bytes(path: Path, needed: int) -> int:
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        # A gzip member ends with its length: right at once, but for files of several members.
        if struct.unpack("<I", file.read(4))[0] == needed % (1 << 32):
            return needed
    found = 0
    try:
        with gzip.open(path, "rb") as file:
            while block := file.read1(1 << 20):
                found += len(block)
    except (EOFError, OSError, zlib.error):
        logger.debug("%s: gzip stream ends after %d bytes", path, found)
    return found
