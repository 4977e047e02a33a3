"""An ensemble's file: members, weights a class, decision (spec 05 §10.2)."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from panther_jax.base.errors import PantherError, PlansError
from panther_jax.base.files import read_json, write_json
from panther_jax.config.schema import CHECKPOINTS, CheckpointName
from panther_jax.plans.labels import Labels

COMBINE = ("probabilities", "logits")
MEMBER_KEYS = (
    "name", "model", "configuration", "folds", "checkpoint", "weight", "class_weights",
    "mirror_axes", "step_size", "label_map",
)  # fmt: skip
ENSEMBLE_KEYS = ("members", "combine", "decision", "labels", "regions_class_order")

MirrorAxes = tuple[int, ...] | Literal["checkpoint"]


class EnsembleError(PantherError, ValueError):
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
    checkpoint: CheckpointName = "final"
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
        MissingError, FileError: if it is missing or not JSON.
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
