"""Import nnU-Net and MultiTalent weights: ``python -m weight_conversion.import_nnunet``.

A model folder, or one checkpoint, becomes a bundle. Nothing is written unless everything fits.
"""

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import panther_jax
from panther_jax.base import command
from panther_jax.base.checksums import file_sha256
from panther_jax.base.errors import PlansError
from panther_jax.base.files import read_object
from panther_jax.base.folds import choose_checkpoint, choose_folds
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans, resolve_configuration
from panther_jax.plans.v1 import with_architecture

if TYPE_CHECKING:  # JAX and torch load when there is something to convert: --help must be quick
    from panther_jax.weights.bundle import ModelBundle
    from weight_conversion.mapping import Conversion
    from weight_conversion.torch_files import TorchCheckpoint

LOGGER = logging.getLogger("panther_jax")
EXAMPLE = (
    "python -m weight_conversion.import_nnunet --model-folder "
    "nnUNet_results/Dataset902_PANTHER/nnUNetTrainer__nnUNetPlans__3d_fullres --out data/weights/t2"
)
FINAL = "checkpoint_final.pth"
PLACEHOLDER_LABELS = {"background": 0, "foreground": 1}


@dataclass(frozen=True)
class Imported:
    """Converted weights with the JSON that belongs to them; ``params`` by fold, ``""`` for one."""

    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    params: Mapping[str, Any]
    provenance: Mapping[str, Any]
    absent: tuple[str, ...]
    report: str

    def bundle(self) -> "ModelBundle":
        """The model in memory, as ``load_bundle`` would return it."""
        from panther_jax.weights.bundle import ModelBundle

        plans = Plans.from_nnunet(self.plans, self.dataset)
        labels = Labels.from_dataset_json(self.dataset)
        return ModelBundle(plans, labels, self.params, self.provenance, self.absent)

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the bundle.

        Raises:
            CheckpointError: if the folder exists or cannot be written.
        """
        from panther_jax.weights.bundle import save_bundle

        save_bundle(
            folder,
            params=self.params,
            plans=self.plans,
            dataset=self.dataset,
            provenance=self.provenance,
            overwrite=overwrite,
        )


# ------------------------------------------------------------------------------------- sources


def read_model_folder(
    folder: Path,
    *,
    folds: Sequence[str] = (),
    checkpoint: str = "final",
    configuration: str | None = None,
    stem: str | None = None,
) -> Imported:
    """Convert the folds of an nnU-Net model folder, in memory; :func:`find_folds` chooses them.

    Raises:
        FileNotFoundError: naming the folder, file or fold that is missing and what is there.
        ValueError: if a file is not safe or not whole, or does not fit.
    """
    checkpoints = find_folds(folder, folds, checkpoint)
    named = {}
    for name in ("plans.json", "dataset.json"):
        named[name] = read_object(folder / name) if (folder / name).is_file() else None
    return _convert(
        checkpoints,
        plans=named["plans.json"],
        dataset=named["dataset.json"],
        configuration=configuration,
        stem=stem,
        source=folder,
    )


def read_single(
    checkpoint: Path,
    *,
    plans: Path | None = None,
    dataset: Path | None = None,
    configuration: str | None = None,
    stem: str | None = None,
) -> Imported:
    """Convert one checkpoint file; plans and dataset.json default to those stored in it.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_model_folder`.
    """
    return _convert(
        {"": checkpoint},
        plans=None if plans is None else read_object(plans),
        dataset=None if dataset is None else read_object(dataset),
        configuration=configuration,
        stem=stem,
        source=checkpoint,
    )


def find_folds(
    folder: Path, folds: Sequence[str] = (), checkpoint: str = "final"
) -> dict[str, Path]:
    """Checkpoint files of a model folder by fold, as :mod:`panther_jax.folds` chooses them.

    ``checkpoint`` is final, best, or the name of a file in the fold folders. Where there is no
    final one, the best is taken, and the log says so.

    Raises:
        FileNotFoundError, FoldsError: naming what is missing and what is there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    names = {word: file_name(word) for word in ("final", "best", checkpoint)}
    found = {
        word: {
            path.parent.name.removeprefix("fold_"): path
            for path in sorted(folder.glob(f"fold_*/{name}"))
        }
        for word, name in names.items()
    }
    checkpoint = choose_checkpoint(
        folder, {word: list(paths) for word, paths in found.items()}, checkpoint, folds
    )
    name, present = names[checkpoint], found[checkpoint]
    if not present:
        others = ", ".join(str(p.relative_to(folder)) for p in sorted(folder.glob("*/*.pth"))[:6])
        raise FileNotFoundError(
            f"{folder} holds no fold_*/{name}\n  found: {others or 'no checkpoint'}\n"
            "  Name the folder TRAINER__PLANS__CONFIGURATION of nnUNet_results, or another "
            "--checkpoint."
        )
    chosen = choose_folds(folder, list(present), folds, what=f"{name} of fold")
    return {fold: present[fold] for fold in chosen}


def file_name(checkpoint: str) -> str:
    """The file of a checkpoint: of final and best nnU-Net's name, else the name itself."""
    return {"final": FINAL, "best": "checkpoint_best.pth"}.get(checkpoint, checkpoint)


# ---------------------------------------------------------------------------------- conversion


def _convert(
    checkpoints: Mapping[str, Path],
    *,
    plans: Mapping[str, Any] | None,
    dataset: Mapping[str, Any] | None,
    configuration: str | None,
    stem: str | None,
    source: Path,
) -> Imported:
    from weight_conversion import mapping
    from weight_conversion.torch_files import read_checkpoint

    resolved: tuple[dict[str, Any], dict[str, Any]] | None = None
    params, records, lines = {}, {}, []
    absent: tuple[str, ...] = ()
    mirror_axes: tuple[int, ...] | None = None
    for fold, path in checkpoints.items():
        checkpoint = read_checkpoint(path)
        if resolved is None:
            resolved = (
                _plans_of(checkpoint, plans, configuration),
                _dataset_of(checkpoint, dataset, stem),
            )
            mirror_axes = checkpoint.mirror_axes
        arch = Plans.from_nnunet(*resolved).arch
        try:
            conversion = mapping.convert(checkpoint.weights, arch, stem=stem)
        except mapping.ConversionError as error:
            raise mapping.ConversionError(f"{path}: {error}") from None
        _warn_of_non_finite(path, conversion)
        params[fold], absent = conversion.params, conversion.absent
        records[fold] = _record(checkpoint, conversion)
        lines.append(f"{path}\n{conversion.report()}")
    assert resolved is not None
    provenance = {
        "source": str(source),
        "license": "not stated by the source",
        "converted_by": f"panther_jax {panther_jax.__version__}",
        "stem": stem or "copy",
        "inference_allowed_mirroring_axes": list(mirror_axes) if mirror_axes else None,
        "checkpoints": records,
    }
    return Imported(*resolved, params, provenance, absent, "\n".join(lines))


def _plans_of(
    checkpoint: "TorchCheckpoint", given: Mapping[str, Any] | None, configuration: str | None
) -> dict[str, Any]:
    """The plans with one configuration, resolved, its architecture in today's format."""
    plans = given if given is not None else checkpoint.init_arg("plans")
    if not isinstance(plans, Mapping):
        raise PlansError(
            f"{checkpoint.path} holds no plans; name the plans.json of its training with --plans"
        )
    names = list(plans.get("configurations") or {})
    name = configuration or checkpoint.init_arg("configuration")
    if name is None and len(names) == 1:
        name = names[0]
    if name is None:
        raise PlansError(f"plans hold the configurations {names}; choose one with --configuration")
    entry = resolve_configuration(plans, str(name))
    entry.pop("inherits_from", None)
    if entry.get("previous_stage"):
        raise PlansError(
            f"configuration {name!r} is the second stage of nnU-Net's cascade, which reads the "
            f"prediction of {entry['previous_stage']!r}; it cannot be imported"
        )
    return {**plans, "configurations": {str(name): with_architecture(entry)}}


def _dataset_of(
    checkpoint: "TorchCheckpoint", given: Mapping[str, Any] | None, stem: str | None
) -> dict[str, Any]:
    """The dataset.json of the weights; of a multi-dataset file a stand-in where it says nothing."""
    from weight_conversion import mapping

    found = given if given is not None else checkpoint.init_arg("dataset_json")
    dataset = dict(found) if isinstance(found, Mapping) else {}
    canonical = mapping.canonicalize(checkpoint.weights)
    ids = mapping.stem_channels(canonical)
    if not (ids or mapping.is_multi_head(canonical)):
        if not dataset:
            raise PlansError(
                f"{checkpoint.path} holds no dataset.json; name that of its training with "
                "--dataset-json"
            )
        return dataset
    # The heads stay behind, so labels do not matter; such files describe many datasets (01 §4.2).
    if not isinstance(dataset.get("channel_names", dataset.get("modality")), Mapping):
        own = canonical.get("encoder.stem.convs.0.conv.weight")
        count = ids.get(stem or "", 1 if own is None else int(own.shape[1]))
        dataset["channel_names"] = {str(c): f"channel_{c}" for c in range(count)}
    try:
        Labels.from_dataset_json(dataset)
    except PlansError:
        dataset["labels"] = PLACEHOLDER_LABELS
        dataset.pop("regions_class_order", None)
    return {"file_ending": ".nii.gz", **dataset}


def _record(checkpoint: "TorchCheckpoint", conversion: "Conversion") -> dict[str, Any]:
    entries = checkpoint.entries
    best = entries.get("_best_ema")
    epoch = entries.get("current_epoch")
    return {
        "file": checkpoint.path.name,
        "sha256": file_sha256(checkpoint.path),
        "fold": _plain(checkpoint.init_arg("fold")),
        "trainer": _plain(entries.get("trainer_name")),
        "epochs": None if epoch is None else int(epoch),
        "best_ema": None if best is None or math.isnan(best) else float(best),
        "tensors_taken": len(conversion.taken),
        "tensors_skipped": len(conversion.skipped),
    }


def _plain(value: Any) -> str | int | None:
    return value if value is None or isinstance(value, int) else str(value)


def _warn_of_non_finite(path: Path, conversion: "Conversion") -> None:
    import numpy as np

    from panther_jax.network.unet import walk

    bad = ["/".join(p) for p, leaf in walk(conversion.params) if not np.isfinite(leaf).all()]
    if bad:
        LOGGER.warning("%s: NaN or infinity in %d tensors, e.g. %s", path, len(bad), bad[0])


# ------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "weight_conversion.import_nnunet",
        "Import nnU-Net v2 or MultiTalent weights as a bundle, to predict with or to start from.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--model-folder", type=Path, help="folder TRAINER__PLANS__CONFIGURATION of nnUNet_results")
    what = "final (default), best, or a file's name, of the model folder; alone: one file (.pth)"
    add("--checkpoint", metavar="final|best|NAME", help=what)
    add("--plans", type=Path, help="plans.json of --checkpoint (default: the one stored in it)")
    add("--dataset-json", type=Path, help="dataset.json of --checkpoint (default: likewise)")
    add("--configuration", help="configuration of the plans (default: the checkpoint's)")
    add("--out", type=Path, required=True, help="folder of the bundle")
    add("--stem", metavar="copy|reinit|ID", help="which stem the bundle holds (default: copy)")
    add(
        "--folds",
        nargs="+",
        default=[],
        metavar="K",
        help="numbers, all or fold_all (all)",
    )
    add("--checkpoint-name", help="the same as --checkpoint NAME")
    add("--license", help="licence of the weights, for provenance.json")
    add("--overwrite", action="store_true", help="replace the bundle if it exists")
    return parser


def _run(arguments: argparse.Namespace) -> str:
    from panther_jax.base.files import refuse_existing

    refuse_existing(arguments.out, overwrite=arguments.overwrite)
    if arguments.model_folder is not None:
        imported = read_model_folder(
            arguments.model_folder,
            folds=arguments.folds,
            checkpoint=arguments.checkpoint_name or arguments.checkpoint or "final",
            configuration=arguments.configuration,
            stem=arguments.stem,
        )
    else:
        imported = read_single(
            Path(arguments.checkpoint),
            plans=arguments.plans,
            dataset=arguments.dataset_json,
            configuration=arguments.configuration,
            stem=arguments.stem,
        )
    if arguments.license:
        imported.provenance["license"] = arguments.license  # type: ignore[index]
    imported.save(arguments.out, overwrite=arguments.overwrite)
    return f"{imported.report}\n{arguments.out}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    if arguments.model_folder is None and arguments.checkpoint is None:
        parser.error("name a --model-folder, or a single file with --checkpoint")
    if arguments.checkpoint is not None and "/" in arguments.checkpoint and arguments.model_folder:
        parser.error("--checkpoint of a model folder is final, best or a file's name, not a path")
    if None not in (arguments.checkpoint, arguments.checkpoint_name):
        parser.error("--checkpoint and --checkpoint-name are the same; pass one of them")
    if arguments.model_folder is not None and (arguments.plans or arguments.dataset_json):
        parser.error("--plans and --dataset-json go with --checkpoint; a model folder has its own")
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
