"""One base of all errors: thing, cause, remedy; the builtin kind kept; through a pipe unharmed."""

import errno
import pickle

import pytest

from panther_jax.base import command
from panther_jax.base.errors import DatasetError, MissingError, PantherError, WriteError


def test_a_message_is_made_of_its_parts():
    error = DatasetError("has no label map", thing="case 'a'", remedy="Add it to labelsTr.")
    assert str(error) == "case 'a': has no label map\n  Add it to labelsTr."
    assert (error.thing, error.remedy) == ("case 'a'", "Add it to labelsTr.")
    assert isinstance(error, PantherError) and isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("message", "thing", "remedy"),
    [
        ("a.json: no object\n  Copy it again.", "a.json", "Copy it again."),
        ("a.json: none\n  searched: x\n  Get it,\n  or make it.", "a.json", "Get it, or make it."),
        ("a exists; pass --overwrite", "", "pass --overwrite"),
        ("a is damaged", "", ""),
    ],
)  # fmt: skip
def test_parts_of_a_message_given_whole(message, thing, remedy):
    error = DatasetError(message)
    assert (str(error), error.thing, error.remedy) == (message, thing, remedy)


def test_errors_of_the_system_keep_their_number():
    error = WriteError(
        errno.ENOSPC, "cannot write a.npy: the disk is full", remedy="Free some space."
    )
    assert error.errno == errno.ENOSPC and str(error).startswith("cannot write a.npy")
    assert error.remedy == "Free some space."
    with pytest.raises(FileNotFoundError, match="^a.json does not exist$"):
        raise MissingError(errno.ENOENT, "a.json does not exist")


@pytest.mark.parametrize(
    "error",
    [
        DatasetError("broken", thing="a.mha", remedy="Copy it again."),
        WriteError(errno.EACCES, "cannot write a.npy: denied", remedy="Choose another place."),
    ],
)
def test_errors_pass_from_process_to_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert (again.thing, again.remedy) == (error.thing, error.remedy)


def test_a_command_prints_the_message_as_it_is(capfd):
    def body():
        raise WriteError(errno.ENOSPC, "cannot write a.npy: the disk is full; free some space")

    assert command.run(body, quiet=False, debug=False) == command.FAILED
    assert (
        capfd.readouterr().err == "error: cannot write a.npy: the disk is full; free some space\n"
    )
