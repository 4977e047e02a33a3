"""What training left in a run's folder, for the report: complete, unfinished or damaged.

Nothing here fails because a file is missing or broken: what is there is read, and what is not is
said in ``notices``. A strict reading of cross-validations is in ``crossval``.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from panther_jax.base.command import UsageError
from panther_jax.base.files import read_json
from panther_jax.base.folds import ALL, FOLD_ALL, choose_folds
from panther_jax.config.schema import CHECKPOINTS
from panther_jax.evaluation.folds import SEEN
from panther_jax.evaluation.metrics import METRICS, class_key, scored_label
from panther_jax.images.formats import image_ending
from panther_jax.images.splits import SPLITS, read_splits
from panther_jax.plans.labels import Labels
from panther_jax.store.layout import REFERENCES

VOLUMES = ("gt_volume", "pred_volume")
MAX_LISTED = 10

Outcome = Literal["no_result", "undefined", "missed", "false_positive", "no_overlap", "scored"]
SEVERITY: tuple[Outcome, ...] = (
    "no_result",
    "undefined",
    "missed",
    "false_positive",
    "no_overlap",
    "scored",
)
"""Outcomes of a case, worst first."""


@dataclass(frozen=True)
class CaseRecord:
    """What validation found about one case; scores that are not known are NaN."""

    id: str
    fold: str
    scores: Mapping[str, float]
    """The PANTHER metrics and ``gt_volume``, ``pred_volume`` in mm³."""
    classes: Mapping[str, float]
    """Dice by class name."""
    prediction: Path | None
    reference: Path | None
    expected: bool = True
    """False if only the splits name the case: it has no result."""

    @property
    def dice(self) -> float:
        """Dice of the class that the PANTHER metrics score."""
        return self.scores["volumetric_dice"]

    @property
    def outcome(self) -> Outcome:
        """How the case went; ``undefined`` means that a score is not a number."""
        reference, predicted = (self.scores[name] for name in VOLUMES)
        if not self.expected:
            return "no_result"
        if math.isnan(self.dice):
            return "undefined"
        if reference > 0 and predicted == 0:
            return "missed"
        if reference == 0 and predicted > 0:
            return "false_positive"
        return "no_overlap" if self.dice == 0 else "scored"

    @property
    def rank(self) -> tuple[int, float, str]:
        """Sorting key, worst case first."""
        dice = -1.0 if math.isnan(self.dice) else self.dice
        return SEVERITY.index(self.outcome), dice, self.id


@dataclass(frozen=True)
class Validation:
    """The cases of one fold, validated with one checkpoint."""

    folder: Path
    cases: tuple[CaseRecord, ...]
    spacing_order: str


@dataclass(frozen=True)
class FoldRecord:
    """One fold: ``info`` is its run.json, ``rows`` are the epochs of metrics.jsonl."""

    name: str
    folder: Path
    info: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    validations: Mapping[str, Validation]
    notices: tuple[str, ...]

    @property
    def saw_its_cases(self) -> bool:
        """Whether the validated cases are those that the fold was trained on."""
        return self.name == FOLD_ALL

    @property
    def finished(self) -> bool:
        """Tell whether training and validation came to their end."""
        return self.info.get("finished") is True


@dataclass(frozen=True)
class RunRecord:
    """One run: its settings and the folds that were asked for."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    labels: Labels | None
    folds: tuple[FoldRecord, ...]
    notices: tuple[str, ...]

    @property
    def dataset_name(self) -> str:
        """Name of the data set's folder, as far as known."""
        name = self.plans.get("dataset_name") or self.dataset.get("name")
        return str(name or _entry(self.config, "data").get("dataset") or "unknown")

    @property
    def epochs(self) -> int | None:
        """Epochs that were asked for."""
        epochs = _entry(self.config, "loop").get("epochs")
        return epochs if isinstance(epochs, int) else None

    def checkpoints(self) -> tuple[str, ...]:
        """Checkpoints that any fold was validated with."""
        return tuple(c for c in CHECKPOINTS if any(c in f.validations for f in self.folds))

    def cases(self, checkpoint: str) -> tuple[CaseRecord, ...]:
        """Cases of all folds, worst first."""
        found = [f.validations[checkpoint] for f in self.folds if checkpoint in f.validations]
        return tuple(sorted((c for v in found for c in v.cases), key=lambda c: c.rank))

    def unvalidated(self, checkpoint: str) -> tuple[str, ...]:
        """Notices of folds without this validation, where they or others have one."""
        lacking = [f.name for f in self.folds if checkpoint not in f.validations]
        if not self.checkpoints() or not lacking:
            return ()
        if len(lacking) == len(self.folds):
            have = ", ".join(self.checkpoints())
            return (f"no fold was validated with the {checkpoint} checkpoint; there is: {have}",)
        return tuple(f"{n} was not validated with the {checkpoint} checkpoint" for n in lacking)

    def all_notices(self) -> tuple[str, ...]:
        """What is missing or broken, of the run and of its folds."""
        return (*self.notices, *(n for f in self.folds for n in f.notices))


def number(value: Any) -> float:
    """A JSON value as a float; NaN if it is no number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


# ------------------------------------------------------------------------------------- folders


def read_runs(paths: Sequence[Path]) -> tuple[RunRecord, ...]:
    """Read runs, each given as its folder or as fold folders; folds of one run come together.

    Names of runs are their folders', with as much of the path as tells them apart.

    Raises:
        UsageError: if a path is no run.
    """
    grouped: dict[Path, list[Path]] = {}
    for path in paths:
        for fold in _fold_folders(path):
            known = grouped.setdefault(fold.parent, [])
            if fold not in known:
                known.append(fold)
    names = _distinct([run.parts for run in grouped])
    return tuple(
        _read_run(run, name, _chosen(run, folds))
        for (run, folds), name in zip(grouped.items(), names, strict=True)
    )


def _chosen(run: Path, folds: Sequence[Path]) -> list[Path]:
    """The numbered folds in order; the fold of all cases only if there is no other."""
    by_name = {f.name.removeprefix("fold_"): f for f in folds}
    numbered = choose_folds(run, tuple(by_name), by="alone")
    others = [n for n in by_name if not n.isdecimal() and n != ALL]
    return [by_name[n] for n in dict.fromkeys((*numbered, *sorted(others)))]


def _fold_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder; expected a run, for instance data/runs/NAME")
    path = path.resolve()
    if path.name.startswith("fold_"):
        return [path]
    folds = [p for p in path.glob("fold_*") if p.is_dir()]
    if not folds:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:MAX_LISTED]) or "nothing"
        raise UsageError(
            f"{path} is not a run: expected fold_K folders in it, found {found}\n"
            "  Name the work directory of panther_jax.train, for instance data/runs/NAME."
        )
    return folds


def _distinct(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest ends of paths that tell each from all others."""
    names = []
    for parts in paths:
        lengths = range(1, len(parts) + 1)
        alone = (n for n in lengths if sum(p[-n:] == parts[-n:] for p in paths) == 1)
        names.append("/".join(parts[-next(alone, len(parts)) :]))
    return names


def _read_run(folder: Path, name: str, folds: Sequence[Path]) -> RunRecord:
    notices: list[str] = []
    config, plans, dataset = (
        _read_object(folder / f"{n}.json", notices) for n in ("config", "plans", "dataset")
    )
    try:
        labels = Labels.from_dataset_json(dataset) if dataset else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        notices.append(f"{folder / 'dataset.json'}: labels cannot be used: {error}")
        labels = None
    read = tuple(_read_fold(f, labels, config) for f in folds)
    record = RunRecord(name, folder, config, plans, dataset, labels, read, ())
    return RunRecord(
        name, folder, config, plans, dataset, labels, read, (*notices, *_repeated(record))
    )


def _repeated(run: RunRecord) -> list[str]:
    notices = []
    for checkpoint in run.checkpoints():
        folds: dict[str, list[str]] = {}
        for case in run.cases(checkpoint):
            folds.setdefault(case.id, []).append(case.fold)
        twice = [f"{c} ({', '.join(f)})" for c, f in folds.items() if len(f) > 1]
        if twice:
            notices.append(
                f"{len(twice)} case(s) were validated in several folds with the {checkpoint} "
                f"checkpoint and count several times: {_listed(twice)}"
            )
    return notices


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


def _read_object(path: Path, notices: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a notice, if the file is missing or not one."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        notices.append(f"{path} is missing")
        return {}
    except (ValueError, OSError, RecursionError) as error:
        notices.append(str(error))
        return {}
    if not isinstance(value, dict):
        notices.append(f"{path}: expected a JSON object, found {type(value).__name__}")
        return {}
    return value


def _entry(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


# --------------------------------------------------------------------------------------- folds


def _read_fold(folder: Path, labels: Labels | None, config: Mapping[str, Any]) -> FoldRecord:
    notices: list[str] = []
    info = _read_object(folder / "run.json", notices)
    rows = read_epochs(folder / "metrics.jsonl", notices)
    validations: dict[str, Validation] = {}
    if folder.name == FOLD_ALL:
        notices.append(SEEN)
    for checkpoint in CHECKPOINTS:
        validation = _read_validation(folder / f"validation_{checkpoint}", labels, notices)
        if validation is not None:
            validations[checkpoint] = validation
    if info and info.get("finished") is not True:
        epochs = _entry(config, "loop").get("epochs", "?")
        notices.append(
            f"{folder.name} is not finished: {len(rows)} of {epochs} epochs, validated: "
            f"{' and '.join(validations) or 'nothing'}. The page shows what there is; run the "
            "training command again to go on."
        )
    elif not validations:
        notices.append(f"{folder.name} holds no validation: no scores of whole cases to show")
    return FoldRecord(folder.name, folder, info, rows, validations, tuple(notices))


def read_epochs(path: Path, notices: list[str]) -> tuple[Mapping[str, Any], ...]:
    """The lines of a metrics file that hold an epoch; a notice names those that do not."""
    if not path.is_file():
        notices.append(f"{path} is missing: no learning curves")
        return ()
    rows: dict[float, Mapping[str, Any]] = {}
    broken = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line_number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[float(row["epoch"])] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.strip():
                broken.append(str(line_number))
    if broken:
        notices.append(
            f"{path}: line(s) {_listed(broken)} are not an epoch's JSON and are left out"
        )
    return tuple(rows[epoch] for epoch in sorted(rows) if math.isfinite(epoch))


# --------------------------------------------------------------------------------- validations


def _read_validation(folder: Path, labels: Labels | None, notices: list[str]) -> Validation | None:
    if not folder.is_dir():
        return None
    if not (folder / "summary.json").is_file():
        maps = sum(bool(image_ending(p.name)) for p in folder.iterdir())
        notices.append(f"{folder} is not complete: {maps} label maps, but no summary.json")
        return None
    summary = _read_object(folder / "summary.json", notices)
    panther = _read_object(folder / "panther.json", notices)
    entries = [e for e in _list(summary, "metric_per_case") if isinstance(e, Mapping)]
    scores = {str(e.get("subject")): e for e in _list(panther, "per_subject") if _is_object(e)}
    cases = tuple(_case(e, scores, folder, labels) for e in entries)
    unscored = [c.id for c in cases if c.id not in scores]
    if unscored and panther:
        notices.append(f"{folder / 'panther.json'} lacks {_listed(unscored)}")
    lacking = [c.id for c in cases if c.prediction is not None and not c.prediction.is_file()]
    if lacking:
        notices.append(f"{folder}: label maps are missing of {_listed(lacking)}")
    cases += _without_result(folder, cases)
    if not cases:
        notices.append(f"{folder} names no case")
        return None
    return Validation(folder, cases, str(panther.get("spacing_order", "unknown")))


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _list(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    return found if isinstance(found, list) else []


def _case(
    entry: Mapping[str, Any],
    panther: Mapping[str, Mapping[str, Any]],
    folder: Path,
    labels: Labels | None,
) -> CaseRecord:
    name = Path(str(entry.get("prediction_file", "unknown"))).name
    case_id = name.removesuffix(image_ending(name))
    by_key = _entry(entry, "metrics")
    classes = labels.classes if labels else tuple((str(k), str(k)) for k in by_key)
    dice = {
        label: number(_entry(by_key, class_key(value)).get("Dice"))  # type: ignore[arg-type]
        for label, value in classes
    }
    found = panther.get(case_id, {})
    scores = {n: number(found.get(n)) for n in (*METRICS.names, *VOLUMES)}
    if not found and dice:  # nnU-Net's summary alone tells the Dice
        scored = scored_label(labels)[0] if labels else next(iter(dice))
        scores["volumetric_dice"] = dice[scored]
    reference = entry.get("reference_file")
    return CaseRecord(
        id=case_id,
        fold=folder.parent.name,
        scores=scores,
        classes=dice,
        prediction=folder / name,
        reference=_found(Path(str(reference)), folder) if reference else None,
    )


def _found(reference: Path, validation: Path) -> Path:
    """The path; one relative to where training ran is looked for beside the run's root."""
    above = validation.parents  # fold_K, NAME, runs, root
    beside = above[min(4, len(above) - 1)] / reference
    return beside if not reference.exists() and beside.exists() else reference


def _without_result(folder: Path, cases: Sequence[CaseRecord]) -> tuple[CaseRecord, ...]:
    """Validation cases of the store's splits that have no result, where the splits are found."""
    fold = folder.parent.name.removeprefix("fold_")
    stores = {
        c.reference.parent.parent
        for c in cases
        if c.reference is not None and c.reference.parent.name == REFERENCES
    }
    if len(stores) != 1 or not fold.isdecimal():
        return ()
    try:
        splits = read_splits(stores.pop() / SPLITS)
    except (ValueError, OSError):
        return ()
    expected = splits[int(fold)][1] if int(fold) < len(splits) else ()
    missing = sorted(set(expected) - {c.id for c in cases})
    unknown: dict[str, float] = dict.fromkeys((*METRICS.names, *VOLUMES), math.nan)
    return tuple(
        CaseRecord(i, folder.parent.name, unknown, {}, None, None, expected=False) for i in missing
    )
