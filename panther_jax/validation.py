"""Validation of whole cases: predicted as `predict` does, scored on the raw grid (spec 03 §5.5).

Label maps, nnU-Net's ``summary.json`` and the PANTHER metrics, ``panther.json``, go to one folder.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax import imageio, metrics
from panther_jax.checkpoint import CheckpointError, Checkpoints, TrainState
from panther_jax.config import ValidationConfig
from panther_jax.inference import (
    Predictor,
    logits_to_label,
    logits_to_probabilities,
    make_predictor,
)
from panther_jax.log import Progress as LogProgress
from panther_jax.log import table, write_json
from panther_jax.model import Net, apply
from panther_jax.plans import Geometry, read_json
from panther_jax.store import Store, read_stored

LOGGER = logging.getLogger("panther_jax")
TUMOR_NAMES = ("tumor", "tumour", "lesion")

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

    A folder that holds a summary is complete and is only read. ``panther.json`` scores the tumour
    (a label so named, else the first class) with the PANTHER metrics.
    """
    summary_path = folder / "summary.json"
    if summary_path.is_file():
        return read_json(summary_path)
    folder.mkdir(parents=True, exist_ok=True)
    ending = store.dataset["file_ending"]
    scored, panther = [], []
    for done, case_id in enumerate(case_ids, start=1):
        case = read_stored(store, case_id, resident=False)
        logits = predict(params, np.asarray(case.image))
        prediction = logits_to_label(logits, case.properties, store.plans, store.labels)
        geometry = case.properties.geometry
        prediction_path = folder / f"{case_id}{ending}"
        imageio.write_label(prediction_path, prediction, geometry)
        if save_probabilities:
            probabilities = logits_to_probabilities(
                logits, case.properties, store.plans, store.labels
            )
            np.savez_compressed(folder / f"{case_id}.npz", probabilities=probabilities)
            write_json(folder / f"{case_id}.json", case.properties.to_json())
        reference, _ = imageio.read_label(store.reference(case_id))
        counts = metrics.label_counts(
            reference, prediction, [c for _, c in store.labels.classes], store.labels.ignore_id
        )
        files = {
            "prediction_file": str(prediction_path),
            "reference_file": str(store.reference(case_id)),
        }
        scored.append({"metrics": counts, **files})
        panther.append(_panther(store, case_id, geometry, reference, prediction))
        if progress is not None:
            progress(case_id, done, len(case_ids))
    write_json(
        folder / "panther.json",
        {
            "preset": "default",
            "spacing_order": "geometric",
            "per_subject": panther,
            "aggregates": metrics.panther_aggregate(panther),
        },
    )
    summary = metrics.summarise(scored)
    metrics.write_summary(summary_path, summary)
    return summary


def validate_checkpoints(
    store: Store,
    net: Net,
    checkpoints: Checkpoints,
    template: TrainState,
    folder: Path,
    *,
    settings: ValidationConfig,
    mirror_axes: tuple[int, ...],
    case_ids: Sequence[str],
) -> str:
    """Validate cases with each checkpoint asked for, into ``folder/validation_<name>``.

    Returns the tables of Dice as text.

    Raises:
        CheckpointError: if a checkpoint is missing.
    """
    predict = make_predictor(
        lambda params, x: apply(net, params, x, full_only=True)[0],
        tile=store.plans.patch_size,
        num_outputs=net.arch.num_outputs,
        mirror_axes=mirror_axes if settings.mirror else (),
        step_size=settings.step_size,
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
            state.params,
            target,
            save_probabilities=settings.save_probabilities,
            progress=lambda case, done, _total, bar=progress: bar.update(done, case),
        )
        progress.close()
        text = results_table(store, summary)
        parts.append(f"{target} ({name} checkpoint, step {counters.step})\n{text}")
    return "\n\n".join(parts)


def _panther(
    store: Store, case_id: str, geometry: Geometry, reference: np.ndarray, prediction: np.ndarray
) -> dict[str, Any]:
    _, tumor = scored_class(store)
    scores = metrics.panther_case(
        np.isin(reference, tumor),
        np.isin(prediction, tumor),
        spacing_zyx=geometry.spacing_zyx,
    )
    return {"subject": case_id, **scores}


def scored_class(store: Store) -> tuple[str, Any]:
    """Name and value of the class that the PANTHER metrics score."""
    named = [c for c in store.labels.classes if c[0].casefold() in TUMOR_NAMES]
    return (named or list(store.labels.classes))[0]


def results_table(store: Store, summary: Mapping[str, Any]) -> str:
    """Dice of each case and class as text, with the mean in the last row."""
    classes = store.labels.classes
    keys = [metrics.class_key(value) for _, value in classes]
    rows = [
        [
            Path(case["prediction_file"]).name.removesuffix(store.dataset["file_ending"]),
            *(_cell(case["metrics"][key]["Dice"]) for key in keys),
        ]
        for case in summary["metric_per_case"]
    ]
    rows.append(["mean", *(_cell(summary["mean"][key]["Dice"]) for key in keys)])
    return table(["Dice", *(name for name, _ in classes)], rows)


def _cell(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"
