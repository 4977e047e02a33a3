"""The residual-encoder and the plain U-Net of nnU-Net (spec 01 §1); the only importer of flax.

Elsewhere a network is a :class:`Net` (static, hashable) and its parameters a nested dict of float32
arrays with ``str`` keys, named so that nnU-Net's state dict maps to them by a table (spec 01 §2.6).
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from panther_jax.network.convolution import (
    Backend,
    average_pool,
    convolve,
    default_backend,
    upsample,
)
from panther_jax.plans.architecture import NETWORKS, ArchSpec

Params = dict[str, Any]
"""Nested dict of float32 arrays; list positions are string keys."""

LEAKY_GAIN = (2.0 / (1.0 + 0.01**2)) ** 0.5


@dataclass(frozen=True)
class Execution:
    """How a network computes, as opposed to what: it changes results by rounding only.

    ``exact_stats`` takes the variance in a second pass, as the reference does; one pass is faster
    and agrees to about 1e-6 relative.
    """

    backend: Backend = "xla"
    dtype: Literal["float32", "bfloat16"] = "float32"
    exact_stats: bool = False

    @staticmethod
    def auto(dtype: str = "auto", *, space: int = 1) -> "Execution":
        """The usual choice for this machine: bfloat16 on accelerators, float32 on CPU."""
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return Execution(default_backend(space), dtype)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Net:
    """A network without its parameters: the argument ``net`` of :func:`apply`."""

    arch: ArchSpec
    execution: Execution = Execution()


# --------------------------------------------------------------------------------- parameters


class Kernel(nnx.Module):
    """A kernel ``(*size, in, out)`` and an optional bias."""

    def __init__(self, size: tuple[int, ...], channels: tuple[int, int], *, bias: bool):
        self.kernel = nnx.Param(jnp.zeros((*size, *channels)))
        self.bias = nnx.Param(jnp.zeros(channels[1])) if bias else None


class Affine(nnx.Module):
    """Scale and shift of an instance norm."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))


class ConvNormAct(nnx.Module):
    """Convolution, instance norm, non-linearity: the unit everything is made of (spec 01 §1.2)."""

    def __init__(
        self,
        arch: ArchSpec,
        channels: tuple[int, int],
        size: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        *,
        bias: bool | None = None,
        act: bool = True,
    ):
        self.arch, self.act = arch, act
        self.stride = stride or (1,) * arch.ndim
        self.conv = Kernel(size, channels, bias=arch.conv_bias if bias is None else bias)
        self.norm = Affine(channels[1]) if arch.has_norm and arch.norm_affine else None

    def __call__(self, x: Array, how: Execution, add: Array | None = None) -> Array:
        """Apply the unit; ``add`` is added before the non-linearity (the residual connection)."""
        arch, act_first = self.arch, self.arch.nonlin_first and self.act and self.arch.has_norm
        y = convolve(x, self.conv.kernel[...], self.stride, how.backend)
        # A bias in front of an instance norm has no effect (spec 08 §8.3.3).
        if self.conv.bias is not None and (act_first or not arch.has_norm):
            y = y + self.conv.bias[...].astype(y.dtype)
        if act_first:
            y = activate(y, arch)
        if arch.has_norm:
            y = instance_norm(y, self.norm, arch.norm_eps, exact_stats=how.exact_stats)
        if add is not None:
            y = y + add
        if self.act and not act_first:
            y = activate(y, arch)
        return y.astype(x.dtype)


def instance_norm(x: Array, affine: Affine | None, eps: float, *, exact_stats: bool) -> Array:
    """Normalise each sample and channel over the spatial axes; float32 statistics and result."""
    axes = tuple(range(1, x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes, keepdims=True)
    if exact_stats:
        variance = jnp.mean(jnp.square(wide - mean), axes, keepdims=True)
    else:
        variance = jnp.mean(jnp.square(wide), axes, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0.0)
    scale = jax.lax.rsqrt(variance + eps)
    if affine is None:
        return (wide - mean) * scale
    scale = scale * affine.scale[...]
    if exact_stats:
        return (wide - mean) * scale + affine.bias[...]
    return wide * scale + (affine.bias[...] - mean * scale)


def activate(x: Array, arch: ArchSpec) -> Array:
    """The architecture's non-linearity."""
    if arch.nonlin is None:
        return x
    if arch.nonlin in ("gelu", "silu"):
        return jax.nn.gelu(x, approximate=False) if arch.nonlin == "gelu" else jax.nn.silu(x)
    slope = arch.negative_slope if arch.nonlin == "leaky_relu" else 0.0
    return jnp.where(x >= 0, x, slope * x)


# ------------------------------------------------------------------------------------ modules


class Skip(nnx.Module):
    """Average pool if strided, then a 1x1 convolution without bias if channels change."""

    def __init__(self, arch: ArchSpec, channels: tuple[int, int], stride: tuple[int, ...]):
        self.stride = stride
        point = ConvNormAct(arch, channels, (1,) * arch.ndim, bias=False, act=False)
        self.conv = point.conv
        self.norm = point.norm
        self.arch = arch

    def __call__(self, x: Array, how: Execution) -> Array:
        """Apply pool, convolution and norm."""
        if any(s != 1 for s in self.stride):
            x = average_pool(x, self.stride)
        y = convolve(x, self.conv.kernel[...], (1,) * self.arch.ndim, how.backend)
        if self.arch.has_norm:
            y = instance_norm(y, self.norm, self.arch.norm_eps, exact_stats=how.exact_stats)
        return y


class ResidualBlock(nnx.Module):
    """BasicBlockD, or BottleneckD where ``squeeze`` gives the inner channels (spec 01 §1.3)."""

    def __init__(
        self,
        arch: ArchSpec,
        channels: tuple[int, int],
        size: tuple[int, ...],
        stride: tuple[int, ...],
        squeeze: int | None,
    ):
        cin, cout = channels
        point = (1,) * arch.ndim
        self.stride, self.arch = stride, arch
        if squeeze is None:
            self.conv1 = ConvNormAct(arch, (cin, cout), size, stride)
            self.conv2 = ConvNormAct(arch, (cout, cout), size)
            self.conv3 = None
        else:
            self.conv1 = ConvNormAct(arch, (cin, squeeze), point)
            self.conv2 = ConvNormAct(arch, (squeeze, squeeze), size, stride)
            self.conv3 = ConvNormAct(arch, (squeeze, cout), point)
        self.skip = Skip(arch, channels, stride) if cin != cout else None

    def __call__(self, x: Array, how: Execution) -> Array:
        """Apply the block."""
        if self.skip is not None:
            shortcut = self.skip(x, how)
        elif any(s != 1 for s in self.stride):
            shortcut = average_pool(x, self.stride)
        else:
            shortcut = x
        y = self.conv1(x, how)
        if self.conv3 is None:
            return self.conv2(y, how, add=shortcut)
        return self.conv3(self.conv2(y, how), how, add=shortcut)


class ResidualStage(nnx.Module):
    """Residual blocks; the first one strides and changes channels."""

    def __init__(self, arch: ArchSpec, stage: int, cin: int):
        cout, size = arch.features[stage], arch.kernel_sizes[stage]
        squeeze = arch.bottleneck_channels[stage] if arch.bottleneck_channels else None
        unit = (1,) * arch.ndim
        self.blocks = nnx.List(
            ResidualBlock(
                arch,
                (cin if b == 0 else cout, cout),
                size,
                arch.strides[stage] if b == 0 else unit,
                squeeze,
            )
            for b in range(arch.blocks[stage])
        )

    def __call__(self, x: Array, how: Execution) -> Array:
        """Apply all blocks."""
        for block in self.blocks:
            x = block(x, how)
        return x


class ConvStage(nnx.Module):
    """Convolution units in sequence; the first one strides and changes channels."""

    def __init__(
        self,
        arch: ArchSpec,
        channels: tuple[int, int],
        size: tuple[int, ...],
        *,
        stride: tuple[int, ...] | None = None,
        count: int,
    ):
        cin, cout = channels
        self.convs = nnx.List(
            ConvNormAct(arch, (cin if c == 0 else cout, cout), size, stride if c == 0 else None)
            for c in range(count)
        )

    def __call__(self, x: Array, how: Execution) -> Array:
        """Apply all units."""
        for unit in self.convs:
            x = unit(x, how)
        return x


class Encoder(nnx.Module):
    """Stem (residual network only) and stages; every stage's output is a skip connection."""

    def __init__(self, arch: ArchSpec):
        residual = arch.network == "ResidualEncoderUNet"
        stem = (arch.stem_channels or arch.features[0]) if residual else arch.in_channels
        self.stem = (
            ConvNormAct(arch, (arch.in_channels, stem), arch.kernel_sizes[0]) if residual else None
        )
        cin = stem
        stages: list[ResidualStage | ConvStage] = []
        for s, cout in enumerate(arch.features):
            if residual:
                stages.append(ResidualStage(arch, s, cin))
            else:
                stages.append(
                    ConvStage(
                        arch,
                        (cin, cout),
                        arch.kernel_sizes[s],
                        stride=arch.strides[s],
                        count=arch.blocks[s],
                    )
                )
            cin = cout
        self.stages = nnx.List(stages)

    def __call__(self, x: Array, how: Execution) -> list[Array]:
        """The output of every stage, highest resolution first."""
        if self.stem is not None:
            x = self.stem(x, how)
        skips = []
        for stage in self.stages:
            x = stage(x, how)
            skips.append(x)
        return skips


class Decoder(nnx.Module):
    """Up-sampling, concatenation ``[upsampled, skip]``, convolutions, one head a stage."""

    def __init__(self, arch: ArchSpec):
        self.arch = arch
        ups, stages, heads = [], [], []
        for t in range(arch.num_stages - 1):
            low, high = arch.features[-1 - t], arch.features[-2 - t]
            ups.append(Kernel(arch.strides[-1 - t], (low, high), bias=arch.conv_bias))
            stages.append(
                ConvStage(
                    arch, (2 * high, high), arch.kernel_sizes[-2 - t], count=arch.decoder_convs[t]
                )
            )
            heads.append(Kernel((1,) * arch.ndim, (high, arch.num_outputs), bias=True))
        self.transpconvs = nnx.List(ups)
        self.stages = nnx.List(stages)
        self.heads = nnx.List(heads)

    def __call__(self, skips: list[Array], how: Execution, *, full_only: bool) -> list[Array]:
        """Logits of every stage, highest resolution first."""
        x, outputs = skips[-1], []
        last = len(self.stages) - 1
        for t, stage in enumerate(self.stages):
            up = self.transpconvs[t]
            x = upsample(x, up.kernel[...])
            if up.bias is not None:
                x = x + up.bias[...].astype(x.dtype)
            x = stage(jnp.concatenate([x, skips[-2 - t]], axis=-1), how)
            if t == last or not full_only:
                head = self.heads[t]
                logits = jnp.einsum(
                    "...i,io->...o",
                    x,
                    head.kernel[...].reshape(head.kernel.shape[-2:]).astype(x.dtype),
                    preferred_element_type=jnp.float32,
                )
                outputs.append(logits + head.bias[...])
        return outputs[::-1]


class UNet(nnx.Module):
    """Encoder and decoder; logits come out float32, highest resolution first."""

    def __init__(self, arch: ArchSpec):
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)

    def __call__(self, x: Array, how: Execution, *, full_only: bool) -> list[Array]:
        """Logits of every decoder stage, highest resolution first."""
        skips = self.encoder(x.astype(how.dtype), how)
        return self.decoder(skips, how, full_only=full_only)


# ----------------------------------------------------------------------------- the contract


def build(arch: ArchSpec, execution: Execution | None = None) -> Net:
    """The network of an architecture; no array is allocated."""
    return Net(arch, execution or Execution())


@cache
def _graph(arch: ArchSpec) -> tuple[nnx.GraphDef, tuple[tuple[tuple[Any, ...], Any], ...]]:
    make = NETWORKS.added(arch.network) or UNet
    graph, state = nnx.split(nnx.eval_shape(lambda: make(arch)))
    return graph, tuple((path, leaf) for path, leaf in nnx.to_flat_state(state))


def param_shapes(arch: ArchSpec) -> Params:
    """The parameter tree with ``jax.ShapeDtypeStruct`` leaves."""
    tree: Params = {}
    for path, leaf in _graph(arch)[1]:
        _insert(tree, tuple(map(str, path)), jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
    return tree


def init_params(arch: ArchSpec, key: Key[Array, ""]) -> Params:
    """Random parameters by the reference's rules (spec 01 §1.8); a leaf depends on its name alone.

    He-normal kernels, where the fan-in of a transposed convolution uses its *output* channels;
    zero biases; unit norm scales, but zero for the last norm of each residual block. Drawn on the
    host: the same on every device, and nothing to compile for each shape.
    """
    seed = np.asarray(jax.random.key_data(key)).tolist()
    tree: Params = {}
    for path, struct in walk(param_shapes(arch)):
        rng = np.random.default_rng((*seed, zlib.crc32("/".join(path).encode())))
        _insert(tree, path, jnp.asarray(_initial(arch, path, struct.shape, rng)))
    return tree


def _initial(
    arch: ArchSpec, path: tuple[str, ...], shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    if path[-1] == "bias":
        return np.zeros(shape, np.float32)
    if path[-1] == "scale":
        last = "conv3" if arch.bottleneck_channels else "conv2"
        ends_block = path[-3:-2] == (last,)
        return np.full(shape, 0.0 if ends_block else 1.0, np.float32)
    fan_channels = shape[-1] if "transpconvs" in path else shape[-2]
    fan_in = fan_channels * math.prod(shape[:-2])
    return rng.standard_normal(shape, np.float32) * np.float32(LEAKY_GAIN / fan_in**0.5)


def apply(
    net: Net,
    params: Mapping[str, Any],
    x: Float[Array, "batch *space channel"],
    *,
    full_only: bool = False,
) -> tuple[Float[Array, "..."], ...]:
    """Logits ``(batch, *spatial, output)`` of every decoder stage, highest resolution first.

    Float32. Pure; ``net`` is static. ``full_only`` evaluates the full-resolution head alone.

    Raises:
        PlansError: if the spatial size is not divisible by the network's strides.
        ValueError: if the number of channels is not the network's.
    """
    if x.shape[-1] != net.arch.in_channels:
        raise ValueError(
            f"image has {x.shape[-1]} channels, the network takes {net.arch.in_channels}"
        )
    net.arch.check_patch(x.shape[1:-1])
    graph, leaves = _graph(net.arch)
    flat = [(path, nnx.Param(_lookup(params, path))) for path, _ in leaves]
    module = nnx.merge(graph, nnx.from_flat_state(flat))
    return tuple(module(x, net.execution, full_only=full_only))


def walk(
    tree: Mapping[str, Any], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and leaves of a nested dict, in order of insertion."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from walk(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def count_params(arch: ArchSpec) -> int:
    """Number of trainable values."""
    return sum(math.prod(s.shape) for _, s in walk(param_shapes(arch)))


def _insert(tree: Params, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def _lookup(tree: Mapping[str, Any], path: tuple[Any, ...]) -> Any:
    node: Any = tree
    for name in path:
        node = node[str(name)]
    return node
