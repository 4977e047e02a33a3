"""Get public weights: a record's files, verified, unpacked, checked, and there as a whole.

Everything happens in a hidden folder beside the one asked for, which appears when it is complete.
What was downloaded is kept there for the next try; what is refused is removed.
"""

import contextlib
import datetime
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panther_jax.base.checksums import file_sha256
from panther_jax.base.console import announced
from panther_jax.base.files import move, read_object, write_json
from panther_jax.weights.names import model_in, places
from panther_jax.weights.public import PublicWeights, of_record, parse_target
from panther_jax.weights.record import (
    DownloadError,
    Record,
    RecordFile,
    Service,
    fetch_file,
    fetch_record,
    part_of,
    whole_of,
)
from panther_jax.weights.show import MANIFEST, find_models
from panther_jax.weights.unpack import ArchiveError, require_space, unpack

LOGGER = logging.getLogger("panther_jax")
CHECKPOINTS = (".pth", ".pt", ".ckpt")
OTHER_ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
MAX_LISTED = 8


class RefusedWeights(DownloadError):
    """Files that are not what weights should be; nothing of them was kept."""


@dataclass(frozen=True)
class Got:
    """Where weights are; ``fresh`` if they were downloaded just now."""

    folder: Path
    fresh: bool


def get(
    what: str, *, out: Path | None = None, root: Path = Path("data"), service: Service | None = None
) -> Got:
    """Download the weights of a known name, DOI or record number; verify them if they are there.

    Raises:
        UnknownWeights, DownloadError, ArchiveError, OSError: with what is kept and what to do.
    """
    number, entry = parse_target(what)
    if entry is not None and out is None and (there := _downloaded_before(entry, root)):
        folder = there
    else:
        name = f"zenodo-{number}" if entry is None else entry.name
        folder = out or root / "weights" / name
    target = folder.resolve()  # a link to a larger disk
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.part")
    with _locked(work, folder):
        if _is_there(folder, number):
            _verify(folder)
            shutil.rmtree(work, ignore_errors=True)
            return Got(folder, fresh=False)
        service = service or Service.from_environment()
        record = fetch_record(number, service)
        files = _wanted(record, entry)
        _require_space(files, work)
        try:
            content = _fetch(record, files, work, service)
        except (RefusedWeights, ArchiveError):
            shutil.rmtree(work, ignore_errors=True)
            raise
        move(content, target)
        shutil.rmtree(work, ignore_errors=True)
    if not find_models(folder):
        LOGGER.warning("%s holds no model that is known as such; look at what it holds", folder)
    return Got(folder, fresh=True)


@contextlib.contextmanager
def _locked(work: Path, folder: Path) -> Iterator[None]:
    """One ``get`` at a time works on a folder; the lock goes with the process."""
    import fcntl

    path = work / "lock"
    while True:
        work.mkdir(exist_ok=True)
        try:
            lock = path.open("wb")
        except FileNotFoundError:  # another one has just finished and tidied up
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DownloadError(
                    f"another process is getting {folder} at this moment\n  Wait for it, then run "
                    "the same command again: it verifies what is there."
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    yield
                    return


# ------------------------------------------------------------------------------ what is there


def _downloaded_before(entry: PublicWeights, root: Path) -> Path | None:
    """A download under ROOT/weights that holds the weights, by this or another name."""
    for place in places(entry, root):
        if (place / MANIFEST).is_file() and (
            place.name == entry.name or model_in(place, entry, own=False) is not None
        ):
            return place
    return None


def _is_there(folder: Path, number: str) -> bool:
    """Whether the record is downloaded.

    Raises:
        DownloadError: if the folder holds something else.
    """
    if not folder.is_dir():
        if folder.exists():
            raise DownloadError(f"{folder} is a file; choose another --out")
        return False
    names = sorted(p.name for p in folder.iterdir())
    if not names:
        return False
    if MANIFEST not in names:
        raise DownloadError(
            f"{folder} holds files that were not downloaded by this command: "
            f"{', '.join(names[:MAX_LISTED])}\n  Nothing was changed. Choose another --out, or "
            "move them away."
        )
    found = read_object(folder / MANIFEST).get("record")
    if found != number:
        raise DownloadError(
            f"{folder} holds record {found}, not {number}\n  Choose another --out, or remove it."
        )
    return True


def _verify(folder: Path) -> None:
    """Compare the files with what was noted when they came.

    Raises:
        DownloadError: naming those that are missing or changed.
    """
    noted = read_object(folder / MANIFEST).get("content")
    if not isinstance(noted, dict):
        raise DownloadError(f"{folder / MANIFEST} is damaged; remove {folder} and get it again")
    bad = []
    with announced(f"{folder} is there already: verifying {len(noted)} files"):
        for name, entry in noted.items():
            path = folder / name
            if not path.is_file():
                bad.append(f"{name} is missing")
            elif [path.stat().st_size, file_sha256(path)] != entry:
                bad.append(f"{name} is changed or damaged")
    if bad:
        listed = "\n".join(f"  {text}" for text in bad[:MAX_LISTED])
        raise DownloadError(
            f"{folder} is not what was downloaded; {len(bad)} files differ:\n{listed}\n"
            "  Remove the folder and run the same command again."
        )


# -------------------------------------------------------------------------------- what comes


def _wanted(record: Record, entry: PublicWeights | None) -> tuple[RecordFile, ...]:
    """The files of a record but for those that by their names are of another known model."""
    if entry is None:
        return record.files
    others = [hint for e in of_record(record.id) if e != entry for hint in e.folders]
    skipped = [f for f in record.files if _names(f, others) and not _names(f, entry.folders)]
    for file in skipped:
        LOGGER.info("%s is left out: by its name it is not %s", file.key, entry.name)
    kept = tuple(f for f in record.files if f not in skipped)
    return kept or record.files


def _names(file: RecordFile, hints: Sequence[str]) -> bool:
    return any(hint.casefold() in file.key.casefold() for hint in hints)


def _require_space(files: Sequence[RecordFile], work: Path) -> None:
    needed = 0
    for file in files:
        part = part_of(file, work)
        there = whole_of(file, work).is_file()
        needed += 0 if there else file.size - (part.stat().st_size if part.is_file() else 0)
        needed += file.size if _is_zip(file) else 0  # weights are no smaller when unpacked
    require_space(work, needed, "download and unpack it")


def _fetch(record: Record, files: Sequence[RecordFile], work: Path, service: Service) -> Path:
    """Download, unpack and check; returns the finished folder."""
    content = work / "content"
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir()
    entries: dict[str, tuple[int, str]] = {}
    LOGGER.info("record %s: %s (licence: %s)", record.id, record.title or "no title",
                record.license or "not stated")  # fmt: skip
    for file in files:
        entries |= _take(file, fetch_file(file, work, service), content)
    checked = _check_checkpoints(content)
    note: dict[str, Any] = {
        "record": record.id,
        "doi": record.doi,
        "title": record.title,
        "license": record.license,
        "source": service.api,
        "got": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "files": {f.key: {"size": f.size, "md5": f.md5} for f in files},
        "checkpoints_checked": checked,
        "content": entries,
    }
    write_json(content / MANIFEST, note)
    return content


def _take(file: RecordFile, whole: Path, content: Path) -> dict[str, tuple[int, str]]:
    """Unpack a downloaded file, or put it there as it is; bytes and SHA-256 by path."""
    if _is_zip(file):
        name = file.key[: -len(".zip")]
        with announced(f"unpacking {file.key}"):
            written = unpack(whole, content / name, name=file.key)
        return {f"{name}/{path}": entry for path, entry in written.items()}
    if file.key.casefold() == MANIFEST:
        raise RefusedWeights(f"the record was refused: it holds a file named {MANIFEST}")
    if file.key.casefold().endswith(OTHER_ARCHIVES):
        LOGGER.warning("%s is an archive of another kind than zip: unpack it yourself", file.key)
    try:
        os.link(whole, content / file.key)
    except OSError:  # a file system without links
        shutil.copyfile(whole, content / file.key)
    return {file.key: (file.size, file_sha256(whole))}


def _is_zip(file: RecordFile) -> bool:
    return file.key.casefold().endswith(".zip")


def _check_checkpoints(content: Path) -> bool:
    """Open all checkpoints with the loader that runs nothing; False if there is no PyTorch.

    Raises:
        RefusedWeights: naming the one that is not harmless.
    """
    found = sorted(p for p in content.rglob("*") if p.suffix.casefold() in CHECKPOINTS)
    if not found:
        return True
    if importlib.util.find_spec("torch") is None:
        LOGGER.warning(
            "PyTorch is not installed, so %d checkpoints were not looked into; they are when they "
            "are used", len(found),
        )  # fmt: skip
        return False
    from weight_conversion.torch_files import TorchFileError, read_torch

    with announced(f"checking {len(found)} checkpoints"):
        for path in found:
            try:
                read_torch(path)
            except TorchFileError as error:
                name = path.relative_to(content).as_posix()
                raise RefusedWeights(
                    f"nothing of the download was kept, for one of its files is not safe:\n  "
                    f"{str(error).replace(str(path), name)}"
                ) from None
    return True
