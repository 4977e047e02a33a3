"""Live: what the installed nnU-Net predicts with a model folder, ours predicts with it too."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import weight_files as made

torch = pytest.importorskip("torch")
from panther_jax import predict
from panther_jax.images import imageio
from panther_jax.images.geometry import geometry_differences
from panther_jax.inference import loading
from panther_jax.inference.folder import predict_folder
from panther_jax.plans.geometry import Geometry

pytestmark = [pytest.mark.torch, pytest.mark.slow]
FOLDS = ("0", "1", "2", "3", "4")
MAX_SCANS, MAX_SCAN_VOXELS = 2, 250_000  # larger ones take minutes on two cores
ARCH = dataclasses.replace(
    made.RESIDUAL,
    features=(6, 8, 8),
    kernel_sizes=((3, 3, 3),) * 3,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
)
# In a process of its own: it warns a lot, and may start processes.
COMMAND = """
import sys
if __name__ == "__main__":
    what, sys.argv = sys.argv[1], sys.argv[1:]
    if what == "predict":
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        model, source, out, mirror, *folds = sys.argv[1:]
        predictor = nnUNetPredictor(
            use_mirroring=mirror == "mirror", device=torch.device("cpu"),
            perform_everything_on_device=False, allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(model, [int(f) for f in folds])
        predictor.predict_from_files_sequential(source, out, save_probabilities=True)
    else:
        from nnunetv2.ensembling.ensemble import entry_point_ensemble_folders
        entry_point_ensemble_folders()
"""


def run_reference(folder, *arguments):
    script = folder / "reference.py"
    script.write_text(COMMAND)
    places = {n: str(folder) for n in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def predict_reference(model, source, out, mirror):
    out.mkdir()
    run_reference(out.parent, "predict", model, source, out, mirror, *FOLDS)


def write_model(folder, *, spacing, patch, seed=0):
    """A model folder of five folds, its weights larger than any initialisation leaves them."""
    pytest.importorskip("nnunetv2")
    plans = dataclasses.replace(made.make_plans(ARCH, patch=patch), spacing=spacing).to_nnunet()
    for number, fold in enumerate(FOLDS):
        entries = made.checkpoint(ARCH, seed + number)
        entries["init_args"]["plans"] = plans
        for key, tensor in entries["network_weights"].items():
            if "seg_layers" in key and key.endswith("weight"):  # else one class wins everywhere
                tensor -= tensor.mean(dim=1, keepdim=True)
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.save(entries, folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(made.DATASET))
    return folder


def write_synthetic(folder):
    """Two anisotropic scans, blobs in noise, one with a zero border and a turned grid."""
    rng = np.random.default_rng(0)
    for number, (shape, spacing) in enumerate(
        (((14, 20, 22), (3.0, 1.5, 1.5)), ((18, 17, 26), (1.7, 2.1, 1.3)))
    ):
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        image = 100 * np.exp(-4 * sum(a**2 for a in axes)) + rng.normal(50, 15, shape)
        if number:
            image[:3], image[:, :, -4:] = 0, 0
        turned = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        geometry = Geometry(shape, spacing, (5.0, -7.0, 2.5), turned)
        imageio.write_image(
            folder / f"scan{number}_0000.nii.gz", image.astype(np.float32), geometry
        )
    return folder


def compare(ours, theirs, record, *, equal=0.9999, mean=1e-4, q999=2e-3):
    """Compare all cases of two folders; the bounds are those of issue 6.

    spec 05 §5.2: at the rim of an image the float16 sums of the reference are coarse. Ours are not
    unless asked for, so there, and in images that are mostly rim, they differ.
    """
    names = sorted(p.name for p in theirs.glob("*.nii.gz"))
    assert names and names == sorted(p.name for p in ours.glob("*.nii.gz"))
    for name in names:
        stem = name.removesuffix(".nii.gz")
        (a, ours_at), (b, theirs_at) = (imageio.read_label(f / name) for f in (ours, theirs))
        assert geometry_differences(ours_at, theirs_at, tolerances=(1e-6,) * 3) == ()
        p, q = (np.load(f / f"{stem}.npz")["probabilities"] for f in (ours, theirs))
        assert p.shape == q.shape and p.dtype == q.dtype == np.float32
        difference = np.abs(p - q)
        numbers = {
            "equal": float((a == b).mean()),
            "mean": float(difference.mean()),
            "q999": float(np.quantile(difference, 0.999)),
            "max": float(difference.max()),
            "classes": len(np.unique(b)),
        }
        record(stem, numbers)
        print(ours.name, stem, numbers)
        assert numbers["classes"] > 1, "an empty prediction shows nothing"
        assert numbers["equal"] >= equal
        assert numbers["mean"] <= mean and numbers["q999"] <= q999


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Model, scans, and what the reference makes of them with mirroring."""
    root = tmp_path_factory.mktemp("synthetic")
    model = write_model(root / "model", spacing=(2.5, 1.5, 1.5), patch=16)
    scans = write_synthetic(root / "in")
    predict_reference(model, scans, root / "mirrored", "mirror")
    return root, model, scans


@pytest.mark.parametrize("accumulate", ["reference", "float32"])
def test_five_folds_with_mirroring(synthetic, tmp_path, record_property, accumulate):
    root, model, scans = synthetic
    out = tmp_path / accumulate
    arguments = ["--model", model, "--input", scans, "--output", out, "--mirror", "--quiet"]
    options = ["--save-probabilities", "--accumulate", accumulate]
    assert predict.main([str(a) for a in (*arguments, *options)]) == 0
    mostly_rim = {"equal": 0.99, "mean": 1e-3, "q999": 0.1} if accumulate == "float32" else {}
    compare(out, root / "mirrored", record_property, **mostly_rim)


def test_their_ensembling_takes_our_probabilities(synthetic, tmp_path):
    root, model, scans = synthetic
    parts = []
    for fold in FOLDS[:2]:
        parts.append(tmp_path / f"part{fold}")
        predict_folder(
            loading.load(model, folds=(fold,)), scans, parts[-1], save_probabilities=True
        )
    run_reference(
        tmp_path, "ensemble", "-i", *parts, "-o", tmp_path / "theirs", "--save_npz", "-np", "1"
    )
    from panther_jax.ensembles.specification import EnsembleSpec, MemberSpec

    spec = EnsembleSpec(tuple(MemberSpec(f, model, folds=(f,)) for f in FOLDS[:2]))
    predict_folder(loading.load(spec), scans, tmp_path / "ours", save_probabilities=True)
    for path in sorted((tmp_path / "theirs").glob("*.nii.gz")):
        theirs, geometry = imageio.read_label(path)
        ours, same = imageio.read_label(tmp_path / "ours" / path.name)
        np.testing.assert_array_equal(ours, theirs)
        assert geometry_differences(geometry, same) == ()
        stem = path.name.removesuffix(".nii.gz")
        a, b = (np.load(tmp_path / f / f"{stem}.npz")["probabilities"] for f in ("ours", "theirs"))
        np.testing.assert_allclose(a, b, atol=1e-6)


def small_scans(sample_data):
    """Paths of real images, not of label maps; an unlabelled case first."""
    labels = ("label", "seg", "kidneys")
    paths = [
        p
        for p in sorted(sample_data.glob("scans/*.nii.gz"))
        if not any(word in p.name for word in labels)
    ]
    cases = sorted(sample_data.glob("Dataset*/imagesTs/*_0000.*"))
    return [*cases[:1], *paths, *cases[1:]]


def test_real_scans(sample_data, tmp_path, record_property):
    source = tmp_path / "in"
    for path in small_scans(sample_data):
        image, geometry = imageio.read_image([path])
        if image.size <= MAX_SCAN_VOXELS and len(list(source.glob("*"))) < MAX_SCANS:
            stem = path.name.split(".")[0].removesuffix("_0000")
            imageio.write_image(source / f"{stem}_0000.nii.gz", image[0], geometry)
    if not source.is_dir():
        pytest.skip(f"no small scan in {sample_data}")
    model = write_model(tmp_path / "model", spacing=(6.0, 6.0, 6.0), patch=32)
    predict_reference(model, source, tmp_path / "theirs", "plain")
    for accumulate in ("reference", "float32"):
        predictor = loading.load(model, accumulate=accumulate)
        out = tmp_path / accumulate
        predict_folder(predictor, source, out, save_probabilities=True)
        equal = 0.9999 if accumulate == "reference" else 0.999
        compare(out, tmp_path / "theirs", record_property, equal=equal)
