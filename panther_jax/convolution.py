"""The one convolution of the network, its transposed form and its pooling (spec 08 §8.1-8.2, 08a).

Activations are ``(batch, *spatial, channel)``, kernels ``(*kernel, in, out)``; spatial is z, y, x
or y, x. Two formulations of a 3-D convolution, equal up to summation order: ``xla`` is the direct
one; ``dshift2d`` sums 2-D convolutions of shifted depth slices, which XLA runs fast on a CPU,
where it has no fast 3-D one. ``dshift2d`` merges batch and depth: not for patches that are split.

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

Backend = Literal["xla", "dshift2d"]

# Up to so many members are written out side by side, more run in a loop inside the program:
# compile time grows with their number (spec 08a §A.3), and loops cost dshift2d's gradient (§A.2).
MAX_UNROLLED = 8

# The kernel's gradient of large planes is summed over chunks of voxels that stay in the cache, in
# two loops that run side by side (benchmarks/LOG.md); of small planes XLA's own is as fast.
CHUNKED_PLANE = 1024
CHUNK, CHUNK_LOOPS = 512, 2


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
    def shifts_depth(self) -> bool:
        return len(self.kernel_size) == 3 and self.backend == "dshift2d"

    @property
    def keeps_size(self) -> bool:
        return all(s == 1 for s in self.stride) and all(k % 2 == 1 for k in self.kernel_size)


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
    if not problem.shifts_depth:
        return _direct(x, kernel, problem.stride)
    # One wide convolution is two to three times as fast as three narrow ones, for the gradient of
    # the input too; for the kernel's gradient the shifted inputs are.
    if problem.keeps_size:
        return _planes_then_sum(x, kernel)
    return _sum_of_planes(x, kernel, problem.stride)


def _input_grad(problem: _Problem, grad: Array, kernel: Array) -> Array:
    if problem.shifts_depth and problem.keeps_size:
        transposed = jnp.flip(kernel, (0, 1, 2)).swapaxes(-1, -2)
        return _planes_then_sum(grad, transposed)
    shape = (grad.shape[0], *problem.space_in, kernel.shape[-2])
    zeros = _varying(jnp.zeros(shape, grad.dtype), _varying_axes(grad))
    return jax.vjp(lambda x: _convolve(problem, x, kernel), zeros)[1](grad)[0]


def _kernel_grad(problem: _Problem, x: Array, grad: Array) -> Array:
    large = math.prod(problem.space_in[1:]) >= CHUNKED_PLANE
    if problem.shifts_depth and problem.keeps_size and large:
        return _kernel_grad_in_chunks(problem.kernel_size, x, grad)
    shape = (*problem.kernel_size, x.shape[-1], grad.shape[-1])
    zeros = _varying(jnp.zeros(shape, grad.dtype), _varying_axes(grad))
    formulation = _sum_of_planes if problem.shifts_depth else _direct
    return jax.vjp(lambda kernel: formulation(x, kernel, problem.stride), zeros)[1](grad)[0]


def _kernel_grad_in_chunks(size: tuple[int, ...], x: Array, grad: Array) -> Array:
    """Products of shifted inputs and gradients, chunk after chunk of the voxels in a row.

    With zeros at the end of every axis, which serve the next row as its start too, a tap of the
    kernel is a shift along the one row of all voxels.
    """
    cin, cout = x.shape[-1], grad.shape[-1]
    ends = tuple((k - 1) // 2 for k in size)
    padded = [n + end for n, end in zip(x.shape[1:-1], ends, strict=True)]
    row, plane = padded[2], padded[1] * padded[2]
    reach, depth_reach = ends[1] * row + ends[2], ends[0] * plane
    voxels = x.shape[0] * padded[0] * plane
    steps = -(-voxels // (CHUNK * CHUNK_LOOPS))
    rest = steps * CHUNK * CHUNK_LOOPS - voxels

    def in_a_row(array: Array, around: int) -> Array:
        array = jnp.pad(array, [(0, 0), *((0, end) for end in ends), (0, 0)])
        return jnp.pad(array.reshape(voxels, -1), [(around, around + rest), (0, 0)])

    inputs, grads = in_a_row(x, reach), in_a_row(grad, depth_reach)
    shifts = [a * row + b for a in range(size[1]) for b in range(size[2])]

    def one_chunk(start: Array) -> Array:
        back = [
            lax.dynamic_slice(grads, (start + 2 * depth_reach - t * plane, 0), (CHUNK, cout))
            for t in range(size[0])
        ]
        side_by_side = jnp.concatenate(back, -1)
        taps = [lax.dynamic_slice(inputs, (start + s, 0), (CHUNK, cin)) for s in shifts]
        return jnp.stack([_summed_products(tap, side_by_side) for tap in taps])

    def one_loop(number: int) -> Array:
        total = jnp.zeros((len(shifts), cin, size[0] * cout), jnp.float32)
        total = _varying(total, _varying_axes(grad) | _varying_axes(x))
        first = number * steps
        return lax.fori_loop(0, steps, lambda i, t: t + one_chunk((first + i) * CHUNK), total)

    total = one_loop(0)
    for number in range(1, CHUNK_LOOPS):
        total = total + one_loop(number)
    total = total.reshape(size[1], size[2], cin, size[0], cout)
    return jnp.moveaxis(total, 3, 0).astype(grad.dtype)


def _summed_products(a: Array, b: Array) -> Array:
    """Sum over rows of their outer products, float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


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


def _sum_of_planes(x: Array, kernel: Array, stride: tuple[int, ...]) -> Array:
    """Shift the input in depth, convolve each shift with its plane of the kernel, add up."""
    batch, depth = x.shape[:2]
    taps, (step, *plane_stride) = kernel.shape[0], stride
    pad = (taps - 1) // 2
    depth_out = (depth + 2 * pad - taps) // step + 1
    if pad:
        x = jnp.pad(x, [(0, 0), (pad, pad), (0, 0), (0, 0), (0, 0)])
    total = None
    for tap in range(taps):
        slices = lax.slice_in_dim(x, tap, tap + (depth_out - 1) * step + 1, step, axis=1)
        plane = _direct(
            slices.reshape(batch * depth_out, *slices.shape[2:]), kernel[tap], tuple(plane_stride)
        )
        total = plane if total is None else total + plane
    assert total is not None
    return total.reshape(batch, depth_out, *total.shape[1:])


def _planes_then_sum(x: Array, kernel: Array) -> Array:
    """Convolve once with all planes of the kernel side by side, then shift the results and add."""
    batch, depth = x.shape[:2]
    taps, channels = kernel.shape[0], kernel.shape[-1]
    side_by_side = jnp.moveaxis(kernel, 0, -2).reshape(*kernel.shape[1:4], taps * channels)
    planes = _direct(x.reshape(batch * depth, *x.shape[2:]), side_by_side, (1, 1))
    planes = planes.reshape(batch, depth, *planes.shape[1:])
    total = None
    for tap in range(taps):
        shift = tap - (taps - 1) // 2  # output slice d takes this plane's result at d + shift
        plane = planes[..., tap * channels : (tap + 1) * channels]
        inside = plane[:, max(shift, 0) : depth + min(shift, 0)]
        padding = [(0, 0), (min(max(-shift, 0), depth), min(max(shift, 0), depth))]
        plane = jnp.pad(inside, padding + [(0, 0)] * 3) if shift else plane
        total = plane if total is None else total + plane
    assert total is not None
    return total


def upsample(
    x: Float[Array, "batch *space_in cin"], kernel: Float[Array, "*kernel cin cout"]
) -> Float[Array, "batch *space_out cout"]:
    """Transposed convolution whose stride equals its kernel, as a product and a reshape.

    The kernel is torch's with its first two axes moved to the end, not flipped (spec 01 §2.4).
    """
    size = kernel.shape[:-2]
    kernel = kernel.astype(x.dtype)
    if len(size) == 3:
        y = jnp.einsum("ndhwi,abcio->ndahbwco", x, kernel)
    else:
        y = jnp.einsum("nhwi,bcio->nhbwco", x, kernel)
    spatial = tuple(n * k for n, k in zip(x.shape[1:-1], size, strict=True))
    return y.reshape(x.shape[0], *spatial, kernel.shape[-1])


def average_pool(
    x: Float[Array, "batch *space_in channel"], stride: Sequence[int]
) -> Float[Array, "batch *space_out channel"]:
    """Mean over non-overlapping windows of ``stride``; the rest of an odd size is dropped."""
    window = (1, *stride, 1)
    # A Python number as the initial value: a traced one has no reverse-mode rule (spec 08 R10).
    total = lax.reduce_window(x, 0.0, lax.add, window, window, "VALID")
    return total / math.prod(stride)
