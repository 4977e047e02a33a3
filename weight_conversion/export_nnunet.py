"""Export a run or bundle as an nnU-Net model folder: ``python -m weight_conversion.export_nnunet``.

nnU-Net 2.8.1 predicts with it, starts from it (``-pretrained_weights``), and continues a run's
training with it (``--c``): SGD momentum, epoch and curves go along (spec 01 §3, §6). The validation
goes along too, so that ``nnUNetv2_find_best_configuration`` takes it in.
"""

import argparse
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panther_jax.base import command
from panther_jax.base.files import read_object, write_json
from panther_jax.base.folds import choose_folds
from panther_jax.plans.plans import Plans
from panther_jax.store.layout import FINGERPRINT
from panther_jax.training.records import read_metrics
from panther_jax.weights.from_run import run_mirror_axes, trained_folds
from weight_conversion import companions
from weight_conversion.companions import ExportError

if TYPE_CHECKING:  # JAX and torch load when there is something to convert: --help must be quick
    from panther_jax.network.unet import Params
    from panther_jax.weights.checkpoint import Counters, Kind

LOGGER = logging.getLogger("panther_jax")
EXAMPLE = (
    "python -m weight_conversion.export_nnunet --model data/runs/mri_t2 --out "
    "nnUNet_results/Dataset902_PANTHER/nnUNetTrainer__nnUNetResEncUNetLPlans__3d_fullres"
)
FILES: "dict[Kind, str]" = {
    "final": "checkpoint_final.pth",
    "best": "checkpoint_best.pth",
    "latest": "checkpoint_latest.pth",
}
LOG_KEYS = (
    "mean_fg_dice",
    "ema_fg_dice",
    "dice_per_class_or_region",
    "train_losses",
    "val_losses",
    "lrs",
    "epoch_start_timestamps",
    "epoch_end_timestamps",
)
SGD_GROUP = {
    "lr": 0.01,
    "momentum": 0.99,
    "dampening": 0,
    "weight_decay": 3e-5,
    "nesterov": True,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
    "initial_lr": 0.01,
}


@dataclass(frozen=True)
class Training:
    """What continuing needs beside the weights: epochs done, curves, optimiser settings, momentum.

    ``momentum`` is shaped like the parameters, or None: nnU-Net then starts with none.
    """

    epoch: int = 0
    best_ema: float | None = None
    curves: Mapping[str, Sequence[Any]] = field(default_factory=lambda: {k: [] for k in LOG_KEYS})
    settings: Mapping[str, Any] = field(default_factory=dict)
    momentum: "Params | None" = None


@dataclass(frozen=True)
class Member:
    """One checkpoint to write."""

    fold: str
    file: str
    params: "Params"
    training: Training


@dataclass(frozen=True)
class Model:
    """A run or bundle: its JSON, its folds, and its checkpoints one after the other."""

    folder: Path
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    mirror_axes: tuple[int, ...]
    folds: tuple[str, ...]
    members: Iterator[Member]


@dataclass(frozen=True)
class Beside:
    """What is written beside the weights, and from which data.

    ``raw`` and ``store`` default to those of the run. ``fingerprint``: dataset_fingerprint.json
    too. ``preprocessed``: nnU-Net's folder of that name, where its training commands look.
    """

    raw: Path | None = None
    store: Path | None = None
    fingerprint: bool = False
    preprocessed: Path | None = None
    workers: int = 1


def export(
    model: Path,
    out: Path,
    *,
    trainer: str = "nnUNetTrainer",
    folds: Sequence[str] = (),
    beside: Beside | None = None,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Write a run or bundle as the model folder ``out``; returns the checkpoints written.

    The folder appears when complete.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: if there is nothing to export, something is
            damaged, or ``out`` exists.
    """
    from panther_jax.base.files import refuse_existing, writing_folder
    from weight_conversion.torch_files import write_torch

    if not re.fullmatch(r"\w+", trainer):
        raise ExportError(f"trainer {trainer!r} is not the name of a class, such as nnUNetTrainer")
    refuse_existing(out, overwrite=overwrite)
    beside = beside or Beside()
    source = open_model(model, folds)
    sources = companions.find_sources(
        model, str(source.plans["dataset_name"]), beside.raw, beside.store
    )
    source, fingerprint = _completed(source, out, sources=sources, beside=beside)
    _warn_of_other_name(out, source, trainer)
    written = []
    with writing_folder(out) as temporary:
        for member in source.members:
            path = temporary / f"fold_{member.fold}" / member.file
            write_torch(path, make_checkpoint(source, member, trainer=trainer))
            written.append(out / path.relative_to(temporary))
        _write_beside(source, temporary, out, fingerprint=fingerprint if beside.fingerprint else {})
        if beside.preprocessed is not None:
            companions.write_preprocessed(
                beside.preprocessed,
                source.plans,
                source.dataset,
                sources=sources,
                fingerprint=fingerprint,
            )
    return tuple(written)


def _completed(
    source: Model, out: Path, *, sources: companions.Sources, beside: Beside
) -> tuple[Model, Mapping[str, Any] | None]:
    """The model with complete JSON, under the data set's name of ``out``, and the fingerprint."""
    wanted = beside.fingerprint or companions.lacks_intensity(source.plans)
    fingerprint = sources.fingerprint(measure=wanted, workers=beside.workers)
    if fingerprint is None and beside.fingerprint:
        raise ExportError(
            f"{source.folder}: there is no fingerprint to write\n  Name the raw data with --raw, "
            "or the store with --store if it holds one."
        )
    plans = dict(source.plans)
    if companions.DATASET_NAME.fullmatch(out.parent.name):
        plans["dataset_name"] = out.parent.name
    plans = companions.complete_plans(plans, source.dataset, fingerprint, model=source.folder)
    cases = None if fingerprint is None else len(fingerprint["spacings"])
    dataset = companions.complete_dataset(source.dataset, cases)
    return replace(source, plans=plans, dataset=dataset), fingerprint


def _warn_of_other_name(out: Path, source: Model, trainer: str) -> None:
    """nnU-Net's commands find a model by the name of its folder."""
    configuration = next(iter(source.plans["configurations"]))
    name = f"{trainer}__{source.plans['plans_name']}__{configuration}"
    if out.name != name and out.name.count("__") == 2:
        LOGGER.warning("%s: nnUNetv2_predict -d and nnUNetv2_train look for a folder %s", out, name)


def _write_beside(
    source: Model, temporary: Path, out: Path, *, fingerprint: Mapping[str, Any] | None
) -> None:
    write_json(temporary / "plans.json", source.plans)
    write_json(temporary / "dataset.json", source.dataset)
    if fingerprint:
        write_json(temporary / FINGERPRINT, fingerprint)
    for fold in source.folds:
        name = f"fold_{fold}"
        companions.copy_validation(
            source.folder / name,
            temporary / name / "validation",
            final=out.absolute() / name / "validation",
            ending=source.dataset["file_ending"],
        )


# ----------------------------------------------------------------------------------- what it is


def open_model(path: Path, folds: Sequence[str] = ()) -> Model:
    """Open a run (its work directory) or a bundle.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming what is missing.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"model {path} does not exist; name a run or a bundle")
    if (path / "config.json").is_file():
        return _open_run(path, folds)
    if (path / "provenance.json").is_file():
        return _open_bundle(path, folds)
    if (path.parent / "config.json").is_file():
        raise ExportError(
            f"{path} is one fold of a run; pass --model {path.parent} "
            f"--folds {path.name.removeprefix('fold_')}"
        )
    raise ExportError(f"{path} is neither a run (config.json) nor a bundle (provenance.json)")


def _open_bundle(folder: Path, folds: Sequence[str]) -> Model:
    from panther_jax.weights.bundle import load_bundle

    bundle = load_bundle(folder)
    bundle.require_complete(f"export {folder}")
    records = bundle.provenance.get("checkpoints", {})
    named = {
        fold or str(records.get("", {}).get("fold") or 0): tree
        for fold, tree in bundle.params.items()
    }
    chosen = choose_folds(folder, tuple(named), folds)
    members = (Member(f, FILES["final"], named[f], Training()) for f in chosen)
    return Model(folder, *_documents(folder), bundle.mirror_axes, chosen, members)


def _open_run(folder: Path, folds: Sequence[str]) -> Model:
    chosen = trained_folds(folder, folds)
    plans, dataset = _documents(folder)
    config = read_object(folder / "config.json")
    members = (m for fold in chosen for m in _members_of_fold(folder, fold, config, plans, dataset))
    axes = run_mirror_axes(folder, Plans.from_nnunet(plans, dataset))
    return Model(folder, plans, dataset, axes, chosen, members)


def _documents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    dataset = read_object(folder / "dataset.json")
    return read_object(folder / "plans.json"), companions.complete_dataset(dataset, None)


# ------------------------------------------------------------------------------------- one fold


def _members_of_fold(
    folder: Path,
    fold: str,
    config: Mapping[str, Any],
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
) -> Iterator[Member]:
    from panther_jax.weights.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder / f"fold_{fold}" / "checkpoints")
    finished = bool(checkpoints.steps("final"))
    kinds: tuple[Kind, ...] = ("final", "best") if finished else ("latest", "best")
    rows = read_metrics(folder / f"fold_{fold}" / "metrics.jsonl")
    classes = [n for n, _ in _labels_of(dataset)]
    written = 0
    for kind in kinds:
        found = checkpoints.read(kind)
        if found is None:
            continue
        params, opt_state, counters = found
        training = _training(config, rows, classes, counters=counters, opt_state=opt_state)
        yield Member(fold, FILES[kind], params, training)
        written += 1
    if not written:
        raise ExportError(f"{folder}/fold_{fold} holds no checkpoint; train it first")


def _labels_of(dataset: Mapping[str, Any]) -> Any:
    from panther_jax.plans.labels import Labels

    return Labels.from_dataset_json(dataset).classes


def _training(
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    *,
    counters: "Counters",
    opt_state: Any,
) -> Training:
    optim = config["optim"]
    epoch = counters.step // int(config["loop"]["steps_per_epoch"])
    curves = _curves({int(row["epoch"]): row for row in rows}, epoch, classes)
    momentum = None
    if optim["optimizer"] == "sgd":
        momentum = find_momentum(opt_state)
    else:
        LOGGER.warning(
            "the run used %s; its optimiser state has no place in nnU-Net's SGD and is left out: "
            "training continued with --c starts without momentum",
            optim["optimizer"],
        )
    settings = {
        "lr": curves["lrs"][-1] if curves["lrs"] else float(optim["lr"]),
        "initial_lr": float(optim["lr"]),
        "weight_decay": float(optim["weight_decay"]),
    }
    if optim["optimizer"] == "sgd":
        settings["momentum"] = float(optim["momentum"])
    return Training(epoch, counters.best_ema, curves, settings, momentum)


def find_momentum(opt_state: Any) -> "Params | None":
    """The momentum of SGD in an optimiser state of nested dicts and lists, or None."""
    if isinstance(opt_state, Mapping):
        if isinstance(opt_state.get("trace"), Mapping):
            return opt_state["trace"]
        opt_state = list(opt_state.values())
    if isinstance(opt_state, (list, tuple)):
        return next((m for part in opt_state if (m := find_momentum(part)) is not None), None)
    return None


def _curves(
    rows: Mapping[int, Mapping[str, Any]], epochs: int, classes: Sequence[str]
) -> dict[str, list[Any]]:
    """nnU-Net's eight lists, one entry an epoch; an epoch that was not recorded is NaN."""
    curves: dict[str, list[Any]] = {key: [] for key in LOG_KEYS}
    clock = 0.0
    for epoch in range(epochs):
        row = rows.get(epoch, {})
        dice = row.get("pseudo_dice") or {}
        end = clock + (_number(row.get("seconds")) if row.get("seconds") is not None else 0.0)
        values = (
            _number(row.get("mean_pseudo_dice")),
            _number(row.get("ema")),
            [_number(dice.get(name)) for name in classes],
            _number(row.get("train_loss")),
            _number(row.get("validation_loss")),
            _number(row.get("lr")),
            clock,
            end,
        )
        for key, value in zip(LOG_KEYS, values, strict=True):
            curves[key].append(value)
        clock = end
    return curves


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


# ------------------------------------------------------------------------------------ the file


def make_checkpoint(model: Model, member: Member, *, trainer: str) -> dict[str, Any]:
    """The nine entries of an nnU-Net checkpoint; numbers are Python's, tensors float32 on CPU."""
    from weight_conversion import mapping, torch_files

    plans = Plans.from_nnunet(model.plans, model.dataset)
    tensors = mapping.to_state(member.params, plans.arch)
    training = member.training
    return {
        "network_weights": torch_files.make_state_dict(tensors, mapping.names_of(plans.arch).keys),
        "optimizer_state": {
            "state": _momentum_state(training.momentum, plans),
            "param_groups": [
                {**SGD_GROUP, **training.settings, "params": list(range(len(tensors)))}
            ],
        },
        "grad_scaler_state": None,
        "logging": {key: list(training.curves[key]) for key in LOG_KEYS},
        "_best_ema": training.best_ema,
        "current_epoch": training.epoch,
        "init_args": {
            "plans": dict(model.plans),
            "configuration": plans.configuration,
            "fold": int(member.fold) if member.fold.isdigit() else member.fold,
            "dataset_json": dict(model.dataset),
            "device": torch_files.cpu_device(),
        },
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": model.mirror_axes or None,
    }


def _momentum_state(momentum: "Params | None", plans: Plans) -> dict[int, Any]:
    from weight_conversion import mapping, torch_files

    if momentum is None:
        return {}
    buffers = mapping.to_state(momentum, plans.arch)
    return {
        index: {"momentum_buffer": torch_files.make_tensor(buffer)}
        for index, buffer in enumerate(buffers.values())
    }


# ------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "weight_conversion.export_nnunet",
        "Export a run or a bundle as a model folder of nnU-Net v2.8.1, final and best checkpoints.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a run's work directory, or a bundle")
    add("--out", type=Path, required=True, help="model folder, TRAINER__PLANS__CONFIGURATION")
    add("--trainer", default="nnUNetTrainer", help="trainer class (default nnUNetTrainer)")
    add(
        "--folds",
        nargs="+",
        default=[],
        metavar="K",
        help="numbers, all or fold_all (all)",
    )
    add("--raw", type=Path, help="raw data set of the model (default: the run's)")
    add("--store", type=Path, help="store of the model (default: the run's)")
    add("--fingerprint", action="store_true", help="dataset_fingerprint.json too")
    where = "nnUNet_preprocessed: put there what nnUNetv2_train and _find_best_configuration read"
    add("--preprocessed", type=Path, metavar="FOLDER", help=where)
    add("--workers", type=int, default=1, help="processes that measure (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser


def _run(arguments: argparse.Namespace) -> str:
    written = export(
        arguments.model,
        arguments.out,
        trainer=arguments.trainer,
        folds=arguments.folds,
        beside=Beside(
            raw=arguments.raw,
            store=arguments.store,
            fingerprint=arguments.fingerprint,
            preprocessed=arguments.preprocessed,
            workers=arguments.workers,
        ),
        overwrite=arguments.overwrite,
    )
    return "\n".join(map(str, (*written, arguments.out)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
