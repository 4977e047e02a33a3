import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from panther_jax.config.schema import OptimConfig
from panther_jax.training import optim

PARAMS = {
    "encoder": {"stem": {"kernel": jnp.array([1.0, -2.0])}},
    "decoder": {
        "heads": {
            "0": {"kernel": jnp.array([0.5]), "bias": jnp.array([0.25])},
            "1": {"kernel": jnp.array([-0.5]), "bias": jnp.array([0.75])},
            "10": {"kernel": jnp.array([0.125])},
        }
    },
}
GRADS = jax.tree.map(lambda p: 0.3 - 2 * p, PARAMS)


def run(config, grads, params, schedule, state=None):
    """Apply the optimiser once for each of the gradients, clipped."""
    optimizer = optim.make_optimizer(config, schedule)
    state = optimizer.init(params) if state is None else state

    @jax.jit
    def step(params, state, grads):
        grads, norm = optim.clip_by_global_norm(grads, config.clip_norm)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, norm

    history, norms = [], []
    for g in grads:
        params, state, norm = step(params, state, g)
        history.append(params)
        norms.append(float(norm))
    return history, norms, state


# ------------------------------------------------------------------------------------- golden

OPTIMIZERS = {"sgd_nesterov": "sgd", "adamw_amsgrad": "adamw", "adam_l2": "adam"}


@pytest.mark.golden
def test_optimizers_match_the_reference(golden):
    folder = golden / "training"
    cases = json.loads((folder / "optimizers.json").read_text())
    arrays = np.load(folder / "optimizers.npz")
    assert cases
    for case in cases:
        i, steps = case["index"], range(case["steps"])
        config = OptimConfig(
            optimizer=OPTIMIZERS[case["name"]],
            lr=case["initial_lr"],
            weight_decay=case["weight_decay"],
            clip_norm=case["clip"],
        )
        keys = [k.split("_")[1] for k in arrays.files if k.startswith(f"o{i}_p") and "init" in k]
        params = {p: jnp.asarray(arrays[f"o{i}_{p}_init"]) for p in keys}
        grads = [
            {p: jnp.asarray(arrays[f"o{i}_{p.replace('p', 'g')}_t{t}"]) for p in keys}
            for t in steps
        ]
        rate = optim.learning_rate(config, case["max_steps"])
        np.testing.assert_allclose([rate(t) for t in steps], case["lrs"], rtol=0, atol=1e-12)
        schedule = optim.make_schedule(config, case["max_steps"], 1)
        history, norms, _ = run(config, grads, params, schedule)
        np.testing.assert_allclose(norms, case["grad_norms"], rtol=1e-6)  # float32 sums
        for t in steps:
            for p in keys:
                expected = arrays[f"o{i}_{p}_t{t}"]
                np.testing.assert_allclose(history[t][p], expected, rtol=0, atol=2e-6)  # README


SCHEDULES = {
    "poly": "poly",
    "cosine": "cosine",
    "lin_warmup_then_poly_offset": "poly_warmup",
    "poly_lin_warmup": "poly_warmup",
    "cosine_warmup": "cosine_warmup",
    "cosine_warmup_resumed": "cosine_warmup",
}


@pytest.mark.golden
def test_schedules_match_the_reference(golden):
    folder = golden / "training"
    cases = json.loads((folder / "lr_schedules.json").read_text())
    arrays = np.load(folder / "lr_schedules.npz")
    assert cases
    for case in cases:
        epochs, first = case["num_epochs"], case.get("first_epoch", 0)
        config = OptimConfig(
            lr=case["initial_lr"],
            schedule=SCHEDULES[case["kind"]],
            warmup_epochs=case.get("warmup", 0),
        )
        rate = optim.learning_rate(config, epochs)
        found = [rate(epoch) for epoch in range(first, epochs)]
        if case["kind"] == "cosine_warmup_resumed":
            # The reference's scheduler forgets where it was. Ours does not (spec 03 §3.3), so only
            # the rate at which it was interrupted enters here.
            span, before = epochs - config.warmup_epochs, rate(first - 1)
            steps = np.arange(1, epochs - first + 1)
            found = before * (1 + np.cos(np.pi * steps / span)) / 2
        expected = arrays[case["name"]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12, err_msg=case["name"])


# --------------------------------------------------------------------------------- schedules


def test_schedules_by_hand():
    def rates(schedule, epochs, warmup=0):
        config = OptimConfig(lr=0.1, schedule=schedule, warmup_epochs=warmup)
        rate = optim.learning_rate(config, epochs)
        return [rate(epoch) for epoch in range(epochs)]

    assert rates("constant", 2) == [0.1, 0.1]
    assert rates("poly", 2) == pytest.approx([0.1, 0.1 * 0.5**0.9], abs=1e-15)
    assert rates("poly_warmup", 4, 2) == pytest.approx([0.05, 0.1, 0.1, 0.1 * 0.5**0.9], abs=1e-15)
    assert rates("cosine", 2) == pytest.approx([0.1, 0.05], abs=1e-15)
    assert rates("cosine_warmup", 4, 2) == pytest.approx([0.05, 0.1, 0.05, 0], abs=1e-15)
    assert rates("poly_warmup", 2, 5) == pytest.approx([0.02, 0.04], abs=1e-15)


@pytest.mark.parametrize("name", ["poly", "poly_warmup", "cosine_warmup", "cosine", "constant"])
def test_schedule_of_a_step_is_that_of_its_epoch(name):
    config = OptimConfig(schedule=name, warmup_epochs=2)
    rate = optim.learning_rate(config, 5)
    schedule = optim.make_schedule(config, 5, 3)
    found = jax.jit(jax.vmap(schedule))(jnp.arange(18))
    expected = np.float32([rate(min(step // 3, 4)) for step in range(18)])
    np.testing.assert_array_equal(found, expected)
    assert float(schedule(7)) == expected[7]


# ---------------------------------------------------------------------------------- clipping


def test_clipping_has_the_epsilon_in_the_denominator():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([0.0, 4.0])}
    clipped, norm = optim.clip_by_global_norm(grads, 1e-6)
    assert float(norm) == 5
    factor = 1e-6 / (5 + 1e-6)
    np.testing.assert_allclose(clipped["b"], [0, 4 * factor], rtol=1e-6)  # float32
    same, _ = optim.clip_by_global_norm(grads, 12.0)
    np.testing.assert_array_equal(same["b"], grads["b"])
    tiny = jax.tree.map(lambda g: g * 1e-7, grads)
    clipped, _ = optim.clip_by_global_norm(tiny, 5e-7)
    # Norm 5e-7 at the limit: 5e-7 / 15e-7 of it is left
    np.testing.assert_allclose(clipped["a"], [1e-7], rtol=1e-5)


def test_a_norm_that_is_not_finite_is_visible():
    clipped, norm = optim.clip_by_global_norm({"a": jnp.array([1.0, jnp.nan])}, 12.0)
    assert math.isnan(float(norm))
    assert np.isnan(clipped["a"]).all()


# --------------------------------------------------------------------------------- optimisers


def test_sgd_by_hand_with_a_changing_rate():
    config = OptimConfig(momentum=0.9, weight_decay=0.1, clip_norm=1e9)
    rates = np.float32([0.5, 0.25, 0.125])
    grads = [3.0, -1.0, 2.0]
    history, _, _ = run(
        config,
        [{"w": jnp.array([g])} for g in grads],
        {"w": jnp.array([2.0])},
        lambda step: jnp.asarray(rates)[step],
    )
    w, b = 2.0, 0.0
    for g, lr, found in zip(grads, rates, history, strict=True):
        g += 0.1 * w
        b = 0.9 * b + g
        w -= lr * (g + 0.9 * b)
        assert float(found["w"][0]) == pytest.approx(w, rel=1e-6)  # float32


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_variants_in_double(name):
    config = OptimConfig(optimizer=name, lr=0.01, weight_decay=0.1, clip_norm=1e9)
    rng = np.random.default_rng(0)
    # Shrinking gradients, so that amsgrad's maximum is an old one
    grads = [rng.normal(size=4) * 0.5**t for t in range(8)]
    w = rng.normal(size=4)
    history, _, _ = run(
        config,
        [{"w": jnp.asarray(g, jnp.float32)} for g in grads],
        {"w": jnp.asarray(w, jnp.float32)},
        lambda step: 0.01,
    )
    m = v = largest = np.zeros(4)
    for t, (g, found) in enumerate(zip(grads, history, strict=True), start=1):
        if name == "adam":
            g = g + 0.1 * w
        else:
            w = w * (1 - 0.01 * 0.1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        largest = np.maximum(largest, v) if name == "adamw" else v
        w = w - 0.01 / (1 - 0.9**t) * m / (np.sqrt(largest) / np.sqrt(1 - 0.999**t) + 1e-8)
        np.testing.assert_allclose(found["w"], w, rtol=0, atol=1e-6)  # float32
    if name == "adamw":
        assert np.any(largest > v), "the maximum never mattered"


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_unused_head(name):
    config = OptimConfig(optimizer=name, weight_decay=0.1)
    zero_head = jax.tree.map(lambda g: g, GRADS)
    zero_head["decoder"]["heads"]["0"] = jax.tree.map(
        jnp.zeros_like, GRADS["decoder"]["heads"]["0"]
    )
    schedule = optim.make_schedule(config, 10, 2)
    kept, _, _ = run(config, [zero_head] * 3, PARAMS, schedule)
    skipping = dataclasses.replace(config, skip_unused_head=True)
    # Whatever gradient arrives there, the head stays
    skipped, _, state = run(skipping, [GRADS] * 3, PARAMS, schedule)
    for leaf in ("kernel", "bias"):
        before = PARAMS["decoder"]["heads"]["0"][leaf]
        np.testing.assert_array_equal(skipped[-1]["decoder"]["heads"]["0"][leaf], before)
        assert np.all(kept[-1]["decoder"]["heads"]["0"][leaf] != before), "decay acts by default"
    buffers = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "'decoder'/'heads'/'0'" in jax.tree_util.keystr(path, separator="/")
        or "decoder/heads/0/" in jax.tree_util.keystr(path, simple=True, separator="/")
    ]
    assert buffers and not any(np.any(b) for b in buffers)
    plain, _, _ = run(config, [GRADS] * 3, PARAMS, schedule)
    for other in ("1", "10"):
        jax.tree.map(
            np.testing.assert_array_equal,
            skipped[-1]["decoder"]["heads"][other],
            plain[-1]["decoder"]["heads"][other],
        )


def test_an_only_head_is_never_skipped():
    params = {"decoder": {"heads": {"0": {"kernel": jnp.array([0.5])}}}}
    config = OptimConfig(skip_unused_head=True)
    history, _, _ = run(config, [params], params, lambda step: 0.1)
    assert float(history[0]["decoder"]["heads"]["0"]["kernel"][0]) < 0.5


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_resume_is_exact(name):
    config = OptimConfig(optimizer=name, schedule="poly_warmup", warmup_epochs=2)
    schedule = optim.make_schedule(config, 4, 2)
    grads = [jax.tree.map(lambda p, t=t: jnp.cos(p + t), PARAMS) for t in range(6)]
    at_once, _, _ = run(config, grads, PARAMS, schedule)
    first, _, state = run(config, grads[:3], PARAMS, schedule)
    state = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), state)
    second, _, _ = run(config, grads[3:], first[-1], schedule, state)
    jax.tree.map(np.testing.assert_array_equal, second[-1], at_once[-1])
