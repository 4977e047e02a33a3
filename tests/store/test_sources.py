"""A store knows what it was made from: what changed, came or went is named and done again."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import make_raw

from panther_jax.base import sources
from panther_jax.base.errors import FileError, StoreError
from panther_jax.config.loading import load_config
from panther_jax.images.imageio import read_image, read_label, write_image, write_label
from panther_jax.images.raw_dataset import open_raw
from panther_jax.images.splits import make_splits, read_splits
from panther_jax.planner.from_config import plans_from_config
from panther_jax.preprocessing.pipeline import preprocess
from panther_jax.store import store
from panther_jax.store.folds import fold_cases
from panther_jax.store.layout import SOURCES

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.py")


def made(raw_folder, out):
    raw = open_raw(raw_folder)
    preprocess(raw, plans_from_config(load_config(SMOKE)[0], raw.dataset), out)
    return store.open_store(out)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    made(make_raw(folder / "raw", num_cases=6), folder / "store")
    return folder


@pytest.fixture
def both(first, tmp_path):
    """A raw dataset of six cases and its store."""
    shutil.copytree(first, tmp_path / "both")
    return tmp_path / "both" / "raw", tmp_path / "both" / "store"


def image_of(raw, case="case_1"):
    return raw / "imagesTr" / f"{case}_0000.mha"


def label_of(raw, case="case_1"):
    return raw / "labelsTr" / f"{case}.mha"


def correct_label(raw):
    label, geometry = read_label(label_of(raw))
    label[0, 0, 0] = 1
    write_label(label_of(raw), label, geometry)


def brighter_image(raw):
    image, geometry = read_image([image_of(raw)])
    write_image(image_of(raw), image[0] * np.float32(1.5), geometry)


def other_image_of_old_time(raw):
    stat = image_of(raw).stat()
    brighter_image(raw)
    os.utime(image_of(raw), ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swap_labels(raw):
    one, two = label_of(raw), label_of(raw, "case_2")
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def remove(raw, case="case_2"):
    image_of(raw, case).unlink()
    label_of(raw, case).unlink()


def add(raw, case="case_9"):
    shutil.copy(image_of(raw), image_of(raw, case))
    shutil.copy(label_of(raw), label_of(raw, case))


def rename(raw):
    image_of(raw).rename(image_of(raw, "case_9"))
    label_of(raw).rename(label_of(raw, "case_9"))


def add_and_remove(raw):
    remove(raw)
    add(raw)


def all_at_once(raw):
    correct_label(raw)
    add_and_remove(raw)


CASES = [f"case_{k}" for k in range(6)]
CHANGES = {
    "label": (correct_label, {"case_1"}, set(), set(), "1 of 6 cases changed.*case_1 .label."),
    "image": (brighter_image, {"case_1"}, set(), set(), "1 of 6 cases changed.*image_0000"),
    "old time": (other_image_of_old_time, {"case_1"}, set(), set(), "1 of 6 cases changed"),
    "swapped": (swap_labels, {"case_1", "case_2"}, set(), set(), "2 of 6 cases changed"),
    "removed": (remove, set(), {"case_2"}, set(), "no longer in .*deleted.*case_2"),
    "added": (add, set(), set(), {"case_9"}, "1 case.s. are new: case_9"),
    "renamed": (rename, set(), {"case_1"}, {"case_9"}, "no longer in .*case_1"),
    "both": (add_and_remove, set(), {"case_2"}, {"case_9"}, "are new: case_9"),
    "all": (all_at_once, {"case_1"}, {"case_2"}, {"case_9"}, "1 of 6 cases changed"),
}


def stamps(folder):
    return {i: (folder / f"{i}.json").stat().st_mtime_ns for i in store.stored_ids(folder)}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("recorded", [True, False], ids=["record", "lost sizes and times"])
def test_what_changed_is_named_and_done_again(both, caplog, kind, recorded):
    (raw, out), (change, changed, removed, added, message) = both, CHANGES[kind]
    if not recorded:
        (out / SOURCES).unlink()
    before = stamps(out)
    change(raw)
    with caplog.at_level(logging.WARNING):
        opened = made(raw, out)
    assert set(opened.case_ids) == set(CASES) - removed | added
    after = stamps(out)
    assert {i for i in before if i in after and before[i] != after[i]} == changed
    assert any(re.search(message, text) for text in caplog.messages), caplog.messages
    assert not [p for i in removed for p in out.rglob(f"{i}.*")]
    for case in (*changed, *added):
        assert opened.reference(case).read_bytes() == label_of(raw, case).read_bytes()
    assert read_splits(out / "splits_final.json") == make_splits(opened.case_ids)
    assert any("folds are made anew" in t for t in caplog.messages) == bool(removed or added)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        made(raw, out)
    assert [t for t in caplog.messages if "already there" not in t] == []
    assert stamps(out) == after


def touched(raw):
    for path in raw.rglob("*.mha"):
        os.utime(path)


def copied(raw):
    shutil.move(raw, raw.parent / "old")
    shutil.copytree(raw.parent / "old", raw)


@pytest.mark.parametrize("change", [lambda raw: None, touched, copied])
def test_the_same_content_is_left_alone(both, caplog, change):
    raw, out = both
    before = stamps(out)
    change(raw)
    made(raw, out)
    assert stamps(out) == before
    assert [t for t in caplog.messages if "already there" not in t] == []


def without_record(out):
    """As version 0.1 wrote it."""
    shutil.rmtree(out / "provenance")
    for case in store.stored_ids(out):
        entry = json.loads((out / f"{case}.json").read_text())
        del entry["sources"]
        (out / f"{case}.json").write_text(json.dumps(entry))


@pytest.mark.parametrize("change", [None, correct_label, brighter_image])
def test_a_store_without_a_record_is_checked_and_gets_it(both, caplog, change):
    raw, out = both
    without_record(out)
    assert len(store.open_store(out).case_ids) == 6
    if change:
        change(raw)
    with caplog.at_level(logging.WARNING):
        made(raw, out)
    assert any("6 cases have no record" in t for t in caplog.messages)
    assert any("1 of 6 cases changed" in t for t in caplog.messages) == bool(change)
    for case in CASES:
        assert set(json.loads((out / f"{case}.json").read_text())["sources"]) == {
            "image_0000",
            "label",
        }


def test_a_store_of_another_dataset_is_refused_whole(both, tmp_path):
    raw, out = both
    other = make_raw(tmp_path / "other", num_cases=6)
    for path in sorted(other.rglob("case_*")):
        path.rename(path.with_name(path.name.replace("case", "patient")))
    with pytest.raises(StoreError, match=r"(?s)none of which is in .*Use another --out"):
        made(other, out)
    assert len(store.stored_ids(out)) == 6


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"version": 99, "cases": {}}, "(?s)sources.json.*version 99.*Use the version"),
        ({"version": 1}, "(?s)sources.json.*damaged.*Delete this file"),
        ({"version": 1, "cases": {"a": {"label": {}}}}, "(?s)sources.json.*damaged"),
        ([], "(?s)sources.json.*damaged"),
    ],
)
def test_newer_and_damaged_records_are_refused(both, value, message):
    raw, out = both
    (out / SOURCES).write_text(json.dumps(value))
    with pytest.raises(FileError, match=message):
        made(raw, out)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([{"train": CASES[:3], "val": CASES[3:5]}], "are in no fold.*case_5"),
        ([{"train": CASES[:3], "val": [*CASES[3:], "zz"]}], "not in the dataset.*zz"),
    ],
)
def test_given_splits_that_lack_a_case_are_named(tmp_path, caplog, splits, message):
    raw = make_raw(tmp_path / "raw", num_cases=6)
    (raw / "splits_final.json").write_text(json.dumps(splits))
    made(raw, tmp_path / "store")
    assert any(re.search(message, text) for text in caplog.messages)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            {"train": CASES, "val": []},
            "(?s)splits_final.json: fold 0 has no case in val.*--fold all",
        ),
        ({"train": [], "val": CASES}, "(?s)splits_final.json: fold 0 has no case in train"),
        ({"train": ["case_0"] * 2, "val": ["case_1"]}, "(?s)fold 0 .*twice in 'train': case_0"),
        ({"train": ["case_0"], "val": ["case_1"] * 2}, "(?s)fold 0 .*twice in 'val': case_1"),
    ],
)
def test_empty_and_doubled_folds_are_refused(both, split, message):
    _, out = both
    (out / "splits_final.json").write_text(json.dumps([split]))
    with pytest.raises(StoreError, match=message):
        fold_cases(store.open_store(out), 0)


def test_changes_are_told_in_one_line():
    found = sources.changes(
        {"a": {"label": "1"}, "b": {"label": "1"}, "c": {"label": "1"}},
        {"a": {"label": "2"}, "b": {"label": "1"}, "d": {"label": "1"}},
    )
    assert str(found) == "1 changed: a (label); 1 removed: c; 1 added: d"
    assert found and not sources.changes({}, {})


def test_equal_size_and_time_of_writing_do_not_hide_another_content(tmp_path):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"one")
    known = sources.taken({"label": path})
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = sources.taken({"label": path}, known)
    assert sources.difference(sources.digests(known), sources.digests(now)) == "label"


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "scan.nii"
    path.write_bytes(b"one")
    known = sources.take_all({"a": {"label": path}}, {})
    monkeypatch.setattr(sources, "file_sha256", lambda _: pytest.fail("read again"))
    assert sources.take_all({"a": {"label": path}}, known) == known
