"""PyTorch state-dict names of nnU-Net networks to the parameter tree of the port (spec 01 §2).

Written for the tests, independently of ``weight_conversion``, so that one can check the other.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

PREFIXES = ("module.", "_orig_mod.")
RULES = (
    (r"encoder\.stem\.convs\.0\.(.+)", r"encoder.stem.\1"),
    (
        r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d+\.(.+)",
        r"encoder.stages.\1.blocks.\2.skip.\3",
    ),
    (r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(.+)", r"encoder.stages.\1.convs.\2.\3"),
    (r"decoder\.seg_layers\.(\d+)\.(.+)", r"decoder.heads.\1.\2"),
)


def without_prefixes(names: Iterable[str]) -> list[str]:
    """The names without what wrappers of the network put before all of them."""
    names = list(names)
    while any(names and all(n.startswith(p) for n in names) for p in PREFIXES):
        names = [n.split(".", 1)[1] for n in names]
    return names


def canonical_state(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One entry a tensor, by canonical torch name; raises if aliases disagree."""
    found: dict[str, np.ndarray] = {}
    for name, value in zip(without_prefixes(state), state.values(), strict=True):
        name = re.sub(r"^decoder\.(?=encoder\.)", "", name)
        name = re.sub(r"\.all_modules\.0\.", ".conv.", name)
        name = re.sub(r"\.all_modules\.\d+\.", ".norm.", name)
        value = np.asarray(value)
        if name in found and not np.array_equal(found[name], value, equal_nan=True):
            raise ValueError(f"aliases of {name} disagree")
        found.setdefault(name, value)
    return found


def canonical_params(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The nested parameter tree: kernels channels-last, transposed convolutions not flipped."""
    tree: dict[str, Any] = {}
    for name, value in canonical_state(state).items():
        path, array = _entry(name, value)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        assert path[-1] not in node, f"two tensors for {'/'.join(path)}"
        node[path[-1]] = array
    return tree


def _entry(name: str, value: np.ndarray) -> tuple[list[str], np.ndarray]:
    for pattern, replacement in RULES:
        name = re.sub(rf"^{pattern}$", replacement, name)
    path = name.split(".")
    if path[-1] == "weight":
        if path[-2] == "norm":
            path[-1] = "scale"
        elif path[-3] == "transpconvs":  # (I, O, k...) -> (k..., I, O)
            path[-1], value = "kernel", np.moveaxis(value, (0, 1), (-2, -1))
        else:  # (O, I, k...) -> (k..., I, O)
            path[-1], value = "kernel", np.moveaxis(value, (0, 1), (-1, -2))
    return path, np.ascontiguousarray(value)
