"""The cases of a store that a fold trains and validates on."""

import logging

import numpy as np

from panther_jax.base.errors import StoreError
from panther_jax.config.places import Fold
from panther_jax.images.splits import SPLIT_SEED, Split, make_splits, read_splits
from panther_jax.store.store import Store

logger = logging.getLogger("panther_jax")


def fold_cases(store: Store, fold: Fold) -> Split:
    """Give the training and validation case ids of a fold (spec 02 §5).

    ``all`` trains and validates on every case; a fold beyond the split file draws 80 % at random.

    Raises:
        StoreError: if the fold is negative, there are too few cases, or a case is not stored.
    """
    if fold == "all":
        return store.case_ids, store.case_ids
    if fold < 0:
        raise StoreError(f"fold must be 'all' or at least 0, found {fold}")
    path = store.splits_file
    splits = read_splits(path) if path.is_file() else make_splits(store.case_ids)
    if fold >= len(splits):
        logger.info("fold %d is not in %s: drawing 80 %% of the cases", fold, path)
        return _random_split(store.case_ids, fold)
    train, val = splits[fold]
    empty = [name for name, ids in (("train", train), ("val", val)) if not ids]
    if empty:
        raise StoreError(
            f"{path}: fold {fold} has no case in {' and '.join(empty)}\n  Name at least one there, "
            "or train on every case with --fold all."
        )
    missing = sorted({*train, *val} - set(store.case_ids))
    if missing:
        raise StoreError(
            f"{path}: {len(missing)} case(s) of fold {fold} are not in the store: "
            f"{', '.join(missing[:20])}\n  Run panther_jax.preprocess again, or correct the split."
        )
    overlap = sorted(set(train) & set(val))
    if overlap:
        logger.warning("fold %d: %d cases both train and validate: %s", fold, len(overlap), overlap)
    return train, val


def _random_split(case_ids: tuple[str, ...], fold: int) -> Split:
    random = np.random.RandomState(SPLIT_SEED + fold)
    drawn = random.choice(len(case_ids), int(len(case_ids) * 0.8), replace=False).tolist()
    rest = tuple(name for i, name in enumerate(case_ids) if i not in set(drawn))
    return tuple(case_ids[i] for i in drawn), rest
