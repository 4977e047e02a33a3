"""The members of an ensemble, loaded."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from panther_jax.config.schema import CheckpointName
from panther_jax.ensembles.combination import Combination, make_combination
from panther_jax.ensembles.specification import EnsembleError, EnsembleSpec, MemberSpec
from panther_jax.plans.labels import Labels
from panther_jax.weights.models import Model, ModelError, load_model

LOGGER = logging.getLogger("panther_jax")

PREPROCESSING = (
    "spacing", "normalization", "use_mask_for_norm", "intensity", "transpose_forward",
    "resampling_image",
)  # fmt: skip


# ------------------------------------------------------------------------------------ ensembles


@dataclass(frozen=True)
class Member:
    """A model, and what of it depends on the ensemble."""

    model: Model
    mirror_axes: tuple[int, ...]
    step_size: float
    weight: float = 1.0


@dataclass(frozen=True)
class Ensemble:
    """Members with their weights; of one model alone there is no combination."""

    members: tuple[Member, ...]
    combination: Combination | None
    combine: Literal["probabilities", "logits"] = "probabilities"

    @property
    def labels(self) -> Labels:
        """What the label maps hold."""
        if self.combination is None:
            return self.members[0].model.labels
        return self.combination.labels


def load_models(
    paths: Sequence[Path],
    *,
    folds: Sequence[str] = (),
    checkpoint: CheckpointName = "final",
    mirror: bool = False,
    step_size: float = 0.5,
) -> Ensemble:
    """Load models by path; several are an ensemble of equal weights (spec 05 §9).

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming the model that cannot be used.
    """
    names = [Path(p).resolve().name for p in paths]
    unique = [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names, start=1)]
    members = tuple(
        MemberSpec(
            name,
            Path(path),
            folds=tuple(folds),
            checkpoint=checkpoint,
            mirror_axes="checkpoint" if mirror else (),
            step_size=step_size,
        )
        for name, path in zip(unique, paths, strict=True)
    )
    return load_ensemble(EnsembleSpec(members))


def load_ensemble(spec: EnsembleSpec) -> Ensemble:
    """Load the members of an ensemble and check that they go together.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming the member that cannot be used.
    """
    members = tuple(_load_member(entry) for entry in spec.members)
    _refuse_unlike([m.model for m in members])
    plain = spec.decision is None and spec.labels is None
    if (
        len(members) == 1
        and plain
        and not (spec.members[0].class_weights or spec.members[0].label_map)
    ):
        return Ensemble(members, None)
    combination = make_combination(spec, [m.model.labels for m in members])
    if spec.combine == "logits":
        _require_one_grid(members)
    return Ensemble(members, combination, spec.combine)


def _load_member(spec: MemberSpec) -> Member:
    try:
        model = load_model(
            spec.model,
            folds=spec.folds,
            checkpoint=spec.checkpoint,
            configuration=spec.configuration,
            name=spec.name,
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise EnsembleError(f"model {spec.name!r} cannot be used: {error}") from error
    axes = model.mirror_axes if spec.mirror_axes == "checkpoint" else spec.mirror_axes
    if spec.mirror_axes == "checkpoint" and not axes:
        LOGGER.warning("model %r was trained without flips: nothing is mirrored", spec.name)
    beyond = sorted(set(axes) - set(range(len(model.plans.patch_size))))
    if beyond:
        raise EnsembleError(f"model {spec.name!r} has no axis {beyond} to mirror")
    return Member(model, tuple(axes), spec.step_size, spec.weight)


def _require_one_grid(members: Sequence[Member]) -> None:
    """Logits can be averaged where voxels mean the same (spec 05 §10.3)."""
    first = members[0].model
    for other in (m.model for m in members[1:]):
        for name in ("patch_size", *PREPROCESSING, "resampling_logits"):
            ours, theirs = getattr(first.plans, name), getattr(other.plans, name)
            if ours != theirs:
                raise EnsembleError(
                    f"'combine' is 'logits', but members {first.name!r} and {other.name!r} differ "
                    f"in {name}: {ours} and {theirs}\n  Combine their probabilities."
                )
        if first.labels != other.labels:
            raise EnsembleError(
                f"'combine' is 'logits', but members {first.name!r} and {other.name!r} have other "
                "labels\n  Combine their probabilities."
            )


def _refuse_unlike(models: Sequence[Model]) -> None:
    """Members see the same cases: equally many channels."""
    for other in models[1:]:
        if other.num_channels != models[0].num_channels:
            raise ModelError(
                f"model {models[0].name!r} takes {models[0].num_channels} channel(s), "
                f"{other.name!r} {other.num_channels}; they cannot predict the same images"
            )


def describe(ensemble: Ensemble) -> Mapping[str, Any]:
    """What predicts, for the record beside the predictions."""
    return {
        "members": [
            {
                "name": m.model.name,
                "folds": list(m.model.folds),
                "mirror_axes": list(m.mirror_axes),
                "step_size": m.step_size,
            }
            for m in ensemble.members
        ],
        "combine": ensemble.combine,
        "decision": None
        if ensemble.combination is None
        else dataclasses.asdict(ensemble.combination.decision),
    }
