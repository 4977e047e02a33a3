"""Every broken case of a raw data set, and what the sound ones hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base.console import table
from panther_jax.base.errors import DatasetError, FileError
from panther_jax.images import imageio, raw_dataset
from panther_jax.images.phantom_dataset import Progress
from panther_jax.images.raw_dataset import RawCase
from panther_jax.plans.labels import Labels

MAX_LISTED = 20


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
    raw, found = raw_dataset.scan_raw(folder)
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
        case = raw_dataset.read_case(raw_case, labels)
    except (DatasetError, FileError, FileNotFoundError) as error:
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
