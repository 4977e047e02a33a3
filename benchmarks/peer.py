"""The peer's side of the training benchmarks: nnU-Net's network, loss and optimiser in PyTorch."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import harness, networks

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, CLIP_NORM = 1e-2, 0.99, 3e-5, 12.0


@dataclass(frozen=True)
class Variant:
    """How PyTorch computes: device, precision, memory format, compiled or not."""

    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        parts = [self.dtype, "channels-last" if self.channels_last else "contiguous"]
        return " ".join([*parts, "compiled" if self.compiled else "eager"])


def cpu_variants() -> tuple[Variant, ...]:
    """What the peer may choose from on a CPU."""
    return Variant(), Variant(channels_last=True)


def gpu_variants() -> tuple[Variant, ...]:
    """What the peer may choose from on a GPU; nnU-Net's own default is float16, compiled."""
    return tuple(
        Variant("cuda", dtype, last, compiled)
        for compiled in (False, True)
        for dtype, last in (("float16", False), ("bfloat16", False), ("bfloat16", True))
    )


def from_nnunet() -> bool:
    """Whether nnU-Net's own network is there; else the peer is the same in plain PyTorch."""
    return importlib.util.find_spec("nnunetv2") is not None


def make_network(size: networks.Size) -> Any:
    """The network with all its outputs."""
    arch = size.arch
    if not from_nnunet():
        from benchmarks import torch_net

        return torch_net.Network(arch)
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    block = arch.to_nnunet()
    return get_network_from_plans(
        block["network_class_name"],
        block["arch_kwargs"],
        block["_kw_requires_import"],
        arch.in_channels,
        arch.num_outputs,
        deep_supervision=True,
    )


def make_loss(size: networks.Size) -> Callable[..., Any]:
    """Dice and cross entropy at every resolution."""
    weights = networks.supervision_weights(size.arch.num_stages - 1)
    if not from_nnunet():
        from benchmarks import torch_net

        def total(outputs: Any, targets: Any) -> Any:
            pairs = zip(weights, outputs, targets, strict=True)
            return sum(w * torch_net.loss(x, y) for w, x, y in pairs if w)

        return total
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    kind: Any = MemoryEfficientSoftDiceLoss
    one = DC_and_CE_loss(dice, {}, dice_class=kind)
    return DeepSupervisionWrapper(one, weights)


class Works:
    """Forward pass, gradient and step of a size, as nnU-Net's trainer does them."""

    def __init__(self, size: networks.Size, variant: Variant, weights: str | None):
        self.variant = variant
        torch.backends.cudnn.benchmark = True
        if variant.device == "cpu":
            torch.set_num_threads(harness.cores())
        layout = torch.channels_last_3d if variant.channels_last else torch.contiguous_format
        network = make_network(size)
        if weights is not None:
            _load(network, weights)
        network = network.to(variant.device).to(memory_format=layout)
        image, label = networks.make_batch(size)
        wanted = networks.make_targets(size, label)
        self.image = _tensor(image).to(variant.device).contiguous(memory_format=layout)
        self.targets = [_tensor(t).to(variant.device) for t in wanted]
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters,
            LEARNING_RATE,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            nesterov=True,
        )
        self.scaler = torch.amp.GradScaler("cuda") if variant.dtype == "float16" else None
        self.network = torch.compile(network) if variant.compiled else network
        self.loss = make_loss(size)

    def _casting(self) -> Any:
        dtype = getattr(torch, self.variant.dtype)
        on = self.variant.dtype != "float32"
        return torch.autocast(self.variant.device, dtype=dtype, enabled=on)

    def forward(self) -> None:
        """Outputs of all resolutions."""
        with torch.no_grad(), self._casting():
            self.network(self.image)
        self._wait()

    def gradient(self) -> float:
        """Loss and gradients; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._casting():
            loss = self.loss(self.network(self.image), self.targets)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._wait()
        return float(loss.detach())

    def step(self) -> float:
        """One update: gradient, clipping, SGD with Nesterov momentum; the loss."""
        loss = self.gradient()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self._wait()
        return loss

    def _wait(self) -> None:
        if self.variant.device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Peak of memory on the device, or of the process on a CPU."""
        if self.variant.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return harness.peak_bytes()


def _tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def _load(network: Any, weights: str) -> None:
    """Take over weights by name; every parameter must be there under one of its names."""
    found = np.load(weights)
    own = dict(network.named_parameters(remove_duplicate=False))
    taken = {id(own[name]) for name in found.files if name in own}
    missing = [name for name, p in own.items() if id(p) not in taken]
    if missing:
        raise RuntimeError(f"no weights for {', '.join(missing[:3])}")
    with torch.no_grad():
        for name in found.files:
            own[name].copy_(torch.from_numpy(found[name]))


def serve_works(
    size: Mapping[str, Any], variant: Mapping[str, Any], weights: str | None
) -> Callable[..., Any]:
    """Answer ``("time", work, calls)``, ``("loss",)`` and ``("facts",)``."""
    works = Works(networks.Size.from_json(size), Variant(**variant), weights)

    def handle(what: str, *arguments: Any) -> Any:
        if what == "time":
            name, calls = arguments
            return harness.timed(getattr(works, name), calls)
        if what == "loss":
            return works.gradient()
        return {"peak_bytes": works.peak_bytes(), "from_nnunet": from_nnunet()}

    return handle
