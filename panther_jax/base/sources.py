"""What derived data were made from: a record of each source file, and how cases differ from it.

A file counts as unchanged while its size and times are those of the record; only else it is read
for its SHA-256, so that a data set that was merely copied or touched is not made again. Names do
not count: a case that moved is the same case.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from panther_jax.base.checksums import file_sha256
from panther_jax.base.errors import FileError

RECORD_VERSION = 1
MAX_NAMED = 20
THREADS = 4

Files = Mapping[str, Path]
"""The source files of a case by their role, e.g. ``image_0000`` and ``label``."""
Record = dict[str, dict[str, Any]]
"""Of each role: ``name``, ``bytes``, ``mtime_ns``, ``ctime_ns``, ``sha256`` of the file."""
Records = dict[str, Record]
"""The record of each case."""


def taken(files: Files, known: Mapping[str, Mapping[str, Any]] | None = None) -> Record:
    """The record of a case's files as they are now; ``known`` is an earlier one.

    Raises:
        OSError: if a file cannot be read.
    """
    return {role: _entry(path, (known or {}).get(role, {})) for role, path in files.items()}


def _entry(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    stat = path.stat()  # before reading: a change in between is found at the next look
    entry = {
        "name": path.name,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,  # an equal time of change cannot be set from outside
    }
    if "sha256" in known and all(known.get(k) == entry[k] for k in entry if k != "name"):
        return {**entry, "sha256": known["sha256"]}
    return {**entry, "sha256": file_sha256(path)}


def take_all(cases: Mapping[str, Files], known: Mapping[str, Record]) -> Records:
    """The records of many cases as they are now, in sorted order."""
    with ThreadPoolExecutor(THREADS) as threads:  # hashing lets other threads run
        now = threads.map(lambda name: taken(cases[name], known.get(name)), sorted(cases))
        return dict(zip(sorted(cases), now, strict=True))


def digests(record: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The content of a record: a digest a role."""
    return {role: str(entry["sha256"]) for role, entry in record.items()}


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Roles in which the digests of a case differ, as text; empty if they are the same."""
    roles = sorted({*old, *new})
    return ", ".join(role for role in roles if old.get(role) != new.get(role))


@dataclass(frozen=True)
class Changes:
    """How cases differ from what derived data were made from; ``changed`` says in what, by id."""

    changed: Mapping[str, str] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.changed or self.added or self.removed)

    def __str__(self) -> str:
        """The cases by name, in one line."""
        parts = []
        if self.changed:
            parts.append(f"{len(self.changed)} changed: {named(_with_reasons(self.changed))}")
        if self.removed:
            parts.append(f"{len(self.removed)} removed: {named(self.removed)}")
        if self.added:
            parts.append(f"{len(self.added)} added: {named(self.added)}")
        return "; ".join(parts)


def _with_reasons(changed: Mapping[str, str]) -> list[str]:
    return [f"{case} ({why})" if why else case for case, why in sorted(changed.items())]


def named(names: Iterable[str]) -> str:
    """Names in one line, the first of many."""
    found = list(names)
    more = f", and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more


def changes(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> Changes:
    """Compare cases by their digests (:func:`digests`)."""
    differing = {case: difference(old[case], new[case]) for case in sorted({*old} & {*new})}
    return Changes(
        changed={case: why for case, why in differing.items() if why},
        added=tuple(sorted({*new} - {*old})),
        removed=tuple(sorted({*old} - {*new})),
    )


# ----------------------------------------------------------------------------------- as JSON


def to_json(records: Mapping[str, Record]) -> dict[str, Any]:
    """Records as the value that :func:`from_json` reads."""
    return {"version": RECORD_VERSION, "cases": {name: records[name] for name in sorted(records)}}


def from_json(value: Any, path: Path) -> Records:
    """Read records that ``path`` holds.

    Raises:
        FileError: if they are of a newer version, or damaged.
    """
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > RECORD_VERSION:
        raise FileError(
            f"its record of source files has version {version}, this version of panther_jax knows "
            f"{RECORD_VERSION}",
            thing=path,
            remedy="Use the version of panther_jax that wrote it, or another folder.",
        )
    try:
        if version != RECORD_VERSION:
            raise ValueError(f"version {version!r}")
        for record in value["cases"].values():
            digests(record)
        return dict(value["cases"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileError(
            f"its record of source files is damaged ({type(error).__name__}: {error})",
            thing=path,
            remedy="Delete this file, and run the same command again: it makes it anew.",
        ) from None
