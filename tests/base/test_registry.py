import re

import pytest

from panther_jax.base.registry import Registry


def make_registry():
    return Registry("colour", ("red", "blue"), remedy="Add yours with COLOURS.add")


def green():
    return "a green"


def test_added_names_follow_the_built_in_ones():
    colours = make_registry()
    assert colours.add("green")(green) is green
    assert colours.names == ("red", "blue", "green")
    assert colours.added("green") is green and colours.added("red") is None
    message = "unknown colour 'pink'; known are red, blue, green. Add yours with COLOURS.add"
    assert colours.unknown("pink") == message


def test_a_name_has_one_owner():
    colours = make_registry()
    with pytest.raises(ValueError, match=r"colour 'red' exists already.*of the package"):
        colours.add("red")(green)
    colours.add("green")(green)
    colours.add("green")(green)
    with pytest.raises(
        ValueError, match=re.escape(f"'green' exists already: it is one of {__file__}")
    ):
        colours.add("green")(lambda: "another green")
    assert colours.added("green") is green


def test_a_file_read_again_replaces_what_it_added(tmp_path):
    colours = make_registry()
    for number in (1, 2):
        code = compile(f"def mauve():\n    return {number}\n", str(tmp_path / "mine.py"), "exec")
        namespace = {}
        exec(code, namespace)
        colours.add("mauve")(namespace["mauve"])
    assert colours.added("mauve")() == 2
