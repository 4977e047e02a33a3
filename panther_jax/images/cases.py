"""Which cases there are to predict in a file or a folder, and where their label maps go."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer

from panther_jax.base.errors import DatasetError
from panther_jax.images.formats import FORMATS, image_ending
from panther_jax.images.imageio import read_image, write_label
from panther_jax.images.raw_dataset import RawCase
from panther_jax.plans.geometry import Geometry


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
    def is_done(self) -> bool:
        """Whether the output is there."""
        return self.output.is_file()

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
    source: Path, output: Path, *, num_channels: int, file_ending: str
) -> tuple[Task, ...]:
    """List what there is to predict in a file or a folder of ``CASE_0000`` files.

    A case that lacks a channel is listed with its problem. In a folder, files with the
    ``file_ending`` of the model's training are taken, where there are none all that can be read.

    Raises:
        FileNotFoundError: if the source is missing.
        DatasetError: if there is nothing to predict.
    """
    if source.is_file():
        return (_single_task(source, output, num_channels),)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist; expected an image or a folder of them")
    files = sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
    chosen = [p for p in files if p.name.endswith(file_ending)]
    chosen = chosen or [p for p in files if split_ending(p.name)[1]]
    if not chosen:
        raise DatasetError(
            f"{source} holds no image; expected files named CASE_0000{file_ending} (or one of "
            f"{', '.join(FORMATS.names)})"
        )
    groups: dict[tuple[str, str], list[Path]] = {}
    for path in chosen:
        stem, ending = split_ending(path.name)
        match = re.fullmatch(r"(.+)_\d{4}", stem)
        groups.setdefault((match[1] if match else path.name, ending), []).append(path)
    return tuple(
        _folder_task(name, ending, paths, output, num_channels)
        for (name, ending), paths in sorted(groups.items())
    )


def _single_task(source: Path, output: Path, num_channels: int) -> Task:
    stem, ending = split_ending(source.name)
    if not ending:
        raise DatasetError(f"{source}: its ending is none of {', '.join(FORMATS.names)}")
    match = re.fullmatch(r"(.+)_0000", stem)
    name, paths = match[1] if match else stem, [source]
    if match:
        pattern = re.compile(re.escape(name) + r"_\d{4}" + re.escape(ending))
        paths = sorted(p for p in source.parent.iterdir() if pattern.fullmatch(p.name))
    if not split_ending(output.name)[1]:
        output = output / f"{name}{ending}"
    return Task(RawCase(name, tuple(paths), None), output, _problem(paths, num_channels))


def _folder_task(
    name: str, ending: str, paths: Sequence[Path], output: Path, num_channels: int
) -> Task:
    unnumbered = name == paths[0].name
    stem = name.removesuffix(ending) if unnumbered else name
    problem = _problem(paths, num_channels)
    if unnumbered:
        problem = f"{name} has no channel number; rename it to {stem}_0000{ending}"
    return Task(RawCase(stem, tuple(paths), None), output / f"{stem}{ending}", problem)


def _problem(paths: Sequence[Path], num_channels: int) -> str:
    names = [p.name for p in paths]
    if len(paths) != num_channels:
        return f"{len(paths)} channel(s) {names}, the model takes {num_channels}"
    numbers = [int(m[1]) for n in names if (m := re.search(r"_(\d{4})$", split_ending(n)[0]))]
    if numbers and numbers != list(range(num_channels)):
        return f"channel numbers {numbers}, expected 0 to {num_channels - 1}"
    return ""


def split_ending(name: str) -> tuple[str, str]:
    """Split a file name from its ending, which is empty if no reader knows it."""
    ending = image_ending(name)
    return name[: len(name) - len(ending)], ending
