import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panther_jax.plans.labels import Labels
from panther_jax.training import targets

REGIONS = Labels(
    (("background", 0), ("whole", (1, 2, 4)), ("tumor", 2), ("rest", (3, 4))), (1, 2, 3)
)
REGIONS_IGNORE = Labels((*REGIONS.names, ("ignore", 5)), (1, 2, 3))


@pytest.mark.golden
def test_deep_supervision_targets_match_the_reference(golden):
    folder = golden / "training"
    cases = json.loads((folder / "deep_supervision.json").read_text())["targets"]
    arrays = np.load(folder / "deep_supervision.npz")
    assert cases
    for case in cases:
        i = case["index"]
        strides = np.cumprod(case["pool_op_kernel_sizes"], axis=0)[:-1]
        strides = tuple(tuple(int(s) for s in row) for row in strides)
        label = jnp.asarray(arrays[f"t{i}_seg"])[..., None]
        down = jax.jit(targets.deep_supervision_targets, static_argnums=1)(label, strides)
        assert len(down) == len(case["shapes"])
        for j, found in enumerate(down):
            expected = arrays[f"t{i}_ds{j}"]
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found[..., 0], expected)


def test_targets_by_hand():
    label = jnp.arange(5 * 6, dtype=jnp.int8).reshape(1, 5, 6, 1)
    whole, half = targets.deep_supervision_targets(label, ((1, 1), (2, 3)))
    assert whole is label
    # 5 -> round(2.5) = 2: floor((i + .5) 2.5) = 1, 3; 6 -> 2: 1, 4
    assert half[0, ..., 0].tolist() == [[7, 10], [19, 22]]
    assert half.dtype == jnp.int8


def test_regions_are_downsampled_like_labels():
    rng = np.random.default_rng(0)
    label = jnp.asarray(rng.integers(0, 6, (2, 7, 8, 9, 1)), jnp.int16)
    strides = ((1, 2, 2), (2, 4, 4))
    regions = targets.to_regions(label, REGIONS_IGNORE)
    for a, b in zip(
        targets.deep_supervision_targets(regions, strides),
        targets.deep_supervision_targets(label, strides),
        strict=True,
    ):
        assert a.dtype == bool
        np.testing.assert_array_equal(a, targets.to_regions(b, REGIONS_IGNORE))


@pytest.mark.parametrize(
    ("size", "factor", "index"), [(5, 3, [1, 3]), (9, 6, [2, 6]), (3, 2, [0, 2])]
)
def test_sizes_round_half_to_even(size, factor, index):
    assert targets.nearest_exact_index(size, factor).tolist() == index


@pytest.mark.parametrize(
    ("size", "factor", "position", "index"), [(84, 8, 7, 62), (114, 5, 11, 56), (238, 3, 39, 118)]
)
def test_index_is_computed_in_float32(size, factor, position, index):
    # What PyTorch's nearest-exact picks; exact arithmetic picks the next voxel (spec 04 §6.9)
    found = targets.nearest_exact_index(size, factor)
    assert found[position] == index
    assert (2 * position + 1) * size // (2 * len(found)) == index + 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 32))
def test_index_lies_in_the_axis_and_increases(count, factor):
    size = count * factor
    index = targets.nearest_exact_index(size, factor)
    np.testing.assert_array_equal(index, np.arange(count) * factor + factor // 2)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(4, 13), min_size=2, max_size=3), st.integers(1, 3), st.integers(1, 4))
def test_downsampling_is_indexing(shape, first, second):
    strides = tuple((first, second, 2)[: len(shape)])
    label = jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(1, *shape, 1)
    (down,) = targets.deep_supervision_targets(label, (strides,))
    index = [targets.nearest_exact_index(n, f) for n, f in zip(shape, strides, strict=True)]
    np.testing.assert_array_equal(down[0, ..., 0], np.asarray(label)[0, ..., 0][np.ix_(*index)])


def test_remove_outside_keeps_the_rest_and_the_dtype():
    label = jnp.array([-1, 0, 2, -1], jnp.int8)
    found = jax.jit(targets.remove_outside)(label)
    assert found.dtype == jnp.int8
    assert found.tolist() == [0, 0, 2, 0]


def test_to_regions_by_hand():
    label = jnp.arange(6, dtype=jnp.int16).reshape(1, 6, 1)
    whole, tumor, rest, ignore = np.moveaxis(targets.to_regions(label, REGIONS_IGNORE)[0], -1, 0)
    assert np.flatnonzero(whole).tolist() == [1, 2, 4]
    assert np.flatnonzero(tumor).tolist() == [2]
    assert np.flatnonzero(rest).tolist() == [3, 4]
    assert np.flatnonzero(ignore).tolist() == [5]
    assert targets.to_regions(label, REGIONS).shape == (1, 6, 3)


def test_to_regions_needs_regions():
    labels = Labels((("background", 0), ("tumor", 1)))
    with pytest.raises(ValueError, match="no regions"):
        targets.to_regions(jnp.zeros((1, 2, 2, 1), jnp.int8), labels)
