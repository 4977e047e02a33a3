"""The table of known public weights."""

import json

import published_layout as layout
import pytest

from panther_jax.weights import __main__ as command
from panther_jax.weights.public import KNOWN, UnknownWeights, of_record, parse_target


def test_the_table_has_what_was_published():
    assert {name: entry.record for name, entry in KNOWN.items()} == {
        "winner-t1": "17212158",
        "winner-t2": "17212158",
        "winner-ct": "17212158",
        "multitalent": "13753413",
        "baseline": "15211865",
    }
    for name, (_, _, _, folds) in layout.MODELS.items():
        entry = KNOWN[name]
        assert entry.model_folder == layout.model_folder(name)
        assert entry.members == tuple(folds) and entry.checkpoint == "best"
        assert any(hint in entry.model_folder for hint in entry.folders)
    assert KNOWN["baseline"].members is None and KNOWN["baseline"].citation is None
    assert all(entry.license is None for entry in KNOWN.values())  # none is known


def test_hints_tell_the_models_of_a_record_apart():
    for entry in KNOWN.values():
        others = [e.model_folder or "" for e in of_record(entry.record) if e != entry]
        assert not any(hint in folder for hint in entry.folders for folder in others)


@pytest.mark.parametrize(
    ("text", "record", "name"),
    [
        ("winner-t2", "17212158", "winner-t2"),
        ("10.5281/zenodo.13753413", "13753413", "multitalent"),
        ("doi:10.5281/ZENODO.13753413", "13753413", "multitalent"),
        ("https://doi.org/10.5281/zenodo.15211865", "15211865", "baseline"),
        ("https://zenodo.org/records/15211865/", "15211865", "baseline"),
        ("17212158", "17212158", None),
        ("10.5281/zenodo.42", "42", None),
    ],
)
def test_what_a_target_means(text, record, name):
    found, entry = parse_target(text)
    assert (found, entry and entry.name) == (record, name)


@pytest.mark.parametrize("text", ["winner", "10.1000/xyz", "../x", "", "10.5281/zenodo.1/../2"])
def test_a_target_that_means_nothing(text):
    with pytest.raises(UnknownWeights, match="(?s)neither a known name nor the DOI.*winner-t1"):
        parse_target(text)


def test_the_list_for_people_and_programs(tmp_path, capsys):
    (tmp_path / "weights" / "baseline").mkdir(parents=True)
    assert command.main(["list", "--root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("winner-t1 "))
    assert "17212158" in row and "0 1 2 3 4 5, best" in row and "not known" in row
    assert str(tmp_path / "weights" / "baseline") in text and "arXiv:2508.21775" in text
    assert command.main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in entries] == list(KNOWN)
    assert entries[0]["doi"] == "10.5281/zenodo.17212158" and entries[4]["checkpoint"] is None
