"""The one rule by which folds and checkpoints of a model are chosen."""

from pathlib import Path

import pytest

from panther_jax.base.folds import FoldsError, choose_checkpoint, choose_folds

MODEL = Path("model")


@pytest.mark.parametrize(
    ("present", "wanted", "taken"),
    [
        (("0", "1"), (), ("0", "1")),
        (("10", "2", "all"), (), ("2", "10")),
        (("0", "1", "all"), ("all",), ("0", "1")),
        (("all",), (), ("all",)),
        (("all",), ("all",), ("all",)),
        (("0", "all"), ("fold_all",), ("all",)),
        (("0", "1"), ("1", "0", "1", "fold_1"), ("1", "0")),
        (("0", "1", "all"), ("fold_all", "all"), ("all", "0", "1")),
        (("",), (), ("",)),
        (("",), ("all",), ("",)),
    ],
)
def test_folds(present, wanted, taken):
    assert choose_folds(MODEL, present, wanted) == taken


@pytest.mark.parametrize(
    ("present", "wanted", "message"),
    [
        ((), (), "model has no fold; there are: none"),
        (("0", "all"), ("4", "5"), "model has no fold 4, 5; there are: 0, all"),
        (("0",), ("fold_all",), "no fold all; there are: 0"),
    ],
)
def test_folds_that_are_missing_are_named(present, wanted, message):
    with pytest.raises(FoldsError, match=message):
        choose_folds(MODEL, present, wanted)


def test_the_folds_taken_and_left_are_said(caplog):
    with caplog.at_level("INFO", "panther_jax"):
        choose_folds(MODEL, ("0", "1", "all"))
        choose_folds(MODEL, ("0", "1", "all"), ("1",))
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "model: fold 0, 1; fold_all is left out, name it with --folds to take it"
    assert second == "model: fold 1"


def test_the_best_checkpoint_stands_in_only_where_no_final_one_is(caplog):
    having = {"final": ["0"], "best": ["0", "1"]}
    assert choose_checkpoint(MODEL, having, "final") == "final"
    assert choose_checkpoint(MODEL, having, "final", ("0", "1")) == "final"
    assert choose_checkpoint(MODEL, having, "best") == "best"
    assert not caplog.records
    assert choose_checkpoint(MODEL, having, "final", ("fold_1",)) == "best"
    assert choose_checkpoint(MODEL, {"best": ["all"]}, "final", ("fold_all",)) == "best"
    assert "the best one is taken" in caplog.text
    assert choose_checkpoint(MODEL, {}, "final") == "final"
