"""nnU-Net's ``.pkl`` files: read without running code, written with plain values only."""

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base.errors import StoreError
from panther_jax.base.files import write_bytes

MAX_ENTRIES = 3_000_000


# ---------------------------------------------------------------------------------- the pickle


def write_pickle(path: Path, value: Mapping[str, Any]) -> None:
    """Write what nnU-Net's ensembler reads beside probabilities: containers, texts, numbers.

    The file appears complete or not at all.

    Raises:
        StoreError: if the value holds anything else.
    """
    _require_plain(value)
    write_bytes(path, pickle.dumps(value, protocol=4))


def _require_plain(value: Any) -> None:
    if type(value) in (dict, list, tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            _require_plain(part)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise StoreError(f"{type(value).__name__} is not written to a pickle")


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a dictionary of builtin containers, numbers and numeric arrays; nothing else.

    Raises:
        FileNotFoundError: if the file is missing.
        StoreError: naming what the file holds besides; nothing of it has run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        value = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"it holds {type(value).__name__}, not a dictionary")
        if has_too_many_entries(value):
            raise pickle.UnpicklingError(f"it holds more than {MAX_ENTRIES} entries")
        return _plain(value)
    except Exception as error:  # a crafted file fails in many ways, all of them refusals
        raise StoreError(
            f"{path} is refused: {error}\n  Only nnU-Net's case properties are read: containers, "
            "numbers and numeric arrays."
        ) from None


class _Unpickler(pickle.Unpickler):
    """Stand-ins for the few NumPy names that arrays and scalars need; every other name is refused.

    NumPy's own functions are not called: with forged states they read memory they should not.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        module = module_name.replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")
        build = _BUILDERS.get((module, global_name))
        if build is None:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return _Callable(build)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it holds a persistent id")


class _Callable:
    """A function that a pickle may call but not change: neither attributes nor state."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        object.__setattr__(self, "_build", build)

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Dtype:
    """A numeric type: kind and size from its code, byte order from its state."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufc](1|2|4|8|16)", code):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}")
        self.code = code.lstrip("<>|=")
        self.order = code[0] if code[0] in "<>|=" else "="

    def __setstate__(self, state: Any) -> None:
        _version, order, subarray, names, fields = state[:5]
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("it holds an array of a structured type")
        self.order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class StandInArray:
    """An array: nothing until its state, checked, arrives."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.array = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("it holds an array that is not numeric")
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if any(not isinstance(n, int) or n < 0 for n in sizes) or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"it holds an array of shape {sizes}")
    if math.prod(sizes) * dtype.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"it holds {len(data)} bytes for an array of shape {sizes}")
    return np.frombuffer(data, dtype.dtype).reshape(sizes, order=order).copy()


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C").item()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _array(data, dtype, shape, order)


def _ndarray(*_: Any) -> Any:
    raise pickle.UnpicklingError("it makes an array other than by its state")


def _bytearray(data: Any = b"") -> bytearray:
    if not isinstance(data, bytes):  # a number would ask for that much memory
        raise pickle.UnpicklingError("it makes a bytearray of something else than bytes")
    return bytearray(data)


def _encode(text: Any, _encoding: Any) -> bytes:
    return str(text).encode("latin1")  # how protocol 2 and older write bytes


NUMERIC_BUILDERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy._core.multiarray", "_reconstruct"): StandInArray,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _ndarray,
}
"""NumPy's names in a pickle, and the checked makers of what they stand for."""

_BUILDERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    **NUMERIC_BUILDERS,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "bytes"): lambda *data: bytes(_bytearray(*data)),
    ("_codecs", "encode"): _encode,
}


def has_too_many_entries(value: Any) -> bool:
    """Whether nested containers hold more than :data:`MAX_ENTRIES`, shared ones counted each time.

    Shared entries of a small file can stand for more than fits into memory.
    """
    waiting, seen = [value], 0
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            waiting += node.values()
        elif isinstance(node, (list, tuple)):
            waiting += node
        seen += 1
        if seen + len(waiting) > MAX_ENTRIES:
            return True
    return False


def _plain(value: Any) -> Any:
    """Put arrays in the place of their stand-ins."""
    if isinstance(value, StandInArray):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, (_Callable, _Dtype)):
        raise pickle.UnpicklingError("it holds a function or a type")
    return value
