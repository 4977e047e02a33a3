"""Models found by content below a folder, and what they are: nnU-Net's folders, bundles, runs."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from panther_jax.base.errors import FileError
from panther_jax.base.files import read_object

MANIFEST = "download.json"
KINDS = {"nnunet": "nnU-Net model folder", "bundle": "bundle", "run": "run"}
MAX_PARENTS = 8
"""How far above a model folder the note of its download is looked for."""


@dataclass(frozen=True)
class Found:
    """A model: what its files say. ``folds`` maps a fold to its checkpoints; "" is no fold."""

    path: Path
    kind: Literal["nnunet", "bundle", "run"]
    folds: Mapping[str, tuple[str, ...]]
    dataset: str | None = None
    plans: str | None = None
    configuration: str | None = None
    trainer: str | None = None
    labels: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    source: str | None = None
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {**dataclasses.asdict(self), "path": str(self.path), "folds": dict(self.folds)}

    def to_text(self) -> str:
        """A few lines for people; nothing in them can steer a terminal."""
        plans = f"{self.plans or 'not named'}, configuration {self.configuration or 'not named'}"
        lines = {
            "kind": KINDS[self.kind],
            "folds": _folds_text(self.folds),
            "plans": f"{plans}, trainer {self.trainer or 'not named'}",
            "data set": self.dataset or "not named",
            "labels": ", ".join(self.labels) or "none named",
            "channels": ", ".join(self.channels) or "none named",
            "from": self.source or "not noted",
        }
        body = [f"  {name:<9} {value}" for name, value in lines.items()]
        body += [f"  note      {note}" for note in self.notes]
        return "\n".join(_printable(line) for line in [str(self.path), *body])


def find_models(folder: Path) -> tuple[Found, ...]:
    """All models in a folder or below it, sorted by path; links to folders are not followed.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist or is not a folder")
    found = []
    for place, below, _ in os.walk(folder):
        path = Path(place)
        model = _describe(path)
        if model is not None:
            found.append(model)
            below.clear()  # what lies in a model is part of it
        below[:] = sorted(name for name in below if not name.startswith("."))
    return tuple(sorted(found, key=lambda f: f.path))


def show(folder: Path) -> str:
    """Text on every model below a folder.

    Raises:
        FileNotFoundError: if there is no such folder, or no model in it.
    """
    return "\n\n".join(model.to_text() for model in require_models(folder))


def require_models(folder: Path) -> tuple[Found, ...]:
    """As :func:`find_models`, and there is at least one.

    Raises:
        FileNotFoundError: if there is none, saying what there is.
    """
    found = find_models(folder)
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"no model in {folder} or below it: neither fold_*/checkpoint_*.pth (nnU-Net), nor a "
            f"bundle, nor a run\n  It holds: {_printable(names)}\n"
            "  Unpack archives in it, or name another folder."
        )
    return found


# ---------------------------------------------------------------------------------- one folder


def _describe(path: Path) -> Found | None:
    if (path / "config.json").is_file() and (path / "plans.json").is_file():
        return _run(path)
    if (path / "provenance.json").is_file() and any(path.glob("*.safetensors")):
        return _bundle(path)
    checkpoints = sorted(path.glob("fold_*/checkpoint_*.pth"))
    return _nnunet(path, checkpoints) if checkpoints else None


def _nnunet(path: Path, checkpoints: Sequence[Path]) -> Found:
    parts = path.name.split("__")
    named = parts if len(parts) == 3 else [None, None, None]
    about, notes = _plans_and_dataset(path, str(named[2]))
    trainer = named[0] or _trainer_in(checkpoints[0])
    folds = _grouped((p.parent.name, p.stem.removeprefix("checkpoint_")) for p in checkpoints)
    return Found(
        path, "nnunet", folds, **about, trainer=trainer, source=_downloaded(path), notes=notes
    )


def _bundle(path: Path) -> Found:
    about, notes = _plans_and_dataset(path)
    provenance, problem = _read(path / "provenance.json")
    records = provenance.get("checkpoints")
    records = records if isinstance(records, Mapping) else {}
    names = [p.stem for p in sorted(path.glob("*.safetensors"))]
    folds = {}
    for fold in ("" if name == "params" else name.removeprefix("fold_") for name in names):
        record = records.get(fold)
        record = record if isinstance(record, Mapping) else {}
        of = record.get("checkpoint") or record.get("file") or "one"
        folds[fold] = (str(of).removeprefix("checkpoint_").removesuffix(".pth"),)
    trainers = {str(r["trainer"]) for r in records.values()
                if isinstance(r, Mapping) and r.get("trainer")}  # fmt: skip
    source = _joined(provenance.get("source"), provenance.get("license"))
    return Found(
        path, "bundle", folds, **about, trainer=", ".join(sorted(trainers)) or "panther_jax",
        source=source or _downloaded(path), notes=(*notes, *problem),
    )  # fmt: skip


def _run(path: Path) -> Found:
    about, notes = _plans_and_dataset(path)
    kinds = [p for p in sorted(path.glob("fold_*/checkpoints/*")) if p.is_dir()]
    folds = {p.name.removeprefix("fold_"): () for p in sorted(path.glob("fold_*")) if p.is_dir()}
    folds |= _grouped((p.parent.parent.name, p.name) for p in kinds if any(p.glob("[0-9]*")))
    record: dict[str, Any] = {}
    for file in sorted(path.glob("fold_*/run.json"))[:1]:
        record, problem = _read(file)
        notes = (*notes, *problem)
    start = record.get("starting_weights")
    begun = f"started from {start['bundle']}" if isinstance(start, Mapping) and (
        "bundle" in start) else None  # fmt: skip
    source = _joined(record.get("config_file"), record.get("started"), begun)
    return Found(
        path, "run", folds, **about, trainer="panther_jax", source=source or "trained here",
        notes=notes,
    )  # fmt: skip


def _plans_and_dataset(
    path: Path, configuration: str = ""
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What ``plans.json`` and ``dataset.json`` say, and what is wrong with them."""
    plans, in_plans = _read(path / "plans.json")
    dataset, in_dataset = _read(path / "dataset.json")
    configurations = plans.get("configurations")
    names = list(configurations) if isinstance(configurations, Mapping) else []
    chosen = names[0] if len(names) == 1 else configuration if configuration in names else None
    labels = dataset.get("labels")
    channels = dataset.get("channel_names", dataset.get("modality"))
    named = plans.get("dataset_name")
    return {
        "dataset": None if named is None else str(named),
        "plans": None if plans.get("plans_name") is None else str(plans["plans_name"]),
        "configuration": chosen,
        "labels": tuple(map(str, labels)) if isinstance(labels, Mapping) else (),
        "channels": tuple(map(str, channels.values())) if isinstance(channels, Mapping) else (),
    }, (*in_plans, *in_dataset)


def _read(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        return read_object(path), ()
    except FileNotFoundError:
        return {}, (f"{path.name} is missing",)
    except (FileError, OSError) as error:
        return {}, (str(error).splitlines()[0],)


def _grouped(pairs: Any) -> dict[str, tuple[str, ...]]:
    folds: dict[str, tuple[str, ...]] = {}
    for folder, checkpoint in pairs:
        fold = folder.removeprefix("fold_")
        folds[fold] = (*folds.get(fold, ()), checkpoint)
    return folds


def _trainer_in(checkpoint: Path) -> str | None:
    """The trainer's name in a checkpoint, for folders whose name does not say it."""
    try:
        from weight_conversion.torch_files import read_checkpoint

        return str(read_checkpoint(checkpoint).entries.get("trainer_name") or "") or None
    except (ValueError, OSError, ModuleNotFoundError):
        return None


def _downloaded(path: Path) -> str | None:
    """Where a model came from, by the note that :mod:`panther_jax.weights.download` left."""
    for folder in [path, *path.absolute().parents][: MAX_PARENTS + 1]:
        if (folder / MANIFEST).is_file():
            note, _ = _read(folder / MANIFEST)
            licence = note.get("license") or "not stated"
            return _joined(
                f"Zenodo record {note.get('record')}", f"doi:{note.get('doi')}",
                f"licence {licence}", f"got {note.get('got')}",
            )  # fmt: skip
    return None


def _joined(*parts: Any) -> str | None:
    return ", ".join(str(part) for part in parts if part) or None


def _folds_text(folds: Mapping[str, tuple[str, ...]]) -> str:
    by_kinds: dict[tuple[str, ...], list[str]] = {}
    for fold, kinds in folds.items():
        by_kinds.setdefault(kinds, []).append(fold or "without folds")
    return "; ".join(
        f"{' '.join(names)} ({', '.join(kinds) or 'no checkpoint'})"
        for kinds, names in by_kinds.items()
    )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
