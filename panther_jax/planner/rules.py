"""nnU-Net's experiment planners: fingerprint and dataset.json in, plans out (spec 02 §3).

Pure functions over dictionaries: no images, no files. Every rule, its rounding and its ties are the
reference's, so that ``plans.json`` is equal field by field.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from panther_jax.base.errors import PlansError
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import normalization_schemes
from panther_jax.preprocessing.resampling import target_shape

Network = Literal["ResidualEncoderUNet", "PlainConvUNet"]
Resampling = Literal["spline", "torch", "torch_sepz"]
Axes = tuple[int, ...]

BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
REFERENCE_BATCH = {2: 12, 3: 2}
REFERENCE_EDGE = {2: 2048, 3: 256}
MIN_BATCH = 2
MIN_EDGE = 4
MAX_STAGES = 32
ANISOTROPY_THRESHOLD = 3.0
SAME_AXIS_RATIO = 2.0
LOWRES_THRESHOLD = 0.25
LOWRES_STEP = 1.03
CROPPED_ENOUGH = 0.75
RESENC_BLOCKS = (1, 3, 4) + (6,) * (MAX_STAGES - 3)
PLAIN_CONVS = (2,) * MAX_STAGES
DEFAULT_PLANS = "nnUNetPlans"


@dataclass(frozen=True)
class Planner:
    """What tells one planner of nnU-Net from another (spec 02 §3.1); references in feature voxels.

    ``shares_data``: identifiers of 2d and 3d_fullres are the default planner's, as the data are.
    """

    name: str
    plans_name: str
    network: Network
    memory_gb: float
    reference_3d: int
    reference_2d: int
    max_coverage: float
    shares_data: bool = True
    resampling: Resampling = "spline"

    @property
    def encoder(self) -> Axes:
        """Residual blocks or convolutions of each encoder stage, highest resolution first."""
        return RESENC_BLOCKS if self.network == "ResidualEncoderUNet" else PLAIN_CONVS

    @property
    def decoder(self) -> Axes:
        """Convolutions of each decoder stage, highest resolution first."""
        return (1 if self.network == "ResidualEncoderUNet" else 2,) * MAX_STAGES


def _resenc(name: str, suffix: str, size: str, **changes: Any) -> Planner:
    memory, reference_3d, reference_2d = {
        "M": (8.0, 680_000_000, 135_000_000),
        "L": (24.0, 2_100_000_000, 380_000_000),
        "XL": (40.0, 3_600_000_000, 560_000_000),
    }[size]
    network: Network = "ResidualEncoderUNet"
    plans_name = f"nnUNetResEncUNet{suffix}"
    options = {"max_coverage": 1.0, **changes}
    return Planner(name, plans_name, network, memory, reference_3d, reference_2d, **options)


PLANNERS = (
    Planner(
        "ExperimentPlanner",
        DEFAULT_PLANS,
        "PlainConvUNet",
        8.0,
        560_000_000,
        85_000_000,
        0.05,
        shares_data=False,
    ),
    _resenc("ResEncUNetPlanner", "Plans", "M", max_coverage=0.05),
    _resenc("nnUNetPlannerResEncM", "MPlans", "M"),
    _resenc("nnUNetPlannerResEncL", "LPlans", "L"),
    _resenc("nnUNetPlannerResEncXL", "XLPlans", "XL"),
    _resenc(
        "nnUNetPlannerResEncL_torchres",
        "LPlans_torchres",
        "L",
        shares_data=False,
        resampling="torch",
    ),
    _resenc(
        "nnUNetPlannerResEncL_torchres_sepz",
        "LPlans_torchres_sepz",
        "L",
        shares_data=False,
        resampling="torch_sepz",
    ),
)
SHORT_NAMES = {"default": "ExperimentPlanner", "resencunet": "ResEncUNetPlanner"}


def find_planner(name: str) -> Planner:
    """Find a planner by nnU-Net's class name or a short one: default, ResEncUNet, ResEncL, ...

    Raises:
        PlansError: listing the names there are.
    """
    wanted = SHORT_NAMES.get(name.casefold(), name).casefold()
    for planner in PLANNERS:
        full = planner.name.casefold()
        if wanted in (full, full.removeprefix("nnunetplanner")):
            return planner
    known = ["default", *(p.name.removeprefix("nnUNetPlanner") for p in PLANNERS)]
    raise PlansError(f"planner {name!r} is not known; expected one of {', '.join(known)}")


# ------------------------------------------------------------------------------------- topology


@dataclass(frozen=True)
class Topology:
    """How a patch is pooled: strides and kernels a stage, and the patch padded to fit them."""

    strides: tuple[Axes, ...]
    kernel_sizes: tuple[Axes, ...]
    patch: Axes
    divisor: Axes

    @property
    def num_pools(self) -> Axes:
        """How often each axis is halved."""
        return tuple(d.bit_length() - 1 for d in self.divisor)


def topology(
    spacing: Sequence[float], patch: Sequence[int | float], *, min_edge: int = MIN_EDGE
) -> Topology:
    """Pool axes while they are large enough and similar in spacing (spec 02 §3.6)."""
    current, size = [float(s) for s in spacing], list(patch)
    axes = range(len(size))
    kernel, strides, kernels = [1] * len(size), [(1,) * len(size)], []
    while True:
        pooled = [a for a in axes if size[a] >= 2 * min_edge]
        if not pooled:
            break
        finest = min(current[a] for a in pooled)
        pooled = [a for a in pooled if current[a] / finest < SAME_AXIS_RATIO]
        if len(pooled) == 1 and size[pooled[0]] < 3 * min_edge:
            break
        for a in axes:
            if current[a] / min(current) < SAME_AXIS_RATIO:
                kernel[a] = 3
        strides.append(tuple(2 if a in pooled else 1 for a in axes))
        kernels.append(tuple(kernel))
        for a in pooled:
            current[a] *= 2
            size[a] = math.ceil(size[a] / 2)
    divisor = tuple(math.prod(s[a] for s in strides) for a in axes)
    padded = tuple(math.ceil(p / d) * d for p, d in zip(patch, divisor, strict=True))
    return Topology(tuple(strides), (*kernels, (3,) * len(size)), padded, divisor)


def feature_voxels(
    patch: Axes,
    strides: Sequence[Axes],
    features: Sequence[int],
    *,
    network: Network,
    encoder: Sequence[int],
    decoder: Sequence[int],
    num_classes: int,
) -> int:
    """Count the voxels of all feature maps of a network, which stand for memory (spec 02 §3.7)."""
    sizes, size = [], patch
    for stride in strides:
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        sizes.append(math.prod(size))
    residual = network == "ResidualEncoderUNet"
    total = features[0] * math.prod(patch) if residual else 0
    previous = features[0]
    for stage, (channels, voxels) in enumerate(zip(features, sizes, strict=True)):
        layers = encoder[stage]
        if residual:
            projected = channels != previous or any(s > 1 for s in strides[stage])
            layers = 2 * layers + projected
        total += layers * channels * voxels
        previous = channels
    for stage in range(len(strides) - 1):
        total += (decoder[stage] + 1) * features[stage] * sizes[stage]
    return total + num_classes * sizes[0]


# ------------------------------------------------------------------------------ spacing and shape


def fullres_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[float, ...]:
    """Median spacing; finer along a far coarser axis of few slices (spec 02 §3.2)."""
    target = np.percentile(spacings, 50, axis=0)
    size = np.percentile(shapes, 50, axis=0)
    worst = int(np.argmax(target))
    others = [a for a in range(len(target)) if a != worst]
    anisotropic = target[worst] > ANISOTROPY_THRESHOLD * max(target[others])
    few_slices = size[worst] * ANISOTROPY_THRESHOLD < min(size[others])
    if anisotropic and few_slices:
        finer = float(np.percentile(spacings[:, worst], 10))
        if finer < max(target[others]):
            finer = float(max(target[others])) + 1e-5
        target[worst] = finer
    return tuple(float(t) for t in target)


# ------------------------------------------------------------------------------ one configuration


@dataclass(frozen=True)
class _Request:
    """What all configurations of a dataset share."""

    planner: Planner
    plans_name: str
    memory_gb: float
    num_classes: int
    normalization: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]


@dataclass(frozen=True)
class _Sized:
    """A network for a patch, and its size in feature voxels."""

    topology: Topology
    features: Axes
    estimate: int


def _sized(request: _Request, spacing: Sequence[float], patch: Sequence[float]) -> _Sized:
    found = topology(spacing, patch)
    num_stages = len(found.strides)
    most = MAX_FEATURES[len(spacing)]
    features = tuple(min(most, BASE_FEATURES * 2**i) for i in range(num_stages))
    estimate = feature_voxels(
        found.patch,
        found.strides,
        features,
        network=request.planner.network,
        encoder=request.planner.encoder,
        decoder=request.planner.decoder,
        num_classes=request.num_classes,
    )
    return _Sized(found, features, estimate)


def _initial_patch(spacing: Sequence[float], median_shape: Sequence[float]) -> tuple[float, ...]:
    inverse = [1 / s for s in spacing]
    ndim = len(spacing)
    # spec 02 §3.5: as many voxels as the reference cube, the same extent in mm along each axis
    scale = (REFERENCE_EDGE[ndim] ** ndim / np.prod(inverse)) ** (1 / ndim)
    return tuple(min(round(i * scale), m) for i, m in zip(inverse, median_shape, strict=True))


def _fit(
    request: _Request, spacing: Sequence[float], median_shape: Sequence[float], reference: float
) -> _Sized:
    """Shrink the patch, where it covers most of the image, until the network fits."""
    sized = _sized(request, spacing, _initial_patch(spacing, median_shape))
    # spec 02 §3.5: the default planner's allowance is that of two samples, so 6x in 2-D
    plain = request.planner.network == "PlainConvUNet"
    share = MIN_BATCH / REFERENCE_BATCH[len(spacing)] if plain else 1.0
    while sized.estimate * share > reference:
        patch = list(sized.topology.patch)
        ratios = [p / m for p, m in zip(patch, median_shape, strict=True)]
        # argsort's last entry: among equal ratios the last axis
        axis = int(np.argsort(ratios, kind="stable")[-1])
        smaller = list(patch)
        smaller[axis] -= sized.topology.divisor[axis]
        patch[axis] -= topology(spacing, smaller).divisor[axis]
        sized = _sized(request, spacing, patch)
    return sized


def _configuration(
    request: _Request,
    name: str,
    *,
    spacing: Sequence[float],
    median_shape: Sequence[float],
    num_voxels: float,
    batch_dice: bool,
) -> dict[str, Any]:
    planner, ndim = request.planner, len(spacing)
    base = planner.reference_3d if ndim == 3 else planner.reference_2d
    reference = base * (request.memory_gb / planner.memory_gb)
    sized = _fit(request, spacing, median_shape, reference)
    patch, num_stages = sized.topology.patch, len(sized.features)
    batch = round(reference / sized.estimate * REFERENCE_BATCH[ndim])
    most = round(num_voxels * planner.max_coverage / math.prod(patch))
    arch = ArchSpec(
        network=planner.network,
        in_channels=len(request.normalization),
        num_outputs=request.num_classes,
        features=sized.features,
        kernel_sizes=sized.topology.kernel_sizes,
        strides=sized.topology.strides,
        blocks=planner.encoder[:num_stages],
        decoder_convs=planner.decoder[: num_stages - 1],
    )
    shared = planner.shares_data and name in ("2d", "3d_fullres")
    return {
        "data_identifier": f"{DEFAULT_PLANS if shared else request.plans_name}_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": max(min(batch, most), MIN_BATCH),
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(median_shape),
        "spacing": list(spacing),
        "normalization_schemes": list(request.normalization),
        "use_mask_for_norm": list(request.use_mask_for_norm),
        **resampling_entries(planner.resampling),
        "architecture": arch.to_nnunet(),
        "batch_dice": batch_dice,
    }


def resampling_entries(kind: Resampling, *, logits: bool = True) -> dict[str, Any]:
    """List the resampling functions and arguments of a configuration (spec 02 §3.10, §3.11).

    Without ``logits`` those of the probabilities stay as in the configuration inherited from.
    """
    torch = kind != "spline"
    function = "resample_torch_fornnunet" if torch else "resample_data_or_seg_to_shape"

    def kwargs(order: int, is_seg: bool) -> dict[str, Any]:
        if not torch:
            return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}
        sepz = kind == "torch_sepz"
        return {
            "is_seg": is_seg,
            "force_separate_z": None if sepz else False,
            "memefficient_seg_resampling": False,
            **({"separate_z_anisotropy_threshold": 3} if sepz else {}),
        }

    entries: dict[str, Any] = {
        "resampling_fn_data": function,
        "resampling_fn_seg": function,
        "resampling_fn_data_kwargs": kwargs(3, False),
        "resampling_fn_seg_kwargs": kwargs(1, True),
    }
    if logits:
        entries["resampling_fn_probabilities"] = function
        entries["resampling_fn_probabilities_kwargs"] = kwargs(1, False)
    return entries


# ----------------------------------------------------------------------------------- experiment


def plan_experiment(
    fingerprint: Mapping[str, Any],
    dataset: Mapping[str, Any],
    *,
    dataset_name: str,
    planner: Planner,
    plans_name: str | None = None,
    gpu_memory_gb: float | None = None,
    overwrite_target_spacing: Sequence[float] | None = None,
    suppress_transpose: bool = False,
) -> dict[str, Any]:
    """Plan all configurations of a dataset: the content of nnU-Net's plans file.

    ``overwrite_target_spacing`` is z, y, x of the images as they are stored, before any transpose.

    Raises:
        PlansError: if fingerprint, dataset.json or options cannot be used.
    """
    shapes = np.array(fingerprint["shapes_after_crop"])
    spacings = np.array(fingerprint["spacings"], dtype=float)
    _check_measured(shapes, spacings)
    target = fullres_spacing(spacings, shapes)
    if overwrite_target_spacing is not None:
        target = tuple(float(s) for s in overwrite_target_spacing)
        if len(target) != spacings.shape[1] or any(not s > 0 for s in target):
            raise PlansError(
                f"target spacing {target} must be {spacings.shape[1]} positive numbers, z y x in mm"
            )
    forward = _transpose(target, suppress_transpose)
    measured = zip(shapes.tolist(), spacings.tolist(), strict=True)
    sizes = [target_shape(shape, spacing, target) for shape, spacing in measured]
    median = np.median(sizes, axis=0)[list(forward)]
    spacing = [target[a] for a in forward]
    request = _request(fingerprint, dataset, planner, plans_name, gpu_memory_gb)
    num_cases = int(dataset["numTraining"])
    statistics = fingerprint["foreground_intensity_properties_per_channel"]
    return {
        "dataset_name": dataset_name,
        "plans_name": request.plans_name,
        "original_median_spacing_after_transp": _floats(np.median(spacings, axis=0)[list(forward)]),
        "original_median_shape_after_transp": [
            round(float(n)) for n in np.median(shapes, axis=0)[list(forward)]
        ],
        "image_reader_writer": reader_writer(dataset),
        "transpose_forward": list(forward),
        "transpose_backward": [forward.index(a) for a in range(len(forward))],
        "configurations": _configurations(request, spacing, _floats(median), num_cases),
        "experiment_planner_used": planner.name,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": dict(statistics),
    }


def _check_measured(shapes: np.ndarray, spacings: np.ndarray) -> None:
    if shapes.ndim != 2 or shapes.shape != spacings.shape or not len(shapes):
        raise PlansError(
            f"fingerprint: shapes_after_crop {shapes.shape} and spacings {spacings.shape} must "
            "hold one triple a case; measure it again with --clean"
        )


def _transpose(target: Sequence[float], suppress: bool) -> Axes:
    first = 0 if suppress else int(np.argmax(target))
    return (first, *(a for a in range(len(target)) if a != first))


def _request(
    fingerprint: Mapping[str, Any],
    dataset: Mapping[str, Any],
    planner: Planner,
    plans_name: str | None,
    gpu_memory_gb: float | None,
) -> _Request:
    memory = planner.memory_gb if gpu_memory_gb is None else float(gpu_memory_gb)
    if not memory > 0:
        raise PlansError(f"GPU memory must be positive, found {memory} GB")
    Labels.from_dataset_json(dataset)  # refuses declarations that are not consistent
    channels = dataset.get("channel_names", dataset.get("modality"))
    if not channels:
        raise PlansError("dataset.json: 'channel_names' is missing")
    schemes = normalization_schemes(channels)
    # spec 02 §3.8: zeros around the body would dominate the statistics of tightly cropped cases
    masked = fingerprint["median_relative_size_after_cropping"] < CROPPED_ENOUGH
    return _Request(
        planner=planner,
        plans_name=plans_name or planner.plans_name,
        memory_gb=memory,
        num_classes=len(dataset["labels"]),
        normalization=schemes,
        use_mask_for_norm=tuple(masked and s == "ZScoreNormalization" for s in schemes),
    )


def reader_writer(dataset: Mapping[str, Any]) -> str:
    """Name nnU-Net's reader for a dataset: the one it declares, else by the file ending."""
    declared = dataset.get("overwrite_image_reader_writer")
    if declared and declared != "None":
        return str(declared)
    return "NibabelIO" if str(dataset.get("file_ending")).lower() == ".nii" else "SimpleITKIO"


def _configurations(
    request: _Request, spacing: list[float], median: list[float], num_cases: int
) -> dict[str, Any]:
    num_voxels = math.prod(median) * num_cases
    found: dict[str, Any] = {
        "2d": _configuration(
            request,
            "2d",
            spacing=spacing[1:],
            median_shape=median[1:],
            num_voxels=num_voxels,
            batch_dice=True,
        )
    }
    if median[0] == 1:
        return found
    fullres = _configuration(
        request,
        "3d_fullres",
        spacing=spacing,
        median_shape=median,
        num_voxels=num_voxels,
        batch_dice=False,
    )
    lowres = _lowres(request, fullres, num_cases)
    if lowres is None:
        return found | {"3d_fullres": fullres}
    fullres["batch_dice"] = True
    return found | {
        "3d_lowres": lowres | {"next_stage": "3d_cascade_fullres"},
        "3d_fullres": fullres,
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }


def _lowres(request: _Request, fullres: Mapping[str, Any], num_cases: int) -> dict[str, Any] | None:
    """Coarsen until the patch covers a quarter of the image; None if that halves nothing."""
    fine, median = np.array(fullres["spacing"]), np.array(fullres["median_image_size_in_voxels"])
    num_fine = float(np.prod(median, dtype=np.float64))
    coarse, num_voxels = fine.copy(), num_fine
    patch, lowres = fullres["patch_size"], None
    while math.prod(patch) / num_voxels < LOWRES_THRESHOLD:
        behind = max(coarse) / coarse > SAME_AXIS_RATIO
        coarse[behind if behind.any() else slice(None)] *= LOWRES_STEP
        size = fine / coarse * median
        num_voxels = float(np.prod(size))
        lowres = _configuration(
            request,
            "3d_lowres",
            spacing=_floats(coarse),
            median_shape=[round(float(n)) for n in size],
            num_voxels=num_voxels * num_cases,
            batch_dice=False,
        )
        patch = lowres["patch_size"]
    return None if lowres is None or num_fine / num_voxels < 2 else lowres


def _floats(values: np.ndarray) -> list[float]:
    return [float(v) for v in values]
