"""The same residual-encoder U-Net and loss in plain PyTorch: the peer where nnU-Net is missing.

Written after spec 01 and 03; parameters have nnU-Net's names, so that they load its state dicts.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from panther_jax.plans.architecture import ArchSpec


class Unit(nn.Module):
    """Convolution, instance norm, LeakyReLU."""

    def __init__(self, channels: tuple[int, int], kernel: int = 3, stride: int = 1, **how: bool):
        super().__init__()
        self.conv = nn.Conv3d(
            *channels, kernel, stride, padding=kernel // 2, bias=how.get("bias", True)
        )
        self.norm = nn.InstanceNorm3d(channels[1], eps=1e-5, affine=True)
        self.act = how.get("act", True)

    def forward(self, x: Any) -> Any:
        """Apply the unit."""
        y = self.norm(self.conv(x))
        return functional.leaky_relu(y, 0.01, inplace=True) if self.act else y


class Block(nn.Module):
    """Two units, a shortcut around them."""

    def __init__(self, channels: tuple[int, int], stride: int):
        super().__init__()
        self.conv1 = Unit(channels, 3, stride)
        self.conv2 = Unit((channels[1], channels[1]), act=False)
        skip: list[nn.Module] = [nn.AvgPool3d(stride)] if stride > 1 else []
        if channels[0] != channels[1]:
            skip.append(Unit(channels, 1, bias=False, act=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Any) -> Any:
        """Apply the block."""
        y = self.conv2(self.conv1(x)) + self.skip(x)
        return functional.leaky_relu(y, 0.01, inplace=True)


class Chain(nn.Module):
    """Modules in sequence, under the name that nnU-Net's state dicts have for them."""

    def __init__(self, name: str, modules: list[nn.Module]):
        super().__init__()
        self.parts = name
        setattr(self, name, nn.Sequential(*modules))

    def forward(self, x: Any) -> Any:
        """Apply all."""
        return getattr(self, self.parts)(x)


class Encoder(nn.Module):
    """Stem and stages; gives the output of every stage."""

    def __init__(self, arch: ArchSpec):
        super().__init__()
        channels = arch.features[0]
        self.stem = Chain("convs", [Unit((arch.in_channels, channels))])
        stages = []
        for features, blocks, stride in zip(arch.features, arch.blocks, arch.strides, strict=True):
            pairs = [(channels, features)] + [(features, features)] * (blocks - 1)
            strides = [stride[0]] + [1] * (blocks - 1)
            stages.append(Chain("blocks", list(map(Block, pairs, strides))))
            channels = features
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Any) -> list[Any]:
        """Outputs, highest resolution first."""
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class Decoder(nn.Module):
    """Upsampling, concatenation, units, a head at every resolution."""

    def __init__(self, arch: ArchSpec):
        super().__init__()
        pairs = list(zip(arch.features[::-1], arch.features[-2::-1], strict=False))
        self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, 2) for a, b in pairs)
        self.stages = nn.ModuleList(Chain("convs", [Unit((2 * b, b))]) for _, b in pairs)
        self.seg_layers = nn.ModuleList(nn.Conv3d(b, arch.num_outputs, 1) for _, b in pairs)

    def forward(self, found: list[Any]) -> list[Any]:
        """Logits, highest resolution first."""
        x, outputs = found[-1], []
        parts = zip(self.transpconvs, self.stages, self.seg_layers, found[-2::-1], strict=True)
        for up, stage, head, skip in parts:
            x = stage(torch.cat((up(x), skip), 1))
            outputs.append(head(x))
        return outputs[::-1]


class Network(nn.Module):
    """The network; logits of all resolutions."""

    def __init__(self, arch: ArchSpec):
        super().__init__()
        self.encoder, self.decoder = Encoder(arch), Decoder(arch)

    def forward(self, x: Any) -> list[Any]:
        """Logits, highest resolution first."""
        return self.decoder(self.encoder(x))


def loss(logits: Any, target: Any) -> Any:
    """Cross entropy and negative soft Dice of the foreground, per sample."""
    label = target[:, 0].long()
    entropy = functional.cross_entropy(logits, label)
    chances = torch.softmax(logits, 1)[:, 1:]
    hot = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, label[:, None], True)[:, 1:]
    axes = (2, 3, 4)
    overlap, predicted, present = (chances * hot).sum(axes), chances.sum(axes), hot.sum(axes)
    dice = (2 * overlap + 1e-5) / torch.clip(predicted + present + 1e-5, 1e-8)
    return entropy - dice.mean()
