"""Arrays that lie compressed in files: their shapes are read at once, their values when asked for.

``.b2nd`` files are decompressed block by block, so a patch costs a patch; an ``.npz`` archive can
only be decompressed whole. A file is opened anew at each reading, which makes threads independent.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base.errors import StoreError

DAMAGES = (RuntimeError, OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)
"""What the readers of compressed files raise over a damaged one."""


@dataclass(frozen=True)
class CompressedArray:
    """An array in a file: indexed and converted like NumPy's, read anew each time.

    ``sliced`` tells whether a part is read without the whole; the first axes are taken at
    ``lead``, an index each.
    """

    path: Path
    stored_shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], np.ndarray]
    sliced: bool
    lead: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""
        return self.stored_shape[len(self.lead) :]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once decompressed."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read a part, indexed by integers, slices and an ellipsis.

        Raises:
            StoreError: if the file is damaged.
        """
        asked = index if isinstance(index, tuple) else (index,)
        try:
            return np.asarray(self.read((*self.lead, *asked)))
        except DAMAGES as error:
            raise damaged(self.path, error) from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read all of it."""
        return self[...].astype(dtype or self.dtype, copy=False)


def damaged(path: Path, error: Exception) -> StoreError:
    """What a damaged file of nnU-Net raises."""
    return StoreError(
        f"{path} cannot be read: {type(error).__name__}: {error}\n"
        "  Is it complete? Run nnU-Net's preprocessing again."
    )


def open_b2nd(path: Path) -> CompressedArray:
    """An array of a ``.b2nd`` file; nothing is decompressed yet.

    Raises:
        ModuleNotFoundError: naming what reads such files, where it is not installed.
    """
    try:
        import blosc2
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is compressed with blosc2: pip install 'panther-jax[nnunet]', or preprocess "
            "the raw dataset with panther_jax.preprocess"
        ) from None

    def opened() -> Any:
        # one thread: the threads that cut patches share the cores already
        return blosc2.open(str(path), mode="r", dparams={"nthreads": 1})

    header = opened()
    return CompressedArray(
        path, tuple(header.shape), np.dtype(header.dtype), lambda index: opened()[index], True
    )


def open_npz(path: Path, name: str) -> CompressedArray:
    """The array ``name`` of an ``.npz`` archive; only its header is decompressed yet."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        headers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = headers[version](file)

    def read(index: Any) -> np.ndarray:
        # opened here: of a damaged archive, numpy.load leaves its own file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays[name][index]

    return CompressedArray(path, tuple(shape), dtype, read, False)
