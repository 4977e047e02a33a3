"""Files that are whole or not there: written beside, then renamed; JSON in and out."""

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panther_jax.base.errors import CheckpointError, FileError, MissingError, WriteError

TEMPORARY = ".tmp"
STALE_SECONDS = 3600.0
MAX_NAME_BYTES = 200  # of what the name of a temporary folder begins with

# ------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: to the path that this gives, which is renamed at the end.

    That path has the file's name, as some libraries tell the format by it, in a folder of its own
    beside the target; the target's folder is made.

    Raises:
        WriteError: if writing fails, for instance because the disk is full.
    """
    with writing_together() as files:
        yield files.beside(path)


class Writing:
    """Files written under temporary paths that get their own only when all are complete."""

    def __init__(self) -> None:
        self._written: list[tuple[Path, Path]] = []

    def beside(self, path: Path) -> Path:
        """Where to write what becomes ``path``; it has the same name."""
        # Cut, for a name may have 255 bytes.
        start = os.fsdecode(os.fsencode(path.name)[:MAX_NAME_BYTES])
        folder = path.with_name(f".{start}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
        temporary = folder / path.name
        self._written.append((temporary, path))
        folder.mkdir(parents=True)
        return temporary

    def _place(self) -> None:
        for temporary, path in self._written:
            os.replace(temporary, path)

    def _clear(self) -> None:
        for temporary, _ in self._written:
            shutil.rmtree(temporary.parent, ignore_errors=True)


@contextlib.contextmanager
def writing_together() -> Iterator[Writing]:
    """Write several files that appear together, in the order in which they were asked for.

    Raises:
        WriteError: naming the file that was being written; none of them has appeared, unless it is
            renaming that failed.
    """
    files = Writing()
    try:
        yield files
        files._place()
    except WriteError:
        raise
    except OSError as error:
        failed = files._written[-1][1] if files._written else Path(error.filename or ".")
        raise write_error(error, failed) from error
    finally:
        files._clear()


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """Write a folder whole or not at all: fill the one that this gives; it is renamed at the end.

    A folder that is there goes only when the new one is complete.

    Raises:
        WriteError: if the folder cannot be written.
    """
    try:
        with scratch_folder(folder) as temporary:
            yield temporary
            _replace_folder(temporary, folder)
    except WriteError:
        raise
    except OSError as error:
        raise write_error(error, folder) from error


def _replace_folder(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, removed at the end; what a killed run left goes first."""
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Rename what is complete within a file system; a file that is there is replaced at once."""
    try:
        os.replace(source, target)
    except OSError as error:
        raise write_error(error, target) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with writing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What :func:`write_json` writes."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_error(error: OSError, path: Path) -> WriteError:
    """What to tell when ``path`` could not be written: the reason, the space left, the remedy."""
    near = next((p for p in path.parents if p.is_dir()), Path())
    free = shutil.disk_usage(near).free / 2**20
    reason = error.strerror or str(error)
    remedy = "free some space, or choose another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "choose another folder, or get the right to write there"
    return WriteError(
        error.errno or errno.EIO,
        f"cannot write {path}: {reason} ({free:.0f} MiB free). Nothing half-written is left; "
        f"{remedy}, and run the same command again: it continues.",
    )


def require_writable(folder: Path) -> None:
    """Make the folder and find out before the work, not after, that files can be written there.

    Raises:
        OSError: if they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{uuid.uuid4().hex[:12]}{TEMPORARY}"
    probe.write_bytes(b"")
    probe.unlink()


def remove_stale(folder: Path) -> None:
    """Delete what killed runs were writing; young ones may belong to a run still going on."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Make sure that a folder may be written.

    Raises:
        CheckpointError: if it exists and is not to be overwritten.
    """
    if folder.exists() and not overwrite:
        raise CheckpointError(
            f"{folder} exists; choose another name, remove it, or pass --overwrite"
        )


# ------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> Any:
    """Parse a JSON file, with a byte order mark or without.

    Raises:
        MissingError, FileError: naming the file.
    """
    if not path.is_file():
        raise MissingError(errno.ENOENT, f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also text of another coding, endless numbers
        raise FileError(
            f"{path} is not valid JSON: {error}", remedy="Copy it again, or correct it."
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises:
        MissingError, FileError: naming the file.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(
            f"expected a JSON object, found {type(value).__name__}",
            thing=path,
            remedy="Copy it again, or name another file.",
        )
    return value
