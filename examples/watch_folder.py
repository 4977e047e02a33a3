"""Watch a folder and answer each complete DICOM series with an RT structure set.

    python examples/watch_folder.py --model data/runs/mri_t2 --folder incoming --output structures

The model is loaded once. A series is complete when none of its files has changed for a while
(``--settle`` seconds) and its slices are a regular stack; if more slices come later, it is answered
again. For research: what is written is to be checked by a physician.
"""

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from panther_jax.base import command
from panther_jax.images import dicom_files, dicom_series, dicom_tasks
from panther_jax.images.dicom_files import DicomError
from panther_jax.images.dicom_objects import ModelDescription
from panther_jax.images.dicom_series import Series
from panther_jax.inference import loading
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels
from panther_jax.weights.bundle import params_sha256

LOGGER = logging.getLogger("panther_jax")
Print = tuple[tuple[str, int, int], ...]  # of files: path, size, time of the last change


class Predictor(Protocol):
    """What answers: :class:`panther_jax.prediction.CasePredictor`, or any like it."""

    @property
    def labels(self) -> Labels:
        """What its label maps hold."""
        ...

    def predict(self, image: np.ndarray, geometry: Geometry) -> Any:
        """Predict an image (channel, z, y, x); the result's ``label`` is on the same grid."""
        ...


class Watcher:
    """Answers the series that come into a folder, one after the other.

    In memory is one series at a time, and of each series seen a line about its files.
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        predictor: Predictor,
        model: ModelDescription,
        *,
        settle_seconds: float = 10.0,
        anonymous: bool = False,
    ):
        self.folder, self.output, self.predictor = folder, output, predictor
        self.settle_seconds = settle_seconds
        self.writing = dicom_tasks.Writing(predictor.labels, model, ("rtstruct",), anonymous)
        self._seen: Print = ()
        self._handled: dict[str, Print] = {}  # by the code of a series

    def look(self, now: float | None = None) -> tuple[Path, ...]:
        """Answer all series that are complete at a time (seconds since 1970); the files written."""
        files = _print(dicom_files.all_files(self.folder) if self.folder.is_dir() else ())
        if files == self._seen:
            return ()
        try:
            found = dicom_series.find_series(self.folder).series
        except DicomError:  # nothing there yet
            found = ()
        written, waiting = [], False
        for series in dicom_series.select(dicom_series.Found(found)):
            try:
                own = _print(tuple(dict.fromkeys(s.path for s in series.slices)))
            except OSError:  # moved away meanwhile
                waiting = True
                continue
            changed = max(entry[2] for entry in own) / 1e9
            if self._handled.get(series.code) == own:
                continue
            if (time.time() if now is None else now) - changed < self.settle_seconds:
                waiting = True
                continue
            self._handled[series.code] = own
            path = self._answer(series)
            written += [path] if path else []
        if not waiting:
            self._seen = files
        return tuple(written)

    def _answer(self, series: Series) -> Path | None:
        path = self.output / f"series_{series.code}.rtstruct.dcm"
        try:
            image, geometry = dicom_series.read_series(series)
            label = self.predictor.predict(image, geometry).label
            dicom_tasks.write_outputs(label, series, self.writing, {"rtstruct": path})
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            LOGGER.error("%s: not answered: %s", series.name, error)
            return None
        LOGGER.info("%s: %s", series.name, path)
        return path


def _print(files: tuple[Path, ...]) -> Print:
    found = []
    for path in files:
        stat = path.stat()
        found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def watch(watcher: Watcher, stopped: Callable[[float], bool], every_seconds: float = 2.0) -> None:
    """Look again and again; ``stopped`` waits for so many seconds and says whether to end."""
    while True:
        try:
            watcher.look()
        except OSError as error:  # the folder is on a network, say
            LOGGER.error("%s: %s; looking again", error.filename, error.strerror)
        if stopped(every_seconds):
            return


def main(argv: list[str] | None = None) -> int:
    """Run until interrupted; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where series come in")
    parser.add_argument("--output", type=Path, required=True, help="where structure sets go")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds (default: 10)")
    parser.add_argument("--anonymous", action="store_true", help="no identity of a patient")
    arguments = parser.parse_args(argv)

    def body() -> None:
        predictor = loading.load(arguments.model)
        members = predictor.ensemble.members
        model = dicom_tasks.describe_model(
            [m.model.name for m in members],
            [params_sha256(params) for m in members for params in m.model.params],
        )
        watcher = Watcher(
            arguments.folder,
            arguments.output,
            predictor,
            model,
            settle_seconds=arguments.settle,
            anonymous=arguments.anonymous,
        )
        watch(watcher, threading.Event().wait)

    return command.run(body, quiet=False, debug=False)


if __name__ == "__main__":
    sys.exit(main())
