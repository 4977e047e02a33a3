"""Planning: the fingerprint of a raw dataset, its plans, and the plans of a training config."""

import argparse
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panther_jax.base import command
from panther_jax.base.errors import PlansError
from panther_jax.base.files import read_json, read_object, write_text
from panther_jax.images.raw_dataset import RawDataset, open_raw
from panther_jax.images.splits import copy_splits
from panther_jax.panther import configurations
from panther_jax.planner import rules
from panther_jax.planner.fingerprint import dataset_fingerprint
from panther_jax.preprocessing.normalization import NORMALIZATIONS
from panther_jax.store.layout import DATASET, PLANS

DEFAULT_PLANNER = "ResEncL"

logger = logging.getLogger("panther_jax")


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
    panther_resampling: rules.Resampling = "torch"
    panther_normalization: tuple[str, ...] | None = None


def plan_dataset(
    raw: RawDataset, fingerprint: Mapping[str, Any], options: PlanOptions
) -> dict[str, Any]:
    """Plan a raw dataset; with ``options.panther``, PANTHER's configurations are added.

    Raises:
        PlansError: if the planner is not known, or fingerprint and options cannot be used.
    """
    plans = rules.plan_experiment(
        fingerprint,
        raw.dataset,
        dataset_name=raw.folder.resolve().name,
        planner=rules.find_planner(options.planner_name),
        plans_name=options.plans_name,
        gpu_memory_gb=options.gpu_memory_gb,
        overwrite_target_spacing=options.target_spacing,
        suppress_transpose=options.suppress_transpose,
    )
    if options.panther:
        plans["configurations"] |= configurations.panther_configurations(
            plans,
            raw.dataset,
            resampling=options.panther_resampling,
            normalization=options.panther_normalization,
        )
    return plans


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
    known = ", ".join(["default", *(p.name for p in rules.PLANNERS)])
    add("--planner", default=DEFAULT_PLANNER, help=f"default: %(default)s; of {known}")
    add("--plans-name", help="name of the plans (default: the planner's)")
    add("--gpu-memory-gb", type=float, help="plan for this much (default: the planner's)")
    spacing_help = "target spacing in mm, as the images are stored"
    add("--target-spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help=spacing_help)
    add("--suppress-transpose", action="store_true", help="keep the order of axes")
    add("--panther", action="store_true", help=f"add {configurations.ISO} and its _bs4")
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
    rules.find_planner(options.planner_name)
    memory, spacing = options.gpu_memory_gb, options.target_spacing
    if memory is not None and not 0 < memory < math.inf:
        raise command.UsageError(f"--gpu-memory-gb must be positive, found {memory}")
    if spacing is not None and not all(0 < s < math.inf for s in spacing):
        raise command.UsageError(f"--target-spacing must be positive, found {spacing}")
    for scheme in options.panther_normalization or ():
        if scheme not in NORMALIZATIONS.names:
            raise command.UsageError(f"--panther-normalization: {NORMALIZATIONS.unknown(scheme)}")
    if out.exists() and not out.is_dir():
        raise PlansError(f"{out} is a file; name a folder with --out")


def _run(arguments: argparse.Namespace) -> str:
    if arguments.workers < 0:
        raise command.UsageError(f"--workers must not be negative, found {arguments.workers}")
    raw, out, options = open_raw(arguments.raw), arguments.out, _options(arguments)
    _check(options, out)  # before an hour of measuring
    if arguments.from_plans is not None:
        plans = configurations.move_plans(
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
