import os
import re
import sys
from pathlib import Path

import pytest

from panther_jax.base import plugins
from panther_jax.base.registry import Registry, UnknownNameError
from panther_jax.base.workers import map_cases


def make_registry():
    return Registry("colour", ("red", "blue"), remedy="Add yours with COLOURS.add")


def green():
    return "a green"


def test_added_names_follow_the_built_in_ones():
    colours = make_registry()
    assert colours.add("green")(green) is green
    assert colours.names == ("red", "blue", "green")
    assert colours.find("green") is green and colours.added("red") is None
    message = "unknown colour 'pink'; known are red, blue, green. Add yours with COLOURS.add"
    assert colours.unknown("pink") == message
    with pytest.raises(UnknownNameError, match="unknown colour 'gren'.*did you mean green?"):
        colours.find("gren")


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
    assert colours.find("green") is green


PLUGIN = """
from dataclasses import dataclass

from panther_jax.preprocessing.normalization import NORMALIZATIONS, normalization


@dataclass(frozen=True)
class Parameter:
    divisor: "float" = 4.0


@normalization("PluginTestQuarter")
def quarter(channel, out, *, intensity, inside):
    out[...] = channel / Parameter().divisor
"""


@pytest.fixture
def name(request):
    return f"Quarter_{request.node.name}"


@pytest.fixture
def plugin(tmp_path, name):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN.replace("PluginTestQuarter", name))
    yield path
    for name in [n for n, m in sys.modules.items() if getattr(m, "__file__", "") == str(path)]:
        del sys.modules[name]


def known_in_a_worker(name):
    from panther_jax.preprocessing.normalization import NORMALIZATIONS

    return name in NORMALIZATIONS.names


def test_a_file_read_again_replaces_what_it_added(plugin, name):
    import numpy as np

    from panther_jax.preprocessing.normalization import normalize

    image, text = np.full((1, 2, 3), 8, np.float32), plugin.read_text()
    for divisor in (4.0, 2.0):
        plugin.write_text(text.replace("4.0", str(divisor)))
        os.utime(plugin, (divisor, divisor))  # or Python takes what it compiled in this second
        plugins.run_file(plugin)
        assert np.all(normalize(image, name) == 8 / divisor)


def test_what_the_environment_lists_is_loaded_when_a_name_is_not_known(plugin, monkeypatch):
    colours = make_registry()
    monkeypatch.setenv(plugins.VARIABLE, str(plugin))
    assert colours.added("pink") is None  # by now it ran, once
    module = plugins.load_plugin(plugin)
    assert colours.names == ("red", "blue")
    assert plugins.load_plugin(plugin) is module
    monkeypatch.setenv(plugins.VARIABLE, str(plugin.with_name("none.py")))
    with pytest.raises(plugins.PluginError, match="none.py does not exist"):
        colours.find("pink")


def test_workers_know_what_a_loaded_file_adds(plugin, name):
    tasks = [(n, n) for n in (name, "Other")]
    assert not dict(map_cases(known_in_a_worker, tasks, workers=2))[name]
    plugins.run_file(plugin)
    before = dict(os.environ)
    found = dict(map_cases(known_in_a_worker, tasks, workers=2))
    assert found == {name: True, "Other": False}
    assert dict(os.environ) == before


def test_a_file_that_adds_nothing_is_no_matter_of_the_workers(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("VALUE = 3\n")
    assert plugins.run_file(path).VALUE == 3
    assert str(path) not in plugins.environment().get(plugins.VARIABLE, "")


def test_a_plugin_that_fails_is_named_and_forgotten(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise KeyError('oh')\n")
    for _ in range(2):
        with pytest.raises(plugins.PluginError, match="broken.py cannot be loaded: KeyError"):
            plugins.load_plugin(path)


def test_every_command_takes_plugins(plugin, capsys):
    from panther_jax.base.command import parser

    made = parser("panther_jax.test", "A test.", "none")
    assert made.parse_args(["--plugin", str(plugin)]).plugin == [Path(plugin)]
    with pytest.raises(SystemExit) as stopped:
        made.parse_args(["--plugin", str(plugin.with_name("none.py"))])
    assert stopped.value.code == 2
    assert "none.py does not exist" in capsys.readouterr().err
