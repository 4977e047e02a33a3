"""Things of one kind that a config names: the package's own, and those that a user's file adds.

No JAX here: what a name stands for is a function that is called when the thing is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Maker = TypeVar("Maker", bound=Callable[..., Any])


class Registry:
    """Names of one kind; the package's own cannot be replaced."""

    def __init__(self, kind: str, built_in: Sequence[str], *, remedy: str) -> None:
        """Start with the package's names; `remedy` says in an error how to add one."""
        self._kind, self._built_in, self._remedy = kind, tuple(built_in), remedy
        self._added: dict[str, Callable[..., Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the package's own first."""
        return (*self._built_in, *self._added)

    def add(self, name: str) -> Callable[[Maker], Maker]:
        """Give a decorator that puts a function under a name.

        A file that is read again replaces what it added before.

        Raises:
            ValueError: for a name that another function has.
        """

        def remember(maker: Maker) -> Maker:
            known = self._added.get(name)
            if name in self._built_in or (known is not None and _home(known) != _home(maker)):
                whose = "of the package" if known is None else f"of {_home(known)[0]}"
                raise ValueError(
                    f"{self._kind} {name!r} exists already: it is one {whose}; choose another name"
                )
            self._added[name] = maker
            return maker

        return remember

    def added(self, name: str) -> Callable[..., Any] | None:
        """Give the function that a user's file put under a name, None for any other name."""
        return self._added.get(name)

    def unknown(self, name: str) -> str:
        """Say in an error's words that there is no such name, which there are, and what to do."""
        return f"unknown {self._kind} {name!r}; known are {', '.join(self.names)}. {self._remedy}"


def _home(maker: Callable[..., Any]) -> tuple[str, str]:
    """File and name of a function."""
    code = getattr(maker, "__code__", None)
    file = code.co_filename if code else getattr(maker, "__module__", "?")
    return file, getattr(maker, "__qualname__", repr(maker))
