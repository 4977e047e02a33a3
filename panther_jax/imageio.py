"""Reading and writing of medical images with their geometry; raw dataset folders; geometry checks.

Voxels stay on the grid they are stored on: arrays are z, y, x (the reverse of ITK's index order),
and direction and origin are carried along, never applied (spec 02 §1.3).
"""

import json
import logging
import math
import os
import re
import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer, Num

from panther_jax.completeness import count_not_finite, require_complete
from panther_jax.plans import Geometry, Labels, read_json

GEOMETRY_TOLERANCES = (1e-3, 1e-3, 1e-4)  # spacing mm, origin mm, direction
SUPPORTED_ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd", ".gipl")
# Readers of nnU-Net that leave the voxels on the stored grid, as ours does.
SAME_GRID_READERS = (None, "None", "SimpleITKIO", "NibabelIO")
REQUIRED_KEYS = ("labels", "channel_names", "numTraining", "file_ending")
EXAMPLE_JSON = (
    '{"channel_names": {"0": "MRI"}, "labels": {"background": 0, "tumor": 1}, '
    '"numTraining": 50, "file_ending": ".mha"}'
)
MAX_LISTED = 20
MAX_COUNTED = 1 << 16
COUNTED_AT_ONCE = 1 << 14
# spec 02 §1.3: a 2-D image becomes one slice, so thick that resampling leaves its axis alone.
SLICE_THICKNESS_FACTOR = 999.0

Problems = dict[str, tuple[str, ...]]

logger = logging.getLogger("panther_jax")


class DatasetError(ValueError):
    """An image, a label map or a raw dataset that cannot be used; the message names the file."""


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


# ------------------------------------------------------------------------------------- reading


def read_image(paths: Sequence[Path]) -> tuple[Float32[np.ndarray, "channel z y x"], Geometry]:
    """Read one image file a channel; the geometry is that of the first.

    2-D files become one slice (spec 02 §1.3). Channels whose origin or direction differ are only
    warned about, as in the reference.

    Raises:
        FileNotFoundError: if a file is missing.
        DatasetError: if a file cannot be read or used, or shape or spacing differ between channels.
    """
    if not paths:
        raise DatasetError("no image files given; pass one path a channel")
    channels, first = [], None
    for path in paths:
        array, geometry = _read_array(Path(path))
        first = first or geometry
        _check_channel(first, geometry, Path(paths[0]), Path(path))
        with np.errstate(over="ignore"):  # too large a value becomes inf, refused just below
            channels.append(np.ascontiguousarray(array, dtype=np.float32))
        if array.dtype.kind == "f":
            _require_finite(channels[-1], Path(path))
    assert first is not None
    return channels[0][None] if len(channels) == 1 else np.stack(channels), first


def read_label(
    path: Path, *, unsigned: bool = False
) -> tuple[Integer[np.ndarray, "z y x"], Geometry]:
    """Read a label map as int16, or int32 where a value needs it; floats must hold whole numbers.

    With ``unsigned`` a file of uint8 is left as it is, which takes half the time.

    Raises:
        FileNotFoundError: if the file is missing.
        DatasetError: if the file cannot be read, or holds a value that is not a whole number.
    """
    path = Path(path)
    array, geometry = _read_array(path)
    if array.dtype.kind == "f":
        _require_finite(array, path)
        broken = array != np.rint(array)
        if broken.any():
            examples = ", ".join(f"{v:g}" for v in np.unique(array[broken])[:5])
            raise DatasetError(
                f"{path}: {int(broken.sum())} label voxels are not whole numbers ({examples}, ...)"
                "\n  Labels are integers; was the map resampled with interpolation? Redo it with "
                "nearest neighbour."
            )
    if unsigned and array.dtype == np.uint8:
        return array, geometry
    low, high = array.min(), array.max()
    for dtype in (np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.ascontiguousarray(array, dtype=dtype), geometry
    raise DatasetError(
        f"{path}: label values reach from {low} to {high}, more than 32 bits hold"
        "\n  Renumber the labels from 0."
    )


def label_values(
    label: Integer[np.ndarray, "z y x"],
) -> tuple[Integer[np.ndarray, " value"], Integer[np.ndarray, " value"]]:
    """List the values of a label map, ascending, and their numbers of voxels.

    As ``numpy.unique``, which sorts all voxels, but counting: label values are small.
    """
    low, high = int(label.min()), int(label.max())
    if high - low > MAX_COUNTED:
        return np.unique(label, return_counts=True)
    counts = np.zeros(high - low + 1, np.int64)
    for part in np.array_split(label.reshape(-1), label.size // COUNTED_AT_ONCE + 1):
        if (value := part.min()) == part.max():  # as most parts are
            counts[int(value) - low] += part.size
        else:
            counts += np.bincount(part.astype(np.intp) - low, minlength=counts.size)
    values = np.flatnonzero(counts)
    return values + low, counts[values]


def _read_array(path: Path) -> tuple[np.ndarray, Geometry]:
    import SimpleITK as sitk

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    twin = path.with_name(path.name.removesuffix(".gz"))
    if twin != path and twin.exists():
        # Known of ITK's NIfTI reader: it takes the voxels of the uncompressed file.
        raise DatasetError(f"{path}: {twin.name} lies beside it\n  Remove one of the two.")
    # ITK's own warnings (rounded NIfTI directions) go to stderr past Python; errors still raise.
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _require_scalar_3d(reader, path)
        require_complete(reader, path)
        image = reader.Execute()
        num_lost = count_not_finite(path)
    except (RuntimeError, OSError, EOFError, struct.error, zlib.error) as error:
        raise DatasetError(_unreadable(path, str(error))) from None
    if num_lost:
        raise _not_finite(path, num_lost, math.prod(image.GetSize()))
    return _with_geometry(sitk.GetArrayFromImage(image), image, path)


def _with_geometry(array: np.ndarray, image: Any, path: Path) -> tuple[np.ndarray, Geometry]:
    spacing = tuple(abs(s) for s in reversed(image.GetSpacing()))
    if not all(0 < s < np.inf for s in spacing):
        raise DatasetError(
            f"{path}: spacing {_numbers(spacing)} mm (z y x); expected positive numbers"
            "\n  Fix the header, or convert the image again from its source."
        )
    if array.ndim == 2:
        array, spacing = array[None], (SLICE_THICKNESS_FACTOR * max(spacing), *spacing)
    return array, Geometry(array.shape, spacing, image.GetOrigin(), image.GetDirection())


def _require_scalar_3d(reader: Any, path: Path) -> None:
    size = tuple(reversed(reader.GetSize()))
    if len(size) not in (2, 3):
        raise DatasetError(
            f"{path}: the image has {len(size)} dimensions, size {size}; expected 3"
            "\n  Split it into one 3-D file a channel, named CASE_0000, CASE_0001, ..."
        )
    components = reader.GetNumberOfComponents()
    if components != 1:
        raise DatasetError(
            f"{path}: each voxel holds {components} values (colour or vector image); expected 1"
            "\n  Convert it to one grey-value file a channel, named CASE_0000, CASE_0001, ..."
        )
    if 0 in size:
        raise DatasetError(f"{path}: the image is empty, size {size}\n  Export it again.")


def _unreadable(path: Path, error: str) -> str:
    # The last line of ITK's message says what happened; the rest names C++ sources.
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    reason = lines[-1] if lines else "unknown error"
    if "orthonormal" in error or "determinant" in error:
        remedy = "Its direction matrix is not a rotation: save it again with a corrected header."
    elif "spacing" in reason:
        remedy = "Spacing must be positive: fix the header, or convert the image again."
    else:
        remedy = "Is the file complete, and is its ending right? Copy or export it again."
    return f"{path}: cannot be read: {reason}\n  {remedy}"


def _require_finite(array: np.ndarray, path: Path) -> None:
    if num_lost := array.size - int(np.count_nonzero(np.isfinite(array))):
        raise _not_finite(path, num_lost, array.size)


def _not_finite(path: Path, count: int, size: int) -> DatasetError:
    return DatasetError(
        f"{path}: {count} of {size} voxels are NaN or infinite"
        "\n  Replace them (by the background's value), or export the image again."
    )


def _check_channel(first: Geometry, other: Geometry, first_path: Path, path: Path) -> None:
    found = geometry_differences(other, first, names=("channel", "first channel"))
    hard = [d for d in found if " shape " in d or " spacing " in d]
    where = f"\n  first: {first_path}\n  other: {path}"
    if hard:
        raise DatasetError(
            f"channels do not fit: {'; '.join(hard)}{where}"
            "\n  Resample all channels of a case to one grid."
        )
    if found:
        logger.warning("%s%s", "; ".join(found), where)


# ------------------------------------------------------------------------------------- writing


def write_label(path: Path, label: Integer[np.ndarray, "z y x"], geometry: Geometry) -> None:
    """Write a label map, compressed: uint8 if its maximum is below 255, else uint16.

    The file appears complete or not at all.

    Raises:
        DatasetError: if the shape is not the geometry's, or a value does not fit.
    """
    low, high = (int(label.min()), int(label.max())) if label.size else (0, 0)
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise DatasetError(f"{path}: label values {low} to {high}; a label file holds 0 to 65535")
    # spec 02 §1.4: 255 itself is written as uint16
    _write(path, label.astype(np.uint8 if high < 255 else np.uint16), geometry)


def write_image(path: Path, image: Num[np.ndarray, "z y x"], geometry: Geometry) -> None:
    """Write one channel, compressed; float32 and int16 are kept, all else becomes float32.

    The file appears complete or not at all.

    Raises:
        DatasetError: if the shape is not the geometry's.
    """
    keep = image.dtype in (np.dtype(np.float32), np.dtype(np.int16))
    _write(path, image if keep else image.astype(np.float32), geometry)


def _write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    import SimpleITK as sitk

    path = Path(path)
    if array.shape != geometry.shape_zyx:
        raise DatasetError(
            f"{path}: array of shape {array.shape}, geometry of shape {geometry.shape_zyx} (z y x)"
        )
    ndim = len(geometry.origin_xyz)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array).reshape(array.shape[-ndim:]))
    image.SetSpacing(tuple(reversed(geometry.spacing_zyx[-ndim:])))
    image.SetOrigin(geometry.origin_xyz)
    image.SetDirection(geometry.direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    # SimpleITK chooses the format by the ending, so the temporary name keeps it.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        sitk.WriteImage(image, str(temporary), useCompression=True)
        os.replace(temporary, path)
    except RuntimeError as error:
        raise DatasetError(f"{path}: cannot be written: {error}".splitlines()[0]) from error
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ geometry


def geometry_differences(
    a: Geometry,
    b: Geometry,
    *,
    names: tuple[str, str] = ("label", "image"),
    tolerances: tuple[float, float, float] = GEOMETRY_TOLERANCES,
) -> tuple[str, ...]:
    """List what differs beyond the tolerances of spacing, origin (mm) and direction."""
    compared = (
        ("shape", " voxels", a.shape_zyx, b.shape_zyx, 0.0),
        ("spacing", " mm", a.spacing_zyx, b.spacing_zyx, tolerances[0]),
        ("origin", " mm", a.origin_xyz, b.origin_xyz, tolerances[1]),
        ("direction", "", a.direction, b.direction, tolerances[2]),
    )
    return tuple(
        f"{names[0]} {what} {_numbers(x)}{unit} differs from {names[1]} {what} {_numbers(y)}{unit}"
        for what, unit, x, y, tolerance in compared
        if len(x) != len(y) or any(abs(p - q) > tolerance for p, q in zip(x, y, strict=True))
    )


def check_geometry(
    case_id: str,
    a: Geometry,
    b: Geometry,
    *,
    names: tuple[str, str] = ("label", "image"),
    paths: tuple[Path | str, Path | str] | None = None,
    spacing_tolerance_mm: float = GEOMETRY_TOLERANCES[0],
    origin_tolerance_mm: float = GEOMETRY_TOLERANCES[1],
    direction_tolerance: float = GEOMETRY_TOLERANCES[2],
) -> None:
    """Compare two grids that must be the same; ``names`` and ``paths`` are those of a and b.

    Raises:
        DatasetError: naming the case, what differs, both files, and the remedy.
    """
    tolerances = (spacing_tolerance_mm, origin_tolerance_mm, direction_tolerance)
    found = geometry_differences(a, b, names=names, tolerances=tolerances)
    if not found:
        return
    lines = [f"case {case_id!r}: {found[0]}", *(f"  and {phrase}" for phrase in found[1:])]
    if paths is not None:
        lines += [f"  {name}: {path}" for name, path in zip(names, paths, strict=True)][::-1]
    remedy = f"  Resample the {names[0]} to the grid of the {names[1]}"
    if not any(" shape " in phrase for phrase in found):
        remedy += ", or copy the header if the voxels do correspond"
    raise DatasetError("\n".join([*lines, f"{remedy}."]))


def _numbers(values: Sequence[float]) -> str:
    # Six decimals show the smallest difference that counts, and hide a writer's rounding.
    return f"({', '.join(str(v if isinstance(v, int) else round(v, 6) + 0.0) for v in values)})"


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
    problems |= _case_problems(cases, len(_channel_names(dataset)))
    if not cases and not problems:
        problems = {"imagesTr": ("holds no training case",)}
    return RawDataset(folder, dataset, labels, cases), problems


def find_images(folder: Path, file_ending: str, num_channels: int) -> tuple[RawCase, ...]:
    """List the cases of a folder of images to predict, named ``CASE_0000`` + ending, by id.

    Raises:
        FileNotFoundError: if the folder is missing.
        DatasetError: if it holds no case, a name without channel number, or a case lacks a channel.
    """
    cases, problems = _scan(Path(folder), file_ending, None)
    problems |= _case_problems(cases, num_channels)
    if not cases and not problems:
        problems = {"folder": (f"no file ends with {file_ending!r}",)}
    _raise_all(problems, f"{folder}: images to predict")
    return cases


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
        FileNotFoundError, PlansError: if it is missing or not JSON.
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
    if "file_ending" in present and str(ending).lower() not in SUPPORTED_ENDINGS:
        problems.append(f"'file_ending' must be one of {SUPPORTED_ENDINGS}, found {ending!r}")
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
    pattern = re.compile(rf"(.+)_(\d\d\d\d){re.escape(ending)}")
    files: dict[str, list[Path]] = {}
    problems = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(ending):
            continue  # hidden: half-written files and the leavings of macOS
        match = pattern.fullmatch(path.name)
        if match:
            files.setdefault(match[1], []).append(path)
        else:
            stem = path.name.removesuffix(ending)
            problems[path.name] = (f"no channel number; rename it to {stem}_0000{ending}",)
    cases = tuple(
        RawCase(case_id, tuple(files[case_id]), label_folder and label_folder / (case_id + ending))
        for case_id in sorted(files)
    )
    return cases, problems


def _case_problems(cases: Sequence[RawCase], num_channels: int) -> Problems:
    problems = {}
    for case in cases:
        found = [f"missing image {p}" for p in case.images if not p.is_file()]
        if case.label is not None and not case.label.is_file():
            found.append(f"missing label {case.label}")
        names = [p.name for p in case.images]
        if len(names) != num_channels:
            found.append(f"{len(names)} channels {names}, expected {num_channels}")
        numbers = [int(m[1]) for m in (re.search(r"_(\d{4})\.", n) for n in names) if m]
        if len(numbers) == num_channels and numbers != list(range(num_channels)):
            found.append(f"channel numbers {numbers}, expected 0 to {num_channels - 1}")
        if found:
            problems[case.id] = tuple(found)
    return problems


def _raise_all(problems: Mapping[str, Sequence[str]], title: str) -> None:
    lines = [f"  {key}: {text}" for key in problems for text in problems[key]]
    if not lines:
        return
    if len(lines) > MAX_LISTED:
        lines[MAX_LISTED:] = [f"  ... and {len(lines) - MAX_LISTED} more"]
    raise DatasetError("\n".join([f"{title}:", *lines]))
