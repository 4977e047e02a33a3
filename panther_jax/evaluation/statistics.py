"""How sure a number is: bootstrap intervals over cases, paired comparison of two runs.

All aggregates here are functions of means over cases, so that resampling cases is one matrix
product. Intervals are bias-corrected and accelerated (BCa, Efron 1987): metrics that a missed
tumour sends to hundreds of millimetres are skewed, and plain percentiles would sit too low. All
random numbers come from one seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped
from scipy import special

from panther_jax.evaluation.metrics import METRICS

LEVEL = 0.95
RESAMPLES = 10_000
SIGNIFICANT = 0.05
AT_ONCE = 1 << 22  # resampled entries held in memory
TIE = 1e-12  # share of the statistic: sums of drawn cases are added in another order
METHOD = "BCa bootstrap over cases"
RMSE = "tumor_burden_rmse"
Statistic = Callable[[np.ndarray], np.ndarray]
"""From means over cases (..., column) to the aggregate (...)."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits; NaN limits where cases or values do not allow any."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference, candidate minus baseline, with its limits and two-sided p-value."""

    baseline: float
    candidate: float
    interval: Interval
    p: float
    num_lower: int
    num_higher: int


# ----------------------------------------------------------------------------------- aggregates


def aggregate_names() -> tuple[str, ...]:
    """The aggregates over cases (spec 06 §1): a mean for each metric, and the volume's RMSE."""
    return (*(f"mean_{name}" for name in METRICS.names), RMSE)


def shared_aggregates(*evaluations: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Aggregates of metrics that all cases have: some may come from before one was added."""
    return tuple(
        name
        for name in aggregate_names()
        if name == RMSE
        or all(name.removeprefix("mean_") in case for cases in evaluations for case in cases)
    )


def is_better_up(aggregate: str) -> bool:
    """Whether more is better."""
    return aggregate != RMSE and METRICS.find(aggregate.removeprefix("mean_")).higher_is_better


def aggregate_title(aggregate: str) -> str:
    """Title of a column, with its unit."""
    return (
        "volume RMSE ml"
        if aggregate == RMSE
        else METRICS.find(aggregate.removeprefix("mean_")).title
    )


def first_mean(means: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
    """The mean of the first column."""
    return means[..., 0]


def root_mean(means: Float[np.ndarray, "... column"]) -> Float[np.ndarray, "..."]:
    """Root of the mean of the first column, which holds squares."""
    return np.asarray(np.sqrt(np.maximum(means[..., 0], 0.0)))


def aggregate_columns(
    cases: Sequence[Mapping[str, Any]], aggregate: str
) -> tuple[Shaped[np.ndarray, "case column"], Statistic]:
    """The values of an aggregate of spec 06 §1 by case, and how it comes from their means."""
    if aggregate == RMSE:
        errors = np.array([c["pred_volume"] - c["gt_volume"] for c in cases], np.float64)
        return (errors**2)[:, None], root_mean
    metric = aggregate.removeprefix("mean_")
    return np.array([c[metric] for c in cases], np.float64)[:, None], first_mean


# ------------------------------------------------------------------------------------ intervals


def mean_interval(
    values: Shaped[np.ndarray, " case"],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Confidence interval of a mean over cases."""
    return bootstrap_interval(
        np.asarray(values, np.float64)[:, None],
        first_mean,
        level=level,
        resamples=resamples,
        seed=seed,
    )


def bootstrap_interval(
    columns: Float[np.ndarray, "case column"],
    statistic: Statistic,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """BCa interval of a statistic of means, by drawing cases with replacement.

    One case, or values that are not finite, give NaN limits; equal values an interval of no width.

    Raises:
        ValueError: if there are no cases, or the level is not between 0 and 1.
    """
    if not len(columns):
        raise ValueError("no cases to draw from")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, found {level}")
    with np.errstate(invalid="ignore"):
        estimate = float(statistic(columns.mean(axis=0)))
    if len(columns) < 2 or not np.isfinite(columns).all():
        return Interval(estimate, math.nan, math.nan)
    drawn = _drawn(columns, statistic, resamples, seed)
    if np.ptp(columns, axis=0).max() == 0:
        return Interval(estimate, estimate, estimate)
    tie = TIE * float(np.abs(drawn).max())  # drawing each case once gives the estimate again
    share = float(np.mean(drawn < estimate - tie) + np.mean(drawn <= estimate + tie)) / 2
    lower, upper = _shares(share, _acceleration(columns, statistic), level)
    low, high = np.quantile(drawn, (lower, upper)).tolist()
    return Interval(estimate, low, high)


def _drawn(columns: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    random, number = np.random.default_rng(seed), len(columns)
    parts = []
    for start in range(0, resamples, max(1, AT_ONCE // number)):
        size = min(resamples - start, max(1, AT_ONCE // number))
        counts = random.multinomial(number, np.full(number, 1 / number), size=size)
        parts.append(statistic(counts @ columns / number))
    return np.concatenate(parts)


def _acceleration(columns: np.ndarray, statistic: Statistic) -> float:
    """Skewness of the statistic with a case left out."""
    left_out = statistic((columns.sum(axis=0) - columns) / (len(columns) - 1))
    away = left_out.mean() - left_out
    spread = float(np.sum(away**2)) ** 1.5
    return float(np.sum(away**3)) / (6 * spread) if spread else 0.0


def _shares(share: float, acceleration: float, level: float) -> tuple[float, float]:
    """Which quantiles of the drawn values the limits are."""
    plain = ((1 - level) / 2, (1 + level) / 2)
    bias = float(special.ndtri(share))
    if not math.isfinite(bias):  # the estimate lies beside all drawn values
        return plain
    moved = [bias + float(special.ndtri(p)) for p in plain]
    low, high = (float(special.ndtr(bias + z / (1 - acceleration * z))) for z in moved)
    return low, high


# ------------------------------------------------------------------------------------ comparison


def compare_paired(
    baseline: Shaped[np.ndarray, "case column"],
    candidate: Shaped[np.ndarray, "_ _"],
    statistic: Statistic = first_mean,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Difference of a statistic between two runs over the same cases, in the same order.

    The interval draws cases with both their values. The p-value is that of a permutation test:
    in each case the two runs are swapped or not, all ways if there are at most ``resamples``, else
    so many at random. Values that are not finite give NaN.

    Raises:
        ValueError: if the cases are not as many in both.
    """
    if baseline.shape != candidate.shape:
        raise ValueError(f"{baseline.shape} values cannot be paired with {candidate.shape}")
    width = baseline.shape[1]
    both = np.concatenate([baseline, candidate], axis=1).astype(np.float64)

    def difference(means: np.ndarray) -> np.ndarray:
        return np.asarray(statistic(means[..., width:]) - statistic(means[..., :width]))

    with np.errstate(invalid="ignore"):
        interval = bootstrap_interval(both, difference, resamples=resamples, seed=seed)
        change = (candidate - baseline)[:, 0]
    if not np.isfinite(both).all():
        interval, p = Interval(interval.estimate, math.nan, math.nan), math.nan
    else:
        p = _permutation_p(both, difference, resamples, seed)
    return Difference(
        baseline=float(statistic(baseline.mean(axis=0))),
        candidate=float(statistic(candidate.mean(axis=0))),
        interval=interval,
        p=p,
        num_lower=int((change < 0).sum()),
        num_higher=int((change > 0).sum()),
    )


def _permutation_p(both: np.ndarray, difference: Statistic, resamples: int, seed: int) -> float:
    number, width = len(both), both.shape[1] // 2
    observed = abs(float(difference(both.mean(axis=0))))
    # Means after swapping: what was, plus the difference of the swapped cases.
    change = np.roll(both, width, axis=1) - both
    limit = observed - TIE * max(1.0, observed)
    exact = 2**number <= resamples
    total = 2**number if exact else resamples
    random, extreme = np.random.default_rng(seed), 0
    for start in range(0, total, max(1, AT_ONCE // number)):
        size = min(total - start, max(1, AT_ONCE // number))
        if exact:
            ways = np.arange(start, start + size)[:, None] >> np.arange(number) & 1
        else:
            ways = random.integers(0, 2, (size, number))
        permuted = difference(both.mean(axis=0) + ways @ change / number)
        extreme += int((np.abs(permuted) >= limit).sum())
    return extreme / total if exact else (extreme + 1) / (total + 1)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's correction of p-values for their number; NaN stays and is not counted."""
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    corrected, floor = list(p_values), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(known) - rank) * p_values[i]))
        corrected[i] = floor
    return tuple(corrected)


# --------------------------------------------------------------------------- evaluations compared


@dataclass(frozen=True)
class MetricChange:
    """One aggregate of two evaluations: its paired difference, and what it amounts to."""

    aggregate: str
    difference: Difference
    p_holm: float

    @property
    def better(self) -> Literal["up", "down"]:
        """Which way is better."""
        return "up" if is_better_up(self.aggregate) else "down"

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """What the candidate is beside the baseline, ``unclear`` if chance may have done it."""
        if not self.p_holm < SIGNIFICANT or self.difference.interval.estimate == 0:
            return "unclear"
        is_higher = self.difference.interval.estimate > 0
        return "better" if is_higher == (self.better == "up") else "worse"

    @property
    def num_better(self) -> int:
        """Cases in which the candidate is better; for volumes those with the smaller error."""
        found = self.difference
        return found.num_higher if self.better == "up" else found.num_lower

    @property
    def num_worse(self) -> int:
        """Cases in which it is worse."""
        found = self.difference
        return found.num_lower if self.better == "up" else found.num_higher

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dictionary."""
        found = self.difference
        return {
            "metric": self.aggregate,
            "better": self.better,
            "baseline": found.baseline,
            "candidate": found.candidate,
            "difference": found.interval.estimate,
            "low": found.interval.low,
            "high": found.interval.high,
            "p": found.p,
            "p_holm": self.p_holm,
            "num_better": self.num_better,
            "num_worse": self.num_worse,
            "verdict": self.verdict,
        }


def intervals(
    cases: Sequence[Mapping[str, Any]], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of the aggregates of spec 06 §1 over scored cases."""
    return {
        name: bootstrap_interval(*aggregate_columns(cases, name), resamples=resamples, seed=seed)
        for name in shared_aggregates(cases)
    }


def compare(
    baseline: Sequence[Mapping[str, Any]],
    candidate: Sequence[Mapping[str, Any]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[MetricChange, ...]:
    """Compare the aggregates over the cases, by ``subject``, that both have scored.

    Raises:
        ValueError: if they have no case in common.
    """
    ours = {c["subject"]: c for c in candidate}
    pairs = [(c, ours[c["subject"]]) for c in baseline if c["subject"] in ours]
    if not pairs:
        raise ValueError("the two evaluations have no case in common; compare runs on one data set")
    found, names = [], shared_aggregates(*zip(*pairs, strict=True))
    for name in names:
        first, statistic = aggregate_columns([a for a, _ in pairs], name)
        second, _ = aggregate_columns([b for _, b in pairs], name)
        found.append(compare_paired(first, second, statistic, resamples=resamples, seed=seed))
    corrected = holm([d.p for d in found])
    return tuple(
        MetricChange(name, difference, p)
        for name, difference, p in zip(names, found, corrected, strict=True)
    )


def sentence(
    changes: Sequence[MetricChange], *, num_cases: int, baseline: str, candidate: str
) -> str:
    """What a comparison says, in plain words."""
    by_verdict = {
        verdict: [
            aggregate_title(c.aggregate).removesuffix(" mm").removesuffix(" ml") for c in group
        ]
        for verdict in ("better", "worse", "unclear")
        if (group := [c for c in changes if c.verdict == verdict])
    }
    start = f"Over the {num_cases} cases that both scored, "
    smallest = 2.0 ** (1 - num_cases)
    if smallest * len(changes) > SIGNIFICANT and set(by_verdict) == {"unclear"}:
        return (
            f"{start}no difference can be told from chance: they are too few for any result to "
            f"reach p < {SIGNIFICANT} after correction."
        )
    if set(by_verdict) == {"unclear"}:
        return f"{start}{candidate} and {baseline} do not differ by more than chance may do."
    parts = [
        f"{verdict} in {_listed(by_verdict[verdict])}"
        for verdict in ("better", "worse")
        if verdict in by_verdict
    ]
    text = f"{start}{candidate} is {' and '.join(parts)} than {baseline} (p < {SIGNIFICANT} after "
    text += f"Holm's correction for {len(changes)} metrics)"
    if "unclear" in by_verdict:
        text += f"; in {_listed(by_verdict['unclear'])} chance may explain the difference"
    return f"{text}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---------------------------------------------------------------------------------------- ranks


def mean_ranks(aggregates: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
    """Mean rank of each candidate over the aggregates, 1 the best (ours, spec 06 §6).

    Ties share the mean of their ranks; NaN and infinity are last.
    """
    totals = np.zeros(len(aggregates))
    names = aggregate_names()
    for name in names:
        sign = -1 if is_better_up(name) else 1
        values = np.array([sign * a[name] for a in aggregates], np.float64)
        values[~np.isfinite(values)] = np.inf
        below = (values[:, None] > values[None, :]).sum(axis=1)
        equal = (values[:, None] == values[None, :]).sum(axis=1)
        totals += below + (equal + 1) / 2
    return tuple((totals / len(names)).tolist())
