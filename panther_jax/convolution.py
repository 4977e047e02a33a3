"""The one convolution of the network, its transposed form and its pooling (spec 08 §8.1-8.2).

Activations are ``(batch, *spatial, channel)``, kernels ``(*kernel, in, out)``; spatial is z, y, x
or y, x. Two formulations of a 3-D convolution, equal up to summation order: ``xla`` is the direct
one; ``dshift2d`` sums 2-D convolutions of shifted depth slices, which XLA runs fast on a CPU,
where it has no fast 3-D one. ``dshift2d`` merges batch and depth, so it is for one device only.

"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Backend = Literal["xla", "dshift2d"]


def default_backend(num_devices: int = 1) -> Backend:
    """The faster formulation: ``dshift2d`` on a single CPU device, ``xla`` everywhere else."""
    return "dshift2d" if jax.default_backend() == "cpu" and num_devices == 1 else "xla"


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
    if len(size) == 3 and backend == "dshift2d":
        return _depth_shifted(x, kernel, tuple(stride))
    return _direct(x, kernel, tuple(stride))


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


def _depth_shifted(x: Array, kernel: Array, stride: tuple[int, ...]) -> Array:
    if stride == (1, 1, 1) and kernel.shape[0] % 2 == 1:
        return _unit_stride(x, kernel)
    return _sum_of_planes(x, kernel, stride)


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


@jax.custom_vjp
def _unit_stride(x: Array, kernel: Array) -> Array:
    # One wide convolution is two to three times as fast as three narrow ones in both directions;
    # for the kernel's gradient the shifted inputs are.
    return _planes_then_sum(x, kernel)


def _unit_stride_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _planes_then_sum(x, kernel), (x, kernel)


def _unit_stride_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    transposed = jnp.flip(kernel, (0, 1, 2)).swapaxes(-1, -2)
    _, pull_back = jax.vjp(lambda k: _sum_of_planes(x, k, (1, 1, 1)), kernel)
    return _planes_then_sum(grad, transposed), pull_back(grad)[0]


_unit_stride.defvjp(_unit_stride_forward, _unit_stride_backward)


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
