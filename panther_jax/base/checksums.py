"""Checksums of files: of one by its content, of a folder's against changed bits.

Those of a folder are meant against damage, not against forgery (CRC-32): whoever can change a file
can change its checksum.
"""

import hashlib
import zlib
from pathlib import Path

from panther_jax.base.errors import PantherError
from panther_jax.base.files import read_object, write_json

CHECKSUMS = "crc32.json"
READ_BYTES = 1 << 20


class ChecksumError(PantherError, ValueError):
    """A file that is not what it was when its checksum was taken."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Note size and checksum of every file below a folder, in the folder itself."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    entries = {p.relative_to(folder).as_posix(): [p.stat().st_size, _crc32(p)] for p in files}
    write_json(folder / CHECKSUMS, entries)


def verify_checksums(folder: Path) -> None:
    """Compare the files of a folder with what was noted; a folder without notes passes.

    Raises:
        ChecksumError: naming the first file that is missing, cut or changed.
        FileError: if the notes themselves are damaged.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    for name, noted in read_object(folder / CHECKSUMS).items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if not isinstance(noted, list) or found != noted[0]:
            state = "is missing" if found is None else f"has {found} bytes, not {noted}"
            raise ChecksumError(f"{name} {state}")
        if _crc32(path) != noted[1]:
            raise ChecksumError(f"{name} is damaged: its checksum is not the one it had")


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum
