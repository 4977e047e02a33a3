"""Plans against the reference's, field by field; the planning command; PANTHER's configurations."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_raw

from panther_jax import planning
from panther_jax.base.errors import PlansError
from panther_jax.panther.configurations import move_plans, panther_configurations
from panther_jax.planner import fingerprint as fingerprint_module
from panther_jax.planner import rules
from panther_jax.plans.plans import Plans, resolve_configuration

STATISTICS = "foreground_intensity_properties_per_channel"
PLANNERS = [p.name for p in rules.PLANNERS]
FINGERPRINT = {
    "spacings": [[3.0, 1.1875, 1.1875]] * 92,
    "shapes_after_crop": [[72, 258, 318]] * 92,
    "median_relative_size_after_cropping": 0.986,
    STATISTICS: {},
}
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "tumor": 1},
    "numTraining": 92,
    "file_ending": ".mha",
}


def planned(fingerprint: Any = FINGERPRINT, dataset: Any = DATASET, **options: Any) -> Any:
    name = options.pop("name", "ResEncL")
    found = rules.find_planner(name)
    return rules.plan_experiment(
        fingerprint, dataset, dataset_name="Dataset901_PANTHER", planner=found, **options
    )


# -------------------------------------------------------------------------------------- golden


@pytest.mark.golden
def test_topology(golden: Path) -> None:
    rows = json.loads((golden / "preprocessing" / "topology_table.json").read_text())
    assert rows
    for row in rows:
        found = rules.topology(row["spacing"], row["patch_size"])
        assert [list(s) for s in found.strides] == row["strides"], row
        assert [list(k) for k in found.kernel_sizes] == row["kernel_sizes"], row
        assert list(found.patch) == row["padded_patch_size"], row
        assert list(found.divisor) == row["divisible_by"], row
        assert list(found.num_pools) == row["num_pool_per_axis"], row


@pytest.mark.golden
def test_size_estimates(golden: Path) -> None:
    rows = json.loads((golden / "preprocessing" / "vram_estimates.json").read_text())
    assert rows
    for row in rows:
        plain = row["network"] == "plain"
        found = rules.feature_voxels(
            tuple(row["patch_size"]),
            [tuple(s) for s in row["strides"]],
            row["features"],
            network="PlainConvUNet" if plain else "ResidualEncoderUNet",
            encoder=row["n_conv_per_stage" if plain else "n_blocks_per_stage"],
            decoder=row["n_conv_per_stage_decoder"],
            num_classes=row["num_classes"],
        )
        assert found == row["estimate"], row


@pytest.mark.golden
def test_plans_of_synthetic_fingerprints(golden: Path) -> None:
    rows = json.loads((golden / "preprocessing" / "planning_synthetic.json").read_text())
    assert rows
    for row in rows:
        measured = dict(row["fingerprint"])
        if measured.get("all_cases_identical"):
            for key in ("spacings", "shapes_after_crop"):
                measured[key] = measured[key] * measured["n_cases"]
        measured.setdefault(STATISTICS, {})
        for name, expected in row["plans"].items():
            short, _, memory = name.partition("_gpu")
            found = planned(
                measured,
                row["dataset_json"],
                name=short if short == "default" else f"ResEnc{short}",
                gpu_memory_gb=float(memory) if memory else None,
            )
            assert list(found["configurations"]) == list(expected["configurations"])
            for configuration, entry in found["configurations"].items():
                flat = entry | entry.get("architecture", {}).get("arch_kwargs", {})
                for key, value in expected["configurations"][configuration].items():
                    assert_equal(flat[key], value, f"{name} {configuration} {key}")
            for key in expected.keys() - {"configurations"}:
                assert_equal(found[key], expected[key], f"{name} {key}")


def assert_equal(found: Any, expected: Any, where: str) -> None:
    """Everything exact but floats, which may differ by rounding (README: 1e-9)."""
    if isinstance(expected, float) and not isinstance(expected, bool):
        assert found == pytest.approx(expected, rel=1e-9), where
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b, where)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where} {key}")
    else:
        assert found == expected, where


@pytest.mark.golden
def test_plans_of_datasets(golden: Path) -> None:
    folder = golden / "preprocessing"
    reduced = json.loads((folder / "reduced_memory.json").read_text())
    num_checked = 0
    for raw in sorted((folder / "raw").iterdir()):
        dataset = json.loads((raw / "dataset.json").read_text())
        fingerprints = [
            json.loads(path.read_text())
            for path in sorted(folder.glob(f"{raw.name}_fingerprint_budget*.json"))
        ]
        for path in sorted(folder.glob(f"{raw.name}_plans_nnUNet*.json")):
            expected = json.loads(path.read_text())
            found = [
                rules.plan_experiment(f, dataset, dataset_name=raw.name, **options)
                for f in fingerprints
                for options in [options_of(expected, reduced[raw.name])]
            ]
            # the statistics are those of one of the fingerprints, the rest does not depend on them
            wanted = expected.pop(STATISTICS)
            statistics = [f.pop(STATISTICS) for f in found]
            assert any(
                s[c] == pytest.approx(wanted[c], rel=1e-5) for s in statistics for c in wanted
            )
            for plans in found:
                assert_equal(plans, expected, path.name)
            num_checked += 1
    assert num_checked


def options_of(expected: Any, reduced: dict[str, float]) -> dict[str, Any]:
    """``reduced``: the gigabytes that a plans name ends in a word for; plans do not tell them."""
    plans_name = expected["plans_name"]
    kind = plans_name.rsplit("_", 1)[-1]
    memory = {**reduced, "halfGB": 0.5}.get(kind)
    options = {"planner": rules.find_planner(expected["experiment_planner_used"])}
    options |= {"plans_name": plans_name, "gpu_memory_gb": memory}
    if kind == "halfGB":
        backward = expected["transpose_backward"]
        spacing = expected["configurations"]["3d_fullres"]["spacing"]
        options["overwrite_target_spacing"] = [spacing[a] for a in backward]
    return options


@pytest.mark.golden
def test_resolved_configurations(golden: Path) -> None:
    folder, num_checked = golden / "preprocessing", 0
    for path in sorted(folder.glob("*_resolved_configuration_*.json")):
        dataset, name = path.stem.split("_resolved_configuration_")
        plans = json.loads((folder / f"{dataset}_plans_used_for_preprocessing.json").read_text())
        assert resolve_configuration(plans, name) == json.loads(path.read_text())
        num_checked += 1
    assert num_checked


# ------------------------------------------------------------------------------------- planning


def test_published_plans_of_task_1() -> None:
    """Spec 02 §3.12 (b) and the baseline: facts of published plans files, not of our code."""
    large = planned()["configurations"]
    assert large["3d_fullres"]["patch_size"] == [64, 256, 320]
    assert large["3d_fullres"]["batch_size"] == 2 and large["3d_fullres"]["batch_dice"] is False
    kwargs = large["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["strides"] == [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4, [1, 2, 2]]
    assert kwargs["kernel_sizes"] == [[1, 3, 3], *[[3, 3, 3]] * 6]
    assert (large["2d"]["patch_size"], large["2d"]["batch_size"]) == ([320, 320], 90)
    default = planned(name="default")["configurations"]["3d_fullres"]
    assert (default["patch_size"], default["batch_size"]) == ([48, 192, 224], 2)


def test_a_large_image_gets_a_cascade() -> None:
    measured = FINGERPRINT | {
        "spacings": [[1.0, 0.8, 0.8]] * 20,
        "shapes_after_crop": [[400, 512, 512]] * 20,
    }
    plans = planned(measured, name="default")
    configurations = plans["configurations"]
    assert list(configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    lowres, fullres = configurations["3d_lowres"], configurations["3d_fullres"]
    assert lowres["next_stage"] == "3d_cascade_fullres" and not lowres["batch_dice"]
    assert fullres["batch_dice"]
    shape = np.array(lowres["median_image_size_in_voxels"])
    assert np.prod(lowres["patch_size"]) >= 0.25 * np.prod(shape) * 0.99  # rounded to voxels
    cascade = Plans.from_nnunet(plans, DATASET, "3d_cascade_fullres")
    assert list(cascade.patch_size) == fullres["patch_size"]


def test_flat_images_get_two_dimensions_only() -> None:
    measured = FINGERPRINT | {
        "spacings": [[999.0, 1.0, 1.0]] * 4,
        "shapes_after_crop": [[1, 300, 200]] * 4,
    }
    assert list(planned(measured)["configurations"]) == ["2d"]


def test_axes_are_transposed_unless_suppressed() -> None:
    measured = FINGERPRINT | {
        "spacings": [[1.0, 1.0, 4.0]] * 4,
        "shapes_after_crop": [[200, 180, 40]] * 4,
    }
    plans = planned(measured)
    assert (plans["transpose_forward"], plans["transpose_backward"]) == ([2, 0, 1], [1, 2, 0])
    assert plans["configurations"]["3d_fullres"]["spacing"] == [4.0, 1.0, 1.0]
    kept = planned(measured, suppress_transpose=True)
    assert kept["transpose_forward"] == [0, 1, 2]
    assert kept["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 4.0]


@given(
    spacing=st.lists(st.floats(0.3, 8.0), min_size=3, max_size=3),
    shape=st.lists(st.integers(8, 600), min_size=3, max_size=3),
    name=st.sampled_from(PLANNERS),
)
@settings(max_examples=30, deadline=None)
def test_any_plans_can_be_built(spacing: list[float], shape: list[int], name: str) -> None:
    measured = FINGERPRINT | {"spacings": [spacing] * 5, "shapes_after_crop": [shape] * 5}
    plans = json.loads(json.dumps(planned(measured, name=name)))
    for configuration in plans["configurations"]:
        found = Plans.from_nnunet(plans, DATASET, configuration)
        found.arch.check_patch(found.patch_size)
        assert found.batch_size >= 2


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PlansError, match="not known; expected one of default"):
        rules.find_planner("ResEncXXL")
    with pytest.raises(PlansError, match="must be positive"):
        planned(gpu_memory_gb=0)
    with pytest.raises(PlansError, match="3 positive numbers"):
        planned(overwrite_target_spacing=(1.0, 0.0, 1.0))
    with pytest.raises(PlansError, match="one triple a case"):
        planned(FINGERPRINT | {"spacings": []})
    assert rules.find_planner("resencl") == rules.find_planner("nnUNetPlannerResEncL")


# ------------------------------------------------------------------------------- PANTHER's plans


def test_panther_configurations_are_the_multitalent_network() -> None:
    plans = planned()
    plans["configurations"] |= panther_configurations(plans, DATASET)
    found = Plans.from_nnunet(json.loads(json.dumps(plans)), DATASET, "3d_fullres_iso1x1x1_bs4")
    assert (found.patch_size, found.batch_size) == ((192, 192, 192), 4)
    assert found.spacing == (1.0, 1.0, 1.0) and not found.batch_dice
    assert found.arch.features == (32, 64, 128, 256, 320, 320)
    assert found.arch.strides == ((1, 1, 1),) + ((2, 2, 2),) * 5
    assert found.arch.blocks == (1, 3, 4, 6, 6, 6) and found.arch.decoder_convs == (1,) * 5
    assert found.normalization == ("ZScoreNormalization",) and found.use_mask_for_norm == (False,)
    assert found.resampling_image.name == "resample_torch_fornnunet"
    assert found.resampling_logits.name == "resample_data_or_seg_to_shape"
    assert found.data_identifier == "nnUNetResEncUNetLPlans_3d_fullres_iso1x1x1"
    spline = panther_configurations(
        plans, DATASET, resampling="spline", normalization=["CTNormalization"]
    )["3d_fullres_iso1x1x1"]
    assert spline["resampling_fn_data"] == "resample_data_or_seg_to_shape"
    assert spline["normalization_schemes"] == ["CTNormalization"]
    with pytest.raises(PlansError, match="2 normalisation scheme"):
        panther_configurations(plans, DATASET, normalization=["NoNormalization"] * 2)


def test_moved_plans_keep_everything_but_names() -> None:
    plans = planned()
    moved = move_plans(
        plans, DATASET | {"file_ending": ".nii.gz"}, dataset_name="Dataset902_B", plans_name="New"
    )
    assert (moved["dataset_name"], moved["plans_name"]) == ("Dataset902_B", "New")
    # folders of the ResEnc planners are named after the default plans, not after their own
    identifiers = [c["data_identifier"] for c in moved["configurations"].values()]
    assert identifiers == ["New_nnUNetPlans_2d", "New_nnUNetPlans_3d_fullres"]
    own = move_plans(planned(name="default"), DATASET, dataset_name="B", plans_name="New")
    assert own["configurations"]["2d"]["data_identifier"] == "New_2d"
    for name, entry in moved["configurations"].items():
        old = plans["configurations"][name]
        assert entry | {"data_identifier": old["data_identifier"]} == old


# -------------------------------------------------------------------------------------- command


def run(*arguments: object) -> int:
    try:
        return planning.main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_command_writes_what_nnunet_would(tmp_path: Path, capsys: Any) -> None:
    raw, out = make_raw(tmp_path / "Dataset001_Toy"), tmp_path / "plans"
    fingerprint = FINGERPRINT | {"spacings": [[6.0] * 3] * 5, "shapes_after_crop": [[24] * 3] * 5}
    out.mkdir()
    (out / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    assert run("--raw", raw, "--out", out, "--gpu_memory_gb", 1, "--panther") == 0
    assert capsys.readouterr().out.strip() == str(out / "plans.json")
    plans = json.loads((out / "plans.json").read_text())
    assert plans["dataset_name"] == "Dataset001_Toy"
    assert "3d_fullres_iso1x1x1_bs4" in plans["configurations"]
    assert (out / "dataset.json").read_bytes() == (raw / "dataset.json").read_bytes()
    # again: nothing changes; other options: refused, then replaced, what they do not make is kept
    assert run("--raw", raw, "--out", out, "--gpu-memory-gb", 1, "--panther") == 0
    assert run("--raw", raw, "--out", out, "--planner", "default") == 1
    assert "would change; pass --overwrite" in capsys.readouterr().err
    assert run("--raw", raw, "--out", out, "--planner", "default", "--overwrite") == 0
    replaced = json.loads((out / "plans.json").read_text())
    assert replaced["plans_name"] == "nnUNetPlans"
    kept = replaced["configurations"]["3d_fullres_iso1x1x1"]
    assert kept == plans["configurations"]["3d_fullres_iso1x1x1"]


def test_command_moves_plans_and_names_mistakes(tmp_path: Path, capsys: Any) -> None:
    raw, out = make_raw(tmp_path / "Dataset001_Toy", num_cases=2), tmp_path / "plans"
    source = tmp_path / "source.json"
    source.write_text(json.dumps(planned()))
    assert run("--raw", raw, "--out", out, "--from-plans", source, "--plans-name", "Moved") == 0
    moved = json.loads((out / "plans.json").read_text())
    assert (moved["dataset_name"], moved["plans_name"]) == ("Dataset001_Toy", "Moved")
    assert run("--raw", raw, "--out", tmp_path / "a", "--planner", "best") == 1
    assert "planner 'best' is not known" in capsys.readouterr().err
    assert run("--raw", raw, "--out", out, "--workers", "-1") == 2
    (out / "dataset_fingerprint.json").write_text(json.dumps(FINGERPRINT))
    assert run("--raw", raw, "--out", out) == 1
    assert "is of 92 cases" in capsys.readouterr().err


def test_fingerprint_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, out = make_raw(tmp_path / "Dataset001_Toy", num_cases=3), tmp_path / "plans"
    measured = []
    extract = fingerprint_module.extract_fingerprint

    def counted(*arguments: Any, **options: Any) -> Any:
        measured.append(1)
        return extract(*arguments, budget=3000, **options)

    monkeypatch.setattr(fingerprint_module, "extract_fingerprint", counted)
    for options, times in ((), 1), ((), 1), (("--clean",), 2):
        assert run("--raw", raw, "--out", out, *options) == 0
        assert len(measured) == times
    text = (out / "dataset_fingerprint.json").read_text()
    assert json.dumps(json.loads(text), indent=4, sort_keys=True) == text


def test_help_is_quick_and_imports_no_jax() -> None:
    code = (
        "import sys\nfrom panther_jax import planning\n"
        "try:\n    planning.main(['--help'])\nfinally:\n    assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--panther" in done.stdout, done.stderr
