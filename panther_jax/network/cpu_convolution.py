"""3-D convolutions in forms that XLA runs fast on a CPU, for its own are slow (spec 08 §8.2).

Everything comes down to one problem, a correlation with shifts that keeps the size
(:func:`_correlate`), and that to 2-D convolutions of depth slices: all planes of the kernel side by
side, then shifted and added, or, with enough channels, Winograd's F(4, 3) along depth, which takes
half of the products. A strided convolution is a sum of such problems, one a phase of the input.

All forms agree with the plain one up to rounding; benchmarks/LOG.md has their speeds.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# Winograd's points besides 0 and infinity: of pairs of eighths about the most exact. Rounding is 5
# times that of plain sums, 4e-7 of the result, against 7 times with the usual 1 and 2.
POINTS = (0.75, 1.5)
WINOGRAD_TILE = 4
# Below these, Winograd's transforms, of the input and of the kernel, cost more than they save.
WINOGRAD_CHANNELS, WINOGRAD_VOXELS = 32, 2048
FEW_CHANNELS = 4  # of an input, whose taps are then added up one by one


def convolve(
    x: Float[Array, "batch z y x cin"],
    kernel: Float[Array, "kz ky kx cin cout"],
    stride: tuple[int, ...],
) -> Float[Array, "batch zo yo xo cout"]:
    """Cross-correlate with zero padding ``(k - 1) // 2`` on both sides; ``k`` odd."""
    x = _whole_steps(x, stride)
    depth, *plane = stride  # the phases of a plane are as well left to the 2-D convolution
    return _sum(
        [
            _correlate(phase.of(x), kernel[phase.taps], phase.first, tuple(plane))
            for phase in _phases(kernel.shape[:3], (depth, 1, 1))
        ]
    )


def input_grad(
    grad: Float[Array, "batch zo yo xo cout"],
    kernel: Float[Array, "kz ky kx cin cout"],
    stride: tuple[int, ...],
    space_in: tuple[int, ...],
) -> Float[Array, "batch z y x cin"]:
    """Gradient of :func:`convolve` with respect to ``x``, whose spatial size is ``space_in``."""
    found = {}
    for phase in _phases(kernel.shape[:3], stride):
        part = kernel[phase.taps]
        last = [f + k - 1 for f, k in zip(phase.first, part.shape, strict=False)]
        turned = jnp.flip(part, (0, 1, 2)).swapaxes(-1, -2)
        found[phase.offset] = _correlate(grad, turned, tuple(-n for n in last))
    z, y, x = space_in
    return _interleaved(found, stride)[:, :z, :y, :x]


def kernel_grad(
    x: Float[Array, "batch z y x cin"],
    grad: Float[Array, "batch zo yo xo cout"],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
) -> Float[Array, "kz ky kx cin cout"]:
    """Gradient of :func:`convolve` with respect to ``kernel``."""
    x = _whole_steps(x, stride)
    parts = []
    for phase in _phases(kernel_size, stride):
        places = [range(k)[t] for k, t in zip(kernel_size, phase.taps, strict=True)]
        size = tuple(map(len, places))
        found = _correlate_kernel_grad(phase.of(x), grad, size, phase.first)
        ends = [(p[0], k - 1 - p[-1]) for k, p in zip(kernel_size, places, strict=True)]
        gaps = [(*end, s - 1) for end, s in zip(ends, stride, strict=True)]
        parts.append(lax.pad(found, jnp.zeros((), found.dtype), [*gaps, (0, 0, 0), (0, 0, 0)]))
    return _sum(parts)


# --------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class _Phase:
    """Voxels ``offset + stride * i`` of the input, the kernel's taps on them, their first shift."""

    offset: tuple[int, ...]
    stride: tuple[int, ...]
    taps: tuple[slice, ...]
    first: tuple[int, ...]

    def of(self, x: Array) -> Array:
        cuts = [slice(o, None, s) for o, s in zip(self.offset, self.stride, strict=True)]
        return x[:, cuts[0], cuts[1], cuts[2]]


def _phases(kernel_size: Sequence[int], stride: tuple[int, ...]) -> Iterator[_Phase]:
    """The phases that the kernel reaches; one, all of it, without a stride."""
    for offset in itertools.product(*map(range, stride)):
        taps, first = [], []
        for size, step, start in zip(kernel_size, stride, offset, strict=True):
            pad = (size - 1) // 2
            lowest = (start + pad) % step
            taps.append(slice(lowest, size, step))
            first.append((lowest - pad - start) // step)
        if all(t.start < k for t, k in zip(taps, kernel_size, strict=True)):
            yield _Phase(offset, stride, tuple(taps), tuple(first))


def _whole_steps(x: Array, stride: tuple[int, ...]) -> Array:
    """Add zeros at the end, so that all phases have one size."""
    ends = [(0, -n % s) for n, s in zip(x.shape[1:4], stride, strict=True)]
    return jnp.pad(x, [(0, 0), *ends, (0, 0)]) if any(end for _, end in ends) else x


def _interleaved(phases: dict[tuple[int, ...], Array], stride: tuple[int, ...]) -> Array:
    """Put the phases of an array back in their places; what no phase gives is zero."""
    one = next(iter(phases.values()))
    if math.prod(stride) == 1:
        return one
    zeros = jnp.zeros_like(one)

    def merged(start: tuple[int, ...]) -> Array:
        axis = len(start)
        if axis == 3:
            return phases.get(start, zeros)
        parts = [merged((*start, i)) for i in range(stride[axis])]
        made = jnp.stack(parts, axis + 2)
        return made.reshape(*made.shape[: axis + 1], -1, *made.shape[axis + 3 :])

    return merged(())


# ------------------------------------------------------- correlation of one size, with shifts


def _correlate(
    x: Array, kernel: Array, first: tuple[int, ...], plane_stride: tuple[int, ...] = (1, 1)
) -> Array:
    """``y[v] = sum over taps t of x[v + first + t] @ kernel[t]``, zero outside.

    Of planes only every ``plane_stride``-th y and x are computed.
    """
    if kernel.shape[-2] <= FEW_CHANNELS:
        return _sum_of_taps(x, kernel, first)[:, :, :: plane_stride[0], :: plane_stride[1]]
    in_depth = kernel.shape[0] == 3 and first[0] == -1 and x.shape[1] > 1
    channels, voxels = min(kernel.shape[-2:]), math.prod(x.shape[:-1])
    if (
        plane_stride == (1, 1)
        and in_depth
        and channels >= WINOGRAD_CHANNELS
        and voxels >= WINOGRAD_VOXELS
    ):
        return _winograd(x, kernel, first)
    return _side_by_side(x, kernel, first, plane_stride)


def _correlate_kernel_grad(
    x: Array, grad: Array, size: tuple[int, ...], first: tuple[int, ...]
) -> Array:
    """Gradient of :func:`_correlate` for its kernel: one 2-D one, shifted grads side by side."""
    cin, cout = x.shape[-1], grad.shape[-1]
    shifted = [_shifted(grad, -first[0] - tap) for tap in range(size[0])]
    slices, wide = (a.reshape(-1, *a.shape[2:]) for a in (x, jnp.concatenate(shifted, -1)))
    padding = _padding(first, size[1:])
    found = lax.conv_general_dilated(
        slices, wide, (1, 1), padding, dimension_numbers=("CHWN", "IHWO", "HWNC")
    )
    return jnp.moveaxis(found.reshape(*size[1:], cin, size[0], cout), 3, 0)


def _planes(
    x: Array, kernel: Array, first: tuple[int, ...], stride: tuple[int, ...] = (1, 1)
) -> Array:
    """Correlate depth slices (slices, y, x, cin) with a kernel (ky, kx, cin, cout)."""
    padding = _padding(first, kernel.shape[:2])
    return lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _padding(first: tuple[int, ...], size: Sequence[int]) -> list[tuple[int, int]]:
    """Padding in the plane that keeps its size, or makes a kernel's of two planes."""
    return [(-f, k - 1 + f) for f, k in zip(first[1:], size, strict=True)]


def _sum_of_taps(x: Array, kernel: Array, first: tuple[int, ...]) -> Array:
    """Shifted inputs times the kernel's taps, one sum in one pass."""
    size = kernel.shape[:3]
    around = [(max(0, -f), max(0, f + k - 1)) for f, k in zip(first, size, strict=True)]
    padded = jnp.pad(x, [(0, 0), *around, (0, 0)])
    starts = [f + before for f, (before, _) in zip(first, around, strict=True)]
    terms = []
    for tap in itertools.product(*map(range, size)):
        low = [start + t for start, t in zip(starts, tap, strict=True)]
        cuts = [slice(a, a + n) for a, n in zip(low, x.shape[1:4], strict=True)]
        shifted = padded[:, cuts[0], cuts[1], cuts[2]]
        terms += [shifted[..., c : c + 1] * kernel[tap][c] for c in range(x.shape[-1])]
    return _sum(terms)


def _side_by_side(
    x: Array, kernel: Array, first: tuple[int, ...], stride: tuple[int, ...]
) -> Array:
    """One 2-D convolution with the planes of the kernel side by side; shift the results, add."""
    batch, depth = x.shape[:2]
    taps, channels = kernel.shape[0], kernel.shape[-1]
    wide = jnp.moveaxis(kernel, 0, -2).reshape(*kernel.shape[1:4], taps * channels)
    planes = _planes(x.reshape(batch * depth, *x.shape[2:]), wide, first, stride)
    planes = planes.reshape(batch, depth, *planes.shape[1:])
    return _sum(
        [
            _shifted(planes[..., tap * channels : (tap + 1) * channels], first[0] + tap)
            for tap in range(taps)
        ]
    )


def _shifted(x: Array, shift: int) -> Array:
    """``y[:, d] = x[:, d + shift]``, zero outside."""
    if not shift:
        return x
    depth = x.shape[1]
    before, after = min(max(-shift, 0), depth), min(max(shift, 0), depth)
    return jnp.pad(x[:, after : depth - before], [(0, 0), (before, after)] + [(0, 0)] * 3)


def _sum(arrays: Sequence[Array]) -> Array:
    return reduce(add, arrays)


# ------------------------------------------------------------------------------------- Winograd


def _winograd(x: Array, kernel: Array, first: tuple[int, ...]) -> Array:
    """Winograd's F(4, 3) along depth: 6 planes of products for 4 slices instead of 12."""
    batch, depth = x.shape[:2]
    tile = min(WINOGRAD_TILE, depth)
    output_of, kernel_of, input_of = winograd_matrices(tile)
    tiles = -(-depth // tile)
    x = jnp.pad(x, [(0, 0), (1, tiles * tile - depth + 1)] + [(0, 0)] * 3)
    slices = [x[:, i : i + (tiles - 1) * tile + 1 : tile] for i in range(tile + 2)]
    slices = [s.reshape(batch * tiles, *x.shape[2:]) for s in slices]
    products = [
        _planes(_combined(values, slices), _combined(taps, list(kernel)), first)
        for values, taps in zip(input_of, kernel_of, strict=True)
    ]
    made = jnp.stack([_combined(weights, products) for weights in output_of], 1)
    return made.reshape(batch, tiles * tile, *made.shape[2:])[:, :depth]


@lru_cache
def winograd_matrices(tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output (tile, n), kernel (n, 3) and input (n, n) transforms of F(tile, 3), n = tile + 2.

    ``output @ ((kernel @ k) * (input @ x))`` is the correlation of n values with 3 taps: the
    Toom-Cook construction on the points 0, +-POINTS and infinity.
    """
    points = [0.0, *(sign * p for p in POINTS for sign in (1, -1))][: tile + 1]
    count = tile + 2
    output, taps, values = np.zeros((tile, count)), np.zeros((count, 3)), np.zeros((count, count))
    for i, point in enumerate(points):
        others = [q for q in points if q != point]
        taps[i] = point ** np.arange(3) / math.prod(point - q for q in others)
        output[:, i] = point ** np.arange(tile)
        values[i, : count - 1] = np.polynomial.polynomial.polyfromroots(others)
    taps[-1, 2] = output[-1, -1] = 1
    values[-1] = np.polynomial.polynomial.polyfromroots(points)
    return output, taps, values


def _combined(weights: np.ndarray, arrays: Sequence[Array]) -> Array:
    """Sum of arrays with static weights."""
    pairs = [(w, a) for w, a in zip(weights.tolist(), arrays, strict=True) if w]
    return _sum([a if w == 1 else a * w for w, a in pairs])
