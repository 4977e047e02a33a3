"""What made each predicted file: written beside it, compared before a file that is there counts.

``predict.json`` of an output folder has a record for each case, ``NAME.predict.json`` beside a file
that was named as output has that of its own: checksums of inputs and outputs, and what predicted.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from panther_jax.base.checksums import file_sha256
from panther_jax.base.errors import FileError
from panther_jax.base.files import read_object, write_json
from panther_jax.images.cases import Task
from panther_jax.images.endings import readable

if TYPE_CHECKING:
    from panther_jax.inference.predictor import CasePredictor

RECORD = "predict.json"
SIDECAR = f".{RECORD}"
VERSION = 1
MAX_NAME_BYTES = 255
REMEDY = "move it away, choose another --output, or pass --overwrite, which replaces it"

Maker = Mapping[str, Any]
"""All that changes what is predicted: weights, plans, combination, settings; as in JSON."""


# ------------------------------------------------------------------------------------- the maker


def describe_maker(predictor: "CasePredictor") -> dict[str, Any]:
    """What of a predictor changes its label maps, by value: the names of models do not count."""
    from panther_jax.network.unet import Execution
    from panther_jax.weights.bundle import params_sha256

    ensemble, settings = predictor.ensemble, predictor.settings
    members = [
        {
            "weights": [params_sha256(params) for params in m.model.params],
            "folds": list(m.model.folds),
            "plans": _sha256_of([m.model.plans_json, m.model.plans.configuration]),
            "labels": [list(entry) for entry in m.model.labels.classes],
            "regions": list(m.model.labels.regions_class_order or ()),
            "mirror_axes": list(m.mirror_axes),
            "step_size": m.step_size,
            "weight": m.weight,
        }
        for m in ensemble.members
    ]
    combined = None
    if (found := ensemble.combination) is not None:
        combined = {
            "classes": list(found.classes),
            "labels": [list(entry) for entry in found.labels.classes],
            "columns": found.columns,
            "weights": found.weights,
            "decision": vars(found.decision),
        }
    made = {
        "members": members,
        "combine": ensemble.combine,
        "combination": combined,
        "dtype": Execution.auto(settings.dtype).dtype,
        "accumulate": settings.accumulate,
        "whole_volume": settings.whole_volume,
    }
    return json.loads(json.dumps(made))  # tuples become lists, as they will be read


def differences(before: Maker, now: Maker) -> tuple[str, ...]:
    """Names of what differs between two makers."""
    one, other = dict(_entries(before)), dict(_entries(now))
    return tuple(sorted(k for k in {*one, *other} if one.get(k) != other.get(k)))


def _entries(maker: Maker) -> Iterator[tuple[str, Any]]:
    for name, value in maker.items():
        if name != "members":
            yield name, value
            continue
        rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
        for key in {key for row in rows for key in row}:
            yield key, [row.get(key) for row in rows]


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------- checksums


def checksums_of(task: Task) -> dict[str, str]:
    """Checksums of a case's inputs by name; of several files under one name, whatever the order."""
    found = {}
    for name, paths in task.sources.items():
        sums = [file_sha256(path) for path in paths]
        found[name] = sums[0] if len(sums) == 1 else _sha256_of(sorted(sums))
    return found


# ------------------------------------------------------------------------------------ the records


@dataclass(frozen=True)
class State:
    """What is there of a case: nothing, what would be made now, what was made otherwise, others'.

    ``foreign`` are files that no record tells of or that were changed since; ``why`` names them.
    """

    kind: Literal["absent", "same", "stale", "foreign"]
    why: str = ""


class Records:
    """The records in one file, kept as cases are done; several processes may write to it.

    Raises:
        FileError: if the file cannot be read, or is of a newer version; unless ``anew``.
    """

    def __init__(self, path: Path, maker: Maker, versions: Mapping[str, str], *, anew: bool):
        self.path, self.maker, self.versions = path, maker, dict(versions)
        self._id = _sha256_of(maker)[:16]
        self._lock = threading.Lock()
        self._read(damaged_is_empty=anew)

    def state(self, task: Task, wanted: Sequence[Path]) -> State:
        """Compare what is there of a case with what predicting it now would be made of.

        Raises:
            OSError: if a file cannot be read.
        """
        there = [path for path in wanted if os.path.lexists(path)]
        entry = self._entry(task)
        if not there:
            return State("absent")
        if entry is None:
            return State("foreign", f"{_name(there[0])} is there, and no record says what made it")
        if entry.get("unfinished"):
            return State("stale", "an earlier call was stopped while it wrote it")
        outputs = entry.get("outputs", {})
        for path in there:
            if not path.is_file() or outputs.get(_name(path)) != file_sha256(path):
                known = _name(path) in outputs
                cause = "was changed since it was predicted" if known else "is not of its record"
                return State("foreign", f"{_name(path)} {cause}")
        why = self._otherwise(task, entry)
        if not why and len(there) < len(wanted):
            why = f"{_name(next(p for p in wanted if p not in there))} is missing"
        return State("stale", why) if why else State("same")

    def _otherwise(self, task: Task, entry: Mapping[str, Any]) -> str:
        before = self._makers.get(str(entry.get("maker")), {})
        if changed := differences(before, self.maker):
            return f"it was made otherwise ({', '.join(changed)} differ)"
        if entry.get("writes", {}) != task.writes:
            return f"it was written otherwise ({', '.join(task.writes) or 'anonymous'} differ)"
        found, inputs = checksums_of(task), entry.get("inputs", {})
        if list(found.values()) != list(inputs.values()):
            return f"its image is another one than then ({', '.join(found)})"
        return ""

    def begin(self, task: Task) -> None:
        """Note that files of a case are about to be written, so that a killed call's are known."""
        with self._changing():
            before = self._entry(task) or {}
            kept = {k: v for k, v in before.items() if k in ("outputs", "maker")}
            self._cases[task.key] = {**kept, "unfinished": True}

    def note(
        self,
        task: Task,
        inputs: Mapping[str, str],
        files: Iterable[Path],
        doubts: Sequence[str] = (),
    ) -> None:
        """Record a case that is done: its inputs' checksums, and the files that were written."""
        outputs = {_name(path): file_sha256(path) for path in files}
        with self._changing():
            self._makers[self._id] = dict(self.maker)
            self._cases[task.key] = {
                "maker": self._id,
                "inputs": dict(inputs),
                "outputs": outputs,
                **({"writes": task.writes} if task.writes else {}),
                **({"doubts": list(doubts)} if doubts else {}),
                "versions": self.versions,
            }

    def outdated(self, task: Task, wanted: Sequence[Path]) -> list[Path]:
        """Files of an earlier prediction of this case that the next one does not replace."""
        entry = self._entry(task) or {}
        kept = {_name(path) for path in wanted}
        folder = task.output.parent
        return [
            folder / name
            for name, checksum in entry.get("outputs", {}).items()
            if name not in kept and os.sep not in name
            and (folder / name).is_file() and file_sha256(folder / name) == checksum
        ]  # fmt: skip

    def finish(self, report: Mapping[str, Any]) -> None:
        """Put what became of this call's cases at the head of the file."""
        with self._changing():
            self._report = dict(report)

    def _entry(self, task: Task) -> dict[str, Any] | None:
        entry = self._cases.get(task.key)
        return entry if isinstance(entry, dict) else None

    def _read(self, *, damaged_is_empty: bool = False) -> None:
        try:
            content = read_object(self.path) if self.path.is_file() else {}
            _require_known(content, self.path)
        except FileError:
            if not damaged_is_empty:
                raise
            content = {}
        self._makers = dict(_object(content.get("makers")))
        self._cases = dict(_object(content.get("records")))
        self._report = {
            k: v for k, v in content.items() if k not in ("version", "makers", "records")
        }

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Read again, change, write; alone among threads and, where there are locks, processes."""
        with self._lock, _locked(self.path.parent):
            self._read(damaged_is_empty=True)
            yield
            used = {e.get("maker") for e in self._cases.values() if isinstance(e, dict)}
            makers = {key: maker for key, maker in self._makers.items() if key in used}
            content = {"version": VERSION, "makers": makers, "records": self._cases}
            write_json(self.path, {**self._report, **content})


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _name(path: Path) -> str:
    return readable(path.name)


def _require_known(content: Mapping[str, Any], path: Path) -> None:
    version = content.get("version", VERSION)
    if version != VERSION:
        raise FileError(
            f"its records are of version {version!r}, this program knows {VERSION}",
            thing=path,
            remedy="Use the newer program, choose another --output, or pass --overwrite.",
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock of the system on the folder, where it has such."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------- where they are


def sidecar_of(output: Path) -> Path:
    """The file of records beside a file that was named as output."""
    name = os.fsencode(output.name)
    if len(name) + len(SIDECAR) > MAX_NAME_BYTES:
        short = hashlib.sha256(name).hexdigest()[:16]
        return output.with_name(f"{short}{SIDECAR}")
    return output.with_name(output.name + SIDECAR)


def made_in(folder: Path) -> frozenset[str]:
    """Names of files in a folder that records there call predictions."""
    if not folder.is_dir():
        return frozenset()
    names: set[str] = set()
    paths = [folder / RECORD, *folder.glob(f"*{SIDECAR}")]
    for path in paths:
        with contextlib.suppress(OSError, FileError):
            for entry in _object(read_object(path).get("records")).values():
                names.update(_object(_object(entry).get("outputs")))
    return frozenset(names)
