"""All forms of the convolution agree with a direct sum; so do up-sampling and pooling.

Ensembles of convolutions equal a loop over their members and are never grouped (spec 08a §A.1).
"""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panther_jax.network import convolution, cpu_convolution
from panther_jax.network.convolution import average_pool, convolve, upsample


def by_hand(x, kernel, stride):
    """Cross-correlation with padding (k - 1) // 2, in float64, as nested sums."""
    size = kernel.shape[:-2]
    pads = [(0, 0), *(((k - 1) // 2,) * 2 for k in size), (0, 0)]
    x = np.pad(np.asarray(x, np.float64), pads)
    counts = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], size, stride, strict=True)]
    out = np.zeros((x.shape[0], *counts, kernel.shape[-1]))
    for tap in itertools.product(*map(range, size)):
        window = tuple(
            slice(t, t + (c - 1) * s + 1, s) for t, c, s in zip(tap, counts, stride, strict=True)
        )
        out += x[(slice(None), *window)] @ np.asarray(kernel[tap], np.float64)
    return out


CASES = [
    ((5, 6, 7), (3, 3, 3), (1, 1, 1)),
    ((6, 6, 8), (3, 3, 3), (2, 2, 2)),
    ((5, 4, 8), (1, 3, 3), (1, 2, 2)),
    ((4, 5, 6), (5, 3, 1), (1, 1, 1)),
    ((2, 4, 4), (5, 3, 3), (1, 1, 1)),
    ((1, 4, 4), (3, 3, 3), (1, 1, 1)),
    ((4, 6, 4), (3, 1, 3), (2, 1, 2)),
    ((4, 4, 4), (1, 1, 1), (1, 1, 1)),
    ((4, 6, 6), (3, 2, 2), (1, 1, 1)),
    ((5, 4, 6), (2, 3, 2), (2, 1, 2)),
    ((6, 8), (3, 3), (2, 2)),
    ((3, 13, 12), (3, 3, 3), (1, 1, 1)),
    ((9, 4, 6), (3, 3, 3), (1, 1, 1)),
    ((7, 8, 9), (3, 5, 7), (3, 2, 4)),
    ((5, 4, 6), (1, 1, 1), (2, 2, 2)),
    ((2, 9, 8), (5, 3, 1), (1, 1, 1)),
]
FORMS = {
    # name: backend, few channels, channels and voxels from which Winograd is used
    "xla": ("xla", 0, 0, 0),
    "taps": ("dshift2d", 9, 99, 0),
    "planes": ("dshift2d", 0, 99, 0),
    "winograd": ("dshift2d", 0, 0, 0),
}


def set_form(monkeypatch, name):
    backend, few, channels, voxels = FORMS[name]
    monkeypatch.setattr(cpu_convolution, "FEW_CHANNELS", few)
    monkeypatch.setattr(cpu_convolution, "WINOGRAD_CHANNELS", channels)
    monkeypatch.setattr(cpu_convolution, "WINOGRAD_VOXELS", voxels)
    return backend


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "size", "stride"), CASES)
def test_convolution_and_its_gradients(shape, size, stride, form, monkeypatch):
    backend = set_form(monkeypatch, form)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *shape, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*size, 3, 4)), jnp.float32)
    expected = by_hand(x, kernel, stride)
    cotangent = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)

    @jax.jit
    def forward_and_back(x, kernel):
        value, pull_back = jax.vjp(lambda x, k: convolve(x, k, stride, backend), x, kernel)
        return value, pull_back(cotangent)

    value, (grad_x, grad_kernel) = forward_and_back(x, kernel)
    np.testing.assert_allclose(value, expected, atol=2e-5)  # float32 sums of at most 135 terms
    # The convolution is linear in each operand, so its gradients are exact differences.
    for operand, grad in ((0, grad_x), (1, grad_kernel)):
        for _ in range(3):
            direction = rng.normal(size=grad.shape)
            moved = (direction, kernel) if operand == 0 else (x, direction)
            slope = np.sum(by_hand(*moved, stride) * np.asarray(cotangent, np.float64))
            assert float(np.sum(np.asarray(grad, np.float64) * direction)) == pytest.approx(
                slope, abs=2e-3
            )


@pytest.mark.parametrize("tile", [2, 3, 4])
def test_winograd_is_exact_and_keeps_rounding_small(tile):
    output, taps, values = cpu_convolution.winograd_matrices(tile)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(tile + 2, 500)), rng.normal(size=(3, 500))
    expected = sum(x[t : t + tile] * kernel[t] for t in range(3))
    assert np.abs(output @ ((taps @ kernel) * (values @ x)) - expected).max() < 1e-13
    single = [a.astype(np.float32) for a in (output, taps, values, x, kernel)]
    found = single[0] @ ((single[1] @ single[4]) * (single[2] @ single[3]))
    # plain sums of three products in float32 are off by about 5e-8 of the result's spread
    assert np.sqrt(np.mean((found - expected) ** 2)) < 5e-7 * expected.std()


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 1, 3), (2, 2)])
def test_upsampling_places_each_product_once(stride):
    rng = np.random.default_rng(1)
    shape = (3, 2, 4)[: len(stride)]
    x = rng.normal(size=(2, *shape, 3)).astype(np.float32)
    kernel = rng.normal(size=(*stride, 3, 5)).astype(np.float32)
    y = np.asarray(upsample(jnp.asarray(x), jnp.asarray(kernel)))
    assert y.shape == (2, *(n * s for n, s in zip(shape, stride, strict=True)), 5)
    for position in itertools.product(*map(range, y.shape[1:-1])):
        source = tuple(p // s for p, s in zip(position, stride, strict=True))
        tap = tuple(p % s for p, s in zip(position, stride, strict=True))
        expected = x[(slice(None), *source)] @ kernel[tap]
        np.testing.assert_allclose(y[(slice(None), *position)], expected, atol=1e-5)


def test_pooling_averages_and_drops_the_rest():
    x = jnp.arange(2 * 5 * 4 * 1, dtype=jnp.float32).reshape(2, 5, 4, 1)
    pooled = jax.jit(lambda x: average_pool(x, (2, 2)))(x)
    expected = np.asarray(x)[:, :4].reshape(2, 2, 2, 2, 2, 1).mean((2, 4))
    np.testing.assert_allclose(pooled, expected)
    grad = jax.jit(jax.grad(lambda x: average_pool(x, (2, 2)).sum()))(x)
    assert (grad[:, :4] == 0.25).all() and (grad[:, 4:] == 0).all()


# ---------------------------------------------------------------------------------- ensembles

BACKENDS = ("xla", "dshift2d")
NUM_MEMBERS = 2
STRIDES = ((1, 1, 1), (2, 2, 2))


@pytest.fixture(autouse=True)
def convolutions_of_few_channels_too(monkeypatch):
    """The nets here have so few channels that they would be sums of taps."""
    monkeypatch.setattr(cpu_convolution, "FEW_CHANNELS", 0)


def tiny_net(backend, params, x, named=lambda y: y):
    """A stem and a strided convolution: enough for every rule."""
    for kernel, stride in zip(params, STRIDES, strict=True):
        x = jnp.tanh(named(convolve(x, kernel, stride, backend)))
    return x


def tiny_params(seed):
    rng = np.random.default_rng(seed)
    sizes = ((3, 3, 3, 2, 3), (1, 3, 3, 3, 4))
    return tuple(jnp.asarray(rng.normal(0, 0.3, size), jnp.float32) for size in sizes)


def loss(backend, params, x):
    return jnp.sum(jnp.square(tiny_net(backend, params, x) - 0.1))


MEMBERS = [tiny_params(seed) for seed in range(NUM_MEMBERS)]
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *MEMBERS)
X = jnp.asarray(np.random.default_rng(5).normal(size=(2, 5, 4, 6, 2)), jnp.float32)
MEMBER_X = jnp.asarray(np.random.default_rng(6).normal(size=(NUM_MEMBERS, *X.shape)), jnp.float32)

# What is computed for all members at once, and the same by a loop over members.
PROGRAMS = {
    "forward, shared input": (
        lambda f, g: lambda p, x: jax.vmap(f, (0, None))(p, x[0]),
        lambda f, g: lambda p, x, k: f(p, x[0]),
    ),
    "forward, an input each": (
        lambda f, g: lambda p, x: jax.vmap(f)(p, x),
        lambda f, g: lambda p, x, k: f(p, x[k]),
    ),
    "gradients, shared input": (
        lambda f, g: lambda p, x: jax.vmap(g, (0, None))(p, x[0]),
        lambda f, g: lambda p, x, k: g(p, x[0]),
    ),
    "gradients, an input each": (
        lambda f, g: lambda p, x: jax.vmap(g)(p, x),
        lambda f, g: lambda p, x, k: g(p, x[k]),
    ),
    "gradient of the sum over members": (
        lambda f, g: jax.grad(lambda p, x: jnp.sum(jax.vmap(f, (0, None))(p, x[0]) ** 2), (0, 1)),
        None,
    ),
    "members of samples": (
        lambda f, g: (
            lambda p, x: jax.vmap(lambda p: jax.vmap(lambda one: f(p, one[None])[0])(x[0]))(p)
        ),
        lambda f, g: lambda p, x, k: f(p, x[0]),
    ),
    "samples of members": (
        lambda f, g: (
            lambda p, x: jnp.moveaxis(
                jax.vmap(lambda one: jax.vmap(lambda p: f(p, one[None])[0])(p))(x[0]), 0, 1
            )
        ),
        lambda f, g: lambda p, x, k: f(p, x[0]),
    ),
    "members of gradients of each sample": (
        lambda f, g: (
            lambda p, x: jax.vmap(lambda p: jax.vmap(lambda one: g(p, one[None]))(x[0]))(p)
        ),
        lambda f, g: (
            lambda p, x, k: jax.tree.map(
                lambda *one: jnp.stack(one), *[g(p, sample[None]) for sample in x[0]]
            )
        ),
    ),
}


def groups(lowered):
    """Group counts of all convolutions in the text of a lowered program."""
    return [int(n) for n in re.findall(r"(?:feature|batch)_group_count = (\d+)", lowered.as_text())]


def assert_close(found, expected):
    """Compare relative to the largest entry of the whole tree, as spec 08a §A.1.2 does."""
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # float32 sums of up to 240 products in another order
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize(
    ("name", "backend", "max_unrolled"),
    [
        *((name, "xla", max_unrolled) for name in PROGRAMS for max_unrolled in (8, 0)),
        ("forward, shared input", "dshift2d", 8),
        ("gradients, an input each", "dshift2d", 8),
        ("members of gradients of each sample", "dshift2d", 8),
        ("gradient of the sum over members", "dshift2d", 0),
    ],
)
def test_members_at_once_equal_a_loop_and_are_not_grouped(name, backend, max_unrolled, monkeypatch):
    monkeypatch.setattr(convolution, "MAX_UNROLLED", max_unrolled)
    forward = partial(tiny_net, backend)
    gradient = jax.grad(partial(loss, backend))
    at_once, by_member = PROGRAMS[name]
    lowered = jax.jit(at_once(forward, gradient)).lower(STACKED, MEMBER_X)
    counts = groups(lowered)
    assert len(counts) >= 4 and set(counts) == {1}
    found = lowered.compile()(STACKED, MEMBER_X)
    if by_member is None:

        @jax.jit
        def expected_of(stacked, x):
            def total(stacked, x):
                members = [jax.tree.map(lambda p, k=k: p[k], stacked) for k in range(NUM_MEMBERS)]
                return sum(jnp.sum(forward(p, x[0]) ** 2) for p in members)

            return jax.grad(total, (0, 1))(stacked, x)

        expected = expected_of(STACKED, MEMBER_X)
    else:
        one = jax.jit(by_member(forward, gradient))
        results = [one(params, MEMBER_X, k) for k, params in enumerate(MEMBERS)]
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    assert_close(found, expected)


def test_a_plain_convolution_would_be_grouped():
    """The control of the test above: without the rule there are groups to be found."""

    def plain(kernel, x):
        return convolution._direct(x, kernel, (1, 1, 1))

    lowered = jax.jit(jax.vmap(plain)).lower(STACKED[0], MEMBER_X)
    assert max(groups(lowered)) == NUM_MEMBERS


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_recomputed_if_convolutions_are_saved(backend):
    from jax.ad_checkpoint import checkpoint_name

    def named(y):
        return checkpoint_name(y, "conv")

    def plain(params, x):
        return jnp.sum(jnp.square(tiny_net(backend, params, x, named) - 0.1))

    saved = jax.checkpoint(plain, policy=jax.checkpoint_policies.save_only_these_names("conv"))
    lowered = [jax.jit(jax.grad(f)).lower(MEMBERS[0], X) for f in (plain, saved)]
    assert len(groups(lowered[0])) == len(groups(lowered[1])) > 0
    assert "tanh" in lowered[1].as_text().split("optimization_barrier")[-1]  # this is recomputed
    assert_close(*(program.compile()(MEMBERS[0], X) for program in lowered))
    members = jax.jit(jax.vmap(jax.grad(saved), (0, None))).lower(STACKED, X)
    assert set(groups(members)) == {1}


# ------------------------------------------------------------------------------------ devices


def mesh_of(name):
    return jax.make_mesh((8,), (name,), axis_types=(jax.sharding.AxisType.Auto,))


def collectives(compiled):
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    text = compiled.as_text()
    return {n: len(re.findall(rf"{n}(?:-start)?\(", text)) for n in names}


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_parallel_gradient_in_shard_map(backend):
    """Replicated kernels: autodiff inserts the sum over devices (spec 08a §A.1.3)."""
    x = jnp.concatenate([X] * 4) * jnp.arange(1, 9, dtype=jnp.float32).reshape(8, 1, 1, 1, 1) / 8

    @partial(
        jax.shard_map,
        mesh=mesh_of("data"),
        in_specs=(jax.P(), jax.P("data")),
        out_specs=jax.P(),
        check_vma=True,
    )
    def gradient(params, x):
        return jax.grad(lambda p: jax.lax.psum(loss(backend, p, x), "data"))(params)

    compiled = jax.jit(gradient).lower(MEMBERS[0], x).compile()
    found = collectives(compiled)
    assert found.pop("all-reduce") >= 1 and not any(found.values())
    assert_close(compiled(MEMBERS[0], x), jax.jit(jax.grad(partial(loss, backend)))(MEMBERS[0], x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_member_a_device(backend, inside):
    """Forward and gradient of eight members need no exchange (spec 08a §A.4)."""
    members = [tiny_params(seed) for seed in range(8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    mesh = mesh_of("member")
    stacked = jax.device_put(stacked, jax.NamedSharding(mesh, jax.P("member")))
    x = jax.device_put(X, jax.NamedSharding(mesh, jax.P()))
    over_members = partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P("member"), jax.P()), out_specs=jax.P("member")
    )
    one = jax.grad(partial(loss, backend))
    if inside:
        gradient = over_members(jax.vmap(one, (0, None)))
    else:
        losses = over_members(jax.vmap(partial(loss, backend), (0, None)))
        gradient = jax.grad(lambda p, x: jnp.sum(losses(p, x)))
    lowered = jax.jit(gradient).lower(stacked, x)
    assert set(groups(lowered)) == {1}
    compiled = lowered.compile()
    assert not any(collectives(compiled).values())
    jitted = jax.jit(one)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(jitted(p, X) for p in members))
    assert_close(compiled(stacked, x), expected)


@pytest.mark.parametrize("members", [1, 2])
def test_spatial_sharding_exchanges_halos_only(members):
    """The depth axis over eight devices: no operand is gathered, with and without members."""
    mesh = mesh_of("space")
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 16, 4, 6, 2)), jnp.float32)
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "space")))
    stacked = jax.tree.map(lambda leaf: leaf[:members], STACKED)
    everywhere = jax.device_put(stacked, jax.NamedSharding(mesh, jax.P()))

    def gradient(stacked, x):
        one = jax.grad(partial(loss, "xla"))
        if members == 1:
            return one(jax.tree.map(lambda leaf: leaf[0], stacked), x)
        return jax.vmap(one, (0, None))(stacked, x)

    compiled = jax.jit(gradient).lower(everywhere, spread).compile()
    found = collectives(compiled)
    assert found["collective-permute"] > 0 and found["all-gather"] == 0
    assert_close(compiled(everywhere, spread), jax.jit(gradient)(stacked, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_computation_gives_float32_gradients(backend):
    def mixed(params, x):
        return loss(backend, params, x.astype(jnp.bfloat16)).astype(jnp.float32)

    assert tiny_net(backend, MEMBERS[0], X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    grads = jax.jit(jax.grad(mixed))(MEMBERS[0], X)
    assert {leaf.dtype for leaf in grads} == {jnp.dtype(jnp.float32)}
    exact = jax.jit(jax.grad(partial(loss, backend)))(MEMBERS[0], X)
    scale = max(float(jnp.abs(leaf).max()) for leaf in exact)
    for found, wanted in zip(grads, exact, strict=True):
        # eight bits of mantissa, a few roundings in a row
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05 * scale)
