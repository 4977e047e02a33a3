"""Configs found by name, loaded, overridden and compared."""

import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panther_jax.base import plugins
from panther_jax.base.checksums import file_sha256
from panther_jax.config.schema import ConfigError, TrainConfig

# ------------------------------------------------------------------- finding and loading files


def config_folders() -> tuple[Path, ...]:
    """Where a bare config name is looked for, in order (spec 07 §7.5.2)."""
    package = Path(__file__).resolve().parent.parent
    return (Path.cwd() / "configs", package.parent / "configs", package / "configs")


def find_config(name: str) -> Path:
    """The file of a config: an existing path, or a bare name in :func:`config_folders`.

    ``.py`` may be left out.

    Raises:
        ConfigError: listing the folders searched and close matches.
    """
    given = Path(name)
    for path in (given, given.with_name(given.name + ".py")):
        if path.is_file():
            return path.resolve()
    folders = config_folders()
    if given.name == name:
        for folder in folders:
            for path in (folder / name, folder / f"{name}.py"):
                if path.is_file():
                    return path.resolve()
    known = sorted({p.stem for f in folders if f.is_dir() for p in f.glob("*.py")})
    close = difflib.get_close_matches(given.stem, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"config {name!r} not found\n  searched: {', '.join(str(f) for f in folders)}\n"
        f"  {'did you mean ' + ', '.join(close) if close else 'known: ' + ', '.join(known)}?"
    )


@dataclass(frozen=True)
class ConfigSource:
    """Where a config came from: absolute path, SHA-256 of the file, argument, run name."""

    path: Path
    sha256: str
    argument: str | None

    @property
    def run_name(self) -> str:
        """Folder name of the run: `<config>[_<arg>]`."""
        if not self.argument:
            return self.path.stem
        safe = "".join(c if c.isalnum() or c in ".-" else "_" for c in self.argument)
        return f"{self.path.stem}_{safe}"


def load_config(spec: str) -> tuple[TrainConfig, ConfigSource]:
    """Load ``NAME[:ARG]`` by calling the file's ``get_config``.

    Raises:
        ConfigError: if the file is missing, has no ``get_config``, or refuses the argument.
    """
    name, _, argument = spec.partition(":")
    path = find_config(name)
    try:
        module = plugins.run_file(path)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"config {path} cannot be read: {type(error).__name__}: {error}; correct the file"
        ) from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(
            f"config {path} defines no function get_config(); expected one that returns a "
            "TrainConfig"
        )
    takes_argument = bool(inspect.signature(get_config).parameters)
    if argument and not takes_argument:
        raise ConfigError(f"config {path.name} takes no argument, found {argument!r}; leave it out")
    try:
        config = get_config(argument) if takes_argument else get_config()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"config {path}: get_config() failed: {type(error).__name__}: {error}; correct the file"
        ) from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"config {path}: get_config() returned {type(config).__name__}, expected TrainConfig"
        )
    return config, ConfigSource(path, file_sha256(path), argument or None)


def apply_overrides(config: TrainConfig, arguments: Sequence[str], *, prog: str) -> TrainConfig:
    """Apply ``--section.field VALUE`` options; exits with code 2 and a hint on a wrong one."""
    if not arguments:
        return config
    import tyro

    return tyro.cli(TrainConfig, default=config, args=list(arguments), prog=prog)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines ``field: old -> new`` for every leaf in which two JSON dictionaries differ."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
