"""The one convolution of the network, its transposed form and its pooling (spec 08 §8.1-8.2, 08a).

Activations are ``(batch, *spatial, channel)``, kernels ``(*kernel, in, out)``; spatial is z, y, x
or y, x. Two formulations of a 3-D convolution, equal up to rounding: ``xla`` is the direct one;
``dshift2d`` (:mod:`panther_jax.cpu_convolution`) is made of 2-D convolutions of depth slices, which
XLA runs fast on a CPU. It merges batch and depth: not for patches that are split.

Under ``jax.vmap`` a convolution becomes one a member, or one with the members folded into batch or
channels, but never a grouped one, which is slow everywhere. Reverse mode only, once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from panther_jax.network import cpu_convolution

Backend = Literal["xla", "dshift2d"]

# Up to so many members are written out side by side, more run in a loop inside the program:
# compile time grows with their number (spec 08a §A.3), and loops cost dshift2d's gradient (§A.2).
MAX_UNROLLED = 8


def default_backend(space: int = 1) -> Backend:
    """``dshift2d`` on a CPU unless ``space`` devices share a patch; ``xla`` everywhere else."""
    return "dshift2d" if jax.default_backend() == "cpu" and space == 1 else "xla"


def convolve(
    x: Float[Array, "batch *space_in cin"],
    kernel: Float[Array, "*kernel cin cout"],
    stride: Sequence[int],
    backend: Backend,
) -> Float[Array, "batch *space_out cout"]:
    """Cross-correlate with zero padding ``(k - 1) // 2`` on both sides of each axis (spec 01 §1.2).

    The result has the dtype of ``x``; the kernel is cast to it.
    """
    size = kernel.shape[:-2]
    kernel = kernel.astype(x.dtype)
    if math.prod(size) == 1 and all(s == 1 for s in stride):
        return jnp.einsum("...i,io->...o", x, kernel.reshape(kernel.shape[-2:]))
    axes = _varying_axes(x) | _varying_axes(kernel)
    problem = _Problem(tuple(stride), size, x.shape[1:-1], backend)
    return _core(problem, _varying(x, axes), _varying(kernel, axes))


# ------------------------------------------------------------------- derivatives and batching


@dataclass(frozen=True)
class _Problem:
    """What is static in a convolution. With a stride, ``grad`` does not tell the input's size."""

    stride: tuple[int, ...]
    kernel_size: tuple[int, ...]
    space_in: tuple[int, ...]
    backend: Backend

    @property
    def in_planes(self) -> bool:
        odd = all(k % 2 == 1 for k in self.kernel_size)
        return odd and len(self.kernel_size) == 3 and self.backend == "dshift2d"


# spec 08a §A.1: reverse mode does not pass through custom_vmap, so custom_vjp has to be outside.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(problem: _Problem, x: Array, kernel: Array) -> Array:
    return _ruled(problem).convolve(x, kernel)


def _core_forward(problem: _Problem, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _ruled(problem).convolve(x, kernel), (x, kernel)


def _core_backward(
    problem: _Problem, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    ruled = _ruled(problem)
    return ruled.input_grad(grad, kernel), ruled.kernel_grad(x, grad)


_core.defvjp(_core_forward, _core_backward)


@dataclass(frozen=True)
class _Ruled:
    """A convolution and its two derivatives, each with its batching rule."""

    convolve: Callable[[Array, Array], Array]
    input_grad: Callable[[Array, Array], Array]
    kernel_grad: Callable[[Array, Array], Array]


@lru_cache(maxsize=1024)
def _ruled(problem: _Problem) -> _Ruled:
    """The functions of a problem; statics are in closures, for all arguments are batched."""
    convolve = custom_vmap(partial(_convolve, problem))
    input_grad = custom_vmap(partial(_input_grad, problem))
    kernel_grad = custom_vmap(partial(_kernel_grad, problem))

    # Each rule calls the ruled function again, so that nested vmaps leave no group either.
    @convolve.def_vmap
    def convolve_members(num: int, batched: Sequence[bool], x: Array, kernel: Array) -> Any:
        if all(batched):
            return _each(convolve, num, x, kernel), True
        if batched[0]:
            return _unfold(convolve(_fold(x, 0), kernel), 0, num), True
        return _unfold(convolve(x, _fold(kernel, -1)), -1, num), True

    @input_grad.def_vmap
    def input_grad_members(num: int, batched: Sequence[bool], grad: Array, kernel: Array) -> Any:
        if not batched[1]:
            return _unfold(input_grad(_fold(grad, 0), kernel), 0, num), True
        if not batched[0]:
            grad = jnp.broadcast_to(grad, (num, *grad.shape))
        return _each(input_grad, num, grad, kernel), True

    @kernel_grad.def_vmap
    def kernel_grad_members(num: int, batched: Sequence[bool], x: Array, grad: Array) -> Any:
        if all(batched):
            return _each(kernel_grad, num, x, grad), True
        if batched[0]:
            return _unfold(kernel_grad(_fold(x, -1), grad), -2, num), True
        return _unfold(kernel_grad(x, _fold(grad, -1)), -1, num), True

    return _Ruled(convolve, input_grad, kernel_grad)


def _each(function: Callable[[Array, Array], Array], num: int, one: Array, other: Array) -> Array:
    if num <= MAX_UNROLLED:
        return jnp.stack([function(one[k], other[k]) for k in range(num)])
    return lax.map(lambda pair: function(*pair), (one, other))


def _fold(stacked: Array, axis: int) -> Array:
    """Merge the leading axis into one of the others, as its slower part."""
    axis %= stacked.ndim - 1
    moved = jnp.moveaxis(stacked, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def _unfold(folded: Array, axis: int, num: int) -> Array:
    """Inverse of :func:`_fold`."""
    axis %= folded.ndim
    parts = folded.reshape(*folded.shape[:axis], num, -1, *folded.shape[axis + 1 :])
    return jnp.moveaxis(parts, axis, 0)


def _varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which a value differs inside ``shard_map``; none outside."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _varying(x: Array, axes: frozenset[str]) -> Array:
    """Declare a value as differing over mesh axes; the transpose sums over them (08a §A.1.3)."""
    missing = tuple(sorted(axes - _varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


# ------------------------------------------------------------------------------- formulations


def _convolve(problem: _Problem, x: Array, kernel: Array) -> Array:
    if problem.in_planes:
        return cpu_convolution.convolve(x, kernel, problem.stride)
    return _direct(x, kernel, problem.stride)


def _input_grad(problem: _Problem, grad: Array, kernel: Array) -> Array:
    if problem.in_planes:
        return cpu_convolution.input_grad(grad, kernel, problem.stride, problem.space_in)
    shape = (grad.shape[0], *problem.space_in, kernel.shape[-2])
    zeros = _varying(jnp.zeros(shape, grad.dtype), _varying_axes(grad))
    return jax.vjp(lambda x: _direct(x, kernel, problem.stride), zeros)[1](grad)[0]


def _kernel_grad(problem: _Problem, x: Array, grad: Array) -> Array:
    size = problem.kernel_size
    if problem.in_planes:
        return cpu_convolution.kernel_grad(x, grad, size, problem.stride)
    shape = (*size, x.shape[-1], grad.shape[-1])
    zeros = _varying(jnp.zeros(shape, grad.dtype), _varying_axes(grad))
    return jax.vjp(lambda kernel: _direct(x, kernel, problem.stride), zeros)[1](grad)[0]


def _direct(x: Array, kernel: Array, stride: tuple[int, ...]) -> Array:
    # Explicit padding: "SAME" pads a strided even size by (0, 1), the reference by (1, 1).
    axes = "DHW"[3 - len(stride) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=stride,
        padding=[((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[:-2]],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )


def upsample(
    x: Float[Array, "batch *space_in cin"], kernel: Float[Array, "*kernel cin cout"]
) -> Float[Array, "batch *space_out cout"]:
    """Transposed convolution whose stride equals its kernel, as a product and a reshape.

    The kernel is torch's with its first two axes moved to the end, not flipped (spec 01 §2.4).
    """
    size, channels = kernel.shape[:-2], kernel.shape[-2:]
    axes = len(size)
    # One product over the channels: einsum's many axes become transposes, above all backwards.
    taps = jnp.moveaxis(kernel.astype(x.dtype), -2, 0).reshape(channels[0], -1)
    y = (x @ taps).reshape(*x.shape[:-1], *size, channels[1])
    order = [0, *(a for axis in range(axes) for a in (1 + axis, 1 + axes + axis)), 1 + 2 * axes]
    spatial = [n * k for n, k in zip(x.shape[1:-1], size, strict=True)]
    return y.transpose(order).reshape(x.shape[0], *spatial, channels[1])


def average_pool(
    x: Float[Array, "batch *space_in channel"], stride: Sequence[int]
) -> Float[Array, "batch *space_out channel"]:
    """Mean over non-overlapping windows of ``stride``; the rest of an odd size is dropped."""
    counts = [n // s for n, s in zip(x.shape[1:-1], stride, strict=True)]
    whole = [slice(0, n * s) for n, s in zip(counts, stride, strict=True)]
    # Not reduce_window: its gradient is another one, over an array with holes.
    windows = [size for pair in zip(counts, stride, strict=True) for size in pair]
    windows = x[:, *whole].reshape(x.shape[0], *windows, x.shape[-1])
    return windows.mean(tuple(range(2, windows.ndim, 2)))
