"""What is there already counts only if its record says what made it; outputs are never inputs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import weight_files as made
from tiny import LABELS, make_raw, write_scan
from weight_files import write_bundle

from panther_jax import predict
from panther_jax.base.checksums import file_sha256
from panther_jax.base.errors import DatasetError, FileError, PantherError
from panther_jax.images.cases import find_tasks
from panther_jax.images.imageio import read_image, read_label, write_image, write_label
from panther_jax.images.raw_dataset import open_raw
from panther_jax.inference import loading, records
from panther_jax.inference.folder import LOGGER, PredictError, check_places, predict_folder
from panther_jax.inference.plausibility import doubts
from panther_jax.plans.plans import IntensityProperties


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of other weights, one of other plans, and a copy of the first."""
    root = tmp_path_factory.mktemp("models")
    write_bundle(root / "first")
    write_bundle(root / "second", folds=("7", "0"))
    write_bundle(root / "plans", patch=24)
    shutil.copytree(root / "first", root / "copy")
    return root


@pytest.fixture(scope="module")
def load(models):
    """Predictors, each loaded once."""
    kept = {}

    def get(name="first", **options):
        key = (name, *sorted(options.items()))
        if key not in kept:
            paths = [models / n for n in name.split("+")]
            kept[key] = loading.load(paths, **options)
        return kept[key]

    return get


@pytest.fixture(scope="module")
def predicted(load, tmp_path_factory):
    """Two scans and what the first model made of them, in a folder and as a named file."""
    root = tmp_path_factory.mktemp("predicted")
    for seed, name in enumerate("ab"):
        write_scan(root / "in" / f"{name}_0000.nii.gz", (9, 10, 8), seed=seed)
    predict_folder(load(), root / "in", root / "out")
    predict_folder(load(), root / "in" / "a_0000.nii.gz", root / "one.nii.gz")
    return root


@pytest.fixture
def box(predicted, tmp_path):
    shutil.copytree(predicted, tmp_path / "box")
    return tmp_path / "box"


def scan(box, name="a"):
    return box / "in" / f"{name}_0000.nii.gz"


def change_scan(box, shape=(9, 10, 8)):
    write_scan(scan(box), shape, seed=9)


def change_scan_in_secret(box):
    """Another voxel, the same size and time."""
    path, status = scan(box), scan(box).stat()
    content = bytearray(path.read_bytes())
    content[4] ^= 1  # a time in the header of gzip: the voxels stay
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def by_hand(path):
    label, geometry = read_label(path)
    write_label(path, np.where(label == 1, 0, 1).astype(np.uint8), geometry)


def only_manual(box):
    for path in (box / "out").glob("*.json"):
        path.unlink()


def edit(name, action):
    def change(box):
        content = json.loads((box / name).read_text())
        action(content)
        (box / name).write_text(json.dumps(content))

    return change


def other_maker(content):
    for maker in content["makers"].values():
        maker["members"][0]["weights"] = ["0" * 64]


def unfinished(content):
    content["records"]["a.nii.gz"] = {"unfinished": True}


RECORD, OUT = "out/predict.json", {"overwrite": True}
WITH_PROBABILITIES = {"save_probabilities": True}


def same(box):
    pass


# id, what happens to the folder, model, its options, options of the call, what is expected:
# cases done, skipped, failed; or a message that ends the call.
EXISTING = [
    ("nothing changed", same, "first", {}, {}, ("", "ab", "")),
    ("a copy of the model", same, "copy", {}, {}, ("", "ab", "")),
    ("another strategy", same, "first", {"strategy": "loop"}, {}, ("", "ab", "")),
    ("another batch of tiles", same, "first", {"tile_batch": 1}, {}, ("", "ab", "")),
    ("a scan touched", lambda b: os.utime(scan(b)), "first", {}, {}, ("", "ab", "")),
    ("a scan gone", lambda b: scan(b).unlink(), "first", {}, {}, ("", "b", "")),
    ("a new scan", lambda b: write_scan(scan(b, "c"), (9, 8, 8)), "first", {}, {},
     ("c", "ab", "")),
    ("a map gone", lambda b: (b / "out/a.nii.gz").unlink(), "first", {}, {}, ("a", "b", "")),
    ("a scan changed", change_scan, "first", {}, {}, ("a", "b", "")),
    ("a scan of another shape", lambda b: change_scan(b, (7, 9, 9)), "first", {}, {},
     ("a", "b", "")),
    ("a scan changed in secret", change_scan_in_secret, "first", {}, {}, ("a", "b", "")),
    ("a map changed by hand", lambda b: by_hand(b / "out/a.nii.gz"), "first", {}, {},
     ("", "b", "a.nii.gz was changed since it was predicted")),
    ("a map changed by hand, again", lambda b: by_hand(b / "out/a.nii.gz"), "first", {}, OUT,
     ("ab", "", "")),
    ("a map changed, and its scan", lambda b: (by_hand(b / "out/a.nii.gz"), change_scan(b)),
     "first", {}, {}, ("", "b", "a.nii.gz was changed since it was predicted")),
    ("records gone", lambda b: (b / RECORD).unlink(), "first", {}, {},
     ("", "", "is there, and no record says what made it")),
    ("a record gone", edit(RECORD, lambda c: c["records"].pop("a.nii.gz")), "first", {}, {},
     ("", "b", "a.nii.gz is there, and no record")),
    ("stopped while writing", edit(RECORD, unfinished), "first", {}, {}, ("a", "b", "")),
    ("stopped before writing",
     lambda b: (edit(RECORD, unfinished)(b), (b / "out/a.nii.gz").unlink()), "first", {}, {},
     ("a", "b", "")),
    ("records of another model", edit(RECORD, other_maker), "first", {}, {}, ("ab", "", "")),
    ("records of a newer version", edit(RECORD, lambda c: c.update(version=9)), "first", {}, {},
     "records are of version 9"),
    ("records damaged", lambda b: (b / RECORD).write_text("{"), "first", {}, {}, "not valid JSON"),
    ("records damaged, again", lambda b: (b / RECORD).write_text("{"), "first", {}, OUT,
     ("ab", "", "")),
    ("records of odd values", edit(RECORD, lambda c: c.update(records=[1])), "first", {}, {},
     ("", "", "no record says")),
    ("arguments gone", lambda b: (b / "out/predict_args.json").unlink(), "first", {}, {},
     ("", "ab", "")),
    ("other weights", same, "second", {}, {}, "weights in predict_args.json differ"),
    ("other weights, again", same, "second", {}, OUT, ("ab", "", "")),
    ("other weights, arguments gone", lambda b: (b / "out/predict_args.json").unlink(), "second",
     {}, {}, ("ab", "", "")),
    ("other plans", same, "plans", {}, {}, "plans in predict_args.json differ"),
    ("other folds", same, "first", {"folds": ("1",)}, {}, "folds, weights"),
    ("one model more", same, "first+second", {}, {}, "combination, folds"),
    ("mirrored", same, "first", {"mirror": True}, {}, "mirror_axes"),
    ("another step", same, "first", {"step_size": 1.0}, {}, "step_size"),
    ("another precision", same, "first", {"dtype": "bfloat16"}, {}, "dtype"),
    ("other sums", same, "first", {"accumulate": "reference"}, {}, "accumulate"),
    ("the whole volume", same, "first", {"whole_volume": True}, {}, "whole_volume"),
    ("manual labels", only_manual, "first", {}, {}, ("", "", "no record says what made it")),
    ("manual labels, again", only_manual, "first", {}, OUT, ("ab", "", "")),
    ("one manual label", lambda b: (only_manual(b), (b / "out/b.nii.gz").unlink()), "first", {},
     {}, ("b", "", "a.nii.gz is there, and no record says what made it")),
    ("a foreign dataset.json",
     lambda b: (only_manual(b), (b / "out/dataset.json").write_text("{}")), "first", {}, {},
     "dataset.json is there, and is not of a prediction"),
    ("probabilities too", same, "first", {}, WITH_PROBABILITIES, ("ab", "", "")),
    ("foreign probabilities", lambda b: (b / "out/a.npz").write_bytes(b"x"), "first", {},
     WITH_PROBABILITIES, ("b", "", "a.npz is not of its record")),
    ("a folder in the way",
     lambda b: ((b / "out/a.nii.gz").unlink(), (b / "out/a.nii.gz").mkdir()), "first", {}, {},
     ("", "b", "a.nii.gz was changed")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "model", "options", "call", "expected"),
    [row[1:] for row in EXISTING],
    ids=[row[0] for row in EXISTING],
)
def test_what_is_there(box, load, change, model, options, call, expected):
    change(box)
    before = {p: p.read_bytes() for p in (box / "out").iterdir() if p.is_file()}
    predictor = load(model, **options)
    if isinstance(expected, str):
        with pytest.raises((PredictError, FileError), match=expected) as caught:
            predict_folder(predictor, box / "in", box / "out", **call)
        assert "--overwrite" in str(caught.value) or "correct it" in str(caught.value)
        assert {p: p.read_bytes() for p in (box / "out").iterdir() if p.is_file()} == before
        return
    report = predict_folder(predictor, box / "in", box / "out", **call)
    done, skipped, failed = expected
    assert (set(report.done), set(report.skipped)) == (set(done), set(skipped))
    for name, text in report.failed.items():
        assert failed and f"{name}." in text and failed in text and "pass --overwrite" in text
        path = box / "out" / f"{name}.nii.gz"
        assert path.is_dir() or path.read_bytes() == before[path]
    assert bool(report.failed) == bool(failed)
    for name in (*done, *skipped):  # each map is what this model makes of the scan
        image, geometry = read_image([scan(box, name)])
        label, place = read_label(box / "out" / f"{name}.nii.gz")
        assert place == geometry
        np.testing.assert_array_equal(label, predictor.predict(image, geometry).label)
    if failed and not done and not skipped:
        names = {p.name for p in (box / "out").iterdir()}
        assert names == {p.name for p in before}, "nothing says that the model made them"
    if not failed:
        again = predict_folder(predictor, box / "in", box / "out")
        assert not again.done and not again.failed


# the same of one named file
NAMED = [
    ("nothing changed", same, "first", {}, "skipped"),
    ("a scan changed", change_scan, "first", {}, "done"),
    ("other weights", same, "second", {}, "done"),
    ("changed by hand", lambda b: by_hand(b / "one.nii.gz"), "first", {}, "was changed"),
    ("changed by hand, again", lambda b: by_hand(b / "one.nii.gz"), "first", OUT, "done"),
    ("record gone", lambda b: (b / "one.nii.gz.predict.json").unlink(), "first", {}, "no record"),
    ("map gone", lambda b: (b / "one.nii.gz").unlink(), "first", {}, "done"),
]


@pytest.mark.parametrize(
    ("change", "model", "call", "expected"), [r[1:] for r in NAMED], ids=[r[0] for r in NAMED]
)
def test_one_named_file(box, load, change, model, call, expected):
    change(box)
    predictor = load(model)
    report = predict_folder(predictor, scan(box), box / "one.nii.gz", **call)
    if expected in ("done", "skipped"):
        assert list(getattr(report, expected)) == ["a"] and not report.failed
        image, geometry = read_image([scan(box)])
        label = predictor.predict(image, geometry).label
        np.testing.assert_array_equal(read_label(box / "one.nii.gz")[0], label)
    else:
        assert expected in report.failed["a"] and "--overwrite" in report.failed["a"]


def test_a_record_names_what_made_a_file(box, models):
    record = json.loads((box / RECORD).read_text())
    entry = record["records"]["a.nii.gz"]
    maker = record["makers"][entry["maker"]]
    assert entry["inputs"] == {"a_0000.nii.gz": file_sha256(scan(box))}
    assert entry["outputs"] == {"a.nii.gz": file_sha256(box / "out/a.nii.gz")}
    assert set(entry["versions"]) == {"jax", "panther_jax"}
    (member,) = maker["members"]
    assert len(member["weights"]) == 2 and maker["dtype"] == "float32"


def test_old_probabilities_do_not_stay_beside_a_new_map(box, load):
    predict_folder(load(), box / "in", box / "p", save_probabilities=True)
    predict_folder(load("second"), box / "in", box / "p", overwrite=True)
    assert not list((box / "p").glob("*.npz")) and (box / "p/a.nii.gz").is_file()


def test_a_call_that_was_stopped_goes_on(box, load, monkeypatch):
    real = records.Records.note

    def stopped(self, task, *rest):
        if task.case.id == "b":
            raise RuntimeError("stopped between map and record")
        real(self, task, *rest)

    monkeypatch.setattr(records.Records, "note", stopped)
    assert list(predict_folder(load(), box / "in", box / "new").failed) == ["b"]
    assert (box / "new/b.nii.gz").is_file()
    monkeypatch.undo()
    report = predict_folder(load(), box / "in", box / "new")
    assert (list(report.done), report.skipped, report.failed) == (["b"], ["a"], {})


# --------------------------------------------------------------------------- outputs and inputs


def link(make, target, name):
    def action(box):
        (box / name).parent.mkdir(exist_ok=True)
        make(box / target, box / name)

    return action


def soft(target, name):
    return link(lambda a, b: b.symlink_to(a), target, name)


def hard(target, name):
    return link(os.link, target, name)


FILE, ELSEWHERE = "in/scan.nii.gz", "else/x.nii.gz"
PLACES = [
    ("itself", FILE, FILE, same),
    ("its folder", FILE, "in", same),
    ("its folder, of channels", "in/a_0000.nii.gz", "in/a_0000.nii.gz", same),
    ("over dots", FILE, "in/../in/./scan.nii.gz", same),
    ("folder over dots", FILE, "out/../in", same),
    ("other capitals", FILE, "in/SCAN.nii.gz", same),
    ("capital ending", FILE, "in/scan.NII.GZ", same),
    ("a link to it", FILE, ELSEWHERE, soft(FILE, ELSEWHERE)),
    ("a hard link", FILE, ELSEWHERE, hard(FILE, ELSEWHERE)),
    ("a link as input", ELSEWHERE, FILE, soft(FILE, ELSEWHERE)),
    ("a linked folder", FILE, "else", soft("in", "else")),
    ("a folder with a link to a scan", "in", "else",
     soft("in/b_0000.nii.gz", "else/b.nii.gz")),
    ("a folder with a hard link", "in", "else",
     hard("in/b_0000.nii.gz", "else/a.nii.gz")),
    ("a folder with scans without number", "in", "in", same),
]  # fmt: skip


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize(
    ("source", "output", "change"), [r[1:] for r in PLACES], ids=[r[0] for r in PLACES]
)
def test_an_output_is_never_an_input(box, capsys, source, output, change, overwrite):
    write_scan(box / FILE, (9, 10, 8), seed=5)
    change(box)
    before = {p: p.read_bytes() for p in (box / "in").iterdir()}
    where = ["--input", str(box / source), "--output", os.path.join(box, output)]
    assert predict.main(["--model", str(box / "no model"), *where, *overwrite]) == 1
    error = capsys.readouterr().err
    assert "is the input" in error and "Choose another --output" in error
    assert "no model" not in error, "refused before a model is looked for"
    assert {p: p.read_bytes() for p in (box / "in").iterdir()} == before


def test_relative_paths_of_the_working_directory(box, monkeypatch):
    write_scan(box / FILE, (9, 10, 8))
    monkeypatch.chdir(box / "in")
    for output in (".", "scan.nii.gz", "./scan.nii.gz", "../in"):
        with pytest.raises(DatasetError, match="is the input"):
            check_places(Path("scan.nii.gz"), Path(output))


def test_predictions_in_the_folder_of_the_scans_are_no_scans(box, load):
    for _ in range(2):
        report = predict_folder(load(), box / "in", box / "in")
        assert not report.failed
    assert report.skipped == ["a", "b"]
    check_places(box / "in", box / "in")
    assert list(predict_folder(load(), box / "in", box / "in", overwrite=True).done) == ["a", "b"]
    named = box / "in" / "x.nii.gz"
    predict_folder(load(), scan(box), named)
    assert list(predict_folder(load(), box / "in", box / "elsewhere").done) == ["a", "b"]


def test_a_label_map_beside_its_scan_is_not_to_be_renamed_over_it(box):
    shutil.copy(box / "out/a.nii.gz", box / "in/a.nii.gz")
    tasks = find_tasks(box / "in", box / "new", num_channels=1, file_ending=".nii.gz")
    (text,) = [t.problem for t in tasks if t.problem]
    assert "lies beside a_0000.nii.gz" in text and "Move it" in text and "rename" not in text


# ----------------------------------------------------------------------------------------- names


def names_of(folder):
    return sorted(os.fsencode(p.name) for p in folder.iterdir() if not p.name.endswith(".json"))


def test_a_name_of_another_encoding_is_one_message(box, load, monkeypatch):
    os.rename(os.fsencode(scan(box, "b")), os.fsencode(box / "in") + b"/m\xe4rz_0000.nii.gz")
    said = []
    monkeypatch.setattr(LOGGER, "error", lambda text, *a: said.append(text % a))
    report = predict_folder(load(), box / "in", box / "new")
    assert list(report.done) == ["a"] and list(report.failed) == ["m\\xe4rz"]
    assert len(said) == 1 and "m\\xe4rz_0000.nii.gz is not UTF-8" in said[0] and "rename" in said[0]
    assert names_of(box / "new") == [b"a.nii.gz"]
    for path in (box / "in").iterdir():
        if path.name.startswith("m"):
            with pytest.raises(DatasetError, match="not UTF-8"):
                read_image([path])


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("x_0000.NII.GZ", "x.nii.gz"),
        ("x_0000.Nii.Gz", "x.nii.gz"),
        ("pat_2021.01_0000.nii.gz", "pat_2021.01.nii.gz"),
        ("1.2." + "1" * 231 + "_0000.nii.gz", "1.2." + "1" * 231 + ".nii.gz"),
        ("y" * 243 + "_0000.nii.gz", "y" * 243 + ".nii.gz"),
    ],
    ids=["capitals", "mixed", "digits and a dot", "long", "as long as it goes"],
)
def test_names_in_a_folder(box, load, name, output):
    (box / "new").mkdir()
    os.rename(scan(box), box / "new" / name)
    report = predict_folder(load(), box / "new", box / "o")
    assert not report.failed and names_of(box / "o") == [os.fsencode(output)]
    assert len(predict_folder(load(), box / "new", box / "o").skipped) == 1


@pytest.mark.parametrize("name", ["amos_0007.nii.gz", "pat_2021.nii.gz", "x.NII.GZ", "x.MHA"])
@pytest.mark.parametrize("target", ["folder", "named.nii.gz", "NAMED.NII.GZ"])
def test_names_given_alone(box, load, name, target):
    made_of = write_scan(box / ("t.mha" if name.endswith("MHA") else "t.nii.gz"), (9, 10, 8))
    os.rename(made_of, box / name)
    report = predict_folder(load(), box / name, box / target)
    assert list(report.done) == [name.split(".")[0]] and not report.failed
    assert len(predict_folder(load(), box / name, box / target).skipped) == 1


def test_a_named_output_with_no_room_for_its_record(box, load):
    output = box / ("z" * 248 + ".nii.gz")
    for state in ("done", "skipped"):
        assert list(getattr(predict_folder(load(), scan(box), output), state)) == ["a"]


def test_what_is_left_out_is_named(box, load, monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "log", lambda level, text, *a: said.append(text % a))
    write_scan(box / "in/e_0000.nii", (9, 10, 8))
    (box / "in/l_0000.nii.gz").symlink_to("/nowhere")
    report = predict_folder(load(), box / "in", box / "new")
    assert "l_0000.nii.gz is a link to a file that is not there" in report.failed["l"]
    assert any("e_0000.nii in" in text and "left out" in text for text in said)


def test_two_scans_of_one_name_are_refused(box):
    for ending in (".mha", ".nrrd"):
        write_scan(box / f"two/a_0000{ending}", (5, 6, 7))
    tasks = find_tasks(box / "two", box / "new", num_channels=1, file_ending=".nii.gz")
    assert ["of one name" in t.problem for t in tasks] == [True, True]


def test_raw_data_with_such_names(tmp_path):
    folder = make_raw(tmp_path / "Dataset901_X", num_cases=3)
    about = json.loads((folder / "dataset.json").read_text())
    for number in range(3):
        for kind, end in (("imagesTr", "_0000"), ("labelsTr", "")):
            ending = ".MHA" if number == 2 else ".mha"
            old = folder / kind / f"case_{number}{end}.mha"
            old.rename(folder / kind / f"pat_2021.0{number}{end}{ending}")
    raw = open_raw(folder)
    assert [c.id for c in raw.cases] == [f"pat_2021.0{n}" for n in range(3)]
    image = raw.cases[0].images[0]
    image.rename(folder / "amos_0007.mha")
    listed = {"images": ["amos_0007.mha"], "label": "labelsTr/pat_2021.00.mha"}
    for case_id in ("amos", "amos_0007"):
        text = json.dumps({**about, "labels": LABELS, "dataset": {case_id: listed}})
        (folder / "dataset.json").write_text(text)
        assert [c.id for c in open_raw(folder).cases] == [case_id]


# ------------------------------------------------------------------------------------ plausibility

MR = IntensityProperties(300.0, 150.0, 280.0, 0.0, 2000.0, 20.0, 900.0)
CT = IntensityProperties(80.0, 60.0, 85.0, -200.0, 600.0, -100.0, 250.0)


def plans_of(known, scheme):
    plans = made.make_plans(made.RESIDUAL)
    changed = {"intensity": (known,) if known else (), "normalization": (scheme,)}
    return made.dataclasses.replace(plans, **changed)


def voxels(*parts):
    rng = np.random.default_rng(0)
    drawn = [rng.normal(mean, std, 1000) for mean, std in parts]
    return np.concatenate(drawn).astype(np.float32).reshape(1, -1, 10, 10)


CT_IMAGE, MR_IMAGE = voxels((-1000, 5), (60, 30), (400, 99)), abs(voxels((5, 2), (300, 99)))
ZSCORE, HOUNSFIELD = "ZScoreNormalization", "CTNormalization"


@pytest.mark.parametrize(
    ("image", "known", "scheme", "text"),
    [
        (MR_IMAGE, MR, ZSCORE, ""),
        (MR_IMAGE * 8, MR, ZSCORE, ""),
        (MR_IMAGE / 8, MR, ZSCORE, ""),
        (CT_IMAGE, CT, HOUNSFIELD, ""),
        (CT_IMAGE, None, ZSCORE, ""),
        (CT_IMAGE, MR, ZSCORE, "negative, as in a CT"),
        (MR_IMAGE * 1000, MR, ZSCORE, "in training 20 to 900"),
        (MR_IMAGE / 5000, MR, ZSCORE, "in training 20 to 900"),
        (MR_IMAGE, CT, HOUNSFIELD, "not Hounsfield units"),
        (CT_IMAGE - 3000, CT, HOUNSFIELD, "in training -100 to 250"),
        (np.zeros_like(MR_IMAGE), MR, ZSCORE, "empty, all voxels are 0"),
        (np.full_like(MR_IMAGE, 7), None, ZSCORE, "empty, all voxels are 7"),
    ],
)
def test_doubts(image, known, scheme, text):
    found = doubts(image, plans_of(known, scheme))
    assert [text in line for line in found] == ([True] if text else [])


def test_an_empty_image_is_warned_of_and_recorded(box, load, monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *a: said.append(text % a))
    image, geometry = read_image([scan(box)])
    write_image(scan(box), np.zeros_like(image[0]), geometry)
    report = predict_folder(load(), box / "in", box / "new")
    assert "empty" in said[0] and "case a" in said[0] and list(report.done) == ["a", "b"]
    record = json.loads((box / "new/predict.json").read_text())
    assert record["warned"]["a"] == record["records"]["a.nii.gz"]["doubts"] == report.warned["a"]


def test_labels_almost_whole_are_shown_as_they_are(tmp_path):
    import SimpleITK as sitk

    sitk.WriteImage(sitk.GetImageFromArray(np.full((3, 4, 5), 0.9999999)), tmp_path / "l.mha")
    with pytest.raises(PantherError, match="0.9999999"):
        read_label(tmp_path / "l.mha")
