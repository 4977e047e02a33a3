"""The winning fork's DA5 (spec 04 §5): its transforms, and the laws of its policies."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from panther_jax.augment import fork, intensity, local, policies, recipes, spatial
from panther_jax.preprocessing.resampling import axis_operator

# Compiling takes most of the time of these tests, running next to none.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BLUR = quick_jit(fork.Blur(sigma_range=(0.3, 1.5)).apply)
LOWER = fork.LowResolution(scale_range=(0.25, 1.0))
LOW_RESOLUTION = quick_jit(LOWER.apply)
SHARPEN = quick_jit(fork.Sharpen(strength_range=(0.1, 1.0)).apply)
GAMMA = quick_jit(fork.Gamma(gamma_range=(0.7, 1.5)).apply)
INVERTED_GAMMA = quick_jit(fork.Gamma(gamma_range=(0.7, 1.5), invert=True).apply)
CUBIC = quick_jit(fork.resample_cubic)
NEAREST = quick_jit(fork.resample_nearest, static_argnames="fill")
INTERPOLATION = {0: "nearest", 1: "linear", 3: "cubic"}
NUM_DRAWS = 20_000


def spatial_result(params, image, label):
    """Every channel and the label of a golden case."""
    orders = INTERPOLATION[params["order_image"]], INTERPOLATION[params["order_seg"]]
    draw = spatial.SpatialDraw(
        jnp.asarray(True),
        jnp.asarray(params["angles"], jnp.float32),
        jnp.asarray(params["scales"], jnp.float32),
    )
    patch_size, how = tuple(params["patch"]), fork.resampling(*orders)
    run = quick_jit(partial(spatial.apply_spatial, patch_size=patch_size, how=how))
    volumes, label = run(tuple(image), label, draw)
    return np.stack(volumes), np.asarray(label)[None]


def intensity_result(params, volume):
    ones = jnp.ones(volume.ndim)
    if "sigma" in params:
        return BLUR(volume, params["sigma"] * ones)
    if "zoom" in params:
        return LOW_RESOLUTION(volume, params["zoom"] * ones)
    if "gamma" in params:
        return (INVERTED_GAMMA if params["invert"] else GAMMA)(volume, jnp.float32(params["gamma"]))
    return SHARPEN(volume, jnp.float32(params["strength"]))


@pytest.mark.golden
def test_golden_cases(golden):
    folder = golden / "augmentation"
    index = json.loads((folder / "fork_da5.json").read_text())
    with np.load(folder / "fork_da5.npz") as stored:
        arrays = dict(stored)
    assert index
    image, label = jnp.asarray(arrays["image"]), jnp.asarray(arrays["seg"])[0]
    of_params = {}  # image and label of one set of parameters are two entries
    for name, case in index.items():
        params = case["params"]
        if "angles" in params and str(params) not in of_params:
            of_params[str(params)] = spatial_result(params, image, label)
        if "angles" not in params:
            ours, tolerance = np.stack([intensity_result(params, v) for v in image]), 1e-5
        elif name.endswith("_seg"):
            ours, tolerance = of_params[str(params)][1], 0.0
        else:
            ours, tolerance = of_params[str(params)][0], 1e-4
        assert list(ours.shape) == case["shape"], name
        if case["storage"] == "probe":
            # float32 sums of the statistics
            assert ours.mean(dtype=np.float64) == pytest.approx(case["stats"]["mean"], abs=1e-5)
            assert ours.std(dtype=np.float64) == pytest.approx(case["stats"]["std"], rel=1e-4)
            ours = ours.reshape(-1)[arrays[case["probe"]]]
        wrong = np.abs(ours.astype(np.float64) - arrays[name]) > tolerance
        # README: labels differ in at most 1e-3 of the voxels; images (but of order 0) nowhere
        may_differ = "angles" in params and (name.endswith("_seg") or params["order_image"] == 0)
        assert wrong.mean() <= (1e-3 if may_differ else 0), (name, wrong.mean())


@pytest.mark.parametrize("shape", [(17, 14, 4), (30, 9), (1, 20, 6)])
def test_resampling_equals_scipy(shape):
    rng = np.random.default_rng(len(shape))
    volume = rng.standard_normal(shape).astype(np.float32)
    grid = [rng.uniform(-1.5, n + 0.5, (12, 20)).astype(np.float32) for n in shape]
    for axis, size in enumerate(shape):  # borders, voxels and halves
        grid[axis][0, :6] = (0, size - 1, size - 0.5, -0.25, 0.5, size / 2)
    jnp_grid = tuple(map(jnp.asarray, grid))
    at = partial(ndimage.map_coordinates, np.float64(volume), np.float64(grid), mode="constant")
    # 2e-5: float32 weights, coefficients up to 1.7 ** 3 times the samples
    cubic = CUBIC(jnp.asarray(volume), jnp_grid)
    nearest = NEAREST(jnp.asarray(volume), jnp_grid, fill=7)
    np.testing.assert_allclose(cubic, at(order=3, cval=0.0), atol=2e-5)
    np.testing.assert_array_equal(nearest, at(order=0, cval=7.0).astype(np.float32))


@quick_jit
def label_both_ways(label, angles, scales):
    grid = spatial.sampling_grid(fork.affine_matrix(angles, scales), label.shape, (8, 8, 8))
    by_corner = fork.resample_label_linear(label, grid)
    by_list = fork.resample_label_linear(label, grid, label_ids=tuple(range(-1, 8)))
    return by_corner, by_list, grid


@settings(max_examples=10, deadline=None)
@given(
    ids=st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True),
    angles=st.tuples(*[st.floats(-3, 3, width=32)] * 3),
    scales=st.tuples(*[st.floats(0.5, 1.5, width=32)] * 3),
    seed=st.integers(0, 100),
)
def test_label_values_are_never_invented(ids, angles, scales, seed):
    label = np.random.default_rng(seed).choice(ids, size=(9, 8, 10)).astype(np.int16)
    by_corner, by_list, grid = label_both_ways(label, jnp.asarray(angles), jnp.asarray(scales))
    assert set(np.unique(by_corner)) <= {-1, *ids}
    np.testing.assert_array_equal(by_corner, by_list)
    outside = np.zeros(by_corner.shape, bool)
    for position, size in zip(grid, label.shape, strict=True):
        outside |= (np.asarray(position) < 0) | (np.asarray(position) > size - 1)
    np.testing.assert_array_equal(by_corner == -1, outside)


def test_identity_parameters_return_the_input():
    rng = np.random.default_rng(1)
    volume = jnp.asarray(rng.standard_normal((9, 8, 15)), jnp.float32)
    label = jnp.asarray(rng.integers(-1, 3, volume.shape), jnp.int8)
    draw = spatial.SpatialDraw(jnp.asarray(True), jnp.zeros(3), jnp.ones(3))
    how = fork.resampling("cubic", "linear")
    run = quick_jit(partial(spatial.apply_spatial, patch_size=volume.shape, how=how))
    (image,), result = run((volume,), label, draw)
    # 5e-6, twice: rounding of the spline's coefficients
    np.testing.assert_allclose(image, volume, atol=5e-6)
    np.testing.assert_allclose(LOW_RESOLUTION(volume, jnp.ones(3)), volume, atol=5e-6)
    np.testing.assert_array_equal(result, label)
    np.testing.assert_allclose(INVERTED_GAMMA(volume, jnp.float32(1)), volume, atol=2e-6)
    np.testing.assert_array_equal(SHARPEN(volume, jnp.float32(0)), volume)
    np.testing.assert_array_equal(BLUR(volume, 0.05 * jnp.ones(3)), volume)


@pytest.mark.parametrize("size", [5, 24, 45])
def test_low_resolution_is_down_and_up_sampling(size):
    signal = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    scales = np.linspace(0.25, 1, 7, dtype=np.float32)[:, None]
    many = quick_jit(jax.vmap(LOWER.apply, (None, 0)))(jnp.asarray(signal), scales)
    for scale, ours in zip(scales[:, 0], many, strict=True):
        low_size = round(size * float(scale))
        small = axis_operator(size, low_size, "spline0") @ signal
        expected = axis_operator(low_size, size, "spline3") @ small
        # 1e-5: float32
        np.testing.assert_allclose(ours, expected.clip(small.min(), small.max()), atol=1e-5)


# --- laws ---


def position(policy, kind):
    return [isinstance(transform, kind) for transform in policy.transforms].index(True)


@pytest.fixture(scope="module")
def draws():
    """Many samples of one channel pair, two samples a batch."""
    spec, geometry = recipes.find_policy("da5_fork"), policies.patch_geometry("da5_fork", (30,) * 3)

    def sample(keys):
        key, batch_key = keys
        drawn = policies.sample_draws(key, 2, spec, geometry, batch_key=batch_key)
        noise = position(spec, intensity.Noise)
        steps = list(drawn.transforms)
        steps[noise] = steps[noise]._replace(value=steps[noise].value.sigma)
        return drawn._replace(transforms=tuple(steps))

    keys = jax.random.split(jax.random.key(5), NUM_DRAWS)
    batch_keys = jnp.repeat(jax.random.split(jax.random.key(6), NUM_DRAWS // 2), 2)
    drawn = quick_jit(partial(jax.lax.map, sample))((keys, batch_keys))
    return spec, jax.tree.map(np.asarray, drawn)


def assert_frequency(ours, expected, name, *, count=NUM_DRAWS):
    # spec 04 §8: 4.5 standard deviations
    margin = 4.5 * np.sqrt(expected * (1 - expected) / count)
    assert abs(ours.mean() - expected) <= margin, (name, ours.mean(), expected)


def test_spatial_law(draws):
    _, drawn = draws
    warp = drawn.warp
    assert_frequency(warp.resample, 0.52, "resample")
    for axis in range(3):
        assert_frequency(warp.angles[:, axis] != 0, 0.4 * 0.5, "angle")
        assert_frequency(warp.scales[:, axis] != 1, 0.2, "scale")
    scales = warp.scales[(warp.scales != 1).all(axis=1)]
    assert scales.min() >= 0.7 and scales.max() <= 1.43
    # two-sided: half of the mass below 1, uniform on either side; axes independent
    assert_frequency(scales < 1, 0.5, "small", count=scales.size)
    assert scales[scales < 1].mean() == pytest.approx(0.85, abs=0.005)
    assert scales[scales > 1].mean() == pytest.approx(1.215, abs=0.01)
    assert np.abs(np.corrcoef(scales.T)[np.triu_indices(3, 1)]).max() < 0.08
    angles = warp.angles[warp.angles != 0]
    # uniform on +-pi/6: mean 0, deviation pi/6/sqrt(3)
    assert angles.mean() == pytest.approx(0, abs=0.01)
    assert angles.std() == pytest.approx(np.pi / 6 / np.sqrt(3), rel=0.02)


def label(transform):
    if isinstance(transform, intensity.Contrast):
        return "clipped" if transform.clip else "unclipped"
    if isinstance(transform, fork.Gamma):
        assert transform.invert
    return f"{type(transform).__module__.rpartition('.')[2]}.{type(transform).__name__}"


def test_gates_and_choices(draws):
    spec, drawn = draws
    expected = {  # spec 04 §4: gate of a sample (alternatives: half of it), of a channel
        "local.Median": (0.1, 0.5),
        "fork.Blur": (0.1, 0.5),
        "intensity.Noise": (0.1, 1.0),
        "intensity.BrightnessShift": (0.1, 0.5),
        "clipped": (0.1, 0.5),
        "unclipped": (0.1, 0.5),
        "fork.LowResolution": (0.15, 0.5),
        "fork.Gamma": (0.1, 1.0),
        "fork.BlankRectangles": (0.4, 0.5),
        "local.Gradient": (0.3, 0.5),
        "local.LocalGamma": (0.3, 0.5),
        "fork.Sharpen": (0.2, 0.5),
    }
    assert set(map(label, spec.transforms)) == set(expected)
    gates = {}
    for transform, draw in zip(spec.transforms, drawn.transforms, strict=True):
        kind = label(transform)
        p_sample, p_channel = expected[kind]
        # a choice of the batch makes two samples dependent: at worst half as many draws
        assert_frequency(draw.gate[:, 0], p_sample * p_channel, kind, count=NUM_DRAWS / 2)
        both = draw.gate.all(axis=1)
        assert_frequency(both, p_sample * p_channel**2, kind, count=NUM_DRAWS / 2)
        gates[kind] = draw.gate.any(axis=1)
    for first, second in (("local.Median", "fork.Blur"), ("clipped", "unclipped")):
        of_batch = [gates[kind].reshape(-1, 2).any(axis=1) for kind in (first, second)]
        assert not (of_batch[0] & of_batch[1]).any()  # one choice for all samples of a batch
        assert of_batch[0].any() and of_batch[1].any()
    # the two choices of a batch are independent of each other: all four pairs occur
    for first in ("local.Median", "fork.Blur"):
        for second in ("clipped", "unclipped"):
            assert (gates[first] & gates[second]).any()


def test_rectangle_law(draws):
    spec, drawn = draws
    boxes = drawn.transforms[position(spec, fork.BlankRectangles)].value
    np.testing.assert_array_equal(np.unique(boxes.count), [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(np.unique(boxes.size), np.arange(3, 11))
    assert boxes.count.mean() == pytest.approx(3, abs=0.05)
    assert boxes.size.mean() == pytest.approx(6.5, abs=0.02)
    assert boxes.lower.min() == 1 and (boxes.lower + boxes.size).max() == 30
    # uniform on [1, n - size]
    share = (boxes.lower - 1 + 0.5) / (30 - boxes.size)
    assert share.mean() == pytest.approx(0.5, abs=0.005)
    volume = jnp.arange(1000.0).reshape(10, 10, 10)
    one = local.Rectangles(jnp.int32(5), jnp.ones((5, 3), int), jnp.full((5, 3), 2))
    blanked = quick_jit(fork.BlankRectangles().apply)(volume, one)
    assert np.unique(blanked[1:3, 1:3, 1:3]).size == 1 and (blanked != volume).sum() == 8


def test_policies_differ_in_interpolation_only():
    fork_specs = {
        "da5_fork": ("cubic", "linear"),
        "da5_fork_ord0": ("nearest", "nearest"),
        "da5_fork_seg_ord0": ("cubic", "nearest"),
    }
    specs = {name: recipes.find_policy(name) for name in fork_specs}
    for name, kinds in fork_specs.items():
        warp = specs[name].warp
        assert (warp.image_interpolation, warp.label_interpolation) == kinds
        assert specs[name].transforms == specs["da5_fork"].transforms
    with pytest.raises(ValueError, match="seg_pad_label 0"):
        specs["da5_fork"].warp.resampling(pad_label=0)
    with pytest.raises(ValueError, match="'linear' of the image"):
        fork.resampling("linear", "linear")
    with pytest.raises(ValueError, match="'cubic'"):
        spatial.resampling("cubic", "linear")


def test_crop_is_the_reference_one():
    # run of batchgenerators 0.25.5: first voxel by input and patch size
    starts = {(10, 7): 1, (9, 4): 2, (10, 4): 3, (9, 7): 1, (7, 10): -2, (6, 9): -2}
    for sizes, start in starts.items():
        assert fork.crop_start(*sizes) == start
