"""The errors that a user can cause; each says what is wrong and what to do."""


class PantherError(Exception):
    """What is wrong with a thing and, indented below it, what to do about it.

    ``str(error)`` reads ``thing: cause`` and the ``remedy`` on a line of its own. A message in that
    form may be given whole; its thing is then what stands before the first colon, its remedy the
    last lines or, of a single line, what follows the last semicolon. Every error that a user can
    cause derives from this class and from the builtin one that its kind of failure has.
    """

    def __init__(self, *args: object, thing: object = "", remedy: str = ""):
        *before, cause = args or ("",)  # before the text OSError has its number
        text = f"{thing}: {cause}" if thing else str(cause)
        super().__init__(*before, f"{text}\n  {remedy}" if remedy else text)
        self._thing, self._remedy = str(thing), remedy

    def __str__(self) -> str:
        return str(self.args[-1])

    @property
    def thing(self) -> str:
        """The file, case, field or option that the message is about; empty if it names none."""
        first = str(self).partition("\n")[0]
        return self._thing or (first.partition(": ")[0] if ": " in first else "")

    @property
    def remedy(self) -> str:
        """What the message tells to do; empty if it is silent."""
        if self._remedy:
            return self._remedy
        first, *rest = str(self).splitlines() or [""]
        if not rest:
            return first.rpartition("; ")[2] if "; " in first else ""
        starts = [i for i, line in enumerate(rest) if line.strip()[:1].isupper()]
        return " ".join(line.strip() for line in rest[starts[-1] if starts else -1 :])


class FileError(PantherError, ValueError):
    """A file that does not hold what it should; the message names it."""


class MissingError(PantherError, FileNotFoundError):
    """A file or folder that is not there."""


class WriteError(PantherError, OSError):
    """A file or folder that cannot be written, for instance because the disk is full."""


class PlansError(FileError):
    """Plans, dataset.json or an architecture that cannot be used; the message names the field."""


class CheckpointError(PantherError, RuntimeError):
    """A checkpoint or bundle that cannot be written, read or used."""


class StoreError(PantherError, ValueError):
    """A store, a stored case or a split file that cannot be used; the message names the file."""


class DatasetError(PantherError, ValueError):
    """An image, a label map or a raw dataset that cannot be used; the message names the file."""
