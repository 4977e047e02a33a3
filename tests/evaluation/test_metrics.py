import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_checks import (
    RELATIVE,
    RELATIVE_FLOAT32_SPACING,
    assert_close,
    without_subject,
)

from panther_jax.evaluation import metrics
from panther_jax.evaluation.surfaces import _surface_terms, surface_distances, surface_element_areas

# Golden README: relative 1e-9; the fork scripts read float32 spacings, which move mm by 1e-7.


def blob(rng, shape, threshold=0.5):
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal(shape), 1.2)
    return field > threshold * field.std()


def ordered(distances, areas):
    """Both arrays by distance, then area.

    The same distance along two ways differs in its last bit (4 x 0.9 and 3 x 1.2), so that the
    order of the areas within it is open.
    """
    order = np.lexsort((areas, np.round(distances, 9)))
    return distances[order], areas[order]


def boxes(shape=(8, 9, 10), size=4, shift=2):
    reference, prediction = np.zeros(shape, bool), np.zeros(shape, bool)
    reference[2 : 2 + size, 2 : 2 + size, 2 : 2 + size] = True
    prediction[2 : 2 + size, 2 : 2 + size, 2 + shift : 2 + shift + size] = True
    return reference, prediction


# ---------------------------------------------------------------------------------- golden


def panther_index(golden):
    return json.loads((golden / "evaluation" / "panther_metrics.json").read_text())


def golden_masks(golden):
    """(case, entry, reference mask, prediction mask) of every case with arrays."""
    arrays = np.load(golden / "evaluation" / "masks.npz")
    for case, entry in panther_index(golden)["cases"].items():
        yield case, entry, arrays[f"{case}__gt"] != 0, arrays[f"{case}__pred"] != 0


@pytest.mark.golden
def test_area_tables_equal_the_reference(golden):
    tables = np.load(golden / "evaluation" / "surfel_area_tables.npz")
    for spacings, areas in (("spacings", "areas"), ("contour_spacings", "contour_lengths")):
        assert len(tables[spacings])
        for spacing, expected in zip(tables[spacings], tables[areas], strict=True):
            found = surface_element_areas(tuple(spacing.tolist()))
            # both are sums of a few float64 square roots
            np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.golden
def test_shipped_table_is_the_reference_table(golden):
    expected = json.loads((golden / "evaluation" / "surfel_terms.json").read_text())["terms"]
    found = [sorted(map(list, terms)) for terms in _surface_terms()]
    assert found == [sorted(terms) for terms in expected]


@pytest.mark.golden
def test_sorted_distances_and_areas_equal_the_reference(golden):
    files = sorted((golden / "evaluation").glob("surface_distances_*.npz"))
    assert files
    cases = {case: (e, r, p) for case, e, r, p in golden_masks(golden)}
    for file in files:
        entry, reference, prediction = cases[file.stem.removeprefix("surface_distances_")]
        surfaces = surface_distances(reference, prediction, tuple(entry["spacing_xyz"]))
        with np.load(file) as expected:
            for distances, areas, direction in directions(surfaces):
                found = ordered(distances, areas)
                side = direction.split("_")[0]
                wanted = ordered(
                    expected[f"distances_{direction}"], expected[f"surfel_areas_{side}"]
                )
                for one, other in zip(found, wanted, strict=True):
                    np.testing.assert_allclose(one, other, rtol=RELATIVE, atol=1e-12)


def directions(surfaces):
    """(distances, areas, the library's name of the direction), both ways."""
    return (
        (surfaces.reference_to_prediction, surfaces.reference_areas, "gt_to_pred"),
        (surfaces.prediction_to_reference, surfaces.prediction_areas, "pred_to_gt"),
    )


def direct_measures(reference, prediction, spacing, names):
    surfaces = surface_distances(reference, prediction, spacing)
    sides = {name.split("_")[0]: (d, a) for d, a, name in directions(surfaces)}
    to_prediction, to_reference = metrics.average_surface_distances(surfaces)
    found = {
        "volumetric_dice": metrics.dice(reference, prediction),
        "asd_gt_to_pred": to_prediction,
        "asd_pred_to_gt": to_reference,
        "masd": metrics.mean_average_surface_distance(surfaces),
    }
    for side, (distances, areas) in sides.items():
        found[f"n_surfels_{side}"] = len(distances)
        found[f"area_{side}"] = float(areas.sum())
    for name in names:
        if name.startswith("surface_dice_"):
            tolerance = float(name.removeprefix("surface_dice_").removesuffix("mm"))
            found[name] = metrics.surface_dice(surfaces, tolerance)
        elif name.startswith("hd"):
            found[name] = metrics.robust_hausdorff(surfaces, float(name[2:]))
        elif name.startswith("overlap_"):
            _, side, tolerance = name.split("_")
            distances, areas = sides[side]
            near = float(areas[distances <= float(tolerance.removesuffix("mm"))].sum())
            found[name] = near / float(areas.sum()) if len(areas) else math.nan
    return found


@pytest.mark.golden
def test_surface_measures_equal_the_library(golden):
    count = 0
    for case, entry, reference, prediction in golden_masks(golden):
        spacing = tuple(entry["spacing_xyz"])
        for column, given_spacing in (
            ("direct_spacing_as_organisers", spacing),
            ("direct_spacing_reversed", spacing[::-1]),
        ):
            expected = entry[column]
            found = direct_measures(reference, prediction, given_spacing, expected)
            assert_close(found, expected, where=f"{case}/{column}")
            count += 1
    assert count


@pytest.mark.golden
@pytest.mark.parametrize(
    ("column", "preset", "relative"),
    [
        ("organisers", "organisers", RELATIVE),
        ("fork_evaluate_local", "fork_a", RELATIVE_FLOAT32_SPACING),
        ("fork_separatefolds", "fork_b_folds", RELATIVE_FLOAT32_SPACING),
    ],
)
def test_presets_equal_the_scripts(golden, column, preset, relative):
    count = 0
    for case, entry, reference, prediction in golden_masks(golden):
        expected = entry[column]
        if "per_subject" in expected:
            (subject,) = expected["per_subject"]
        else:  # spec 06 §4.3: the organisers' script returns a penalised case as it is
            subject = expected
        found = metrics.panther_case(
            reference, prediction, spacing_zyx=tuple(entry["spacing_xyz"][::-1]), preset=preset
        )
        assert_close(found, without_subject(subject), relative, f"{case}/{column}")
        if "aggregates" in expected:
            assert_close(metrics.panther_aggregate([found]), expected["aggregates"], relative, case)
        count += 1
    assert count


@pytest.mark.golden
def test_aggregates_equal_the_organisers(golden):
    index = panther_index(golden)["aggregates"]
    cases = {
        case: metrics.panther_case(
            reference,
            prediction,
            spacing_zyx=tuple(entry["spacing_xyz"][::-1]),
            preset="organisers",
        )
        for case, entry, reference, prediction in golden_masks(golden)
        if case in index["members"]
    }
    expected = index["organisers"]
    for subject in expected["per_subject"]:
        assert_close(cases[subject["subject"]], without_subject(subject), where=subject["subject"])
    members = [cases[name] for name in index["members"]]
    assert_close(metrics.panther_aggregate(members), expected["aggregates"])


def labelmap_cases(golden, preset):
    index = panther_index(golden)["labelmaps"]
    arrays = np.load(golden / "evaluation" / "labelmaps.npz")
    spacing = tuple(index["spacing_xyz"][::-1])
    names = [name.removesuffix("__gt") for name in arrays.files if name.endswith("__gt")]
    scored = {}
    for name in sorted(names):
        masks = metrics.foreground_masks(
            arrays[f"{name}__gt"], arrays[f"{name}__pred"], preset=preset
        )
        scored[name] = metrics.panther_case(*masks, spacing_zyx=spacing, preset=preset)
    return index, scored


@pytest.mark.golden
@pytest.mark.parametrize(
    ("column", "preset"),
    [
        ("fork_evaluate_local", "fork_a"),
        ("fork_separatefolds_aggregate_any_label", "fork_b"),
    ],
)
def test_label_maps_equal_the_forks(golden, column, preset):
    index, scored = labelmap_cases(golden, preset)
    expected = index[column]
    for subject in expected["per_subject"]:
        name = subject["subject"]
        assert_close(scored[name], without_subject(subject), RELATIVE_FLOAT32_SPACING, name)
    found = metrics.panther_aggregate([scored[s["subject"]] for s in expected["per_subject"]])
    assert_close(found, expected["aggregates"], RELATIVE_FLOAT32_SPACING)


@pytest.mark.golden
def test_fold_aggregates_equal_the_fork(golden):
    index, scored = labelmap_cases(golden, "fork_b_folds")
    for fold, expected in index["fork_separatefolds_per_fold"].items():
        found = metrics.panther_aggregate([scored[name] for name in index["folds"][fold]])
        assert_close(found, expected, RELATIVE_FLOAT32_SPACING, fold)


def ignore_id_of(file: Path, arrays, classes, entry) -> int | None:
    """The ignore label of a golden summary: the one with which its counts add up, if any."""
    name = Path(entry["reference_file"]).name.split(".")[0]
    counts = next(iter(entry["metrics"].values()))
    counted = counts["TP"] + counts["FP"] + counts["FN"] + counts["TN"]
    reference = arrays[f"{name}__gt"]
    if counted == reference.size:
        return None
    candidates = [v for v in np.unique(reference) if (reference != v).sum() == counted]
    assert len(candidates) == 1, f"{file.name}: which label is ignored?"
    return int(candidates[0])


@pytest.mark.golden
def test_summaries_equal_nnunet(golden, tmp_path):
    arrays = np.load(golden / "evaluation" / "labelmaps.npz")
    files = sorted((golden / "evaluation").glob("nnunet_summary_*.json"))
    assert files
    for file in files:
        expected = json.loads(file.read_text())
        classes = [ast.literal_eval(key) for key in expected["mean"]]
        ignore = None
        for entry in expected["metric_per_case"]:
            ignore = ignore or ignore_id_of(file, arrays, classes, entry)
        cases = []
        for entry in reversed(expected["metric_per_case"]):  # the summary sorts them
            name = Path(entry["reference_file"]).name.split(".")[0]
            reference, prediction = arrays[f"{name}__gt"], arrays[f"{name}__pred"]
            counts = metrics.label_counts(reference, prediction, classes, ignore)
            cases.append(entry | {"metrics": counts})
        summary = metrics.summarise(cases)
        metrics.write_summary(tmp_path / file.name, summary)
        found = json.loads((tmp_path / file.name).read_text())
        assert_close(found["mean"], expected["mean"], where=file.name)
        assert_close(found["foreground_mean"], expected["foreground_mean"], where=file.name)
        assert len(found["metric_per_case"]) == len(expected["metric_per_case"])
        for one, other in zip(found["metric_per_case"], expected["metric_per_case"], strict=True):
            assert_close(one, other, where=f"{file.name}: {other['reference_file']}")


# ------------------------------------------------------------------------------ independent


def test_areas_are_symmetric_in_inside_and_outside():
    areas = surface_element_areas((0.7, 1.1, 2.3))
    assert areas[0] == areas[255] == 0
    assert (areas[1:255] > 0).all()
    np.testing.assert_allclose(areas, areas[::-1], rtol=1e-12)  # sums in another order


def test_a_face_has_the_area_of_a_voxel_face():
    spacing = (0.7, 1.1, 2.3)
    areas = surface_element_areas(spacing)
    np.testing.assert_allclose(areas[0b00001111], spacing[1] * spacing[2])
    np.testing.assert_allclose(areas[0b00110011], spacing[0] * spacing[2])
    np.testing.assert_allclose(areas[0b01010101], spacing[0] * spacing[1])


def test_shifted_boxes_by_hand():
    reference, prediction = boxes(size=4, shift=2)
    case = metrics.panther_case(reference, prediction, spacing_zyx=(1.0, 1.0, 3.0))
    assert case["volumetric_dice"] == 0.5
    assert case["hausdorff95"] == 6.0  # two voxels of 3 mm
    assert case["gt_volume"] == case["pred_volume"] == 64 * 3.0
    swapped = metrics.panther_case(
        reference, prediction, spacing_zyx=(1.0, 1.0, 3.0), spacing_order="organisers"
    )
    assert swapped["hausdorff95"] == 2.0  # the quirk: x gets the spacing of z


def test_spacing_order_follows_the_preset():
    reference, prediction = boxes()
    for preset, order in (
        ("default", "geometric"),
        ("organisers", "organisers"),
        ("fork_a", "organisers"),
        ("fork_b", "organisers"),
    ):
        kwargs = {"spacing_zyx": (2.5, 1.0, 0.7), "preset": preset}
        found = metrics.panther_case(reference, prediction, **kwargs)
        other = "geometric" if order == "organisers" else "organisers"
        assert found == metrics.panther_case(reference, prediction, **kwargs, spacing_order=order)
        assert found != metrics.panther_case(reference, prediction, **kwargs, spacing_order=other)


def test_masks_at_the_border_have_a_surface_there():
    full = np.ones((2, 3, 4), bool)
    surfaces = surface_distances(full, full, (1.0, 1.0, 1.0))
    assert len(surfaces.reference_areas) == 3 * 4 * 5 - 1 * 2 * 3  # nodes but the inner ones
    assert surfaces.reference_to_prediction.max() == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), margin=st.integers(0, 4))
def test_measures_do_not_depend_on_the_field_of_view(seed, margin):
    rng = np.random.default_rng(seed)
    reference, prediction = blob(rng, (7, 8, 9)), blob(rng, (7, 8, 9))
    prediction[3, 3, 3] = reference[4, 4, 4] = True
    spacing = (1.5, 0.8, 0.6)
    wide = [np.pad(m, margin) for m in (reference, prediction)]
    small = metrics.panther_case(reference, prediction, spacing_zyx=spacing)
    large = metrics.panther_case(*wide, spacing_zyx=spacing)
    assert_close(large, small, 1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_measures_are_symmetric_and_scale_with_the_spacing(seed):
    rng = np.random.default_rng(seed)
    reference, prediction = blob(rng, (6, 9, 7)), blob(rng, (6, 9, 7))
    prediction[3, 3, 3] = reference[4, 4, 4] = True
    one = surface_distances(reference, prediction, (1.5, 0.8, 0.6))
    swapped = surface_distances(prediction, reference, (1.5, 0.8, 0.6))
    twice = surface_distances(reference, prediction, (3.0, 1.6, 1.2))
    for measure in (metrics.mean_average_surface_distance, metrics.robust_hausdorff):
        np.testing.assert_allclose(measure(swapped), measure(one), rtol=1e-12)
        np.testing.assert_allclose(measure(twice), 2 * measure(one), rtol=1e-12)
    np.testing.assert_allclose(
        metrics.surface_dice(twice, 4.0), metrics.surface_dice(one, 2.0), rtol=1e-12
    )


# the library is older than the SciPy and setuptools that it runs with here
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", [(8, 9, 10), (12, 11)])
def test_surfaces_equal_the_surface_distance_library(shape):
    library = pytest.importorskip("surface_distance")
    rng = np.random.default_rng(3)
    spacing = (2.5, 0.9, 1.2)[: len(shape)]
    for _ in range(3):
        reference, prediction = blob(rng, shape), blob(rng, shape)
        expected = library.compute_surface_distances(reference, prediction, spacing)
        surfaces = surface_distances(reference, prediction, spacing)
        for distances, areas, direction in directions(surfaces):
            side = direction.split("_")[0]
            wanted = expected[f"distances_{direction}"], expected[f"surfel_areas_{side}"]
            for one, other in zip(ordered(distances, areas), ordered(*wanted), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-12)
        for percent in (50, 95, 100):
            assert metrics.robust_hausdorff(surfaces, percent) == pytest.approx(
                library.compute_robust_hausdorff(expected, percent), rel=1e-12
            )
        assert metrics.surface_dice(surfaces, 1.0) == pytest.approx(
            library.compute_surface_dice_at_tolerance(expected, 1.0), rel=1e-12
        )


def test_empty_masks_by_preset():
    full, empty = boxes()[0], np.zeros((8, 9, 10), bool)
    spacing = (3.0, 2.0, 1.0)
    extent = math.hypot(8 * 3.0, 9 * 2.0, 10 * 1.0)

    both = metrics.panther_case(empty, empty, spacing_zyx=spacing)
    assert (both["volumetric_dice"], both["surface_dice"]) == (1.0, 1.0)
    assert (both["hausdorff95"], both["masd"]) == (0.0, 0.0)
    for reference, prediction in ((full, empty), (empty, full)):
        case = metrics.panther_case(reference, prediction, spacing_zyx=spacing)
        assert (case["volumetric_dice"], case["surface_dice"]) == (0.0, 0.0)
        assert case["hausdorff95"] == case["masd"] == pytest.approx(extent)
        assert case["gt_volume"] == reference.sum() * 6.0
        assert case["pred_volume"] == prediction.sum() * 6.0
        assert "time_score" not in case
    missed = metrics.panther_case(full, empty, spacing_zyx=spacing, preset="organisers")
    assert missed["time_score"] == 0.0
    assert missed["hausdorff95"] == pytest.approx(math.hypot(8 * 1.0, 9 * 2.0, 10 * 3.0))
    spurious = metrics.panther_case(empty, full, spacing_zyx=spacing, preset="organisers")
    assert math.isinf(spurious["hausdorff95"]) and math.isnan(spurious["masd"])
    scored = [missed, spurious, both]
    assert metrics.panther_detections(scored) == {"num_missed": 1, "num_false_positive": 1}


def test_foreground_rules():
    reference = np.array([[[0, 1, 2, 3]]])
    prediction = np.array([[[2, 1, 0, 1]]])
    for preset, expected in (
        ("default", ([0, 1, 0, 0], [0, 1, 0, 1])),
        ("fork_a", ([0, 1, 0, 0], [0, 1, 0, 1])),
        ("fork_b", ([0, 1, 1, 1], [1, 1, 0, 1])),
    ):
        found = metrics.foreground_masks(reference, prediction, preset=preset)
        np.testing.assert_array_equal([m.ravel() for m in found], np.array(expected, bool))
    two = metrics.foreground_masks(reference, prediction, label=2)
    np.testing.assert_array_equal([m.ravel() for m in two], [[0, 0, 1, 0], [1, 0, 0, 0]])
    with pytest.raises(ValueError, match="values \\[0, 1, 2\\]"):
        metrics.foreground_masks(reference, prediction, preset="organisers")
    masks = metrics.foreground_masks(reference, 2 * (prediction == 2), preset="organisers")
    np.testing.assert_array_equal([m.ravel() for m in masks], [[0, 1, 1, 1], [1, 0, 0, 0]])


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 3\), its reference \(2, 2, 2\)"):
        metrics.panther_case(
            np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool), spacing_zyx=(1.0, 1.0, 1.0)
        )
    with pytest.raises(ValueError, match="no case"):
        metrics.panther_aggregate([])
    with pytest.raises(ValueError, match="no case"):
        metrics.summarise([])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), high=st.sampled_from([3, 255, 70_000]))
def test_label_counts_equal_the_definition(seed, high):
    rng = np.random.default_rng(seed)
    ids = np.array([0, 1, 2, high])
    reference, prediction = ids[rng.integers(0, 4, (2, 3, 4, 5))]
    classes = [0, 1, (1, high), (2,), 9]
    found = metrics.label_counts(reference, prediction, classes, ignore_id=2)
    valid = reference != 2
    assert list(found) == ["0", "1", f"(1, {high})", "(2,)", "9"]
    for value in classes:
        r, p = (np.isin(a, value) for a in (reference, prediction))
        counts = found[metrics.class_key(value)]
        expected = {
            "TP": (r & p & valid).sum(),
            "FP": (~r & p & valid).sum(),
            "FN": (r & ~p & valid).sum(),
            "TN": (~r & ~p & valid).sum(),
        }
        assert {k: counts[k] for k in expected} == expected
        union = expected["TP"] + expected["FP"] + expected["FN"]
        if union:
            assert counts["IoU"] == expected["TP"] / union
            assert counts["Dice"] == 2 * expected["TP"] / (union + expected["TP"])
        else:
            assert math.isnan(counts["IoU"]) and math.isnan(counts["Dice"])


def test_summary_means_and_nan(tmp_path):
    one = np.array([[0, 1], [1, 2]])
    other = np.array([[0, 1], [0, 0]])
    cases = [
        {
            "metrics": metrics.label_counts(reference, prediction, [0, 1, 2, 7]),
            "prediction_file": tmp_path / f"{name}.nii.gz",
            "reference_file": f"{name}.nii.gz",
        }
        for name, reference, prediction in (("b", one, other), ("a", other, other))
    ]
    summary = metrics.summarise(cases)
    names = [Path(c["prediction_file"]).name for c in summary["metric_per_case"]]
    assert names == ["a.nii.gz", "b.nii.gz"]
    assert summary["mean"]["1"]["Dice"] == (1 + 2 / 3) / 2
    assert summary["mean"]["2"]["Dice"] == 0  # the case without label 2 is skipped
    assert math.isnan(summary["mean"]["7"]["Dice"])
    assert math.isnan(summary["foreground_mean"]["Dice"])  # label 7 is in it
    assert summary["foreground_mean"]["TP"] == (1.0 + 0.0 + 0.0) / 3  # label 0 is not

    path = tmp_path / "new" / "summary.json"
    metrics.write_summary(path, summary)
    text = path.read_text()
    assert "NaN" in text and text.startswith('{\n    "foreground_mean": {\n        "Dice": NaN')
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]
    with pytest.raises(ValueError, match="other classes"):
        metrics.summarise([cases[0], cases[1] | {"metrics": {}}])


def test_metrics_do_not_import_jax():
    import subprocess
    import sys

    code = "import sys, panther_jax.evaluation.metrics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num_axes=st.integers(1, 3), few=st.integers(0, 2))
def test_bounding_boxes_are_tight(seed, num_axes, few):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 6, num_axes))
    arrays = [np.zeros(shape, np.int16), np.zeros(shape, bool)]
    for array in arrays:
        for _ in range(few):
            array[tuple(rng.integers(0, shape))] = 1
    box = metrics.bounding_box(*arrays)
    found = np.argwhere((arrays[0] != 0) | arrays[1])
    if len(found):
        assert [b.start for b in box] == found.min(axis=0).tolist()
        assert [b.stop for b in box] == (found.max(axis=0) + 1).tolist()
    else:
        assert box == (slice(0, 0),) * num_axes
