"""All strategies give the mean of the members' logits; `auto` decides by memory and measurement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panther_jax.inference import strategies
from panther_jax.inference.sliding_window import make_predictor, mean_logits
from panther_jax.inference.strategies import arrange, choose, make_forward, stack_members
from panther_jax.network.unet import Execution, apply, build, init_params
from panther_jax.plans.architecture import ArchSpec

ARCH = ArchSpec(
    network="ResidualEncoderUNet",
    in_channels=1,
    num_outputs=3,
    features=(4, 6),
    kernel_sizes=((3, 3, 3),) * 2,
    strides=((1, 1, 1), (2, 2, 2)),
    blocks=(1, 1),
    decoder_convs=(1,),
)
TILE = (8, 8, 8)
TILE_SHAPE = (1, *TILE, 1)


def network(backend="xla"):
    net = build(ARCH, Execution(backend=backend))
    return lambda params, tiles: apply(net, params, tiles, full_only=True)[0]


def member(seed):
    """Parameters with non-zero biases and last norms, on the host."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape).astype(np.float32),
        init_params(ARCH, jax.random.key(seed)),
    )


MEMBERS = [member(seed) for seed in range(5)]


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(9).normal(size=(1, 13, 12, 7)).astype(np.float32)


def probabilities(forward, passes, image):
    predict = make_predictor(forward, tile=TILE, num_outputs=3)
    return np.asarray(jax.nn.softmax(mean_logits(predict(p, image) for p in passes), axis=0))


@pytest.fixture(scope="module")
def expected(image):
    return probabilities(network(), [jax.device_put(m) for m in MEMBERS], image)


@pytest.mark.parametrize("backend", ["xla", "dshift2d"])
@pytest.mark.parametrize("strategy", strategies.STRATEGIES)
def test_strategies_agree(strategy, backend, image, expected):
    arranged = arrange(network(backend), MEMBERS, strategy=strategy, tile_shape=TILE_SHAPE)
    assert arranged.strategy == strategy and strategy in arranged.why
    assert len(list(arranged.passes())) == (len(MEMBERS) if strategy == "loop" else 1)
    found = probabilities(arranged.forward, arranged.passes(), image)
    # Members differ by 0.01 and more; what is asked for is 1e-5.
    one = probabilities(network(), [jax.device_put(MEMBERS[0])], image)
    assert np.abs(one - expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_devices", "expected_size"), [(8, 5), (4, 3), (1, 1)])
def test_shard_takes_any_number_of_devices(num_devices, expected_size):
    devices = jax.devices()[:num_devices]
    arranged = arrange(network(), MEMBERS, strategy="shard", tile_shape=TILE_SHAPE, devices=devices)
    (params,) = arranged.passes()
    sharding = jax.tree.leaves(params)[0].sharding
    assert sharding.mesh.size == expected_size
    assert float(params["weights"].sum()) == pytest.approx(1.0)
    tiles = np.random.default_rng(2).normal(size=TILE_SHAPE).astype(np.float32)
    placed = jax.device_put(tiles, jax.NamedSharding(sharding.mesh, jax.P()))
    one = jax.jit(network())
    mean = np.mean([np.asarray(one(m, tiles)) for m in MEMBERS], axis=0)
    np.testing.assert_allclose(jax.jit(arranged.forward)(params, placed), mean, atol=1e-5)


def test_shard_needs_one_sum_and_computes_one_member_a_device():
    arranged = arrange(network(), MEMBERS, strategy="shard", tile_shape=TILE_SHAPE)
    (params,) = arranged.passes()
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    tiles = jax.device_put(jnp.ones(TILE_SHAPE), jax.NamedSharding(mesh, jax.P()))
    compiled = jax.jit(arranged.forward).lower(params, tiles).compile()
    text = compiled.as_text()
    assert sum(" all-reduce(" in line for line in text.splitlines()) == 1
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in text
    one = jax.jit(network()).lower(MEMBERS[0], jnp.ones(TILE_SHAPE)).compile()
    flops = [c.cost_analysis()["flops"] for c in (compiled, one)]
    assert flops[0] < 1.2 * flops[1]


@pytest.mark.parametrize("strategy", ["scan", "vmap"])
def test_no_strategy_groups_convolutions(strategy):
    forward = make_forward(strategy, network())
    lowered = jax.jit(forward).lower(stack_members(MEMBERS), jnp.ones(TILE_SHAPE))
    groups = lowered.as_text().split("feature_group_count = ")[1:]
    assert len(groups) >= 5 and {g[0] for g in groups} == {"1"}


def test_loop_keeps_members_on_the_host_if_they_are_too_many(monkeypatch):
    monkeypatch.setattr(strategies, "free_memory", lambda device: 1000)
    arranged = arrange(network(), MEMBERS, strategy="loop", tile_shape=TILE_SHAPE)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(arranged.parameter_sets))
    assert all(isinstance(x, jax.Array) for p in arranged.passes() for x in jax.tree.leaves(p))
    monkeypatch.setattr(strategies, "free_memory", lambda device: 10**9)
    arranged = arrange(network(), MEMBERS, strategy="loop", tile_shape=TILE_SHAPE)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(arranged.parameter_sets))


def test_unfit_members_and_unknown_strategies_are_refused():
    with pytest.raises(ValueError, match="no member"):
        arrange(network(), [], tile_shape=TILE_SHAPE)
    other = jax.tree.map(lambda leaf: leaf[..., :1], MEMBERS[1])
    with pytest.raises(ValueError, match="member 1 has parameters of other names or shapes"):
        arrange(network(), [MEMBERS[0], other], tile_shape=TILE_SHAPE)
    with pytest.raises(ValueError, match="expected auto, vmap"):
        arrange(network(), MEMBERS, strategy="pmap", tile_shape=TILE_SHAPE)


# ------------------------------------------------------------------------------------ choosing


ONE_DEVICE = jax.devices()[:1]


def test_one_member_and_few_tiles_are_not_measured():
    def forward(params, tiles):
        raise AssertionError("nothing is to be traced")

    picked, why = choose(forward, MEMBERS[:1], tile_shape=TILE_SHAPE)
    assert picked == "loop" and "one member" in why
    picked, why = choose(forward, MEMBERS, tile_shape=TILE_SHAPE, num_tiles=10, devices=ONE_DEVICE)
    assert picked == "loop" and "before a measurement" in why


def test_memory_excludes_strategies():
    picked, why = choose(
        network(), MEMBERS, tile_shape=TILE_SHAPE, devices=ONE_DEVICE, free_bytes=1000
    )
    assert picked == "loop" and "scan would need" in why
    reserved = {"free_bytes": 10**9, "reserved_bytes": 10**9}
    picked, why = choose(network(), MEMBERS, tile_shape=TILE_SHAPE, devices=ONE_DEVICE, **reserved)
    assert picked == "loop" and "scan would need" in why


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"loop": 1.0, "scan": 0.97}, "loop"),  # within the margin
        ({"loop": 1.0, "scan": 0.9}, "scan"),
        ({"loop": 1.0, "scan": 0.9, "shard": 0.3}, "shard"),
        ({"loop": 100.0, "scan": 0.1, "shard": 0.1}, "loop"),  # too long to try others
        ({"loop": 1.0, "scan": None, "shard": 2.0}, "loop"),  # scan ran out of memory
    ],
)
def test_the_measurement_decides(seconds, expected, monkeypatch):
    monkeypatch.setattr(
        strategies, "_seconds", lambda run, params, shape: seconds["loop"] / len(MEMBERS)
    )
    monkeypatch.setattr(strategies, "_try", lambda strategy, *_, **__: seconds[strategy])
    devices = jax.devices() if "shard" in seconds else ONE_DEVICE
    picked, why = choose(network(), MEMBERS, tile_shape=TILE_SHAPE, devices=devices)
    assert picked == expected and f"strategy {expected}" in why
    if seconds["loop"] < strategies.MAX_SECONDS:
        assert all(name in why for name in seconds)


def test_a_real_measurement_gives_a_choice_that_runs(image, expected):
    arranged = arrange(
        network(), MEMBERS, tile_shape=TILE_SHAPE, num_tiles=10**4, devices=ONE_DEVICE
    )
    assert "s a tile for all members" in arranged.why
    found = probabilities(arranged.forward, arranged.passes(), image)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_measuring_reports_memory_that_does_not_suffice(monkeypatch):
    def run_out(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(strategies, "_placed", run_out)
    options = {"tile_shape": TILE_SHAPE, "devices": ONE_DEVICE}
    assert strategies._try("scan", network(), MEMBERS, **options) is None

    def break_down(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(strategies, "_placed", break_down)
    with pytest.raises(jax.errors.JaxRuntimeError):
        strategies._try("scan", network(), MEMBERS, **options)
