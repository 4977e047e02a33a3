"""Unlike members combined into one label map (spec 05 §10)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from panther_jax.ensembles.specification import Decision, EnsembleError, EnsembleSpec, MemberSpec
from panther_jax.plans.labels import Labels

BACKGROUND = "background"


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
