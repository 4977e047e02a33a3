"""Raw data sets in nnU-Net's layout: ``imagesTr``, ``labelsTr``, ``dataset.json``."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer

from panther_jax.base.errors import DatasetError
from panther_jax.base.files import read_json
from panther_jax.images.endings import lowered, readable, split_ending
from panther_jax.images.formats import FORMATS
from panther_jax.images.geometry import check_geometry
from panther_jax.images.imageio import label_values, read_image, read_label
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels

# Readers of nnU-Net that leave the voxels on the stored grid, as ours does.
SAME_GRID_READERS = (None, "None", "SimpleITKIO", "NibabelIO")
REQUIRED_KEYS = ("labels", "channel_names", "numTraining", "file_ending")
EXAMPLE_JSON = (
    '{"channel_names": {"0": "MRI"}, "labels": {"background": 0, "tumor": 1}, '
    '"numTraining": 50, "file_ending": ".mha"}'
)
MAX_LISTED = 20

Problems = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class RawCase:
    """Where one case lies: an image file a channel, in channel order, and its label file."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class RawDataset:
    """A raw dataset folder: its ``dataset.json`` and its training cases, sorted by id."""

    folder: Path
    dataset: dict[str, Any]
    labels: Labels
    cases: tuple[RawCase, ...]

    @property
    def name(self) -> str:
        """Name of the folder, `DatasetNNN_Name`."""
        return self.folder.name

    @property
    def file_ending(self) -> str:
        """Ending of image and label files, with its dot."""
        return str(self.dataset["file_ending"])

    @property
    def num_channels(self) -> int:
        """Image files a case."""
        return len(_channel_names(self.dataset))


@dataclass(frozen=True)
class Case:
    """One case in memory; ``label`` is None for a case to predict."""

    id: str
    image: Float32[np.ndarray, "channel z y x"]
    label: Integer[np.ndarray, "z y x"] | None
    geometry: Geometry


# -------------------------------------------------------------------------------- raw datasets


def open_raw(folder: Path) -> RawDataset:
    """Read ``dataset.json`` and list the training cases (spec 02 §1.1-1.2), reading no voxels.

    Raises:
        FileNotFoundError: if the folder, its dataset.json or imagesTr is missing.
        DatasetError: naming every missing key, or every missing channel and label file.
        PlansError: if the label declaration is not consistent.
    """
    raw, problems = scan_raw(folder)
    _raise_all(problems, f"{folder}: the dataset is not complete")
    return raw


def scan_raw(folder: Path) -> tuple[RawDataset, Problems]:
    """As :func:`open_raw`, but return what is wrong: problems by case id (a file name if none).

    Raises:
        FileNotFoundError, DatasetError, PlansError: if dataset.json cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; expected a raw dataset with dataset.json and imagesTr"
        )
    dataset = read_dataset_json(folder / "dataset.json")
    labels = Labels.from_dataset_json(dataset)
    if dataset.get("dataset"):
        cases, problems = _listed_cases(folder, dataset["dataset"])
    else:
        ending = str(dataset["file_ending"])
        cases, problems = _scan(folder / "imagesTr", ending, folder / "labelsTr")
    listed = bool(dataset.get("dataset"))
    problems |= _case_problems(cases, len(_channel_names(dataset)), listed=listed)
    if not cases and not problems:
        problems = {"imagesTr": ("holds no training case",)}
    return RawDataset(folder, dataset, labels, cases), problems


def read_case(raw_case: RawCase, labels: Labels) -> Case:
    """Read a case's channels and, where it has one, its label map; check that they fit.

    Raises:
        FileNotFoundError: if a file is missing.
        DatasetError: if a file cannot be used, the label lies on another grid, or holds a value
            that dataset.json does not declare.
    """
    with ThreadPoolExecutor(1) as beside:
        reading = raw_case.label and beside.submit(read_label, raw_case.label, unsigned=True)
        image, geometry = read_image(raw_case.images)
    if raw_case.label is None or reading is None:
        return Case(raw_case.id, image, None, geometry)
    label, label_geometry = reading.result()
    check_geometry(
        raw_case.id, label_geometry, geometry, paths=(raw_case.label, raw_case.images[0])
    )
    unknown = sorted(set(label_values(label)[0].tolist()) - set(labels.allowed_values))
    if unknown:
        counts = ", ".join(f"{v} ({int((label == v).sum())} voxels)" for v in unknown[:10])
        raise DatasetError(
            f"case {raw_case.id!r}: label values {counts} are not declared; dataset.json allows "
            f"{list(labels.allowed_values)}\n  label: {raw_case.label}"
            "\n  Declare them in dataset.json, or renumber the label map."
        )
    return Case(raw_case.id, image, label, geometry)


def _channel_names(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    return dataset.get("channel_names", dataset.get("modality", {}))


def read_dataset_json(path: Path) -> dict[str, Any]:
    """Read and check a ``dataset.json``.

    Raises:
        MissingError, FileError: if it is missing or not JSON.
        DatasetError: naming every missing key and every name or label that occurs twice.
    """
    dataset = read_json(path)
    if not isinstance(dataset, dict):
        raise DatasetError(f"{path}: expected a JSON object, found {type(dataset).__name__}")
    problems = [*_repeated(path), *_dataset_json_problems(dataset)]
    if problems:
        raise DatasetError("\n  ".join([f"{path}:", *problems, f"Example: {EXAMPLE_JSON}"]))
    return dataset


def _repeated(path: Path) -> list[str]:
    """Names that occur twice in one object; JSON readers keep the last without a word."""
    found: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({n for n in names if names.count(n) > 1})
        found.extend(f"{n!r} occurs twice in one object; keep one of them" for n in twice)
        return dict(pairs)

    json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=keep)
    return found


def _shared_values(labels: Any) -> list[str]:
    """Labels of equal value under different names: the files cannot tell them apart."""
    if not isinstance(labels, Mapping):
        return []
    by_value: dict[str, list[str]] = {}
    for name, value in labels.items():
        by_value.setdefault(json.dumps(value), []).append(str(name))
    return [
        f"labels {' and '.join(names)} share the value {value}; give each its own"
        for value, names in by_value.items()
        if len(names) > 1
    ]


def _dataset_json_problems(dataset: Mapping[str, Any]) -> list[str]:
    present = {*dataset, *(["channel_names"] if "modality" in dataset else [])}
    problems = [f"key {k!r} is missing" for k in REQUIRED_KEYS if k not in present]
    names = dataset.get("channel_names", dataset.get("modality", {}))
    numbered = isinstance(names, Mapping) and {*names} == {str(i) for i in range(len(names))}
    if "channel_names" in present and not (numbered and names):
        problems.append(f'\'channel_names\' must map "0", "1", ... to names, found {names!r}')
    ending = dataset.get("file_ending")
    if "file_ending" in present and str(ending).lower() not in FORMATS.names:
        problems.append(f"'file_ending' must be one of {FORMATS.names}, found {ending!r}")
    reader = dataset.get("overwrite_image_reader_writer")
    if reader not in SAME_GRID_READERS:
        problems.append(
            f"'overwrite_image_reader_writer' is {reader!r}; only SimpleITKIO is supported, which "
            "does not reorient: convert the images and remove the entry"
        )
    return problems + _shared_values(dataset.get("labels"))


def _listed_cases(folder: Path, entries: Any) -> tuple[tuple[RawCase, ...], Problems]:
    if not isinstance(entries, Mapping):
        kind = type(entries).__name__
        return (), {"dataset.json": (f"'dataset' must map case ids to files, found {kind}",)}
    cases, problems = [], {}
    for case_id in sorted(entries):
        entry = entries[case_id] if isinstance(entries[case_id], Mapping) else {}
        images, label = entry.get("images"), entry.get("label")
        # A case id becomes a file name in every later step: it must not lead out of the folder.
        if re.search(r"[/\\]", case_id) or case_id in ("", ".", ".."):
            problems[case_id] = ("the id cannot be used as a file name",)
        elif not (isinstance(images, list) and images and label):
            problems[case_id] = ("expected {'images': [...], 'label': ...}",)
        else:
            files = [folder / os.path.expandvars(str(name)) for name in (*images, label)]
            cases.append(RawCase(case_id, tuple(files[:-1]), files[-1]))
    return tuple(cases), problems


def _scan(
    folder: Path, ending: str, label_folder: Path | None
) -> tuple[tuple[RawCase, ...], Problems]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected CASE_0000{ending} there")
    pattern = re.compile(rf"(.+)_(\d\d\d\d){re.escape(ending)}", re.IGNORECASE)
    given = {} if label_folder is None else _by_lowered_name(label_folder)
    files: dict[str, list[Path]] = {}
    problems = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(ending.lower()):
            continue  # hidden: half-written files and the leavings of macOS
        match = pattern.fullmatch(path.name)
        if match:
            files.setdefault(match[1], []).append(path)
        else:
            stem = readable(path.name[: -len(ending)])
            text = f"no channel number; rename it to {stem}_0000{ending}"
            problems[readable(path.name)] = (text,)
    cases = tuple(
        RawCase(
            case_id,
            tuple(files[case_id]),
            label_folder
            and given.get(lowered(case_id + ending), label_folder / (case_id + ending)),
        )
        for case_id in sorted(files)
    )
    return cases, problems


def _by_lowered_name(folder: Path) -> dict[str, Path]:
    """Files by their names with the ending in lower case; one that has it so comes first."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {lowered(p.name): p for p in sorted(files, key=lambda p: p.name == lowered(p.name))}


def _case_problems(
    cases: Sequence[RawCase], num_channels: int, *, listed: bool = False
) -> Problems:
    problems = {}
    for case in cases:
        found = [f"missing image {p}" for p in case.images if not p.is_file()]
        if case.label is not None and not case.label.is_file():
            found.append(f"missing label {case.label}")
        names = [p.name for p in case.images]
        if len(names) != num_channels:
            found.append(f"{len(names)} channels {names}, expected {num_channels}")
        numbers = channel_numbers(names, case.id)
        # Listed files may have any name: only channels in the wrong order show.
        expected = list(range(num_channels))
        counted = sorted(numbers) == expected if listed else len(numbers) == num_channels
        if counted and numbers != expected:
            found.append(f"channel numbers {numbers}, expected 0 to {num_channels - 1}")
        if found:
            problems[case.id] = tuple(found)
    return problems


def channel_numbers(names: Sequence[str], case_id: str) -> list[int]:
    """Channel numbers of the files named ``CASE_0000`` after their case; others have none.

    A file of another name, as ``dataset`` in dataset.json may list it, may well end in digits.
    """
    stems = [split_ending(name)[0] for name in names]
    found = [re.fullmatch(re.escape(case_id) + r"_(\d{4})", stem) for stem in stems]
    return [int(match[1]) for match in found if match]


def _raise_all(problems: Mapping[str, Sequence[str]], title: str) -> None:
    lines = [f"  {key}: {text}" for key in problems for text in problems[key]]
    if not lines:
        return
    if len(lines) > MAX_LISTED:
        lines[MAX_LISTED:] = [f"  ... and {len(lines) - MAX_LISTED} more"]
    raise DatasetError("\n".join([f"{title}:", *lines]))
