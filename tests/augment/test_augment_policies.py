import dataclasses
import itertools
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panther_jax.augment import intensity, local, policies, recipes, spatial

PIPELINE_KINDS = {
    "GaussianNoiseTransform": intensity.Noise,
    "GaussianBlurTransform": intensity.Blur,
    "MultiplicativeBrightnessTransform": intensity.Brightness,
    "BrightnessAdditiveTransform": intensity.BrightnessShift,
    "ContrastTransform": intensity.Contrast,
    "SimulateLowResolutionTransform": intensity.LowResolution,
    "GammaTransform": intensity.Gamma,
    "MedianFilterTransform": local.Median,
    "BlankRectangleTransform": local.BlankRectangles,
    "BrightnessGradientAdditiveTransform": local.Gradient,
    "LocalGammaTransform": local.LocalGamma,
    "SharpeningTransform": local.Sharpen,
}
TRAINER_POLICY = {"default": "default", "DA5": "da5"}
NUM_DRAWS = 20_000
SHAPES = ((12, 10, 8), (4, 16, 14), (14, 12), (10, 10, 10))
# Compiling takes most of the time of these tests, running next to none.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def golden_folder(golden):
    return golden / "augmentation"


@pytest.mark.golden
def test_patch_geometry_tables(golden):
    for entry in json.loads((golden_folder(golden) / "patch_geometry.json").read_text()):
        policy = TRAINER_POLICY[entry["trainer"]]
        geometry = policies.patch_geometry(policy, tuple(entry["patch"]))
        assert list(geometry.initial_patch_size) == entry["initial_patch"]
        assert geometry.rotation_range_rad == pytest.approx(entry["rotation"], abs=1e-12)
        assert geometry.dummy_2d == entry["dummy_2d"]
        assert list(geometry.mirror_axes) == entry["mirror_axes"]
    for entry in json.loads((golden / "training" / "initial_patch_size.json").read_text()):
        geometry = policies.patch_geometry("default", tuple(entry["patch_size"]))
        assert list(geometry.initial_patch_size) == entry["initial_patch_size"]
        da5 = policies.patch_geometry("da5", geometry.patch_size)
        assert list(da5.initial_patch_size) == entry["initial_patch_size_DA5"]
        assert geometry.rotation_range_rad == pytest.approx(entry["rotation_rad"], abs=1e-12)
        assert geometry.dummy_2d == entry["dummy_2d"]
        assert list(geometry.mirror_axes) == entry["mirror_axes"]


def numbers_in(value):
    """A range given as a list, or as the text of a two-sided sampler."""
    if isinstance(value, str):
        value = re.findall(r"-?[\d.]+", value)
    return tuple(float(number) for number in value)


def golden_steps(pipeline):
    """Intensity steps of a golden pipeline: (transform, gate, arguments)."""
    for entry in pipeline:
        alternatives = entry.get("one_of", [entry])
        share, start = 1 / len(alternatives), 0.0
        for part in alternatives:
            gate = (start, start + part["p"] * share)
            start = gate[1]
            if part["name"] in PIPELINE_KINDS:
                yield part["name"], gate, part["args"]


@pytest.mark.golden
def test_pipelines_have_the_reference_numbers(golden):
    pipelines = json.loads((golden_folder(golden) / "pipelines.json").read_text())
    assert pipelines
    for name, pipeline in pipelines.items():
        trainer, patch = name.split("_")
        policy, patch_size = TRAINER_POLICY[trainer], tuple(map(int, patch.split("x")))
        spec = recipes.find_policy(policy)
        geometry = policies.patch_geometry(policy, patch_size)
        arguments = {entry["name"]: entry["args"] for entry in pipeline if "name" in entry}
        check_spatial_numbers(arguments["SpatialTransform"], spec, geometry)
        assert ("Convert3DTo2DTransform" in arguments) == geometry.dummy_2d
        assert tuple(arguments["MirrorTransform"]["allowed_axes"]) == geometry.mirror_axes
        reference = list(golden_steps(pipeline))
        assert len(reference) == len(spec.transforms)
        for step, (transform, gate, args) in zip(spec.transforms, reference, strict=True):
            check_step_numbers(step, transform, gate, args, geometry)
        check_orientation_numbers(pipeline, spec, patch_size)


def orientation_chances(spec):
    part = spec.reorientation
    return (0.0, 0.0) if part is None else (part.p_rot90, part.p_transpose)


def check_orientation_numbers(pipeline, spec, patch_size):
    entries = {entry["name"]: entry for entry in pipeline if "name" in entry}
    valid_axes = spatial.valid_rotation_axes(patch_size)
    p_rot90, p_transpose = orientation_chances(spec)
    for name, p in (("Rot90Transform", p_rot90), ("TransposeAxesTransform", p_transpose)):
        assert (name in entries) == bool(p and valid_axes)
        if name in entries:
            assert entries[name]["p"] == p
            axes = re.findall(r"int64\((\d)\)", entries[name]["args"]["allowed_axes"])
            assert tuple(map(int, axes)) == valid_axes


def check_spatial_numbers(args, spec, geometry):
    assert tuple(args["patch_size"]) == geometry.patch_size[geometry.dummy_2d :]
    assert tuple(args["rotation"]) == pytest.approx(geometry.rotation_range_rad)
    warp = spec.warp
    assert (args["p_rotation"], args["p_rot_per_axis"]) == (warp.p_rotation, warp.p_rotation_axis)
    assert (args["p_scaling"], tuple(args["scaling"])) == (warp.p_scale, warp.scale_range)
    assert args["p_synchronize_scaling_across_axes"] == warp.same_scale
    assert args["p_elastic_deform"] == 0


def value_range(step):
    return next(
        getattr(step, field.name)
        for field in dataclasses.fields(step)
        if field.name.endswith("_range")
    )


def check_step_numbers(step, transform, gate, args, geometry):
    assert type(step) is PIPELINE_KINDS[transform]
    assert step.gate == pytest.approx(gate)
    assert step.p_channel == args["p_per_channel"]
    if not isinstance(step, local.Windowed):  # their laws are tested
        range_names = ("noise_variance", "blur_sigma", "multiplier_range", "contrast_range")
        range_names += ("scale", "gamma", "strength")
        ranges = [args[name] for name in range_names if name in args]
        assert all(value_range(step) == numbers_in(values) for values in ranges)
    if isinstance(step, intensity.BrightnessShift):
        assert (args["mu"], args["sigma"]) == (0, step.sigma)
    if isinstance(step, intensity.Contrast):
        assert args["preserve_range"] == step.clip
    if isinstance(step, local.Median):
        low, high = args["filter_size"]
        assert tuple(range(low, high)) == local.MEDIAN_SIZES
    if isinstance(step, local.BlankRectangles):
        assert args["num_rectangles"] == [1, step.max_count + 1]
    if isinstance(step, intensity.Blur):
        assert step.same_axes == args["synchronize_axes"]
    if isinstance(step, intensity.LowResolution):
        assert args["ignore_axes"] == ([0] if geometry.dummy_2d else None)
    if isinstance(step, intensity.Gamma) and "p_invert_image" in args:
        assert step.invert == (args["p_invert_image"] == 1)
        assert args["p_retain_stats"] == 1


def own_draws(policy, patch_size, num_channels=2):
    geometry = policies.patch_geometry(policy, patch_size)
    spec = recipes.find_policy(policy)

    def sample(key):
        draws = policies.sample_draws(key, num_channels, spec, geometry)
        steps = [
            draw._replace(value=draw.value.sigma) if isinstance(step, intensity.Noise) else draw
            for step, draw in zip(spec.transforms, draws.transforms, strict=True)
        ]
        return draws._replace(transforms=steps)

    keys = jax.random.split(jax.random.key(11), NUM_DRAWS)
    return jax.tree.map(np.asarray, quick_jit(partial(jax.lax.map, sample))(keys))


def assert_frequency(ours, expected, name, *, num_golden=NUM_DRAWS):
    """Spec 04 §8: 4.5 standard deviations; the golden frequency has its own error."""
    if expected in (0.0, 1.0):
        assert ours.mean() == expected, name
        return
    variance = expected * (1 - expected) * (1 / len(ours) + 2 / num_golden)
    assert abs(ours.mean() - expected) <= 4.5 * np.sqrt(variance), (name, ours.mean(), expected)


def assert_law(ours, law, name, *, is_integer=False):
    """Spec 04 §8: the mean in standard errors, the quantiles in shares of the span."""
    count = min(law["n"], len(ours))
    margin = 4.5 * law["std"] * np.sqrt(2 / count)
    assert abs(ours.mean() - law["mean"]) <= margin, (name, ours.mean(), law["mean"])
    quantiles = dict(zip(law["q"], law["quantiles"], strict=True))
    span = quantiles[0.999] - quantiles[0.001]
    for level in (0.05, 0.25, 0.75, 0.95):
        difference = abs(np.quantile(ours, level) - quantiles[level])
        assert difference <= 0.03 * span + is_integer, (name, level)


def check_spatial_laws(laws, draw):
    changed = {"angle": draw.angles != 0, "scale": draw.scales != 1}
    values = {"angle": draw.angles, "scale": draw.scales}
    done = 0
    for name, law in laws.items():
        if name == "p_any":
            assert_frequency(draw.resample, law["mean"], name)
        elif name == "scale_isotropic_fraction":
            some = draw.scales[changed["scale"].any(axis=1)]
            assert (some == some[:, :1]).all(axis=1).mean() == law["mean"]
        elif match := re.fullmatch(r"p_(angle|scale)(\d)_not\w+|p_(angle)(\d)_nonzero", name):
            kind, axis = [group for group in match.groups() if group]
            assert_frequency(changed[kind][:, int(axis)], law["mean"], name)
        elif match := re.fullmatch(r"(angle|scale)(\d)_given_\w+", name):
            kind, axis = match.group(1), int(match.group(2))
            assert_law(values[kind][changed[kind][:, axis], axis], law, name)
        else:
            continue
        done += 1
    assert done == len(laws)


def check_alternatives_exclude_each_other(steps):
    for (_, before), (step, draw) in itertools.pairwise(steps):
        both = before.gate.any(axis=1) & draw.gate.any(axis=1)
        assert both.any() != step.is_alternative


def check_step_laws(laws, draw, step):
    kind = type(step).__name__
    p_sample = laws["p_sample"]["mean"] / (2 if laws["p_sample"]["one_of"] else 1)
    p_channel = laws.get("p_channel", {"mean": 1.0})["mean"]
    for together in (1, 2):  # the gates of one channel, and of two channels together
        expected = p_sample * p_channel**together
        assert_frequency(draw.gate[:, :together].all(axis=1), expected, kind, num_golden=2000)
    for name, law in laws.items():
        if name in ("p_sample", "p_channel"):
            continue
        if name == "p_invert":
            assert law["mean"] == step.invert
        elif name.endswith("isotropic_fraction"):
            assert (draw.value == draw.value[..., :1]).all(axis=-1).mean() == law["mean"]
        else:
            check_value_law(name, law, draw.value)


def check_value_law(name, law, value):
    """Compare the first channel's parameter that the golden calls `name`, axis number last."""
    name, axis = re.fullmatch(r"([a-z_]+?)(\d?)", name).groups()
    if isinstance(value, local.Rectangles):
        value = {"count_given_applied": value.count, "size": value.size, "lower": value.lower}[name]
    elif isinstance(value, local.Window):
        # each axis has the same law of the centre
        value = {"loc": value.centre[..., 0], "scale": value.width}.get(name, value.amount)
    values = value[:, 0]
    if axis:
        values = values[..., int(axis)]
    elif values.ndim > 1:
        values = values[:, -1]  # one value for all axes; axis 0 may be exempt
    is_integer = np.issubdtype(values.dtype, np.integer)
    if values.ndim > 1:  # boxes of a channel, the drawn slots and the others alike
        values = values[:, 0]
    assert_law(values, law, name, is_integer=is_integer)


def check_orientation_laws(policy, patch, transforms):
    p_rot90, p_transpose = orientation_chances(recipes.find_policy(policy))
    valid_axes = spatial.valid_rotation_axes((1, 1, 1))
    keys = jax.random.split(jax.random.key(12), NUM_DRAWS)
    turn, turns, plane = jax.vmap(lambda key: spatial.sample_rot90(key, valid_axes, p=p_rot90))(
        keys
    )
    transpose, order = jax.vmap(
        lambda key: spatial.sample_transpose(key, 3, valid_axes, p=p_transpose)
    )(keys)
    assert_frequency(np.asarray(turn), p_rot90, "rot90")
    assert_frequency(np.asarray(transpose), p_transpose, "transpose")
    laws = transforms.pop("Rot90", {})
    for k, expected in enumerate(laws.get("k_frequencies", {"mean": []})["mean"]):
        assert_frequency(np.asarray(turns) == k, expected, f"k = {k}")
    planes = laws.get("axis_pair_frequencies_01_02_12", {"mean": []})["mean"]
    for number, expected in enumerate(planes, start=1):  # the sum of the axes tells the pair
        assert_frequency(np.asarray(plane).sum(axis=1) == number, expected, f"plane {number}")
    laws = transforms.pop("Transpose", {})
    for name, expected in laws.get("permutation_frequencies", {"mean": {}})["mean"].items():
        permutation = np.array(re.findall(r"\d", name), int) - 1
        assert_frequency((np.asarray(order) == permutation).all(axis=1), expected, name)


@pytest.mark.golden
def test_sampling_laws(golden):
    table = json.loads((golden_folder(golden) / "sampling_laws.json").read_text())
    grouped = {}
    for name, law in table["laws"].items():
        trainer, transform, quantity = name.split("/")
        grouped.setdefault(trainer, {}).setdefault(transform, {})[quantity] = law
    assert grouped
    for trainer, transforms in grouped.items():
        policy, patch = TRAINER_POLICY[trainer], tuple(table["patch"])
        geometry = policies.patch_geometry(policy, patch)
        assert geometry.rotation_range_rad == pytest.approx(table["rotation_range"])
        draws = own_draws(policy, patch)
        check_spatial_laws(transforms.pop("SpatialTransform"), draws.warp)
        check_orientation_laws(policy, patch, transforms)
        for name, law in transforms.pop("MirrorTransform").items():
            assert_frequency(draws.flips[:, int(name[-1])], law["mean"], name)
        steps = list(zip(recipes.find_policy(policy).transforms, draws.transforms, strict=True))
        check_alternatives_exclude_each_other(steps)
        for transform, laws in transforms.items():
            name, _, number = transform.partition("#")
            same = [pair for pair in steps if type(pair[0]) is PIPELINE_KINDS[name]]
            step, draw = same[int(number or 1) - 1]
            check_step_laws(laws, draw, step)


@pytest.mark.parametrize(
    ("policy", "patch_size"), list(zip(recipes.BUILT_IN, itertools.cycle(SHAPES), strict=False))
)
def test_shapes_of_every_policy(policy, patch_size):
    geometry = policies.patch_geometry(policy, patch_size)
    image = jnp.zeros((*geometry.initial_patch_size, 2))
    label = jnp.zeros((*geometry.initial_patch_size, 1), jnp.int8)
    augment = policies.make_augment(policy, patch_size=patch_size, mask_channels=(1,))
    image, label = jax.eval_shape(augment, jax.random.key(0), image, label)
    assert (image.shape, image.dtype) == ((*patch_size, 2), jnp.float32)
    assert (label.shape, label.dtype) == ((*patch_size, 1), jnp.int8)


def test_policies_differ_where_they_should():
    assert policies.patch_geometry("no_mirroring", (64, 64, 64)).mirror_axes == ()
    assert policies.patch_geometry("only_mirror_01", (64, 64, 64)).mirror_axes == (0, 1)
    assert policies.patch_geometry("only_mirror_01", (64, 64)).mirror_axes == (0,)
    none = policies.patch_geometry("none", (64, 64, 64))
    assert none.initial_patch_size == (64, 64, 64) and none.mirror_axes == ()
    thin = policies.patch_geometry("no_dummy_2d", (16, 64, 64))
    assert not thin.dummy_2d and thin.rotation_range_rad[1] == pytest.approx(np.pi / 6)


def test_errors_name_the_value_and_the_choices():
    with pytest.raises(ValueError, match=r"'strong'.*default.*none"):
        policies.make_augment("strong", patch_size=(8, 8, 8))
    with pytest.raises(ValueError, match=r"\(8,\).*two or three"):
        policies.patch_geometry("default", (8,))
    augment = policies.make_augment("default", patch_size=(4, 16, 16))
    with pytest.raises(ValueError, match=r"patch of 6 slices.*\(4, 16, 16\)"):
        image = jnp.zeros((6, 20, 20, 1))
        jax.eval_shape(augment, jax.random.key(0), image, image.astype(jnp.int8))
