"""Raw datasets in nnU-Net layout: make phantoms, convert downloads, merge, check what is there.

``python -m panther_jax.datasets phantom --out RAW`` draws a procedural abdomen, so that everything
runs with no download; ``… panther|msd|panorama --source DIR --out RAW`` convert archives, ``…
merge`` puts datasets together, ``… check RAW`` lists every broken case.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panther_jax.base import command
from panther_jax.base.console import duration
from panther_jax.base.errors import DatasetError
from panther_jax.base.files import write_json
from panther_jax.images import merging, phantom
from panther_jax.images.checks import check_dataset, report_text
from panther_jax.images.conversion import Conversion, convert
from panther_jax.images.phantom_dataset import DEFAULT_CASES, Progress, make_phantom
from panther_jax.panther import archives, cases

LOGGER = logging.getLogger("panther_jax")
EXAMPLE = "python -m panther_jax.datasets phantom --out data/raw/Dataset902_PhantomT2 --modality t2"


# -------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("panther_jax.datasets", "Make and check raw datasets.", EXAMPLE)
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("phantom", help="a procedural abdominal phantom")
    make.add_argument("--out", type=Path, required=True, help="folder of the new dataset")
    make.add_argument("--modality", choices=phantom.MODALITIES, default="t2")
    make.add_argument("--cases", type=int, default=DEFAULT_CASES, help="default: %(default)s")
    make.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    make.add_argument("--size", choices=("small", "full"), default="small")
    make.add_argument("--labels", type=Path, help="label maps (PANORAMA coding) to draw around")
    make.add_argument("--organs", action="store_true", help="label the organs, not the tumor")
    make.add_argument("--overwrite", action="store_true", help="replace the folder")
    _add_converters(actions)
    check = actions.add_parser("check", help="verify a dataset, list every broken case")
    check.add_argument("raw", type=Path, help="raw dataset folder")
    check.add_argument("--output", type=Path, help="write the whole report as JSON")
    empty_help = "label maps of background alone are sound"
    check.add_argument("--allow-empty", action="store_true", help=empty_help)
    for action in actions.choices.values():  # accepted after the action's name, too
        action.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS)
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
    return parser


def _add_converters(actions: Any) -> None:
    panther = actions.add_parser("panther", help="the challenge's download, one task of it")
    panther.add_argument("--task", choices=("t1", "t2"), required=True)
    msd = actions.add_parser("msd", help="Medical Segmentation Decathlon, Task07 Pancreas")
    panorama = actions.add_parser("panorama", help="PANORAMA, scans and label repository")
    panorama.add_argument("--manual-only", action="store_true", help="leave automatic labels out")
    merge = actions.add_parser("merge", help="several raw datasets as one, with its splits")
    merge.add_argument("--inputs", type=Path, nargs="+", required=True, metavar="RAW")
    merge.add_argument("--tumor-only", action="store_true", help="all but the tumor is background")
    with_help = "leave out cases that hold no voxel of this label, e.g. tumor"
    merge.add_argument("--with-label", metavar="NAME", help=with_help)
    in_all_help = "cases of task 1 (..._0001) train in every fold, validate in none"
    merge.add_argument("--task1-in-all", action="store_true", help=in_all_help)
    for parser in (panther, msd, panorama):
        parser.add_argument("--source", type=Path, required=True, help="folder of the download")
    for parser in (panther, msd, panorama, merge):
        parser.add_argument("--out", type=Path, required=True, help="folder of the new dataset")
        parser.add_argument("--link", action="store_true", help="hard-link images, do not copy")
        workers_help = "processes (default: %(default)s)"
        parser.add_argument("--workers", type=int, default=1, help=workers_help)
        parser.add_argument("--overwrite", action="store_true", help="replace the folder")


def _convert(arguments: argparse.Namespace) -> str:
    if arguments.workers < 0:
        raise command.UsageError(f"--workers must not be negative, found {arguments.workers}")
    if arguments.action == "panther":
        conversion = archives.panther_source(arguments.source, arguments.task)
    elif arguments.action == "msd":
        conversion = archives.msd_source(arguments.source)
    elif arguments.action == "panorama":
        conversion = archives.panorama_source(arguments.source, manual_only=arguments.manual_only)
    else:
        conversion = _merged(arguments)
    convert(
        conversion,
        arguments.out,
        link=arguments.link,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        progress=_lines("converted"),
    )
    return str(arguments.out)


def _merged(arguments: argparse.Namespace) -> Conversion:
    options = {name: getattr(arguments, name) for name in ("tumor_only", "task1_in_all")}
    if arguments.with_label is not None:
        options["with_label"] = arguments.with_label
    how = cases.merging(**options)
    return merging.merged_source(arguments.inputs, how, options=options, workers=arguments.workers)


def _lines(what: str) -> Progress:
    start = time.monotonic()

    def tell(case_id: str, done: int, total: int) -> None:
        left = (time.monotonic() - start) / done * (total - done)
        LOGGER.info("%s %s (%d/%d), left %s", what, case_id, done, total, duration(left))

    return tell


def _run(arguments: argparse.Namespace) -> str:
    if arguments.action == "phantom":
        if arguments.cases < 1 or arguments.seed < 0:
            raise command.UsageError("--cases must be at least 1 and --seed at least 0")
        make_phantom(
            arguments.out,
            modality=arguments.modality,
            num_cases=arguments.cases,
            seed=arguments.seed,
            size=arguments.size,
            label_folder=arguments.labels,
            organs=arguments.organs,
            overwrite=arguments.overwrite,
            progress=_lines("made"),
        )
        return str(arguments.out)
    if arguments.action != "check":
        return _convert(arguments)
    report = check_dataset(arguments.raw, progress=_lines("checked"))
    if arguments.output is not None:
        write_json(arguments.output, report.to_json())
    text = report_text(report)
    empty = () if arguments.allow_empty else report.without_foreground
    if report.broken or report.problems or empty:
        raise DatasetError(f"{arguments.raw} is not sound\n{text}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = _parser().parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    raise SystemExit(main())
