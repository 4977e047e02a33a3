"""Things of one kind that are found by name: the package's own, and those that a user's file adds.

No JAX here: what a name stands for is a function or a row of a table, used when it is needed.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from panther_jax.base import plugins
from panther_jax.base.errors import PantherError

Thing = TypeVar("Thing")
Added = TypeVar("Added")


class UnknownNameError(PantherError, ValueError):
    """A name that nothing of its kind has; the message lists those there are."""


class Registry(Generic[Thing]):
    """Names of one kind and what they stand for; a name that is taken cannot be replaced."""

    def __init__(self, kind: str, built_in: Sequence[str] = (), *, remedy: str) -> None:
        """Start with names that the package resolves itself; `remedy` says how to add one."""
        self._kind, self._built_in, self._remedy = kind, tuple(built_in), remedy
        self._added: dict[str, Thing] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the package's own first."""
        plugins.load_listed()
        return (*self._built_in, *self._added)

    def add(self, name: str) -> Callable[[Added], Added]:
        """Give a decorator that puts a function, a class or a row under a name.

        A file that is read again replaces what it added before.

        Raises:
            ValueError: for a name that something else has.
        """

        def remember(thing: Added) -> Added:
            known: Any = self._added.get(name)
            if name in self._built_in or (known is not None and _home(known) != _home(thing)):
                whose = "of the package" if known is None else f"of {_home(known)[0]}"
                raise ValueError(
                    f"{self._kind} {name!r} exists already: it is one {whose}; choose another name"
                )
            self._added[name] = thing  # type: ignore[assignment]
            plugins.note_addition()
            return thing

        return remember

    def added(self, name: str) -> Thing | None:
        """Give what was added under a name, None for a name of the package's own or of nothing."""
        if name not in self._added and name not in self._built_in:
            plugins.load_listed()
        return self._added.get(name)

    def find(self, name: str) -> Thing:
        """Give what was added under a name.

        Raises:
            UnknownNameError: listing the names there are, and what to do.
        """
        found = self.added(name)
        if found is None:
            raise UnknownNameError(self.unknown(name))
        return found

    def unknown(self, name: str) -> str:
        """Say in an error's words that there is no such name, which there are, and what to do."""
        close = difflib.get_close_matches(name, self.names, n=1)
        meant = f"; did you mean {close[0]}?" if close else "."
        return (
            f"unknown {self._kind} {name!r}; known are {', '.join(self.names)}{meant} "
            f"{self._remedy}"
        )


def _home(thing: Any) -> tuple[str, str]:
    """File and name of a function or class; of a row, those of the first function it holds."""
    held = (v for v in getattr(thing, "__dict__", {}).values() if hasattr(v, "__code__"))
    code = getattr(thing, "__code__", None)
    if code is None and not isinstance(thing, type):
        code = getattr(next(held, None), "__code__", None)
    file = code.co_filename if code else getattr(thing, "__module__", "?")
    return file, getattr(thing, "__qualname__", None) or (code.co_name if code else repr(thing))
