"""Both formulations of the convolution agree with a direct sum; so do up-sampling and pooling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panther_jax.convolution import average_pool, convolve, upsample


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
    ((6, 8), (3, 3), (2, 2)),
]


@pytest.mark.parametrize("backend", ["xla", "dshift2d"])
@pytest.mark.parametrize(("shape", "size", "stride"), CASES)
def test_convolution_and_its_gradients(shape, size, stride, backend):
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
