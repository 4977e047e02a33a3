"""DICOM in, DICOM out, from the command line; nothing of a patient told."""

import json
import re
from pathlib import Path

import dicom_files as made
import numpy as np
import pydicom
import pytest
from dicom_readers import grid, masks_of_rtstruct, masks_of_seg, require_equal
from dicom_scans import LABELS, PRIVATE, scan
from weight_files import write_bundle

from panther_jax import predict
from panther_jax.images import dicom_series, dicom_tasks, imageio
from panther_jax.images.dicom_tasks import DicomOptions
from panther_jax.images.geometry import geometry_differences
from panther_jax.inference import loading
from panther_jax.inference.folder import predict_folder
from panther_jax.weights.bundle import params_sha256
from panther_jax.weights.models import load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle", folds=("0",))


def run(*arguments):
    return predict.main([str(a) for a in arguments])


def said_by(caplog, capsys):
    captured = capsys.readouterr()
    return captured.out + captured.err + caplog.text


def test_from_the_command_line_in_all_formats(bundle, tmp_path, capsys, caplog):
    made.write(tmp_path / "in" / "deep", scan())
    made.write(tmp_path / "in", scan(1, modality="CT", rescale=(1.0, -1000.0)), seed=3)
    made.write(tmp_path / "in" / "tilt", scan(2, step=(0.3, 0.0, 1.2)))
    arguments = ["--model", bundle, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    formats = ["--format", "rtstruct", "dicom-seg", "nifti"]
    assert run(*arguments, *formats) == 1  # for the tilted one
    text = said_by(caplog, capsys)
    assert "not stacked straight" in text and "1 case(s) could not be predicted" in text
    assert not [word for word in PRIVATE if word in text]
    record = json.loads((tmp_path / "out" / "predict.json").read_text())
    codes = [dicom_series.series_code(f"1.2.3.4.{n}") for n in (5, 6, 7)]
    assert set(record["done"]) == {f"series_{c}" for c in codes[:2]}
    assert set(record["failed"]) == {f"series_{codes[2]}"}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    endings = (".nii.gz", ".seg.dcm", ".rtstruct.dcm")
    assert {f"series_{c}{e}" for c in codes[:2] for e in endings} <= names
    for path in (tmp_path / "out").glob("*.json"):
        assert not [word for word in PRIVATE if word in path.read_text()]
    predictor = loading.load(bundle)
    for code in codes[:2]:
        (series,) = dicom_series.select(dicom_series.find_series(tmp_path / "in"), [code])
        image, geometry = dicom_series.read_series(series)
        expected = predictor.predict(image, geometry).label
        assert series.modality == "CT" or len(np.unique(expected)) > 1
        label, written = imageio.read_label(tmp_path / "out" / f"series_{code}.nii.gz")
        np.testing.assert_array_equal(label, expected)
        assert geometry_differences(written, geometry) == ()
    folder = tmp_path / "in" / "deep"
    label, _ = imageio.read_label(tmp_path / "out" / f"series_{codes[0]}.nii.gz")
    stem = tmp_path / "out" / f"series_{codes[0]}"
    require_equal(masks_of_seg(f"{stem}.seg.dcm", grid(folder)), label, LABELS)
    require_equal(masks_of_rtstruct(f"{stem}.rtstruct.dcm", grid(folder)), label, LABELS)
    dataset = pydicom.dcmread(f"{stem}.rtstruct.dcm")
    weights = params_sha256(load_model(bundle).params[0])
    assert weights in dataset.StructureSetDescription and dataset.PatientID == made.NUMBER
    # done is done; what lacks one of its files, or names the patient where it must not, is not
    (tmp_path / "out" / f"series_{codes[0]}.seg.dcm").unlink()
    for anonymous, both in ((False, False), (True, True)):
        options = DicomOptions(("1.2.3.4.5", "2"), dicom_tasks.FORMATS, anonymous=anonymous)
        again = predict_folder(predictor, tmp_path / "in", tmp_path / "out", dicom=options)
        assert set(again.done) == {f"series_{c}" for c in codes[: 1 + both]}
        assert again.skipped == [f"series_{c}" for c in codes[1 + both : 2]]
    assert b"ller" not in (tmp_path / "out" / f"series_{codes[0]}.seg.dcm").read_bytes()


def test_series_are_listed(tmp_path, capsys):
    made.write(tmp_path / "in", scan())
    assert run("--list-series", "--input", tmp_path / "in") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("T2 TSE", "1.2.3.4.5", "16 x 14 x 16", "MR"))


def test_what_goes_wrong_is_said(bundle, tmp_path, capsys, caplog):
    made.write(tmp_path / "in", scan())
    arguments = ["--model", bundle, "--input", tmp_path / "in", "--output"]
    assert run(*arguments, tmp_path / "out", "--series", "9") == 1
    assert run(*arguments, tmp_path / "out.nii.gz") == 1
    with pytest.raises(SystemExit):
        run(*arguments, tmp_path / "out", "--format", "dicom")
    with pytest.raises(SystemExit):
        run(*arguments[:4])
    text = said_by(caplog, capsys)
    assert "no series of the name given" in text and "--output is a folder" in text
    assert not [word for word in PRIVATE if word in text]


def test_the_guide_names_only_what_exists():
    text = (ROOT / "docs" / "clinic.md").read_text(encoding="utf-8")
    options = {o for a in predict._parser()._actions for o in a.option_strings} | {
        "--settle",
        "--folder",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= options
    for name in re.findall(r"(?:examples/\w+\.py|\(\w+\.png\))", text):
        folder = ROOT / ("docs" if name.endswith(")") else "")
        assert (folder / name.strip("()")).is_file(), name
