"""Any model to predict with: a run, a bundle, an nnU-Net model folder."""

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base.errors import PantherError
from panther_jax.base.files import read_object
from panther_jax.base.folds import choose_checkpoint, choose_folds
from panther_jax.config.schema import CHECKPOINTS, CheckpointName
from panther_jax.network.unet import Params, param_shapes, walk
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans
from panther_jax.preprocessing.normalization import NORMALIZATIONS
from panther_jax.weights.bundle import load_bundle
from panther_jax.weights.checkpoint import Checkpoints
from panther_jax.weights.from_run import run_mirror_axes

LOGGER = logging.getLogger("panther_jax")


class ModelError(PantherError, ValueError):
    """A model that cannot be predicted with; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Model:
    """A model ready to predict: one set of parameters a fold, on the host, in the order of folds.

    ``mirror_axes`` are those that training flipped, which prediction may mirror. ``plans_json`` and
    ``dataset`` are the files' content, for what is written beside predictions.
    """

    name: str
    plans: Plans
    labels: Labels
    dataset: Mapping[str, Any]
    plans_json: Mapping[str, Any]
    mirror_axes: tuple[int, ...]
    folds: tuple[str, ...]
    params: tuple[Params, ...]

    @property
    def num_channels(self) -> int:
        """Image files a case."""
        return self.plans.arch.in_channels


def load_model(
    path: Path,
    *,
    folds: Sequence[str] = (),
    checkpoint: CheckpointName = "final",
    configuration: str | None = None,
    name: str | None = None,
) -> Model:
    """Read a run's work directory, a bundle, or an nnU-Net model folder.

    ``folds`` as in :func:`panther_jax.base.folds.choose_folds`: none means all numbered ones. A
    bundle holds one checkpoint a fold, whichever that is.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming what is missing, damaged or misfit.
        ModuleNotFoundError: if a model folder is given and torch is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"model {path} does not exist or is not a folder\n"
            "  Name a run (ROOT/runs/NAME), a bundle, or a model folder of nnU-Net."
        )
    if (path / "config.json").is_file():
        model = _load_run(path, folds, checkpoint)
    elif (path / "provenance.json").is_file():
        model = _load_bundle(path, folds, checkpoint)
    elif any(path.glob("fold_*/checkpoint_*.pth")):
        model = _load_nnunet(path, folds, checkpoint, configuration)
    elif path.name.startswith("fold_") and (path.parent / "plans.json").is_file():
        raise ModelError(
            f"{path} is one fold of a model; pass {path.parent} and --folds "
            f"{path.name.removeprefix('fold_')}"
        )
    else:
        raise ModelError(
            f"{path} is no model: it holds neither config.json (a run), nor provenance.json (a "
            "bundle), nor fold_*/checkpoint_*.pth (nnU-Net)"
        )
    if configuration not in (None, model.plans.configuration):
        raise ModelError(
            f"{path} holds the configuration {model.plans.configuration!r}, not {configuration!r}"
        )
    _require_normalizations(path, model.plans)
    return Model(**{**vars(model), "name": name or path.resolve().name})


def _require_normalizations(path: Path, plans: Plans) -> None:
    """Name what is missing to prepare images for a model, and the file that had it."""
    unknown = [name for name in plans.normalization if name not in NORMALIZATIONS.names]
    if not unknown:
        return
    records = [read_object(p) for p in sorted(path.glob("fold_*/run.json"))]
    files = {f"{r['config_file']} (SHA-256 {r.get('config_sha256')})"
             for r in records if "config_file" in r}  # fmt: skip
    trained = f"\n  The run was trained with {', '.join(sorted(files))}." if files else ""
    raise ModelError(f"{path}: {NORMALIZATIONS.unknown(unknown[0])}{trained}")


# ------------------------------------------------------------------------------------------ runs


def _load_run(folder: Path, folds: Sequence[str], checkpoint: CheckpointName) -> Model:
    plans_json, dataset = read_object(folder / "plans.json"), read_object(folder / "dataset.json")
    plans = Plans.from_nnunet(plans_json, dataset)
    present = {
        p.parent.name.removeprefix("fold_"): Checkpoints(p)
        for p in sorted(folder.glob("fold_*/checkpoints"))
    }
    kinds: tuple[CheckpointName, ...] = CHECKPOINTS
    having = {kind: [f for f, c in present.items() if c.steps(kind)] for kind in kinds}
    if choose_checkpoint(folder, having, checkpoint, folds) == "best":
        checkpoint = "best"
    ready = having[checkpoint]
    chosen = choose_folds(folder, ready, folds, what=f"{checkpoint} checkpoint of fold")
    if not folds and len(ready) < len(present):
        unfinished = sorted(set(present) - set(ready))
        LOGGER.warning("%s: fold %s has no %s checkpoint and is left out", folder,
                       ", ".join(unfinished), checkpoint)  # fmt: skip
    params = []
    for fold in chosen:
        found = present[fold].read_params(checkpoint)
        assert found is not None, "a complete checkpoint is listed and can be read"
        _require_fit(found[0], plans, present[fold].folder / checkpoint)
        params.append(found[0])
    axes = run_mirror_axes(folder, plans)
    labels = Labels.from_dataset_json(dataset)
    return Model("", plans, labels, dataset, plans_json, axes, chosen, tuple(params))


def _require_fit(params: Params, plans: Plans, where: Path) -> None:
    found = {"/".join(p): tuple(np.shape(leaf)) for p, leaf in walk(params)}
    wanted = {"/".join(p): tuple(leaf.shape) for p, leaf in walk(param_shapes(plans.arch))}
    wrong = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
    if wrong:
        lines = [
            f"  {n}: {found.get(n, 'absent')}, expected {wanted.get(n, 'none')}" for n in wrong[:10]
        ]
        raise ModelError(
            f"{where}: the weights are of another architecture than plans.json says; "
            f"{len(wrong)} parameters differ:\n" + "\n".join(lines) + "\n"
            "  Was plans.json changed after the training? Restore it, or train again."
        )


# ----------------------------------------------------------------------------- bundles, nnU-Net


def _load_bundle(folder: Path, folds: Sequence[str], checkpoint: CheckpointName) -> Model:
    bundle = load_bundle(folder)
    bundle.require_complete(f"predict with {folder}")
    if checkpoint != "final":
        LOGGER.info("%s is a bundle: it holds one checkpoint a fold, which is taken", folder)
    dataset, plans_json = read_object(folder / "dataset.json"), read_object(folder / "plans.json")
    if tuple(bundle.params) == ("",) and set(folds) - {"all"}:
        raise ModelError(f"{folder} is a single model without folds; leave out --folds")
    chosen = choose_folds(folder, tuple(bundle.params), folds)
    params = tuple(bundle.params[fold] for fold in chosen)
    axes = bundle.mirror_axes
    return Model("", bundle.plans, bundle.labels, dataset, plans_json, axes, chosen, params)


def _load_nnunet(
    folder: Path, folds: Sequence[str], checkpoint: CheckpointName, configuration: str | None
) -> Model:
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError(
            f"{folder} holds weights of nnU-Net, which need torch to be read: "
            "pip install 'panther-jax[nnunet]', or convert it where torch is installed with "
            "`python -m weight_conversion.import_nnunet --model-folder FOLDER --out BUNDLE`"
        )
    from weight_conversion.import_nnunet import read_model_folder

    imported = read_model_folder(
        folder,
        folds=folds,
        checkpoint=checkpoint,
        configuration=configuration,
    )
    bundle = imported.bundle()
    bundle.require_complete(f"predict with {folder}")
    found = tuple(bundle.params)
    return Model(
        "",
        bundle.plans,
        bundle.labels,
        json.loads(json.dumps(imported.dataset)),
        json.loads(json.dumps(imported.plans)),
        bundle.mirror_axes,
        found,
        tuple(bundle.params[fold] for fold in found),
    )
