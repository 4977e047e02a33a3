"""Python files of the user that add things to the package: configs, and files named as plugins.

Only a file that the user names is run: a config, ``--plugin FILE``, or what ``PANTHER_JAX_PLUGINS``
lists. Nothing in a run, a bundle or a data set can name one. What is loaded stands in
``sys.modules``; worker processes load the same files again.
"""

import argparse
import importlib.util
import os
import sys
import zlib
from pathlib import Path
from types import FrameType, ModuleType

from panther_jax.base.errors import PantherError

VARIABLE = "PANTHER_JAX_PLUGINS"
HINT = f"If a file of yours adds it, name the file with --plugin FILE or in {VARIABLE}"
_PREFIX = "panther_jax_config_"
_ADDS = "__panther_jax_adds__"


class PluginError(PantherError, ValueError):
    """A plugin that cannot be loaded; the message names the file."""


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module of its own, again if it ran before.

    Raises:
        Exception: whatever the file raises.
    """
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as import does: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_plugin(path: Path) -> ModuleType:
    """Run a plugin once; a file that ran before, as a config too, is left alone.

    Raises:
        PluginError: if the file is missing or fails.
    """
    known = sys.modules.get(_module_name(path))
    if known is not None:
        return known
    if not path.is_file():
        raise PluginError(f"plugin {path} does not exist; name a Python file")
    try:
        module = run_file(path)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {path} cannot be loaded: {type(error).__name__}: {error}; correct the file"
        ) from error
    setattr(module, _ADDS, True)
    return module


def load_listed() -> None:
    """Load the plugins that the environment lists.

    Raises:
        PluginError: if one is missing or fails.
    """
    for entry in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load_plugin(Path(entry))


def plugin_argument(text: str) -> Path:
    """Load the plugin that a command line names; for ``argparse``."""
    try:
        load_plugin(Path(text))
    except PluginError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def note_addition() -> None:
    """Remember that the file that runs now adds something, so that workers load it too."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_PREFIX):
            frame.f_globals[_ADDS] = True
        frame = frame.f_back


def environment() -> dict[str, str]:
    """What a child process needs in its environment to know what this one knows."""
    listed = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
    files = [str(Path(entry).resolve()) for entry in listed]
    for name, module in sys.modules.items():
        if name.startswith(_PREFIX) and getattr(module, _ADDS, False):
            files.append(str(module.__file__))
    return {VARIABLE: os.pathsep.join(dict.fromkeys(files))} if files else {}


def _module_name(path: Path) -> str:
    place = zlib.crc32(str(path.resolve()).encode())
    return f"{_PREFIX}{path.stem}_{place:08x}"
