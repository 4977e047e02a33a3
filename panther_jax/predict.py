"""Predict label maps: ``python -m panther_jax.predict``, and :func:`predict` for scripts.

Reading and preprocessing the next case, predicting this one, and exporting the one before go on
side by side.
"""

import argparse
import dataclasses
import importlib.metadata
import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import panther_jax
from panther_jax import command, imageio
from panther_jax.cases import Task, find_tasks
from panther_jax.combination import EnsembleSpec, read_ensemble
from panther_jax.images import dicom_tasks
from panther_jax.images.dicom_tasks import DicomOptions
from panther_jax.log import Progress, duration, write_json
from panther_jax.plans import Geometry, read_object

if TYPE_CHECKING:  # JAX loads when there is something to predict: --help must be quick
    from panther_jax.prediction import CasePredictor, Prediction

LOGGER = logging.getLogger("panther_jax")
EXAMPLE = """python -m panther_jax.predict --model data/runs/mri_t2 \\
      --input data/raw/Dataset902_PANTHER/imagesTs --output predictions"""
ARGUMENTS = "predict_args.json"
RECORD = "predict.json"
STRATEGIES = ("auto", "vmap", "scan", "loop", "shard")
DTYPES = ("auto", "float32", "bfloat16", "float16")
CASE_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


class PredictError(RuntimeError):
    """Cases that could not be predicted, all of them listed; or an output that is in the way."""


# ---------------------------------------------------------------------------------- from scripts


def load(
    model: Path | Sequence[Path] | EnsembleSpec,
    *,
    folds: Sequence[str] = (),
    checkpoint: str = "final",
    mirror: bool = False,
    step_size: float = 0.5,
    **settings: Any,
) -> "CasePredictor":
    """Load one or several models, or an ensemble, ready for many cases.

    ``settings`` are the fields of :class:`panther_jax.prediction.Settings`. An ensemble has folds,
    checkpoint, mirroring and step size in its spec.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming the model that cannot be used.
    """
    from panther_jax import members, prediction

    if isinstance(model, EnsembleSpec):
        ensemble = members.load_ensemble(model)
    else:
        paths = [model] if isinstance(model, (str, Path)) else list(model)
        ensemble = members.load_models(
            [Path(p) for p in paths],
            folds=folds,
            checkpoint=checkpoint,  # type: ignore[arg-type]
            mirror=mirror,
            step_size=step_size,
        )
    return prediction.CasePredictor(ensemble, prediction.Settings(**settings))


def predict(
    model: "CasePredictor | Path | Sequence[Path] | EnsembleSpec",
    image: Path | Sequence[Path] | np.ndarray,
    geometry: Geometry | Sequence[float] | None = None,
    *,
    probabilities: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> "Prediction":
    """Predict one image: a file, one file a channel, or an array (channel, z, y, x).

    An array needs its ``geometry``, or at least the spacing z, y, x in mm. ``options`` are those of
    :func:`load`; for many images, load once and pass the result. Nothing is written.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming what cannot be used.
    """
    from panther_jax.prediction import CasePredictor

    predictor = model if isinstance(model, CasePredictor) else load(model, **options)
    if isinstance(image, np.ndarray):
        if geometry is None:
            raise ValueError("an array needs its geometry, or the spacing z, y, x in mm")
    else:
        paths = [image] if isinstance(image, (str, Path)) else list(image)
        image, geometry = imageio.read_image([Path(p) for p in paths])
    return predictor.predict(image, geometry, probabilities=probabilities, progress=progress)


# --------------------------------------------------------------------------------- many of them


@dataclass(frozen=True)
class Report:
    """What became of the cases: seconds by step of those done, messages of those that failed."""

    done: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Staged:
    """A case between two steps, with the seconds that each took."""

    task: Task
    value: Any = None
    error: BaseException | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


def predict_cases(
    predictor: "CasePredictor",
    tasks: Sequence[Task],
    *,
    save_probabilities: bool = False,
    overwrite: bool = False,
) -> Report:
    """Predict cases to files; those that are done are left alone unless ``overwrite``.

    A case that cannot be predicted is reported, and the others are done. At any time one case is
    being read, one predicted and one exported.
    """
    report = Report()
    waiting = []
    for task in tasks:
        if task.problem:
            report.failed[task.case.id] = task.problem
            LOGGER.error("case %s: %s", task.case.id, task.problem)
        elif not overwrite and _is_done(task, save_probabilities):
            report.skipped.append(task.case.id)
        else:
            waiting.append(task)
    if report.skipped:
        LOGGER.info("%d of %d cases are there already; --overwrite predicts them again",
                    len(report.skipped), len(tasks))  # fmt: skip
    progress = Progress(len(waiting), label="cases", every_seconds=0.0)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        pending: Future[_Staged] | None = None
        for prepared in _ahead(reader, predictor, waiting):
            inferred = _infer(predictor, prepared, len(waiting))
            if pending is not None:  # not more than one case waits to be exported
                _note(report, pending.result(), progress)
            pending = writer.submit(_export, predictor, inferred, save_probabilities)
        if pending is not None:
            _note(report, pending.result(), progress)
    progress.close()
    return report


def _is_done(task: Task, save_probabilities: bool) -> bool:
    beside = task.output.parent / f"{task.stem}.npz"
    return task.is_done and (not save_probabilities or beside.is_file())


def _ahead(
    reader: ThreadPoolExecutor, predictor: "CasePredictor", tasks: Sequence[Task]
) -> Iterator[_Staged]:
    """Read and preprocess one case ahead of the one that is used."""
    upcoming = reader.submit(_prepare, predictor, tasks[0]) if tasks else None
    for following in [*tasks[1:], None]:
        if upcoming is None:
            return
        prepared = upcoming.result()
        upcoming = reader.submit(_prepare, predictor, following) if following else None
        yield prepared


def _prepare(predictor: "CasePredictor", task: Task) -> _Staged:
    try:
        start = time.monotonic()
        image, geometry = task.read()
        read = time.monotonic()
        case = predictor.prepare(image, geometry)
    except CASE_ERRORS as error:
        return _Staged(task, error=error)
    seconds = {"read": read - start, "preprocess": time.monotonic() - read}
    return _Staged(task, case, seconds=seconds)


def _infer(predictor: "CasePredictor", prepared: _Staged, num_cases: int) -> _Staged:
    if prepared.error is not None:
        return prepared
    tiles = Progress(1, label=f"case {prepared.task.case.id}: tile")

    def tell(done: int, total: int) -> None:
        tiles.total = total
        if done < total or num_cases == 1:
            tiles.update(done)

    try:
        start = time.monotonic()
        logits = predictor.infer(prepared.value, tell)
    except CASE_ERRORS as error:
        return dataclasses.replace(prepared, value=None, error=error)
    finally:
        tiles.close()
    seconds = {**prepared.seconds, "predict": time.monotonic() - start}
    return dataclasses.replace(prepared, value=(prepared.value, logits), seconds=seconds)


def _export(predictor: "CasePredictor", inferred: _Staged, save_probabilities: bool) -> _Staged:
    from panther_jax import export

    if inferred.error is not None:
        return inferred
    try:
        start = time.monotonic()
        case, logits = inferred.value
        found = predictor.finish(case, logits, probabilities=save_probabilities)
        finished = time.monotonic()
        task = inferred.task
        task.output.parent.mkdir(parents=True, exist_ok=True)
        if found.probabilities is not None:
            export.save_probabilities(
                task.output.parent, task.stem, found.probabilities, found.properties
            )
        task.write(found.label, found.geometry)  # last: it says "done"
    except CASE_ERRORS as error:
        return dataclasses.replace(inferred, value=None, error=error)
    seconds = {"export": finished - start, "write": time.monotonic() - finished}
    return dataclasses.replace(inferred, value=None, seconds={**inferred.seconds, **seconds})


def _note(report: Report, staged: _Staged, progress: Progress) -> None:
    case_id = staged.task.case.id
    if staged.error is not None:
        report.failed[case_id] = _message(staged.error)
        LOGGER.error("case %s: %s", case_id, report.failed[case_id])
        LOGGER.debug("case %s", case_id, exc_info=staged.error)
    else:
        report.done[case_id] = {k: round(v, 3) for k, v in staged.seconds.items()}
    steps = ", ".join(f"{name} {value:.1f} s" for name, value in staged.seconds.items())
    failed = sum(1 for c in report.failed if c not in report.done)
    progress.update(min(len(report.done) + failed, progress.total), f"{case_id}: {steps};")


def _message(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}"
    text = str(error).strip()
    if "RESOURCE_EXHAUSTED" in text:
        return (
            "not enough device memory; try --accumulate-on host, --strategy loop or --tile-batch 1"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or ''}: {error.strerror}"
    return text or type(error).__name__


# -------------------------------------------------------------------------------- the whole call


def predict_folder(
    predictor: "CasePredictor",
    source: Path,
    output: Path,
    *,
    save_probabilities: bool = False,
    overwrite: bool = False,
    dicom: DicomOptions | None = None,
) -> Report:
    """Predict an image, or a folder of them, to ``output``: a folder, or a file for one image.

    A source of DICOM files is predicted series by series, as ``dicom`` says. Beside label maps in a
    folder go ``dataset.json``, ``plans.json``, ``predict_args.json`` (what predicted) and
    ``predict.json`` (seconds by case and step, and failures).

    Raises:
        FileNotFoundError, DatasetError: if there is nothing to predict.
        PredictError: if the output cannot be written, or holds predictions made otherwise.
    """
    tasks = _find_tasks(predictor, source, output, dicom)
    folder = tasks[0].output.parent
    _require_writable(folder)
    if folder == output:
        _write_beside(predictor, folder, overwrite=overwrite)
    start = time.monotonic()
    report = predict_cases(
        predictor, tasks, save_probabilities=save_probabilities, overwrite=overwrite
    )
    if folder == output:
        write_json(folder / RECORD, dataclasses.asdict(report))
    LOGGER.info(
        "%d predicted, %d there before, %d failed, in %s",
        len(report.done),
        len(report.skipped),
        len(report.failed),
        duration(time.monotonic() - start),
    )
    return report


def _find_tasks(
    predictor: "CasePredictor", source: Path, output: Path, dicom: DicomOptions | None
) -> Sequence[Task]:
    model = predictor.ensemble.members[0].model
    if dicom is None and not dicom_tasks.holds_dicom(source):
        ending = str(model.dataset.get("file_ending", ".nii.gz"))
        return find_tasks(source, output, num_channels=model.num_channels, file_ending=ending)
    from panther_jax.checkpoint import params_sha256

    members = predictor.ensemble.members
    checksums = [params_sha256(params) for m in members for params in m.model.params]
    by = dicom_tasks.describe_model([m.model.name for m in members], checksums)
    options = dicom or DicomOptions()
    writing = dicom_tasks.Writing(predictor.labels, by, options.formats, options.anonymous)
    channels = model.num_channels
    return dicom_tasks.find_tasks(
        source, output, writing, wanted=options.series, num_channels=channels
    )


def _require_writable(folder: Path) -> None:
    """Find out before the work, not after."""
    probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise PredictError(
            f"output folder {folder} cannot be written: {error.strerror}; choose another"
        ) from None


def _write_beside(predictor: "CasePredictor", folder: Path, *, overwrite: bool) -> None:
    from panther_jax.members import describe

    settings = dataclasses.asdict(predictor.settings)
    matter = {key: settings[key] for key in ("dtype", "accumulate")}
    entry = {**describe(predictor.ensemble), **matter}
    path = folder / ARGUMENTS
    if path.is_file() and not overwrite:
        before = {k: v for k, v in read_object(path).items() if k in entry}
        if before != entry:
            changed = sorted(k for k in entry if before.get(k) != entry[k])
            raise PredictError(
                f"{folder} holds predictions that were made otherwise ({', '.join(changed)} in "
                f"{ARGUMENTS} differ)\n  Choose another --output, or pass --overwrite."
            )
    dataset = dict(predictor.ensemble.members[0].model.dataset)
    dataset.update(predictor.labels.to_dataset_json())
    write_json(folder / "dataset.json", dataset)
    write_json(folder / "plans.json", predictor.ensemble.members[0].model.plans_json)
    versions = {"panther_jax": panther_jax.__version__, "jax": importlib.metadata.version("jax")}
    write_json(path, {**entry, "settings": settings, "versions": versions})


# --------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.predict",
        "Predict label maps of an image or a folder of images. Running it again continues.",
        EXAMPLE,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=Path, nargs="+", metavar="PATH",
        help="run, bundle or nnU-Net model folder; several: mean of their probabilities",
    )  # fmt: skip
    what.add_argument("--ensemble", type=Path, metavar="SPEC.json", help="ensemble file")
    what.add_argument("--list-series", action="store_true", help="list the DICOM series, and stop")
    add("--input", type=Path, required=True,
        help="image, folder of CASE_0000.nii.gz files, or of DICOM files")  # fmt: skip
    add("--output", type=Path, help="folder; or a file, for one image")
    add("--series", nargs="+", default=[], metavar="UID",
        help="DICOM series, by UID, number or code (default: all)")  # fmt: skip
    add("--format", nargs="+", choices=dicom_tasks.FORMATS, default=[],
        help="of what is written for DICOM series (default: nifti)")  # fmt: skip
    add("--anonymous", action="store_true", help="no patient's identity in the DICOM written")
    add("--folds", nargs="+", metavar="K", help="folds, numbers or all (default: all there are)")
    add("--checkpoint", choices=("final", "best"), help="which of each fold (default: final)")
    add("--mirror", action="store_true", help="average over mirrored images (slower: 8 times)")
    add("--step-size", type=float, metavar="S", help="tile step, a part of the tile (default: 0.5)")
    add("--strategy", choices=STRATEGIES, default="auto", help="how folds run (default: auto)")
    add("--dtype", choices=DTYPES, default="auto", help="of the convolutions (default: auto)")
    add("--accumulate", choices=("float32", "reference"), default="float32",
        help="reference: float16 sums as nnU-Net (default: float32)")  # fmt: skip
    add("--accumulate-on", choices=("auto", "device", "host"), default="auto",
        help="where the tiles add up (default: auto)")  # fmt: skip
    whole_help = "one tile of the image's size, split over the devices; not what training saw"
    add("--whole-volume", action="store_true", help=whole_help)
    add("--tile-batch", type=int, metavar="N", help="tiles in one call of the network")
    add("--save-probabilities", action="store_true", help="also .npz, .pkl (for nnU-Net), .json")
    add("--overwrite", action="store_true", help="predict again what is there")
    return parser


def _checked(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    of_the_spec = ("folds", "checkpoint", "step_size")
    given = [n for n in of_the_spec if getattr(arguments, n) is not None]
    given += ["mirror"] if arguments.mirror else []
    if arguments.ensemble is not None and given:
        options = ", ".join(f"--{n.replace('_', '-')}" for n in given)
        parser.error(f"{options}: with --ensemble, its file says so for each member")
    if arguments.output is None and not arguments.list_series:
        parser.error("the following arguments are required: --output")
    if arguments.step_size is not None and not 0 < arguments.step_size <= 1:
        parser.error(f"--step-size must be in (0, 1], found {arguments.step_size}")
    if arguments.tile_batch is not None and arguments.tile_batch < 1:
        parser.error(f"--tile-batch must be at least 1, found {arguments.tile_batch}")
    if arguments.accumulate == "reference" and arguments.strategy not in ("auto", "loop"):
        parser.error("--accumulate reference sums up each fold on its own: --strategy loop")


def _dicom_options(arguments: argparse.Namespace) -> DicomOptions | None:
    if not (arguments.series or arguments.format or arguments.anonymous):
        return None
    formats = tuple(dict.fromkeys(arguments.format)) or ("nifti",)
    return DicomOptions(tuple(arguments.series), formats, arguments.anonymous)


def _run(arguments: argparse.Namespace) -> str:
    from panther_jax import devices

    if arguments.list_series:
        return dicom_tasks.list_series(arguments.input)

    devices.use_compilation_cache()
    if arguments.ensemble is not None:
        model: Any = read_ensemble(arguments.ensemble)
    else:
        model = arguments.model
    folds = arguments.folds or ()
    predictor = load(
        model,
        folds=() if tuple(folds) == ("all",) and not _has_fold_all(arguments.model) else folds,
        checkpoint=arguments.checkpoint or "final",
        mirror=arguments.mirror,
        step_size=0.5 if arguments.step_size is None else arguments.step_size,
        strategy=arguments.strategy,
        dtype=arguments.dtype,
        accumulate=arguments.accumulate,
        accumulate_on=arguments.accumulate_on,
        tile_batch=arguments.tile_batch,
        whole_volume=arguments.whole_volume,
    )
    report = predict_folder(
        predictor,
        arguments.input,
        arguments.output,
        save_probabilities=arguments.save_probabilities,
        overwrite=arguments.overwrite,
        dicom=_dicom_options(arguments),
    )
    if report.failed:
        listed = "\n".join(f"case {name}: {text}" for name, text in sorted(report.failed.items()))
        raise PredictError(
            f"{len(report.failed)} case(s) could not be predicted; the others are done.\n{listed}\n"
            "Correct or remove them, and run the same command again: it does only these."
        )
    return str(arguments.output)


def _has_fold_all(models: Sequence[Path] | None) -> bool:
    return any((path / "fold_all").is_dir() for path in models or ())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    _checked(parser, arguments)
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    raise SystemExit(main())
