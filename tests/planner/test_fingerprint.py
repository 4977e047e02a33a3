"""A fingerprint knows the cases that it was measured on."""

import json
import shutil

import pytest
from tiny import make_raw

from panther_jax.base.errors import FileError
from panther_jax.images.raw_dataset import open_raw
from panther_jax.planner import fingerprint


def change(raw):
    shutil.copy(raw / "labelsTr" / "case_0.mha", raw / "labelsTr" / "case_1.mha")


def replace(raw):
    for path in sorted(raw.rglob("case_2*")):
        path.rename(path.with_name(path.name.replace("case_2", "case_7")))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (None, ""),
        (change, "1 changed: case_1 (label)"),
        (replace, "1 removed: case_2; 1 added: case_7"),
    ],
)
def test_other_cases_are_measured_again(tmp_path, monkeypatch, caplog, do, message):
    folder, times = make_raw(tmp_path / "raw", num_cases=3), []
    extract = fingerprint.extract_fingerprint

    def counted(*arguments, **options):
        times.append(1)
        return extract(*arguments, budget=300, **options)

    monkeypatch.setattr(fingerprint, "extract_fingerprint", counted)
    fingerprint.dataset_fingerprint(open_raw(folder), tmp_path)
    if do:
        do(folder)
    for _ in range(2):
        found = fingerprint.dataset_fingerprint(open_raw(folder), tmp_path)
    assert len(times) == (2 if do else 1) and message in caplog.text
    assert set(found["sources"]["cases"]) == {case.id for case in open_raw(folder).cases}


def test_a_newer_record_is_refused(tmp_path):
    raw = open_raw(make_raw(tmp_path / "raw", num_cases=3))
    (tmp_path / "dataset_fingerprint.json").write_text(json.dumps({"sources": {"version": 99}}))
    with pytest.raises(FileError, match="(?s)fingerprint.json.*version 99.*Use the version"):
        fingerprint.dataset_fingerprint(raw, tmp_path)
