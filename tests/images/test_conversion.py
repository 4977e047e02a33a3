"""A conversion knows its sources: what changed, came or went is named and made again."""

import json
import re
import shutil

import pytest
from tiny import make_raw

from panther_jax import datasets
from panther_jax.base.errors import FileError
from panther_jax.images.conversion import convert
from panther_jax.images.merging import merged_source
from panther_jax.images.raw_dataset import open_raw


def paths(raw, case):
    return raw / "imagesTr" / f"{case}_0000.mha", raw / "labelsTr" / f"{case}.mha"


def change_image(raw):
    shutil.copy(paths(raw, "case_2")[0], paths(raw, "case_1")[0])


def change_label(raw):
    shutil.copy(paths(raw, "case_2")[1], paths(raw, "case_1")[1])


def remove(raw):
    for path in paths(raw, "case_2"):
        path.unlink()


def add(raw):
    for old, new in zip(paths(raw, "case_2"), paths(raw, "case_9"), strict=True):
        shutil.copy(old, new)


CHANGES = {
    "image": (change_image, "1 of 6 cases changed: case_1 .image_0000."),
    "label": (change_label, "1 of 6 cases changed: case_1 .label."),
    "removed": (remove, "the source of 1 case.s. is gone.*case_2"),
    "added": (add, "1 case.s. are new: case_9"),
}


@pytest.mark.parametrize("link", [[], ["--link"]])
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_sources_are_named_and_converted_again(tmp_path, capsys, kind, link):
    raw, out = make_raw(tmp_path / "raw", num_cases=6), tmp_path / "out"
    command = ["merge", "--inputs", str(raw), "--out", str(out), *link]
    assert datasets.main(command) == 0
    capsys.readouterr()
    change, message = CHANGES[kind]
    change(raw)
    assert datasets.main(command) == 0
    assert re.search(message, capsys.readouterr().err)
    wanted = {case.id for case in open_raw(raw).cases}
    assert {case.id for case in open_raw(out).cases} == wanted
    for case in wanted:
        assert paths(out, case)[0].read_bytes() == paths(raw, case)[0].read_bytes()
    if kind == "removed":
        assert all(p.is_file() for p in paths(out / "removed", "case_2"))
    assert datasets.main(command) == 0
    said = capsys.readouterr().err
    assert f"{len(wanted)} of {len(wanted)} cases are already there" in said
    assert "cases changed" not in said and "are new" not in said


@pytest.mark.parametrize("record", [None, {"version": 99, "cases": {}}])
def test_a_missing_record_is_made_and_a_newer_one_refused(tmp_path, caplog, record):
    raw, out = make_raw(tmp_path / "raw", num_cases=5), tmp_path / "out"
    convert(merged_source([raw]), out)
    about = json.loads((out / "conversion.json").read_text())
    del about["record"]
    if record is not None:
        about["record"] = record
    (out / "conversion.json").write_text(json.dumps(about))
    if record is not None:
        with pytest.raises(FileError, match="(?s)conversion.json.*version 99.*Use the version"):
            convert(merged_source([raw]), out)
        return
    convert(merged_source([raw]), out)
    assert any("5 of 5 cases changed" in t and "no record" in t for t in caplog.messages)
    assert len(json.loads((out / "conversion.json").read_text())["record"]["cases"]) == 5
