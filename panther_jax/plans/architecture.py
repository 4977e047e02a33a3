"""The architecture of a U-Net, read from and written to nnU-Net's ``architecture`` block.

A frozen data type: no arrays, no JAX. Import paths in the block are looked up in tables, never
imported (spec 01 §1.1).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from panther_jax.base import plugins
from panther_jax.base.errors import PlansError
from panther_jax.base.registry import Registry

CONV_OPS = {"torch.nn.modules.conv.Conv3d": 3, "torch.nn.modules.conv.Conv2d": 2}
NORM_OPS = {
    "torch.nn.modules.instancenorm.InstanceNorm3d": 3,
    "torch.nn.modules.instancenorm.InstanceNorm2d": 2,
}
DROPOUT_OPS = {"torch.nn.modules.dropout.Dropout3d": 3, "torch.nn.modules.dropout.Dropout2d": 2}
NONLINEARITIES = {
    "torch.nn.LeakyReLU": "leaky_relu",
    "torch.nn.modules.activation.LeakyReLU": "leaky_relu",
    "torch.nn.ReLU": "relu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.GELU": "gelu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.SiLU": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
}
NONLINEARITY_NAMES = {
    "leaky_relu": "torch.nn.LeakyReLU",
    "relu": "torch.nn.ReLU",
    "gelu": "torch.nn.GELU",
    "silu": "torch.nn.SiLU",
}
NETWORK_MODULE = "dynamic_network_architectures.architectures.unet."
NETWORKS: Registry[Callable[..., Any]] = Registry(
    "network class",
    ("ResidualEncoderUNet", "PlainConvUNet"),
    remedy=f"{plugins.HINT}; @panther_jax.config.NETWORKS.add('NAME') above a module that takes an "
    "ArchSpec adds one",
)
"""Networks by class name: nnU-Net's, which `network.unet` builds, and what a user's file adds."""
TORCH_LEAKY_SLOPE = 0.01
MAX_STAGES = 20
SIZES = ("strides", "kernel_sizes")  # an entry an axis


@dataclass(frozen=True)
class ArchSpec:
    """A U-Net as ``model.build`` needs it (spec 01 §1). Hashable: the key of compiled functions.

    ``blocks`` are residual blocks (ResidualEncoderUNet) or convolutions (PlainConvUNet) an encoder
    stage; ``bottleneck_channels`` selects BottleneckD blocks. Dropout is recorded because it shifts
    names in weight files; it is the identity at inference.
    """

    network: str
    in_channels: int
    num_outputs: int
    features: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    bottleneck_channels: tuple[int, ...] | None = None
    stem_channels: int | None = None
    conv_bias: bool = True
    has_norm: bool = True
    norm_eps: float = 1e-5
    norm_affine: bool = True
    nonlin: Literal["leaky_relu", "relu", "gelu", "silu"] | None = "leaky_relu"
    negative_slope: float = TORCH_LEAKY_SLOPE
    nonlin_first: bool = False
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        n = self.num_stages
        lengths = {
            "kernel_sizes": self.kernel_sizes,
            "strides": self.strides,
            "blocks": self.blocks,
        }
        for name, value in lengths.items():
            if len(value) != n:
                raise PlansError(
                    f"architecture: {name} has {len(value)} entries for {n} stages, expected {n}"
                )
        if not 1 <= n <= MAX_STAGES:
            raise PlansError(f"architecture: {n} stages; expected 1 to {MAX_STAGES}")
        if len(self.decoder_convs) != n - 1:
            raise PlansError(
                f"architecture: decoder has {len(self.decoder_convs)} entries, expected {n - 1} "
                f"for {n} stages"
            )
        if self.bottleneck_channels is not None and len(self.bottleneck_channels) != n:
            raise PlansError(
                f"architecture: bottleneck_channels has {len(self.bottleneck_channels)} entries "
                f"for {n} stages"
            )
        dims = {len(k) for k in self.kernel_sizes} | {len(s) for s in self.strides}
        if len(dims) != 1 or dims & {2, 3} != dims:
            raise PlansError(
                f"architecture: kernels {self.kernel_sizes} and strides {self.strides} must all "
                "have 2 or all have 3 axes"
            )
        for name in ("features", "blocks", "decoder_convs", "strides", "kernel_sizes"):
            value = getattr(self, name)
            if any(v < 1 for entry in value for v in (entry if name in SIZES else (entry,))):
                raise PlansError(f"architecture: {name} must be positive, found {value}")
        if any(k % 2 == 0 for kernel in self.kernel_sizes for k in kernel):
            raise PlansError(f"architecture: kernel sizes must be odd, found {self.kernel_sizes}")

    @property
    def num_stages(self) -> int:
        """Encoder stages, the bottleneck included."""
        return len(self.features)

    @property
    def ndim(self) -> int:
        """Spatial axes: 2 or 3."""
        return len(self.strides[0])

    @property
    def divisor(self) -> tuple[int, ...]:
        """Input sizes must be multiples of this, an axis: the product of all strides."""
        return tuple(math.prod(s[a] for s in self.strides) for a in range(self.ndim))

    @property
    def output_strides(self) -> tuple[tuple[int, ...], ...]:
        """Down-sampling factor of each deep-supervision output, highest resolution first."""
        factors, current = [], (1,) * self.ndim
        for stride in self.strides[:-1]:
            current = tuple(c * s for c, s in zip(current, stride, strict=True))
            factors.append(current)
        return tuple(factors)

    def check_patch(self, patch: Sequence[int]) -> None:
        """Raise :class:`PlansError` if the network cannot take a patch of this size."""
        if len(patch) != self.ndim:
            raise PlansError(f"patch {tuple(patch)} has {len(patch)} axes, the network {self.ndim}")
        if any(p % d or p <= 0 for p, d in zip(patch, self.divisor, strict=True)):
            raise PlansError(
                f"patch {tuple(patch)} is not divisible by the network's strides {self.divisor}; "
                "choose a patch size that is a multiple of them"
            )
        if math.prod(p // d for p, d in zip(patch, self.divisor, strict=True)) < 2:
            raise PlansError(
                f"patch {tuple(patch)} leaves a single voxel at the lowest resolution, where "
                "instance norm is undefined; choose a larger patch or fewer stages"
            )

    @staticmethod
    def from_nnunet(
        architecture: Mapping[str, Any], *, in_channels: int, num_outputs: int
    ) -> "ArchSpec":
        """Read an nnU-Net ``architecture`` block (spec 01 §1.1).

        Raises:
            PlansError: on an unknown network class, import path, or inconsistent lists.
        """
        name = str(architecture.get("network_class_name", "")).rsplit(".", 1)[-1]
        if name not in NETWORKS.names:
            raise PlansError(f"architecture: {NETWORKS.unknown(name)}")
        kwargs = _options(architecture, "arch_kwargs")
        residual = name == "ResidualEncoderUNet"
        blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
        n = _num_stages(kwargs, blocks)
        ndim = _known("conv_op", kwargs.get("conv_op"), CONV_OPS)
        norm_kwargs = _options(kwargs, "norm_op_kwargs")
        nonlin_kwargs = _options(kwargs, "nonlin_kwargs")
        dropout_kwargs = _options(kwargs, "dropout_op_kwargs")
        if kwargs.get("norm_op") is not None:
            _known("norm_op", kwargs["norm_op"], NORM_OPS)
        dropout = kwargs.get("dropout_op")
        if dropout is not None:
            _known("dropout_op", dropout, DROPOUT_OPS)
        nonlin = kwargs.get("nonlin")
        return ArchSpec(
            network=name,
            in_channels=in_channels,
            num_outputs=num_outputs,
            features=_per_stage(kwargs, "features_per_stage", n),
            kernel_sizes=_per_stage_axes(kwargs, "kernel_sizes", n, ndim),
            strides=_strides(kwargs, n, ndim),
            blocks=_per_stage(kwargs, blocks, n),
            decoder_convs=_per_stage(kwargs, "n_conv_per_stage_decoder", n - 1),
            bottleneck_channels=_bottleneck(kwargs, n) if residual else None,
            stem_channels=_stem_channels(kwargs) if residual else None,
            conv_bias=bool(kwargs.get("conv_bias", False)),
            has_norm=kwargs.get("norm_op") is not None,
            norm_eps=_number({"eps": 1e-5, **norm_kwargs}, "eps", float),
            norm_affine=bool(norm_kwargs.get("affine", False)),
            nonlin=None if nonlin is None else _nonlinearity(nonlin, nonlin_kwargs),
            negative_slope=_number(
                {"negative_slope": TORCH_LEAKY_SLOPE, **nonlin_kwargs}, "negative_slope", float
            ),
            nonlin_first=bool(kwargs.get("nonlin_first", False)) and not residual,
            dropout_rate=(
                0.0 if dropout is None else _number({"p": 0.5, **dropout_kwargs}, "p", float)
            ),
        )

    def to_nnunet(self) -> dict[str, Any]:
        """The ``architecture`` block that nnU-Net builds this network from."""
        residual = self.network == "ResidualEncoderUNet"
        imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
        kwargs: dict[str, Any] = {
            "n_stages": self.num_stages,
            "features_per_stage": list(self.features),
            "conv_op": f"torch.nn.modules.conv.Conv{self.ndim}d",
            "kernel_sizes": [list(k) for k in self.kernel_sizes],
            "strides": [list(s) for s in self.strides],
            ("n_blocks_per_stage" if residual else "n_conv_per_stage"): list(self.blocks),
            "n_conv_per_stage_decoder": list(self.decoder_convs),
            "conv_bias": self.conv_bias,
            "norm_op": (
                f"torch.nn.modules.instancenorm.InstanceNorm{self.ndim}d" if self.has_norm else None
            ),
            "norm_op_kwargs": (
                {"eps": self.norm_eps, "affine": self.norm_affine} if self.has_norm else None
            ),
            "dropout_op": (
                f"torch.nn.modules.dropout.Dropout{self.ndim}d" if self.dropout_rate else None
            ),
            "dropout_op_kwargs": {"p": self.dropout_rate} if self.dropout_rate else None,
            "nonlin": NONLINEARITY_NAMES[self.nonlin] if self.nonlin else None,
            "nonlin_kwargs": {"inplace": True} if self.nonlin else None,
        }
        if self.nonlin == "gelu":
            kwargs["nonlin_kwargs"] = {}  # torch's takes no "inplace"
        if self.nonlin == "leaky_relu" and self.negative_slope != TORCH_LEAKY_SLOPE:
            kwargs["nonlin_kwargs"]["negative_slope"] = self.negative_slope
        if self.nonlin_first:
            kwargs["nonlin_first"] = True
        if self.bottleneck_channels is not None:
            kwargs["block"] = "dynamic_network_architectures.building_blocks.residual.BottleneckD"
            kwargs["bottleneck_channels"] = list(self.bottleneck_channels)
            imports.append("block")
        if self.stem_channels is not None:
            kwargs["stem_channels"] = self.stem_channels
        return {
            "network_class_name": self.network
            if NETWORKS.added(self.network)
            else NETWORK_MODULE + self.network,
            "arch_kwargs": kwargs,
            "_kw_requires_import": imports,
        }


def _num_stages(kwargs: Mapping[str, Any], blocks: str) -> int:
    """The number of stages; makes sure that the entries a stage are there."""
    lists = ("features_per_stage", "kernel_sizes", "strides", blocks, "n_conv_per_stage_decoder")
    for key in ("n_stages", *lists):
        if key not in kwargs:
            raise PlansError(
                f"architecture: arch_kwargs lacks {key!r}; copy the plans.json of the model"
            )
    count = _number(kwargs, "n_stages", int)
    if not 1 <= count <= MAX_STAGES:
        raise PlansError(f"architecture: n_stages is {count}; expected 1 to {MAX_STAGES}")
    return count


def _stem_channels(kwargs: Mapping[str, Any]) -> int | None:
    given = kwargs.get("stem_channels") is not None
    return _number(kwargs, "stem_channels", int) if given else None


def _known(field: str, path: Any, table: Mapping[str, Any]) -> Any:
    if not isinstance(path, str) or path not in table:
        raise PlansError(
            f"architecture: {field} {path!r} is not supported; expected one of {', '.join(table)}"
        )
    return table[path]


def _strides(kwargs: Mapping[str, Any], count: int, ndim: int) -> tuple[tuple[int, ...], ...]:
    strides = _per_stage_axes(kwargs, "strides", count, ndim)
    if strides and any(step > 1 for step in strides[0]):
        raise PlansError(
            f"architecture: the first stage has strides {strides[0]}, so that the output would be "
            "smaller than the input, which is not supported (nor does nnU-Net predict so); "
            "expected 1 an axis"
        )
    return strides


def _nonlinearity(path: Any, kwargs: Mapping[str, Any]) -> Any:
    if kwargs.get("approximate", "none") != "none":
        raise PlansError(
            f"architecture: GELU with 'approximate' {kwargs['approximate']!r} is not supported; "
            "expected 'none'"
        )
    return _known("nonlin", path, NONLINEARITIES)


def _options(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = source.get(key) or {}
    if not isinstance(value, Mapping):
        raise PlansError(f"architecture: {key!r} is {value!r}; expected a JSON object")
    return value


def _number(source: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    try:
        return kind(source[key])
    except (TypeError, ValueError, OverflowError):
        raise PlansError(f"architecture: {key!r} is {source[key]!r}; expected a number") from None


def _per_stage(source: Mapping[str, Any], key: str, count: int) -> tuple[int, ...]:
    value = source[key]
    if isinstance(value, int):
        return (int(value),) * count
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        return tuple(int(v) for v in value)
    raise PlansError(f"architecture: {key!r} is {value!r}; expected an integer a stage")


def _per_stage_axes(
    source: Mapping[str, Any], key: str, count: int, ndim: int
) -> tuple[tuple[int, ...], ...]:
    value = source[key]
    if isinstance(value, int):
        return ((value,) * ndim,) * count
    try:
        entries = [(v,) * ndim if isinstance(v, int) else tuple(v) for v in value]
        return tuple(tuple(int(a) for a in entry) for entry in entries)
    except (TypeError, ValueError, OverflowError):
        raise PlansError(
            f"architecture: {key!r} is {value!r}; expected a list of integers a stage"
        ) from None


def _bottleneck(kwargs: Mapping[str, Any], num_stages: int) -> tuple[int, ...] | None:
    block = str(kwargs.get("block") or "BasicBlockD").rsplit(".", 1)[-1]
    if block not in ("BasicBlockD", "BottleneckD"):
        raise PlansError(f"architecture: block {block!r} is not BasicBlockD or BottleneckD")
    if block == "BasicBlockD":
        return None
    if kwargs.get("bottleneck_channels") is None:
        raise PlansError("architecture: BottleneckD blocks need 'bottleneck_channels'")
    return _per_stage(kwargs, "bottleneck_channels", num_stages)
