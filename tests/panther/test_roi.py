"""Regions of interest equal the organisers'; crops, pastes and resampling keep positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panther_jax.panther.roi import (
    crop,
    paste,
    region_of_interest,
    resample,
    resample_mask_onto,
)
from panther_jax.plans.geometry import Geometry

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def xyz(array):
    return tuple(float(v) for v in array)


@pytest.mark.golden
def test_golden_region_of_interest(golden):
    arrays = np.load(golden / "inference" / "baseline_helpers.npz")
    image = arrays["roi_image"]
    spacing, low_spacing = (
        xyz(arrays[k])[::-1] for k in ("roi_image_spacing_xyz", "roi_lowres_spacing_xyz")
    )
    geometry = Geometry(image.shape, spacing, (0.0, 0.0, 0.0), IDENTITY)
    low, low_geometry = resample(image, geometry, low_spacing)
    assert low.shape == arrays["roi_lowres"].shape == low_geometry.shape_zyx
    # B-spline coefficients in float32; 1e-3 of the range is what is asked for
    np.testing.assert_allclose(low, arrays["roi_lowres"], rtol=0, atol=1e-3 * np.ptp(image))
    box = region_of_interest(
        arrays["roi_lowres_mask"] > 0,
        low_geometry,
        geometry,
        margins_mm_zyx=xyz(arrays["roi_margins_mm"])[::-1],
    )
    x_start, x_stop, y_start, y_stop, z_start, z_stop = arrays["roi_coordinates_xs_xf_ys_yf_zs_zf"]
    assert box == ((z_start, z_stop), (y_start, y_stop), (x_start, x_stop))
    cut, _ = crop(image[None], geometry, box)
    assert cut.shape[1:] == tuple(arrays["roi_cropped_shape_zyx"])


ROTATED = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(4, 9)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.5, 1.0, 1.25, 3.0])] * 3),
    direction=st.sampled_from([IDENTITY, ROTATED]),
    data=st.data(),
)
def test_crop_keeps_positions_and_paste_is_its_inverse(shape, spacing, direction, data):
    geometry = Geometry(shape, spacing, (3.0, -2.0, 10.0), direction)
    box = []
    for n in shape:
        start = data.draw(st.integers(0, n - 2))
        box.append((start, data.draw(st.integers(start + 1, n))))
    label = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) + 1
    cut, moved = crop(label[None], geometry, tuple(box))
    whole = paste(cut[0], tuple(box), shape)
    inside = np.zeros(shape, bool)
    inside[tuple(slice(*side) for side in box)] = True
    np.testing.assert_array_equal(whole, np.where(inside, label, 0))
    # The mask of the crop, by position, is the box; the region around it without margin is, too,
    # but for the high side, which is one voxel shorter.
    everywhere = np.ones(moved.shape_zyx, bool)
    np.testing.assert_array_equal(resample_mask_onto(everywhere, moved, geometry), inside)
    found = region_of_interest(everywhere, moved, geometry, margins_mm_zyx=(0.0, 0.0, 0.0))
    expected = tuple((start, max(stop - 1, start + 1)) for start, stop in box)
    assert found == expected


def test_margins_are_rounded_down_and_stay_in_the_image():
    geometry = Geometry((20, 30, 40), (2.0, 1.0, 1.5), (0.0, 0.0, 0.0), IDENTITY)
    mask = np.zeros((20, 30, 40), bool)
    mask[10, 15, 1] = mask[11, 20, 38] = True
    box = region_of_interest(mask, geometry, geometry, margins_mm_zyx=(5.0, 3.9, 4.0))
    assert box == ((8, 13), (12, 23), (0, 40))
    assert region_of_interest(mask & False, geometry, geometry, margins_mm_zyx=(1.0,) * 3) is None


def test_a_mask_of_another_grid_is_found_by_position():
    low = Geometry((5, 5, 5), (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), IDENTITY)
    high = Geometry((9, 9, 9), (2.0, 2.0, 2.0), (2.0, 0.0, -100.0), IDENTITY)
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2] = True
    near = Geometry((9, 9, 9), (2.0, 2.0, 2.0), (2.0, 0.0, 0.0), IDENTITY)
    places = np.argwhere(resample_mask_onto(mask, low, near))
    assert places.min(axis=0).tolist() == [3, 3, 2] and len(places) == 8
    # beside the image: one voxel at the rim, never an empty box
    box = region_of_interest(mask, low, high, margins_mm_zyx=(0.0, 0.0, 0.0))
    assert all(0 <= start < stop <= 9 for start, stop in box)


def test_resampling_of_labels_keeps_values_and_sizes_round_half_to_even():
    label = np.random.default_rng(0).integers(0, 3, (5, 7, 6)).astype(np.uint8)
    geometry = Geometry((5, 7, 6), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), IDENTITY)
    found, wanted = resample(label, geometry, (2.0, 2.0, 0.5), is_label=True)
    assert found.shape == wanted.shape_zyx == (2, 4, 12)
    assert found.dtype == label.dtype and set(np.unique(found)) <= {0, 1, 2}
    np.testing.assert_array_equal(found[:, :3, ::2], label[::2, ::2][:2, :3])
