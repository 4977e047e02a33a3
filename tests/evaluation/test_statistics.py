import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from panther_jax.evaluation import statistics


def scored(values, prefix="case"):
    """Scored cases with one value for all metrics, and volume errors of the same size."""
    return [
        {
            "subject": f"{prefix}_{i}",
            "volumetric_dice": float(v),
            "surface_dice": float(v),
            "hausdorff95": float(v),
            "masd": float(v),
            "gt_volume": 1000.0,
            "pred_volume": 1000.0 + float(v),
        }
        for i, v in enumerate(values)
    ]


# ----------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_equal_scipys(skewed):
    random = np.random.default_rng(1)
    values = random.exponential(10.0, 40) if skewed else random.normal(0.7, 0.1, 40)
    found = statistics.mean_interval(values, resamples=40_000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(2)
    ).confidence_interval
    # two draws of 40,000: the limits' own error is about 2 % of the width
    tolerance = 0.04 * (expected.high - expected.low)
    assert found.estimate == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(expected.low, abs=tolerance)
    assert found.high == pytest.approx(expected.high, abs=tolerance)


def test_the_interval_of_the_rmse_is_that_of_its_square():
    """BCa does not depend on the scale in which a statistic is written."""
    errors = np.random.default_rng(3).normal(0, 500, 30)
    columns = (errors**2)[:, None]
    squares = statistics.bootstrap_interval(columns, statistics.first_mean)
    roots = statistics.bootstrap_interval(columns, statistics.root_mean)
    assert roots.estimate == pytest.approx(math.sqrt(np.mean(errors**2)), rel=1e-12)
    # the acceleration differs a little: the jackknife's curvature is not the same
    assert roots.low == pytest.approx(math.sqrt(squares.low), rel=0.03)
    assert roots.high == pytest.approx(math.sqrt(squares.high), rel=0.03)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random, hits = np.random.default_rng(4), 0
    for trial in range(300):
        values = random.normal(0.0, 1.0, 30)
        found = statistics.mean_interval(values, level=0.9, resamples=500, seed=trial)
        hits += found.low <= 0 <= found.high
    # binomial of 300 at 0.9 (small samples: a little below): five standard deviations are 0.087
    assert 0.8 < hits / 300 < 0.97


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(2, 30), shift=st.floats(-5.0, 5.0))
def test_intervals_move_and_scale_with_the_values(seed, number, shift):
    values = np.random.default_rng(seed).normal(0, 1, number)
    one = statistics.mean_interval(values, resamples=400)
    assert one.low <= one.estimate <= one.high
    assert one == statistics.mean_interval(values, resamples=400)  # the same seed
    other = statistics.mean_interval(2 * values + shift, resamples=400)
    for a, b in ((one.low, other.low), (one.estimate, other.estimate), (one.high, other.high)):
        assert b == pytest.approx(2 * a + shift, abs=1e-9)
    wide = statistics.mean_interval(values, level=0.99, resamples=400)
    assert wide.low <= one.low and one.high <= wide.high


def test_intervals_of_odd_values():
    equal = statistics.mean_interval(np.full(5, 0.3))
    assert equal.low == equal.high == equal.estimate == pytest.approx(0.3)
    single = statistics.mean_interval(np.array([0.3]))
    assert single.estimate == 0.3 and math.isnan(single.low) and math.isnan(single.high)
    for odd in (np.nan, np.inf):
        found = statistics.mean_interval(np.array([0.3, odd, 0.4]))
        assert not math.isfinite(found.estimate) and math.isnan(found.low)
    with pytest.raises(ValueError, match="no cases"):
        statistics.mean_interval(np.array([]))
    with pytest.raises(ValueError, match="level"):
        statistics.mean_interval(np.array([1.0, 2.0]), level=95.0)


# ----------------------------------------------------------------------------------- comparison


def paired(baseline, candidate, **settings):
    columns = (np.asarray(v, np.float64)[:, None] for v in (baseline, candidate))
    return statistics.compare_paired(*columns, **settings)


@pytest.mark.parametrize("number", [6, 25])
def test_p_values_equal_scipys_permutation_test(number):
    """All ways of swapping for few cases, drawn ones for many."""
    random = np.random.default_rng(5)
    a = random.normal(0.6, 0.1, number)
    noise = random.normal(0, 0.06, number)
    b = a + noise - noise.mean() + 0.025
    found = paired(a, b, resamples=20_000)
    expected = scipy.stats.permutation_test(
        (b, a),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(6),
    )
    assert 0.001 < found.p < 0.8
    # exact for 2^6 ways; else the standard error of a share near 0.05 of 20,000 is 0.0016
    tolerance = 1e-12 if number == 6 else 0.008
    assert found.p == pytest.approx(expected.pvalue, abs=tolerance)
    assert found.interval.estimate == pytest.approx(np.mean(b - a), rel=1e-9)


def test_p_values_by_hand():
    """Six cases, all better by the same: only two of 64 ways are as extreme."""
    found = paired(np.zeros(6), np.ones(6))
    assert found.p == 2 / 64
    assert (found.num_higher, found.num_lower) == (6, 0)
    assert found.interval.low == pytest.approx(1.0) and found.interval.high == pytest.approx(1.0)
    # one case worse by as much as another is better: every way is as extreme
    assert paired([0.0, 0.0], [1.0, -1.0]).p == 1.0
    assert paired([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]).p == 1.0


def test_p_values_are_uniform_where_nothing_differs():
    random, small = np.random.default_rng(7), 0
    for trial in range(300):
        a, b = random.normal(0, 1, (2, 15))
        small += paired(a, b, resamples=300, seed=trial).p <= 0.1
    assert 0.03 < small / 300 < 0.19  # binomial of 300 at 0.1, five standard deviations


def test_pairing_finds_what_the_spread_of_cases_hides():
    random = np.random.default_rng(8)
    cases = random.normal(0.5, 0.3, 30)
    found = paired(cases, cases + random.normal(0.02, 0.01, 30))
    assert found.p < 0.001 and found.interval.low > 0
    alone = statistics.mean_interval(cases)
    assert alone.high - alone.low > 5 * (found.interval.high - found.interval.low)


def test_comparison_of_rmse_and_of_values_that_are_not_finite():
    random = np.random.default_rng(9)
    errors = random.normal(0, 100, (20, 1))
    found = statistics.compare_paired(errors**2, (3 * errors) ** 2, statistics.root_mean)
    baseline = float(np.sqrt(np.mean(errors**2)))
    assert found.baseline == pytest.approx(baseline)
    assert found.interval.estimate == pytest.approx(2 * baseline)
    assert found.interval.low < 2 * baseline < found.interval.high and found.p < 0.001
    odd = paired([0.1, np.nan, 0.2], [0.2, 0.3, 0.1])
    assert math.isnan(odd.p) and math.isnan(odd.interval.low)
    odd = paired([0.1, np.inf, 0.2], [0.2, np.inf, 0.1])
    assert math.isnan(odd.p)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([0.1, 0.2], [0.1])


def test_holm_by_hand():
    found = statistics.holm([0.01, 0.04, 0.03, math.nan, 0.005])
    assert found[:3] == pytest.approx((0.03, 0.06, 0.06)) and found[4] == pytest.approx(0.02)
    assert math.isnan(found[3])
    assert statistics.holm([0.6, 0.7]) == (1.0, 1.0)


def test_comparison_of_evaluations_and_its_sentence():
    random = np.random.default_rng(10)
    values = random.uniform(0.3, 0.6, 20)
    a = scored(values)
    b = scored(values + random.uniform(0.05, 0.1, 20)) + scored([0.1], prefix="other")
    changes = statistics.compare(a, b)
    verdicts = {c.aggregate: c.verdict for c in changes}
    assert verdicts == {
        "mean_volumetric_dice": "better",
        "mean_surface_dice": "better",
        "mean_hausdorff95": "worse",  # the same numbers, but lower is better
        "mean_masd": "worse",
        "tumor_burden_rmse": "worse",
    }
    assert [c.num_better for c in changes] == [20, 20, 0, 0, 0]
    text = statistics.sentence(changes, num_cases=20, baseline="A", candidate="B")
    assert text == (
        "Over the 20 cases that both scored, B is better in Dice and surface Dice and worse in "
        "HD95, MASD and volume RMSE than A (p < 0.05 after Holm's correction for 5 metrics)."
    )
    same = statistics.compare(a, scored(values + 0.01 * np.tile([1, -1], 10)))
    text = statistics.sentence(same, num_cases=20, baseline="A", candidate="B")
    assert text.endswith("B and A do not differ by more than chance may do.")
    few = statistics.compare(a[:5], b[:5])
    assert {c.verdict for c in few} == {"unclear"}
    text = statistics.sentence(few, num_cases=5, baseline="A", candidate="B")
    assert "too few" in text
    with pytest.raises(ValueError, match="no case in common"):
        statistics.compare(a, scored(values, prefix="else"))


def test_aggregates_and_their_intervals():
    cases = scored([0.1, 0.4, 0.7])
    found = statistics.intervals(cases)
    assert list(found) == list(statistics.aggregate_names())
    assert found["mean_masd"].estimate == pytest.approx(0.4)
    rmse = math.sqrt((0.1**2 + 0.4**2 + 0.7**2) / 3)
    assert found["tumor_burden_rmse"].estimate == pytest.approx(rmse)


def test_mean_ranks_by_hand():
    def aggregates(dice, rest):
        return {
            "mean_volumetric_dice": dice,
            "mean_surface_dice": dice,
            "mean_hausdorff95": rest,
            "mean_masd": rest,
            "tumor_burden_rmse": rest,
        }

    found = statistics.mean_ranks(
        [aggregates(0.5, 10.0), aggregates(0.6, 10.0), aggregates(0.4, math.nan)]
    )
    # ranks 2 2 1.5 1.5 1.5 / 1 1 1.5 1.5 1.5 / 3 3 3 3 3
    assert found == pytest.approx((1.7, 1.3, 3.0))
