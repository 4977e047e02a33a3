import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panther_jax.config.schema import ConfigError, LossConfig
from panther_jax.plans.labels import Labels
from panther_jax.training import losses

LABELS = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
LABELS_IGNORE = Labels((*LABELS.names, ("ignore", 3)))
REGIONS = Labels((("background", 0), ("whole", (1, 2)), ("tumor", 2)), (1, 2))
REGIONS_IGNORE = Labels((*REGIONS.names, ("ignore", 3)), (1, 2))


def channels_last(values, dtype=None):
    return jnp.asarray(np.moveaxis(values, 1, -1), dtype)


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text()), np.load(folder / f"{name}.npz")


def example(labels, seed=0, shape=(2, 3, 5, 4)):
    """Random logits and a matching target."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(2 * rng.normal(size=(*shape, labels.num_outputs)), jnp.float32)
    if labels.has_regions:
        extra = labels.ignore_id is not None
        target = rng.random((*shape, labels.num_outputs + extra)) < 0.4
    else:
        target = rng.integers(0, len(labels.allowed_values), (*shape, 1)).astype(np.int16)
    return logits, jnp.asarray(target)


def softmax64(logits):
    x = np.asarray(logits, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ------------------------------------------------------------------------------------- golden


KINDS = {
    "dc_ce": "dice_ce",
    "dc_bce": "dice_ce",
    "dice": "dice",
    "softdice": "dice",
    "ce": "ce",
    "topk": "topk",
    "dc_topk": "dice_topk",
}


def golden_loss(case, is_region):
    """The loss of one golden case, made of the same functions as make_loss."""
    config = LossConfig(
        kind=KINDS[case["kind"]],
        weight_ce=float(case.get("weight_ce", 1.0)),
        weight_dice=float(case.get("weight_dice", 1.0)),
        smooth=float(case.get("smooth", 1.0 if case["kind"] == "softdice" else 1e-5)),
        topk_percent=float(case.get("k", 10)),
        label_smoothing=float(case.get("label_smoothing", 0.0)),
    )
    batch_dice = case.get("batch_dice", False)
    if is_region:
        return lambda x, y: losses.region_loss(
            x,
            y,
            config,
            batch_dice=batch_dice,
            has_ignore=case.get("use_ignore_label", False),
            include_background=case.get("do_bg", True),
        )
    return lambda x, y: losses.label_loss(
        x,
        y,
        config,
        batch_dice=batch_dice,
        ignore_id=case.get("ignore_label"),
        include_background=case.get("do_bg", case["kind"] == "softdice"),
    )


@pytest.mark.golden
def test_losses_match_the_reference(golden):
    cases, arrays = read(golden / "training", "losses")
    assert cases
    for case in cases:
        i = case["index"]
        logits = channels_last(arrays[f"c{i}_logits"])
        target = channels_last(arrays[f"c{i}_target"])
        loss_fn = golden_loss(case, target.dtype == bool)
        loss, grad = jax.value_and_grad(loss_fn)(logits, target)
        # tolerances of the golden README: float32 sums in another order
        np.testing.assert_allclose(loss, arrays[f"c{i}_loss"], rtol=0, atol=5e-6, err_msg=str(case))
        expected = np.moveaxis(arrays[f"c{i}_grad"], 1, -1)
        np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6, err_msg=str(case))


@pytest.mark.golden
def test_deep_supervision_matches_the_reference(golden):
    index, arrays = read(golden / "training", "deep_supervision")
    for name, expected in index["weights"].items():
        count, _, variant = name.partition("_")
        last = {"default": 0.0, "ddp_nocompile": 1e-6}[variant]
        weights = losses.deep_supervision_weights(int(count), last=last)
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-15)  # golden README
    totals = sorted({k.split("_")[1] for k in arrays.files if k.startswith("total_")})
    assert totals
    for name in totals:
        outputs = range(index["total"]["n"])
        logits = [channels_last(arrays[f"total_{name}_logits{j}"]) for j in outputs]
        targets = [channels_last(arrays[f"total_{name}_target{j}"]) for j in outputs]
        names = tuple((str(c), c) for c in range(1, index["total"]["num_classes"]))
        labels = Labels((("background", 0), *names))
        one = losses.make_loss(LossConfig(), labels, batch_dice=name == "bd1")
        loss_fn = losses.deep_supervised(one, index["total"]["weights"])
        loss, grads = jax.jit(jax.value_and_grad(loss_fn))(tuple(logits), tuple(targets))
        np.testing.assert_allclose(loss, arrays[f"total_{name}_loss"], rtol=0, atol=5e-6)
        for j in outputs:
            key = f"total_{name}_grad{j}"  # absent: the reference never evaluates that output
            expected = np.moveaxis(arrays[key], 1, -1) if key in arrays else 0 * grads[j]
            np.testing.assert_allclose(grads[j], expected, rtol=0, atol=1e-6)


@pytest.mark.golden
def test_a_global_batch_equals_the_references_ranks(golden):
    cases, arrays = read(golden / "training", "ddp_dice")
    assert cases
    for case in cases:
        i = case["index"]
        logits, target = (arrays[f"d{i}_{name}"] for name in ("logits", "target"))
        world, per_rank = logits.shape[:2]
        logits = channels_last(logits.reshape(world * per_rank, *logits.shape[2:]))
        target = channels_last(target.reshape(world * per_rank, *target.shape[2:]))
        names = tuple((str(c), c) for c in range(1, logits.shape[-1]))
        labels = Labels((("background", 0), *names))
        loss_fn = losses.make_loss(LossConfig(), labels, batch_dice=case["batch_dice"])
        loss, grad = jax.value_and_grad(loss_fn)(logits, target)
        mean = arrays[f"d{i}_loss_per_rank"].astype(np.float64).mean()
        # The golden README's 1e-6, and as much of the value: a float32 above 1 has a spacing of
        # 1.2e-7 and more, and the sums behind it are taken in another order.
        np.testing.assert_allclose(loss, mean, rtol=1e-6, atol=1e-6)
        expected = arrays[f"d{i}_grad_per_rank"] / world
        expected = expected.reshape(world * per_rank, *expected.shape[2:])
        np.testing.assert_allclose(grad, np.moveaxis(expected, 1, -1), rtol=0, atol=1e-6)


def golden_labels(case):
    heads, has_ignore = case["num_heads"], case["has_ignore"]
    if case["kind"] == "regions":
        # Any regions do: only their number and the ignore channel matter here
        ids = range(1, heads + 2)
        names = tuple((f"r{c}", (c, c + 1)) for c in range(1, heads + 1))
        ignore = (("ignore", max(ids) + 1),) if has_ignore else ()
        return Labels((("background", 0), *names, *ignore), tuple(range(1, heads + 1)))
    ignore = (("ignore", heads),) if has_ignore else ()
    return Labels((("background", 0), *((f"c{c}", c) for c in range(1, heads)), *ignore))


@pytest.mark.golden
def test_pseudo_dice_matches_the_reference(golden):
    cases, arrays = read(golden / "training", "pseudo_dice")
    assert cases
    for case in cases:
        i, labels = case["index"], golden_labels(case)
        pooled = 0
        for b in range(case["batches"]):
            logits, target = (
                channels_last(arrays[f"v{i}_b{b}_{name}"]) for name in ("logits", "target")
            )
            counts = np.stack(losses.pseudo_dice_counts(logits, target, labels))
            expected = [arrays[f"v{i}_b{b}_{name}_hard"] for name in ("tp", "fp", "fn")]
            np.testing.assert_array_equal(counts, expected)
            pooled = pooled + counts
        dice = losses.pseudo_dice(*pooled)
        expected = np.array(case["dice_per_class_or_region"], float)
        np.testing.assert_allclose(dice, expected, rtol=0, atol=1e-6)  # reference: float32
        mean = losses.mean_foreground_dice(dice)
        np.testing.assert_allclose(mean, float(case["mean_fg_dice"] or "nan"), rtol=0, atol=1e-6)


@pytest.mark.golden
def test_ema_matches_the_reference(golden):
    cases = json.loads((golden / "training" / "ema_checkpoints.json").read_text())
    assert cases
    for case in cases:
        ema, found = None, []
        for value in np.array(case["mean_fg_dice"], float):
            ema = losses.ema_update(ema, float(value), nan_propagates=True)
            found.append(ema)
        expected = np.array(case["ema_fg_dice"], float)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # golden README


# --------------------------------------------------------------------------------- hand-made


def test_dice_ce_of_two_voxels_by_hand():
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    logits = jnp.asarray(np.log(p), jnp.float32).reshape(1, 2, 1, 3)
    label = jnp.array([2, 1], jnp.int8).reshape(1, 2, 1, 1)
    s = 1e-5
    class1 = (2 * 0.8 + s) / (1 + 0.25 + 0.8 + s)
    class2 = (2 * 0.25 + s) / (1 + 0.25 + 0.1 + s)
    entropy = -(math.log(0.25) + math.log(0.8)) / 2
    loss = losses.make_loss(LossConfig(), LABELS, batch_dice=False)(logits, label)
    assert float(loss) == pytest.approx(entropy - (class1 + class2) / 2, abs=1e-6)  # float32
    weighted = LossConfig(weight_ce=0.5, weight_dice=2.0)
    loss = losses.make_loss(weighted, LABELS, batch_dice=False)(logits, label)
    assert float(loss) == pytest.approx(entropy / 2 - class1 - class2, abs=1e-6)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_dice_sums_per_sample_or_over_the_batch(batch_dice):
    logits, label = example(LABELS)
    config = LossConfig(kind="dice", smooth=0.5)
    p, y = softmax64(logits)[..., 1:], np.asarray(label) == [1, 2]
    sums = [v.sum((1, 2, 3)) for v in (p * y, p, y)]
    i, predicted, present = (v.sum(0) if batch_dice else v for v in sums)
    expected = -np.mean((2 * i + 0.5) / (predicted + present + 0.5))
    loss = losses.make_loss(config, LABELS, batch_dice=batch_dice)(logits, label)
    assert float(loss) == pytest.approx(expected, abs=1e-6)  # float32


def test_absent_class_without_prediction_has_dice_one():
    logits = jnp.full((1, 2, 2, 3), -200.0).at[..., 0].set(200.0)
    label = jnp.zeros((1, 2, 2, 1), jnp.int16)
    assert float(losses.make_loss(LossConfig(), LABELS, batch_dice=False)(logits, label)) == -1
    # Nothing to add to 0/0: the clamped denominator makes it 0 (spec 03 §2.1)
    config = LossConfig(smooth=0.0)
    assert float(losses.make_loss(config, LABELS, batch_dice=False)(logits, label)) == 0


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("labels", [LABELS_IGNORE, REGIONS_IGNORE])
def test_all_ignored_is_exactly_minus_one_without_gradient(labels, batch_dice):
    logits, target = example(labels)
    target = target.at[..., -1].set(True) if labels.has_regions else jnp.full_like(target, 3)
    loss_fn = losses.make_loss(LossConfig(), labels, batch_dice=batch_dice)
    loss, grad = jax.jit(jax.value_and_grad(loss_fn))(logits, target)
    assert float(loss) == -1
    assert not np.any(grad)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (LABELS_IGNORE, "dice_ce"),
        (LABELS_IGNORE, "dice"),
        (LABELS_IGNORE, "ce"),
        (REGIONS_IGNORE, "dice_ce"),
        (REGIONS_IGNORE, "dice"),
    ],
)
def test_ignored_voxels_do_not_matter(labels, kind):
    logits, target = example(labels)
    ignored = target[..., -1:] if labels.has_regions else target == 3
    assert 0 < int(ignored.sum()) < ignored.size
    loss_fn = jax.jit(losses.make_loss(LossConfig(kind=kind), labels, batch_dice=True))
    loss, grad = jax.value_and_grad(loss_fn)(logits, target)
    assert float(loss_fn(jnp.where(ignored, 7 - logits, logits), target)) == float(loss)
    assert not np.any(jnp.where(ignored, grad, 0))
    assert np.any(grad)


def test_bce_divides_by_masked_voxels_not_channels():
    logits, target = example(REGIONS, shape=(2, 4, 3))
    x, y = np.asarray(logits, np.float64), np.asarray(target)
    entropy = np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x)))
    assert float(losses.bce_with_logits(logits, target)) == pytest.approx(entropy.mean(), rel=1e-6)
    mask = jnp.zeros((2, 4, 3), bool).at[0, 1].set(True)
    expected = entropy[0, 1].sum() / 3  # spec 03 §2.4: voxels, although two channels are summed
    assert float(losses.bce_with_logits(logits, target, mask)) == pytest.approx(expected, rel=1e-6)


def test_topk_averages_the_largest():
    logits, label = example(LABELS, shape=(2, 5, 7))
    entropy = -np.log(np.take_along_axis(softmax64(logits), np.asarray(label, int), -1))
    for percent in (1.0, 10.0, 33.0, 100.0):
        count = int(70 * percent / 100) or 1
        expected = np.sort(entropy, axis=None)[-count:].mean()
        loss_fn = losses.make_loss(
            LossConfig(kind="topk", topk_percent=percent), LABELS, batch_dice=False
        )
        assert float(jax.jit(loss_fn)(logits, label)) == pytest.approx(expected, rel=1e-6)
    # Equal voxels share the places left, so the mean stays that of the largest
    same = jnp.broadcast_to(logits[:1, :1, :1], logits.shape)
    label = jnp.zeros_like(label)
    entropy = -np.log(softmax64(same)[0, 0, 0, 0])
    loss_fn = losses.make_loss(LossConfig(kind="topk"), LABELS, batch_dice=False)
    assert float(loss_fn(same, label)) == pytest.approx(entropy, rel=1e-6)


def test_topk_keeps_a_nan():
    logits, label = example(LABELS)
    logits = logits.at[0, 0, 0, 0, 0].set(jnp.nan)
    loss_fn = losses.make_loss(LossConfig(kind="topk"), LABELS, batch_dice=False)
    assert math.isnan(float(loss_fn(logits, label)))


def test_topk_of_labels_with_ignored_voxels_counts_them_as_zero():
    logits, label = example(LABELS_IGNORE)
    entropy = -np.log(softmax64(logits))
    picked = np.take_along_axis(entropy, np.minimum(np.asarray(label, int), 2), -1)
    picked = np.where(np.asarray(label) == 3, 0, picked)
    loss_fn = losses.make_loss(
        LossConfig(kind="topk", topk_percent=100.0, label_smoothing=0.0),
        LABELS_IGNORE,
        batch_dice=False,
    )
    assert float(loss_fn(logits, label)) == pytest.approx(picked.mean(), rel=1e-6)
    smoothed = np.where(np.asarray(label) == 3, 0, 0.8 * picked + 0.2 * entropy.mean(-1)[..., None])
    config = LossConfig(kind="topk", topk_percent=100.0, label_smoothing=0.2)
    loss_fn = losses.make_loss(config, LABELS_IGNORE, batch_dice=False)
    assert float(loss_fn(logits, label)) == pytest.approx(smoothed.mean(), rel=1e-6)


CASES = [
    (labels, kind)
    for labels in (LABELS, LABELS_IGNORE, REGIONS, REGIONS_IGNORE)
    for kind in ("dice_ce", "dice", "ce", "topk", "dice_topk")
    if not labels.has_regions or kind in ("dice_ce", "dice")
]


@pytest.mark.parametrize(("labels", "kind"), CASES)
def test_jit_vmap_and_gradient(labels, kind):
    loss_fn = losses.make_loss(LossConfig(kind=kind), labels, batch_dice=True)
    pairs = [example(labels, seed) for seed in range(2)]
    plain = [jax.value_and_grad(loss_fn)(*pair) for pair in pairs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    value, grad = jax.jit(jax.vmap(jax.value_and_grad(loss_fn)))(*stacked)
    # float32, other fusion
    np.testing.assert_allclose(value, [v for v, _ in plain], rtol=0, atol=2e-6)
    np.testing.assert_allclose(grad, [g for _, g in plain], rtol=0, atol=1e-7)
    assert np.all(np.any(grad != 0, axis=(1, 2, 3, 4, 5)))
    # The gradient is the slope of the loss
    logits, target = pairs[0]
    direction = np.sign(np.asarray(plain[0][1]))
    step = 2e-3
    change = loss_fn(logits + step * direction, target) - loss_fn(logits - step * direction, target)
    slope = float(np.abs(plain[0][1]).sum())
    assert float(change) / (2 * step) == pytest.approx(slope, rel=5e-3)  # float32 differences


@pytest.mark.parametrize("kind", ["dice_ce", "dice_topk"])
def test_a_sharded_batch_gives_the_same_loss(kind):
    logits, label = example(LABELS_IGNORE, shape=(8, 4, 4, 4))
    loss_fn = jax.value_and_grad(
        losses.make_loss(LossConfig(kind=kind), LABELS_IGNORE, batch_dice=True)
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(loss_fn)(*jax.device_put((logits, label), sharding))
    plain = jax.jit(loss_fn)(logits, label)
    np.testing.assert_allclose(sharded[0], plain[0], rtol=0, atol=1e-6)  # float32, other order
    np.testing.assert_allclose(sharded[1], plain[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["ce", "topk", "dice_topk"])
def test_label_only_kinds_refuse_regions(kind):
    with pytest.raises(ConfigError, match="regions"):
        losses.make_loss(LossConfig(kind=kind), REGIONS, batch_dice=False)


def test_a_term_of_weight_zero_is_not_evaluated():
    logits, label = example(LABELS)
    config = LossConfig(weight_ce=0.0, weight_dice=1.0)
    text = jax.jit(losses.make_loss(config, LABELS, batch_dice=False)).lower(logits, label)
    alone = jax.jit(losses.make_loss(LossConfig(kind="dice"), LABELS, batch_dice=False))
    assert text.compile().cost_analysis() == alone.lower(logits, label).compile().cost_analysis()


def test_deep_supervision_skips_outputs_of_weight_zero():
    seen = []

    def loss_fn(logits, target):
        seen.append(logits.shape)
        return jnp.sum(logits * target)

    weights = losses.deep_supervision_weights(3)
    assert weights == pytest.approx((2 / 3, 1 / 3, 0), abs=1e-15)
    logits = [jnp.full((size,), 3.0) for size in (4, 2, 1)]
    total = losses.deep_supervised(loss_fn, weights)(logits, logits)
    assert float(total) == pytest.approx(36 * 2 / 3 + 18 / 3, rel=1e-6)
    assert seen == [(4,), (2,)]
    with pytest.raises(ValueError, match="at least two outputs"):
        losses.deep_supervision_weights(1)


def test_pseudo_dice_counts_by_hand():
    label = jnp.array([0, 1, 1, 2, 3], jnp.int8).reshape(1, 5, 1, 1)
    logits = jnp.eye(3)[jnp.array([1, 1, 0, 2, 2])].reshape(1, 5, 1, 3)
    for counts_fn in (
        losses.pseudo_dice_counts,
        jax.jit(losses.pseudo_dice_counts, static_argnums=2),
    ):
        tp, fp, fn = counts_fn(logits, label, LABELS_IGNORE)
        assert (tp.tolist(), fp.tolist(), fn.tolist()) == ([1, 1], [1, 0], [1, 0])
    target = jnp.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0]], bool).reshape(1, 4, 1, 3)
    logits = jnp.array([[1, -1], [-1, 1], [1, 1], [0, 1]], jnp.float32).reshape(1, 4, 1, 2)
    tp, fp, fn = losses.pseudo_dice_counts(logits, target, REGIONS_IGNORE)
    assert (tp.tolist(), fp.tolist(), fn.tolist()) == ([1, 1], [0, 1], [1, 0])


def test_pseudo_dice_of_an_absent_class_is_nan_and_left_out():
    dice = losses.pseudo_dice(np.array([3, 0, 0]), np.array([1, 0, 2]), np.array([0, 0, 0]))
    np.testing.assert_array_equal(dice, [6 / 7, np.nan, 0])
    assert losses.mean_foreground_dice(dice) == 3 / 7
    assert math.isnan(losses.mean_foreground_dice(dice[1:2]))


def test_ema_ignores_nan_unless_told_to_propagate():
    assert losses.ema_update(None, 0.4) == 0.4
    assert losses.ema_update(0.4, 0.9) == pytest.approx(0.45, abs=1e-15)
    assert losses.ema_update(0.4, math.nan) == 0.4
    assert losses.ema_update(None, math.nan) is None
    assert losses.ema_update(math.nan, 0.3) == 0.3
    spoiled = losses.ema_update(0.4, math.nan, nan_propagates=True)
    assert spoiled is not None and math.isnan(spoiled)
