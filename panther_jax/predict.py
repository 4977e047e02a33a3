"""Predict label maps: ``python -m panther_jax.predict``, and :func:`predict` for scripts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panther_jax.base import command
from panther_jax.config.schema import CHECKPOINTS
from panther_jax.ensembles.specification import read_ensemble
from panther_jax.images import dicom_tasks
from panther_jax.images.dicom_tasks import DicomOptions
from panther_jax.inference.folder import PredictError, check_places, predict_folder
from panther_jax.inference.loading import DTYPES, STRATEGIES, load, predict
from panther_jax.library import Face
from panther_jax.weights.names import published_checkpoint, resolve_model

__all__ = ["load", "main", "predict"]

EXAMPLE = """python -m panther_jax.predict --model data/runs/mri_t2 \\
      --input data/raw/Dataset902_PANTHER/imagesTs --output predictions"""


# --------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.predict",
        "Predict label maps of an image or a folder of images. Running it again continues.",
        EXAMPLE,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=Path, nargs="+", metavar="PATH",
        help="run, bundle, nnU-Net model folder, or known name (panther_jax.weights list); "
        "several: mean of their probabilities",
    )  # fmt: skip
    what.add_argument("--ensemble", type=Path, metavar="SPEC.json", help="ensemble file")
    add("--root", type=Path, default=Path("data"), help="where known names are (default: data)")
    what.add_argument("--list-series", action="store_true", help="list the DICOM series, and stop")
    add("--input", type=Path, required=True,
        help="image, folder of CASE_0000.nii.gz files, or of DICOM files")  # fmt: skip
    add("--output", type=Path, help="folder; or a file, for one image")
    add("--series", nargs="+", default=[], metavar="UID",
        help="DICOM series, by UID, number or code (default: all)")  # fmt: skip
    add("--format", nargs="+", choices=dicom_tasks.FORMATS, default=[],
        help="of what is written for DICOM series (default: nifti)")  # fmt: skip
    add("--anonymous", action="store_true", help="no patient's identity in the DICOM written")
    add("--folds", nargs="+", metavar="K", help="numbers, all or fold_all (default: all)")
    add("--checkpoint", choices=CHECKPOINTS, help="which of each fold (default: final)")
    add("--mirror", action="store_true", help="average over mirrored images (slower: 8 times)")
    add("--step-size", type=float, metavar="S", help="tile step, a part of the tile (default: 0.5)")
    add("--strategy", choices=STRATEGIES, default="auto", help="how folds run (default: auto)")
    add("--dtype", choices=DTYPES, default="auto", help="of the convolutions (default: auto)")
    add("--accumulate", choices=("float32", "reference"), default="float32",
        help="reference: float16 sums as nnU-Net (default: float32)")  # fmt: skip
    add("--accumulate-on", choices=("auto", "device", "host"), default="auto",
        help="where the tiles add up (default: auto)")  # fmt: skip
    whole_help = "one tile of the image's size, split over the devices; not what training saw"
    add("--whole-volume", action="store_true", help=whole_help)
    add("--tile-batch", type=int, metavar="N", help="tiles in one call of the network")
    add("--save-probabilities", action="store_true", help="also .npz, .pkl (for nnU-Net), .json")
    add("--overwrite", action="store_true", help="replace what is there, but never an input")
    return parser


def _checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    of_the_spec = ("folds", "checkpoint", "step_size")
    given = [n for n in of_the_spec if getattr(arguments, n) is not None]
    given += ["mirror"] if arguments.mirror else []
    if arguments.ensemble is not None and given:
        options = ", ".join(f"--{n.replace('_', '-')}" for n in given)
        parser.error(f"{options}: with --ensemble, its file says so for each member")
    if arguments.output is None and not arguments.list_series:
        parser.error("the following arguments are required: --output")
    if arguments.step_size is not None and not 0 < arguments.step_size <= 1:
        parser.error(f"--step-size must be in (0, 1], found {arguments.step_size}")
    if arguments.tile_batch is not None and arguments.tile_batch < 1:
        parser.error(f"--tile-batch must be at least 1, found {arguments.tile_batch}")
    if arguments.accumulate == "reference" and arguments.strategy not in ("auto", "loop"):
        parser.error("--accumulate reference sums up each fold on its own: --strategy loop")


def _dicom_options(arguments: argparse.Namespace) -> DicomOptions | None:
    if not (arguments.series or arguments.format or arguments.anonymous):
        return None
    formats = tuple(dict.fromkeys(arguments.format)) or ("nifti",)
    return DicomOptions(tuple(arguments.series), formats, arguments.anonymous)


def _run(arguments: argparse.Namespace) -> str:
    from panther_jax.devices import compiler

    if arguments.list_series:
        return dicom_tasks.list_series(arguments.input)
    check_places(arguments.input, arguments.output)
    compiler.use_compilation_cache()
    if arguments.ensemble is not None:
        model: Any = read_ensemble(arguments.ensemble)
    else:
        published = published_checkpoint(*arguments.model)
        model = arguments.model = [resolve_model(m, arguments.root) for m in arguments.model]
        arguments.checkpoint = arguments.checkpoint or published
    folds = arguments.folds or ()
    predictor = load(
        model,
        folds=folds,
        checkpoint=arguments.checkpoint or "final",
        mirror=arguments.mirror,
        step_size=0.5 if arguments.step_size is None else arguments.step_size,
        strategy=arguments.strategy,
        dtype=arguments.dtype,
        accumulate=arguments.accumulate,
        accumulate_on=arguments.accumulate_on,
        tile_batch=arguments.tile_batch,
        whole_volume=arguments.whole_volume,
    )
    report = predict_folder(
        predictor,
        arguments.input,
        arguments.output,
        save_probabilities=arguments.save_probabilities,
        overwrite=arguments.overwrite,
        dicom=_dicom_options(arguments),
    )
    if report.failed:
        listed = "\n".join(f"case {name}: {text}" for name, text in sorted(report.failed.items()))
        raise PredictError(
            f"{len(report.failed)} case(s) could not be predicted; the others are done.\n{listed}\n"
            "Correct or remove them, and run the same command again: it does only these."
        )
    return str(arguments.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    _checked(parser, arguments)
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


sys.modules[__name__].__class__ = Face  # panther_jax.predict is a function too


if __name__ == "__main__":
    raise SystemExit(main())
