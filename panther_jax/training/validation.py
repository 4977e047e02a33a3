"""Validation of whole cases: predicted as `predict` does, scored on the raw grid (spec 03 §5.5).

Label maps, nnU-Net's ``summary.json`` and the PANTHER metrics, ``panther.json``, go to one folder.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from panther_jax.base.console import Progress as LogProgress
from panther_jax.base.console import table
from panther_jax.base.errors import CheckpointError
from panther_jax.base.files import read_json, write_json, writing
from panther_jax.config.places import Fold
from panther_jax.config.schema import TrainConfig, ValidationConfig
from panther_jax.devices import mesh, processes
from panther_jax.evaluation import metrics
from panther_jax.evaluation.scoring import Scoring, score_maps
from panther_jax.images import imageio
from panther_jax.inference import export
from panther_jax.inference.building import Settings, build_predictor
from panther_jax.inference.sliding_window import Predictor
from panther_jax.plans.plans import Plans
from panther_jax.reporting import pictures
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import Store, StoredCase, in_memory, read_stored
from panther_jax.weights.checkpoint import Checkpoints, TrainState

LOGGER = logging.getLogger("panther_jax")
PARTS = ".cases"
"""Folder of what is known of each case until the summary is written."""

Progress = Callable[[str, int, int], None]


def validate(
    store: Store,
    case_ids: Sequence[str],
    predict: Predictor,
    params: Any,
    folder: Path,
    *,
    save_probabilities: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predict and score cases of a store; returns nnU-Net's summary and writes it last.

    ``overlay.png`` shows a slice of each of the first cases. ``panther.json`` scores the tumour
    (a label so named, else the first class) with the PANTHER metrics. A folder that holds a summary
    is complete and is only read; one that was interrupted goes on at the first case it lacks.
    Several processes share the cases.
    """
    summary_path, parts = folder / "summary.json", folder / PARTS
    if summary_path.is_file():
        return read_json(summary_path)
    parts.mkdir(parents=True, exist_ok=True)
    share = case_ids[jax.process_index() :: jax.process_count()]
    for done, case_id in enumerate(share, start=1):
        part = parts / f"{case_id}.npz"
        if part.is_file():
            continue
        case = in_memory(read_stored(store, case_id))
        logits = predict(params, np.asarray(case.image))
        if save_probabilities:
            found = export.logits_to_probabilities(
                logits, case.properties, store.plans, store.labels
            )
            export.save_probabilities(folder, case.id, found, case.properties)
        _write_part(part, _score(store, case, logits, folder))
        if progress is not None:
            progress(case_id, done, len(share))
    processes.wait_for_all("validated")
    if processes.is_primary():
        _summarise(store, [_read_part(parts / f"{c}.npz") for c in case_ids], folder)
        shutil.rmtree(parts)
    processes.wait_for_all("summarised")
    return read_json(summary_path)


def _summarise(store: Store, scored: Sequence["_Scored"], folder: Path) -> None:
    panther = [s.panther for s in scored]
    write_json(
        folder / "panther.json",
        {
            "preset": "default",
            "spacing_order": "geometric",
            "per_subject": panther,
            "aggregates": metrics.panther_aggregate(panther),
        },
    )
    if not store.labels.has_regions:
        classes = {name: value for name, value in store.labels.classes if isinstance(value, int)}
        overlays = [s.overlay for s in scored]
        pictures.plot_overlays(overlays, classes, folder / "overlay.png")
    summary = metrics.summarise([s.entry for s in scored])
    metrics.write_summary(folder / "summary.json", summary)


@dataclass(frozen=True)
class _Scored:
    entry: dict[str, Any]
    panther: dict[str, Any]
    overlay: pictures.Overlay


def _write_part(path: Path, scored: _Scored) -> None:
    overlay = vars(scored.overlay)
    arrays: dict[str, Any] = {k: v for k, v in overlay.items() if isinstance(v, np.ndarray)}
    rest = {name: value for name, value in overlay.items() if name not in arrays}
    text = json.dumps({"entry": scored.entry, "panther": scored.panther, "overlay": rest})
    with writing(path) as temporary:
        np.savez(temporary, about=np.array(text), **arrays)


def _read_part(path: Path) -> _Scored:
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(str(arrays["about"]))
        pictured = {name: arrays[name] for name in arrays.files if name != "about"}
    overlay = pictures.Overlay(**about["overlay"], **pictured)
    return _Scored(about["entry"], about["panther"], overlay)


def _score(store: Store, case: StoredCase, logits: np.ndarray, folder: Path) -> _Scored:
    """Write the label map of a case and score it on the raw grid."""
    prediction = export.logits_to_label(logits, case.properties, store.plans, store.labels)
    geometry = case.properties.geometry
    path = folder / f"{case.id}{store.dataset['file_ending']}"
    imageio.write_label(path, prediction, geometry)
    reference, _ = imageio.read_label(store.reference(case.id))
    scoring = Scoring(label=metrics.scored_label(store.labels), labels=store.labels)
    scores = score_maps(reference, prediction, scoring, geometry=geometry)
    entry = {
        "metrics": scores.counts,
        "prediction_file": str(path),
        "reference_file": str(store.reference(case.id)),
    }
    overlay = _overlay(case, logits, store, scores.counts)
    return _Scored(entry, {"subject": case.id, **scores.panther}, overlay)


def _overlay(
    case: StoredCase, logits: np.ndarray, store: Store, counts: Mapping[str, Any]
) -> pictures.Overlay:
    """The slice with most of the first class, on the network's grid."""
    z = pictures.best_slice(np.asarray(case.label), store.labels.foreground_ids)
    scores = ", ".join(
        f"{name} {_cell(counts[metrics.class_key(value)]['Dice'])}"
        for name, value in store.labels.classes
    )
    height, width = store.plans.spacing[-2:]
    return pictures.Overlay(
        title=f"{case.id}, slice {z}: {scores}",
        image=np.asarray(case.image[0, z]),
        reference=np.asarray(case.label[z]),
        prediction=logits[:, z].argmax(0),
        aspect=height / width,
    )


def fold_predictor(
    plans: Plans, settings: ValidationConfig, *, dtype: str, mirror_axes: tuple[int, ...]
) -> Predictor:
    """What predicts the validation cases of a fold; ``mirror_axes`` are those training flips."""
    return build_predictor(
        plans,
        Settings(dtype=dtype),
        mirror_axes=mirror_axes if settings.mirror else (),
        step_size=settings.step_size,
    )


def validate_fold(
    config: TrainConfig,
    store: Store,
    folder: Path,
    *,
    fold: Fold,
    checkpoints: Checkpoints,
    template: TrainState,
    mirror_axes: tuple[int, ...],
) -> str:
    """Validate with each checkpoint asked for, into ``folder/validation_<name>``.

    ``template`` has the shapes of the checkpoints. Returns the tables of Dice as text, which
    say how many of the cases the fold was trained on.

    Raises:
        CheckpointError: if a checkpoint is missing.
        ValueError: if no case is left to validate.
    """
    settings = config.validation
    trained_on, held_out = fold_cases(store, fold)
    case_ids = cases_to_validate(held_out, settings.cases)
    predict = fold_predictor(
        store.plans, settings, dtype=config.loop.compute_dtype, mirror_axes=mirror_axes
    )
    parts = []
    for name in settings.checkpoints:
        restored = checkpoints.restore(name, template)
        if restored is None:
            raise CheckpointError(f"checkpoint {name!r} is missing in {checkpoints.folder}")
        state, counters = restored
        target = folder / f"validation_{name}"
        progress = LogProgress(len(case_ids), label=f"validating {name}: case", every_seconds=0.0)
        summary = validate(
            store,
            case_ids,
            predict,
            mesh.on_one_device(state.params),
            target,
            save_probabilities=settings.save_probabilities,
            progress=lambda case, done, _total, bar=progress: bar.update(done, case),
        )
        progress.close()
        text = results_table(store, summary, seen=len({*case_ids} & {*trained_on}))
        parts.append(f"{target} ({name} checkpoint, step {counters.step})\n{text}")
    return "\n\n".join(parts)


def cases_to_validate(case_ids: Sequence[str], which: str) -> tuple[str, ...]:
    """The validation cases of a fold that are asked for: all, or those that a pattern matches.

    Raises:
        ValueError: if none is left.
    """
    if which == "all":
        return tuple(case_ids)
    chosen = tuple(c for c in case_ids if re.fullmatch(which, c))
    if not chosen:
        raise ValueError(
            f"validation.cases is {which!r}, which the name of no case to validate matches, e.g. "
            f"{', '.join(case_ids[:3])}\n  Correct the pattern, or validate all cases with "
            "--validation.cases all."
        )
    return chosen


def results_table(store: Store, summary: Mapping[str, Any], *, seen: int = 0) -> str:
    """Dice of each case and class as text, with the mean in the last row.

    ``seen`` cases of them were trained on.
    """
    classes = store.labels.classes
    keys = [metrics.class_key(value) for _, value in classes]
    rows = [
        [
            Path(case["prediction_file"]).name.removesuffix(store.dataset["file_ending"]),
            *(_cell(case["metrics"][key]["Dice"]) for key in keys),
        ]
        for case in summary["metric_per_case"]
    ]
    rows.append(
        [
            "mean (trained on)" if seen else "mean",
            *(_cell(summary["mean"][key]["Dice"]) for key in keys),
        ]
    )
    note = f"\n{seen} of {len(rows) - 1} cases were trained on: no estimate for new cases" * bool(
        seen
    )
    return table(["Dice", *(name for name, _ in classes)], rows) + note


def _cell(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"
