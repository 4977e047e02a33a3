"""Greedy selection of an ensemble's members by metrics of out-of-fold predictions (spec 05 §10.5).

Members are added with replacement; how often one was added is its weight. Only voxels that some
candidate may make tumour are looked at: the others cannot become it in any mixture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from panther_jax.base.errors import PantherError
from panther_jax.ensembles.combination import Combination, make_combination, output_names
from panther_jax.ensembles.specification import EnsembleSpec, MemberSpec
from panther_jax.evaluation import folds, metrics, statistics
from panther_jax.images import imageio
from panther_jax.plans.labels import Labels, LabelValue

MAX_MEMBERS = 10
TIE = 1e-12  # objectives closer than this are equal: sums of the same terms in another order
MARGIN = 1e-5  # of probabilities, for the rounding of means
SHORT_NAMES = {
    "mean_volumetric_dice": "dice",
    "mean_hausdorff95": "hd95",
    statistics.RMSE: "rmse",
}

Counts = tuple[int, ...]
"""How often each candidate is in a mixture."""
Score = Callable[[Counts], Mapping[str, float]]
"""The aggregates of spec 06 §1 of a mixture."""


class SelectionError(PantherError, ValueError):
    """Candidates that cannot be chosen from."""


# ------------------------------------------------------------------------------------ objective


def objective_names() -> dict[str, str]:
    """What can be chosen by: short names of the aggregates, and the aggregates."""
    return {
        SHORT_NAMES.get(name, name.removeprefix("mean_")): name
        for name in statistics.aggregate_names()
    }


@dataclass(frozen=True)
class Objective:
    """Weighted mean of aggregates, each scaled to 0 for the worst candidate and 1 for the best."""

    weights: tuple[tuple[str, float], ...]
    worst: tuple[float, ...]
    best: tuple[float, ...]

    def __call__(self, aggregates: Mapping[str, float]) -> float:
        """The objective of a mixture; may leave [0, 1], 0 for metrics that do not tell apart."""
        total = 0.0
        for (name, weight), worst, best in zip(self.weights, self.worst, self.best, strict=True):
            if best != worst:
                total += weight * (aggregates[name] - worst) / (best - worst)
        return total / sum(weight for _, weight in self.weights)


def make_objective(
    weights: Mapping[str, float], singles: Sequence[Mapping[str, float]]
) -> Objective:
    """Scale aggregates by the best and worst of the single candidates (spec 05 §10.5).

    Raises:
        SelectionError: if no weight is positive, or one is negative or not finite.
    """
    if any(not math.isfinite(w) or w < 0 for w in weights.values()) or not any(weights.values()):
        raise SelectionError(f"weights must be positive numbers or 0, not all 0: {dict(weights)}")
    chosen = tuple((name, float(w)) for name, w in weights.items() if w > 0)
    worst, best = [], []
    for name, _ in chosen:
        values = [single[name] for single in singles]
        low, high = min(values), max(values)
        is_up = statistics.is_better_up(name)
        worst.append(low if is_up else high)
        best.append(high if is_up else low)
    return Objective(chosen, tuple(worst), tuple(best))


# --------------------------------------------------------------------------------------- greedy


@dataclass(frozen=True)
class Mixture:
    """A mixture that was scored; ``added`` is the candidate that came in last."""

    counts: Counts
    aggregates: Mapping[str, float]
    objective: float
    added: int


@dataclass(frozen=True)
class Selection:
    """All single candidates, and the mixture after each step; the last is the ensemble."""

    singles: tuple[Mixture, ...]
    steps: tuple[Mixture, ...]

    @property
    def final(self) -> Mixture:
        """The ensemble chosen."""
        return self.steps[-1]


def select(
    score: Score,
    num_candidates: int,
    weights: Mapping[str, float],
    *,
    max_members: int = MAX_MEMBERS,
    progress: Callable[[Counts], None] | None = None,
) -> Selection:
    """Choose greedily: the best single candidate, then what improves the objective most.

    Ends when nothing improves it, or after ``max_members``. Of equal mixtures the one of fewer
    different candidates wins, then the earlier candidate.

    Raises:
        SelectionError: if there is no candidate, or the limits or weights make no sense.
    """
    if num_candidates < 1 or max_members < 1:
        raise SelectionError(f"{num_candidates} candidates, at most {max_members} members")
    known: dict[Counts, Mapping[str, float]] = {}

    def aggregates(counts: Counts) -> Mapping[str, float]:
        key = tuple(n // math.gcd(*counts) for n in counts)  # 2:2 is the mixture 1:1
        if key not in known:
            known[key] = score(key)
            if progress is not None:
                progress(key)
        return known[key]

    empty = (0,) * num_candidates
    alone = [aggregates(_with(empty, i)) for i in range(num_candidates)]
    objective = make_objective(weights, alone)
    singles = tuple(
        Mixture(_with(empty, i), found, objective(found), i) for i, found in enumerate(alone)
    )
    steps = [_best(singles)]
    while sum(steps[-1].counts) < max_members:
        options = []
        for i in range(num_candidates):
            counts = _with(steps[-1].counts, i)
            found = aggregates(counts)
            options.append(Mixture(counts, found, objective(found), i))
        best = _best(options)
        if best.objective <= steps[-1].objective + TIE:
            break
        steps.append(best)
    return Selection(singles, tuple(steps))


def _with(counts: Counts, candidate: int) -> Counts:
    return tuple(n + (i == candidate) for i, n in enumerate(counts))


def _best(options: Sequence[Mixture]) -> Mixture:
    highest = max(option.objective for option in options)
    equal = [option for option in options if option.objective >= highest - TIE]
    return min(equal, key=lambda m: (sum(n > 0 for n in m.counts), m.added))


# ------------------------------------------------------------------------------- mixtures scored


@dataclass(frozen=True)
class CaseSources:
    """The files of a case: its reference, and the packed probabilities of each candidate."""

    id: str
    reference: Path
    probabilities: tuple[Path, ...]


@dataclass(frozen=True)
class Candidates:
    """What is known of the candidates in order: names, labels, the tumour's value in each."""

    names: tuple[str, ...]
    labels: tuple[Labels, ...]
    tumor: tuple[LabelValue, ...]


@dataclass(frozen=True, eq=False)
class CompactCase:
    """A case as mixtures need it: a box, the voxels in it that may become tumour, probabilities.

    ``voxels`` index the box; ``files`` hold an array (output, voxel) a candidate, float32.
    """

    id: str
    reference: np.ndarray
    voxels: np.ndarray
    files: tuple[Path, ...]
    grid_shape_zyx: tuple[int, ...]
    spacing_zyx: tuple[float, ...]

    @cached_property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The candidates' probabilities, memory-mapped."""
        return tuple(np.load(f, mmap_mode="r", allow_pickle=False) for f in self.files)


def compact_case(
    sources: CaseSources,
    *,
    folder: Path,
    candidates: Candidates,
    reference_value: LabelValue,
    thresholds: Sequence[tuple[tuple[int, ...], float]],
) -> CompactCase:
    """Keep of a case, in ``folder``, only what can decide about the tumour.

    ``thresholds`` are those of :func:`tumor_thresholds`. For worker processes: free of JAX.

    Raises:
        ValueError: if a file is damaged, or holds another grid or other classes than expected.
    """
    label, geometry = imageio.read_label(sources.reference)
    reference = metrics.member_mask(label, reference_value)
    scratch = [folder / f"{sources.id}.{i}.whole.npy" for i in range(len(candidates.names))]
    possible = np.zeros(reference.shape, bool)
    try:
        whole = []
        for i, (packed, target) in enumerate(zip(sources.probabilities, scratch, strict=True)):
            whole.append(folds.unpack_probabilities(packed, target))
            wanted = (len(output_names(candidates.labels[i])), *reference.shape)
            if whole[i].shape != wanted:
                raise SelectionError(
                    f"case {sources.id!r}: {packed} holds {whole[i].shape}, expected {wanted} by "
                    "dataset.json and the reference\n  Delete it, and it is computed again."
                )
            outputs, threshold = thresholds[i]
            for output in outputs:
                possible |= whole[i][output] >= threshold - MARGIN
        box = metrics.bounding_box(possible, reference)
        voxels = np.flatnonzero(possible[box])
        files = tuple(folder / f"{sources.id}.{i}.npy" for i in range(len(whole)))
        for file, array in zip(files, whole, strict=True):
            kept = array[(slice(None), *box)].reshape(len(array), -1)[:, voxels]
            np.save(file, kept.astype(np.float32, copy=False))
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)
    return CompactCase(
        sources.id,
        reference[box].copy(),
        voxels,
        files,
        geometry.shape_zyx,
        geometry.spacing_zyx,
    )


def tumor_thresholds(
    labels: Sequence[Labels], tumor: Sequence[LabelValue], max_members: int
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """By candidate: outputs, and the probability that one of them needs somewhere for tumour.

    The highest of C probabilities that sum to 1 is at least 1/C, and so is the highest over
    members. Members that lack a class do not dilute the background, but they may dilute other
    classes, at worst by the number of members. A region needs more than 0.5.
    """
    most = max(len(output_names(one)) for one in labels)
    partial = any(2 < len(output_names(one)) < most for one in labels)
    share = 1 / (most * (max_members if partial else 1))
    found = []
    for one, value in zip(labels, tumor, strict=True):
        ids = set(value) if isinstance(value, tuple) else {value}
        if one.has_regions:
            order = one.regions_class_order or ()
            found.append((tuple(i for i, c in enumerate(order) if c in ids), 0.5))
        else:
            found.append((tuple(i for i, c in enumerate(one.ids) if c in ids), share))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates and their compact cases: scores any mixture of them."""

    candidates: Candidates
    cases: tuple[CompactCase, ...]

    def score(self, counts: Counts) -> dict[str, float]:
        """The aggregates of a mixture over all cases, edge cases by the default preset."""
        return metrics.panther_aggregate(self.score_cases(counts))

    def score_cases(self, counts: Counts) -> list[dict[str, float]]:
        """The PANTHER metrics of each case of a mixture."""
        chosen = [i for i, n in enumerate(counts) if n]
        combination = self._combination(counts, chosen)
        largest = max(chosen, key=lambda i: len(output_names(self.candidates.labels[i])))
        tumor = self.candidates.tumor[largest]
        scored = []
        for case in self.cases:
            combined = combination.combine([case.parts[i] for i in chosen])
            prediction = np.zeros(case.reference.shape, bool)
            decided = combination.decide(combined)
            prediction.reshape(-1)[case.voxels] = metrics.member_mask(decided, tumor)
            scored.append(
                metrics.panther_case(
                    case.reference,
                    prediction,
                    spacing_zyx=case.spacing_zyx,
                    grid_shape_zyx=case.grid_shape_zyx,
                )
            )
        return scored

    def _combination(self, counts: Counts, chosen: Sequence[int]) -> Combination:
        """How the members of a mixture are brought together: as prediction does it."""
        names, labels = self.candidates.names, self.candidates.labels
        members = tuple(
            MemberSpec(names[i], Path(names[i]), weight=float(counts[i])) for i in chosen
        )
        return make_combination(EnsembleSpec(members), [labels[i] for i in chosen])
