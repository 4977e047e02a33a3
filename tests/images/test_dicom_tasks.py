"""From a folder of DICOM files to outputs; nothing of a patient told."""

import hashlib
import logging
import sys

import dicom_files as made
import numpy as np
import pydicom
import pytest
from dicom_files import Stack
from dicom_scans import LABELS, PRIVATE, scan

from panther_jax.images import dicom_seg, dicom_series, dicom_tasks
from panther_jax.images.dicom_files import DicomError
from panther_jax.images.dicom_objects import ModelDescription
from panther_jax.images.dicom_tasks import Writing

MODEL = ModelDescription("m", "1", "00" * 32)


def test_what_is_dicom(tmp_path):
    paths = made.write(tmp_path / "in" / "deep", Stack(made.phantom((3, 4, 4))))
    assert dicom_tasks.holds_dicom(tmp_path / "in") and dicom_tasks.holds_dicom(paths[0])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("x" * 200)
    assert not dicom_tasks.holds_dicom(tmp_path / "other")
    assert not dicom_tasks.holds_dicom(tmp_path / "nothing")
    assert not dicom_tasks.holds_dicom(tmp_path / "other" / "a.txt")


def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch):
    made.write(tmp_path, Stack(made.phantom((3, 4, 4))))
    series = dicom_series.find_series(tmp_path).series[0]
    monkeypatch.setitem(sys.modules, "highdicom", None)
    label = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(ModuleNotFoundError, match=r"panther-jax\[dicom\]"):
        dicom_seg.write_seg(label, series, LABELS, MODEL, tmp_path / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ModuleNotFoundError, match=r"panther-jax\[dicom\]"):
        dicom_series.find_series(tmp_path)


def test_models_together_have_one_checksum():
    one = dicom_tasks.describe_model(["a"], ["ab" * 32])
    assert (one.name, one.weights_sha256) == ("a", "ab" * 32)
    two = dicom_tasks.describe_model(["a", "b"], ["ab" * 32, "cd" * 32])
    expected = hashlib.sha256(("ab" * 32 + "\n" + "cd" * 32).encode()).hexdigest()
    assert (two.name, two.weights_sha256) == ("a+b", expected)
    assert two.algorithm == "panther_jax a+b"


def test_nothing_of_a_patient_at_any_level(tmp_path, caplog, monkeypatch):
    """All that any library logs while series are read and written, at DEBUG."""
    monkeypatch.setattr(dicom_series.LOGGER, "propagate", True)
    caplog.set_level(logging.DEBUG)
    for path in made.write(tmp_path / "in", scan(extra={"SpacingBetweenSlices": 9.0})):
        with pydicom.config.disable_value_validation():
            dataset = pydicom.dcmread(path)
            dataset.AccessionNumber, dataset.PatientBirthDate = "ACC-12345 too long", "19500102x"
            dataset.save_as(path)
    writing = Writing(LABELS, MODEL, dicom_tasks.FORMATS)
    (task,) = dicom_tasks.find_tasks(tmp_path / "in", tmp_path / "out", writing)
    image, geometry = task.read()
    task.write((image[0] > 350).astype(np.uint8), geometry)
    assert all(path.is_file() for path in task.files) and "are slices missing?" in caplog.text
    for record in caplog.records:  # highdicom names UIDs at INFO, which nothing here shows
        if record.name.startswith("panther_jax") or record.levelno >= logging.WARNING:
            assert not [word for word in PRIVATE if word in record.getMessage()]
    for path in (tmp_path / "out").glob("*.dcm"):
        with pydicom.config.disable_value_validation():
            dataset = pydicom.dcmread(path)
            assert dataset.AccessionNumber == "ACC-12345 too long"
            assert dataset["PatientBirthDate"].value == "19500102x"


def test_what_goes_wrong_is_said_before_the_work(tmp_path, monkeypatch):
    made.write(tmp_path / "in", scan())
    # other images there: DICOM only where an option of it is given
    (tmp_path / "in" / "case_0000.nii.gz").write_bytes(b"")
    assert not dicom_tasks.holds_dicom(tmp_path / "in")
    with pytest.raises(DicomError, match="takes 2 channels"):
        writing = Writing(LABELS, MODEL)
        dicom_tasks.find_tasks(tmp_path / "in", tmp_path / "out", writing, num_channels=2)
    monkeypatch.setattr(dicom_seg, "highdicom", lambda: (_ for _ in ()).throw(ModuleNotFoundError))
    with pytest.raises(ModuleNotFoundError):
        writing = Writing(LABELS, MODEL, ("dicom-seg",))
        dicom_tasks.find_tasks(tmp_path / "in", tmp_path / "out", writing)
    with pytest.raises(DicomError, match="--output is a folder"):
        writing = Writing(LABELS, MODEL)
        dicom_tasks.find_tasks(tmp_path / "in", tmp_path / "out.nii.gz", writing)
    table = dicom_tasks.list_series(tmp_path / "in")
    assert all(word in table for word in ("T2 TSE", "1.2.3.4.5", "16 x 14 x 16", "MR"))
