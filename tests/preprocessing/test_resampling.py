"""Resampling against the reference's numbers, SciPy, and its own invariants."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from panther_jax.plans.plans import Resampler
from panther_jax.preprocessing.label_resampling import resample_label
from panther_jax.preprocessing.resampling import (
    apply_operators,
    axis_operator,
    image_operators,
    resample_image,
    resample_logits,
    separate_axis,
    target_shape,
)

SPLINE, TORCH = "resample_data_or_seg_to_shape", "resample_torch_fornnunet"
ISOTROPIC = {"spacing": (1.0, 1.0, 1.0), "new_spacing": (1.0, 1.0, 1.0)}
COARSE_Z = {"spacing": (5.0, 1.0, 1.0), "new_spacing": (2.0, 1.0, 1.0)}


def resampler(name: str, **kwargs: object) -> Resampler:
    return Resampler(name, tuple(sorted(kwargs.items())))  # type: ignore[arg-type]


CUBIC = resampler(SPLINE, order=3, order_z=0, force_separate_z=None)
LINEAR = resampler(SPLINE, order=1, order_z=0, force_separate_z=None)
TORCH_ANY = resampler(TORCH, force_separate_z=None)
GOLDEN_JOBS = {
    "np_data": CUBIC,
    "np_seg": LINEAR,
    "np_logits": LINEAR,
    "np_data_order1": LINEAR,
    "torch_data": TORCH_ANY,
    "torch_seg": TORCH_ANY,
    "torch_seg_memeff": resampler(TORCH, force_separate_z=False, memefficient_seg_resampling=True),
}


# -------------------------------------------------------------------------------------- golden


@pytest.mark.golden
def test_units(golden: Path) -> None:
    folder = golden / "preprocessing"
    arrays = np.load(folder / "resampling_units.npz")
    cases = json.loads((folder / "resampling_units.json").read_text())
    assert cases
    for name, case in cases.items():
        out, mode, job = name.split("_", 2)
        source = out.replace("out", "in")
        spacings = {"spacing": case["current_spacing"], "new_spacing": case["new_spacing"]}
        shape, expected = case["new_shape"], arrays[name]
        if job == "torch_data_nearest_exact":
            image = arrays[f"{source}_data"]
            tables = tuple(
                axis_operator(old, new, "torch_nearest_exact")
                for old, new in zip(image.shape[1:], shape, strict=True)
            )
            np.testing.assert_array_equal(apply_operators(image[0], tables), expected[0], name)
        elif "seg" in job:
            label = arrays[f"{source}_seg"][0].astype(np.int16)
            found = resample_label(label, shape, GOLDEN_JOBS[job], **spacings)
            # torch: float16 scores can round to ties otherwise
            allowed = 0.0 if job == "np_seg" else 0.002
            assert np.mean(found != expected[0]) <= allowed, name
        else:
            image = arrays[f"{source}_{'logits' if job == 'np_logits' else 'data'}"]
            found = resample_image(image, shape, GOLDEN_JOBS[job], **spacings)
            assert found.dtype == expected.dtype, name
            # 1e-5: float32 results of another order of summation
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.golden
def test_target_shapes_and_separate_axes(golden: Path) -> None:
    rows = json.loads((golden / "preprocessing" / "new_shape_sepz_table.json").read_text())
    assert rows
    for row in rows:
        old, new = row["current_spacing"], row["new_spacing"]
        assert list(target_shape(row["old_shape"], old, new)) == row["new_shape"], row
        for force in (None, False, True):
            if f"force_{force}" in row:
                axis = separate_axis(old, new, force)
                assert [axis is not None, axis] == row[f"force_{force}"], row


# --------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(7, 7), (7, 13), (13, 7), (1, 5), (5, 1), (40, 97), (90, 41)])
def test_spline_table_is_scipy_zoom(order: int, sizes: tuple[int, int]) -> None:
    old, new = sizes
    x = np.random.default_rng(0).standard_normal(old)
    table = axis_operator(old, new, f"spline{order}")  # type: ignore[arg-type]
    expected = ndimage.zoom(x, new / old, order=order, mode="nearest", grid_mode=True)
    # 1e-12: rounding of the prefilter; order 0 and 1 hold the very numbers
    np.testing.assert_allclose(table @ x, expected, rtol=0, atol=1e-12 if order == 3 else 1e-15)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["spline0", "spline1", "spline3"]))
@settings(max_examples=40, deadline=None)
def test_tables_keep_constants(old: int, new: int, kind: str) -> None:
    table = axis_operator(old, new, kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    if old == new:
        np.testing.assert_allclose(table, np.eye(old), rtol=0, atol=1e-12)


def test_nearest_ties_go_up() -> None:
    assert axis_operator(4, 2, "spline0").argmax(axis=1).tolist() == [1, 3]  # spec 02 §4.5


def test_torch_nearest_differs_from_spline_nearest_where_float32_rounds() -> None:
    # spec 02 §4.6 names these two sizes
    for old, new in ((30, 13), (48, 37)):
        torch = axis_operator(old, new, "torch_nearest_exact").argmax(axis=1)
        assert np.sum(torch != axis_operator(old, new, "spline0").argmax(axis=1)) == 1


def test_half_voxels_round_to_even() -> None:
    assert target_shape((5, 7, 9), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)) == (2, 4, 4)


def test_blocks_of_rows_cover_long_axes() -> None:
    x = np.random.default_rng(1).standard_normal((2, 150, 3))
    table = axis_operator(150, 331, "spline3")
    result = apply_operators(x, (None, table, None))
    expected = np.einsum("oi,zix->zox", table, x)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13)  # order of summation


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_empty_axis_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 voxels"):
        axis_operator(*sizes, "spline1")


def test_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order 2 is not supported"):
        resample_image(np.zeros((1, 2, 2, 2)), (3, 3, 3), resampler(SPLINE, order=2), **ISOTROPIC)


# ------------------------------------------------------------------------------ images, logits


def test_equal_shape_is_returned_as_it_is() -> None:
    image = np.zeros((1, 3, 4, 5), np.float16)
    assert resample_image(image, (3, 4, 5), TORCH_ANY, **ISOTROPIC) is image
    label = np.zeros((3, 4, 5), np.int8)
    assert resample_label(label, (3, 4, 5), LINEAR, **ISOTROPIC) is label


def test_cubic_result_stays_in_the_range_of_what_was_given() -> None:
    image = (np.random.default_rng(2).random((2, 6, 9, 8)) > 0.5).astype(np.float32)
    image[1] *= 7
    found = resample_image(image, (12, 18, 17), CUBIC, **ISOTROPIC)
    for channel, expected in zip(found, (1.0, 7.0), strict=True):
        assert channel.min() == 0.0
        assert channel.max() == expected
    # separate axis: a slice is clipped to its own range, so a constant slice stays constant
    image[0, 3] = 0.25
    found = resample_image(image, (6, 18, 17), CUBIC, **COARSE_Z)
    assert np.all(found[0, 3] == 0.25)


@pytest.mark.parametrize("kind", [LINEAR, TORCH_ANY, resampler(TORCH, force_separate_z=False)])
@pytest.mark.parametrize("shape", [(9, 13, 3), (2, 5, 11), (7, 7, 14), (1, 8, 7), (20, 1, 1)])
def test_plane_after_plane_is_what_the_tables_give(
    kind: Resampler, shape: tuple[int, int, int]
) -> None:
    # shapes in which the first axis is shrunk or grown before, between and after the others
    image = np.random.default_rng(8).standard_normal((2, 7, 8, 7)).astype(np.float32)
    for spacings in (ISOTROPIC, COARSE_Z):
        found = resample_image(image, shape, kind, **spacings)
        tables = image_operators(image.shape[1:], shape, kind, **spacings)
        for channel, source in zip(found, image, strict=True):
            # 2e-6: float32 of three axes, in another order of summation
            np.testing.assert_allclose(channel, apply_operators(source, tables), rtol=0, atol=2e-6)


def test_planes_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(9).standard_normal((1, 7, 8, 9)).astype(np.float32)
    for shape in ((5, 12, 6), (1, 9, 9)):
        expected = resample_image(image, shape, TORCH_ANY, **ISOTROPIC)
        for threads in (1, 3, 8):
            monkeypatch.setattr("panther_jax.preprocessing.resampling.THREADS", threads)
            found = resample_image(image, shape, TORCH_ANY, **ISOTROPIC)
            np.testing.assert_array_equal(found, expected)


def test_empty_target_axis_of_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="0 voxels"):
        resample_image(np.ones((1, 2, 2, 2), np.float32), (2, 0, 2), TORCH_ANY, **ISOTROPIC)


def test_dtypes() -> None:
    logits = np.random.default_rng(3).standard_normal((2, 4, 5, 6)).astype(np.float16)
    assert resample_logits(logits, (5, 5, 7), LINEAR, **ISOTROPIC).dtype == np.float16
    assert resample_logits(logits, (5, 5, 7), TORCH_ANY, **ISOTROPIC).dtype == np.float32


# --------------------------------------------------------------------------------- label maps


def scores_by_scipy(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    zoom = [n / o for n, o in zip(shape, label.shape, strict=True)]
    indicators = ((label == value).astype(float) for value in np.unique(label))
    return np.stack(
        [ndimage.zoom(i, zoom, order=1, mode="nearest", grid_mode=True) for i in indicators]
    )


def argmax_rule(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Spec 02 §4.5, literally: highest score; ties to the nearest label, else to the smallest."""
    values, scores = np.unique(label), np.clip(scores_by_scipy(label, shape), 0, 1)
    zoom = [n / o for n, o in zip(shape, label.shape, strict=True)]
    nearest = ndimage.zoom(label, zoom, order=0, mode="nearest", grid_mode=True)
    tied = scores == scores.max(axis=0)
    nearest_tied = np.any(tied & (values[:, None, None, None] == nearest), axis=0)
    return np.where(nearest_tied, nearest, values[tied.argmax(axis=0)])


shapes = st.tuples(*[st.integers(1, 12)] * 3)
factors = st.tuples(*[st.sampled_from([0.5, 2 / 3, 1.0, 1.5, 2.0, 2.6, 3.0])] * 3)


@given(shapes, factors, st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_label_rule(
    shape: tuple[int, int, int], factor: tuple[float, ...], seed: int, num_labels: int
) -> None:
    # small sizes and simple ratios: exact ties everywhere, where rounding decides
    label = np.random.default_rng(seed).integers(-1, num_labels, shape).astype(np.int8)
    new = tuple(max(1, round(n * f)) for n, f in zip(shape, factor, strict=True))
    found = resample_label(label, new, LINEAR, **ISOTROPIC)
    assert found.dtype == label.dtype
    expected = label if new == shape else argmax_rule(label, new)
    np.testing.assert_array_equal(found, expected)


def test_label_in_slabs_is_the_label_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.zeros((14, 20, 22), np.int16)
    label[5:9, 4:15, 6:17] = 2
    label[6:8, 7:11, 8:12] = 300
    label[:, :2] = -1
    for shape in ((31, 33, 40), (5, 9, 10)):
        for kind in (LINEAR, TORCH_ANY):
            whole = resample_label(label, shape, kind, **ISOTROPIC)
            assert set(np.unique(whole)) == {-1, 0, 2, 300}
            with monkeypatch.context() as patched:
                patched.setattr("panther_jax.preprocessing.label_resampling.SLAB_VOXELS", 500)
                slabs = resample_label(label, shape, kind, **ISOTROPIC)
            np.testing.assert_array_equal(slabs, whole)


def test_torch_label_rule_is_an_argmax_of_float16_scores() -> None:
    label = np.random.default_rng(5).integers(0, 3, (6, 7, 8)).astype(np.int8)
    shape = (11, 9, 13)
    tables = tuple(
        axis_operator(o, n, "torch_linear") for o, n in zip(label.shape, shape, strict=True)
    )
    scores = np.stack(
        [
            apply_operators(1000.0 * (label == v), tables, dtype=np.float32).astype(np.float16)
            for v in range(3)
        ]
    )
    found = resample_label(label, shape, TORCH_ANY, **ISOTROPIC)
    # at most one voxel: the order of the axes can round a float16 score the other way
    assert np.sum(found != scores.argmax(axis=0)) <= 1
    lean = resampler(TORCH, force_separate_z=False, memefficient_seg_resampling=True)
    found = resample_label(label, shape, lean, **ISOTROPIC)
    expected = np.where(scores[1:].max(axis=0) > 500, 1 + scores[1:].argmax(axis=0), 0)
    clear = np.abs(scores.astype(float) - 500).min(axis=0) > 1  # float16 spacing is 0.5 there
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_separate_axis_of_labels_takes_whole_slices() -> None:
    label = np.random.default_rng(6).integers(0, 3, (4, 6, 6)).astype(np.int8)
    for kind in (LINEAR, TORCH_ANY):
        found = resample_label(label, (2, 9, 9), kind, **COARSE_Z)
        in_plane = resample_label(label, (4, 9, 9), kind, **COARSE_Z)
        np.testing.assert_array_equal(found, in_plane[[1, 3]])


def test_order_z_of_labels_assigns_above_half() -> None:
    label = np.zeros((2, 3, 3), np.int8)
    label[1] = 1
    linear_z = resampler(SPLINE, order=1, order_z=1, force_separate_z=None)
    found = resample_label(label, (6, 3, 3), linear_z, **COARSE_Z)
    # scores of 1 along z: 0 0 1/6 1/2 5/6 1 with half-voxel steps; exactly half is not enough
    position = np.clip((np.arange(6) + 0.5) / 3 - 0.5, 0, 1)
    np.testing.assert_array_equal(found[:, 0, 0], position > 0.5 + 1e-9)


def test_legacy_half_rule() -> None:
    label = np.array([1, 2, 3, 1], np.int8).reshape(1, 1, 4)
    found = resample_label(label, (1, 1, 2), LINEAR, **ISOTROPIC, legacy_half=True)
    # both voxels average two labels: each scores 0.5, the later one overwrites
    assert found.ravel().tolist() == [2, 3]
    assert resample_label(label, (1, 1, 2), LINEAR, **ISOTROPIC).ravel().tolist() == [2, 1]


def test_constant_label_stays_constant() -> None:
    label = np.full((3, 4, 5), 7, np.int16)
    assert np.all(resample_label(label, (6, 3, 9), LINEAR, **ISOTROPIC) == 7)


def test_memory_of_labels_does_not_grow_with_their_number() -> None:
    import tracemalloc

    peaks = []
    for num_labels in (2, 12):
        label = np.random.default_rng(7).integers(0, num_labels, (12, 24, 24)).astype(np.int16)
        tracemalloc.start()
        resample_label(label, (24, 48, 48), LINEAR, **ISOTROPIC)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    volume = math.prod((24, 48, 48)) * 8
    assert peaks[1] - peaks[0] < 2 * volume  # one score more would be 10 volumes for 10 labels
