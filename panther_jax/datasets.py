"""Raw datasets in nnU-Net layout: make phantoms, convert downloads, merge, check what is there.

``python -m panther_jax.datasets phantom --out RAW`` draws a procedural abdomen, so that everything
runs with no download; ``… panther|msd|panorama --source DIR --out RAW`` convert archives, ``…
merge`` puts datasets together, ``… check RAW`` lists every broken case.
"""

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax import command, converters, imageio, phantom
from panther_jax.imageio import Case, DatasetError, RawCase
from panther_jax.log import duration, table, write_json
from panther_jax.plans import Labels, PlansError

LOGGER = logging.getLogger("panther_jax")
MAX_LISTED = 20
CHANNELS = {"ct": "CT", "t1": "MRI", "t2": "MRI"}
ENDINGS = {"ct": ".nii.gz", "t1": ".mha", "t2": ".mha"}
DEFAULT_CASES = 10
EXAMPLE = "python -m panther_jax.datasets phantom --out data/raw/Dataset902_PhantomT2 --modality t2"

Progress = Callable[[str, int, int], None]


# ------------------------------------------------------------------------------------- phantom


def make_phantom(
    out: Path,
    *,
    modality: phantom.Modality = "t2",
    num_cases: int = DEFAULT_CASES,
    seed: int = 0,
    size: phantom.Size = "small",
    label_folder: Path | None = None,
    organs: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a phantom dataset to the folder ``out``, which appears when it is complete.

    The same seed gives the same anatomy in every modality. With ``label_folder``, one case is made
    around each of its label maps (PANORAMA coding), up to ``num_cases`` of them. ``organs`` labels
    the organs around instead of tumour and pancreas, as a foundation model's data would.

    Raises:
        DatasetError: if ``out`` exists and is not to be overwritten, or there are no label maps.
    """
    if organs and label_folder:
        raise DatasetError("--organs draws its own anatomy; leave --labels out")
    if out.exists() and not overwrite:
        raise DatasetError(
            f"{out} exists; pass --overwrite to replace it, or choose another folder"
        )
    label_files = _label_files(label_folder) if label_folder else None
    count = num_cases if label_files is None else min(num_cases, len(label_files))
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in ("imagesTr", "labelsTr"):
            (temporary / name).mkdir(parents=True)
        for index in range(count):
            case = phantom.make_phantom_case(
                index,
                modality=modality,
                seed=seed,
                size=size,
                label_file=None if label_files is None else label_files[index],
                organs=organs,
            )
            _write_case(temporary, case, ENDINGS[modality])
            if progress is not None:
                progress(case.id, index + 1, count)
        entries = {
            "channel_names": {"0": CHANNELS[modality]},
            "labels": phantom.ORGAN_LABELS if organs else phantom.LABELS,
            "numTraining": count,
            "file_ending": ENDINGS[modality],
            "name": out.name,
            "description": f"procedural abdominal phantom, {modality}, seed {seed}",
        }
        write_json(temporary / "dataset.json", entries)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_case(folder: Path, case: Case, ending: str) -> None:
    assert case.label is not None, case.id
    image = case.image[0].astype(np.int16)  # phantoms are whole numbers
    imageio.write_image(folder / "imagesTr" / f"{case.id}_0000{ending}", image, case.geometry)
    imageio.write_label(folder / "labelsTr" / f"{case.id}{ending}", case.label, case.geometry)


def _label_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.glob("*") if p.name.endswith((".nii.gz", ".mha", ".nrrd")))
    if not files:
        raise DatasetError(f"{folder} holds no label maps (.nii.gz, .mha or .nrrd)")
    return files


# --------------------------------------------------------------------------------------- check


@dataclass(frozen=True)
class CaseReport:
    """What a check found of one case: its problems, voxels a label, shape and spacing."""

    id: str
    problems: tuple[str, ...]
    voxels: dict[int, int]
    shape_zyx: tuple[int, ...] = ()
    spacing_zyx: tuple[float, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """What a check found of a dataset; ``problems`` are those of the dataset as a whole."""

    folder: Path
    labels: Labels
    problems: tuple[str, ...]
    cases: tuple[CaseReport, ...]

    @property
    def broken(self) -> tuple[CaseReport, ...]:
        """Cases with problems."""
        return tuple(c for c in self.cases if c.problems)

    @property
    def without_foreground(self) -> tuple[str, ...]:
        """Sound cases whose label map is background alone."""
        foreground = set(self.labels.foreground_ids)
        return tuple(c.id for c in self.cases if not c.problems and not foreground & {*c.voxels})

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able dictionary."""
        return {
            "folder": str(self.folder),
            "problems": list(self.problems),
            "broken_cases": [c.id for c in self.broken],
            "cases_without_foreground": list(self.without_foreground),
            "cases": [
                {
                    "id": c.id,
                    "problems": list(c.problems),
                    "voxels": {str(k): v for k, v in c.voxels.items()},
                    "shape_zyx": list(c.shape_zyx),
                    "spacing_zyx": list(c.spacing_zyx),
                }
                for c in self.cases
            ],
        }


def check_dataset(folder: Path, *, progress: Progress | None = None) -> DatasetReport:
    """Read every case of a raw dataset and report all that is wrong.

    Raises:
        FileNotFoundError, DatasetError, PlansError: if dataset.json itself cannot be used.
    """
    raw, found = imageio.scan_raw(folder)
    known = {case.id for case in raw.cases}
    general = [
        f"{key}: {text}" for key, texts in found.items() if key not in known for text in texts
    ]
    declared = raw.dataset["numTraining"]
    if declared != len(raw.cases):
        general.append(f"dataset.json: numTraining is {declared}, there are {len(raw.cases)} cases")
    reports = []
    for done, case in enumerate(raw.cases, start=1):
        problems = found.get(case.id)
        reports.append(
            CaseReport(case.id, problems, {}) if problems else _check_case(case, raw.labels)
        )
        if progress is not None:
            progress(case.id, done, len(raw.cases))
    return DatasetReport(folder, raw.labels, tuple(general), tuple(reports))


def _check_case(raw_case: RawCase, labels: Labels) -> CaseReport:
    try:
        case = imageio.read_case(raw_case, labels)
    except (DatasetError, PlansError, FileNotFoundError) as error:
        return CaseReport(raw_case.id, (str(error),), {})
    assert case.label is not None, raw_case.id
    values, counts = imageio.label_values(case.label)
    problems = [
        f"channel {c} is constant ({float(channel.flat[0]):g}): {raw_case.images[c]}"
        for c, channel in enumerate(case.image)
        if channel.min() == channel.max()
    ]
    return CaseReport(
        raw_case.id,
        tuple(problems),
        {int(v): int(n) for v, n in zip(values, counts, strict=True)},
        case.geometry.shape_zyx,
        case.geometry.spacing_zyx,
    )


def report_text(report: DatasetReport) -> str:
    """Class frequencies, geometry and the first problems, as text."""
    sound = [c for c in report.cases if not c.problems]
    rows = []
    for name, value in report.labels.classes:
        ids = value if isinstance(value, tuple) else (value,)
        millilitres = [
            sum(c.voxels.get(i, 0) for i in ids) * float(np.prod(c.spacing_zyx)) / 1000
            for c in sound
        ]
        present = [v for v in millilitres if v > 0]
        middle = f"{np.median(present):.1f}" if present else "-"
        rows.append([name, f"{len(present)}/{len(sound)}", middle])
    lines = [table(["class", "cases", "median ml"], rows)]
    if sound:
        for what, values in (
            ("shape", [c.shape_zyx for c in sound]),
            ("spacing mm", [c.spacing_zyx for c in sound]),
        ):
            low, high = np.min(values, axis=0), np.max(values, axis=0)
            lines.append(f"{what} z y x: {_numbers(low)} to {_numbers(high)}")
    if report.without_foreground:
        lines.append(
            f"without foreground: {', '.join(report.without_foreground[:MAX_LISTED])} (background "
            "alone; --allow-empty if that is meant)"
        )
    problems = [*report.problems, *(f"{c.id}: {p}" for c in report.broken for p in c.problems)]
    lines += problems[:MAX_LISTED]
    if len(problems) > MAX_LISTED:
        lines.append(f"... and {len(problems) - MAX_LISTED} more")
    lines.append(f"{len(report.broken)} of {len(report.cases)} cases are broken")
    return "\n".join(lines)


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{v:.4g}" for v in values)


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
        conversion = converters.panther_source(arguments.source, arguments.task)
    elif arguments.action == "msd":
        conversion = converters.msd_source(arguments.source)
    elif arguments.action == "panorama":
        conversion = converters.panorama_source(arguments.source, manual_only=arguments.manual_only)
    else:
        conversion = converters.merged_source(
            arguments.inputs,
            tumor_only=arguments.tumor_only,
            task1_in_all=arguments.task1_in_all,
        )
    converters.convert(
        conversion,
        arguments.out,
        link=arguments.link,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        progress=_lines("converted"),
    )
    return str(arguments.out)


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
