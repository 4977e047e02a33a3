"""A Zenodo record and its files over HTTP: asked for again where it broke off, MD5 verified.

Requests go through pooch; a file is whole, with the right checksum and under its final name, or a
``.part`` that the next try goes on with.
"""

import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import panther_jax
from panther_jax.base.console import Progress
from panther_jax.base.errors import PantherError
from panther_jax.base.files import move
from panther_jax.weights.public import DOI_PREFIX
from panther_jax.weights.unpack import safe_parts

LOGGER = logging.getLogger("panther_jax")
API = "https://zenodo.org/api/records"
API_VARIABLE = "PANTHER_JAX_ZENODO_API"
PROGRESS_BYTES = 1 << 20
"""As much more makes a try count as none that failed."""
CHUNK_BYTES = 64 << 10
MAX_RECORD_BYTES = 16 << 20
BUSY = (408, 425, 429)
REST_NOT_SATISFIABLE = 416


class DownloadError(PantherError, RuntimeError):
    """A download that failed or was refused; the message says what is kept and what to do."""


class _Passing(Exception):
    """A failure that may be gone when asked again."""


class _NotWritten(Exception):
    """The disk failed, not the network."""

    def __init__(self, error: OSError):
        self.error = error
        super().__init__()


@dataclass(frozen=True)
class Service:
    """Where records are asked for, and how patiently."""

    api: str = API
    tries: int = 5
    pause_seconds: float = 2.0
    timeout_seconds: float = 60.0

    @staticmethod
    def from_environment() -> "Service":
        """Zenodo, or the mirror that ``PANTHER_JAX_ZENODO_API`` names."""
        return Service(os.environ.get(API_VARIABLE, API).rstrip("/"))


@dataclass(frozen=True)
class RecordFile:
    """A file of a record: its name, bytes, MD5 in hex, address."""

    key: str
    size: int
    md5: str
    url: str


@dataclass(frozen=True)
class Record:
    """What a record says of itself."""

    id: str
    doi: str
    title: str
    license: str | None
    files: tuple[RecordFile, ...]


# ---------------------------------------------------------------------------------- the record


def fetch_record(number: str, service: Service) -> Record:
    """Ask for a record.

    Raises:
        DownloadError: if it is not there, has no files, or names files that cannot be taken.
        ModuleNotFoundError: if pooch is not installed.
    """
    url = f"{service.api}/{number}"

    def ask() -> bytes:
        content = io.BytesIO()
        _transfer(url, _Sink(content, MAX_RECORD_BYTES, f"record {number}"), service, 0)
        return content.getvalue()

    try:
        content = _patiently(ask, f"record {number}", service)
        return _parsed(number, json.loads(content), url)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, _TooLong) as error:
        raise DownloadError(
            f"{url} did not answer with a Zenodo record ({type(error).__name__}: {error})\n"
            f"  Is {API_VARIABLE} right? Try again later, or download by hand."
        ) from None


def _parsed(number: str, entry: Any, url: str) -> Record:
    about = entry.get("metadata") or {}
    licence = about.get("license") or {}
    licence = licence.get("id") if isinstance(licence, dict) else licence
    files = tuple(_file(number, f, url) for f in entry.get("files") or ())
    if not files:
        raise DownloadError(
            f"record {number} has no files that everybody may download\n  Its page says why: "
            f"https://doi.org/{DOI_PREFIX}{number}"
        )
    names = [f.key.casefold() for f in files]
    if len({*names, *(name.removesuffix(".zip") for name in names)}) < len(
        names + [name for name in names if name.endswith(".zip")]
    ):
        raise DownloadError(f"record {number} was refused: two of its files have one name")
    doi, title = str(entry.get("doi") or DOI_PREFIX + number), str(about.get("title") or "")
    return Record(number, doi, title, None if licence is None else str(licence), files)


def _file(number: str, entry: Any, url: str) -> RecordFile:
    key, size, link = entry["key"], entry["size"], entry["links"]["self"]
    parts = safe_parts(key)
    if parts is None or len(parts) != 1 or key.startswith("."):
        raise DownloadError(
            f"record {number} was refused: its file {key!r} cannot be used as a file name\n"
            "  Nothing was downloaded. Get the weights from a source you trust."
        )
    kind, _, digest = str(entry["checksum"]).partition(":")
    if kind != "md5" or re.fullmatch(r"[0-9a-f]{32}", digest) is None:
        raise ValueError(f"checksum {entry['checksum']!r} of {key} is no MD5")
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"size {size!r} of {key}")
    if urlsplit(link).scheme not in ("https", urlsplit(url).scheme):
        raise ValueError(f"address {link!r} of {key}")
    return RecordFile(key, size, digest, link)


# ------------------------------------------------------------------------------------- a file


def part_of(file: RecordFile, folder: Path) -> Path:
    """Where a file grows: named by its checksum, so that it is not taken for another one."""
    return folder / f"{file.md5}.part"


def whole_of(file: RecordFile, folder: Path) -> Path:
    """Where a file is when its checksum was right."""
    return folder / f"{file.md5}.whole"


def fetch_file(file: RecordFile, folder: Path, service: Service) -> Path:
    """Download a file of a record into a folder, from where it broke off; returns its path.

    What has a wrong checksum is removed; what was cut short is kept.

    Raises:
        DownloadError: naming the file, the cause, and what is kept.
        OSError: if it cannot be written.
    """
    whole, part = whole_of(file, folder), part_of(file, folder)
    if whole.is_file() and whole.stat().st_size == file.size:
        LOGGER.info("%s is downloaded already", file.key)
        return whole
    progress = _Meter(file)

    def ask() -> None:
        offset = part.stat().st_size if part.is_file() else 0
        if offset > file.size:
            part.unlink()
            offset = 0
        if offset == file.size and part.is_file():
            return
        with part.open("ab", buffering=0) as opened:  # nothing is left to write when it closes
            sink = _Sink(opened, file.size, file.key, progress.at)
            _transfer(file.url, sink, service, offset)
            if opened.tell() < file.size:
                raise _Passing(f"ended after {opened.tell()} of {file.size} bytes")

    try:
        _patiently(ask, file.key, service, lambda: part.stat().st_size if part.is_file() else 0)
    except _TooLong:
        part.unlink()
        raise DownloadError(
            f"{file.key} was refused: the server sends more than the {file.size} bytes that the "
            "record states; what came was removed\n  Try again later."
        ) from None
    finally:
        progress.close()
    _verify(file, part)
    move(part, whole)
    return whole


def _verify(file: RecordFile, part: Path) -> None:
    found = _pooch().file_hash(str(part), alg="md5")
    if found != file.md5:
        part.unlink()
        raise DownloadError(
            f"{file.key} was refused: its MD5 is {found}, the record states {file.md5}; what came "
            "was removed\n  Run the same command again; if that happens twice, tell the authors "
            "of the record."
        )


class _Meter:
    """Megabytes of a file as a progress line, once there is something to show."""

    def __init__(self, file: RecordFile):
        self.file, self.progress, self._last = file, None, -1
        self.total = max(1, math.ceil(file.size / 1e6))

    def at(self, position: int) -> None:
        done = self.total if position >= self.file.size else int(position / 1e6)
        if self.progress is None or done < self._last:
            self.progress = Progress(self.total, first=done, label=f"{self.file.key}: MB")
        if done != self._last:
            self._last = done
            self.progress.update(done)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()


# ----------------------------------------------------------------------------------- transport


class _TooLong(Exception):
    """More came than was promised."""


class _Sink:
    """What pooch writes to: follows the server's answer to a request for the rest of a file."""

    def __init__(self, file: Any, limit: int, what: str, told: Callable[[int], None] | None = None):
        self.file, self.limit, self.what, self.told = file, limit, what, told
        self.responses: list[Any] = []

    def answered(self, response: Any, *_: Any, **__: Any) -> None:
        """See a response before its body: the rest as asked for, or the whole from the start."""
        self.responses.append(response)
        position = self.file.tell()
        if response.status_code == 200 and position:
            LOGGER.info("%s: the server cannot go on, so it starts again", self.what)
            self.file.seek(0)
            self.file.truncate()
        elif response.status_code == 206:
            begin = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
            if begin is None or int(begin[1]) != position:
                raise _Passing("the server sent another part than asked for")
        if response.status_code in (200, 206) and self.told is not None:
            self.told(self.file.tell())

    def write(self, block: bytes) -> None:
        if self.file.tell() + len(block) > self.limit:
            raise _TooLong
        try:
            rest = memoryview(block)
            while rest:  # a nearly full disk takes a part
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise _NotWritten(error) from error
        if self.told is not None:
            self.told(self.file.tell())

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            raise _NotWritten(error) from error


def _transfer(url: str, sink: _Sink, service: Service, offset: int) -> None:
    """One request, for what comes after ``offset``."""
    headers = {
        "User-Agent": f"panther_jax/{panther_jax.__version__}",
        "Accept-Encoding": "identity",  # lengths and offsets are those of the file
    }
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = _pooch().HTTPDownloader(
        chunk_size=CHUNK_BYTES,
        timeout=service.timeout_seconds,
        headers=headers,
        hooks={"response": sink.answered},
    )
    try:
        request(url, sink, None)
    except _NotWritten as failed:
        name = getattr(sink.file, "name", sink.what)
        raise type(failed.error)(failed.error.errno, failed.error.strerror, name) from failed
    except OSError as error:  # what requests raises is an OSError
        raise _explained(error, url, sink) from error
    finally:
        for response in sink.responses:
            response.close()


def _explained(error: OSError, url: str, sink: _Sink) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == REST_NOT_SATISFIABLE:
        sink.file.truncate(0)
        return _Passing("the server has no such part")
    if status is None or status >= 500 or status in BUSY:
        return _Passing(f"{url}: {status or _innermost(error)}")
    reason = "is not there" if status in (404, 410) else "may not be downloaded"
    return DownloadError(
        f"{sink.what} {reason}: {url} answered {status}\n  Check the number of the record on "
        "Zenodo's page, or download it there by hand."
    )


def _innermost(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _patiently(
    ask: Callable[[], Any], what: str, service: Service, position: Callable[[], int] | None = None
) -> Any:
    """Ask until it works; give up after ``service.tries`` tries in a row without progress."""
    failures, best = 0, 0 if position is None else position()
    while True:
        try:
            return ask()
        except _Passing as error:
            now = 0 if position is None else position()
            failures = 1 if now >= best + PROGRESS_BYTES else failures + 1
            best = max(best, now)
            if failures >= service.tries:
                kept = f"; {now} bytes are kept" if now else ""
                raise DownloadError(
                    f"{what} could not be downloaded: {error}{kept}\n  Check the connection and "
                    "run the same command again: it goes on where it stopped."
                ) from None
            pause = service.pause_seconds * 2 ** (failures - 1)
            LOGGER.warning("%s: %s; trying again in %.0f s", what, error, pause)
            time.sleep(pause)


def _pooch() -> Any:
    try:
        import pooch  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "downloading needs pooch: pip install 'panther-jax[download]', or download the record "
            "by hand, unpack it, and name the model folder"
        ) from None
    return pooch
