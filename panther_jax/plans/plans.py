"""nnU-Net's plans of one configuration: frozen, resolved and checked, with JSON in and out."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from panther_jax.base.errors import PlansError
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.labels import Labels
from panther_jax.plans.v1 import with_architecture

RESAMPLERS = ("resample_data_or_seg_to_shape", "resample_torch_fornnunet")
NORMALIZATION_BY_CHANNEL = {
    "ct": "CTNormalization",
    "nonorm": "NoNormalization",
    "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}


# --------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class Resampler:
    """A resampling function of the plans: its name and keyword arguments (spec 02 §4.5-4.6)."""

    name: str
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in RESAMPLERS:
            raise PlansError(
                f"plans: resampling function {self.name!r} is not supported; expected one of "
                f"{', '.join(RESAMPLERS)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """One keyword argument."""
        return dict(self.kwargs).get(key, default)


@dataclass(frozen=True)
class IntensityProperties:
    """Foreground intensity statistics of one channel over the data set."""

    mean: float
    std: float
    median: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True)
class Plans:
    """One configuration of nnU-Net plans, ``inherits_from`` resolved. Axes after ``transpose``."""

    dataset_name: str
    plans_name: str
    configuration: str
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    batch_dice: bool
    normalization: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    resampling_image: Resampler
    resampling_label: Resampler
    resampling_logits: Resampler
    arch: ArchSpec
    transpose_forward: tuple[int, ...] = (0, 1, 2)
    intensity: tuple[IntensityProperties, ...] = ()
    data_identifier: str = ""

    @property
    def transpose_backward(self) -> tuple[int, ...]:
        """Inverse of ``transpose_forward``."""
        return tuple(self.transpose_forward.index(a) for a in range(len(self.transpose_forward)))

    @staticmethod
    def from_nnunet(
        plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str | None = None
    ) -> "Plans":
        """Read one configuration of a plans.json dictionary, with its dataset.json dictionary.

        ``configuration`` may be left out if the plans hold exactly one.

        Raises:
            PlansError: naming the configuration or field that is missing or not supported.
        """
        names = list(_configurations(plans))
        if configuration is None:
            if len(names) != 1:
                raise PlansError(f"plans: name one of the configurations {names}")
            configuration = names[0]
        assert configuration is not None
        entry = with_architecture(resolve_configuration(plans, configuration))
        channels = dataset.get("channel_names", dataset.get("modality"))
        if not isinstance(channels, (Mapping, list)) or not channels:
            raise PlansError(
                'dataset.json: \'channel_names\' is missing; expected, e.g., {"0": "MRI"}'
            )
        labels = Labels.from_dataset_json(dataset)
        try:
            read = Plans(
                dataset_name=str(plans["dataset_name"]),
                plans_name=str(plans["plans_name"]),
                configuration=configuration,
                spacing=_field(entry, "spacing", _spacing, "two or three positive numbers"),
                patch_size=_field(entry, "patch_size", _sizes, "two or three positive integers"),
                batch_size=_field(entry, "batch_size", _size, "a positive integer"),
                batch_dice=bool(entry["batch_dice"]),
                normalization=_field(entry, "normalization_schemes", _names, "a list of names"),
                use_mask_for_norm=_field(entry, "use_mask_for_norm", _flags, "true or false each"),
                resampling_image=_resampler(entry, "data"),
                resampling_label=_resampler(entry, "seg"),
                resampling_logits=_resampler(entry, "probabilities"),
                arch=ArchSpec.from_nnunet(
                    _field(entry, "architecture", _object, "a JSON object"),
                    in_channels=len(channels),
                    num_outputs=labels.num_outputs,
                ),
                transpose_forward=_field(plans, "transpose_forward", _axes, "an order of 0, 1, 2"),
                intensity=_intensity(plans.get("foreground_intensity_properties_per_channel")),
                data_identifier=str(entry.get("data_identifier", "")),
            )
        except KeyError as error:
            raise PlansError(
                f"plans: configuration {configuration!r} lacks {error.args[0]!r}; copy plans.json "
                "again, or make it anew with panther_jax.planning"
            ) from None
        if {len(read.spacing), len(read.patch_size)} != {read.arch.ndim}:
            raise PlansError(
                f"plans: 'spacing' {read.spacing}, 'patch_size' {read.patch_size} and the network "
                f"of {read.arch.ndim} axes must have equally many"
            )
        return read

    def to_nnunet(self) -> dict[str, Any]:
        """A plans.json dictionary that holds this configuration alone."""
        entry: dict[str, Any] = {
            "data_identifier": self.data_identifier,
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": self.batch_size,
            "patch_size": list(self.patch_size),
            "spacing": list(self.spacing),
            "normalization_schemes": list(self.normalization),
            "use_mask_for_norm": list(self.use_mask_for_norm),
            "architecture": self.arch.to_nnunet(),
            "batch_dice": self.batch_dice,
        }
        for key, resampler in (
            ("data", self.resampling_image),
            ("seg", self.resampling_label),
            ("probabilities", self.resampling_logits),
        ):
            entry[f"resampling_fn_{key}"] = resampler.name
            entry[f"resampling_fn_{key}_kwargs"] = dict(resampler.kwargs)
        return {
            "dataset_name": self.dataset_name,
            "plans_name": self.plans_name,
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": list(self.transpose_forward),
            "transpose_backward": list(self.transpose_backward),
            "configurations": {self.configuration: entry},
            "experiment_planner_used": "panther_jax",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {
                str(i): vars(p) for i, p in enumerate(self.intensity)
            },
        }


def resolve_configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with ``inherits_from`` resolved: shallow, child over parent (spec 02 §3.10).

    Raises:
        PlansError: if the configuration is missing or inherits in a circle.
    """
    configurations = _configurations(plans)
    chain: list[str] = []
    current: Any = name
    while current is not None:
        if current in chain:
            raise PlansError(
                f"plans: configurations inherit in a circle: {[*chain, current]}; remove one "
                "'inherits_from'"
            )
        if not isinstance(current, str) or current not in configurations:
            where = f" ('inherits_from' of {chain[-1]!r})" if chain else ""
            raise PlansError(
                f"plans: configuration {current!r}{where} not found; there are "
                f"{sorted(configurations)}"
            )
        chain.append(current)
        current = _field(configurations, current, _object, "a JSON object").get("inherits_from")
    resolved: dict[str, Any] = {}
    for key in reversed(chain):
        resolved.update(configurations[key])
    return resolved


def normalization_schemes(channel_names: Mapping[str, str]) -> tuple[str, ...]:
    """nnU-Net's normalisation for each channel name (spec 02 §3.8), in channel order."""
    ordered = [channel_names[k] for k in sorted(channel_names, key=int)]
    return tuple(
        NORMALIZATION_BY_CHANNEL.get(str(n).casefold(), "ZScoreNormalization") for n in ordered
    )


def _configurations(plans: Mapping[str, Any]) -> Mapping[str, Any]:
    return _object(plans.get("configurations") or {}, "plans: 'configurations'")


def _field(
    source: Mapping[str, Any], key: str, convert: Callable[[Any], Any], expected: str
) -> Any:
    """One entry, converted and checked; a missing one is a KeyError."""
    value = source[key]
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        shown = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
        raise PlansError(f"plans: {key!r} is {shown}; expected {expected}") from None


def _object(value: Any, what: str = "") -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PlansError(f"{what} is a {type(value).__name__}; expected a JSON object")
    return value


def _list(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(value)
    return value


def _spacing(value: Any) -> tuple[float, ...]:
    spacing = tuple(float(s) for s in _list(value))
    if len(spacing) not in (2, 3) or not all(0 < s < math.inf for s in spacing):
        raise ValueError(value)
    return spacing


def _size(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(value)
    return int(value)


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(_size(n) for n in _list(value))
    if len(sizes) not in (2, 3):
        raise ValueError(value)
    return sizes


def _names(value: Any) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in _list(value)):
        raise TypeError(value)
    return tuple(value)


def _flags(value: Any) -> tuple[bool, ...]:
    return tuple(bool(flag) for flag in _list(value))


def _axes(value: Any) -> tuple[int, ...]:
    axes = tuple(int(a) for a in _list(value))
    if sorted(axes) != list(range(len(axes))) or len(axes) not in (2, 3):
        raise ValueError(value)
    return axes


def _resampler(entry: Mapping[str, Any], kind: str) -> Resampler:
    name = f"resampling_fn_{kind}"
    kwargs = _object(entry.get(f"{name}_kwargs") or {}, f"plans: '{name}_kwargs'")
    return Resampler(str(entry[name]), tuple(sorted(kwargs.items())))


def _intensity(properties: Any) -> tuple[IntensityProperties, ...]:
    if not properties:
        return ()
    fields = IntensityProperties.__dataclass_fields__
    try:
        return tuple(
            IntensityProperties(**{f: float(properties[k][f]) for f in fields})
            for k in sorted(properties, key=int)
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PlansError(
            "plans: 'foreground_intensity_properties_per_channel' cannot be used "
            f"({type(error).__name__}: {error}); expected {', '.join(fields)} of channel 0, 1, ..."
        ) from None
