"""DICOM series as volumes: found, told apart, their geometry checked, read.

A series is taken only if its slices are one regular stack. What cannot be is refused with what was
found and what to do; nothing is sorted out in silence. In messages a series has a number and a
short code made of its UID, for both UID and description belong to a patient.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from panther_jax.base.console import table
from panther_jax.images import dicom_files
from panther_jax.images.dicom_files import DicomError, Header, Headers, Slice
from panther_jax.plans.geometry import Geometry

LOGGER = logging.getLogger("panther_jax")
SAME_PLACE_MM = 0.01
SAME_DIRECTION = 1e-3  # of direction cosines: headers round them to 5 or 6 digits
SAME_SPACING = 0.01  # relative, between slices
MAX_DRIFT = 0.2  # of a pixel, sideways from the first slice to the last
CODE_LENGTH = 10
PLANES = ("sagittal", "coronal", "axial")
SHOULD_NOT_DIFFER = ("EchoTime", "EffectiveEchoTime", "InversionTime", "DiffusionBValue")
MAX_NAMED = 10


@dataclass(frozen=True)
class Series:
    """A series of a study, or one volume of a series that holds several.

    ``number`` counts the series of a folder from 1; ``part`` the volumes of this one, 0 if there is
    one only; ``part_name`` says what it is. ``slices`` are in ascending order along the normal.
    Either ``geometry`` is there or ``problem`` says why this is no volume.
    """

    number: int
    uid: str
    modality: str
    description: str
    frame_of_reference: str
    slices: tuple[Slice, ...]
    geometry: Geometry | None
    part: int = 0
    part_name: str = ""
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """Short name made of the UID, which does not tell it; safe in logs and file names."""
        return series_code(self.uid) + (f"-{self.part}" if self.part else "")

    @property
    def name(self) -> str:
        """The series in messages."""
        part = f", volume {self.part}" if self.part else ""
        return f"series {self.number}{part} ({self.modality}, {self.code})"

    @property
    def key(self) -> str:
        """What selects it: its UID, with the volume's number where there are several."""
        return self.uid + (f"#{self.part}" if self.part else "")

    @property
    def size(self) -> str:
        """Columns x rows x slices."""
        rows, columns = self.slices[0].size
        return f"{columns} x {rows} x {len(self.slices)}"


@dataclass(frozen=True)
class Found:
    """The series of a folder, its files that cannot be read, and what else there is, by kind."""

    series: tuple[Series, ...]
    unreadable: tuple[tuple[Path, str], ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)


def series_code(uid: str) -> str:
    """Ten characters that stand for a UID."""
    return hashlib.sha256(uid.encode()).hexdigest()[:CODE_LENGTH]


# ------------------------------------------------------------------------------------- finding


def find_series(source: Path) -> Found:
    """Find the series in a DICOM file, or in all files below a folder; reads no voxels.

    Raises:
        FileNotFoundError: if the source is missing.
        ModuleNotFoundError: if pydicom is.
        DicomError: if there is no DICOM image at all, naming the files that cannot be read.
    """
    headers = dicom_files.read_headers(Path(source))
    by_uid: dict[str, list[Header]] = {}
    for header in headers.images:
        by_uid.setdefault(header.series_uid, []).append(header)
    groups = sorted(by_uid.items(), key=lambda item: (item[1][0].series_number, item[0]))
    if not groups:
        raise DicomError(_none_found(Path(source), headers))
    series = [
        volume
        for number, (_, files) in enumerate(groups, start=1)
        for volume in _volumes(number, files)
    ]
    return Found(tuple(series), headers.unreadable, headers.others)


def _none_found(source: Path, headers: Headers) -> str:
    lines = [f"{source} holds no DICOM image"]
    lines += [f"  {count} x {kind}" for kind, count in sorted(headers.others.items())]
    lines += [f"  {line}" for line in _named(headers.unreadable)]
    return "\n".join([*lines, "  Name the folder with the files of a CT or MR series."])


def _named(files: Sequence[tuple[Path, str]]) -> list[str]:
    """Files with what is wrong, without their folders, which exports name after patients."""
    lines = [f"{path.name}: {reason}" for path, reason in files[:MAX_NAMED]]
    more = len(files) - MAX_NAMED
    return [*lines, f"... and {more} more files"] if more > 0 else lines


def warn_of_unreadable(found: Found) -> None:
    """Name the files that cannot be read: slices may be among them."""
    if found.unreadable:
        lines = "\n".join(f"  {line}" for line in _named(found.unreadable))
        LOGGER.warning("%d file(s) cannot be read as DICOM:\n%s", len(found.unreadable), lines)


def listing(found: Found) -> str:
    """The series as a table, with their descriptions and UIDs: for the screen, not for a log."""
    rows = [
        [
            str(s.number) + (f"#{s.part}" if s.part else ""),
            s.modality,
            s.size,
            s.code,
            " ".join(text for text in (s.description, s.part_name) if text),
            s.key,
            "no: " + s.problem.splitlines()[0] if s.problem else "yes",
        ]
        for s in found.series
    ]
    header = ["series", "modality", "size", "code", "description", "UID", "usable"]
    lines = [f"no image: {count} x {kind}" for kind, count in sorted(found.others.items())]
    lines += [f"not read: {path}: {reason}" for path, reason in found.unreadable]
    return "\n".join([table(header, rows), *lines])


def select(found: Found, wanted: Sequence[str] = ()) -> tuple[Series, ...]:
    """The series named by UID, number or code - all if none is named.

    ``UID#2`` (or ``3#2``) is the second volume of a series that holds several; such a series is
    not usable as a whole, and comes back as one with a problem.

    Raises:
        DicomError: if a name fits none, with what there is.
    """
    whole = _wholes(found.series)
    if not wanted:
        return whole
    chosen: dict[str, Series] = {}
    for name in wanted:
        matches = [s for s in (*whole, *(s for s in found.series if s.part)) if name in _names(s)]
        if not matches:
            there = "\n".join(f"  {s.name}, {s.size}" for s in found.series)
            raise DicomError(
                f"there is no series of the name given to --series ({len(name)} characters); there "
                f"are:\n{there}\n  Name one by its number, code or UID."
            )
        chosen[matches[0].key] = matches[0]
    return tuple(chosen.values())


def _names(series: Series) -> set[str]:
    number = str(series.number) + (f"#{series.part}" if series.part else "")
    return {series.key, series.code, number}


def _wholes(series: Sequence[Series]) -> tuple[Series, ...]:
    """One entry a series: itself, or where it holds several volumes the problem of that."""
    result = []
    for _, entries in itertools.groupby(series, key=lambda s: s.number):
        parts = list(entries)
        if len(parts) == 1:
            result.append(parts[0])
            continue
        what = ", ".join(f"#{p.part} {p.part_name} ({p.size})" for p in parts[:MAX_NAMED])
        more = f" and {len(parts) - MAX_NAMED} more" if len(parts) > MAX_NAMED else ""
        problem = (
            f"it holds {len(parts)} volumes: {what}{more}\n  Choose with --series "
            f"{parts[0].number}#1 to {parts[0].number}#{len(parts)}."
        )
        slices = tuple(s for p in parts for s in p.slices)
        whole = replace(parts[0], slices=slices, geometry=None, part=0, part_name="")
        result.append(replace(whole, problem=problem))
    return tuple(result)


# ------------------------------------------------------------------ the volumes of one series


def _volumes(number: int, files: Sequence[Header]) -> list[Series]:
    """A series' volumes: one, or several that an attribute tells apart."""
    kept, notes = _images_of(files)
    first = kept[0]
    slices = tuple(s for header in kept for s in header.slices)
    series = Series(
        number,
        first.series_uid,
        first.modality,
        first.description,
        first.frame_of_reference,
        slices,
        None,
        notes=tuple(notes),
    )
    problem = next((h.problem for h in kept if h.problem), "") or _unlike(kept) or _lacking(slices)
    if problem:
        return [replace(series, problem=problem)]
    groups = _split(slices)
    volumes = []
    for index, (part_name, members) in enumerate(groups, start=1):
        part = index if len(groups) > 1 else 0
        named = replace(series, slices=members, part=part, part_name=part_name if part else "")
        volumes.append(_checked(named, first.between_slices))
    return volumes


def _images_of(files: Sequence[Header]) -> tuple[list[Header], list[str]]:
    """The files without copies and localizers, with notes on what was left out."""
    notes = []
    unique = list({(h.slices[0].sop_uid, len(h.slices)): h for h in reversed(files)}.values())[::-1]
    if len(unique) < len(files):
        notes.append(f"{len(files) - len(unique)} second copies of its files are left out")
    images = [h for h in unique if not h.is_localizer]
    if not images:
        problem = "it is a localizer, no volume\n  Choose the series that was planned on it."
        return [replace(h, problem=h.problem or problem) for h in unique], notes
    if len(images) < len(unique):
        notes.append(f"{len(unique) - len(images)} localizer image(s) in it are left out")
    return images, notes


def _unlike(files: Sequence[Header]) -> str:
    """What all files of a series must share."""
    if len({h.frame_of_reference for h in files}) > 1:
        return (
            "its slices are in several frames of reference, so that their positions cannot be "
            "compared\n  Export each acquisition as a series of its own."
        )
    for what, values in (
        ("modalities", {h.modality for h in files}),
        ("sizes", {s.size for h in files for s in h.slices}),
    ):
        if len(values) > 1:
            return (
                f"its slices are of several {what}: {', '.join(map(str, sorted(values)))}\n"
                "  Take those that are not of the volume out of the folder."
            )
    return ""


def _lacking(slices: Sequence[Slice]) -> str:
    """What a slice needs to have a place in space."""
    for what, count in (("position", 3), ("orientation", 6), ("spacing", 2)):
        broken = [s for s in slices if not _usable(getattr(s, what), count)]
        if broken:
            return (
                f"{len(broken)} of {len(slices)} slices have no usable {what} in their headers\n"
                "  Export the original series from the scanner or the archive."
            )
    if any(min(s.spacing) <= 0 for s in slices):
        return "its pixel spacing is not positive\n  Export the original series again."
    if not all(s.rescale[0] and np.isfinite(s.rescale).all() for s in slices):
        return "its rescale slope is 0 or not a number\n  Export the original series again."
    for cosines in {s.orientation for s in slices}:
        row, column = np.array(cosines[:3]), np.array(cosines[3:])
        lengths = abs(np.linalg.norm(row) - 1), abs(np.linalg.norm(column) - 1)
        if max(*lengths, abs(row @ column)) > SAME_DIRECTION:
            return "its rows and columns are not at right angles\n  Export the original series."
    return ""


def _usable(values: tuple[float, ...], count: int) -> bool:
    return len(values) == count and bool(np.isfinite(values).all())


def _split(slices: tuple[Slice, ...]) -> list[tuple[str, tuple[Slice, ...]]]:
    """Volumes by orientation, and where slices lie on each other by what tells them apart."""
    planes: list[list[Slice]] = []
    for entry in slices:
        for plane in planes:
            if _distance(plane[0].orientation, entry.orientation) <= SAME_DIRECTION:
                plane.append(entry)
                break
        else:
            planes.append([entry])
    groups = []
    for plane in planes:
        direction = f"{_plane(plane[0])} slices" if len(planes) > 1 else ""
        for mark, members in _told_apart(plane):
            groups.append((", ".join(t for t in (direction, mark) if t), members))
    return groups


def _told_apart(slices: Sequence[Slice]) -> list[tuple[str, tuple[Slice, ...]]]:
    stack = tuple(sorted(slices, key=_height))
    if not _on_each_other(stack):
        return [("", stack)]
    names = [n for n in dicom_files.MARKS if len({dict(s.marks).get(n) for s in stack}) > 1]
    attempts: list[tuple[str, ...]] = [(name,) for name in names]
    attempts += [tuple(names[:count]) for count in range(2, len(names) + 1)]
    for attempt in attempts:
        groups: dict[tuple[str, ...], list[Slice]] = {}
        for entry in stack:
            marks = dict(entry.marks)
            groups.setdefault(tuple(marks.get(n, "") for n in attempt), []).append(entry)
        if not any(_on_each_other(g) for g in groups.values()):
            return [
                (_mark_text(attempt, values), tuple(members))
                for values, members in sorted(groups.items(), key=lambda item: _order(item[0]))
            ]
    return [("", stack)]


def _mark_text(names: Sequence[str], values: Sequence[str]) -> str:
    return ", ".join(f"{n} {v or 'not given'}" for n, v in zip(names, values, strict=True))


def _order(values: Sequence[str]) -> tuple[tuple[float, str], ...]:
    """Numbers in their order, then texts."""

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return math.inf

    return tuple((number(v), v) for v in values)


def _on_each_other(stack: Sequence[Slice]) -> bool:
    heights = [_height(s) for s in stack]
    return any(b - a < SAME_PLACE_MM for a, b in itertools.pairwise(heights))


# ------------------------------------------------------------------------------------ geometry


def _axes(entry: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors along a row, along a column, and of the normal."""
    row, column = np.array(entry.orientation[:3]), np.array(entry.orientation[3:])
    row = row / np.linalg.norm(row)
    normal = np.cross(row, column)
    return row, column / np.linalg.norm(column), normal / np.linalg.norm(normal)


def _height(entry: Slice) -> float:
    return float(_axes(entry)[2] @ np.array(entry.position))


def _plane(entry: Slice) -> str:
    normal = np.abs(_axes(entry)[2])
    oblique = "" if normal.max() > math.cos(math.radians(10)) else "oblique "
    return oblique + PLANES[int(normal.argmax())]


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _checked(series: Series, between_slices: float | None) -> Series:
    """The series with its geometry, or with the problem that it is no regular stack."""
    checks: tuple[Callable[[Sequence[Slice]], str], ...] = (
        _too_few, _not_one_grid, _copies, _uneven, _tilted,
    )  # fmt: skip
    for check in checks:
        if problem := check(series.slices):
            return replace(series, problem=problem)
    first, last = series.slices[0], series.slices[-1]
    step = (_height(last) - _height(first)) / (len(series.slices) - 1)
    geometry = Geometry(
        (len(series.slices), *first.size),
        (step, *first.spacing),
        first.position,
        tuple(np.stack(_axes(first), axis=1).ravel().tolist()),
    )
    notes = [*series.notes, *_doubts(series.slices, step, between_slices)]
    return replace(series, geometry=geometry, notes=tuple(notes))


def _too_few(stack: Sequence[Slice]) -> str:
    if len(stack) > 1:
        return ""
    return "it is a single slice, no volume\n  Export the whole series."


def _not_one_grid(stack: Sequence[Slice]) -> str:
    worst = max(_distance(s.spacing, stack[0].spacing) for s in stack)
    if worst <= 1e-3 * min(stack[0].spacing):
        return ""
    return "its slices have different pixel spacings\n  Export each acquisition on its own."


def _copies(stack: Sequence[Slice]) -> str:
    heights = [_height(s) for s in stack]
    places = [i for i, (a, b) in enumerate(itertools.pairwise(heights)) if b - a < SAME_PLACE_MM]
    if not places:
        return ""
    return (
        f"{len(places)} of its {len(stack)} slices lie where another one lies (the first: number "
        f"{places[0] + 2} along the normal), and no attribute tells them apart\n"
        "  Are there two exports of it in the folder, or several acquisitions? Keep one."
    )


def _uneven(stack: Sequence[Slice]) -> str:
    gaps = np.diff([_height(s) for s in stack])
    usual = float(np.median(gaps))
    if len(gaps) == 2:  # the median of two is neither
        usual = float(gaps.min())
    wrong = np.flatnonzero(np.abs(gaps - usual) > max(SAME_SPACING * usual, SAME_PLACE_MM))
    if not wrong.size:
        return ""
    place = f"after slice {wrong[0] + 1} of {len(stack)} the next is {gaps[wrong[0]]:g} mm away"
    counts = gaps[wrong] / usual
    if (np.abs(counts - np.rint(counts)) <= 2 * SAME_SPACING * counts).all() and counts.min() > 1.5:
        missing = int(np.rint(counts).sum()) - len(counts)
        return (
            f"{missing} slice(s) are missing: {place}, others {usual:g} mm\n"
            "  Export the whole series again; was the copy interrupted?"
        )
    return (
        f"its slices are not evenly spaced ({gaps.min():g} to {gaps.max():g} mm): {place}, most "
        f"{usual:g} mm\n  Export it reconstructed at one spacing, or resample it to one."
    )


def _tilted(stack: Sequence[Slice]) -> str:
    """Slices moved sideways from one to the next: a tilted gantry, or a sheared stack."""
    row, column, normal = _axes(stack[0])
    ways = np.array([s.position for s in stack]) - np.array(stack[0].position)
    sideways = np.abs(np.stack([ways @ row, ways @ column], axis=1))
    pixel = np.array(stack[0].spacing[::-1])
    if (sideways <= MAX_DRIFT * pixel).all():
        return ""
    along = ways[-1] @ normal
    angle = math.degrees(math.atan2(float(np.linalg.norm(sideways[-1])), float(along)))
    return (
        f"its slices are not stacked straight: {sideways.max():.3g} mm sideways over the stack, "
        f"{angle:.1f} degrees (a tilted gantry?)\n"
        "  Resample it to a straight grid (tilt correction of the workstation), and give that."
    )


def _doubts(stack: Sequence[Slice], step: float, between_slices: float | None) -> list[str]:
    """What a user should look at although the stack is regular."""
    notes = []
    if between_slices and not math.isclose(abs(between_slices), step, rel_tol=2 * SAME_SPACING):
        notes.append(
            f"its header says {abs(between_slices):g} mm between slices, they are {step:g} mm "
            "apart, which is taken; are slices missing?"
        )
    for name in SHOULD_NOT_DIFFER:
        values = {dict(s.marks).get(name) for s in stack}
        if len(values) > 1:
            notes.append(f"its slices differ in {name}; is this one volume?")
    return notes


# ------------------------------------------------------------------------------------- reading


def read_series(series: Series) -> tuple[Float32[np.ndarray, "channel z y x"], Geometry]:
    """Read a series as one channel, with slope and intercept of each slice applied.

    The grid is that of SimpleITK's series reader: slices ascending along the normal of the first.

    Raises:
        DicomError: naming the series and why it is no volume, or the file that cannot be read.
    """
    require_usable(series)
    assert series.geometry is not None, "a usable series has a geometry"
    for note in series.notes:
        LOGGER.warning("%s: %s", series.name, note)
    try:
        volume = dicom_files.read_voxels(series.slices)
    except DicomError as error:
        raise DicomError(f"{series.name}: {error}") from None
    if broken := int(volume.size - np.count_nonzero(np.isfinite(volume))):
        raise DicomError(
            f"{series.name}: {broken} of {volume.size} voxels are NaN or infinite\n"
            "  Export the original series again."
        )
    return volume[None], series.geometry


def require_usable(series: Series) -> None:
    """Refuse a series that is no volume.

    Raises:
        DicomError: saying why, and what to do.
    """
    if series.problem:
        raise DicomError(f"{series.name}: {series.problem}")
