"""Files that are whole or not there: written beside, then renamed; JSON in and out."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from panther_jax.base.errors import CheckpointError, PlansError


def write_text(path: Path, text: str) -> None:
    """Write a file by a temporary name and a rename, so that it is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:  # of a full disk it names no file
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON by a temporary name and a rename."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError, PlansError: naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also text of another coding, endless numbers
        raise PlansError(
            f"{path} is not valid JSON: {error}\n  Copy it again, or correct it."
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object.

    Raises:
        FileNotFoundError, PlansError: naming the file.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise PlansError(
            f"{path}: expected a JSON object, found {type(value).__name__}\n  Copy it again, or "
            "name another file."
        )
    return value


TEMPORARY = ".tmp"


class StoreWriteError(OSError):
    """The store cannot be written, for instance because the disk is full."""


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _copy(source: Path, file: IO[bytes]) -> None:
    with source.open("rb") as opened:
        shutil.copyfileobj(opened, file)


class _Renaming:
    """Files written under temporary names that get their own only when all are complete."""

    def __init__(self) -> None:
        self._written: list[tuple[Path, Path]] = []

    def write(self, path: Path, write: Callable[[IO[bytes]], Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
        self._written.append((temporary, path))
        with temporary.open("wb") as file:
            write(file)

    def size(self, path: Path) -> int:
        return next(t for t, p in self._written if p == path).stat().st_size

    def __enter__(self) -> "_Renaming":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is None:
                for temporary, path in self._written:
                    os.replace(temporary, path)
        except OSError as failure:
            raise _write_error(failure, self._written[0][1]) from failure
        finally:
            for temporary, _ in self._written:
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, StoreWriteError):
            raise _write_error(error, self._written[-1][1]) from error


def _write_error(error: OSError, path: Path) -> StoreWriteError:
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0.0
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "the disk is full"
    return StoreWriteError(
        error.errno or errno.EIO,
        f"cannot write {path}: {reason} ({free:.0f} MiB free). Nothing half-written is left; free "
        "some space, or choose another folder, and run the same command again: it continues.",
    )


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """Make sure that a folder may be written.

    Raises:
        CheckpointError: if it exists and is not to be overwritten.
    """
    if folder.exists() and not overwrite:
        raise CheckpointError(
            f"{folder} exists; choose another name, remove it, or pass --overwrite"
        )


def replace_folder(new: Path, folder: Path) -> None:
    """Move ``new`` to ``folder``; what is there goes only when the new one is complete."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
