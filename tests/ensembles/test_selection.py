import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IDENTITY

from panther_jax.ensembles import combination, selection, specification
from panther_jax.evaluation import metrics
from panther_jax.images import imageio
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels

LABELS = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
TUMOR_ONLY = Labels((("background", 0), ("tumor", 1)))
REGIONS = Labels(
    (("background", 0), ("whole", (1, 2)), ("tumor", (1,))), regions_class_order=(2, 1)
)
SHAPE, SPACING = (5, 8, 7), (3.0, 1.0, 1.5)
ALL = dict.fromkeys(selection.objective_names().values(), 1.0)


def aggregates(**values):
    found = dict.fromkeys(selection.objective_names().values(), 0.5)
    return found | {selection.objective_names()[k]: float(v) for k, v in values.items()}


# ------------------------------------------------------------------------------------ objective


def test_the_objective_by_hand():
    singles = [
        aggregates(dice=0.4, hd95=20),
        aggregates(dice=0.8, hd95=30),
        aggregates(dice=0.5, hd95=10),
    ]
    objective = selection.make_objective(ALL, singles)
    # of five metrics surface Dice, MASD and RMSE are equal: 0
    assert objective(singles[0]) == pytest.approx((0 + 0.5) / 5)
    assert objective(singles[1]) == pytest.approx((1 + 0) / 5)
    assert objective(singles[2]) == pytest.approx((0.25 + 1) / 5)
    assert objective(aggregates(dice=1.0, hd95=5)) == pytest.approx((1.5 + 1.25) / 5)  # leaves 0..1
    one = selection.make_objective({"mean_hausdorff95": 2.0, "mean_masd": 0.0}, singles)
    assert [one(s) for s in singles] == pytest.approx([0.5, 0.0, 1.0])
    both = selection.make_objective({"mean_volumetric_dice": 3.0, "mean_hausdorff95": 1.0}, singles)
    assert both(singles[2]) == pytest.approx((3 * 0.25 + 1) / 4)
    for wrong in ({"mean_masd": -1.0}, {"mean_masd": 0.0}, {"mean_masd": math.nan}):
        with pytest.raises(selection.SelectionError, match="weights"):
            selection.make_objective(wrong, singles)


# --------------------------------------------------------------------------------------- greedy


def dice_of(target):
    """A score whose Dice falls with the distance of the mixture from a target."""

    def score(counts):
        share = np.array(counts) / sum(counts)
        return aggregates(dice=1 - np.abs(share - np.array(target)).sum())

    return score


@pytest.mark.parametrize("target", [(2, 1, 0), (1, 1, 1), (0, 0, 1), (3, 1, 1)])
def test_selection_with_replacement_reaches_a_known_mixture(target):
    share = np.array(target) / sum(target)
    found = selection.select(dice_of(share), 3, {"mean_volumetric_dice": 1.0})
    counts = np.array(found.final.counts)
    np.testing.assert_allclose(counts / counts.sum(), share)
    objectives = [step.objective for step in found.steps]
    assert objectives == sorted(objectives) and len(set(objectives)) == len(objectives)
    assert [sum(step.counts) for step in found.steps] == list(range(1, len(objectives) + 1))
    assert found.steps[0].counts in [single.counts for single in found.singles]


def test_selection_stops_after_the_largest_number():
    found = selection.select(dice_of((0.6, 0.4)), 2, {"mean_volumetric_dice": 1.0}, max_members=3)
    assert sum(found.final.counts) <= 3
    with pytest.raises(selection.SelectionError):
        selection.select(dice_of((1.0,)), 1, ALL, max_members=0)


def test_ties_go_to_fewer_then_to_earlier_candidates():
    same = selection.select(lambda counts: aggregates(), 3, ALL)
    assert same.final.counts == (1, 0, 0)  # nothing improves on the first

    def score(counts):
        """The first is best alone; then any second member helps alike."""
        members = min(sum(counts), 2)
        return aggregates(dice=members if members > 1 else counts[0] * 0.5)

    second = selection.select(score, 3, {"mean_volumetric_dice": 1.0}, max_members=2)
    assert second.final.counts == (1, 1, 0)

    def repeated(counts):
        """Reaches the same with the first alone (3:1 of it) as with a third candidate."""
        values = {(0, 1, 0): 0.5, (1, 1, 0): 0.6, (1, 2, 0): 0.8, (1, 1, 1): 0.8}
        return aggregates(dice=values.get(tuple(counts), 0.1))

    fewer = selection.select(repeated, 3, {"mean_volumetric_dice": 1.0})
    assert fewer.final.counts == (1, 2, 0)


def test_equal_mixtures_are_scored_once():
    asked = []

    def score(counts):
        asked.append(counts)
        return dice_of((0.6, 0.4))(counts)

    found = selection.select(score, 2, {"mean_volumetric_dice": 1.0})
    assert found.final.counts == (2, 1)  # neither 3:1 nor 2:2 is better
    assert len(asked) == len(set(asked)) and (2, 0) not in asked


# ------------------------------------------------------------------------------- mixtures scored


def outputs(labels):
    return len(combination.output_names(labels))


def random_probabilities(random, labels):
    """Smooth-free random probabilities: a softmax, or sigmoids of regions; far from sure."""
    logits = random.normal(0, 2, (outputs(labels), *SHAPE))
    if labels.has_regions:
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    values = np.exp(logits - logits.max(axis=0))
    return (values / values.sum(axis=0)).astype(np.float32)


def make_pool(folder, random, labels, num_cases=2):
    """A pool of random candidates, and their whole arrays."""
    tumor = tuple(dict(one.classes)["tumor"] for one in labels)
    candidates = selection.Candidates(tuple(f"m{i}" for i in range(len(labels))), labels, tumor)
    thresholds = selection.tumor_thresholds(labels, tumor, max_members=10)
    cases, wholes = [], []
    for number in range(num_cases):
        folder.mkdir(exist_ok=True)
        reference = (random.random(SHAPE) < 0.2).astype(np.int16)
        if number == 1:
            reference[:] = 0  # nothing to find
        path = folder / f"case_{number}.mha"
        geometry = Geometry(SHAPE, SPACING, (0.0, 0.0, 0.0), IDENTITY)
        imageio.write_label(path, reference, geometry)
        whole = [random_probabilities(random, one) for one in labels]
        files = []
        for i, array in enumerate(whole):
            files.append(folder / f"{number}.{i}.npz")
            np.savez_compressed(files[-1], probabilities=array)
        wholes.append((reference == 1, whole))
        cases.append(
            selection.compact_case(
                selection.CaseSources(f"case_{number}", path, tuple(files)),
                folder=folder,
                candidates=candidates,
                reference_value=1,
                thresholds=thresholds,
            )
        )
    return selection.Pool(candidates, tuple(cases)), wholes


@pytest.mark.parametrize(
    "labels",
    [(LABELS, LABELS, LABELS), (TUMOR_ONLY, LABELS, TUMOR_ONLY), (REGIONS, REGIONS)],
    ids=["labels", "tumor only", "regions"],
)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_compact_mixtures_equal_whole_ones(tmp_path_factory, labels, seed, counts):
    """Cutting voxels away changes nothing: by the definition of spec 05 §10.3, on whole grids."""
    counts = tuple(counts[: len(labels)])
    if not any(counts):
        counts = (1, *counts[1:])
    folder = tmp_path_factory.mktemp("pool")
    pool, wholes = make_pool(folder, np.random.default_rng(seed), labels)
    chosen = [i for i, n in enumerate(counts) if n]
    spec = specification.EnsembleSpec(
        tuple(specification.MemberSpec(str(i), folder, weight=float(counts[i])) for i in chosen)
    )
    whole = combination.make_combination(spec, [labels[i] for i in chosen])
    for (reference, arrays), found in zip(wholes, pool.score_cases(counts), strict=True):
        decided = whole.decide(whole.combine([arrays[i] for i in chosen]))
        expected = metrics.panther_case(reference, decided == 1, spacing_zyx=SPACING)
        assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_compact_cases_leave_out_what_cannot_become_tumor(tmp_path):
    pool, wholes = make_pool(tmp_path, np.random.default_rng(0), (LABELS, LABELS))
    for case, (_, arrays) in zip(pool.cases, wholes, strict=True):
        possible = np.max([a[1] for a in arrays], axis=0) >= 1 / 3
        assert len(case.voxels) == possible.sum() < possible.size
        for part, whole in zip(case.parts, arrays, strict=True):
            np.testing.assert_array_equal(part, whole[:, possible])
            assert isinstance(part, np.memmap)
    assert not list(tmp_path.glob("*.whole.npy"))


def test_a_case_without_tumor_anywhere(tmp_path):
    labels = (LABELS, LABELS)
    pool, _ = make_pool(tmp_path, np.random.default_rng(0), labels, num_cases=1)
    files = []
    for i in range(2):
        array = np.zeros((3, *SHAPE), np.float32)
        array[0] = 1
        files.append(tmp_path / f"none.{i}.npz")
        np.savez_compressed(files[-1], probabilities=array)
    path = tmp_path / "none.mha"
    empty = np.zeros(SHAPE, np.int16)
    imageio.write_label(path, empty, Geometry(SHAPE, SPACING, (0.0, 0.0, 0.0), IDENTITY))
    case = selection.compact_case(
        selection.CaseSources("none", path, tuple(files)),
        folder=tmp_path,
        candidates=pool.candidates,
        reference_value=1,
        thresholds=selection.tumor_thresholds(labels, (1, 1), 10),
    )
    (found,) = selection.Pool(pool.candidates, (case,)).score_cases((1, 2))
    assert found["volumetric_dice"] == 1.0 and found["hausdorff95"] == 0.0


@pytest.mark.parametrize("wrong", ["shape", "outputs", "cut", "dtype"])
def test_damaged_probabilities_are_named(tmp_path, wrong):
    pool, _ = make_pool(tmp_path, np.random.default_rng(0), (LABELS,), num_cases=1)
    path = tmp_path / "0.0.npz"
    shape = {"shape": (3, 5, 8, 6), "outputs": (2, *SHAPE)}.get(wrong, (3, *SHAPE))
    dtype = np.int32 if wrong == "dtype" else np.float32
    np.savez_compressed(path, probabilities=np.ones(shape, dtype))
    if wrong == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="0.0.npz"):
        selection.compact_case(
            selection.CaseSources("case_0", tmp_path / "case_0.mha", (path,)),
            folder=tmp_path,
            candidates=pool.candidates,
            reference_value=1,
            thresholds=selection.tumor_thresholds((LABELS,), (1,), 10),
        )
    assert not list(tmp_path.glob("*.whole.npy"))
