"""nnU-Net's own commands, run as they are, on what we export."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import weight_files as made
from tiny import make_raw

torch = pytest.importorskip("torch")
pytest.importorskip("nnunetv2")
from panther_jax import planning  # noqa: E402
from panther_jax.config import demo, load_config  # noqa: E402
from panther_jax.images import raw_dataset
from panther_jax.planner import from_config
from panther_jax.planner.fingerprint import extract_fingerprint
from panther_jax.plans.architecture import ArchSpec  # noqa: E402
from panther_jax.plans.plans import Plans  # noqa: E402
from weight_conversion import export_nnunet, import_nnunet, torch_files, verify  # noqa: E402
from weight_conversion.companions import ExportError  # noqa: E402
from weight_conversion.export_nnunet import Beside  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # nnU-Net's own warnings
ROOT = Path(__file__).resolve().parents[2]
NAME, PLANS = "Dataset902_Tiny", "nnUNetResEncUNetLPlans"
INTENSITY = "foreground_intensity_properties_per_channel"


@dataclasses.dataclass(frozen=True)
class World:
    """nnU-Net's three folders, and ours."""

    root: Path

    @property
    def raw(self):
        return self.root / "raw" / NAME

    @property
    def results(self):
        return self.root / "results" / NAME

    @property
    def environment(self):
        return {
            **{f"nnUNet_{n}": str(self.root / n) for n in ("raw", "preprocessed", "results")},
            "nnUNet_compile": "f",
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def command(self, name, *arguments):
        """The command line of one of nnU-Net's commands, and its environment."""
        script = Path(sys.executable).with_name(name)
        return [str(script), *map(str, arguments)], {**os.environ, **self.environment}

    def call(self, name, *arguments):
        line, environment = self.command(name, *arguments)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-300:]
        return done.stdout

    def predicted(self, name, out, *arguments):
        """The label maps that one of nnU-Net's commands predicts of the raw images, by case."""
        limits = ("-device", "cpu", "-npp", 1, "-nps", 1, "--disable_progress_bar")
        self.call(name, "-i", self.raw / "imagesTr", "-o", out, "-f", 0, *limits, *arguments)
        return label_maps(out)


def label_maps(folder):
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in folder.glob("*.mha")}


def ours(world, model, out):
    """The label maps that we predict of the raw images, as nnU-Net adds up and mirrors."""
    run_python("panther_jax.predict", "--model", model, "--input", world.raw / "imagesTr",
               "--output", out, "--mirror", "--accumulate", "reference", "--quiet")  # fmt: skip
    return label_maps(out)


def run_python(module, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def same(a, b):
    assert a.keys() == b.keys() and len(a) > 1
    assert all(len(np.unique(labels)) > 1 for labels in a.values()), "empty maps show nothing"
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny data set, a run trained from a config, and its export with all that goes along."""
    world = World(tmp_path_factory.mktemp("world"))
    make_raw(world.raw, num_cases=5)
    run_python("panther_jax.train", "--config", "smoke.py", "--raw", world.raw, "--root",
               world.root, "--fold", 0, "--validation.save-probabilities", "--quiet",
               "--loop.steps-per-epoch", 2, "--loop.no-compilation-cache")  # fmt: skip
    export(world, world.root / "runs" / "smoke", PLANS)
    return world


def export(world, run, plans_name, **beside):
    out = world.results / f"nnUNetTrainer__{plans_name}__smoke"
    where = world.root / "preprocessed"
    settings = Beside(preprocessed=where, fingerprint=True, workers=0, **beside)
    export_nnunet.export(run, out, beside=settings)
    return out


# ------------------------------------------------------------------------------------- prediction


@pytest.mark.slow
def test_their_prediction_commands_make_our_label_maps(world, tmp_path):
    run, exported = world.root / "runs" / "smoke", world.results / f"nnUNetTrainer__{PLANS}__smoke"
    theirs = world.predicted(
        "nnUNetv2_predict_from_modelfolder", tmp_path / "folder", "-m", exported
    )
    assert same(theirs, ours(world, run, tmp_path / "ours"))
    what = ("-d", 902, "-c", "smoke", "-p", PLANS, "-chk", "checkpoint_best.pth")
    best = world.predicted("nnUNetv2_predict", tmp_path / "name", *what)
    assert same(best, theirs), "two epochs: the last is the best"


@pytest.mark.slow
def test_what_is_written_beside_the_weights_is_complete(world):
    exported = world.results / f"nnUNetTrainer__{PLANS}__smoke"
    plans = json.loads((exported / "plans.json").read_text())
    fingerprint = json.loads((exported / "dataset_fingerprint.json").read_text())
    assert plans[INTENSITY] == fingerprint[INTENSITY] and set(plans[INTENSITY]) == {"0"}
    measured = extract_fingerprint(raw_dataset.open_raw(world.raw))
    assert measured[INTENSITY] == fingerprint[INTENSITY]
    assert plans["original_median_shape_after_transp"] == [12, 24, 24]
    assert plans["configurations"]["smoke"]["median_image_size_in_voxels"] == [12.0, 24.0, 24.0]
    assert plans["image_reader_writer"] == "SimpleITKIO"
    checkpoint = torch_files.read_checkpoint(exported / "fold_0" / "checkpoint_final.pth")
    assert checkpoint.init_arg("plans") == plans
    validation = exported / "fold_0" / "validation"
    (entry,) = json.loads((validation / "summary.json").read_text())["metric_per_case"]
    assert Path(entry["prediction_file"]) == validation / "case_0.mha"
    names = sorted(p.name for p in validation.iterdir())
    assert names == ["case_0.mha", "case_0.npz", "case_0.pkl", "summary.json"]


@pytest.mark.slow
def test_their_search_for_the_best_configuration_takes_two_runs(world, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(world.root / "runs" / "smoke", other)
    plans = json.loads((other / "plans.json").read_text())
    (other / "plans.json").write_text(json.dumps({**plans, "plans_name": "OtherPlans"}))
    export(world, other, "OtherPlans")
    what = ("-p", PLANS, "OtherPlans", "-c", "smoke", "-f", 0, "-np", 1)
    printed = world.call("nnUNetv2_find_best_configuration", 902, *what)
    assert "Run inference like this" in printed
    found = json.loads((world.results / "inference_information.json").read_text())
    names = " ".join(found["all_results"])
    assert len(found["all_results"]) == 3 and "ensemble" in names, "each run, and both together"
    scored = json.loads(
        (world.root / "runs" / "smoke" / "fold_0" / "validation_final" / "summary.json").read_text()
    )
    best = max(found["all_results"].values())
    assert best == pytest.approx(scored["foreground_mean"]["Dice"], abs=1e-6)


# --------------------------------------------------------------------------------------- training


# ------------------------------------------------------------------------- runs of every kind


def tiny_config(name):
    """A config with its normalisation and resampling; network and grid are of toy size."""
    config, _ = load_config(str(ROOT / "configs" / f"{name.removesuffix('_demo')}.py"))
    config = demo(config) if name.endswith("_demo") else config
    small, _ = load_config(str(ROOT / "configs" / "smoke.py"))
    sizes = {name: getattr(small.data, name) for name in ("patch_size", "spacing_mm")}
    data = dataclasses.replace(config.data, **sizes)
    return dataclasses.replace(config, arch=small.arch, data=data)


REGIONS = {
    "labels": {"background": 0, "whole": [1, 2], "tumor": 1},
    "regions_class_order": [2, 1],
}
CHANNELS = {"channel_names": {"0": "MRI", "1": "CT"}}


def raw_of(folder, changes):
    """A raw data set of three cases with other entries in its dataset.json."""
    make_raw(folder, num_cases=3)
    path = folder / "dataset.json"
    dataset = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(dataset))
    for number in range(1, len(dataset["channel_names"])):
        for first in (folder / "imagesTr").glob("*_0000.mha"):
            image = sitk.ReadImage(str(first)) * 2 - 100
            sitk.WriteImage(image, str(first).replace("_0000", f"_{number:04d}"))
    return raw_dataset.open_raw(folder)


def plans_of(kind, raw):
    """Plans as a config makes them, which hold no intensities; or as nnU-Net's planner does."""
    if kind not in ("planner_2d", "planner_3d"):
        config = tiny_config(kind)
        fingerprint = None
        if from_config.needs_fingerprint(config, raw.dataset):
            fingerprint = extract_fingerprint(raw)
        return from_config.plans_from_config(config, raw.dataset, fingerprint)
    fingerprint = extract_fingerprint(raw)
    options = planning.PlanOptions(planner_name="default")
    made_plans = planning.plan_dataset(raw, fingerprint, options)
    configuration = {"planner_2d": "2d", "planner_3d": "3d_fullres"}[kind]
    plans = Plans.from_nnunet(made_plans, raw.dataset, configuration)
    features = tuple(min(f, 8) for f in plans.arch.features)
    return dataclasses.replace(plans, arch=dataclasses.replace(plans.arch, features=features))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("smoke", {}),
        ("mri_t2", {}),
        ("mri_t2_demo", {}),
        ("smoke", REGIONS),
        ("smoke", CHANNELS),
        ("planner_2d", {}),
        ("planner_3d", REGIONS),
    ],
    ids=["smoke", "mri_t2", "demo", "regions", "channels", "2d", "plans"],
)
def test_runs_of_every_kind_predict_the_same_after_export(kind, changes, tmp_path):
    raw = raw_of(tmp_path / "raw" / NAME, changes)
    plans = plans_of(kind, raw)
    seed = 5 if "1" in raw.dataset["channel_names"] else 0  # one that predicts every label
    made.write_run(
        tmp_path / "run", plans.arch, steps=1, plans=plans, dataset=raw.dataset, seed=seed
    )
    export_nnunet.export(
        tmp_path / "run", tmp_path / "out", beside=Beside(raw=raw.folder, workers=0)
    )
    written = json.loads((tmp_path / "out" / "plans.json").read_text())
    assert set(written[INTENSITY]) == set(raw.dataset["channel_names"])
    case = raw.cases[0]
    maps = verify.compare_label_maps(tmp_path / "out", image=case.images)
    assert maps.different == 0 and len(maps.ours) > 1
    assert import_nnunet.read_model_folder(tmp_path / "out").bundle().plans.arch == plans.arch


def test_intensities_that_nobody_knows_are_said_or_refused(tmp_path, capsys):
    config = tiny_config("smoke")
    plans = from_config.plans_from_config(config, made.DATASET, None)
    made.write_run(tmp_path / "run", plans.arch, steps=1, plans=plans)
    arguments = ["--model", str(tmp_path / "run"), "--out"]
    assert export_nnunet.main([*arguments, str(tmp_path / "mr")]) == 0
    message = capsys.readouterr().err
    assert "channel 0 (ZScoreNormalization) are not known" in message and "--raw" in message
    maps = verify.compare_label_maps(tmp_path / "mr")
    assert maps.different == 0 and len(maps.ours) > 1
    assert export_nnunet.main([*arguments, str(tmp_path / "f"), "--fingerprint"]) == 1
    assert "no fingerprint to write" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    plans = dataclasses.replace(plans, normalization=("CTNormalization",))
    made.write_run(tmp_path / "run", plans.arch, steps=1, plans=plans)
    with pytest.raises(ExportError, match=r"(?s)channel 0 \(CTNormalization\).*--raw"):
        export_nnunet.export(tmp_path / "run", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


def test_a_configuration_joins_the_plans_that_are_there(tmp_path):
    where, out = tmp_path / "preprocessed", tmp_path / "results" / NAME
    for number, name in enumerate(("3d_fullres", "other", "other")):
        plans = made.make_plans(made.FLAT, configuration=name, patch=16 * (1 + number))
        run = tmp_path / f"run{number}"
        made.write_run(run, made.FLAT, steps=1, plans=plans)
        target, beside = out / f"{number}", Beside(preprocessed=where)
        if number == 2:
            with pytest.raises(ExportError, match="another configuration 'other'"):
                export_nnunet.export(run, target, beside=beside)
        else:
            export_nnunet.export(run, target, beside=beside)
    together = json.loads((where / NAME / "TinyPlans.json").read_text())
    assert set(together["configurations"]) == {"3d_fullres", "other"}
    assert together["dataset_name"] == NAME, "named as the folder of results"
    assert not (out / "2").exists()


def test_verify_says_what_differs(tmp_path, capsys):
    arch = from_config.plans_from_config(tiny_config("smoke"), made.DATASET, None).arch
    plans = made.make_plans(arch)
    made.write_run(tmp_path / "run", arch, steps=1, plans=plans, seed=5)
    export_nnunet.export(tmp_path / "run", tmp_path / "out")
    other = dataclasses.replace(plans, spacing=(2.0, 2.0, 2.0))
    import_nnunet.read_model_folder(tmp_path / "out").save(tmp_path / "bundle")
    (tmp_path / "bundle" / "plans.json").write_text(json.dumps(other.to_nnunet()))
    arguments = ["--model-folder", str(tmp_path / "out")]
    assert verify.main([*arguments, "--bundle", str(tmp_path / "bundle")]) == 1
    message = capsys.readouterr().err
    assert "the label maps of made-up image differ in" in message and "nnU-Net" in message
    written = json.loads((tmp_path / "out" / "plans.json").read_text())
    written[INTENSITY] = {}
    (tmp_path / "out" / "plans.json").write_text(json.dumps(written))
    assert verify.main(arguments) == 1
    assert "nnU-Net cannot predict with" in capsys.readouterr().err


@pytest.mark.parametrize("nonlin", ["gelu", "silu"])
def test_other_activations_are_theirs(tmp_path, nonlin):
    arch: ArchSpec = dataclasses.replace(made.RESIDUAL, nonlin=nonlin)
    folder = made.write_model_folder(tmp_path / "m", arch)
    assert all(d.largest < 2e-4 and d.magnitude > 0.1 for d in verify.compare(folder))
