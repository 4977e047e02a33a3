"""Ensembles of unlike members: the spec file, weights a class, and the combination (spec 05 §10).

Works on any part of the raw grid, so that a caller combines slab by slab.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer

from panther_jax.log import write_json
from panther_jax.plans import Labels, PlansError, read_json

BACKGROUND = "background"
CHECKPOINTS = ("final", "best")
COMBINE = ("probabilities", "logits")
MEMBER_KEYS = (
    "name", "model", "configuration", "folds", "checkpoint", "weight", "class_weights",
    "mirror_axes", "step_size", "label_map",
)  # fmt: skip
ENSEMBLE_KEYS = ("members", "combine", "decision", "labels", "regions_class_order")

MirrorAxes = tuple[int, ...] | Literal["checkpoint"]


class EnsembleError(ValueError):
    """An ensemble that cannot be read, or whose members do not go together."""


@dataclass(frozen=True)
class MemberSpec:
    """One member: a model and how it predicts.

    No ``folds`` means all that are there. ``class_weights`` are by canonical class name, for every
    class of the member; without them ``weight`` holds for all. ``label_map`` renames the member's
    classes to canonical names.
    """

    name: str
    model: Path
    configuration: str | None = None
    folds: tuple[str, ...] = ()
    checkpoint: Literal["final", "best"] = "final"
    weight: float = 1.0
    class_weights: tuple[tuple[str, float], ...] | None = None
    mirror_axes: MirrorAxes = ()
    step_size: float = 0.5
    label_map: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Decision:
    """How probabilities become labels: the highest, each region's own, or one class's threshold."""

    kind: Literal["argmax", "regions", "threshold"] = "argmax"
    threshold: float = 0.5
    label: str = ""


@dataclass(frozen=True)
class EnsembleSpec:
    """Members, what is averaged, and how labels are decided.

    ``labels`` are the canonical classes; None: those of the member without label map that has most
    of them, the first of such.
    """

    members: tuple[MemberSpec, ...]
    combine: Literal["probabilities", "logits"] = "probabilities"
    decision: Decision | None = None
    labels: Labels | None = None


# ------------------------------------------------------------------------------------- the file


def read_ensemble(path: Path) -> EnsembleSpec:
    """Read an ensemble file; paths of models are relative to it.

    Raises:
        FileNotFoundError, PlansError: if it is missing or not JSON.
        EnsembleError: naming the file and the key that is wrong.
    """
    value = read_json(path)
    try:
        return _ensemble(value, path.resolve().parent)
    except (EnsembleError, PlansError) as error:
        raise EnsembleError(f"{path}: {error}") from None


def write_ensemble(path: Path, spec: EnsembleSpec) -> None:
    """Write an ensemble file, with paths of models relative to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, ensemble_to_json(spec, path.resolve().parent))


def ensemble_to_json(spec: EnsembleSpec, folder: Path) -> dict[str, Any]:
    """The content of the file; what has its default is left out. Paths relative to ``folder``."""
    entry: dict[str, Any] = {
        "members": [_member_to_json(member, folder) for member in spec.members],
        "combine": spec.combine,
    }
    decision = spec.decision
    if decision is not None:
        threshold = {"threshold": decision.threshold, "label": decision.label}
        entry["decision"] = threshold if decision.kind == "threshold" else decision.kind
    if spec.labels is not None:
        entry.update(spec.labels.to_dataset_json())
    return entry


def _member_to_json(member: MemberSpec, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": member.name}
    entry["model"] = Path(os.path.relpath(member.model.resolve(), folder)).as_posix()
    if member.configuration is not None:
        entry["configuration"] = member.configuration
    if member.folds:
        entry["folds"] = list(member.folds)
    entry["checkpoint"] = member.checkpoint
    if member.class_weights is None:
        entry["weight"] = member.weight
    else:
        entry["class_weights"] = dict(member.class_weights)
    axes = member.mirror_axes
    entry["mirror_axes"] = axes if isinstance(axes, str) else list(axes) or "none"
    entry["step_size"] = member.step_size
    if member.label_map:
        entry["label_map"] = dict(member.label_map)
    return entry


def _ensemble(value: Any, folder: Path) -> EnsembleSpec:
    entry = _object(value, "the file", ENSEMBLE_KEYS)
    members = entry.get("members")
    if not isinstance(members, list) or not members:
        raise EnsembleError(f"'members' must be a list of at least one, found {members!r}")
    read = tuple(_member(m, f"members[{i}]", folder) for i, m in enumerate(members))
    names = [m.name for m in read]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise EnsembleError(f"'members': the names {twice} occur twice; give each its own")
    combine = _one_of(entry.get("combine", "probabilities"), "combine", COMBINE)
    labels = Labels.from_dataset_json(entry) if "labels" in entry else None
    if combine == "logits" and any(m.class_weights or m.label_map for m in read):
        raise EnsembleError(
            "'combine' is 'logits': class_weights and label_map need 'combine': 'probabilities'"
        )
    return EnsembleSpec(read, combine, _decision(entry.get("decision")), labels)  # type: ignore[arg-type]


def _member(value: Any, where: str, folder: Path) -> MemberSpec:
    entry = _object(value, where, MEMBER_KEYS)
    if not isinstance(entry.get("model"), str):
        raise EnsembleError(f"'{where}.model' must be a path, found {entry.get('model')!r}")
    if "weight" in entry and "class_weights" in entry:
        raise EnsembleError(f"'{where}': give 'weight' or 'class_weights', not both")
    model = folder / entry["model"]
    name = entry.get("name", model.name)
    configuration = entry.get("configuration")
    for key, text in (("name", name), ("configuration", configuration or "")):
        if not isinstance(text, str):
            raise EnsembleError(f"'{where}.{key}' must be a text, found {text!r}")
    class_weights = entry.get("class_weights")
    if class_weights is not None:
        class_weights = tuple(
            (str(key), _weight(w, f"{where}.class_weights.{key}"))
            for key, w in _object(class_weights, f"{where}.class_weights", None).items()
        )
    step = _number(entry.get("step_size", 0.5), f"{where}.step_size")
    if not 0 < step <= 1:
        raise EnsembleError(f"'{where}.step_size' must be in (0, 1], found {step}")
    return MemberSpec(
        name=name,
        model=model,
        configuration=configuration,
        folds=_folds(entry.get("folds", "all"), f"{where}.folds"),
        checkpoint=_one_of(entry.get("checkpoint", "final"), f"{where}.checkpoint", CHECKPOINTS),  # type: ignore[arg-type]
        weight=_weight(entry.get("weight", 1.0), f"{where}.weight"),
        class_weights=class_weights,
        mirror_axes=_mirror_axes(entry.get("mirror_axes"), f"{where}.mirror_axes"),
        step_size=step,
        label_map=_label_map(entry.get("label_map"), f"{where}.label_map"),
    )


def _object(value: Any, where: str, keys: Sequence[str] | None) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise EnsembleError(f"{where} must be a JSON object, found {type(value).__name__}")
    unknown = sorted(set(value) - set(keys)) if keys is not None else []
    if unknown:
        raise EnsembleError(f"{where}: unknown key(s) {unknown}; there are {list(keys or ())}")
    return value


def _one_of(value: Any, where: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise EnsembleError(f"'{where}' must be one of {list(allowed)}, found {value!r}")
    return str(value)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise EnsembleError(f"'{where}' must be a number, found {value!r}")
    return float(value)


def _weight(value: Any, where: str) -> float:
    weight = _number(value, where)
    if weight < 0:
        raise EnsembleError(f"'{where}' must not be negative, found {weight}")
    return weight


def _folds(value: Any, where: str) -> tuple[str, ...]:
    if value is None or value == "all":
        return ()
    usual = isinstance(value, list) and value
    if not usual or any(isinstance(f, bool) or not isinstance(f, (int, str)) for f in value):
        raise EnsembleError(f"'{where}' must be a list of folds or 'all', found {value!r}")
    return tuple(str(f) for f in value)


def _mirror_axes(value: Any, where: str) -> MirrorAxes:
    if value in (None, "none"):
        return ()
    if value == "checkpoint":
        return "checkpoint"
    usual = isinstance(value, list) and len(set(map(str, value))) == len(value)
    if not usual or any(isinstance(a, bool) or a not in (0, 1, 2) for a in value):
        raise EnsembleError(f"'{where}' must be axes of 0 to 2, 'checkpoint' or 'none': {value!r}")
    return tuple(int(a) for a in value)


def _label_map(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    pairs = _object(value or {}, where, None)
    for key, name in pairs.items():
        if not isinstance(name, str):
            raise EnsembleError(f"'{where}.{key}' must be the name of a class, found {name!r}")
    return tuple((str(k), v) for k, v in pairs.items())


def _decision(value: Any) -> Decision | None:
    if value is None:
        return None
    if value in ("argmax", "regions"):
        return Decision(value)
    if not isinstance(value, Mapping) or set(value) != {"threshold", "label"}:
        raise EnsembleError(
            "'decision' must be 'argmax', 'regions' or {'threshold': t, 'label': name}, "
            f"found {value!r}"
        )
    threshold = _number(value["threshold"], "decision.threshold")
    if not 0 <= threshold < 1:
        raise EnsembleError(f"'decision.threshold' must be in [0, 1), found {threshold}")
    return Decision("threshold", threshold, str(value["label"]))


# ------------------------------------------------------------------------------ the combination


@dataclass(frozen=True)
class Combination:
    """Members' classes brought to canonical ones: which column, and what weight.

    ``columns[m][c]`` is the member's output of canonical class c, or None; ``weights[m][c]`` is 0
    there. Classes are the outputs of a network with the canonical ``labels``, in their order.
    """

    labels: Labels
    classes: tuple[str, ...]
    columns: tuple[tuple[int | None, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    decision: Decision

    def combine(
        self, parts: Sequence[Float[np.ndarray, "_ *grid"]]
    ) -> Float[np.ndarray, "output *grid"]:
        """Weighted mean over members of their probabilities on any part of the grid; float32.

        Equal weights add up in float32, in the members' order, and are divided once, as
        nnU-Net's ensembling does (spec 05 §9); others in float64.
        """
        grid = parts[0].shape[1:]
        found = np.empty((len(self.classes), *grid), np.float32)
        for c in range(len(found)):
            target = found[c : c + 1]
            chosen = [
                (part[column : column + 1], weights[c])
                for part, columns, weights in zip(parts, self.columns, self.weights, strict=True)
                if (column := columns[c]) is not None and weights[c] > 0
            ]
            if len({weight for _, weight in chosen}) == 1:
                target[...] = chosen[0][0]
                for values, _ in chosen[1:]:
                    target += values
                target /= np.float32(len(chosen))
            else:
                total = np.zeros((1, *grid))
                for values, weight in chosen:
                    total += values.astype(np.float64) * weight
                target[...] = total / sum(weight for _, weight in chosen)
        return found

    def decide(self, combined: Float[np.ndarray, "output *grid"]) -> Integer[np.ndarray, "*grid"]:
        """Label ids from combined probabilities (spec 05 §8, §10.3); the first of equals wins."""
        return decide(combined, self.labels, self.decision)

    def normalised(
        self, combined: Float[np.ndarray, "output *grid"]
    ) -> Float[np.ndarray, "output *grid"]:
        """Probabilities to save: those of a label task add up to 1; nothing at all is background.

        Already so, but for rounding, without weights a class: then nothing changes.
        """
        if self.labels.has_regions or len(set(map(tuple, zip(*self.weights, strict=True)))) == 1:
            return combined
        total = combined.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = combined / total
        nothing = total == 0
        found[:, nothing] = 0
        found[0, nothing] = 1
        return found.astype(np.float32, copy=False)


def decide(
    probabilities: Float[np.ndarray, "output *grid"], labels: Labels, decision: Decision | None
) -> Integer[np.ndarray, "*grid"]:
    """Label ids from probabilities; None decides as the kind of labels demands."""
    dtype = np.uint8 if len(labels.foreground_ids) < 255 else np.uint16
    if decision is not None and decision.kind == "threshold":
        value, column = _threshold_class(labels, decision)
        return (probabilities[column] > decision.threshold).astype(dtype) * dtype(value)
    if not labels.has_regions:
        return probabilities.argmax(axis=0).astype(dtype)
    found = np.zeros(probabilities.shape[1:], dtype)
    for values, value in zip(probabilities, labels.regions_class_order or (), strict=True):
        found[values > 0.5] = value
    return found


def _threshold_class(labels: Labels, decision: Decision) -> tuple[int, int]:
    """Label id to write and output to look at, of the class with a threshold."""
    names = output_names(labels)
    if decision.label not in names or decision.label == BACKGROUND:
        raise EnsembleError(
            f"'decision.label' is {decision.label!r}; expected a foreground class of {names}"
        )
    column = names.index(decision.label)
    if labels.has_regions:
        return (labels.regions_class_order or ())[column], column
    return column, column


def output_names(labels: Labels) -> list[str]:
    """Names of a network's outputs: regions, or background and labels, in order."""
    names = [name for name, _ in labels.classes]
    return names if labels.has_regions else [BACKGROUND, *names]


def make_combination(spec: EnsembleSpec, members: Sequence[Labels]) -> Combination:
    """Bring members together by the names of their classes; ``members`` are their labels in order.

    Raises:
        EnsembleError: naming the member and class that do not fit, or the class without weight.
    """
    canonical = spec.labels or _first_labels(spec, members)
    classes = output_names(canonical)
    columns, weights = [], []
    for member, labels in zip(spec.members, members, strict=True):
        if labels.has_regions != canonical.has_regions:
            raise EnsembleError(
                f"member {member.name!r} predicts {'regions' if labels.has_regions else 'labels'}, "
                "others do not; labels and regions do not go together"
            )
        found = _columns(member, labels, canonical)
        columns.append(tuple(found.get(name) for name in classes))
        weights.append(_weights(member, classes, found))
    for c, name in enumerate(classes):
        if not any(w[c] > 0 for w in weights):
            raise EnsembleError(
                f"class {name!r} has a positive weight in no member; add a member that predicts "
                "it, or weigh it in 'class_weights'"
            )
    decision = spec.decision or Decision("regions" if canonical.has_regions else "argmax")
    if decision.kind == "threshold":
        _threshold_class(canonical, decision)
    elif (decision.kind == "regions") != canonical.has_regions:
        kind = "regions" if canonical.has_regions else "argmax"
        raise EnsembleError(f"'decision' is {decision.kind!r}; these members need {kind!r}")
    return Combination(canonical, tuple(classes), tuple(columns), tuple(weights), decision)


def equal_weights(names: Sequence[str], labels: Labels) -> Combination:
    """The plain mean of members with the same labels (spec 05 §9)."""
    spec = EnsembleSpec(tuple(MemberSpec(name, Path(name)) for name in names))
    return make_combination(spec, [labels] * len(names))


def _first_labels(spec: EnsembleSpec, members: Sequence[Labels]) -> Labels:
    pairs = zip(spec.members, members, strict=True)
    plain = [labels for member, labels in pairs if not member.label_map]
    if not plain:
        raise EnsembleError(
            "all members have a label_map: say with 'labels' what the classes are, as in a "
            'dataset.json, e.g. {"background": 0, "tumor": 1}'
        )
    return max(plain, key=lambda labels: len(labels.names))


def _columns(member: MemberSpec, labels: Labels, canonical: Labels) -> dict[str, int]:
    """Output of the member by canonical class name."""
    own, wanted = output_names(labels), output_names(canonical)
    renamed = dict(member.label_map)
    unknown = sorted(set(renamed) - set(own))
    if unknown:
        raise EnsembleError(
            f"member {member.name!r}: label_map names {unknown}; the model's classes are {own}"
        )
    found: dict[str, int] = {}
    for column, name in enumerate(own):
        target = renamed.get(name, name)
        if target not in wanted or target in found:
            raise EnsembleError(
                f"member {member.name!r}: class {name!r} becomes {target!r}, "
                f"{'which it has twice' if target in found else f'the classes are {wanted}'}; "
                "correct its label_map"
            )
        found[target] = column
    return found


def _weights(
    member: MemberSpec, classes: Sequence[str], found: Mapping[str, int]
) -> tuple[float, ...]:
    if member.class_weights is not None:
        given = dict(member.class_weights)
        wrong = sorted(set(given) - set(found)), sorted(set(found) - set(given))
        if wrong[0] or wrong[1]:
            raise EnsembleError(
                f"member {member.name!r}: class_weights must name each of {sorted(found)}; there "
                f"is no weight for {wrong[1]}, and {wrong[0]} are not its classes"
            )
        return tuple(given.get(name, 0.0) for name in classes)
    # spec 05 §10.4: what such a member calls background holds the classes that it lacks
    lacks = any(name not in found for name in classes)
    return tuple(
        0.0 if name not in found or (lacks and name == BACKGROUND) else member.weight
        for name in classes
    )
