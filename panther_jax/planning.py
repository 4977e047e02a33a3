"""Planning: the fingerprint of a raw dataset, its plans, and the plans of a training config.

``python -m panther_jax.planning --raw RAW --out DIR`` writes ``dataset_fingerprint.json``,
``plans.json`` and ``dataset.json`` with nnU-Net's numbers (spec 02 §2-3).
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from panther_jax import command, panther_plans, planner
from panther_jax.config import TrainConfig
from panther_jax.cropping import crop_to_nonzero
from panther_jax.imageio import Case, DatasetError, RawCase, RawDataset, open_raw, read_case
from panther_jax.log import write_text
from panther_jax.plans import (
    NORMALIZATIONS,
    ArchSpec,
    IntensityProperties,
    Labels,
    Plans,
    PlansError,
    Resampler,
    normalization_schemes,
    read_json,
    read_object,
)
from panther_jax.store import DATASET, FINGERPRINT, PLANS, copy_splits, write_json
from panther_jax.workers import Failure, map_cases

SAMPLE_BUDGET = 10**8
SAMPLE_SEED = 1234
PERCENTILES = (0.5, 50.0, 99.5)

DEFAULT_PLANNER = "ResEncL"

logger = logging.getLogger("panther_jax")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CaseFingerprint:
    """What one case adds to a fingerprint; ``samples`` are foreground intensities, a channel."""

    shape_after_crop: tuple[int, ...]
    spacing_zyx: tuple[float, ...]
    relative_size: float
    samples: tuple[Float32[np.ndarray, " sample"], ...]


@dataclass(frozen=True)
class _Task:
    case: RawCase
    labels: Labels
    num_samples: int


def case_fingerprint(case: Case, num_samples: int) -> CaseFingerprint:
    """Measure one case: crop, and sample its foreground with replacement (spec 02 §2).

    Foreground is every label above 0, the ignore label included.

    Raises:
        DatasetError: if the case has no label.
    """
    if case.label is None:
        raise DatasetError(f"case {case.id!r} has no label map; the fingerprint needs one")
    image, label, _ = crop_to_nonzero(case.image, case.label)
    foreground = label > 0
    random = np.random.RandomState(SAMPLE_SEED)  # one a case, shared by its channels in turn
    samples = []
    for channel in image:
        pixels = channel[foreground]
        count = num_samples if pixels.size else 0
        samples.append(pixels[random.randint(0, pixels.size, size=count)] if count else pixels[:0])
    return CaseFingerprint(
        shape_after_crop=tuple(image.shape[1:]),
        spacing_zyx=case.geometry.spacing_zyx,
        relative_size=image[0].size / case.image[0].size,
        samples=tuple(samples),
    )


def extract_fingerprint(
    raw: RawDataset,
    *,
    budget: int = SAMPLE_BUDGET,
    workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure all training cases: the content of nnU-Net's ``dataset_fingerprint.json``.

    ``budget`` is the number of intensities sampled over all cases, a channel.

    Raises:
        DatasetError: listing every broken case, or if no case has foreground.
        WorkerError: naming the case, if a worker fails.
    """
    num_samples = int(budget // len(raw.cases))
    tasks = [(case.id, _Task(case, raw.labels, num_samples)) for case in raw.cases]
    found: dict[str, Any] = {}
    for case_id, result in map_cases(_read_and_measure, tasks, workers=workers):
        found[case_id] = result
        if progress is not None:
            progress(case_id, len(found), len(tasks))
    broken = [(i, r.message) for i, r in sorted(found.items()) if isinstance(r, Failure)]
    if broken:
        listed = "\n".join(f"case {case_id!r}: {message}" for case_id, message in broken)
        raise DatasetError(f"{len(broken)} of {len(tasks)} cases cannot be read\n{listed}")
    cases = [found[case.id] for case in raw.cases]
    return {
        "foreground_intensity_properties_per_channel": {
            str(channel): _intensity([case.samples[channel] for case in cases], raw)
            for channel in range(raw.num_channels)
        },
        "median_relative_size_after_cropping": float(np.median([c.relative_size for c in cases])),
        "shapes_after_crop": [list(case.shape_after_crop) for case in cases],
        "spacings": [list(case.spacing_zyx) for case in cases],
    }


def _read_and_measure(task: _Task) -> CaseFingerprint:
    return case_fingerprint(read_case(task.case, task.labels), task.num_samples)


def _intensity(samples: Sequence[np.ndarray], raw: RawDataset) -> dict[str, float]:
    values = np.concatenate(samples)
    if not values.size:
        raise DatasetError(
            f"{raw.folder}: no case has a voxel labelled above 0; expected foreground to measure"
        )
    low, median, high = np.percentile(values, PERCENTILES)
    return {
        "max": float(values.max()),
        "mean": float(values.mean()),
        "median": float(median),
        "min": float(values.min()),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
        "std": float(values.std()),
    }


# ----------------------------------------------------------------------------- plans of a config


def plans_from_config(
    config: TrainConfig, dataset: Mapping[str, Any], fingerprint: Mapping[str, Any] | None = None
) -> Plans:
    """Make the plans that a training config describes; ``dataset`` is the raw dataset.json.

    Raises:
        PlansError: if channels and normalisation do not match, or CTNormalization lacks a
            ``fingerprint``.
    """
    data = config.data
    labels = Labels.from_dataset_json(dataset)
    normalization = _normalization(config, dataset)
    intensity = _intensity_properties(fingerprint) if needs_fingerprint(config, dataset) else ()
    return Plans(
        dataset_name=data.dataset,
        plans_name=data.plans_name,
        configuration=data.configuration,
        spacing=data.spacing_mm,
        patch_size=data.patch_size,
        batch_size=data.batch_size,
        batch_dice=bool(config.loss.batch_dice),
        normalization=normalization,
        use_mask_for_norm=(False,) * len(normalization),
        resampling_image=_resampler(data.resampling, order=3, is_seg=False),
        resampling_label=_resampler(data.resampling, order=1, is_seg=True),
        resampling_logits=_resampler("spline", order=1, is_seg=False),
        arch=ArchSpec(
            network=config.arch.network,
            in_channels=len(normalization),
            num_outputs=labels.num_outputs,
            features=config.arch.features,
            kernel_sizes=config.arch.kernel_sizes,
            strides=config.arch.strides,
            blocks=config.arch.blocks,
            decoder_convs=config.arch.decoder_convs,
        ),
        intensity=intensity,
        data_identifier=data.data_identifier,
    )


def needs_fingerprint(config: TrainConfig, dataset: Mapping[str, Any]) -> bool:
    """Tell whether a channel is normalised by the dataset's intensity statistics."""
    return "CTNormalization" in _normalization(config, dataset)


def fingerprint_if_needed(
    config: TrainConfig, raw: RawDataset, store_folder: Path, *, workers: int
) -> dict[str, Any] | None:
    """Read the fingerprint kept in the store, else extract and keep it; None if none is needed."""
    if not needs_fingerprint(config, raw.dataset):
        return None
    path = store_folder / FINGERPRINT
    if path.is_file():
        return read_json(path)
    logger.info("measuring the intensities of %d cases", len(raw.cases))
    fingerprint = extract_fingerprint(raw, workers=workers)
    write_json(path, fingerprint)
    return fingerprint


def _normalization(config: TrainConfig, dataset: Mapping[str, Any]) -> tuple[str, ...]:
    channels = dataset.get("channel_names", dataset.get("modality"))
    if not channels:
        raise PlansError("dataset.json: 'channel_names' is missing")
    given = config.data.normalization
    if given is None:
        return normalization_schemes(channels)
    if len(given) != len(channels):
        raise PlansError(
            f"data.normalization names {len(given)} scheme(s), the dataset has {len(channels)} "
            f"channel(s): {channels}"
        )
    return given


def _intensity_properties(
    fingerprint: Mapping[str, Any] | None,
) -> tuple[IntensityProperties, ...]:
    if fingerprint is None:
        raise PlansError(
            "CTNormalization needs the dataset's intensity statistics; pass the fingerprint that "
            "planning.extract_fingerprint measures, or choose data.normalization"
        )
    channels = fingerprint["foreground_intensity_properties_per_channel"]
    return tuple(
        IntensityProperties(**{k: float(v) for k, v in channels[key].items()})
        for key in sorted(channels, key=int)
    )


def _resampler(kind: str, *, order: int, is_seg: bool) -> Resampler:
    kwargs: dict[str, Any] = {"is_seg": is_seg}
    if kind == "torch":
        kwargs |= {"force_separate_z": False, "memefficient_seg_resampling": False}
        return Resampler("resample_torch_fornnunet", tuple(sorted(kwargs.items())))
    kwargs |= {"order": order, "order_z": 0, "force_separate_z": None}
    return Resampler("resample_data_or_seg_to_shape", tuple(sorted(kwargs.items())))


# ------------------------------------------------------------------------------------ a dataset


@dataclass(frozen=True)
class PlanOptions:
    """What the command offers; None is the planner's own choice."""

    planner_name: str = DEFAULT_PLANNER
    plans_name: str | None = None
    gpu_memory_gb: float | None = None
    target_spacing: tuple[float, ...] | None = None
    suppress_transpose: bool = False
    panther: bool = False
    panther_resampling: planner.Resampling = "torch"
    panther_normalization: tuple[str, ...] | None = None


def plan_dataset(
    raw: RawDataset, fingerprint: Mapping[str, Any], options: PlanOptions
) -> dict[str, Any]:
    """Plan a raw dataset; with ``options.panther``, PANTHER's configurations are added.

    Raises:
        PlansError: if the planner is not known, or fingerprint and options cannot be used.
    """
    plans = planner.plan_experiment(
        fingerprint,
        raw.dataset,
        dataset_name=raw.folder.resolve().name,
        planner=planner.find_planner(options.planner_name),
        plans_name=options.plans_name,
        gpu_memory_gb=options.gpu_memory_gb,
        overwrite_target_spacing=options.target_spacing,
        suppress_transpose=options.suppress_transpose,
    )
    if options.panther:
        plans["configurations"] |= panther_plans.panther_configurations(
            plans,
            raw.dataset,
            resampling=options.panther_resampling,
            normalization=options.panther_normalization,
        )
    return plans


def dataset_fingerprint(
    raw: RawDataset,
    folder: Path,
    *,
    workers: int = 0,
    clean: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read the fingerprint in ``folder``, else measure the dataset and write it there.

    Raises:
        DatasetError: if it is of another number of cases, or cases cannot be read.
    """
    path = folder / FINGERPRINT
    if path.is_file() and not clean:
        fingerprint = read_object(path)
        num_measured = len(fingerprint.get("spacings", ()))
        if num_measured != len(raw.cases):
            raise DatasetError(
                f"{path} is of {num_measured} cases, {raw.folder} has {len(raw.cases)}; pass "
                "--clean to measure again"
            )
        return fingerprint
    fingerprint = extract_fingerprint(raw, workers=workers, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(fingerprint, indent=4))
    return fingerprint


def write_plans(
    folder: Path, plans: Mapping[str, Any], raw_folder: Path, *, overwrite: bool = False
) -> None:
    """Write ``plans.json``, and a copy of the raw dataset's ``dataset.json`` beside it.

    Configurations of an existing plans file that the new plans do not have are kept (spec 02
    §3.10). Equal files are left alone.

    Raises:
        PlansError: if a file would change and ``overwrite`` is not set.
    """
    path = folder / PLANS
    old = read_object(path) if path.is_file() else {}
    kept = {
        name: entry
        for name, entry in (old.get("configurations") or {}).items()
        if name not in plans["configurations"]
    }
    merged = dict(plans) | {"configurations": {**plans["configurations"], **kept}}
    wanted = {
        path: json.dumps(merged, indent=4),
        folder / DATASET: (raw_folder / DATASET).read_text(encoding="utf-8"),
    }
    for target, text in wanted.items():
        if target.is_file() and read_json(target) != json.loads(text) and not overwrite:
            raise PlansError(
                f"{target} exists and would change; pass --overwrite, or choose another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for target, text in wanted.items():
        write_text(target, text)


# -------------------------------------------------------------------------------------- command

EXAMPLE = (
    "python -m panther_jax.planning --raw data/raw/Dataset901_PANTHER \\\n"
    "      --out data/plans/Dataset901_PANTHER --planner ResEncL --panther"
)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.planning", "Measure a raw dataset and plan as nnU-Net does.", EXAMPLE
    )
    add = parser.add_argument
    add("--raw", type=Path, required=True, help="raw dataset, nnU-Net layout")
    add("--out", type=Path, required=True, help="folder of the plans")
    known = ", ".join(["default", *(p.name for p in planner.PLANNERS)])
    add("--planner", default=DEFAULT_PLANNER, help=f"default: %(default)s; of {known}")
    add("--plans-name", help="name of the plans (default: the planner's)")
    add("--gpu-memory-gb", type=float, help="plan for this much (default: the planner's)")
    spacing_help = "target spacing in mm, as the images are stored"
    add("--target-spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help=spacing_help)
    add("--suppress-transpose", action="store_true", help="keep the order of axes")
    add("--panther", action="store_true", help=f"add {panther_plans.ISO} and its _bs4")
    kinds = ("torch", "torch_sepz", "spline")
    add("--panther-resampling", choices=kinds, default="torch", help="default: %(default)s")
    add("--panther-normalization", nargs="+", metavar="SCHEME", help="default: by channel name")
    add("--from-plans", type=Path, help="take another dataset's plans instead of planning")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    add("--clean", action="store_true", help="measure again even if a fingerprint is there")
    add("--overwrite", action="store_true", help="replace plans that differ")
    return parser


def _options(arguments: argparse.Namespace) -> PlanOptions:
    spacing, schemes = arguments.target_spacing, arguments.panther_normalization
    return PlanOptions(
        planner_name=arguments.planner,
        plans_name=arguments.plans_name,
        gpu_memory_gb=arguments.gpu_memory_gb,
        target_spacing=None if spacing is None else tuple(spacing),
        suppress_transpose=arguments.suppress_transpose,
        panther=arguments.panther,
        panther_resampling=arguments.panther_resampling,
        panther_normalization=None if schemes is None else tuple(schemes),
    )


def _check(options: PlanOptions, out: Path) -> None:
    planner.find_planner(options.planner_name)
    memory, spacing = options.gpu_memory_gb, options.target_spacing
    if memory is not None and not 0 < memory < math.inf:
        raise command.UsageError(f"--gpu-memory-gb must be positive, found {memory}")
    if spacing is not None and not all(0 < s < math.inf for s in spacing):
        raise command.UsageError(f"--target-spacing must be positive, found {spacing}")
    unknown = sorted({*(options.panther_normalization or ())} - {*NORMALIZATIONS})
    if unknown:
        raise command.UsageError(
            f"--panther-normalization {' '.join(unknown)} is not known; expected "
            f"{', '.join(NORMALIZATIONS)}"
        )
    if out.exists() and not out.is_dir():
        raise PlansError(f"{out} is a file; name a folder with --out")


def _run(arguments: argparse.Namespace) -> str:
    if arguments.workers < 0:
        raise command.UsageError(f"--workers must not be negative, found {arguments.workers}")
    raw, out, options = open_raw(arguments.raw), arguments.out, _options(arguments)
    _check(options, out)  # before an hour of measuring
    if arguments.from_plans is not None:
        plans = panther_plans.move_plans(
            read_object(arguments.from_plans),
            raw.dataset,
            dataset_name=raw.folder.resolve().name,
            plans_name=options.plans_name,
        )
    else:
        fingerprint = dataset_fingerprint(
            raw,
            out,
            workers=arguments.workers,
            clean=arguments.clean,
            progress=lambda case_id, done, total: logger.info(
                "measured %s (%d/%d)", case_id, done, total
            ),
        )
        plans = plan_dataset(raw, fingerprint, options)
    write_plans(out, plans, raw.folder, overwrite=arguments.overwrite)
    copy_splits(raw.folder, out)
    return str(out / PLANS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = _parser().parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    raise SystemExit(main())
