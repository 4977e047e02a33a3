"""Transforms as a user writes them: one class and a policy, in a config file of the user's own."""

import dataclasses
from dataclasses import dataclass
from functools import cache, partial

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panther_jax import config
from panther_jax.augment import fork, intensity, local, policies, recipes, spatial
from panther_jax.augment.transform import Draw, Transform, between

# Compiling takes most of the time of these tests, running next to none.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PATCH, PATCH_2D = (8, 10, 9), (8, 9)
CONFIG = '''
"""Launch: see the test."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from panther_jax.augment.transform import Draw, Transform, between
from panther_jax.config import POLICIES, AugmentConfig, DataConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Wave(Transform):
    """A wave along the last axis."""

    amplitude_range: tuple[float, float]

    def sample(self, key, num_channels, patch):
        gates, uniform = self.gated(key, num_channels, 2)
        return Draw(gates, (between(uniform[:, 0], self.amplitude_range), 6.28 * uniform[:, 1]))

    def apply(self, volume, value):
        amplitude, phase = value
        return volume + amplitude * jnp.sin(jnp.arange(volume.shape[-1]) + phase)


@POLICIES.add("waves")
def waves():
    from panther_jax.augment.recipes import find_policy

    default = find_policy("default")
    wave = Wave(gate=(0.0, 1.0), amplitude_range=(0.5, 1.0))
    return dataclasses.replace(default, transforms=(*default.transforms, wave))


def get_config():
    return TrainConfig(DataConfig(dataset="Dataset001_Mine"), AugmentConfig(policy="waves"))
'''


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """Start without policies of other tests and leave none behind."""
    monkeypatch.setattr(config.POLICIES, "_added", {})


def load_waves(tmp_path):
    (tmp_path / "waves.py").write_text(CONFIG)
    return config.load_config(str(tmp_path / "waves.py"))[0]


def make_batch(policy, num_channels=2, count=3, patch_size=PATCH):
    shape = (count, *policies.patch_geometry(policy, patch_size).initial_patch_size)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((*shape, num_channels)), jnp.float32)
    return images, jnp.asarray(rng.integers(-1, 3, (*shape, 1)), jnp.int8)


def test_a_config_file_brings_a_transform_and_a_policy(tmp_path):
    settings = load_waves(tmp_path)
    assert load_waves(tmp_path) == settings  # the file may be read again
    name = settings.augment.policy
    geometry = policies.patch_geometry(name, PATCH_2D)
    assert geometry == policies.patch_geometry("default", PATCH_2D)
    images, labels = make_batch(name, patch_size=PATCH_2D)
    results = {}
    for mapping in ("map", "vmap"):
        augment = policies.make_batch_augment(
            name, patch_size=PATCH_2D, label_ids=(0, 1, 2), mapping=mapping
        )
        results[mapping] = quick_jit(augment)(jax.random.key(1), images, labels)
    default = policies.make_batch_augment("default", patch_size=PATCH_2D, label_ids=(0, 1, 2))
    plain = quick_jit(default)(jax.random.key(1), images, labels)
    image, label = results["map"]
    assert image.shape == (3, *PATCH_2D, 2) and image.dtype == jnp.float32
    np.testing.assert_allclose(results["vmap"][0], image, atol=1e-5)  # order of operations
    np.testing.assert_array_equal(results["vmap"][1], label)
    # The wave alone is between the two: all other streams stay as they were.
    np.testing.assert_array_equal(label, plain[1])
    wave = np.asarray(image - plain[0])
    np.testing.assert_allclose(wave, np.broadcast_to(wave[:, :1], wave.shape), atol=1e-5)
    amplitudes = np.abs(wave).max(axis=(1, 2))
    assert ((0.45 < amplitudes) & (amplitudes <= 1.0)).all() and np.unique(amplitudes).size == 6
    one = policies.make_augment(name, patch_size=PATCH_2D, label_ids=(0, 1, 2))
    alone = quick_jit(one)(jax.random.fold_in(jax.random.key(1), 2), images[2], labels[2])
    np.testing.assert_allclose(alone[0], image[2], atol=1e-5)


def test_a_policy_survives_json_and_the_command_line(tmp_path):
    settings = load_waves(tmp_path)
    assert config.TrainConfig.from_json(settings.to_json()) == settings
    default = config.TrainConfig(config.DataConfig(dataset="Dataset001_Mine"))
    changed = config.apply_overrides(default, ["--augment.policy", "waves"], prog="train")
    assert changed.augment == settings.augment


def test_an_unknown_policy_is_refused_with_the_known_ones(tmp_path):
    message = r"unknown augmentation policy 'waves'; known are default, .*da5_fork_seg_ord0\. Add"
    for refused in (
        lambda: config.AugmentConfig(policy="waves"),
        lambda: policies.patch_geometry("waves", PATCH),
        lambda: policies.make_augment("waves", patch_size=PATCH),
        lambda: policies.make_batch_augment("waves", patch_size=PATCH),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    load_waves(tmp_path)
    with pytest.raises(
        config.ConfigError, match=r"'wave'; known are default, .*, waves; did you mean waves\? Add"
    ):
        config.AugmentConfig(policy="wave")


def test_names_of_config_and_recipes_agree():
    assert config.POLICIES.names == tuple(recipes.BUILT_IN)


def test_a_policy_must_be_one():
    config.POLICIES.add("nothing")(lambda: None)
    with pytest.raises(ValueError, match="'nothing'.*returned NoneType, expected.*Policy"):
        recipes.find_policy("nothing")


@dataclass(frozen=True, kw_only=True)
class Cut(Transform):
    """Wrong: the shape changes."""

    def sample(self, key, num_channels, patch):
        return Draw(*self.gated(key, num_channels, 1))

    def apply(self, volume, value):
        return volume[1:]


def test_a_transform_that_changes_the_shape_is_named():
    config.POLICIES.add("cut")(lambda: recipes.Policy(transforms=(Cut(),)))
    augment = policies.make_batch_augment("cut", patch_size=PATCH)
    with pytest.raises(ValueError, match=r"Cut.apply returned float32\(7, 10, 9\).*\(8, 10, 9\)"):
        jax.eval_shape(augment, jax.random.key(0), *make_batch("default"))


@pytest.mark.parametrize("wrong", [{"gate": (0.2, 0.1)}, {"gate": (0.0, 1.5)}, {"p_channel": -0.1}])
def test_a_chance_is_a_probability(wrong):
    with pytest.raises(ValueError, match=rf"Median: {next(iter(wrong))}"):
        local.Median(**wrong)


def test_without_a_warp_the_patch_is_cut_and_the_rest_happens():
    shift = intensity.BrightnessShift(sigma=1.0)
    policy = recipes.Policy(warp=None, mirror=spatial.Mirror(max_axes=1), transforms=(shift,))
    config.POLICIES.add("shifted")(lambda: policy)
    geometry = policies.patch_geometry("shifted", PATCH)
    assert geometry.initial_patch_size == PATCH and geometry.mirror_axes == (0,)
    images, labels = make_batch("shifted", count=8)
    augment = policies.make_batch_augment("shifted", patch_size=PATCH)
    results, moved = quick_jit(augment)(jax.random.key(2), images, labels)
    flipped, shifts = 0, []
    for image, label, ours, our_label in zip(images, labels, results, moved, strict=True):
        is_flipped = bool((our_label != label.clip(0)).any())
        expected = image[::-1] if is_flipped else image
        np.testing.assert_array_equal(our_label, (label[::-1] if is_flipped else label).clip(0))
        by = np.asarray(ours - expected).reshape(-1, 2)
        np.testing.assert_allclose(by, np.broadcast_to(by[:1], by.shape), atol=1e-5)
        shifts.append(by[0])
        flipped += is_flipped
    assert 0 < flipped < 8 and np.unique(shifts).size == 16 and 0.5 < np.std(shifts) < 1.5


# --- every transform ---


@cache
def patch_of(policy):
    return policies.patch_geometry(policy, PATCH)


ALL = {
    f"{policy}-{position}-{type(transform).__name__}": (policy, transform)
    for policy in ("default", "da5", "da5_fork")
    for position, transform in enumerate(recipes.BUILT_IN[policy].transforms)
}
IDENTITY = {
    intensity.Noise: intensity.NoiseValue(jnp.float32(0), jax.random.key(0)),
    intensity.Blur: jnp.full(3, 0.05),
    intensity.Brightness: jnp.float32(1),
    intensity.BrightnessShift: jnp.float32(0),
    intensity.Contrast: jnp.float32(1),
    intensity.LowResolution: jnp.ones(3),
    intensity.Gamma: jnp.float32(1),
    local.BlankRectangles: local.Rectangles(
        jnp.int32(0), jnp.zeros((5, 3), jnp.int32), jnp.ones((5, 3), jnp.int32)
    ),
    local.Gradient: local.Window(jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.float32(0)),
    local.LocalGamma: local.Window(jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.float32(1)),
    local.Sharpen: jnp.float32(0),
}


@pytest.mark.parametrize("name", ALL)
def test_nothing_happens_at_zero_strength(name):
    transform = ALL[name][1]
    kinds = [kind for kind in IDENTITY if isinstance(transform, kind)]
    if not kinds:
        assert isinstance(transform, local.Median)  # its smallest window is no identity
        return
    volume = jnp.asarray(np.random.default_rng(1).standard_normal(PATCH), jnp.float32)
    result = quick_jit(transform.apply)(volume, IDENTITY[kinds[0]])
    # 5e-6: rounding of the spline's coefficients, of a detour over mean or range
    np.testing.assert_allclose(result, volume, atol=5e-6)


@pytest.mark.parametrize("name", ALL)
def test_vmapped_equals_one_by_one_and_shapes_stay(name):
    policy, transform = ALL[name]
    patch = patch_of(policy)
    draw = quick_jit(partial(transform.sample, num_channels=3, patch=patch))(jax.random.key(4))
    assert draw.gate.shape == (3,) and draw.gate.dtype == bool
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(draw.value))
    volumes = jnp.asarray(np.random.default_rng(2).standard_normal((3, *PATCH)), jnp.float32)
    together = quick_jit(jax.vmap(transform.apply))(volumes, draw.value)
    one_by_one = quick_jit(partial(jax.lax.map, lambda pair: transform.apply(*pair)))(
        (volumes, draw.value)
    )
    assert together.shape == volumes.shape and together.dtype == volumes.dtype
    np.testing.assert_allclose(together, one_by_one, atol=1e-4)  # order of sums
    examples = dict(transform.examples(patch))
    assert examples
    for value in examples.values():  # as one channel's share of a draw
        expected = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), draw.value)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), value) == expected


def test_the_fork_inherits_the_laws_it_does_not_change():
    assert issubclass(fork.Blur, intensity.Blur) and fork.Blur.sample is intensity.Blur.sample
    of_da5 = [dataclasses.replace(t, batch_choice=None) for t in recipes.BUILT_IN["da5"].transforms]
    of_fork = recipes.BUILT_IN["da5_fork"].transforms
    for one, other in zip(of_da5, of_fork, strict=True):
        fields = dataclasses.asdict(one).keys() - {"gate", "is_alternative", "batch_choice"}
        assert isinstance(other, type(one))
        assert all(getattr(one, field) == getattr(other, field) for field in fields)
        low, high = one.gate
        # Chosen once a batch: given the choice, twice the joint probability.
        expected = 2 * (high - low) if other.batch_choice else high - low
        assert other.gate == pytest.approx((0.0, expected))


# --- dm_pix ---


def test_shift_and_gamma_are_those_of_dm_pix():
    rng = np.random.default_rng(5)
    volume = jnp.asarray(rng.uniform(size=(6, 5, 4)), jnp.float32)
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    shift = intensity.BrightnessShift(sigma=0.5)
    expected = pix.adjust_brightness(volume, 0.25)
    np.testing.assert_array_equal(shift.apply(volume, jnp.float32(0.25)), expected)
    np.testing.assert_array_equal(expected, volume + np.float32(0.25))
    gamma = intensity.Gamma(gamma_range=(0.7, 1.5))
    ours = np.asarray(gamma.apply(volume, jnp.float32(1.5)), np.float64)
    curved = np.asarray(pix.adjust_gamma(volume, 1.5), np.float64)
    np.testing.assert_allclose(curved, np.asarray(volume, np.float64) ** 1.5, atol=1e-6)
    assert np.corrcoef(ours.reshape(-1), curved.reshape(-1))[0, 1] == pytest.approx(1, abs=1e-6)
    assert ours.mean() == pytest.approx(float(volume.mean()), abs=1e-5)


@pytest.mark.parametrize("shape", [(7, 9), (6, 8, 5)])
def test_linear_resampling_equals_dm_pix_inside(shape):
    rng = np.random.default_rng(len(shape))
    volume = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    grid = tuple(jnp.asarray(rng.uniform(0, n - 1, (50, 3)), jnp.float32) for n in shape)
    expected = pix.flat_nd_linear_interpolate(volume, jnp.stack(grid))
    ours = quick_jit(spatial.resample_linear)(volume, grid)
    np.testing.assert_allclose(ours, expected, atol=2e-6)  # order of float32 operations


def test_between_reaches_both_ends():
    ends = between(jnp.asarray([0.0, 0.5, 1.0]), (2.0, 6.0))
    np.testing.assert_array_equal(ends, [2.0, 4.0, 6.0])
