"""Phantoms are reproducible and not solved by a threshold; checks find what is broken."""

import json

import numpy as np
import pytest
from tiny import make_raw

from panther_jax import datasets
from panther_jax.base.errors import DatasetError
from panther_jax.images import imageio, phantom, phantom_dataset, raw_dataset
from panther_jax.images.geometry import geometry_differences


@pytest.fixture(scope="module")
def t2_cases():
    return [phantom.make_phantom_case(i, modality="t2") for i in range(4)]


def test_phantoms_hold_a_pancreas_with_a_tumour(t2_cases):
    for case in t2_cases:
        assert case.label.shape == case.image.shape[1:] == case.geometry.shape_zyx
        assert set(np.unique(case.label)) == {0, 1, 2}
        voxel_ml = np.prod(case.geometry.spacing_zyx) / 1000
        tumor, pancreas = (np.count_nonzero(case.label == c) * voxel_ml for c in (1, 2))
        assert 1 < tumor < 60 and 25 < pancreas < 130  # millilitres
        assert 0.2 < np.mean(case.image > 30) < 0.9  # a body, and air around it


def test_the_same_seed_gives_the_same_case_and_another_a_different_one():
    first, again = (phantom.make_phantom_case(1, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    for other in (phantom.make_phantom_case(2, seed=5), phantom.make_phantom_case(1, seed=6)):
        same_shape = other.label.shape == first.label.shape
        assert not same_shape or (other.label != first.label).any()


def centre_and_volume(case, label):
    """Centre in mm (x, y, z) and volume in ml of a label, in physical space."""
    spacing = np.array(case.geometry.spacing_zyx)
    index = np.argwhere(case.label == label)
    centre = (index.mean(0) * spacing)[::-1] + case.geometry.origin_xyz
    return centre, len(index) * spacing.prod() / 1000


def test_anatomy_is_the_same_in_every_modality():
    cases = {m: phantom.make_phantom_case(3, modality=m, seed=2) for m in phantom.MODALITIES}
    for label in (1, 2):
        centre, volume = centre_and_volume(cases["t2"], label)
        for other in ("t1", "ct"):
            found, millilitres = centre_and_volume(cases[other], label)
            # Grids of 2.6 to 4 mm sample the same shapes: within a voxel, and 10 % of volume.
            np.testing.assert_allclose(found, centre, atol=2.0)
            assert millilitres == pytest.approx(volume, rel=0.1)

    # ... while the contrast is not: a tumour is bright in T2, dark in T1 and CT.
    def contrast(case):
        return case.image[0][case.label == 1].mean() - case.image[0][case.label == 2].mean()

    assert contrast(cases["t2"]) > 0 > max(contrast(cases["t1"]), contrast(cases["ct"]))


def test_no_threshold_finds_the_tumour_or_the_pancreas(t2_cases):
    """Dice of every interval of intensity, its limits at any two of 60 percentiles."""
    for label in (1, 2):
        scores = []
        for case in t2_cases:
            image = case.image[0].ravel()
            limits = np.percentile(image, np.linspace(0, 100, 61)[1:-1])
            bins = np.searchsorted(limits, image)
            inside = case.label.ravel() == label
            every = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=60))])
            found = np.concatenate([[0], np.cumsum(np.bincount(bins[inside], minlength=60))])
            overlap = found[None, :] - found[:, None]
            scores.append(2 * overlap / (every[None, :] - every[:, None] + inside.sum()))
        best = float(np.mean(scores, axis=0)[np.triu_indices(61, 1)].max())
        assert best < 0.35, f"a threshold reaches a Dice of {best:.2f} for label {label}"


def test_tumour_and_pancreas_differ_enough_to_be_told_apart(t2_cases):
    for case in t2_cases:
        image = case.image[0]
        tumor, pancreas = image[case.label == 1], image[case.label == 2]
        spread = np.hypot(tumor.std(), pancreas.std())
        assert abs(tumor.mean() - pancreas.mean()) > 0.5 * spread


def test_organs_are_labelled_where_the_anatomy_is_the_same():
    plain = phantom.make_phantom_case(1, modality="ct", seed=4)
    organs = phantom.make_phantom_case(1, modality="ct", seed=4, organs=True)
    np.testing.assert_array_equal(plain.image, organs.image)
    assert set(np.unique(organs.label)) == set(phantom.ORGAN_LABELS.values())
    pancreas = phantom.ORGAN_LABELS["pancreas"]
    np.testing.assert_array_equal(organs.label == pancreas, plain.label > 0)


def test_phantoms_are_written_whole(tmp_path, monkeypatch):
    done = []
    out = tmp_path / "Dataset902_Phantom"
    phantom_dataset.make_phantom(out, num_cases=2, progress=lambda *given: done.append(given))
    assert done == [("phantom_000", 1, 2), ("phantom_001", 2, 2)]
    raw = raw_dataset.open_raw(out)
    case = raw_dataset.read_case(raw.cases[1], raw.labels)
    np.testing.assert_array_equal(case.image, phantom.make_phantom_case(1).image)
    np.testing.assert_array_equal(case.label, phantom.make_phantom_case(1).label)
    with pytest.raises(DatasetError, match="exists; pass --overwrite"):
        phantom_dataset.make_phantom(out)
    monkeypatch.setattr(phantom, "make_phantom_case", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phantom_dataset.make_phantom(out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert len(raw_dataset.open_raw(out).cases) == 2  # the old dataset is still there


def test_images_are_drawn_around_given_labels(tmp_path):
    reference = phantom.make_phantom_case(0, modality="ct")
    codes = np.zeros_like(reference.label)
    codes[reference.label == 2], codes[reference.label == 1] = 4, 1
    maps = tmp_path / "maps"
    imageio.write_label(maps / "patient_7.nii.gz", codes, reference.geometry)
    out = tmp_path / "Dataset902_Around"
    phantom_dataset.make_phantom(out, modality="t2", num_cases=5, label_folder=maps)
    raw = raw_dataset.open_raw(out)
    assert [c.id for c in raw.cases] == ["patient_7"]
    case = raw_dataset.read_case(raw.cases[0], raw.labels)
    np.testing.assert_array_equal(case.label, reference.label)
    assert geometry_differences(case.geometry, reference.geometry) == ()
    image = case.image[0]
    assert image[case.label == 1].mean() > 1.1 * image[case.label == 2].mean()  # T2: tumour bright
    with pytest.raises(DatasetError, match="no label maps"):
        phantom_dataset.make_phantom(tmp_path / "x", label_folder=tmp_path / "Dataset902_Around")


# --------------------------------------------------------------------------------------- check


def run(*arguments):
    try:
        return datasets.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def test_a_sound_dataset_passes_with_its_table(tmp_path, capsys):
    folder = make_raw(tmp_path / "Dataset001_Toy", num_cases=3)
    assert run("check", folder) == 0
    out = capsys.readouterr().out
    assert "tumor       3/3" in out and "0 of 3 cases are broken" in out


def test_every_broken_case_is_listed(tmp_path, capsys):
    folder = make_raw(tmp_path / "Dataset001_Toy", num_cases=6)
    image = folder / "imagesTr" / "case_1_0000.mha"
    image.write_bytes(image.read_bytes()[:-50])
    (folder / "labelsTr" / "case_2.mha").unlink()
    label, geometry = imageio.read_label(folder / "labelsTr" / "case_3.mha")
    imageio.write_label(folder / "labelsTr" / "case_3.mha", label * 3, geometry)
    imageio.write_label(folder / "labelsTr" / "case_4.mha", label * 0, geometry)
    flat = np.full(label.shape, 7, np.float32)
    imageio.write_image(folder / "imagesTr" / "case_5_0000.mha", flat, geometry)
    report_path = tmp_path / "report.json"
    assert run("check", folder, "--output", report_path) == 1
    err = capsys.readouterr().err
    assert "4 of 6 cases are broken" in err and "without foreground: case_4" in err
    report = json.loads(report_path.read_text())
    assert report["broken_cases"] == ["case_1", "case_2", "case_3", "case_5"]
    problems = {c["id"]: " ".join(c["problems"]) for c in report["cases"]}
    assert "missing label" in problems["case_2"] and "not declared" in problems["case_3"]
    assert "constant (7)" in problems["case_5"] and not problems["case_0"]


def test_wrong_usage_and_missing_folders(tmp_path, capsys):
    assert run("phantom", "--out", tmp_path / "x", "--modality", "pet") == 2
    assert run("phantom", "--out", tmp_path / "x", "--cases", "0") == 2
    assert run("check", tmp_path / "nowhere") == 1
    assert "is not a folder" in capsys.readouterr().err
    assert run("phantom", "--out", tmp_path / "Dataset1", "--cases", 1, "--modality", "t1") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "Dataset1")
    assert run("phantom", "--out", tmp_path / "Dataset1") == 1
