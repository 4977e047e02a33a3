"""The challenge contract: one image in, one tumour mask out; regions, filters, time, container."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import weight_files as made

from panther_jax import predict_challenge
from panther_jax.inference.loading import load, predict
from panther_jax.panther import container
from panther_jax.panther.container import ChallengeError, Recipe, segment, tumor_mask
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels
from panther_jax.predict_challenge import main
from panther_jax.weights.bundle import save_bundle

SLUGS = {"t1": "abdominal-t1-mri", "t2": "abdominal-t2-mri"}
OUTPUT = Path("images/pancreatic-tumor-segmentation")
# Axes swapped and one turned round: a slip in x and z shows.
DIRECTION = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0, -1.0, 0.0, 0.0)
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def write_case(folder, task="t1", name="case_17", seed=0):
    """A scan as Grand Challenge mounts it; geometry with many digits."""
    values = np.random.default_rng(seed).normal(100, 30, (18, 20, 22)).astype(np.float32)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((0.9 + 1 / 3, 1.1, 1.4))
    image.SetOrigin((-12.3456789012345, 1 / 7, 1e3 / 3))
    image.SetDirection(DIRECTION)
    path = folder / "images" / SLUGS[task] / f"{name}.mha"
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "model"
    save_bundle(
        folder,
        params={str(fold): made.random_params(made.RESIDUAL, fold + 10) for fold in range(2)},
        plans=made.make_plans(made.RESIDUAL).to_nnunet(),
        dataset=made.DATASET,
        provenance={},
    )
    return folder


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out.strip(), captured.err


# ------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("task", ["t1", "t2"])
def test_one_image_in_one_mask_out(task, bundle, tmp_path, capsys):
    source = write_case(tmp_path / "in", task)
    (source.parent / ".hidden.mha").write_text("left by a file system")
    status, out, err = run(
        capsys, "--task", task, "--model", bundle, "--input", tmp_path / "in",
        "--output", tmp_path / "out",
    )  # fmt: skip
    path = tmp_path / "out" / OUTPUT / source.name
    assert status == 0 and out == str(path) and "wall time" in err
    assert [p.name for p in path.parent.iterdir()] == [source.name]
    image, mask = sitk.ReadImage(str(source)), sitk.ReadImage(str(path))
    assert mask.GetPixelID() == sitk.sitkUInt8
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(mask, get)() == getattr(image, get)()
    assert b"CompressedData = False" in path.read_bytes()[:600]
    found = sitk.GetArrayFromImage(mask)
    label = predict(bundle, source).label
    assert set(np.unique(label)) == {0, 1, 2}  # so that the pancreas could have been kept
    np.testing.assert_array_equal(found, label == 1)


def test_checkpoint_of_the_task_and_settings_reach_the_predictor(tmp_path, monkeypatch, capsys):
    asked = []

    def refuse(model, **options):
        asked.append((model, options))
        raise ValueError("enough")

    monkeypatch.setattr(predict_challenge, "load", refuse)
    for task in ("t1", "t2"):
        write_case(tmp_path, task)
        assert run(capsys, "--task", task, "--model", "m", "--input", tmp_path,
                   "--output", tmp_path / "out")[0] == 1  # fmt: skip
    expected = {"folds": (), "mirror": False, "step_size": 0.5}
    assert asked == [
        ([Path("m")], {"checkpoint": "final", **expected}),
        ([Path("m")], {"checkpoint": "best", **expected}),
    ]
    run(capsys, "--task", "t2", "--model", "m", "--input", tmp_path, "--output", tmp_path / "out",
        "--folds", "0", "2", "--step_size", "0.7", "--checkpoint", "final", "--mirror")  # fmt: skip
    assert asked[-1][1] == {
        "folds": ["0", "2"],
        "checkpoint": "final",
        "mirror": True,
        "step_size": 0.7,
    }


def test_wrong_input_is_one_message(bundle, tmp_path, capsys):
    options = ["--model", bundle, "--input", tmp_path, "--output", tmp_path / "out"]
    status, _, err = run(capsys, "--task", "t1", *options)
    assert status == 1 and "there is: nothing" in err
    write_case(tmp_path, "t2", "lonely")
    status, _, err = run(capsys, "--task", "t1", *options)
    assert status == 1 and "abdominal-t2-mri/lonely.mha" in err and "the other --task" in err
    for name in ("b", "a"):
        write_case(tmp_path, "t1", name)
    status, _, err = run(capsys, "--task", "t1", *options)
    assert status == 1 and "2 images, expected one: a.mha, b.mha" in err
    (tmp_path / "out").write_text("a file")
    status, _, err = run(capsys, "--task", "t2", *options)
    assert status == 1 and "cannot be written" in err
    (tmp_path / "out").unlink()
    (tmp_path / "out" / OUTPUT).mkdir(parents=True)
    (tmp_path / "out" / OUTPUT / "lonely.mha").write_text("precious")
    status, _, err = run(capsys, "--task", "t2", *options)
    assert status == 1 and "--overwrite" in err
    assert (tmp_path / "out" / OUTPUT / "lonely.mha").read_text() == "precious"
    status, _, err = run(
        capsys, "--task", "t2", "--model", tmp_path / "none", *options[2:], "--overwrite"
    )
    assert status == 1 and "none" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--model", "m"],
        ["--task", "t3", "--model", "m"],
        ["--task", "t1"],
        ["--task", "t1", "--model", "m", "--ensemble", "e.json"],
        ["--task", "t1", "--ensemble", "e.json", "--folds", "0"],
        ["--task", "t1", "--ensemble", "e.json", "--mirror"],
        ["--task", "t1", "--model", "m", "--step-size", "0"],
        ["--task", "t1", "--model", "m", "--time-limit", "-1"],
        ["--task", "t1", "--model", "m", "--component-filter"],
        ["--task", "t1", "--model", "m", "--roi-margin", "-1"],
    ],
)
def test_wrong_usage(wrong):
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2


def test_tumour_goes_by_name():
    label = np.array([[[0, 1, 2, 3]]])
    three = Labels((("background", 0), ("pancreas", 1), ("duct", 2), ("Tumor", 3)))
    np.testing.assert_array_equal(tumor_mask(label, three), label == 3)
    regions = Labels((("background", 0), ("all", (1, 2)), ("tumour", (1,))), (2, 1))
    np.testing.assert_array_equal(tumor_mask(label, regions), label == 1)
    without = Labels((("background", 0), ("pancreas", 1)))
    with pytest.raises(ChallengeError, match="no label named 'tumor'"):
        tumor_mask(label, without)


# ----------------------------------------------------------------------- region, filters, time

BOTH = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
SHAPE = (10, 12, 14)
GEOMETRY = Geometry(SHAPE, (3.0, 1.0, 2.0), (1.0, 2.0, 3.0), IDENTITY)


def stand_in(label_of, labels=BOTH, num_folds=1):
    """A predictor that answers with ``label_of(image)``; the image holds what is to be found."""
    model = SimpleNamespace(folds=tuple(range(num_folds)))
    members = [SimpleNamespace(model=model)]
    return SimpleNamespace(
        label_of=label_of, labels=labels, ensemble=SimpleNamespace(members=members), seen=[]
    )


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    def answer(model, image, geometry=None, **options):
        if not isinstance(model, SimpleNamespace):
            return predict(model, image, geometry, **options)
        model.seen.append(image.shape[1:])
        return SimpleNamespace(label=model.label_of(image[0]))

    monkeypatch.setattr(container, "predict", answer)


def scan():
    """Pancreas 2, tumour 1 in it, another island of tumour far away."""
    image = np.zeros((1, *SHAPE), np.float32)
    image[0, 4:7, 4:8, 5:9] = 2
    image[0, 5:7, 5:8, 6:9] = 1
    image[0, 9, 0:3, 9:13] = 1
    return image


def as_it_is(image):
    return image.astype(np.int16)


def only_pancreas(image):
    """The region's model knows pancreas and the tumour in it, not the island."""
    label = image.astype(np.int16)
    if label.shape[0] == SHAPE[0]:
        label[9] = 0
    return label


def test_the_region_of_interest_is_predicted_and_put_back():
    model, finder = stand_in(as_it_is), stand_in(only_pancreas)
    mask = segment(Recipe(model, finder, roi_margin_mm=4.0), scan(), GEOMETRY)
    # 4 mm are 1, 4, 2 voxels; the high side is one voxel shorter (spec 05 §13.3)
    assert finder.seen == [SHAPE] and model.seen == [(4, 11, 7)]
    expected = scan()[0] == 1
    expected[9] = False
    np.testing.assert_array_equal(mask, expected)


def test_without_a_pancreas_the_whole_image_is_predicted_and_kept(caplog):
    model, finder = stand_in(as_it_is), stand_in(lambda image: np.zeros(image.shape, np.int16))
    mask = segment(Recipe(model, finder, filter_model=finder), scan(), GEOMETRY)
    assert model.seen == [SHAPE] and len(finder.seen) == 1  # asked once for both
    np.testing.assert_array_equal(mask, scan()[0] == 1)


def test_the_filter_removes_what_is_outside_the_pancreas():
    recipe = Recipe(stand_in(as_it_is), filter_model=stand_in(only_pancreas))
    mask = segment(recipe, scan(), GEOMETRY)
    assert recipe.model.seen == [SHAPE] and not mask[9].any()
    np.testing.assert_array_equal(mask[:9], scan()[0, :9] == 1)
    blind = stand_in(as_it_is, Labels((("background", 0), ("tumor", 1))))
    with pytest.raises(ChallengeError, match="no label named 'pancreas'"):
        segment(Recipe(stand_in(as_it_is), filter_model=blind), scan(), GEOMETRY)


def test_the_largest_component():
    mask = segment(Recipe(stand_in(as_it_is), largest_component=True), scan(), GEOMETRY)
    assert not mask[9].any() and mask.any()


@pytest.mark.parametrize(
    ("limit", "num_folds", "expected"),
    [
        (1000.0, 5, [5]),
        (60.0, 5, [5, 2]),  # 100 s for all; 3 s are gone, 0.9 * 57 s are good for 2 of 5
        (1.0, 5, [5, 1]),
        (1.0, 1, [1]),
    ],
)
def test_fewer_folds_where_time_is_short(limit, num_folds, expected, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(container.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        container, "_with_folds", lambda _, count: stand_in(as_it_is, num_folds=count)
    )
    asked = []

    def answer(model, image, geometry, progress=None):
        folds = len(model.ensemble.members[0].model.folds)
        asked.append(folds)
        for done in range(1, 20 * folds + 1):  # a second for each of 20 tiles and fold
            if progress is not None:
                progress(done, 20 * folds)
            clock[0] += 1.0
        return SimpleNamespace(label=as_it_is(image[0]))

    monkeypatch.setattr(container, "predict", answer)
    model = stand_in(as_it_is, num_folds=num_folds)
    mask = segment(Recipe(model), scan(), GEOMETRY, deadline=limit)
    assert asked == expected
    np.testing.assert_array_equal(mask, scan()[0] == 1)


def test_fewer_folds_are_the_first_ones(bundle):
    image = np.random.default_rng(4).normal(size=(1, 16, 16, 16)).astype(np.float32)
    fewer = container._with_folds(load(bundle), 1)
    expected = predict(bundle, image, (1.0, 1.0, 1.0), folds=("0",)).label
    np.testing.assert_array_equal(predict(fewer, image, (1.0, 1.0, 1.0)).label, expected)
    both = predict(bundle, image, (1.0, 1.0, 1.0)).label
    assert (both != expected).any()


# ----------------------------------------------------------------------------------- container

ROOT = Path(container.__file__).resolve().parents[2]
CONTAINER = ROOT / "docs" / "container"


def test_the_image_has_its_files_and_no_root():
    text = (CONTAINER / "Dockerfile").read_text()
    steps = [line for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    allowed = (CONTAINER / "Dockerfile.dockerignore").read_text().split()
    for line in steps:
        if line.startswith("COPY") and "--from" not in line:
            *sources, _ = [w for w in line.split()[1:] if not w.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in allowed, source
    names = [line.split()[0] for line in steps]
    assert steps[names.index("USER")] == "USER user"
    assert names.index("USER") < names.index("ENTRYPOINT") == len(names) - 1
    # nothing is fetched when it runs: pip only before the last stage
    last = text.rindex("\nFROM ")
    assert "pip" in text[:last] and "pip" not in text[last:]


def fake_command(folder, name):
    """A program that prints its name and arguments, one a line."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
    path.chmod(0o755)


@pytest.mark.parametrize("ensemble", [False, True])
def test_the_entry_point_calls_the_command(ensemble, tmp_path):
    fake_command(tmp_path, "python")
    model = tmp_path / "a model"
    model.mkdir()
    if ensemble:
        (model / "ensemble.json").write_text("{}")
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "PANTHER_TASK": "t1",
        "PANTHER_OPTIONS": "--largest-component --time-limit 60",
        "PANTHER_MODEL": str(model),
    }
    done = subprocess.run(
        ["/bin/sh", str(CONTAINER / "entrypoint.sh"), "--overwrite"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    program, *words = done.stdout.splitlines()
    assert program == "python" and words[:2] == ["-m", "panther_jax.predict_challenge"]
    arguments = predict_challenge._parser().parse_args(words[2:])
    assert arguments.task == "t1" and arguments.largest_component and arguments.overwrite
    assert arguments.time_limit == 60
    assert (arguments.ensemble, arguments.model) == (
        (model / "ensemble.json", None) if ensemble else (None, [model])
    )


def pack(*arguments, path="/usr/bin:/bin"):
    return subprocess.run(
        ["/bin/sh", str(CONTAINER / "pack.sh"), *map(str, arguments)],
        env={"PATH": path}, capture_output=True, text=True,
    )  # fmt: skip


def test_packing_prints_its_commands(tmp_path):
    model, output = tmp_path / "model's", tmp_path / "new" / "out"
    model.mkdir()
    done = pack("--task", "t1", "--model", model, "--output", output, "--cpu", "--dry-run",
                "--options", "--largest-component")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not output.exists()
    assert [line.split()[:2] for line in done.stdout.splitlines()[:4]] == [
        ["docker", "build"],
        ["docker", "save"],
        ["gzip", "--force"],
        ["tar", "--create"],
    ]
    assert "--build-arg TASK=t1 --build-arg JAX='jax==" in done.stdout
    assert "--network none" in done.stdout and "--gpus" not in done.stdout
    assert "CASE/images/abdominal-t1-mri/" in done.stdout
    gpu = pack("--task", "t2", "--model", model, "--output", output, "--cuda", "13", "--dry-run")
    assert "JAX='jax[cuda13]==" in gpu.stdout and "--gpus all" in gpu.stdout


def test_packing_runs_its_commands_and_stops_at_the_first_failure(tmp_path):
    model, output = tmp_path / "model's", tmp_path / "out"
    model.mkdir()
    (model / "plans.json").write_text("{}")
    fake_command(tmp_path, "docker")
    fake_command(tmp_path, "gzip")
    path = f"{tmp_path}:/usr/bin:/bin"
    done = pack("--task", "t2", "--model", model, "--output", output, path=path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert ["docker", "build", "--platform"] == printed[1:4]
    assert f"{output}/panther-jax-t2.tar" in printed
    assert (output / "model.tar.gz").is_file()
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 3\n")
    done = pack("--task", "t2", "--model", model, "--output", output, path=path)
    assert done.returncode != 0 and "docker save" not in done.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--task", "t3", "--model", "."], "must be t1 or t2"),
        (["--task", "t1"], "is not a folder"),
        (["--task", "t1", "--model"], "needs a value"),
        (["--gpu"], "unknown option --gpu"),
    ],
)
def test_packing_refuses_wrong_usage(wrong, message):
    done = pack(*wrong)
    assert done.returncode == 2 and message in done.stderr
