"""Reading cross-validations: folds of a run, their validated cases, and what they trained on.

A fold's label maps lie in ``fold_K/validation_final`` or ``validation_best``; nnU-Net's own model
folders keep them in ``fold_K/validation``. Everything is read in place, nothing is copied.
"""

import logging
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from panther_jax.base.errors import PantherError
from panther_jax.base.files import read_object
from panther_jax.base.folds import FOLD_ALL, choose_folds
from panther_jax.config import places
from panther_jax.config.schema import CheckpointName, ValidationConfig
from panther_jax.images.formats import image_ending
from panther_jax.images.splits import SPLITS, read_splits
from panther_jax.plans.labels import Labels
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import open_store

LOGGER = logging.getLogger("panther_jax")
MAX_LISTED = 20
SEEN = (
    "fold_all was validated on the cases that it was trained on: its scores say nothing about new "
    "cases"
)
SUMMARY, RUN = "summary.json", "run.json"
ARRAY = "probabilities"  # name in the npz file, nnU-Net's


class CrossValidationError(PantherError, ValueError):
    """A run whose folds cannot be used together; the message says why and what to do."""


@dataclass(frozen=True)
class Fold:
    """The validation of one fold: label maps by case id, and the reference that each was given."""

    name: str
    folder: Path
    validation: Path
    predictions: Mapping[str, Path]
    references: Mapping[str, Path]

    @property
    def number(self) -> places.Fold:
        """The fold's number, or ``all``."""
        text = self.name.removeprefix("fold_")
        return int(text) if text.isdigit() else "all"

    @property
    def saw_its_cases(self) -> bool:
        """Whether the validated cases are those that the fold was trained on."""
        return self.name == FOLD_ALL

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder.parent


# --------------------------------------------------------------------------------------- files


def label_files(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Label maps of a folder by case id, sorted, and what is wrong with names, by case id.

    Raises:
        FileNotFoundError: if it is not a folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected label maps CASE.mha there")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        ending = image_ending(path.name)
        if ending and not path.name.startswith(".") and path.is_file():
            found.setdefault(path.name[: -len(ending)], []).append(path)
    twice = {
        case: f"{' and '.join(p.name for p in paths)} lie in {folder}\n  Remove all but one."
        for case, paths in found.items()
        if len(paths) > 1
    }
    return {c: paths[0] for c, paths in sorted(found.items()) if c not in twice}, twice


def reference_folder(folder: Path) -> Path:
    """The folder of label maps: ``labelsTr`` of a raw data set, ``references`` of a store, or it.

    Raises:
        FileNotFoundError: if the folder is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; expected reference label maps, or a raw data set with "
            "labelsTr"
        )
    inner = (folder / "labelsTr", folder / "references")
    return next((f for f in inner if f.is_dir()), folder)


def find_dataset_json(places: Sequence[Path]) -> Path | None:
    """The first ``dataset.json`` in the folders or up to two levels above, in order."""
    for place in places:
        for folder in (place, *list(place.resolve().parents)[:2]):
            if (folder / "dataset.json").is_file():
                return folder / "dataset.json"
    return None


def read_labels(path: Path | None) -> Labels | None:
    """The label declaration of a ``dataset.json``, if there is one."""
    return None if path is None else Labels.from_dataset_json(read_object(path))


# --------------------------------------------------------------------------------------- folds


def find_folds(paths: Sequence[Path], checkpoint: CheckpointName = "final") -> tuple[Fold, ...]:
    """The folds of one run, given as its folder or as its fold folders; sorted by number.

    The fold of all cases is taken only if it is the only one: it validates what it was trained on.

    Raises:
        FileNotFoundError: if a folder or a validation is missing.
        CrossValidationError: if they belong to several runs, or a case was validated twice.
    """
    folders = [fold for path in paths for fold in _fold_folders(path)]
    runs = sorted({folder.resolve().parent for folder in folders})
    if len(runs) > 1:
        raise CrossValidationError(
            f"the folds belong to {len(runs)} runs: {', '.join(map(str, runs[:MAX_LISTED]))}\n"
            "  Evaluate one run at a time, or two with --compare RUN_A RUN_B."
        )
    unique = {folder.name.removeprefix("fold_"): folder for folder in folders}
    chosen = choose_folds(folders[0].parent, sorted(unique, key=_order), by="alone")
    folds = tuple(_fold(unique[name], checkpoint) for name in chosen)
    _require_disjoint(folds)
    return folds


def is_run(path: Path) -> bool:
    """Tell whether a folder is a run, or a fold of one."""
    return path.name.startswith("fold_") or any(p.is_dir() for p in path.glob("fold_*"))


def run_name(run: Path) -> str:
    """Name of a run: its folder's."""
    return run.resolve().name


def _fold_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; expected a run, or its fold_K folders")
    if path.name.startswith("fold_"):
        return [path]
    folders = [p for p in path.glob("fold_*") if p.is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"{path} holds no fold_K folder; name the work directory of a run, or --predictions"
        )
    return sorted(folders, key=lambda p: _order(p.name))


def _order(name: str) -> tuple[int, str]:
    number = re.fullmatch(r"(?:fold_)?(\d+)", name)
    return (int(number[1]) if number else 10**9, name)


def _fold(folder: Path, checkpoint: CheckpointName) -> Fold:
    validation = validation_folder(folder, checkpoint)
    files, twice = label_files(validation)
    if twice:
        raise CrossValidationError("\n".join(f"case {c!r}: {text}" for c, text in twice.items()))
    return Fold(folder.name, folder, validation, files, _summary_references(validation))


def validation_folder(folder: Path, checkpoint: CheckpointName) -> Path:
    """The folder in which a fold's validation with a checkpoint lies (spec 06 §5.1).

    nnU-Net's ``validation`` is the final checkpoint's, unless ``validation_final`` stands beside.

    Raises:
        FileNotFoundError: if there is none.
    """
    final, plain = folder / "validation_final", folder / "validation"
    named = folder / f"validation_{checkpoint}"
    fits = plain.is_dir() and final.is_dir() == (checkpoint == "best")
    found = named if named.is_dir() else plain if fits else None
    if found is None:
        raise FileNotFoundError(
            f"{folder} holds no {named.name}: the fold is not validated\n  Finish its training "
            "(run the same panther_jax.train command again), or leave the fold out."
        )
    return found


def _summary_references(validation: Path) -> dict[str, Path]:
    path = validation / SUMMARY
    if not path.is_file():
        return {}
    found = {}
    try:
        for entry in read_object(path).get("metric_per_case", []):
            name, reference = Path(entry["prediction_file"]).name, entry["reference_file"]
            found[name.removesuffix(image_ending(name))] = _located(reference, validation)
    except (KeyError, TypeError):
        raise CrossValidationError(
            f"{path}: 'metric_per_case' must name the prediction_file and reference_file of each "
            "case\n  Delete the file and validate the fold again."
        ) from None
    return found


def _located(name: str, validation: Path) -> Path:
    """A recorded path; a relative one was of the folder in which training was started."""
    started = (Path(), *validation.resolve().parents)
    return next((f / name for f in started if (f / name).is_file()), Path(name))


def _require_disjoint(folds: Sequence[Fold]) -> None:
    seen: dict[str, str] = {}
    twice = []
    for fold in folds:
        twice += [f"{c} ({seen[c]} and {fold.name})" for c in fold.predictions if c in seen]
        seen |= dict.fromkeys(fold.predictions, fold.name)
    if twice:
        raise CrossValidationError(
            f"{len(twice)} case(s) were validated in two folds: {', '.join(twice[:MAX_LISTED])}\n"
            "  Pooled, they would count twice. Name the folds of one cross-validation only."
        )


# ------------------------------------------------------------------------------- out of fold


def training_cases(fold: Fold, splits: Path | None = None) -> frozenset[str]:
    """The cases that a fold was trained on.

    As the run recorded them; else from ``splits`` if given; else from the store whose references
    the fold was validated with.

    Raises:
        FileNotFoundError: if none of these is there.
        CrossValidationError: if the fold is not in the splits.
    """
    if fold.number == "all":
        raise CrossValidationError(
            f"{fold.folder} was trained on all cases: it has none that it did not see\n"
            "  Name runs with numbered folds."
        )
    recorded = fold.folder / RUN
    if recorded.is_file():
        names = read_object(recorded).get("training_cases")
        if names is not None and not isinstance(names, list):
            raise CrossValidationError(
                f"{recorded}: 'training_cases' is {names!r}; expected a list of case ids"
            )
        if names is not None:
            return frozenset(names)
    if splits is None:
        store = store_of(fold)
        if store is not None:
            return frozenset(fold_cases(open_store(store), fold.number)[0])
        raise FileNotFoundError(
            f"{fold.folder}: which cases it was trained on is not recorded, and its store is not "
            f"there any more\n  Name the {SPLITS} that it was trained with: --splits FILE"
        )
    known = read_splits(splits)
    if fold.number >= len(known):
        raise CrossValidationError(
            f"{splits} has {len(known)} folds; {fold.folder} is not among them\n"
            "  Name the splits that the run was trained with."
        )
    return frozenset(known[fold.number][0])


def store_of(fold: Fold) -> Path | None:
    """The store that a fold was validated from, if its references still lie in it."""
    for reference in fold.references.values():
        folder = reference.parent.parent
        if reference.is_file() and (folder / "plans.json").is_file():
            return folder
    return None


def require_unseen(fold: Fold, splits: Path | None = None) -> None:
    """Make sure that no validated case of a fold was trained on.

    Raises:
        CrossValidationError: naming the cases.
        FileNotFoundError: if the training cases are not known.
    """
    seen = sorted(set(fold.predictions) & training_cases(fold, splits))
    if seen:
        raise CrossValidationError(
            f"{fold.validation}: {len(seen)} case(s) were also trained on: "
            f"{', '.join(seen[:MAX_LISTED])}\n  Scores on them say nothing about new cases. "
            "Validate the fold with the splits that it was trained with, or leave it out."
        )


# ----------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate:
    """A cross-validated run."""

    name: str
    run: Path
    folds: tuple[Fold, ...]
    labels: Labels

    @property
    def fold_of(self) -> dict[str, Fold]:
        """The fold that validated each case."""
        return {case: fold for fold in self.folds for case in fold.predictions}


def open_candidates(
    runs: Sequence[Path], checkpoint: CheckpointName = "final", *, splits: Path | None = None
) -> tuple[Candidate, ...]:
    """Read runs, and make sure that no fold validated what it was trained on.

    Raises:
        FileNotFoundError: if a run is not complete.
        CrossValidationError: naming cases that were trained on or validated twice, or a run that
            is named twice.
    """
    resolved = [run.resolve() for run in runs]
    twice = sorted({str(r) for r in resolved if resolved.count(r) > 1})
    if twice:
        raise CrossValidationError(f"candidates named twice: {', '.join(twice)}; name each once")
    names = [run_name(run) for run in runs]
    candidates = []
    for number, run in enumerate(runs):
        folds = find_folds([run], checkpoint)
        for fold in folds:
            require_unseen(fold, splits)
        path = folds[0].run / "dataset.json"
        labels = Labels.from_dataset_json(read_object(path))
        unique = names.count(names[number]) == 1
        name = names[number] if unique else f"{names[number]} ({number + 1})"
        candidates.append(Candidate(name, folds[0].run, folds, labels))
    return tuple(candidates)


def common_cases(
    candidates: Sequence[Candidate], references: Mapping[str, Path], *, allow_missing: bool
) -> tuple[str, ...]:
    """The cases to score on: those with a reference that the candidates validated.

    Raises:
        CrossValidationError: if no case is left, or a candidate lacks a case that another has,
            unless that is allowed.
    """
    validated = [set(c.fold_of) & set(references) for c in candidates]
    every, common = set().union(*validated), set.intersection(*validated)
    lacking = {
        c.name: sorted(every - cases)
        for c, cases in zip(candidates, validated, strict=True)
        if every - cases
    }
    listed = "\n".join(
        f"  {name}: {len(cases)}: {', '.join(cases[:MAX_LISTED])}"
        for name, cases in lacking.items()
    )
    if not common:
        raise CrossValidationError(
            f"no case has a reference and was validated by all of the {len(candidates)} candidates"
            "\n  Name candidates that were trained on one data set, and the references of that."
        )
    if lacking and not allow_missing:
        raise CrossValidationError(
            f"candidates lack cases that others validated:\n{listed}\n  Train the missing folds, "
            f"or pass --allow-missing to score on the {len(common)} common cases."
        )
    if lacking:
        LOGGER.warning("scoring on %d common cases; left out:\n%s", len(common), listed)
    return tuple(sorted(common))


def validation_settings(run: Path) -> ValidationConfig:
    """How a run was validated; nnU-Net's runs are validated with mirroring, too."""
    path = run / "config.json"
    if not path.is_file():
        return ValidationConfig()
    given = read_object(path).get("validation", {})
    return ValidationConfig(
        mirror=bool(given.get("mirror", True)), step_size=float(given.get("step_size", 0.5))
    )


def probability_file(fold: Fold, case_id: str) -> Path:
    """Where a fold keeps the probabilities of a validated case (spec 05 §8.4)."""
    return fold.validation / f"{case_id}.npz"


def unpack_probabilities(source: Path, target: Path) -> np.ndarray:
    """Unpack ``probabilities`` (output, z, y, x) of an npz file to an npy file; memory-mapped.

    Raises:
        CrossValidationError: if the file is damaged or holds something else.
    """
    try:
        with zipfile.ZipFile(source) as packed, packed.open(f"{ARRAY}.npy") as stream:
            with target.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        array = np.load(target, mmap_mode="r", allow_pickle=False)
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, zlib.error) as error:
        raise CrossValidationError(
            f"{source} cannot be read: {error}\n  Delete it; it is then computed again."
        ) from None
    if array.ndim != 4 or array.dtype.kind != "f":
        raise CrossValidationError(
            f"{source}: {ARRAY!r} is {array.dtype} {array.shape}; expected floats (output, z, y, x)"
        )
    return array
