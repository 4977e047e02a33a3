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
from panther_jax.base.files import json_bytes, read_object, require_writable, write_json
from panther_jax.images import dicom_tasks
from panther_jax.images.cases import Task, find_tasks, require_apart
from panther_jax.images.dicom_tasks import DicomOptions
from panther_jax.images.endings import readable
from panther_jax.inference import records as records_module
from panther_jax.inference.plausibility import doubts
from panther_jax.inference.records import RECORD, REMEDY, Maker, Records

if TYPE_CHECKING:  # JAX loads when there is something to predict: --help must be quick
    from panther_jax.inference.predictor import CasePredictor

LOGGER = logging.getLogger("panther_jax")
ARGUMENTS = "predict_args.json"
PROBABILITIES = (".npz", ".pkl", ".json")
CASE_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


class PredictError(PantherError, RuntimeError):
    """Cases that could not be predicted, all of them listed; or an output that is in the way."""


# --------------------------------------------------------------------------------- many of them


@dataclass(frozen=True)
class Report:
    """What became of the cases: seconds by step of those done, messages of those that failed.

    ``warned`` tells what speaks against images that were predicted all the same.
    """

    done: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    warned: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Staged:
    """A case between two steps, with the seconds that each took, and what its record will say."""

    task: Task
    value: Any = None
    error: BaseException | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def predict_cases(
    predictor: "CasePredictor",
    tasks: Sequence[Task],
    *,
    save_probabilities: bool = False,
    overwrite: bool = False,
    records: Records | None = None,
) -> Report:
    """Predict cases to files; those that ``records`` show to be done are left alone.

    A file that is there and of which no record tells is refused, unless ``overwrite``, which also
    predicts again what is done. A case that cannot be predicted is reported, and the others are
    done. At any time one case is being read, one predicted and one exported.
    """
    report, waiting = _sorted_out(tasks, save_probabilities, overwrite, records)
    return _predict_waiting(predictor, waiting, report, save_probabilities, records)


def _sorted_out(
    tasks: Sequence[Task], save_probabilities: bool, overwrite: bool, records: Records | None
) -> tuple[Report, list[Task]]:
    """A report of the cases that are done or cannot be predicted, and the others."""
    report = Report()
    waiting = []
    for task in tasks:
        name = readable(task.case.id)
        problem, done = task.problem, False
        if not problem and not overwrite:
            problem, done = _what_is_there(task, _wanted(task, save_probabilities), records)
        if problem:
            report.failed[name] = problem
            LOGGER.error("case %s: %s", name, problem)
        elif done:
            report.skipped.append(name)
        else:
            waiting.append(task)
    return report, waiting


def _what_is_there(task: Task, wanted: Sequence[Path], records: Records | None) -> tuple[str, bool]:
    """Why a case may not be predicted, and whether it is done."""
    if records is None:
        there = [path.name for path in wanted if path.exists()]
        why = f"{there[0]} is there, and no record says what made it" if there else ""
        return (f"{why}; {REMEDY}" if why else ""), False
    try:
        state = records.state(task, wanted)
    except OSError as error:
        return _message(error), False
    if state.kind == "foreign":
        return f"{state.why}; {REMEDY}", False
    if state.kind == "stale":
        LOGGER.info("case %s is predicted again: %s", task.case.id, state.why)
    return "", state.kind == "same"


def _wanted(task: Task, save_probabilities: bool) -> tuple[Path, ...]:
    """The files of a case."""
    beside = PROBABILITIES if save_probabilities else ()
    return (*task.files, *(task.output.parent / f"{task.stem}{ending}" for ending in beside))


def _predict_waiting(
    predictor: "CasePredictor",
    waiting: Sequence[Task],
    report: Report,
    save_probabilities: bool,
    records: Records | None,
) -> Report:
    if report.skipped:
        LOGGER.info("%d of %d cases are there already; --overwrite predicts them again",
                    len(report.skipped), len(report.skipped) + len(report.failed) + len(waiting)
                    )  # fmt: skip
    progress = Progress(len(waiting), label="cases", every_seconds=0.0)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        pending: Future[_Staged] | None = None
        for prepared in _ahead(reader, predictor, waiting):
            inferred = _infer(predictor, prepared, len(waiting))
            if pending is not None:  # not more than one case waits to be exported
                _note(report, pending.result(), progress)
            pending = writer.submit(_export, predictor, inferred, save_probabilities, records)
        if pending is not None:
            _note(report, pending.result(), progress)
    progress.close()
    return report


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
        inputs = records_module.checksums_of(task)
        image, geometry = task.read()
        read = time.monotonic()
        found = _doubts(predictor, task, image)
        case = predictor.prepare(image, geometry)
    except CASE_ERRORS as error:
        return _Staged(task, error=error)
    seconds = {"read": read - start, "preprocess": time.monotonic() - read}
    return _Staged(task, case, seconds=seconds, inputs=inputs, doubts=found)


def _doubts(predictor: "CasePredictor", task: Task, image: Any) -> tuple[str, ...]:
    if not hasattr(predictor, "ensemble"):  # another object with the same three steps
        return ()
    plans = [m.model.plans for m in predictor.ensemble.members]
    found = tuple(dict.fromkeys(text for p in plans for text in doubts(image, p)))
    for text in found:
        LOGGER.warning("case %s: %s", readable(task.case.id), text)
    return found


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


def _export(
    predictor: "CasePredictor",
    inferred: _Staged,
    save_probabilities: bool,
    records: Records | None,
) -> _Staged:
    from panther_jax.inference import export

    if inferred.error is not None:
        return inferred
    try:
        start = time.monotonic()
        case, logits = inferred.value
        found = predictor.finish(case, logits, probabilities=save_probabilities)
        finished = time.monotonic()
        task = inferred.task
        wanted = _wanted(task, found.probabilities is not None)
        task.output.parent.mkdir(parents=True, exist_ok=True)
        if records is not None:
            for path in records.outdated(task, wanted):
                path.unlink()
            records.begin(task)
        if found.probabilities is not None:
            export.save_probabilities(
                task.output.parent, task.stem, found.probabilities, found.properties
            )
        task.write(found.label, found.geometry)
        if records is not None:  # last: it says "done"
            records.note(task, inferred.inputs, wanted, inferred.doubts)
    except CASE_ERRORS as error:
        return dataclasses.replace(inferred, value=None, error=error)
    seconds = {"export": finished - start, "write": time.monotonic() - finished}
    return dataclasses.replace(inferred, value=None, seconds={**inferred.seconds, **seconds})


def _note(report: Report, staged: _Staged, progress: Progress) -> None:
    case_id = readable(staged.task.case.id)
    if staged.doubts:
        report.warned[case_id] = list(staged.doubts)
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
    ``predict.json`` (seconds by case and step, failures, and a record of what each file was made
    of). A file that was named as output has its record beside it, in ``NAME.predict.json``.

    What is there already counts if its record says that the same model made it of the same image.
    What was made otherwise is predicted again; in a folder another model needs ``overwrite``, as
    do files that no record tells of.

    Raises:
        FileNotFoundError, DatasetError: if there is nothing to predict, or an output is an input.
        PredictError: if the output cannot be written, or holds predictions made otherwise.
    """
    start = time.monotonic()
    maker = records_module.describe_maker(predictor)
    tasks = _find_tasks(predictor, source, output, dicom=dicom, maker=maker)
    require_apart(tasks)
    folder = tasks[0].output.parent
    _require_writable(folder)
    if folder == output and not overwrite:
        _require_made_so(predictor, folder, maker)
    path = folder / RECORD if folder == output else records_module.sidecar_of(output)
    records = Records(path, maker, _versions(), anew=overwrite)
    report, waiting = _sorted_out(tasks, save_probabilities, overwrite, records)
    if folder == output and (waiting or report.skipped):
        _write_beside(predictor, folder, maker)
    _predict_waiting(predictor, waiting, report, save_probabilities, records)
    if waiting or report.skipped or path.is_file():
        records.finish(dataclasses.asdict(report))
    LOGGER.info(
        "%d predicted, %d there before, %d failed, in %s",
        len(report.done),
        len(report.skipped),
        len(report.failed),
        duration(time.monotonic() - start),
    )
    return report


def check_places(source: Path, output: Path) -> None:
    """Refuse an output that is an input, before a model is loaded.

    Raises:
        FileNotFoundError, DatasetError: if there is nothing to predict, or an output is an input.
    """
    made = records_module.made_in(source if source.is_dir() else source.parent)
    if dicom_tasks.holds_dicom(source, made):
        return  # several outputs a series, all of other names: looked at when they are known
    require_apart(find_tasks(source, output, num_channels=1, file_ending="", made=made))


def _find_tasks(
    predictor: "CasePredictor",
    source: Path,
    output: Path,
    *,
    dicom: DicomOptions | None,
    maker: Maker,
) -> Sequence[Task]:
    model = predictor.ensemble.members[0].model
    made = records_module.made_in(source if source.is_dir() else source.parent)
    if dicom is None and not dicom_tasks.holds_dicom(source, made):
        ending = str(model.dataset.get("file_ending", ".nii.gz"))
        channels = model.num_channels
        return find_tasks(source, output, num_channels=channels, file_ending=ending, made=made)
    names = [m.model.name for m in predictor.ensemble.members]
    by = dicom_tasks.describe_model(names, [w for m in maker["members"] for w in m["weights"]])
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


def _described(predictor: "CasePredictor") -> dict[str, Any]:
    from panther_jax.inference.members import describe

    settings = dataclasses.asdict(predictor.settings)
    return {**describe(predictor.ensemble), **{k: settings[k] for k in ("dtype", "accumulate")}}


def _beside(predictor: "CasePredictor") -> dict[str, Any]:
    """What is written beside predictions for those who read them, by file name."""
    model = predictor.ensemble.members[0].model
    dataset = {**model.dataset, **predictor.labels.to_dataset_json()}
    return {"dataset.json": dataset, "plans.json": model.plans_json}


def _require_made_so(predictor: "CasePredictor", folder: Path, maker: Maker) -> None:
    """Refuse a folder of another model's predictions, or of another origin's dataset.json."""
    path = folder / ARGUMENTS
    if not path.is_file():
        for name, value in _beside(predictor).items():
            there = folder / name
            if there.is_file() and there.read_bytes() != json_bytes(value):
                raise PredictError(
                    f"{there} is there, and is not of a prediction: it would be replaced\n"
                    "  Choose another --output, or pass --overwrite."
                )
        return
    before, entry = read_object(path), _described(predictor)
    if isinstance(before.get("maker"), dict):
        changed = list(records_module.differences(before["maker"], maker))
    else:  # of version 0.1: without checksums, and its files without records are refused one by one
        changed = sorted(k for k in entry if before.get(k) != entry[k])
    if changed:
        raise PredictError(
            f"{folder} holds predictions that were made otherwise ({', '.join(changed)} in "
            f"{ARGUMENTS} differ)\n  Choose another --output, or pass --overwrite."
        )


def _write_beside(predictor: "CasePredictor", folder: Path, maker: Maker) -> None:
    for name, value in _beside(predictor).items():
        write_json(folder / name, value)
    settings = dataclasses.asdict(predictor.settings)
    about = {"settings": settings, "maker": dict(maker), "versions": _versions()}
    write_json(folder / ARGUMENTS, {**_described(predictor), **about})


def _versions() -> dict[str, str]:
    return {"panther_jax": panther_jax.__version__, "jax": importlib.metadata.version("jax")}
