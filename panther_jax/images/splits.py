"""Cross-validation splits: which cases train and which validate (spec 02 §5)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from panther_jax.base import sources
from panther_jax.base.errors import StoreError
from panther_jax.base.files import read_json, write_json

SPLITS = "splits_final.json"
NUM_FOLDS = 5
SPLIT_SEED = 12345

logger = logging.getLogger("panther_jax")

Split = tuple[tuple[str, ...], tuple[str, ...]]
"""Training and validation case ids."""


# -------------------------------------------------------------------------------------- splits


def make_splits(case_ids: Sequence[str], num_folds: int = NUM_FOLDS) -> tuple[Split, ...]:
    """Split sorted ids as nnU-Net does: shuffled with its seed, folds listed in order (spec 02 §5).

    Raises:
        StoreError: if there are fewer cases than folds.
    """
    ids = sorted(case_ids)
    if len(ids) < num_folds:
        raise StoreError(
            f"{len(ids)} cases cannot be split into {num_folds} folds; train with --fold all, or "
            f"put a {SPLITS} into the raw dataset folder"
        )
    shuffled = np.arange(len(ids))
    np.random.RandomState(SPLIT_SEED).shuffle(shuffled)
    splits = []
    for part in np.array_split(shuffled, num_folds):
        held_out = set(part.tolist())
        train = tuple(name for i, name in enumerate(ids) if i not in held_out)
        splits.append((train, tuple(ids[i] for i in sorted(held_out))))
    return tuple(splits)


def read_splits(path: Path) -> tuple[Split, ...]:
    """Read a ``splits_final.json``: a list of ``{"train": [...], "val": [...]}``.

    Raises:
        StoreError: if it has another form.
    """
    value = read_json(path)
    valid = isinstance(value, list) and value
    for entry in value if valid else []:
        lists = [entry.get(k) for k in ("train", "val")] if isinstance(entry, Mapping) else [None]
        valid = valid and all(
            isinstance(ids, list) and all(isinstance(i, str) for i in ids) for ids in lists
        )
    if not valid:
        raise StoreError(f'{path}: expected a list of {{"train": [ids], "val": [ids]}}, one a fold')
    for fold, entry in enumerate(value):
        for key in ("train", "val"):
            twice = sorted({i for i in entry[key] if entry[key].count(i) > 1})
            if twice:
                raise StoreError(
                    f"{path}: fold {fold} lists the same case twice in {key!r}: "
                    f"{sources.named(twice)}\n  Correct the file: each case once."
                )
    return tuple((tuple(entry["train"]), tuple(entry["val"])) for entry in value)


def write_splits(raw_folder: Path, folder: Path, case_ids: Sequence[str]) -> None:
    """Copy the raw dataset's splits into the store; make five folds where it has none.

    Fewer cases than folds leave the store without splits; training then needs the fold ``all``.

    Raises:
        StoreError: if the store has splits that differ from the raw dataset's.
    """
    target = folder / SPLITS
    if target.is_file():
        _renew(read_splits(target), target, case_ids)
    if not copy_splits(raw_folder, folder) and not target.is_file() and len(case_ids) >= NUM_FOLDS:
        write_json(target, splits_to_json(make_splits(case_ids)))
    if target.is_file():
        _name_missing(read_splits(target), target, case_ids)


def _all_ids(splits: Sequence[Split]) -> set[str]:
    return {i for fold in splits for ids in fold for i in ids}


def _renew(stored: Sequence[Split], target: Path, case_ids: Sequence[str]) -> None:
    """Remove splits that were made here, by the law, for other cases than there are now."""
    ids = _all_ids(stored)
    if ids == set(case_ids) or len(ids) < NUM_FOLDS:
        return
    law = make_splits(sorted(ids))
    same = len(law) == len(stored) and all(
        set(a) == set(b)
        for ours, theirs in zip(law, stored, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    if same:
        target.unlink()
        logger.warning(
            "%s: the cases changed, so the folds are made anew: runs made before used other folds, "
            "and must not be put together with new ones",
            target,
        )


def _name_missing(splits: Sequence[Split], target: Path, case_ids: Sequence[str]) -> None:
    ids = _all_ids(splits)
    for missing, what in (
        (sorted(set(case_ids) - ids), "are in no fold, so they are never used"),
        (sorted(ids - set(case_ids)), "are not in the dataset, so their folds cannot be trained"),
    ):
        if missing:
            logger.warning(
                "%s: %d case(s) %s: %s; correct the %s of the raw dataset, delete this copy, and "
                "preprocess again",
                *(target, len(missing), what, sources.named(missing), SPLITS),
            )


def copy_splits(raw_folder: Path, folder: Path) -> bool:
    """Copy the raw dataset's splits, if it has any, and tell whether it has.

    Raises:
        StoreError: if ``folder`` has splits that differ from the raw dataset's.
    """
    given, target = raw_folder / SPLITS, folder / SPLITS
    if not given.is_file():
        return False
    splits = read_splits(given)
    if target.is_file():
        _check_same_splits(splits, read_splits(target), given, target)
    else:
        write_json(target, splits_to_json(splits))
    return True


def splits_to_json(splits: Sequence[Split]) -> list[dict[str, list[str]]]:
    """Splits as the content of a ``splits_final.json``."""
    return [{"train": list(train), "val": list(val)} for train, val in splits]


def _check_same_splits(
    given: Sequence[Split], stored: Sequence[Split], path: Path, target: Path
) -> None:
    for fold, ids in enumerate(given):  # spec 02 §5: every fold must match, as sets
        same = fold < len(stored) and all(
            set(a) == set(b) for a, b in zip(ids, stored[fold], strict=True)
        )
        if not same:
            raise StoreError(
                f"{target} differs from {path} in fold {fold}; delete the one that is wrong"
            )
