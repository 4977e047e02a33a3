import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panther_jax.ensembles import combination, specification
from panther_jax.ensembles.specification import Decision, EnsembleError, EnsembleSpec, MemberSpec
from panther_jax.images import imageio
from panther_jax.plans.labels import Labels

THREE = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
TUMOR = Labels((("background", 0), ("lesion", 1)))
REGIONS = Labels((("background", 0), ("whole", (1, 2)), ("tumor", 1)), (2, 1))


def probabilities(labels, *, seed=0, grid=(3, 4, 5)):
    values = np.random.default_rng(seed).random((labels.num_outputs, *grid)).astype(np.float32)
    return values if labels.has_regions else values / values.sum(axis=0)


def members(*names, **options):
    return tuple(MemberSpec(name, Path(name), **options) for name in names)


# --------------------------------------------------------------------------------- golden cases


def golden_members(golden, kind):
    folders = sorted((golden / "inference" / "ensemble").glob(f"{kind}_m*"))
    parts = {}
    for folder in folders:
        for file in sorted(folder.glob("*.npz")):
            parts.setdefault(file.stem, []).append(np.load(file)["probabilities"])
    assert parts
    return parts


def labels_of(golden, kind, num_outputs):
    """The golden ensembles name no classes; regions are declared as in the export cases."""
    if kind == "labels":
        names = [("background", 0), *((f"c{i}", i) for i in range(1, num_outputs))]
        return Labels(tuple(names))
    index = json.loads((golden / "inference" / "export.json").read_text())
    declared = [Labels.from_dataset_json(entry["dataset_json"]) for entry in index.values()]
    return next(d for d in declared if d.has_regions and d.num_outputs == num_outputs)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_means_equal_the_reference(golden, kind):
    expected = np.load(golden / "inference" / "ensemble" / "expected.npz")
    (parts,) = golden_members(golden, kind).values()
    tested = 0
    for key in (k for k in expected.files if k.startswith(f"{kind}_mean_of_")):
        count = int(key.rsplit("_", 1)[1])
        mean = expected[key]
        labels = labels_of(golden, kind, mean.shape[0])
        spec = EnsembleSpec(tuple(MemberSpec(str(i), Path(str(i))) for i in range(count)))
        joined = combination.make_combination(spec, [labels] * count)
        found = joined.combine(parts[:count])
        np.testing.assert_allclose(found, mean, atol=1e-6, rtol=0)  # README
        np.testing.assert_array_equal(joined.normalised(found), found)
        segmentation = expected[key.replace("mean", "seg")]
        np.testing.assert_array_equal(joined.decide(found), segmentation)
        if count == len(parts):
            file = next((golden / "inference" / "ensemble" / f"{kind}_out").glob("*.nii.gz"))
            np.testing.assert_array_equal(segmentation, imageio.read_label(file)[0])
        tested += 1
    assert tested


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_weights_a_class_equal_the_formula(golden, kind):
    expected = np.load(golden / "inference" / "ensemble" / "expected.npz")
    (parts,) = golden_members(golden, kind).values()
    weights = expected[f"{kind}_perclass_weights"]
    labels = labels_of(golden, kind, weights.shape[1])
    names = combination.output_names(labels)
    spec = EnsembleSpec(
        tuple(
            MemberSpec(
                str(i),
                Path(str(i)),
                class_weights=tuple((n, float(w)) for n, w in zip(names, row, strict=True)),
            )
            for i, row in enumerate(weights)
        )
    )
    joined = combination.make_combination(spec, [labels] * len(weights))
    found = joined.combine(parts[: len(weights)])
    np.testing.assert_allclose(found, expected[f"{kind}_perclass_weighted"], atol=1e-6, rtol=0)
    np.testing.assert_array_equal(joined.decide(found), expected[f"{kind}_perclass_weighted_seg"])


# ---------------------------------------------------------------------------------- combination


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_weighted_means_are_the_formula_on_any_part_of_the_grid(weights, seed):
    spec = EnsembleSpec(
        tuple(MemberSpec(str(i), Path("m"), weight=w) for i, w in enumerate(weights))
    )
    joined = combination.make_combination(spec, [THREE] * len(weights))
    parts = [probabilities(THREE, seed=seed + i) for i in range(len(weights))]
    total = sum(w * p.astype(float) for w, p in zip(weights, parts, strict=True))
    found = joined.combine(parts)
    np.testing.assert_allclose(found, total / sum(weights), atol=1e-6)  # float32
    slab = joined.combine([p[:, 1:3] for p in parts])
    np.testing.assert_array_equal(slab, found[:, 1:3])


def test_a_member_that_lacks_classes():
    """spec 05 §10.4: it adds to the tumour, and its background, which holds pancreas, to nothing"""
    spec = EnsembleSpec(
        (
            MemberSpec("full", Path("full")),
            MemberSpec("tumor", Path("tumor"), label_map=(("lesion", "tumor"),), weight=3.0),
        )
    )
    joined = combination.make_combination(spec, [THREE, TUMOR])
    full, tumor = probabilities(THREE), probabilities(TUMOR, seed=5)
    found = joined.combine([full, tumor])
    np.testing.assert_array_equal(found[[0, 2]], full[[0, 2]])
    np.testing.assert_allclose(found[1], (full[1] + 3 * tumor[1]) / 4, atol=1e-6)
    kept = joined.normalised(found)
    np.testing.assert_allclose(kept.sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(kept.argmax(0), joined.decide(found))


def test_nothing_at_all_is_background():
    weights = (("background", 0.0), ("tumor", 1.0), ("pancreas", 1.0))
    first = MemberSpec("a", Path("a"), class_weights=weights)
    second = MemberSpec("b", Path("b"), class_weights=(("background", 1.0), *weights[1:]))
    joined = combination.make_combination(EnsembleSpec((first, second)), [THREE, THREE])
    kept = joined.normalised(np.zeros((3, 2, 2, 2), np.float32))
    np.testing.assert_array_equal(kept[0], 1)
    np.testing.assert_array_equal(kept[1:], 0)


@pytest.mark.parametrize(("labels", "value"), [(THREE, 1), (REGIONS, 1)])
def test_a_threshold_writes_one_class(labels, value):
    spec = EnsembleSpec(members("a", "b"), decision=Decision("threshold", 0.3, "tumor"))
    joined = combination.make_combination(spec, [labels] * 2)
    found = joined.combine([probabilities(labels), probabilities(labels, seed=3)])
    label = joined.decide(found)
    column = combination.output_names(labels).index("tumor")
    np.testing.assert_array_equal(label, np.where(found[column] > 0.3, value, 0))
    assert 0 < label.mean() < 1


def test_regions_overwrite_in_their_order():
    values = np.array([[0.9, 0.6, 0.5], [0.1, 0.6, 0.9]], np.float32).reshape(2, 1, 1, 3)
    assert combination.decide(values, REGIONS, None).ravel().tolist() == [2, 1, 1]


def test_the_first_of_equal_classes_wins():
    values = np.full((3, 1, 1, 1), 1 / 3, np.float32)
    assert combination.decide(values, THREE, Decision("argmax")).item() == 0


@pytest.mark.parametrize(
    ("spec", "labels", "message"),
    [
        (EnsembleSpec(members("a", "b")), [THREE, TUMOR], "'lesion' becomes 'lesion'"),
        (EnsembleSpec(members("a", "b")), [THREE, REGIONS], "do not go together"),
        (
            EnsembleSpec(members("a", label_map=(("tumor", "pancreas"),)), labels=THREE),
            [THREE],
            "which it has twice",
        ),
        (
            EnsembleSpec(members("a", label_map=(("nothing", "tumor"),)), labels=THREE),
            [THREE],
            r"label_map names \['nothing'\]",
        ),
        (
            EnsembleSpec(members("a", label_map=(("lesion", "tumor"),))),
            [TUMOR],
            "say with 'labels'",
        ),
        (EnsembleSpec(members("a"), labels=THREE), [Labels(THREE.names[:2])], "no member"),
        (EnsembleSpec(members("a", weight=0.0)), [THREE], "positive weight in no member"),
        (EnsembleSpec(members("a", class_weights=(("tumor", 1.0),))), [THREE], "no weight for"),
        (
            EnsembleSpec(members("a", class_weights=tuple((n, 1.0) for n in "xyz"))),
            [THREE],
            "no weight for",
        ),
        (EnsembleSpec(members("a"), decision=Decision("regions")), [THREE], "need 'argmax'"),
        (EnsembleSpec(members("a"), decision=Decision("argmax")), [REGIONS], "need 'regions'"),
        (
            EnsembleSpec(members("a"), decision=Decision("threshold", 0.5, "liver")),
            [THREE],
            "'liver'",
        ),
    ],
)
def test_members_that_do_not_go_together_are_refused(spec, labels, message):
    with pytest.raises(EnsembleError, match=message):
        combination.make_combination(spec, labels)


# -------------------------------------------------------------------------------------- the file


def test_a_spec_survives_its_file(tmp_path):
    spec = EnsembleSpec(
        (
            MemberSpec(
                "first",
                tmp_path / "runs" / "a",
                "3d_fullres",
                ("0", "3"),
                "best",
                2.5,
                mirror_axes=(0, 2),
                step_size=0.75,
                label_map=(("lesion", "tumor"),),
            ),
            MemberSpec("second", tmp_path / "b", mirror_axes="checkpoint"),
            MemberSpec(
                "third", tmp_path / "c", class_weights=(("background", 0.0), ("tumor", 1.0))
            ),
        ),
        decision=Decision("threshold", 0.4, "tumor"),
        labels=THREE,
    )
    path = tmp_path / "specs" / "e.json"
    specification.write_ensemble(path, spec)
    found = specification.read_ensemble(path)
    for ours, theirs in zip(spec.members, found.members, strict=True):
        assert ours.model.resolve() == theirs.model.resolve()
        assert {**vars(ours), "model": 0} == {**vars(theirs), "model": 0}
    assert (found.combine, found.decision, found.labels) == (
        spec.combine,
        spec.decision,
        spec.labels,
    )
    stored = json.loads(path.read_text())
    assert stored["members"][0]["model"] == "../runs/a"


def test_defaults_of_a_member(tmp_path):
    (tmp_path / "e.json").write_text('{"members": [{"model": "runs/a"}]}')
    spec = specification.read_ensemble(tmp_path / "e.json")
    assert spec == EnsembleSpec((MemberSpec("a", tmp_path / "runs" / "a"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "JSON object, found list"),
        ("{}", "'members' must be a list"),
        ('{"members": []}', "'members' must be a list"),
        ('{"members": [{}]}', r"'members\[0\].model' must be a path"),
        ('{"members": [{"model": "a", "wieght": 1}]}', r"unknown key\(s\) \['wieght'\]"),
        ('{"members": [{"model": "a"}], "mode": 1}', r"unknown key\(s\) \['mode'\]"),
        ('{"members": [{"model": "a"}, {"model": "x/a"}]}', "occur twice"),
        ('{"members": [{"model": "a", "weight": -1}]}', "must not be negative"),
        ('{"members": [{"model": "a", "weight": "1"}]}', "must be a number"),
        ('{"members": [{"model": "a", "weight": NaN}]}', "must be a number"),
        ('{"members": [{"model": "a", "weight": 1, "class_weights": {}}]}', "not both"),
        ('{"members": [{"model": "a", "folds": 3}]}', r"folds' must be a list"),
        ('{"members": [{"model": "a", "checkpoint": "last"}]}', r"checkpoint' must be one of"),
        ('{"members": [{"model": "a", "mirror_axes": [3]}]}', "mirror_axes"),
        ('{"members": [{"model": "a", "mirror_axes": [1, 1]}]}', "mirror_axes"),
        ('{"members": [{"model": "a", "step_size": 0}]}', r"step_size' must be in"),
        ('{"members": [{"model": "a", "label_map": {"a": 1}}]}', "name of a class"),
        ('{"members": [{"model": "a"}], "combine": "votes"}', "'combine' must be one of"),
        ('{"members": [{"model": "a"}], "decision": "max"}', "'decision' must be"),
        (
            '{"members": [{"model": "a"}], "decision": {"threshold": 2, "label": "t"}}',
            "decision.threshold",
        ),
        (
            '{"members": [{"model": "a", "label_map": {"a": "b"}}], "combine": "logits"}',
            "label_map need",
        ),
        ('{"members": [{"model": "a"}], "labels": {"tumor": 1}}', "background"),
    ],
)
def test_wrong_files_are_refused_by_key(tmp_path, content, message):
    path = tmp_path / "e.json"
    path.write_text(content)
    with pytest.raises(EnsembleError, match=message) as caught:
        specification.read_ensemble(path)
    assert str(path) in str(caught.value)
