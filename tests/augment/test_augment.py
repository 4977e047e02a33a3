import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from panther_jax.augment import intensity, local, policies, spatial
from panther_jax.devices.mesh import AXES
from panther_jax.training import step

RESAMPLED_SEED = 23  # draws a rotation, blur and contrast
# Compiling takes most of the time of these tests, running next to none.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BLUR = quick_jit(intensity.Blur(sigma_range=(0.5, 1.6)).apply)  # a window of 5 voxels either side
CONTRAST = quick_jit(intensity.Contrast(factor_range=(0.5, 2.0)).apply)
UNCLIPPED = quick_jit(intensity.Contrast(factor_range=(0.5, 2.0), clip=False).apply)
GAMMA = quick_jit(intensity.Gamma(gamma_range=(0.7, 1.5)).apply)
INVERTED_GAMMA = quick_jit(intensity.Gamma(gamma_range=(0.7, 1.5), invert=True).apply)
LOW_RESOLUTION = quick_jit(intensity.LowResolution(scale_range=(0.25, 1.0)).apply)
LOW_RESOLUTION_SIZE = quick_jit(intensity.low_resolution_size, static_argnums=0)
BRIGHTNESS = intensity.Brightness(factor_range=(0.75, 1.25))
SHIFT = intensity.BrightnessShift(sigma=0.5)
GRADIENT = local.Gradient(amount_ranges=((-5.0, -1.0), (1.0, 5.0)))
LOCAL_GAMMA = local.LocalGamma(amount_ranges=((0.01, 0.8), (1.5, 4.0)))
SHARPEN = local.Sharpen(strength_range=(0.1, 1.0))
AFFINE_MATRIX = quick_jit(spatial.affine_matrix)
MIRROR = quick_jit(spatial.apply_mirror)
MEDIAN = quick_jit(local.Median().apply)
RECTANGLES = quick_jit(local.BlankRectangles().apply)
ORIENT = quick_jit(spatial.apply_orientation)


def golden_folder(golden):
    return golden / "augmentation"


def load(golden, name):
    folder = golden_folder(golden)
    index = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as arrays:
        return index, dict(arrays)


def error_to(case, reference, arrays, result):
    """Largest difference to a golden result, channel first, stored whole or at probe indices."""
    result = np.asarray(result, np.float64)
    assert list(result.shape) == case["shape"]
    if case["storage"] == "full":
        return np.abs(result - reference).max()
    stats = case["stats"]
    assert result.mean() == pytest.approx(stats["mean"], abs=1e-4)
    assert np.sqrt((result**2).sum()) == pytest.approx(stats["l2"], rel=1e-4)
    return np.abs(result.reshape(-1)[arrays[case["probe"]]] - reference).max()


# --- golden: spatial ---


def run_spatial_case(params, arrays):
    """Image and label of a golden spatial case, channel first."""
    num_axes = len(params["patch"])
    is_2d = num_axes == 2
    image = jnp.asarray(arrays["image_2d" if is_2d else "image"])
    label = jnp.asarray(arrays["seg_2d" if is_2d else "seg"])
    patch = (image.shape[1:2] if is_2d else ()) + tuple(params["patch"])
    offsets, pad_label = None, params.get("pad", -1)
    modes = [params.get(name, "linear") for name in ("mode_image", "mode_seg")]
    modes = ["linear" if mode == "bilinear" else mode for mode in modes]
    if "elastic" in params:
        elastic = params["elastic"]
        offsets = spatial.elastic_offsets(
            jnp.asarray(arrays["elastic_white_noise"]),
            jnp.asarray(elastic["scale"]),
            jnp.asarray(elastic["magnitude"]),
        )
        # README: 1e-5
        np.testing.assert_allclose(offsets, arrays["elastic_offsets"], atol=1e-5)
    draw = spatial.SpatialDraw(
        jnp.asarray(params["affine"] is not None),
        jnp.asarray(params.get("angles", [0.0] * num_axes), jnp.float32),
        jnp.asarray(params.get("scales", [1.0] * num_axes), jnp.float32),
    )

    @quick_jit
    def run(volumes, label):
        return spatial.apply_spatial(
            volumes,
            label,
            draw,
            patch_size=patch,
            how=spatial.resampling(*modes, pad_label=pad_label),
            dummy_2d=is_2d,
            pad_label=pad_label,
            offsets=offsets,
        )

    volumes, result = run(tuple(image), label[0])
    return np.stack(volumes), np.asarray(result)[None], image.shape[1:], patch


def label_tolerance(params, input_size, patch_size):
    """Share of voxels that may differ: more where half-voxel positions tie (spec 04 §6.3)."""
    if params["affine"] is None:
        return 0.0
    offset = len(patch_size) - len(params["affine"])
    for axis, row in enumerate(np.asarray(params["affine"])):
        parity = (input_size[axis + offset] - patch_size[axis + offset]) % 2
        if parity and np.allclose(np.abs(row), np.eye(len(row))[axis]):
            return 1e-2
    return 1e-3


@pytest.mark.golden
def test_spatial_cases(golden):
    index, arrays = load(golden, "spatial")
    names = [name.removesuffix("_image") for name in index if name.endswith("_image")]
    assert names
    for name in names:
        case = index[f"{name}_image"]
        params = case["params"]
        volumes, label, input_size, patch = run_spatial_case(params, arrays)
        if params["affine"] is not None:
            num_axes = len(params["affine"])
            matrix = AFFINE_MATRIX(
                jnp.asarray(params.get("angles", [0.0] * num_axes)),
                jnp.asarray(params.get("scales", [1.0] * num_axes)),
            )
            # float32 sine and cosine
            np.testing.assert_allclose(matrix, params["affine"], atol=1e-6)
        is_nearest = params.get("mode_image") == "nearest"
        if is_nearest:  # README: at most 1e-3 of the voxels differ
            probe = case.get("probe")
            ours = volumes.reshape(-1)[arrays[probe]] if probe else volumes
            assert (np.abs(ours - arrays[f"{name}_image"]) > 1e-4).mean() <= 1e-3, name
        else:  # README: 1e-4, crops exact
            error = error_to(case, arrays[f"{name}_image"], arrays, volumes)
            assert error <= (0 if params["affine"] is None else 1e-4), name
        mismatch = (label != arrays[f"{name}_seg"]).mean()
        assert mismatch <= label_tolerance(params, input_size, patch), name


# --- golden: intensity ---


def intensity_result(params, channel, volume, arrays):
    """Our result for one channel of a golden case, and its tolerance (README)."""
    if "sigmas" in params:
        return BLUR(volume, jnp.asarray(params["sigmas"][channel])), 1e-5
    if "multipliers" in params:
        factor = jnp.float32(params["multipliers"][channel])
        if "preserve_range" in params:
            contrast = CONTRAST if params["preserve_range"] else UNCLIPPED
            return contrast(volume, factor), 1e-5
        return BRIGHTNESS.apply(volume, factor), 1e-5
    if "shift" in params:
        return SHIFT.apply(volume, jnp.float32(params["shift"][channel])), 1e-5
    if "low_shape" in params:
        scales = jnp.asarray(params["scales"][channel], jnp.float32)
        sizes = map(LOW_RESOLUTION_SIZE, volume.shape, scales)
        assert [int(size) for size in sizes] == params["low_shape"]
        return LOW_RESOLUTION(volume, scales), 1e-5
    if "invert" in params:
        gamma = jnp.float32(params["gamma"][channel])
        return (INVERTED_GAMMA if params["invert"] else GAMMA)(volume, gamma), 2e-5
    if "sigma" in params:
        noise = jnp.asarray(arrays["noise_eps"][channel])
        return intensity.add_noise(volume, jnp.float32(params["sigma"]), noise), 1e-5
    return local_result(params, volume)


def local_result(params, volume):
    if "size" in params:
        return MEDIAN(volume, jnp.int32(params["size"])), 0.0
    if "rectangles" in params:
        lower, upper = np.moveaxis(np.asarray(params["rectangles"]), 1, 0)
        boxes = local.Rectangles(
            jnp.int32(len(lower)), jnp.asarray(lower), jnp.asarray(upper - lower)
        )
        return RECTANGLES(volume, boxes), 1e-5
    if "loc" not in params:
        return SHARPEN.apply(volume, jnp.float32(params["strength"])), 1e-5
    amount = params.get("strength", params.get("gamma", 0.0))
    window = local.Window(
        jnp.asarray(params["loc"]), jnp.asarray(params["scale"]), jnp.float32(amount)
    )
    if "strength" in params:
        return GRADIENT.apply(volume, window), 2e-5
    if "gamma" in params:
        return LOCAL_GAMMA.apply(volume, window), 2e-5
    return local.window_weights(window.centre, window.width, volume.shape), 1e-4


@pytest.mark.golden
def test_intensity_cases(golden):
    index, arrays = load(golden, "intensity")
    assert index
    for name, case in index.items():
        # Where the case takes a corner of the image, its shape says which.
        image = jnp.asarray(arrays["image"])[tuple(slice(size) for size in case["shape"])]
        results = [
            intensity_result(case["params"], channel, volume, arrays)
            for channel, volume in enumerate(image)
        ]
        error = error_to(case, arrays[name], arrays, np.stack([value for value, _ in results]))
        assert error <= results[0][1], (name, error)


# --- golden: discrete ---


@pytest.mark.golden
def test_discrete_cases(golden):
    index, arrays = load(golden, "discrete")
    done = 0
    for name, case in index.items():
        params = case["params"]
        label, tiny = jnp.asarray(arrays["seg"]), jnp.asarray(arrays["tiny"])
        ndim = tiny.ndim - 1
        if "spatial_axes" in params:
            plane = jnp.asarray(params["spatial_axes"])
            turn = spatial.rot90_orientation(jnp.int32(params["k"]), plane, ndim)
            result = [ORIENT(channel, turn) for channel in tiny]
        elif "axis_order" in params:  # the channel axis is counted
            order = jnp.asarray(params["axis_order"][1:]) - 1
            turn = spatial.Orientation(order, jnp.zeros(ndim, bool))
            result = [ORIENT(channel, turn) for channel in tiny]
        elif "axes" in params:
            flips = jnp.asarray(np.isin(np.arange(ndim), params["axes"]))
            result = [spatial.apply_mirror(channel, flips) for channel in tiny]
        elif "mask" in params:
            masked = spatial.apply_mask(jnp.ones(label.shape[1:]), label[0])
            result = [masked] * len(arrays[name])  # the mask is that of the first label channel
        elif "label" in params:
            augment = policies.make_augment("none", patch_size=label.shape[1:])
            image = jnp.zeros((*label.shape[1:], 1))
            result = [augment(jax.random.key(0), image, c[..., None])[1][..., 0] for c in label]
        else:
            continue
        np.testing.assert_array_equal(np.stack(result), arrays[name], err_msg=name)
        done += 1
    assert done


# --- properties ---


def make_sample(initial_patch_size, num_channels=1, seed=0):
    """A smooth image and a label of blobs with -1 outside."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((*initial_patch_size, num_channels)).astype(np.float32)
    slope = np.linspace(-1.4, 2.4, initial_patch_size[-1])[:, None]
    label = np.round(slope + 0.2 * rng.standard_normal((*initial_patch_size, 1))).clip(-1, 2)
    return jnp.asarray(image), jnp.asarray(label, jnp.int8)


@pytest.mark.parametrize(
    ("policy", "patch_size"),
    [("default", (4, 16, 14)), ("none", (12, 10, 8)), ("da5", (8, 10, 8))],
)
def test_labels_and_outside_mask(policy, patch_size):
    geometry = policies.patch_geometry(policy, patch_size)
    image, label = make_sample(geometry.initial_patch_size, num_channels=2)
    augment = policies.make_batch_augment(
        policy, patch_size=patch_size, mask_channels=(1,), label_ids=(0, 1, 2)
    )
    images, labels = jnp.stack([image] * 6), jnp.stack([label] * 6)
    images, labels = quick_jit(augment)(jax.random.key(3), images, labels)
    assert images.shape == (6, *patch_size, 2) and images.dtype == jnp.float32
    assert labels.shape == (6, *patch_size, 1) and labels.dtype == label.dtype
    assert np.isfinite(images).all()
    assert set(np.unique(labels)) == {0, 1, 2}
    masked = np.asarray(images[..., 1]) == 0
    assert (np.asarray(labels[..., 0])[masked] == 0).mean() > 0.99
    # The mask hides a real part of every patch, in the flagged channel only.
    assert 0.05 < masked.mean() < 0.6 and (np.asarray(images[..., 0]) == 0).mean() < 0.05


@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True),
    angles=st.tuples(*[st.floats(-3, 3, width=32)] * 3),
    scales=st.tuples(*[st.floats(0.5, 1.5, width=32)] * 3),
    seed=st.integers(0, 100),
)
def test_label_values_are_never_invented(ids, angles, scales, seed):
    rng = np.random.default_rng(seed)
    label = jnp.asarray(rng.choice([-1, *ids], size=(9, 8, 10)), jnp.int16)
    by_corner, by_list = resample_both_ways(label, jnp.asarray(angles), jnp.asarray(scales))
    assert set(np.unique(by_corner)) <= {-1, *ids}
    np.testing.assert_array_equal(by_corner, by_list)


@quick_jit
def resample_both_ways(label, angles, scales):
    matrix = spatial.affine_matrix(angles, scales)
    grid = spatial.sampling_grid(matrix, label.shape, (8, 8, 8))
    by_corner = spatial.resample_label_linear(label, grid)
    return by_corner, spatial.resample_label_linear(label, grid, label_ids=tuple(range(12)))


def test_identity_parameters_return_the_input():
    rng = np.random.default_rng(1)
    volume = jnp.asarray(rng.standard_normal((9, 8, 7)), jnp.float32)
    label = jnp.asarray(rng.integers(-1, 3, volume.shape), jnp.int8)
    identity = spatial.SpatialDraw(jnp.asarray(True), jnp.zeros(3), jnp.ones(3))
    how = spatial.resampling("linear", "linear")
    resample = quick_jit(partial(spatial.apply_spatial, patch_size=volume.shape, how=how))
    (image,), result = resample((volume,), label, identity)
    np.testing.assert_array_equal(image, volume)
    np.testing.assert_array_equal(result, label)
    one, ones = jnp.float32(1), jnp.ones(3)
    np.testing.assert_array_equal(LOW_RESOLUTION(volume, ones), volume)
    np.testing.assert_array_equal(BLUR(volume, 0.05 * ones), volume)
    np.testing.assert_array_equal(BRIGHTNESS.apply(volume, one), volume)
    np.testing.assert_array_equal(intensity.add_noise(volume, 0 * one, volume), volume)
    # 1e-6: rounding of the detour over the mean
    np.testing.assert_allclose(CONTRAST(volume, one), volume, atol=1e-6)
    np.testing.assert_allclose(GAMMA(volume, one), volume, atol=2e-6)


def test_blur_window_does_not_matter_beyond_its_radius():
    volume = jnp.asarray(np.random.default_rng(2).standard_normal((12, 9, 8)), jnp.float32)
    for sigma in (0.5, 0.9, 1.0):
        tight_blur = intensity.Blur(sigma_range=(0.5, sigma))
        assert tight_blur.max_radius < 5
        sigmas = jnp.full(3, sigma)
        tight, wide = quick_jit(tight_blur.apply)(volume, sigmas), BLUR(volume, sigmas)
        np.testing.assert_allclose(tight, wide, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7, 9), (6, 11)])
def test_median_equals_a_rank_filter(shape):
    volume = np.random.default_rng(3).normal(size=shape).astype(np.float32).round(1)
    every = quick_jit(lambda v: [local.median_filter(v, size) for size in local.MEDIAN_SIZES])
    for size, ours in zip(local.MEDIAN_SIZES, every(jnp.asarray(volume)), strict=True):
        rank = size ** len(shape) // 2
        expected = ndimage.rank_filter(volume, rank, size, mode="reflect")
        np.testing.assert_array_equal(ours, expected)


PATCH_2D = (8, 9)


@cache
def default_2d():
    """The compiled default of one sample and of a batch, and a sample."""
    sample = make_sample(policies.patch_geometry("default", PATCH_2D).initial_patch_size)
    one = policies.make_augment("default", patch_size=PATCH_2D)
    batch = policies.make_batch_augment("default", patch_size=PATCH_2D)
    return quick_jit(one), quick_jit(batch), sample


def assert_same_sample(ours, expected):
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-4)  # order of float32 operations
    assert (ours[1] != expected[1]).mean() <= 2e-3  # near-ties of label scores


def test_same_key_same_result_jitted_or_not():
    compiled, _, (image, label) = default_2d()
    spec = policies.find_policy("default")
    geometry = policies.patch_geometry("default", PATCH_2D)
    key = jax.random.key(RESAMPLED_SEED)
    draws = quick_jit(lambda key: policies.sample_draws(key, 1, spec, geometry))(key)
    with jax.disable_jit():
        plain = policies.apply_draws(image, label, draws, spec=spec, geometry=geometry)
    expected = compiled(key, image, label)
    assert_same_sample((plain[0], plain[1].clip(0)), expected)


def test_batch_uses_one_key_a_position():
    compiled, batch, (image, label) = default_2d()
    images, labels = jnp.stack([image] * 6), jnp.stack([label] * 6)
    key, offset = jax.random.key(5), 2
    result = batch(key, images, labels, offset)
    for position, ours in enumerate(zip(*result, strict=True)):
        one_key = jax.random.fold_in(key, position + offset)
        assert_same_sample(ours, compiled(one_key, image, label))
    assert len(np.unique(np.asarray(result[0]).reshape(6, -1), axis=0)) == 6
    batch(jax.random.key(6), images, labels, offset + 4)
    assert batch._cache_size() == 1


@pytest.mark.parametrize("policy", ["default", "da5_fork"])
def test_same_key_same_result_on_one_or_eight_devices(policy):
    assert jax.device_count() == 8
    rng = np.random.default_rng(4)
    shape = (8, *policies.patch_geometry(policy, PATCH_2D).initial_patch_size, 1)
    images = rng.standard_normal(shape).astype(np.float32)
    labels = rng.integers(-1, 3, shape).astype(np.int8)
    augment = policies.make_batch_augment(policy, patch_size=PATCH_2D, label_ids=(0, 1, 2))
    results = []
    for mesh_shape in ((1, 1), (8, 1), (2, 4)):  # a patch that is split is augmented whole
        count = mesh_shape[0] * mesh_shape[1]
        chosen = np.array(jax.devices()[:count]).reshape(mesh_shape)
        mesh = jax.sharding.Mesh(chosen, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
        share = jax.NamedSharding(mesh, jax.P("data"))
        shared = quick_jit(step._shared_out(augment, mesh))
        placed = jax.device_put((images, labels), share)
        results.append(shared(jax.random.key(9), *placed))
    assert [len(image.sharding.device_set) for image, _ in results] == [1, 8, 8]
    (one_image, one_label), *others = jax.device_get(results)
    for image, label in others:
        # 1e-5: one sample a device is compiled otherwise than a loop, sums are in another order
        np.testing.assert_allclose(image, one_image, atol=1e-5)
        assert (label != one_label).mean() <= 2e-3  # near-ties of label scores
        assert np.isfinite(image).all() and set(np.unique(label)) == {0, 1, 2}


def test_vmapped_batch_equals_mapped_batch():
    _, batch, sample = default_2d()
    images, labels = (jnp.stack([array] * 6) for array in sample)
    vmapped = policies.make_batch_augment("default", patch_size=PATCH_2D, mapping="vmap")
    key = jax.random.key(7)
    expected = batch(key, images, labels, 0)
    assert_same_sample(quick_jit(vmapped)(key, images, labels, 0), expected)


def test_mirror_is_an_involution_and_moves_voxels():
    volume = jnp.arange(24).reshape(2, 3, 4)
    for flips in np.ndindex(2, 2, 2):
        flipped = MIRROR(volume, jnp.asarray(flips, bool))
        np.testing.assert_array_equal(flipped, np.flip(volume, np.flatnonzero(flips)))
        np.testing.assert_array_equal(MIRROR(flipped, jnp.asarray(flips, bool)), volume)


def test_low_resolution_size_is_exact():
    scales = np.random.default_rng(0).uniform(0.25, 1, 200).astype(np.float32)
    scales = np.concatenate([scales, np.float32([0.25, 0.5, 0.75, 1])])
    near_half = [np.nextafter(np.float32((k + 0.5) / 10), np.float32(0)) for k in range(3, 9)]
    for size in (5, 10, 96, 229):
        of_all = quick_jit(jax.vmap(lambda scale, n=size: intensity.low_resolution_size(n, scale)))
        candidates = np.concatenate([scales, near_half])
        expected = [round(size * float(scale)) for scale in candidates]
        np.testing.assert_array_equal(of_all(candidates), expected)
