"""Several raw data sets as one, and the splits of the merged one."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from panther_jax.base.errors import DatasetError
from panther_jax.images.conversion import Conversion, Recoding, SourceCase, _name
from panther_jax.images.raw_dataset import RawDataset, scan_raw
from panther_jax.images.splits import NUM_FOLDS, SPLITS, Split, make_splits, read_splits
from panther_jax.plans.labels import LabelValue

TUMOR_LABELS: Mapping[str, LabelValue] = {"background": 0, "tumor": 1}
TASK1_CASE = re.compile(r".*_0001")

logger = logging.getLogger("panther_jax")


# --------------------------------------------------------------------------------------- merging


def merged_source(
    inputs: Sequence[Path], *, tumor_only: bool = False, task1_in_all: bool = False
) -> Conversion:
    """Put raw datasets together; labels are matched by name to those of the first.

    With ``tumor_only``, all but the label ``tumor`` becomes background. Splits are made a dataset
    and joined fold by fold; with ``task1_in_all``, cases of task 1 (``…_0001``) train in every fold
    and validate in none (spec 02 §3.13).

    Raises:
        DatasetError: if names clash, or channels or labels do not match.
    """
    scanned = [scan_raw(folder) for folder in inputs]
    raws = [raw for raw, _ in scanned]
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
    problems = {
        key if key in owner else f"{raw.name}/{key}": texts
        for raw, found in scanned
        for key, texts in found.items()
    }
    cases = []
    for raw in raws:
        recoding = _merged_recoding(raw, raws[0], tumor_only)
        for case in raw.cases:
            if case.id not in problems:
                assert case.label is not None, case.id
                cases.append(SourceCase(case.id, case.images, case.label, recoding))
    first = raws[0].dataset
    dataset = {
        "channel_names": first.get("channel_names", first.get("modality")),
        **({"labels": dict(TUMOR_LABELS)} if tumor_only else raws[0].labels.to_dataset_json()),
        "file_ending": raws[0].file_ending,
        "description": f"merged from {', '.join(raw.name for raw in raws)}",
    }
    return Conversion(
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        dataset=dataset,
        problems=problems,
        provenance={
            "converter": "merge",
            "sources": [_name(raw.folder) for raw in raws],
            "tumor_only": tumor_only,
            "task1_in_all": task1_in_all,
        },
        splits=merged_splits(raws, task1_in_all=task1_in_all),
    )


def _merged_recoding(raw: RawDataset, first: RawDataset, tumor_only: bool) -> Recoding:
    channels = [r.dataset.get("channel_names", r.dataset.get("modality")) for r in (raw, first)]
    if channels[0] != channels[1]:
        raise DatasetError(
            f"{raw.folder} has channels {channels[0]}, {first.folder} {channels[1]}; only datasets "
            "of the same channels can be merged"
        )
    names, wanted = dict(raw.labels.names), dict(first.labels.names)
    if tumor_only:
        tumor = names.get("tumor")
        if not isinstance(tumor, int):
            raise DatasetError(
                f"{raw.folder}: --tumor-only needs a label 'tumor' of one value, found {tumor!r}"
            )
        return Recoding(((tumor, 1),), other=0)
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


def merged_splits(raws: Sequence[RawDataset], *, task1_in_all: bool = False) -> tuple[Split, ...]:
    """Join the datasets' own splits, or nnU-Net's five folds of each, fold by fold.

    Empty if a dataset has neither splits nor enough cases for them.

    Raises:
        DatasetError: if numbers of folds differ, or with ``task1_in_all`` no case is of task 1, all
            are, or splits cannot be made.
    """
    parts, always = [], []
    for raw in raws:
        ids = [case.id for case in raw.cases]
        if task1_in_all:
            always += [i for i in ids if TASK1_CASE.fullmatch(i)]
            ids = [i for i in ids if not TASK1_CASE.fullmatch(i)]
        if ids:
            parts.append((raw, _splits_of(raw, ids)))
    if task1_in_all and (not always or not parts):
        raise DatasetError(
            f"--task1-in-all: {'no' if not always else 'every'} case is of task 1 (its name ends "
            "with _0001); merge both tasks"
        )
    if not all(splits for _, splits in parts):
        few = ", ".join(raw.name for raw, splits in parts if not splits)
        if task1_in_all:
            raise DatasetError(f"--task1-in-all: {few} has too few cases for {NUM_FOLDS} folds")
        logger.warning("no %s: %s has too few cases; train with --fold all", SPLITS, few)
        return ()
    counts = {raw.name: len(splits) for raw, splits in parts}
    if len(set(counts.values())) > 1:
        raise DatasetError(f"datasets have splits of different numbers of folds: {counts}")
    folds = zip(*(splits for _, splits in parts), strict=True)
    return tuple(
        (
            (*always, *(i for train, _ in fold for i in train)),
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
