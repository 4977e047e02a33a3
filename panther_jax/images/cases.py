"""Which cases there are to predict in a file or a folder, and where their label maps go."""

import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer

from panther_jax.base.errors import DatasetError
from panther_jax.images.endings import is_utf8, lowered, readable, split_ending
from panther_jax.images.formats import FORMATS
from panther_jax.images.imageio import read_image, write_label
from panther_jax.images.raw_dataset import RawCase, channel_numbers
from panther_jax.plans.geometry import Geometry

LOGGER = logging.getLogger("panther_jax")
MAX_LISTED = 5


@dataclass(frozen=True)
class Task:
    """A case to predict: its files and where its label map goes; or why it cannot be predicted."""

    case: RawCase
    output: Path
    problem: str = ""

    @property
    def stem(self) -> str:
        """Name of the output without its ending."""
        return split_ending(self.output.name)[0]

    @property
    def key(self) -> str:
        """What the record of its outputs is kept under; one for each output of a folder."""
        return readable(self.output.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its label map."""
        return (self.output,)

    @property
    def sources(self) -> dict[str, tuple[Path, ...]]:
        """Its input files by the name that a record may tell."""
        return {readable(path.name): (path,) for path in self.case.images}

    @property
    def writes(self) -> dict[str, object]:
        """What changes its files beside the label map in them."""
        return {}

    def read(self) -> tuple[Float32[np.ndarray, "channel z y x"], Geometry]:
        """The image and its grid.

        Raises:
            FileNotFoundError, DatasetError: naming the file that cannot be used.
        """
        return read_image(self.case.images)

    def write(self, label: Integer[np.ndarray, "z y x"], geometry: Geometry) -> None:
        """Write the label map; the file is whole or not there."""
        write_label(self.output, label, geometry)


def find_tasks(
    source: Path,
    output: Path,
    *,
    num_channels: int,
    file_ending: str,
    made: Collection[str] = (),
) -> tuple[Task, ...]:
    """List what there is to predict in a file or a folder of ``CASE_0000`` files.

    A case that lacks a channel is listed with its problem. In a folder, files with the
    ``file_ending`` of the model's training are taken, where there are none (or it is empty) all
    that can be read;
    files named in ``made`` are predictions of earlier calls, and no inputs.

    Raises:
        FileNotFoundError: if the source is missing.
        DatasetError: if there is nothing to predict.
    """
    if source.is_file():
        return (_single_task(source, output, num_channels, made),)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist; expected an image or a folder of them")
    found = sorted(p for p in source.iterdir() if not p.name.startswith(".") and not p.is_dir())
    files = [p for p in found if split_ending(p.name)[1] and p.name not in made]
    chosen = [p for p in files if p.name.lower().endswith(file_ending.lower())] or files
    if file_ending:
        _tell_of_others(source, found, files, chosen)
    if not chosen:
        raise DatasetError(
            f"{source} holds no image; expected files named CASE_0000{file_ending} (or one of "
            f"{', '.join(FORMATS.names)})"
        )
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in chosen:
        stem, ending = split_ending(path.name)
        match = re.fullmatch(r"(.+)_\d{4}", stem, re.DOTALL)
        name = match[1] if match else path.name
        groups.setdefault((name, ending.lower()), []).append(path)
    tasks = [
        _folder_task(name, ending, paths, output, num_channels)
        for (name, ending), paths in sorted(groups.items())
    ]
    return _one_of_a_name(_beside_scans(tasks))


def _tell_of_others(
    source: Path, found: Sequence[Path], files: Sequence[Path], chosen: Sequence[Path]
) -> None:
    """Name the images that are left out, and say why."""
    endings = sorted({split_ending(p.name)[1] for p in chosen})
    for level, why, paths in (
        (logging.INFO, "is a prediction made by an earlier call, and no input",
         [p for p in found if split_ending(p.name)[1] and p not in files]),
        (logging.WARNING, f"is left out: images that end in {', '.join(endings)} are taken",
         [p for p in files if p not in chosen]),
    ):  # fmt: skip
        for path in paths[:MAX_LISTED]:
            LOGGER.log(level, "%s in %s %s", readable(path.name), readable(str(source)), why)
        if len(paths) > MAX_LISTED:
            LOGGER.log(level, "... and %d more", len(paths) - MAX_LISTED)


def _beside_scans(tasks: Sequence[Task]) -> list[Task]:
    """A file without channel number beside the scan of its name is a label map, not a scan."""
    names = {t.case.id: t.case.images[0] for t in tasks if not _is_unnumbered(t)}
    result = []
    for task in tasks:
        if _is_unnumbered(task) and task.case.id in names:
            name = task.case.images[0].name
            problem = (
                f"{name} has no channel number and lies beside {names[task.case.id].name}: is it a "
                "label map? Move it to another folder"
            )
            task = Task(task.case, task.output, readable(problem))
        result.append(task)
    return result


def _one_of_a_name(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Cases that share an id would share their files: none of them is predicted."""
    by_id: dict[str, list[Task]] = {}
    for task in tasks:
        by_id.setdefault(task.case.id.casefold(), []).append(task)
    result = []
    for task in tasks:
        same = [t for t in by_id[task.case.id.casefold()] if not _is_unnumbered(t)]
        if len(same) > 1 and not task.problem:
            names = ", ".join(t.case.images[0].name for t in same)
            problem = f"{names} are of one name; rename all but one, or move them elsewhere"
            task = Task(task.case, task.output, readable(problem))
        result.append(task)
    return tuple(result)


def _is_unnumbered(task: Task) -> bool:
    return split_ending(task.case.images[0].name)[0] == task.case.id


def _single_task(source: Path, output: Path, num_channels: int, made: Collection[str]) -> Task:
    stem, ending = split_ending(source.name)
    if not ending:
        raise DatasetError(f"{source}: its ending is none of {', '.join(FORMATS.names)}")
    match = re.fullmatch(r"(.+)_0000", stem, re.DOTALL)
    name, paths = match[1] if match else stem, [source]
    if match:
        pattern = re.compile(re.escape(name) + r"_\d{4}" + re.escape(ending))
        beside = (p for p in source.parent.iterdir() if pattern.fullmatch(p.name))
        paths = sorted(p for p in beside if p == source or p.name not in made)
    if not split_ending(output.name)[1]:
        output = output / f"{name}{ending.lower()}"
    problem = _problem(paths, num_channels, name)
    return Task(RawCase(name, tuple(paths), None), output, problem)


def _folder_task(
    name: str, ending: str, paths: Sequence[Path], output: Path, num_channels: int
) -> Task:
    unnumbered = name == paths[0].name
    stem = name.removesuffix(ending) if unnumbered else name
    if unnumbered:
        stem = split_ending(name)[0]
    problem = _problem(paths, num_channels, stem)
    if unnumbered and not problem.startswith("the name"):
        problem = readable(f"{name} has no channel number; rename it to {stem}_0000{ending}")
    return Task(RawCase(stem, tuple(paths), None), output / f"{stem}{ending}", problem)


def _problem(paths: Sequence[Path], num_channels: int, case_id: str) -> str:
    names = [p.name for p in paths]
    shown = [readable(name) for name in names]
    if not all(is_utf8(name) for name in names):
        return (
            f"the name of {', '.join(shown)} is not UTF-8 (the bytes shown as \\x.. are of another "
            "encoding); rename the file"
        )
    for path in paths:
        if not path.is_file():
            return (
                f"{path.name} is a link to a file that is not there; fetch it, or remove the link"
            )
    if len(paths) != num_channels:
        return f"{len(paths)} channel(s) {shown}, the model takes {num_channels}"
    numbers = channel_numbers(names, case_id)
    if numbers and numbers != list(range(num_channels)):
        return (
            f"channel numbers {numbers}, expected 0 to {num_channels - 1}; where they belong to "
            f"the case's name, rename {shown[0]} to {_with_channel(shown[0])}"
        )
    return ""


def _with_channel(name: str) -> str:
    stem, ending = split_ending(name)
    return lowered(f"{stem}_0000{ending}")


# -------------------------------------------------------------------------------- outputs apart


def require_apart(tasks: Sequence[Task]) -> None:
    """Refuse outputs that are inputs, under whatever names: links, other spellings, capitals.

    Raises:
        DatasetError: naming the first, with what to choose instead.
    """
    inputs: dict[tuple[int, int], Path] = {}
    names: dict[tuple[Path, str], Path] = {}
    for path in (p for task in tasks for p in task.case.images):
        names[_spelling(path)] = path
        if path.exists():
            status = path.stat()
            inputs[status.st_dev, status.st_ino] = path
    for task in tasks:
        for output in task.files:
            same = names.get(_spelling(output))
            if same is None and output.exists():
                status = output.stat()
                same = inputs.get((status.st_dev, status.st_ino))
            if same is not None:
                raise DatasetError(
                    f"output {readable(str(output))} is the input {readable(str(same))}: the scan "
                    "would be overwritten\n  Choose another --output, for instance a new folder; "
                    "--overwrite does not replace inputs."
                )


def _spelling(path: Path) -> tuple[Path, str]:
    """A place and a name there, equal where a file system that ignores capitals sees one file."""
    return Path(os.path.realpath(path.parent)), path.name.casefold()
