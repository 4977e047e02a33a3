"""A folder of cases predicted: one is prepared, one runs, one is exported at a time."""

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import panther_jax
from panther_jax.base.console import Progress, duration
from panther_jax.base.errors import PantherError
from panther_jax.base.files import read_object, require_writable, write_json
from panther_jax.images import dicom_tasks
from panther_jax.images.cases import Task, find_tasks
from panther_jax.images.dicom_tasks import DicomOptions

if TYPE_CHECKING:  # JAX loads when there is something to predict: --help must be quick
    from panther_jax.inference.predictor import CasePredictor

LOGGER = logging.getLogger("panther_jax")
ARGUMENTS = "predict_args.json"
RECORD = "predict.json"
CASE_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


class PredictError(PantherError, RuntimeError):
    """Cases that could not be predicted, all of them listed; or an output that is in the way."""


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
    from panther_jax.inference import export

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
    from panther_jax.weights.bundle import params_sha256

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
    try:
        require_writable(folder)
    except OSError as error:
        raise PredictError(
            f"output folder {folder} cannot be written: {error.strerror}; choose another"
        ) from None


def _write_beside(predictor: "CasePredictor", folder: Path, *, overwrite: bool) -> None:
    from panther_jax.inference.members import describe

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
