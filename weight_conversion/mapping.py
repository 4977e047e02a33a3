"""State-dict names and layouts of nnU-Net's U-Nets, and the parameter tree (spec 01 §2, §4.2).

Pure: NumPy arrays in and out, no torch. Arrays come out as views where only axes move.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from panther_jax.base.errors import PantherError
from panther_jax.network.unet import Params, param_shapes, walk
from panther_jax.plans.architecture import ArchSpec

PREFIXES = ("module.", "_orig_mod.")
STEM, HEADS = "encoder.stem.", "decoder.seg_layers."
ENCODER_COPY = "decoder.encoder."
SHOWN = 10
Layout = Literal["conv", "transposed", "vector"]


class ConversionError(PantherError, ValueError):
    """Weights that do not fit; the message says which, and nothing has been written."""


# --------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class Entry:
    """One tensor: its place in the parameter tree, its torch shape, what its axes are."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True)
class _Unit:
    """A convolution with its norm: torch prefix, tree path, position of the norm in all_modules."""

    name: str
    path: str
    norm_index: int


@dataclass(frozen=True)
class Names:
    """All tensors of a network by canonical name, and every key of its state dict, in order.

    ``keys`` are pairs (key, canonical name) in the order in which torch inserts them.
    """

    entries: Mapping[str, Entry]
    keys: tuple[tuple[str, str], ...]


def names_of(arch: ArchSpec) -> Names:
    """The state dict of a network, without its values (spec 01 §2.1, §2.2)."""
    shapes = {"/".join(path): tuple(leaf.shape) for path, leaf in walk(param_shapes(arch))}
    entries: dict[str, Entry] = {}
    encoder = _keys_of_units(_encoder_units(arch), shapes, entries)
    decoder = _keys_of_units(_decoder_units(arch), shapes, entries)
    ends: tuple[tuple[str, str, Layout], ...] = (
        ("decoder.transpconvs", "decoder/transpconvs", "transposed"),
        ("decoder.seg_layers", "decoder/heads", "conv"),
    )
    for torch_name, tree_name, layout in ends:
        for t in range(arch.num_stages - 1):
            for leaf, port in (("weight", "kernel"), ("bias", "bias")):
                path = f"{tree_name}/{t}/{port}"
                if path in shapes:
                    name = f"{torch_name}.{t}.{leaf}"
                    entries[name] = _entry(path, shapes[path], layout)
                    decoder.append((name, name))
    assert len(entries) == len(shapes), "names and parameter tree are not a bijection"
    copies = [(f"decoder.{key}", name) for key, name in encoder]
    return Names(entries, tuple(encoder + copies + decoder))


def _keys_of_units(
    units: Iterator[_Unit], shapes: Mapping[str, tuple[int, ...]], entries: dict[str, Entry]
) -> list[tuple[str, str]]:
    keys = []
    for unit in units:
        present = []
        for part, alias, tree in (
            ("conv", "all_modules.0", ("kernel", "bias")),
            ("norm", f"all_modules.{unit.norm_index}", ("scale", "bias")),
        ):
            for leaf, port in zip(("weight", "bias"), tree, strict=True):
                path = f"{unit.path}/{part}/{port}"
                if path in shapes:
                    name = f"{unit.name}.{part}.{leaf}"
                    entries[name] = _entry(path, shapes[path], "conv")
                    present.append((f"{unit.name}.{alias}.{leaf}", name))
        keys += [(name, name) for _, name in present] + present
    return keys


def _entry(path: str, shape: tuple[int, ...], layout: Layout) -> Entry:
    if len(shape) == 1:
        return Entry(tuple(path.split("/")), shape, "vector")
    channels = shape[-2:] if layout == "transposed" else shape[:-3:-1]
    return Entry(tuple(path.split("/")), (*channels, *shape[:-2]), layout)


def _encoder_units(arch: ArchSpec) -> Iterator[_Unit]:
    plain = _norm_index(arch, has_dropout=True)
    if arch.network == "PlainConvUNet":
        for s in range(arch.num_stages):
            for c in range(arch.blocks[s]):
                yield _Unit(
                    f"encoder.stages.{s}.0.convs.{c}", f"encoder/stages/{s}/convs/{c}", plain
                )
        return
    yield _Unit("encoder.stem.convs.0", "encoder/stem", plain)
    convs = 3 if arch.bottleneck_channels else 2
    dropout_at = 2 if arch.bottleneck_channels else 1
    for s in range(arch.num_stages):
        for b in range(arch.blocks[s]):
            name, path = f"encoder.stages.{s}.blocks.{b}", f"encoder/stages/{s}/blocks/{b}"
            for c in range(1, convs + 1):
                index = _norm_index(arch, has_dropout=c == dropout_at)
                yield _Unit(f"{name}.conv{c}", f"{path}/conv{c}", index)
            # A strided skip starts with the pool, which has no parameters but takes position 0.
            pooled = b == 0 and any(stride != 1 for stride in arch.strides[s])
            yield _Unit(f"{name}.skip.{int(pooled)}", f"{path}/skip", 1)


def _decoder_units(arch: ArchSpec) -> Iterator[_Unit]:
    index = _norm_index(arch, has_dropout=True)
    for t in range(arch.num_stages - 1):
        for c in range(arch.decoder_convs[t]):
            yield _Unit(f"decoder.stages.{t}.convs.{c}", f"decoder/stages/{t}/convs/{c}", index)


def _norm_index(arch: ArchSpec, *, has_dropout: bool) -> int:
    swapped = arch.nonlin_first and arch.has_norm and arch.nonlin is not None
    return 1 + int(has_dropout and arch.dropout_rate > 0) + int(swapped)


def canonical_name(name: str) -> str:
    """The one name of a tensor that has up to four, prefixes already stripped (spec 01 §2.2)."""
    if name.startswith(ENCODER_COPY):
        name = name.removeprefix("decoder.")
    name = re.sub(r"\.all_modules\.0\.", ".conv.", name)
    return re.sub(r"\.all_modules\.\d+\.", ".norm.", name)


def strip_prefixes(names: Sequence[str]) -> list[str]:
    """Names without ``module.`` and ``_orig_mod.`` where all carry them (spec 01 §2.5)."""
    stripped = list(names)
    while stripped:
        common = [p for p in PREFIXES if all(n.startswith(p) for n in stripped)]
        if not common:
            break
        stripped = [n.removeprefix(common[0]) for n in stripped]
    return stripped


def canonicalize(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One entry a tensor, by canonical name.

    Raises:
        ConversionError: if two names of one tensor hold different values.
    """
    found: dict[str, np.ndarray] = {}
    for name, original in zip(strip_prefixes(list(state)), state, strict=True):
        canonical, value = canonical_name(name), state[original]
        if canonical not in found:
            found[canonical] = value
        elif not _equal(found[canonical], value):
            raise ConversionError(
                f"weights are inconsistent: {original!r} and another name of the same tensor "
                f"({canonical!r}) hold different values\n"
                "  The file was edited by hand or written by other software; take the original."
            )
    return found


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    same_memory = a.ctypes.data == b.ctypes.data and a.strides == b.strides
    return same_memory or np.array_equal(a, b, equal_nan=True)


# ------------------------------------------------------------------------------------- layouts


def to_port(array: np.ndarray, layout: Layout) -> np.ndarray:
    """A tensor in the layout of the parameter tree, a view (spec 01 §2.3; §2.4: no flip)."""
    if layout == "conv":
        return np.moveaxis(array, (0, 1), (-1, -2))
    return np.moveaxis(array, (0, 1), (-2, -1)) if layout == "transposed" else array


def to_torch(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Inverse of :func:`to_port`."""
    if layout == "conv":
        return np.moveaxis(array, (-1, -2), (0, 1))
    return np.moveaxis(array, (-2, -1), (0, 1)) if layout == "transposed" else array


# --------------------------------------------------------------------------------------- stems


def stem_channels(canonical: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Input channels of each stem of a multi-stem file, by id; empty for an ordinary file."""
    found = {}
    for name, value in canonical.items():
        parts = name.split(".")
        if name.startswith(STEM) and parts[2] != "convs" and name.endswith(".conv.weight"):
            found[parts[2]] = int(value.shape[1])
    return found


def is_multi_head(canonical: Mapping[str, Any]) -> bool:
    """Whether heads carry dataset ids, as those of MultiTalent do."""
    return any(_is_head_of_many(name) for name in canonical)


def _is_head_of_many(name: str) -> bool:
    return name.startswith(HEADS) and name.count(".") == 4


def _stem_prefix(stem: str | None, ids: Mapping[str, int], *, has_stem: bool) -> str | None:
    """What the stem's names start with in the file; None if it is to start fresh."""
    listing = "\n".join(f"  {id_}: {count} input channel(s)" for id_, count in ids.items())
    if stem == "reinit":
        return None
    if ids and stem in (None, "copy"):
        raise ConversionError(
            f"the file holds {len(ids)} stems, one a dataset; choose one, or none:\n{listing}\n"
            "  Pass --stem ID, or --stem reinit to start the stem fresh (the PANTHER recipes)."
        )
    if ids:
        if stem not in ids:
            raise ConversionError(f"stem {stem!r} is not in the file; there are:\n{listing}")
        return f"{STEM}{stem}."
    if stem not in (None, "copy"):
        kind = "one stem without an id" if has_stem else "no stem (a plain U-Net has none)"
        raise ConversionError(
            f"--stem {stem}: the file holds {kind}; pass --stem copy or --stem reinit"
        )
    return STEM


# ---------------------------------------------------------------------------------- conversion


@dataclass(frozen=True)
class Conversion:
    """Converted parameters and what became of each tensor, by canonical torch name.

    ``params`` lack the stem or the heads where ``absent`` names them. ``skipped`` pairs the names
    of tensors left behind with the rule.
    """

    params: Params
    taken: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]

    def report(self) -> str:
        """Counts, and the skipped ones by rule."""
        values = sum(leaf.size for _, leaf in walk(self.params))
        lines = [f"taken: {len(self.taken)} tensors, {values:,} parameters"]
        for rule in dict.fromkeys(rule for _, rule in self.skipped):
            count = sum(r == rule for _, r in self.skipped)
            lines.append(f"skipped: {count} tensors ({rule})")
        if self.absent:
            lines.append(f"not in the result, to be started fresh: {', '.join(self.absent)}")
        return "\n".join([*lines, "missing: 0, of another shape: 0"])


def convert(
    state: Mapping[str, np.ndarray], arch: ArchSpec, *, stem: str | None = None
) -> Conversion:
    """Convert a state dict to the parameters of ``arch`` by the rules of spec 01 §5.

    ``stem`` is ``copy``, ``reinit``, the id of one of several stems, or None: the only one.
    Heads of multi-head files are left behind. All is checked before anything is returned.

    Raises:
        ConversionError: if a stem must be chosen, or with a table of what does not fit.
    """
    canonical = canonicalize(state)
    names = names_of(arch)
    ids = stem_channels(canonical)
    has_stem = any(name.startswith(STEM) for name in canonical)
    prefix = _stem_prefix(stem, ids, has_stem=has_stem)
    many_heads = is_multi_head(canonical)
    sources: dict[str, str] = {}
    absent: dict[str, None] = {}
    for name in names.entries:
        if name.startswith(STEM) and prefix is None:
            absent["stem"] = None
        elif name.startswith(HEADS) and many_heads:
            absent["heads"] = None
        else:
            is_stem = name.startswith(STEM)
            sources[name] = name.replace(STEM, prefix or STEM, 1) if is_stem else name
    skipped, unknown = _left_over(canonical, set(sources.values()), fresh_stem=prefix is None)
    missing = [source for source in sources.values() if source not in canonical]
    reshaped = [
        f"{source}: {canonical[source].shape} -> {names.entries[name].shape}"
        for name, source in sources.items()
        if source in canonical and canonical[source].shape != names.entries[name].shape
    ]
    if missing or reshaped or unknown:
        counts = {"missing": missing, "another shape (file -> plans)": reshaped}
        raise ConversionError(
            _misfit(canonical, arch, {**counts, "not in the plans' network": unknown})
        )
    params: Params = {}
    for name, source in sources.items():
        entry = names.entries[name]
        _insert(params, entry.path, to_port(canonical[source], entry.layout))
    return Conversion(params, tuple(sources.values()), skipped, tuple(absent))


def _left_over(
    canonical: Mapping[str, np.ndarray], used: set[str], *, fresh_stem: bool
) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    skipped, unknown = [], []
    for name in canonical:
        if name in used:
            continue
        if name.startswith(STEM):
            has_id = name.split(".")[2] != "convs"
            if not (fresh_stem or has_id):
                unknown.append(name)
                continue
            rule = "stem starts fresh" if fresh_stem else "stems of other datasets"
        elif _is_head_of_many(name):
            rule = "heads of other datasets"
        elif ".organ_seg_layers." in name:
            rule = "organ heads"
        else:
            unknown.append(name)
            continue
        skipped.append((name, rule))
    return tuple(skipped), unknown


def _misfit(
    canonical: Mapping[str, np.ndarray], arch: ArchSpec, problems: Mapping[str, Sequence[str]]
) -> str:
    plain = any(re.match(r"encoder\.stages\.\d+\.0\.convs\.", name) for name in canonical)
    residual = any(re.match(r"encoder\.stages\.\d+\.blocks\.", name) for name in canonical)
    if not plain and not residual:
        first = ", ".join(list(canonical)[:3]) or "none"
        return (
            f"the file holds no nnU-Net U-Net: {len(canonical)} tensors, the first: {first}\n"
            "  Expected ResidualEncoderUNet or PlainConvUNet (nnU-Net v2); other networks, nnU-Net "
            "v1 included, cannot be imported."
        )
    found = "PlainConvUNet" if plain else "ResidualEncoderUNet"
    counts = ", ".join(f"{len(found_)} {problem}" for problem, found_ in problems.items())
    lines = [f"weights do not fit the plans' {arch.network}: {counts}"]
    for problem, listed in problems.items():
        lines += [f"  {problem}: {name}" for name in listed[:SHOWN]]
        if len(listed) > SHOWN:
            lines.append(f"  {problem}: … and {len(listed) - SHOWN} more")
    if found != arch.network:
        lines.append(f"  The file is of a {found}. Name the plans that it was trained with.")
    else:
        lines.append(
            "  Name the plans, configuration and dataset.json that the file was trained with."
        )
    return "\n".join(lines)


def to_state(params: Mapping[str, Any], arch: ArchSpec) -> dict[str, np.ndarray]:
    """Parameters (or momentum, of the same shapes) in torch layout, by canonical name, in order.

    Raises:
        ConversionError: if a tensor is missing, has another shape, or is not the network's.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in walk(params)}
    result, wrong = {}, []
    for name, entry in names_of(arch).entries.items():
        leaf = leaves.pop(entry.path, None)
        array = None if leaf is None else to_torch(leaf, entry.layout) if leaf.ndim else leaf
        if array is None or array.shape != entry.shape:
            held = "missing" if array is None else f"of shape {array.shape}"
            wrong.append(f"{'/'.join(entry.path)}: {held}, expected {entry.shape} (torch layout)")
        else:
            result[name] = array
    wrong += [f"{'/'.join(path)}: not a parameter of the network" for path in leaves]
    if wrong:
        lines = "\n  ".join(wrong[:SHOWN])
        raise ConversionError(
            f"{len(wrong)} parameter(s) do not fit the plans' {arch.network}:\n  {lines}"
        )
    return result


def _insert(tree: Params, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
