"""``data.json`` of a fold: the cases that it trains and validates on, and the version of each."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from panther_jax.base.files import read_object, write_json
from panther_jax.base.sources import Changes, named
from panther_jax.config.schema import ConfigError
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import Store

LOGGER = logging.getLogger("panther_jax")
DATA = "data.json"
DATA_VERSION = 1


def check_data(folder: Path, store: Store, fold: Any, *, allow_change: bool) -> None:
    """Make sure that a fold goes on with the data it was trained on, and note which they are.

    With ``allow_change`` a difference is told only, and what was validated is forgotten.

    Raises:
        ConfigError: naming the cases that differ, or if the note is of a newer version.
        StoreError: if the fold cannot be used.
    """
    now = _data_of(store, fold)
    known = _known(folder)
    problems = _differences(known, now) if known else []
    if problems and not allow_change:
        raise ConfigError(
            f"{folder} was trained on other data than {store.folder} holds now:\n  "
            + "\n  ".join(problems)
            + "\n  Choose another --workdir, discard it with --restart, or go on with the data as "
            "they are with --allow-config-change."
        )
    for line in problems:
        LOGGER.warning("%s: the data changed: %s", folder, line)
    if problems:
        _forget_validations(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DATA, now)


def _data_of(store: Store, fold: Any) -> dict[str, Any]:
    train, val = fold_cases(store, fold)
    cases = {case: _version(store, case) for case in sorted({*train, *val})}
    return {"version": DATA_VERSION, "train": sorted(train), "val": sorted(val), "cases": cases}


def _version(store: Store, case_id: str) -> dict[str, Any]:
    """What is recorded of a case, and of its source files where that is known."""
    if store.nnunet is not None:
        content = (store.folder / f"{case_id}.pkl").read_bytes()
        return {"entry": hashlib.sha256(content).hexdigest(), "sources": None}
    entry = read_object(store.folder / f"{case_id}.json")
    found = entry.pop("sources", None)
    text = json.dumps(entry, sort_keys=True)
    return {"entry": hashlib.sha256(text.encode()).hexdigest(), "sources": found}


def _known(folder: Path) -> dict[str, Any] | None:
    """What a fold was trained on; of runs of version 0.1 only the training cases are known."""
    if (folder / DATA).is_file():
        known = read_object(folder / DATA)
        if known.get("version") != DATA_VERSION:
            raise ConfigError(
                f"{folder / DATA}: version {known.get('version')!r} is not known, expected "
                f"{DATA_VERSION}\n  Use the version of panther_jax that wrote it, or another "
                "--workdir."
            )
        return known
    run = read_object(folder / "run.json") if (folder / "run.json").is_file() else {}
    return {"train": run["training_cases"]} if "training_cases" in run else None


def _differences(known: dict[str, Any], now: dict[str, Any]) -> list[str]:
    lines = []
    for key, what in (("train", "training"), ("val", "validation")):
        old, new = set(known.get(key, now[key])), set(now[key])
        moved = Changes(added=tuple(sorted(new - old)), removed=tuple(sorted(old - new)))
        if moved:
            lines.append(f"{what} cases: {moved}")
    old_cases = known.get("cases", {})
    changed = [i for i, v in now["cases"].items() if i in old_cases and _differs(old_cases[i], v)]
    if changed:
        lines.append(f"{len(changed)} case(s) changed: {named(changed)}")
    return lines


def _differs(old: dict[str, Any], new: dict[str, Any]) -> bool:
    both = old["sources"] and new["sources"]
    return old["entry"] != new["entry"] or bool(both and old["sources"] != new["sources"])


def _forget_validations(folder: Path) -> None:
    for path in sorted(folder.glob("validation_*")):
        (path / "summary.json").unlink(missing_ok=True)
        for part in path.glob(".cases/*.npz"):
            part.unlink()
        LOGGER.warning("%s: is validated anew", path)
