"""The store: what is written is read, damage is named, splits are the reference's."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_plans import toy_plans

from panther_jax.base.errors import StoreError, WriteError
from panther_jax.images.splits import make_splits, read_splits, write_splits
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Resampler
from panther_jax.store import store
from panther_jax.store.folds import fold_cases

LABELS = Labels((("background", 0), ("whole", (1, 2)), ("tumor", 1)), (2, 1))
DATASET = {"channel_names": {"0": "MRI"}, "file_ending": ".mha", **LABELS.to_dataset_json()}
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
RESAMPLER = Resampler("resample_torch_fornnunet")
PLANS = toy_plans(RESAMPLER, num_outputs=2)


def make_case(case_id: str, seed: int = 0) -> store.StoredCase:
    random = np.random.default_rng(seed)
    label = random.integers(-1, 3, (4, 5, 6)).astype(np.int8)
    return store.StoredCase(
        id=case_id,
        image=random.standard_normal((1, 4, 5, 6)).astype(np.float32),
        label=label,
        locations=(
            ((1, 2), np.argwhere(label > 0).astype(np.int32)),
            (1, np.zeros((0, 3), np.int32)),
        ),
        properties=Properties(
            Geometry((4, 6, 7), (3.0, 0.1 + 0.2, 1.0), (0.0, 1.0, 2.0), IDENTITY),
            shape_before_crop=(4, 6, 7),
            crop_box=((0, 4), (1, 6), (0, 6)),
            shape_before_resampling=(4, 5, 6),
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference = tmp_path / "label.mha"
    reference.write_bytes(b"raw label map")
    folder = tmp_path / "store"
    store.prepare_store(folder, PLANS, DATASET, fingerprint={"spacings": []})
    for seed, case_id in enumerate(("b", "a_0001", "c")):
        store.write_stored(
            folder, make_case(case_id, seed), reference=reference, file_ending=".mha"
        )
    return folder


# -------------------------------------------------------------------------------------- golden


@pytest.mark.golden
def test_splits(golden: Path, tmp_path: Path) -> None:
    sizes = json.loads((golden / "preprocessing" / "splits.json").read_text())
    assert sizes
    for entry in sizes.values():
        expected = tuple((tuple(s["train"]), tuple(s["val"])) for s in entry["splits"])
        assert make_splits(entry["ids"], len(expected)) == expected
        opened = store.Store(tmp_path, PLANS, LABELS, DATASET, tuple(entry["ids"]))
        for fold, split in enumerate(expected):
            assert fold_cases(opened, fold) == split
        for name, train in entry.items():
            if name.startswith("fold") and name.endswith("_train_not_in_file"):
                fold = int(name.removeprefix("fold").removesuffix("_train_not_in_file"))
                found_train, found_val = fold_cases(opened, fold)
                assert list(found_train) == train
                assert list(found_val) == [i for i in entry["ids"] if i not in set(train)]


@pytest.mark.golden
def test_splits_of_datasets(golden: Path) -> None:
    files = sorted((golden / "preprocessing").glob("*_splits_final.json"))
    assert files
    for path in files:
        expected = read_splits(path)
        ids = [case_id for split in expected for case_id in split[1]]
        assert make_splits(ids, len(expected)) == expected


@pytest.mark.golden
def test_labels_of_datasets(golden: Path) -> None:
    declarations = json.loads((golden / "preprocessing" / "label_manager.json").read_text())
    assert declarations
    for name, expected in declarations.items():
        labels = Labels.from_dataset_json(expected)
        assert list(labels.ids) == expected["all_labels"], name
        assert list(labels.foreground_ids) == expected["foreground_labels"], name
        regions = [list(r) if isinstance(r, tuple) else r for r in labels.regions]
        assert (regions or None) == expected["foreground_regions"], name
        assert labels.has_regions == expected["has_regions"], name
        assert labels.ignore_id == expected["ignore_label"], name
        assert labels.num_outputs == expected["num_segmentation_heads"], name
        order = expected["regions_class_order"]
        assert labels.regions_class_order == (None if order is None else tuple(order)), name


# ------------------------------------------------------------------------------ write and read


@pytest.mark.parametrize("resident", [True, False])
def test_what_is_written_is_read(folder: Path, resident: bool) -> None:
    opened = store.open_store(folder)
    assert opened.case_ids == ("a_0001", "b", "c")
    assert (opened.plans, opened.labels, opened.dataset) == (PLANS, LABELS, DATASET)
    expected, found = make_case("b", 0), store.read_stored(opened, "b")
    found = store.in_memory(found) if resident else found
    assert isinstance(found.image, np.memmap) is not resident
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.label, expected.label)
    assert found.label.dtype == np.int8
    assert found.properties == expected.properties
    assert [key for key, _ in found.locations] == [(1, 2), 1]
    for (_, a), (_, b) in zip(found.locations, expected.locations, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert opened.reference("b").read_bytes() == b"raw label map"
    counts = store.voxel_counts(opened, "b")
    assert counts == {v: int(np.sum(expected.label == v)) for v in np.unique(expected.label)}
    assert json.loads((folder / "dataset_fingerprint.json").read_text()) == {"spacings": []}


def test_same_case_gives_same_bytes(folder: Path, tmp_path: Path) -> None:
    store.write_stored(tmp_path / "other", make_case("c", 2))
    for path in (tmp_path / "other").glob("c.*.np*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize(
    "file", ["b.image.npy", "b.label.npy", "b.locations.npz", "references/b.mha"]
)
@pytest.mark.parametrize("damage", ["truncate", "extend", "delete"])
def test_damaged_file_is_named_with_the_remedy(folder: Path, file: str, damage: str) -> None:
    path = folder / file
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "truncate" else content + b"xyz")
    assert not store.is_complete(folder, "b")
    opened = store.open_store(folder)
    with pytest.raises(StoreError, match=f"(?s){file}.*expected {len(content)} bytes.*again"):
        store.read_stored(opened, "b")
    store.read_stored(opened, "c")


def test_another_array_of_equal_size_is_refused(folder: Path) -> None:
    np.save(folder / "b.label.npy", np.zeros((5, 4, 6), np.int8))
    with pytest.raises(StoreError, match=r"int8 \(5, 4, 6\), expected int8 \(4, 5, 6\)"):
        store.read_stored(store.open_store(folder), "b")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 99}', '{"version": 1}'])
def test_damaged_json_is_named(folder: Path, text: str) -> None:
    (folder / "b.json").write_text(text)
    assert not store.is_complete(folder, "b")
    with pytest.raises(StoreError, match="(?s)b.json cannot be used.*Delete it"):
        store.read_stored(store.open_store(folder), "b")


def test_no_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"panther_jax\.preprocess"):
        store.open_store(tmp_path)
    store.prepare_store(tmp_path, PLANS, DATASET)
    with pytest.raises(StoreError, match="holds no complete case"):
        store.open_store(tmp_path)


def test_absent_case_is_named(folder: Path) -> None:
    with pytest.raises(StoreError, match="'d' is not in the store"):
        store.read_stored(store.open_store(folder), "d")


@pytest.mark.parametrize("case_id", ["plans", "dataset", "splits_final", "dataset_fingerprint"])
def test_case_named_like_a_file_of_the_store(folder: Path, case_id: str) -> None:
    before = (folder / "plans.json").read_bytes()
    with pytest.raises(StoreError, match="cannot be named so"):
        store.write_stored(folder, make_case(case_id))
    assert (folder / "plans.json").read_bytes() == before


# --------------------------------------------------------------------------------------- faults


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("where", ["open", "rename"])
def test_failure_leaves_the_old_files_and_nothing_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = files_of(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if where == "open":
            patched.setattr(np, "savez", fail)
        else:
            patched.setattr(os, "replace", fail)
        with pytest.raises(WriteError, match="the disk is full") as caught:
            store.write_stored(folder, make_case("new"))
    assert caught.value.errno == errno.ENOSPC
    assert files_of(folder) == before


def test_interrupt_removes_temporary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(folder)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write_stored(folder, make_case("new"))
    assert files_of(folder) == before


def test_leftovers_of_a_killed_run_are_ignored_and_in_time_removed(folder: Path) -> None:
    # killed between two renames, and before: no JSON, so no case
    (folder / "d.image.npy").write_bytes(b"whole, but alone")
    young, old = folder / ".d.label.npy.1.tmp", folder / "references" / ".d.mha.2.tmp"
    young.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert store.open_store(folder).case_ids == ("a_0001", "b", "c")
    assert not store.is_complete(folder, "d")
    store.prepare_store(folder, PLANS, DATASET)
    assert young.exists()  # perhaps of a run that goes on
    assert not old.exists()
    store.write_stored(folder, make_case("d"))
    assert store.is_complete(folder, "d")


def test_other_labels_or_channels_are_refused(folder: Path) -> None:
    for change in ({"channel_names": {"0": "CT"}}, {"regions_class_order": [1, 2]}):
        with pytest.raises(StoreError, match="made from other plans"):
            store.prepare_store(folder, PLANS, DATASET | change)
    store.prepare_store(folder, PLANS, DATASET | {"description": "new"})
    assert store.open_store(folder).dataset["description"] == "new"


# --------------------------------------------------------------------------------------- splits


@given(st.integers(5, 60), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_every_case_validates_once(num_cases: int, num_folds: int) -> None:
    ids = [f"case_{i:03d}" for i in range(num_cases)]
    splits = make_splits(ids[::-1], num_folds)
    assert sorted(i for _, val in splits for i in val) == ids
    for train, val in splits:
        assert sorted((*train, *val)) == ids
        assert list(train) == sorted(train)
        assert list(val) == sorted(val)


def test_fold_all_and_too_few_cases(folder: Path) -> None:
    opened = store.open_store(folder)
    assert fold_cases(opened, "all") == (opened.case_ids, opened.case_ids)
    with pytest.raises(StoreError, match="3 cases cannot.*--fold all.*splits_final.json"):
        fold_cases(opened, 0)
    with pytest.raises(StoreError, match="found -1"):
        fold_cases(opened, -1)


def test_splits_of_the_raw_folder_are_copied(folder: Path, tmp_path: Path) -> None:
    given_splits = [{"train": ["c", "a_0001"], "val": ["b"]}, {"train": ["b"], "val": ["zz"]}]
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "splits_final.json").write_text(json.dumps(given_splits))
    write_splits(raw, folder, ["a_0001", "b", "c"])
    opened = store.open_store(folder)
    assert fold_cases(opened, 0) == (("c", "a_0001"), ("b",))
    with pytest.raises(StoreError, match="not in the store: zz"):
        fold_cases(opened, 1)
    train, val = fold_cases(opened, 2)  # not in the file: 80:20
    assert (len(train), len(val)) == (2, 1)
    write_splits(raw, folder, ["a_0001", "b", "c"])  # the same again
    given_splits[1]["val"] = ["c"]
    (raw / "splits_final.json").write_text(json.dumps(given_splits))
    with pytest.raises(StoreError, match="in fold 1"):
        write_splits(raw, folder, ["a_0001", "b", "c"])


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[3]", '[{"train": ["a"]}]', '[{"train": [1], "val": []}]']
)
def test_malformed_splits_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(text)
    with pytest.raises(StoreError, match="expected a list of"):
        read_splits(path)


def test_overlap_is_only_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "splits_final.json").write_text('[{"train": ["b", "c"], "val": ["c"]}]')
    import logging

    logger = logging.getLogger("panther_jax")
    logger.addHandler(caplog.handler)
    try:
        assert fold_cases(store.open_store(folder), 0) == (("b", "c"), ("c",))
    finally:
        logger.removeHandler(caplog.handler)
    assert "both train and validate" in caplog.text
