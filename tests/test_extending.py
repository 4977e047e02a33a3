"""The examples of docs/extending.md, as they stand: each is found by its name, and matters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import weight_files as made
from tiny import make_raw, write_scan

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    re.match(r'"""(\w+\.py):', code)[1]: code
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}


@pytest.fixture
def folder(tmp_path):
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    return tmp_path


def run(folder, *arguments, code=0):
    """Run Python in the folder, as a user does: what a file adds stays out of this process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, env=env, cwd=folder, timeout=240,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def command(folder, name, *arguments, code=0):
    return run(folder, "-m", f"panther_jax.{name}", *arguments, code=code)


def test_every_example_of_the_page_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(EXAMPLES) == PAGE.count("```python") == 7
    assert all(text.count(name) for name in EXAMPLES)


def test_a_loss(folder):
    code = """
import jax, jax.numpy as jnp, numpy as np
from panther_jax.config import LossConfig, load_config
from panther_jax.plans.labels import Labels
from panther_jax.training.losses import make_loss
config, _ = load_config("my_focal.py")
labels = Labels((("background", 0), ("tumor", 1)))
x = jnp.array(np.random.default_rng(0).normal(size=(1, 2, 3, 4, 2)), jnp.float32)
y = jnp.array(np.random.default_rng(1).integers(0, 2, (1, 2, 3, 4, 1)))
mine = jax.jit(make_loss(config.loss, labels, batch_dice=False))
p = np.take_along_axis(np.asarray(jax.nn.softmax(x)), np.asarray(y), -1)
np.testing.assert_allclose(mine(x, y), np.mean((1 - p) ** 2 * -np.log(p)), rtol=1e-5)
usual = make_loss(LossConfig(kind="ce"), labels, batch_dice=False)(x, y)
assert abs(mine(x, y) - usual) > 1e-2
assert np.isfinite(jax.grad(mine)(x, y)).all()
"""
    run(folder, "-c", code)
    shown = command(folder, "train", "--config", "my_focal.py", "--dry-run")
    assert '"kind": "focal"' in shown
    told = command(
        folder, "train", "--config", "my_focal.py", "--loss.kind", "fokal", "--dry-run", code=2
    )
    assert "unknown loss 'fokal'" in told and "did you mean focal?" in told


def test_a_normalisation_from_preprocessing_to_prediction(folder):
    make_raw(folder / "raw" / "Dataset001_Mine", num_cases=2)
    command(
        folder, "preprocess", "--raw", "raw/Dataset001_Mine", "--config", "my_percentile.py",
        "--out", "store", "--workers", "2",
    )  # fmt: skip
    from panther_jax.store.store import open_store, read_stored

    image = np.asarray(read_stored(open_store(folder / "store"), "case_0").image)
    assert 0 <= image.min() < 0.2 and 0.8 < image.max() <= 1

    bundle = made.write_bundle(folder / "bundle")
    plans = json.loads((bundle / "plans.json").read_text())
    for entry in plans["configurations"].values():
        entry["normalization_schemes"] = ["Percentile"]
    (bundle / "plans.json").write_text(json.dumps(plans))
    write_scan(folder / "scan.nii.gz")
    predict = ("predict", "--model", "bundle", "--input", "scan.nii.gz", "--output", "out.nii.gz")
    told = command(folder, *predict, code=1)
    assert "unknown normalization 'Percentile'" in told and "--plugin FILE" in told
    command(folder, *predict, "--plugin", "my_percentile.py")
    assert (folder / "out.nii.gz").is_file()


def test_a_transform(folder):
    code = """
import jax, jax.numpy as jnp, numpy as np
from panther_jax.augment.recipes import find_policy
from panther_jax.config import load_config
name = load_config("my_posterize.py")[0].augment.policy
policy, default = find_policy(name), find_policy("default")
added = policy.transforms[-1]
assert policy.transforms[:-1] == default.transforms
x = jnp.array([[[0.12, 0.26, -0.49]]], jnp.float32)
np.testing.assert_allclose(added.apply(x, jnp.float32(0.2)), [[[0.2, 0.2, -0.4]]], atol=1e-6)
"""
    run(folder, "-c", code)
    shown = command(folder, "train", "--config", "my_posterize.py", "--dry-run")
    assert '"policy": "posterized"' in shown


def test_an_image_format(folder):
    from panther_jax.images.imageio import read_image

    made.write_bundle(folder / "bundle")
    image, geometry = read_image([write_scan(folder / "scan.nii.gz")])
    np.savez(folder / "scan.npz", image=image[0], spacing=geometry.spacing_zyx)
    predict = ("predict", "--model", "bundle", "--input", "scan.npz", "--output", "out.npz")
    assert "its ending is none of" in command(folder, *predict, code=1)
    command(folder, *predict, "--plugin", "my_npz.py")
    with np.load(folder / "out.npz") as found:
        assert found["image"].shape == image.shape[1:]
        np.testing.assert_allclose(found["spacing"], geometry.spacing_zyx)


def test_a_metric(folder):
    make_raw(folder / "raw", num_cases=2)
    evaluate = ("evaluate", "--predictions", "raw/labelsTr", "--references", "raw/labelsTr")
    command(folder, *evaluate, "--output", "before.json")
    told = command(
        folder, *evaluate, "--plugin", "my_volume.py", "--workers", "2", "--output", "after.json"
    )
    assert "volume error" in told
    before, after = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after")
    )
    assert [c["volume_error"] for c in after["per_subject"]] == [0.0, 0.0]
    assert after["aggregates"]["mean_volume_error"] == 0.0
    assert set(after["aggregates"]) - set(before["aggregates"]) == {"mean_volume_error"}
    assert "volume_error" in (folder / "after.csv").read_text().splitlines()[0]
    # An evaluation from before the metric is compared by the metrics that both have.
    compare = ("evaluate", "--compare", "before.json", "after.json", "--plugin", "my_volume.py")
    assert "volume error" not in command(folder, *compare)
    assert "volume error" in command(
        folder, "evaluate", "--compare", "after.json", "after.json", "--plugin", "my_volume.py"
    )


def test_a_network(folder):
    code = """
import dataclasses, jax, jax.numpy as jnp, numpy as np
import weight_files as made
from panther_jax.config import load_config
from panther_jax.network import unet
from panther_jax.plans.architecture import ArchSpec
name = load_config("my_net.py")[0].arch.network
arch = dataclasses.replace(made.RESIDUAL, network=name)
read = ArchSpec.from_nnunet(arch.to_nnunet(), in_channels=1, num_outputs=3)
assert read.network == name == arch.to_nnunet()["network_class_name"]
plain = dataclasses.replace(arch, network="ResidualEncoderUNet")
params = unet.init_params(arch, jax.random.key(0))
x = jnp.array(np.random.default_rng(0).normal(size=(1, 16, 16, 16, 1)) * 3, jnp.float32)
mine = unet.apply(unet.build(arch), params, x)[0]
assert mine.shape == (1, 16, 16, 16, 3)
usual = unet.build(plain)
np.testing.assert_allclose(mine, unet.apply(usual, params, jnp.tanh(x))[0], rtol=1e-5, atol=1e-5)
assert np.abs(np.asarray(mine - unet.apply(usual, params, x)[0])).max() > 1e-3
"""
    run(folder, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{code}")
    shown = command(folder, "train", "--config", "my_net.py", "--dry-run")
    assert '"network": "CompressedUNet"' in shown


def test_a_stage(folder):
    make_raw(folder / "data" / "raw" / "Dataset001_Mine", num_cases=5)
    refused = command(folder, "stages", "--task", "liver", "--dry-run", code=2)
    assert "liver" in refused and "t2" in refused
    shown = command(
        folder,
        "stages",
        "--plugin",
        "my_stage.py",
        "--task",
        "liver",
        "--name",
        "mine",
        "--dry-run",
    )
    assert "my_stage fold 1" in shown and "fold 2" not in shown
    assert "ct_pancreas" in shown and "mri_t1" not in shown
