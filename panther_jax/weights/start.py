"""What training starts from: a bundle, or one fold of an nnU-Net model folder, converted."""

import dataclasses
import logging
from pathlib import Path
from typing import Literal

from panther_jax.base.errors import CheckpointError
from panther_jax.base.files import read_object
from panther_jax.config.places import Fold
from panther_jax.weights.bundle import ModelBundle, load_bundle
from panther_jax.weights.public import of_record
from panther_jax.weights.show import MANIFEST, MAX_PARENTS

LOGGER = logging.getLogger("panther_jax")


def load_start(folder: Path, *, fold: Fold, stem: Literal["copy", "reinit"]) -> ModelBundle:
    """Read the weights to start a fold from; of an nnU-Net folder only the fold that is used.

    That is the same fold, else ``all``, else the first; its published checkpoint where the folder
    is a download of known weights, else the best, else the final one. ``stem`` is what training
    does with it: weights that have several need ``reinit``.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming what is missing, damaged or misfit.
        ModuleNotFoundError: if a model folder is given and torch is not installed.
    """
    found = {p.parent.name.removeprefix("fold_"): p.parent
             for p in sorted(folder.glob("fold_*/checkpoint_*.pth"))}  # fmt: skip
    if (folder / "provenance.json").is_file() or not found:
        return load_bundle(folder)
    from weight_conversion.import_nnunet import read_model_folder

    name = next((n for n in (str(fold), "all") if n in found), next(iter(found)))
    checkpoint = _checkpoint(folder, found[name])
    LOGGER.info("starting weights: converting fold %s, %s of %s", name, checkpoint, folder)
    imported = read_model_folder(
        folder,
        folds=["fold_all" if name == "all" else name],
        checkpoint=checkpoint,
        stem="reinit" if stem == "reinit" else None,
    )
    bundle = imported.bundle()
    sha256 = {f"fold_{name}/{checkpoint}": imported.provenance["checkpoints"][name]["sha256"]}
    return dataclasses.replace(bundle, provenance={**bundle.provenance, "sha256": sha256})


def _checkpoint(folder: Path, fold: Path) -> str:
    for kind in (_published(folder), "best", "final"):
        if kind and (fold / f"checkpoint_{kind}.pth").is_file():
            return f"checkpoint_{kind}.pth"
    raise CheckpointError(
        f"{fold} holds neither checkpoint_best.pth nor checkpoint_final.pth\n"
        "  Let its training end, or name another model."
    )


def _published(folder: Path) -> str | None:
    """The checkpoint that the authors used, if the folder lies in a download of known weights."""
    for place in folder.absolute().parents[:MAX_PARENTS]:
        if (place / MANIFEST).is_file():
            record = str(read_object(place / MANIFEST).get("record"))
            inside = folder.absolute().relative_to(place).as_posix()
            return next((e.checkpoint for e in of_record(record)
                         if any(hint in inside for hint in e.folders)), None)  # fmt: skip
    return None
