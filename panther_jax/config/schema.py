"""The configuration of a training run: typed, frozen, checked."""

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from panther_jax.base.errors import PantherError
from panther_jax.base.registry import Registry

POLICIES: Registry[Callable[..., Any]] = Registry(
    "augmentation policy",
    (
        "default",
        "no_mirroring",
        "only_mirror_01",
        "no_dummy_2d",
        "seg_ord0",
        "seg_ord0_no_mirroring",
        "none",
        "da5",
        "da5_ord0",
        "da5_seg_ord0",
        "da5_fork",
        "da5_fork_ord0",
        "da5_fork_seg_ord0",
    ),
    remedy="Add one of your own in your config file: put @panther_jax.config.POLICIES.add('NAME') "
    "above a function that returns a panther_jax.augment.recipes.Policy",
)
"""Names of augmentation policies; `augment.recipes` holds those of the package."""
CheckpointName = Literal["final", "best"]
CHECKPOINTS: tuple[CheckpointName, ...] = typing.get_args(CheckpointName)
LOSSES: Registry[Callable[..., Any]] = Registry(
    "loss",
    remedy="Add one of your own in your config file: @panther_jax.config.LOSSES.add('NAME') above "
    "a function of (logits, target, config, about), see panther_jax.training.losses",
)
"""Losses by name; those of the package are in `training.losses`, which puts them here."""


class ConfigError(PantherError, ValueError):
    """A configuration, a field or a command line that cannot be used."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class DataConfig:
    """Which data set, on which voxel grid, and how batches are drawn from it."""

    dataset: str
    """Raw data set folder name, `DatasetNNN_Name`."""
    source: str = ""
    """How to get the data set; said where it is missing."""
    modality: Literal["ct", "t1", "t2"] = "t2"
    """What the images are; the phantoms of `--demo` imitate it."""
    plans_name: str = "nnUNetResEncUNetLPlans"
    """Name of the plans; with `configuration` it names the store's folder."""
    configuration: str = "3d_fullres_iso1x1x1"
    """Name of the configuration in the plans."""
    spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Voxel spacing that cases are resampled to, z y x, in mm; y x alone for a 2-D network, whose
    slices along z stay as they are."""
    patch_size: tuple[int, ...] = (192, 192, 192)
    """Training patch and inference tile, z y x, in voxels; y x alone for a 2-D network."""
    batch_size: int = 2
    """Patches a step, over all devices."""
    normalization: tuple[str, ...] | None = None
    """nnU-Net normalisation class a channel; None derives it from the channel names."""
    resampling: Literal["torch", "spline"] = "torch"
    """Resampling of the plans: `torch` linear, or `spline` of order 3 (labels 1), separate z."""
    foreground_oversampling: float = 0.33
    """Share of each batch, its last samples, that is centred on a foreground voxel."""
    resident: Literal["auto", "device", "host", "stream"] = "auto"
    """Where the cases are: in device memory, where patches are cut; in host memory; in files, read
    patch by patch. `auto` takes the first that fits: an accelerator's memory if they need at most a
    quarter of it, half of the host's free memory, files. Never changes the numbers."""
    num_threads: int = 4
    """Threads that cut patches."""
    prefetch_batches: int = 4
    """Batches made ahead of the step."""

    def __post_init__(self) -> None:
        _require(bool(self.dataset), "data.dataset is empty; name a DatasetNNN_Name folder")
        _require(
            len(self.spacing_mm) in (2, 3) and all(s > 0 for s in self.spacing_mm),
            "data.spacing_mm must hold three positive numbers, or two for a 2-D network, found "
            f"{self.spacing_mm}",
        )
        _require(
            all(p > 0 for p in self.patch_size) and len(self.patch_size) in (2, 3),
            "data.patch_size must hold three positive integers, or two for a 2-D network, found "
            f"{self.patch_size}",
        )
        for name in ("batch_size", "num_threads", "prefetch_batches"):
            value = getattr(self, name)
            _require(value >= 1, f"data.{name} must be at least 1, found {value}")
        _require(
            0 <= self.foreground_oversampling <= 1,
            "data.foreground_oversampling must lie in [0, 1], found "
            f"{self.foreground_oversampling}",
        )

    @property
    def data_identifier(self) -> str:
        """Folder name of the store, `<plans>_<configuration>`."""
        return f"{self.plans_name}_{self.configuration}"


@dataclass(frozen=True)
class AugmentConfig:
    """On-device augmentation."""

    policy: str = "default"
    """The pipeline: nnU-Net's default or DA5, a variant of one (no_mirroring, only_mirror_01,
    no_dummy_2d, seg_ord0, seg_ord0_no_mirroring, da5_ord0, da5_seg_ord0), the winning fork's DA5
    (da5_fork, da5_fork_ord0, da5_fork_seg_ord0), none, or one that the config file adds."""

    def __post_init__(self) -> None:
        _require(self.policy in POLICIES.names, f"augment.policy: {POLICIES.unknown(self.policy)}")


@dataclass(frozen=True)
class ArchConfig:
    """The network, but for its input and output channels, which the data set decides.

    By default nnU-Net's ResEnc-L with six isotropic stages, which is that of the MultiTalent
    weights.
    """

    network: str = "ResidualEncoderUNet"
    """Residual-encoder or plain U-Net (PlainConvUNet), or a network that the config file adds."""
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    """Channels an encoder stage, highest resolution first."""
    kernel_sizes: tuple[tuple[int, ...], ...] = ((3, 3, 3),) * 6
    """Kernel an encoder stage."""
    strides: tuple[tuple[int, ...], ...] = ((1, 1, 1),) + ((2, 2, 2),) * 5
    """Down-sampling on entering an encoder stage."""
    blocks: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    """Residual blocks (or convolutions of the plain network) an encoder stage."""
    decoder_convs: tuple[int, ...] = (1, 1, 1, 1, 1)
    """Convolutions a decoder stage."""


@dataclass(frozen=True)
class LossConfig:
    """The loss at one resolution, and how resolutions are weighted (spec 03 §2)."""

    kind: str = "dice_ce"
    """Dice + cross entropy (binary cross entropy for regions), a variant of it (dice, ce, topk,
    dice_topk), or a loss that the config file adds."""
    weight_ce: float = 1.0
    """Weight of the cross-entropy term."""
    weight_dice: float = 1.0
    """Weight of the Dice term."""
    smooth: float = 1e-5
    """Added to numerator and denominator of the Dice."""
    batch_dice: bool | None = False
    """Dice sums over the batch (True) or per sample (False); None takes the plans' value."""
    topk_percent: float = 10.0
    """Share of voxels with the largest cross entropy that `topk` averages."""
    label_smoothing: float = 0.0
    """Label smoothing of the `topk` cross entropy."""
    deep_supervision: bool = True
    """Supervise all decoder outputs, weights 1/2^i, the lowest 0."""

    def __post_init__(self) -> None:
        _require(
            0 < self.topk_percent <= 100,
            f"loss.topk_percent must lie in (0, 100], found {self.topk_percent}",
        )
        _require(self.smooth >= 0, f"loss.smooth must not be negative, found {self.smooth}")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule (spec 03 §3)."""

    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    """SGD with Nesterov momentum; AdamW with decoupled decay; Adam with coupled decay."""
    amsgrad: bool = True
    """AdamW as the reference has it, with the largest second moment so far; else the current one,
    which does not let the large gradients of the first steps slow down all later ones."""
    lr: float = 1e-2
    """Initial learning rate."""
    momentum: float = 0.99
    """Momentum of SGD."""
    weight_decay: float = 3e-5
    """Weight decay on all parameters."""
    clip_norm: float = 12.0
    """Global L2 norm that gradients are clipped to."""
    schedule: Literal["poly", "poly_warmup", "cosine_warmup", "cosine", "constant"] = "poly"
    """Learning rate by epoch; the formulas are in `optim.py`."""
    warmup_epochs: int = 50
    """Epochs of linear warm-up of `poly_warmup` and `cosine_warmup`."""
    skip_unused_head: bool = False
    """Leave the lowest-resolution head untouched instead of decaying it under a zero gradient."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr must be positive, found {self.lr}")
        _require(
            0 <= self.momentum < 1, f"optim.momentum must lie in [0, 1), found {self.momentum}"
        )
        _require(
            self.weight_decay >= 0,
            f"optim.weight_decay must not be negative, found {self.weight_decay}",
        )
        _require(self.clip_norm > 0, f"optim.clip_norm must be positive, found {self.clip_norm}")
        _require(
            self.warmup_epochs >= 0,
            f"optim.warmup_epochs must not be negative, found {self.warmup_epochs}",
        )


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, in what precision, from which seed."""

    epochs: int = 1000
    """Epochs; an epoch is a fixed number of steps, not a pass over the data."""
    steps_per_epoch: int = 250
    """Training steps an epoch."""
    steps_per_call: int = 1
    """Training steps in one call of the device, a divisor of `steps_per_epoch`: the host speaks to
    it that much less often. Signals and checkpoints wait for the end of a call. Cases that are not
    in device memory send so many batches at once. Changes results by rounding only."""
    validation_steps: int = 50
    """Online validation steps an epoch (pseudo-Dice)."""
    seed: int = 0
    """Seed of all randomness: initialisation, batches, augmentation."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of convolutions; auto is bfloat16 on accelerators, float32 on CPU."""
    checkpoint_minutes: float = 15.0
    """Longest time between two checkpoints, in minutes."""
    checkpoint_every_epochs: int = 1
    """Save a checkpoint every so many epochs."""
    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/panther_jax/xla (or JAX_COMPILATION_CACHE_DIR)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "steps_per_call", "checkpoint_every_epochs"):
            value = getattr(self, name)
            _require(value >= 1, f"loop.{name} must be at least 1, found {value}")
        _require(
            self.steps_per_epoch % self.steps_per_call == 0,
            f"loop.steps_per_call must divide loop.steps_per_epoch {self.steps_per_epoch}, found "
            f"{self.steps_per_call}",
        )
        _require(
            self.validation_steps >= 1,
            f"loop.validation_steps must be at least 1, found {self.validation_steps}",
        )
        _require(self.seed >= 0, f"loop.seed must not be negative, found {self.seed}")
        _require(
            self.checkpoint_minutes > 0,
            f"loop.checkpoint_minutes must be positive, found {self.checkpoint_minutes}",
        )

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class InitConfig:
    """Starting weights (spec 01 §5)."""

    bundle: str | None = None
    """Bundle to start from: a folder, or its name under ROOT/weights; None starts from scratch."""
    source: str = ""
    """How to get that bundle; said where it is missing."""
    stem: Literal["copy", "reinit"] = "reinit"
    """Take the stem from the bundle, or start it anew."""


@dataclass(frozen=True)
class ValidationConfig:
    """Validation after training: whole cases by sliding window, through the code that predicts."""

    checkpoints: tuple[CheckpointName, ...] = CHECKPOINTS
    """Checkpoints to validate, each into its own folder."""
    mirror: bool = True
    """Average over all mirrored variants (the reference's value for validation)."""
    step_size: float = 0.5
    """Step between tiles as a share of the tile."""
    cases: str = "all"
    """Cases validated after training: all of the fold's, or those whose names match this regular
    expression from end to end."""
    save_probabilities: bool = False
    """Keep probabilities beside the label maps, for ensemble selection."""

    def __post_init__(self) -> None:
        _require(
            0 < self.step_size <= 1,
            f"validation.step_size must lie in (0, 1], found {self.step_size}",
        )
        try:
            re.compile(self.cases)
        except re.error as error:
            raise ConfigError(
                f"validation.cases {self.cases!r} is neither all nor a regular expression: {error}"
            ) from None


@dataclass(frozen=True)
class DevicesConfig:
    """How devices share the work; changes results by rounding only."""

    data: int | None = None
    """Devices that the batch is split over; None takes as many as divide it."""
    space: int | None = None
    """Devices that every patch is split over, along its first axis; None takes what is left."""

    def __post_init__(self) -> None:
        for name in ("data", "space"):
            value = getattr(self, name)
            _require(
                value is None or value >= 1, f"devices.{name} must be at least 1, found {value}"
            )


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = 10
    """Steps between fetches of the loss from the device."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""

    def __post_init__(self) -> None:
        _require(
            self.every_steps >= 1, f"log.every_steps must be at least 1, found {self.every_steps}"
        )


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training: every parameter of the run."""

    data: DataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    arch: ArchConfig = field(default_factory=ArchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    init: InitConfig = field(default_factory=InitConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        data, arch = self.data, self.arch
        entries = {
            "data.spacing_mm": (data.spacing_mm,),
            "data.patch_size": (data.patch_size,),
            "arch.kernel_sizes": arch.kernel_sizes,
            "arch.strides": arch.strides,
        }
        axes = {name: sorted({len(entry) for entry in found}) for name, found in entries.items()}
        _require(
            len({n for found in axes.values() for n in found}) == 1,
            "a network is 2-D or 3-D in all its fields, found axes "
            + ", ".join(f"{name} {' and '.join(map(str, n))}" for name, n in axes.items())
            + "\n  Give all of them two, as configs/mri_t2_2d.py does, or all three.",
        )

    def to_json(self) -> dict[str, Any]:
        """The config as a JSON-able dictionary."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "TrainConfig":
        """Inverse of :meth:`to_json`, also after a trip through a JSON file.

        Raises:
            ConfigError: naming a field that is unknown or missing.
        """
        try:
            return _from_json(TrainConfig, value, "config")
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"config: a field is missing or of another type: {error}") from None


def _from_json(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        _require(not unknown, f"{where}: unknown field(s) {sorted(unknown)}")
        return kind(**{k: _from_json(hints[k], v, f"{where}.{k}") for k, v in value.items()})  # type: ignore[operator]
    if isinstance(value, (list, tuple)):
        return _tuples(value)
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
