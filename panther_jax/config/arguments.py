"""The argument of a config, ``key=value,key=value``."""

from collections.abc import Mapping, Sequence
from typing import Any

from panther_jax.config.schema import ConfigError, _require


def parse_argument(argument: str, known: Sequence[str]) -> dict[str, str]:
    """Split ``key=value,key=value`` of a config argument.

    Raises:
        ConfigError: naming a key that is not known.
    """
    entries: dict[str, str] = {}
    for part in filter(None, argument.split(",")):
        key, separator, value = part.partition("=")
        if not separator or key not in known:
            raise ConfigError(
                f"config argument {part!r} is not understood; expected KEY=VALUE with KEY one of "
                f"{', '.join(known)}"
            )
        entries[key] = value
    return entries


def choose(key: str, given: Mapping[str, str], choices: Mapping[str, Any], *, default: str) -> Any:
    """The value that a config argument names.

    Raises:
        ConfigError: listing the choices.
    """
    name = given.get(key, default)
    _require(name in choices, f"config argument {key}={name}: expected one of {', '.join(choices)}")
    return choices[name]


def number(key: str, given: Mapping[str, str], *, default: int | float) -> Any:
    """The number that a config argument holds, of the type of its default.

    Raises:
        ConfigError: if it is none.
    """
    text = given.get(key)
    try:
        return default if text is None else type(default)(text)
    except ValueError:
        raise ConfigError(f"config argument {key}={text}: expected a number") from None
