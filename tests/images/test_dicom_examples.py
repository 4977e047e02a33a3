"""The examples: a watched folder is answered; the picture of docs/clinic.md can be drawn."""

import importlib.util
import os
import time
from pathlib import Path
from types import SimpleNamespace

import dicom_files as made
import numpy as np
import pydicom
import pytest
from dicom_files import Stack
from dicom_readers import grid, masks_of_rtstruct, require_equal

from panther_jax.images import dicom_series
from panther_jax.images.dicom_objects import ModelDescription
from panther_jax.plans.labels import Labels

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LABELS = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
MODEL = ModelDescription("stand-in", "1", "00" * 32)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class StandIn:
    """A predictor by threshold, which remembers what it was given."""

    labels = LABELS

    def __init__(self):
        self.shapes = []

    def predict(self, image, geometry):
        assert image.shape[1:] == geometry.shape_zyx
        self.shapes.append(image.shape)
        return SimpleNamespace(label=thresholds(image[0]))


def thresholds(image):
    return ((image > 200) + (image > 400).astype(np.uint8)).astype(np.uint8)


@pytest.fixture
def watched(tmp_path):
    example, predictor = load("watch_folder"), StandIn()
    watcher = example.Watcher(
        tmp_path / "in", tmp_path / "out", predictor, MODEL, settle_seconds=30.0
    )
    return example, watcher, predictor, tmp_path


def later():
    return time.time() + 60


def test_each_complete_series_is_answered_once(watched):
    _, watcher, predictor, folder = watched
    assert watcher.look(later()) == ()  # no folder yet
    first, second = Stack(made.phantom()), Stack(made.phantom((5, 6, 8)), series="1.2.3.4.7")
    made.write(folder / "in" / "a", first)
    assert watcher.look() == () and predictor.shapes == []  # files may still come
    (path,) = watcher.look(later())
    require_equal(
        masks_of_rtstruct(path, grid(folder / "in" / "a")), thresholds(first.voxels), LABELS
    )
    assert pydicom.dcmread(path).PatientID == made.NUMBER
    made.write(folder / "in" / "b", second)
    assert len(watcher.look(later())) == 1 and watcher.look(later()) == ()
    assert predictor.shapes == [(1, 7, 12, 10), (1, 5, 6, 8)]
    codes = {dicom_series.series_code(s.series) for s in (first, second)}
    assert {p.name for p in (folder / "out").iterdir()} == {
        f"series_{code}.rtstruct.dcm" for code in codes
    }


def test_a_series_that_grows_is_answered_again(watched):
    _, watcher, predictor, folder = watched
    stack = Stack(made.phantom())
    made.write(folder / "in", stack, only={0, 1, 2, 4})
    assert watcher.look(later()) == () and predictor.shapes == []  # a slice is missing
    made.write(folder / "in", stack, only={3})
    (path,) = watcher.look(later())
    made.write(folder / "in", stack, only={5, 6})
    assert watcher.look(later()) == (path,)
    assert predictor.shapes == [(1, 5, 12, 10), (1, 7, 12, 10)]
    assert len(pydicom.dcmread(path).ROIContourSequence) == 2


def test_what_cannot_be_answered_does_not_stop_the_others(watched, monkeypatch):
    example, watcher, predictor, folder = watched
    errors = []
    monkeypatch.setattr(example.LOGGER, "error", lambda text, *a: errors.append(text % a))
    made.write(folder / "in" / "tilt", Stack(made.phantom(), step=(0, 1, 2.5), series="1.2.3.4.1"))
    made.write(folder / "in" / "good", Stack(made.phantom(), series="1.2.3.4.2"))
    (folder / "in" / "notes.txt").write_text("nothing")
    assert len(watcher.look(later())) == 1
    assert len(errors) == 1 and "not stacked straight" in errors[0]
    assert not [w for w in ("ller", made.NUMBER, "1.2.3.4") if w in errors[0]]
    assert watcher.look(later()) == () and len(errors) == 1


def test_watching_ends_when_told(watched):
    example, watcher, predictor, folder = watched
    for path in made.write(folder / "in", Stack(made.phantom())):
        os.utime(path, (1.0, 1.0))
    waits = []
    example.watch(watcher, lambda seconds: waits.append(seconds) or len(waits) == 3)
    assert waits == [2.0] * 3 and len(predictor.shapes) == 1


def test_the_picture_shows_contours(watched):
    from matplotlib import image

    _, watcher, _, folder = watched
    made.write(folder / "in", Stack(made.phantom()))
    (path,) = watcher.look(later())
    out = folder / "overlay.png"
    arguments = ["--series", folder / "in", "--rtstruct", path, "--out", out]
    assert load("draw_structures").main([str(a) for a in arguments]) == 0
    pixels = image.imread(out)[..., :3]
    assert (np.ptp(pixels, axis=-1) > 0.3).sum() > 100  # colour over grey
