"""A bundle made of a run's checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import panther_jax
from panther_jax.base.files import read_object
from panther_jax.plans.plans import Plans

if TYPE_CHECKING:  # JAX loads when there is something to do: --help must be quick
    from panther_jax.weights.checkpoint import Kind
PASSED_ON = ("started", "config_file", "config_argument", "device", "git_revision", "params_sha256")


class BundleError(ValueError):
    """A run that no bundle can be made of."""


def make_bundle(
    run: Path,
    out: Path,
    *,
    folds: Sequence[str] = (),
    checkpoint: "Kind" = "final",
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write the weights of a run's folds (default: all of them) as a bundle; returns the folds.

    Raises:
        BundleError: if the folder is no run, a fold is missing or has no such checkpoint.
        CheckpointError: if a checkpoint cannot be read or ``out`` exists or cannot be written.
    """
    from panther_jax.base.files import refuse_existing
    from panther_jax.weights.bundle import save_bundle
    from panther_jax.weights.checkpoint import Checkpoints

    refuse_existing(out, overwrite=overwrite)
    params, records = {}, {}
    for fold in trained_folds(run, folds):
        found = Checkpoints(run / f"fold_{fold}" / "checkpoints").read_params(checkpoint)
        if found is None:
            raise BundleError(
                f"{run}/fold_{fold} has no {checkpoint} checkpoint; let its training end by "
                "starting it again"
            )
        params[fold], counters = found
        about = _about(run, fold)
        records[fold] = {
            **{key: about.get(key) for key in PASSED_ON},
            "checkpoint": checkpoint,
            "step": counters.step,
            "metrics": _scores(run / f"fold_{fold}" / f"validation_{checkpoint}"),
        }
    plans, dataset = read_object(run / "plans.json"), read_object(run / "dataset.json")
    axes = run_mirror_axes(run, Plans.from_nnunet(plans, dataset))
    save_bundle(
        out,
        params=params,
        plans=plans,
        dataset=dataset,
        provenance={
            "source": str(run),
            "license": "not stated",
            "converted_by": f"panther_jax {panther_jax.__version__}",
            "inference_allowed_mirroring_axes": list(axes),
            "checkpoints": records,
        },
        overwrite=overwrite,
    )
    return tuple(params)


def trained_folds(run: Path, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the folds of a run, or of those wanted.

    Raises:
        BundleError: if the folder is no run, or lacks one of them.
    """
    if not (run / "config.json").is_file():
        raise BundleError(f"{run} is not a run: it holds no config.json")
    present = sorted(p.parent.name.removeprefix("fold_") for p in run.glob("fold_*/checkpoints"))
    return choose_folds(run, present, wanted)


def choose_folds(
    folder: Path, present: Sequence[str], wanted: Sequence[str] = ()
) -> tuple[str, ...]:
    """The folds wanted of those a model has, or all of them.

    Raises:
        BundleError: naming those that are missing.
    """
    missing = [fold for fold in wanted if fold not in present]
    if missing or not present:
        raise BundleError(
            f"{folder} has no fold {', '.join(missing) or 'with checkpoints'}; there are: "
            f"{', '.join(present) or 'none'}"
        )
    return tuple(wanted or present)


def run_mirror_axes(run: Path, plans: Plans) -> tuple[int, ...]:
    """Axes that a run's training flipped: as recorded, else by its augmentation policy."""
    for path in sorted(run.glob("fold_*/run.json")):
        recorded = read_object(path).get("inference_allowed_mirroring_axes")
        if recorded is not None:
            return tuple(int(a) for a in recorded)
    from panther_jax.augment import policies

    policy = str(read_object(run / "config.json")["augment"]["policy"])
    return policies.patch_geometry(policy, plans.patch_size).mirror_axes


def _about(run: Path, fold: str) -> Mapping[str, Any]:
    path = run / f"fold_{fold}" / "run.json"
    return read_object(path) if path.is_file() else {}


def _scores(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        mean = read_object(path)["mean"]
        return {key: {"Dice": entry["Dice"]} for key, entry in mean.items()}
    except (KeyError, TypeError, AttributeError):
        raise BundleError(
            f"{path} holds no mean Dice\n  Delete it and run panther_jax.train again, which "
            "validates the fold anew."
        ) from None
