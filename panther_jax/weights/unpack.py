"""Unpack a zip archive of somebody else: nothing leaves the folder, nothing is overwritten."""

import hashlib
import re
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from panther_jax.base.errors import PantherError

MAX_MEMBERS = 100_000
MAX_RATIO = 20
"""Weights hardly shrink in a zip: an archive that grows more than this is a bomb."""
FREE_BYTES = 64 << 20
"""What an archive may hold whatever its own size: plans and logs shrink well."""
BLOCK_BYTES = 1 << 20
LITTER = "__MACOSX"
Progress = Callable[[int, int], None]


class ArchiveError(PantherError, ValueError):
    """An archive that is damaged, or that is not safe to unpack."""


def unpack(
    archive: Path, folder: Path, *, name: str = "", progress: Progress | None = None
) -> dict[str, tuple[int, str]]:
    """Unpack into a new folder; bytes and SHA-256 of every file by its path below the folder.

    All members are checked before the first is written. ``name`` is what messages call the archive.

    Raises:
        ArchiveError: naming the archive, the member and what is wrong with it.
        OSError: if there is too little space, or the folder exists.
    """
    name = name or archive.name
    try:
        with zipfile.ZipFile(archive) as opened:
            members = list(_checked(name, archive, opened))
            total = sum(member.file_size for member, _ in members)
            require_space(folder.parent, total, f"unpack {name}")
            folder.mkdir()
            written, done = {}, 0
            for member, parts in members:
                path = folder.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                written["/".join(parts)] = _write(opened, member, path)
                done += member.file_size
                if progress is not None:
                    progress(done, total)
            return written
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ArchiveError(
            f"{name} was not unpacked: it is no zip archive, damaged, or packed in a way that "
            f"cannot be read ({error})\n  Tell the authors of the record, or unpack it by hand."
        ) from None


def require_space(folder: Path, needed: int, what: str) -> None:
    """Find out before the work whether a disk has room.

    Raises:
        OSError: naming the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"too little space in {folder} to {what}: {_gigabytes(needed)} are needed, "
            f"{_gigabytes(free)} are free\n  Free some space, or choose another --out; what is "
            "downloaded is kept."
        )


def safe_parts(name: str) -> tuple[str, ...] | None:
    """The parts of a relative path with ``/``; None if it could lead anywhere else."""
    parts = name.split("/")
    if parts and parts[-1] == "":  # a folder
        parts = parts[:-1]
    bad = (
        not parts
        or any(part in ("", ".", "..") or len(part.encode(errors="replace")) > 255
               for part in parts)
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or not name.isprintable()
    )  # fmt: skip
    return None if bad else tuple(parts)


def _checked(
    name: str, archive: Path, opened: zipfile.ZipFile
) -> Iterator[tuple[zipfile.ZipInfo, tuple[str, ...]]]:
    """The files of an archive with their paths, in its order."""
    members = opened.infolist()
    limit = MAX_RATIO * archive.stat().st_size + FREE_BYTES
    if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > limit:
        raise ArchiveError(
            f"{name} was refused: it would unpack to {len(members)} files of "
            f"{_gigabytes(sum(m.file_size for m in members))} from "
            f"{_gigabytes(archive.stat().st_size)}, which no weights do\n"
            "  Get the weights from a source you trust."
        )
    files: set[str] = set()
    folders: set[str] = set()
    for member in members:
        parts = safe_parts(member.orig_filename)
        problem = _problem(member, parts)
        if problem is None and parts is not None:
            if parts[0] == LITTER:
                continue
            problem = _clash(parts, member.is_dir(), files, folders)
        if problem is not None or parts is None:
            raise ArchiveError(
                f"{name} was refused: its member {member.orig_filename!r} {problem}\n"
                "  Nothing of it was unpacked. Get the weights from a source you trust."
            )
        if not member.is_dir():
            yield member, parts


def _clash(
    parts: tuple[str, ...], is_folder: bool, files: set[str], folders: set[str]
) -> str | None:
    """Enter a path among those before it, and say whether it would overwrite one of them."""
    keys = [_folded(parts[:n]) for n in range(1, len(parts) + 1)]
    own = keys.pop() if not is_folder else None
    folders.update(keys)
    if own is not None and own in files:
        return "is there twice"
    if own in folders or any(key in files for key in keys):
        return "is both a file and a folder"
    if own is not None:
        files.add(own)
    return None


def _problem(member: zipfile.ZipInfo, parts: tuple[str, ...] | None) -> str | None:
    if parts is None:
        return "leads out of the folder, or is no plain relative path"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    return "is encrypted" if member.flag_bits & 1 else None


def _folded(parts: tuple[str, ...]) -> str:
    """What two names have in common that some file systems take for one."""
    return unicodedata.normalize("NFC", "/".join(parts)).casefold()


def _write(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with opened.open(member) as source:
        try:
            with path.open("xb") as file:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    file.write(block)
        except OSError as error:  # of a full disk it names no file
            if error.errno is None:
                raise
            raise type(error)(error.errno, error.strerror, str(path)) from error
    return size, digest.hexdigest()


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
