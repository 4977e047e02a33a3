"""What a store was made from: the cases that changed, came or went since are found by name.

The JSON of a case holds the digests of the files that it was made from. ``provenance/sources.json``
keeps their sizes and times beside, so that a file is read again only where these differ.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from panther_jax.base import sources
from panther_jax.base.checksums import file_sha256
from panther_jax.base.errors import StoreError
from panther_jax.base.files import read_json, read_object, write_json
from panther_jax.images.raw_dataset import RawCase, RawDataset
from panther_jax.store import store
from panther_jax.store.layout import REFERENCES, SOURCES

logger = logging.getLogger("panther_jax")


def case_files(case: RawCase) -> dict[str, Path]:
    """The source files of a raw case by their role."""
    images = {f"image_{channel:04d}": path for channel, path in enumerate(case.images)}
    return images if case.label is None else {**images, "label": case.label}


def read_sources(folder: Path) -> sources.Records:
    """The records of the source files of a store; none of a store of version 0.1.

    Raises:
        FileError: if they are damaged, or of a newer version.
    """
    path = folder / SOURCES
    return sources.from_json(read_json(path), path) if path.is_file() else {}


def write_sources(folder: Path, records: Mapping[str, sources.Record]) -> None:
    """Keep the records of those cases that the store holds; an equal file is left alone."""
    path, ids = folder / SOURCES, store.stored_ids(folder)
    value = sources.to_json({i: records[i] for i in ids if i in records})
    if not path.is_file() or read_json(path) != value:
        write_json(path, value)


def bring_up_to_date(folder: Path, raw: RawDataset) -> sources.Records:
    """Take out of a store the cases that the raw dataset has otherwise or no more; name them all.

    Returns the records of the cases that stay. A case without a record, of version 0.1, stays if
    its label map is the copy that the store keeps and its images are older; it gets its record.

    Raises:
        StoreError: if the store has cases but none of the raw dataset.
    """
    cases = {case.id: case for case in raw.cases}
    ids = set(store.stored_ids(folder))
    if ids and not ids & set(cases):
        raise StoreError(
            f"store {folder} holds {len(ids)} cases, none of which is in {raw.folder}: it was made "
            "from another dataset\n  Use another --out, or delete the store to make it anew."
        )
    here = sorted(i for i in ids & set(cases) if store.is_complete(folder, i))
    old = {i: _digests(folder, i) for i in here}
    now = sources.take_all({i: case_files(cases[i]) for i in here}, read_sources(folder))
    fresh = {i: sources.digests(now[i]) for i in here}
    changed = {i: sources.difference(old[i] or fresh[i], fresh[i]) for i in here}
    unrecorded = [i for i in here if not old[i]]
    changed |= {i: _doubt(folder, cases[i], fresh[i], raw.file_ending) for i in unrecorded}
    found = sources.Changes(
        {i: why for i, why in changed.items() if why},
        added=tuple(sorted(set(cases) - ids)) if ids else (),
        removed=tuple(sorted(ids - set(cases))),
    )
    _tell(folder, raw, found, unrecorded)
    for case_id in (*found.changed, *found.removed):
        remove_case(folder, case_id, raw.file_ending)
    kept = [i for i in here if i not in found.changed]
    for case_id in set(unrecorded) & set(kept):
        entry = read_object(folder / f"{case_id}.json")
        write_json(folder / f"{case_id}.json", {**entry, "sources": fresh[case_id]})
    return {i: now[i] for i in kept}


def _digests(folder: Path, case_id: str) -> dict[str, str]:
    found = read_object(folder / f"{case_id}.json").get("sources")
    return {str(r): str(d) for r, d in found.items()} if isinstance(found, dict) else {}


def _doubt(folder: Path, case: RawCase, now: Mapping[str, str], ending: str) -> str:
    """Why a case without a record cannot be of these files; empty if nothing speaks against it."""
    entry = folder / f"{case.id}.json"
    copy = folder / REFERENCES / f"{case.id}{ending}"
    if case.label and (not copy.is_file() or file_sha256(copy) != now["label"]):
        return "label"
    made = entry.stat().st_mtime_ns
    newer = [p.name for p in case.images if p.stat().st_mtime_ns > made]
    return f"{', '.join(newer)} newer than the stored case" if newer else ""


def _tell(folder: Path, raw: RawDataset, found: sources.Changes, unrecorded: list[str]) -> None:
    if unrecorded:
        logger.warning(
            "%s: %d cases have no record of their source files (made by an older version): "
            "checked by label map and time; the record is added",
            folder,
            len(unrecorded),
        )
    if found.changed:
        logger.warning(
            "%s: %d of %d cases changed since they were preprocessed: %s; they are done again",
            folder,
            len(found.changed),
            len(raw.cases),
            sources.named(f"{i} ({why})" for i, why in sorted(found.changed.items())),
        )
    if found.removed:
        logger.warning(
            "%s: %d case(s) are no longer in %s and are deleted from the store: %s",
            folder,
            len(found.removed),
            raw.folder,
            sources.named(found.removed),
        )
    if found.added:
        logger.warning(
            "%s: %d case(s) are new: %s", folder, len(found.added), sources.named(found.added)
        )


def remove_case(folder: Path, case_id: str, file_ending: str) -> None:
    """Delete a case's files, its JSON first: what is half deleted is not in the store."""
    (folder / f"{case_id}.json").unlink(missing_ok=True)
    for name in ("image.npy", "label.npy", "locations.npz"):
        (folder / f"{case_id}.{name}").unlink(missing_ok=True)
    (folder / REFERENCES / f"{case_id}{file_ending}").unlink(missing_ok=True)
