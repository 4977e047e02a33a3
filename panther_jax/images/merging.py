"""Several raw data sets as one, and the splits of the merged one."""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base import workers as processes
from panther_jax.base.errors import DatasetError
from panther_jax.images.conversion import Conversion, Recoding, SourceCase, _name
from panther_jax.images.imageio import read_label
from panther_jax.images.raw_dataset import RawCase, RawDataset, scan_raw
from panther_jax.images.splits import NUM_FOLDS, SPLITS, Split, make_splits, read_splits
from panther_jax.plans.labels import LabelValue

logger = logging.getLogger("panther_jax")


@dataclass(frozen=True)
class AlwaysTrained:
    """Cases that train in every fold and validate in none: ``pattern`` matches their names.

    ``what`` describes one of them, ``option`` is what asked for it; messages use both.
    """

    pattern: str
    what: str
    option: str

    def holds(self, case_id: str) -> bool:
        """Whether a case is one of them."""
        return re.fullmatch(self.pattern, case_id) is not None


@dataclass(frozen=True)
class Merging:
    """How datasets are merged.

    With ``only_label``, all but that label becomes background. With ``with_label``, cases that hold
    no voxel of that label are left out. ``always`` are cases that train in every fold.
    """

    only_label: str | None = None
    with_label: str | None = None
    always: AlwaysTrained | None = None


# --------------------------------------------------------------------------------------- merging


def merged_source(
    inputs: Sequence[Path],
    how: Merging = Merging(),
    *,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
) -> Conversion:
    """Put raw datasets together; labels are matched by name to those of the first.

    Splits are made a dataset and joined fold by fold (spec 02 §3.13). ``options`` go into the
    provenance; ``workers`` processes read label maps where that is needed.

    Raises:
        DatasetError: if names clash, channels or labels do not match, or no case is left.
    """
    scanned = [scan_raw(folder) for folder in inputs]
    raws = [raw for raw, _ in scanned]
    _require_distinct(raws)
    problems = {
        key if any(key == case.id for case in raw.cases) else f"{raw.name}/{key}": texts
        for raw, found in scanned
        for key, texts in found.items()
    }
    recodings = [_merged_recoding(raw, raws[0], how.only_label) for raw in raws]
    kept = [raw.cases for raw in raws]
    if how.with_label is not None:
        kept = [_holding(raw, how.with_label, problems=problems, workers=workers) for raw in raws]
    cases = []
    for recoding, of_raw in zip(recodings, kept, strict=True):
        for case in of_raw:
            if case.id not in problems:
                assert case.label is not None, case.id
                cases.append(SourceCase(case.id, case.images, case.label, recoding))
    first = raws[0].dataset
    labels: Mapping[str, Any] = raws[0].labels.to_dataset_json()
    if how.only_label is not None:
        labels = {"labels": {"background": 0, how.only_label: 1}}
    dataset = {
        "channel_names": first.get("channel_names", first.get("modality")),
        **labels,
        "file_ending": raws[0].file_ending,
        "description": f"merged from {', '.join(raw.name for raw in raws)}",
    }
    left = [(raw, [case.id for case in of_raw]) for raw, of_raw in zip(raws, kept, strict=True)]
    return Conversion(
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        dataset=dataset,
        problems=problems,
        provenance={
            "converter": "merge",
            "sources": [_name(raw.folder) for raw in raws],
            **(options or {}),
        },
        splits=_joined_splits([(raw, ids) for raw, ids in left if ids], how.always),
    )


def _require_distinct(raws: Sequence[RawDataset]) -> None:
    owner: dict[str, list[str]] = {}
    for raw in raws:
        for case in raw.cases:
            owner.setdefault(case.id, []).append(str(raw.folder))
    clashes = [f"  {i}: {' and '.join(f)}" for i, f in sorted(owner.items()) if len(f) > 1]
    if clashes:
        raise DatasetError(
            "\n".join([f"{len(clashes)} case names are in two datasets:", *clashes])
            + "\n  Rename the cases of one dataset; nothing was written."
        )


def _holding(
    raw: RawDataset, label: str, *, problems: dict[str, tuple[str, ...]], workers: int
) -> tuple[RawCase, ...]:
    """The cases of a dataset that hold a label; those that cannot be read become problems."""
    value = dict(raw.labels.names).get(label)
    if value is None:
        known = ", ".join(dict(raw.labels.names))
        raise DatasetError(f"{raw.folder} has no label {label!r}; there are: {known}")
    sound = [case for case in raw.cases if case.id not in problems]
    work = functools.partial(_holds_label, value=value)
    held = dict(processes.map_cases(work, [(c.id, c.label) for c in sound], workers=workers))
    for case_id, found in held.items():
        if isinstance(found, processes.Failure):
            problems[case_id] = (found.message,)
    kept = tuple(case for case in sound if held[case.id] is True)
    if not kept:
        raise DatasetError(f"{raw.folder}: no case holds the label {label!r}; nothing to merge")
    logger.info("%s: %d of %d cases hold %s", raw.name, len(kept), len(sound), label)
    return kept


def _holds_label(path: Path, *, value: LabelValue) -> bool:
    return bool(np.isin(read_label(path)[0], value).any())


def _merged_recoding(raw: RawDataset, first: RawDataset, only: str | None) -> Recoding:
    channels = [r.dataset.get("channel_names", r.dataset.get("modality")) for r in (raw, first)]
    if channels[0] != channels[1]:
        raise DatasetError(
            f"{raw.folder} has channels {channels[0]}, {first.folder} {channels[1]}; only datasets "
            "of the same channels can be merged"
        )
    names, wanted = dict(raw.labels.names), dict(first.labels.names)
    if only is not None:
        value = names.get(only)
        if not isinstance(value, int):
            raise DatasetError(
                f"{raw.folder}: to keep the label {only!r} alone it must have one value, found "
                f"{value!r}"
            )
        return Recoding(((value, 1),), other=0)
    if raw.labels.has_regions or first.labels.has_regions:
        if raw.labels != first.labels:
            raise DatasetError(f"{raw.folder} and {first.folder} declare different regions")
        return Recoding(tuple((v, v) for v in raw.labels.allowed_values))
    if set(names) != set(wanted):
        raise DatasetError(
            f"{raw.folder} has labels {sorted(names)}, {first.folder} {sorted(wanted)}; only "
            "datasets of the same labels can be merged (or all of them with --tumor-only)"
        )
    return Recoding(tuple((_one(names[n]), _one(wanted[n])) for n in names))


def _one(value: LabelValue) -> int:
    return value[0] if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------- splits


def merged_splits(
    raws: Sequence[RawDataset], *, always: AlwaysTrained | None = None
) -> tuple[Split, ...]:
    """Join the datasets' own splits, or nnU-Net's five folds of each, fold by fold.

    Empty if a dataset has neither splits nor enough cases for them.

    Raises:
        DatasetError: if numbers of folds differ, or of the cases that are to train in every fold
            there are none or all, or splits cannot be made.
    """
    return _joined_splits([(raw, [case.id for case in raw.cases]) for raw in raws], always)


def _joined_splits(
    raws: Sequence[tuple[RawDataset, Sequence[str]]], always: AlwaysTrained | None
) -> tuple[Split, ...]:
    """The splits of datasets, each with the ids of its cases that are used."""
    parts, everywhere = [], []
    for raw, used in raws:
        ids = list(used)
        if always is not None:
            everywhere += [i for i in ids if always.holds(i)]
            ids = [i for i in ids if not always.holds(i)]
        if ids:
            parts.append((raw, _splits_of(raw, ids)))
    if always is not None and (not everywhere or not parts):
        raise DatasetError(
            f"{always.option}: {'every' if everywhere else 'no'} case is {always.what}; merge "
            "such cases with others"
        )
    if not all(splits for _, splits in parts):
        few = ", ".join(raw.name for raw, splits in parts if not splits)
        if always is not None:
            raise DatasetError(f"{always.option}: {few} has too few cases for {NUM_FOLDS} folds")
        logger.warning("no %s: %s has too few cases; train with --fold all", SPLITS, few)
        return ()
    counts = {raw.name: len(splits) for raw, splits in parts}
    if len(set(counts.values())) > 1:
        raise DatasetError(f"datasets have splits of different numbers of folds: {counts}")
    folds = zip(*(splits for _, splits in parts), strict=True)
    return tuple(
        (
            (*everywhere, *(i for train, _ in fold for i in train)),
            tuple(i for _, val in fold for i in val),
        )
        for fold in folds
    )


def _splits_of(raw: RawDataset, ids: Sequence[str]) -> tuple[Split, ...]:
    path = raw.folder / SPLITS
    if path.is_file():
        kept = set(ids)
        return tuple(
            (tuple(i for i in train if i in kept), tuple(i for i in val if i in kept))
            for train, val in read_splits(path)
        )
    return make_splits(ids) if len(ids) >= NUM_FOLDS else ()
