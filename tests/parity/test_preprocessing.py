"""Live: what the installed nnU-Net measures, plans, splits and preprocesses, ours does too."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panther_jax import planning
from panther_jax.images import splits
from panther_jax.images.raw_dataset import open_raw
from panther_jax.panther import configurations
from panther_jax.plans.plans import Plans
from panther_jax.preprocessing import pipeline
from panther_jax.store import store

pytestmark = [pytest.mark.torch, pytest.mark.slow]
TARGET_SPACING = (2.2, 2.5, 2.5)  # the samples are isotropic: resampling needs a reason
ISO = configurations.ISO
REFERENCE = """
import json, sys
from pathlib import Path
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints, plan_experiments, preprocess
)
from nnunetv2.utilities.crossval_split import generate_crossval_split
if __name__ == "__main__":
    ids, out, spacing = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    if sys.argv[4] == "plan":
        extract_fingerprints(ids, num_processes=2)
        plan_experiments(ids, "nnUNetPlannerResEncL")
        plan_experiments(
            ids, overwrite_target_spacing=spacing, overwrite_plans_name="LivePlans"
        )
        for folder in sorted(out.iterdir()):
            names = json.loads((folder / "cases.json").read_text())
            splits = generate_crossval_split(names, seed=12345, n_splits=5)
            (folder / "expected_splits.json").write_text(json.dumps(splits))
    else:
        preprocess(ids, "LivePlans", ("3d_fullres", "CONFIGURATION"), (1, 1), verbose=False)
"""


def run_reference(raw: Path, out: Path, ids: list[int], what: str) -> None:
    script = out.parent / "reference.py"
    script.write_text(REFERENCE.replace("CONFIGURATION", ISO))
    folders = {
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(out),
        "nnUNet_results": str(out.parent / "results"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, script, json.dumps(ids), str(out), json.dumps(TARGET_SPACING), what],
        env={**os.environ, **folders},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def reference(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """For every sample dataset: its raw folder, and what nnU-Net made of it."""
    pytest.importorskip("nnunetv2")
    pytest.importorskip("blosc2")
    raws = [open_raw(p.parent) for p in sorted(sample_data.glob("Dataset*/dataset.json"))]
    assert raws, f"no raw dataset under {sample_data}"
    out = tmp_path_factory.mktemp("nnunet") / "preprocessed"
    for raw in raws:
        (out / raw.name).mkdir(parents=True)
        (out / raw.name / "cases.json").write_text(json.dumps([c.id for c in raw.cases]))
    ids = [int(raw.name[7:10]) for raw in raws]
    run_reference(sample_data, out, ids, "plan")
    for raw in raws:  # PANTHER's configuration, for nnU-Net to preprocess with
        path = out / raw.name / "LivePlans.json"
        plans = json.loads(path.read_text())
        entries = configurations.panther_configurations(plans, raw.dataset)
        plans["configurations"][ISO] = entries[ISO] | {"spacing": [2.0] * 3}  # 1 mm: 8x the time
        path.write_text(json.dumps(plans))
    run_reference(sample_data, out, ids, "preprocess")
    return [(raw, out / raw.name) for raw in raws]


def test_fingerprint_and_plans_are_equal(reference: list[Any], tmp_path: Path) -> None:
    for raw, theirs in reference:
        ours = tmp_path / raw.name
        arguments = ["--raw", str(raw.folder), "--out", str(ours), "--quiet"]
        assert planning.main([*arguments, "--planner", "ResEncL"]) == 0
        for name, expected in (
            ("dataset_fingerprint.json", "dataset_fingerprint.json"),
            ("dataset.json", "dataset.json"),
            ("plans.json", "nnUNetResEncUNetLPlans.json"),
        ):
            found = json.loads((ours / name).read_text())
            found.pop("sources", None)  # ours: what the fingerprint was measured on
            assert json.dumps(found) == json.dumps(json.loads((theirs / expected).read_text())), (
                name
            )
        spacing = [str(s) for s in TARGET_SPACING]
        options = ["--planner", "default", "--plans-name", "LivePlans", "--overwrite"]
        assert planning.main([*arguments, *options, "--target-spacing", *spacing]) == 0
        found = json.loads((ours / "plans.json").read_text())
        expected = json.loads((theirs / "LivePlans.json").read_text())
        del expected["configurations"][ISO]
        assert found == expected


def test_splits_are_equal(reference: list[Any]) -> None:
    for raw, theirs in reference:
        expected = json.loads((theirs / "expected_splits.json").read_text())
        found = splits.make_splits([case.id for case in raw.cases])
        assert splits.splits_to_json(found) == expected


@pytest.mark.parametrize("configuration", ["3d_fullres", ISO])
def test_every_voxel_is_equal(
    reference: list[Any], configuration: str, tmp_path: Path, record_property: Any
) -> None:
    for raw, theirs in reference:
        plans = json.loads((theirs / "LivePlans.json").read_text())
        ours = tmp_path / raw.name
        pipeline.preprocess(raw, Plans.from_nnunet(plans, raw.dataset, configuration), ours)
        found = store.open_store(ours)
        expected = store.open_store(theirs / f"LivePlans_{configuration}")
        assert found.case_ids == expected.case_ids and found.plans == expected.plans
        worst = 0.0
        for case_id in found.case_ids:
            a = store.read_stored(found, case_id)
            b = store.read_stored(expected, case_id)
            assert a.properties == b.properties
            worst = max(worst, float(np.abs(a.image - b.image).max()))
            np.testing.assert_array_equal(a.label, b.label)
            for (key, rows), (wanted, others) in zip(a.locations, b.locations, strict=True):
                assert key == wanted
                np.testing.assert_array_equal(rows, others)
            reference_label = found.reference(case_id).read_bytes()
            assert reference_label == expected.reference(case_id).read_bytes()
        record_property(f"{raw.name} {configuration} largest difference", worst)
        print(f"{raw.name} {configuration}: largest difference of intensities {worst:g}")
        # float32 rounding of values of a few units; torch sums in another order
        assert worst <= 1e-5
