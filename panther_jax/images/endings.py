"""Names of image files: their endings, and those that the readers cannot take."""

import os
from pathlib import Path

from panther_jax.base.errors import DatasetError
from panther_jax.images.formats import image_ending


def split_ending(name: str) -> tuple[str, str]:
    """Split a file name from its ending, which is empty if no reader knows it."""
    ending = image_ending(name)
    return name[: len(name) - len(ending)], ending


def lowered(name: str) -> str:
    """A file name with its ending in lower case, as ITK's readers and writers want it."""
    stem, ending = split_ending(name)
    return stem + ending.lower()


def readable(name: str) -> str:
    """A file name as it can be shown and written: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_utf8(name: str) -> bool:
    """Tell whether a name from the file system is UTF-8."""
    return readable(name).encode("utf-8") == os.fsencode(name)


def require_utf8(path: Path) -> None:
    """Refuse a path that ends the process when it is handed to ITK.

    Raises:
        DatasetError: naming the path, its bytes escaped.
    """
    if not is_utf8(str(path)):
        raise DatasetError(
            f"{readable(str(path))}: the name is not UTF-8 (bytes of another encoding are shown as "
            "\\x..), so that it cannot be opened\n  Rename the file or folder."
        )
