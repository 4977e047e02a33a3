"""Predict a challenge container's one case: ``python -m panther_jax.predict_challenge``."""

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panther_jax.base import command
from panther_jax.config.schema import CHECKPOINTS
from panther_jax.ensembles.specification import read_ensemble
from panther_jax.evaluation.metrics import TUMOR_NAMES
from panther_jax.images.imageio import read_image
from panther_jax.inference.loading import load
from panther_jax.panther.container import (
    ROI_MARGIN_MM,
    ChallengeTask,
    Recipe,
    _values,
    find_input,
    prepare_output,
    segment,
    write_mask,
)
from panther_jax.weights.names import published_checkpoint, resolve_model

LOGGER = logging.getLogger("panther_jax")

OUTPUT_FOLDER = Path("images") / "pancreatic-tumor-segmentation"
FOLDS = ("0", "1", "2", "3", "4")
OF_ROI_FIRST = Path("-")  # the model of --component-filter, unless it is named


TASKS = {
    "t1": ChallengeTask(Path("images") / "abdominal-t1-mri", "final"),
    "t2": ChallengeTask(Path("images") / "abdominal-t2-mri", "best"),
}


# -------------------------------------------------------------------------------------- command

EXAMPLE = """python -m panther_jax.predict_challenge --task t2 --model /opt/ml/model
  python -m panther_jax.predict_challenge --task t1 --model bundle --input in --output out \\
      --roi-first lowres_bundle --component-filter --time-limit 600"""


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.predict_challenge",
        "Predict the case of a PANTHER challenge container: one image in, one tumour mask out.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--task", choices=sorted(TASKS), required=True, help="t1: task 1, T1 MRI; t2: task 2, T2")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=Path, nargs="+", metavar="PATH",
        help="run, bundle, nnU-Net model folder, or known name; several: an ensemble",
    )  # fmt: skip
    what.add_argument("--ensemble", type=Path, metavar="SPEC.json", help="ensemble file")
    add("--root", type=Path, default=Path("data"), help="where known names are (default: data)")
    add("--input", type=Path, default=Path("/input"), help="default: %(default)s")
    add("--output", type=Path, default=Path("/output"), help="default: %(default)s")
    add("--folds", nargs="+", metavar="K", help="default: all that are there, in general 0 to 4")
    add("--checkpoint", choices=CHECKPOINTS,
        help="default: final for t1, best for t2; of a known name the published one")  # fmt: skip
    add("--step-size", type=float, metavar="S", help="tile step, part of a tile (default: 0.5)")
    add("--mirror", action="store_true", help="average over mirrored images, 8 times the work")
    add("--roi-first", type=Path, metavar="MODEL",
        help="find the pancreas with it, predict only around it; whole image if none")  # fmt: skip
    add(
        "--roi-margin", type=float, default=ROI_MARGIN_MM, metavar="MM", help="default: %(default)s"
    )
    add("--component-filter", type=Path, nargs="?", const=OF_ROI_FIRST, metavar="MODEL",
        help="remove components outside the pancreas; MODEL or --roi-first's finds it")  # fmt: skip
    add("--largest-component", action="store_true", help="keep only the largest component")
    add("--time-limit", type=float, metavar="SECONDS",
        help="predict with fewer folds where all would take longer")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a mask that is there")
    return parser


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    step, limit = arguments.step_size, arguments.time_limit
    if step is not None and not 0 < step <= 1:
        parser.error(f"--step-size must be in (0, 1], found {step}")
    if limit is not None and not limit > 0:
        parser.error(f"--time-limit must be positive, found {limit}")
    if not 0 <= arguments.roi_margin < math.inf:
        parser.error(f"--roi-margin must not be negative, found {arguments.roi_margin}")
    if arguments.component_filter == OF_ROI_FIRST and arguments.roi_first is None:
        parser.error("--component-filter needs a MODEL that finds the pancreas, or --roi-first")
    given = [n for n in ("folds", "checkpoint", "step_size") if getattr(arguments, n) is not None]
    if arguments.ensemble is not None and (given or arguments.mirror):
        parser.error(
            "--folds, --checkpoint, --step-size and --mirror do not go with --ensemble: its file "
            "says so for each member"
        )


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.ensemble is not None:
        model = load(read_ensemble(arguments.ensemble))
    else:
        model = load(
            [resolve_model(m, arguments.root) for m in arguments.model],
            folds=arguments.folds or (),
            checkpoint=arguments.checkpoint
            or published_checkpoint(*arguments.model)
            or TASKS[arguments.task].checkpoint,
            mirror=arguments.mirror,
            step_size=arguments.step_size or 0.5,
        )
    for member in model.ensemble.members:
        if member.model.folds != FOLDS:
            LOGGER.info("%s: folds %s", member.model.name, " ".join(member.model.folds) or "-")
    _values(model.labels, TUMOR_NAMES)  # refuse before the work, not after
    roi_model = None if arguments.roi_first is None else _load_one(arguments.roi_first, arguments)
    filter_model = None
    if arguments.component_filter is not None:
        own = arguments.component_filter != OF_ROI_FIRST
        filter_model = _load_one(arguments.component_filter, arguments) if own else roi_model
    return Recipe(model, roi_model, arguments.roi_margin, filter_model, arguments.largest_component)


def _load_one(model: Path, arguments: argparse.Namespace) -> Any:
    checkpoint = published_checkpoint(model) or "final"
    return load(resolve_model(model, arguments.root), checkpoint=checkpoint)


def _run(arguments: argparse.Namespace, start: float) -> str:
    path = find_input(arguments.input, TASKS[arguments.task])
    output = arguments.output / OUTPUT_FOLDER / path.name
    prepare_output(output, overwrite=arguments.overwrite)
    from panther_jax.devices import compiler

    compiler.use_compilation_cache()
    image, geometry = read_image([path])
    recipe = _recipe(arguments)
    loaded = time.monotonic()
    limit = arguments.time_limit
    mask = segment(recipe, image, geometry, deadline=None if limit is None else start + limit)
    predicted = time.monotonic()
    write_mask(output, mask, geometry)
    end = time.monotonic()
    LOGGER.info(
        "%s: %d tumour voxels; wall time %.1f s (read and load %.1f, predict %.1f, write %.1f)",
        path.name, int(mask.sum()), end - start, loaded - start, predicted - loaded,
        end - predicted,
    )  # fmt: skip
    if limit is not None and end - start > limit:
        LOGGER.warning("the time limit of %.0f s was exceeded", limit)
    return str(output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    start = time.monotonic()
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    _check(parser, arguments)
    return command.run(lambda: _run(arguments, start), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    raise SystemExit(main())
