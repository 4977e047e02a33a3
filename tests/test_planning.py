"""Fingerprints against the reference's; plans of a config."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from panther_jax.base.errors import DatasetError, PlansError
from panther_jax.config.schema import ArchConfig, DataConfig, LossConfig, TrainConfig
from panther_jax.images.imageio import write_image, write_label
from panther_jax.images.raw_dataset import Case, open_raw, read_case
from panther_jax.planner import from_config
from panther_jax.planner.fingerprint import case_fingerprint, extract_fingerprint
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.plans import Plans

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "tumor": 1, "pancreas": 2},
    "file_ending": ".mha",
    "numTraining": 3,
}
STATISTICS = {
    "max": 9.0,
    "mean": 1.0,
    "median": 1.5,
    "min": -3.0,
    "percentile_00_5": -2.0,
    "percentile_99_5": 8.0,
    "std": 2.0,
}


def make_config(**changes: Any) -> TrainConfig:
    return TrainConfig(DataConfig("Dataset001_Test", **changes))


def write_raw(folder: Path, *, foreground: bool = True, num_cases: int = 3) -> Path:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for seed in range(num_cases):
        image = np.random.default_rng(seed).normal(0, 100, (5, 6, 7)).astype(np.float32)
        label = np.zeros(image.shape, np.int16)
        label[1:3, 2:5, 3:6] = foreground
        geometry = Geometry(image.shape, (2.0, 1.0, 1.0 + seed), (0.0, 0.0, 0.0), IDENTITY)
        write_image(folder / "imagesTr" / f"c{seed}_0000.mha", image, geometry)
        write_label(folder / "labelsTr" / f"c{seed}.mha", label, geometry)
    (folder / "dataset.json").write_text(json.dumps(DATASET | {"numTraining": num_cases}))
    return folder


# -------------------------------------------------------------------------------------- golden


@pytest.mark.golden
def test_fingerprints(golden: Path) -> None:
    num_checked = 0
    for folder in sorted((golden / "preprocessing" / "raw").iterdir()):
        raw = open_raw(folder)
        pattern = f"{folder.name}_fingerprint_budget*.json"
        for path in sorted((golden / "preprocessing").glob(pattern)):
            budget = int(float(path.stem.split("budget")[1]))
            found = extract_fingerprint(raw, budget=budget)
            check_fingerprint(found, json.loads(path.read_text()))
            num_checked += 1
    assert num_checked


def check_fingerprint(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert found["shapes_after_crop"] == expected["shapes_after_crop"]
    np.testing.assert_allclose(found["spacings"], expected["spacings"], rtol=0, atol=1e-12)
    key = "median_relative_size_after_cropping"
    assert found[key] == pytest.approx(expected[key], rel=1e-12)
    key = "foreground_intensity_properties_per_channel"
    assert found[key].keys() == expected[key].keys()
    for channel, statistics in expected[key].items():
        # 1e-5: float32 sums in another order
        assert found[key][channel] == pytest.approx(statistics, rel=1e-5)


@pytest.mark.golden
def test_samples_of_cases(golden: Path) -> None:
    num_checked = 0
    for folder in sorted((golden / "preprocessing" / "raw").iterdir()):
        raw = open_raw(folder)
        path = golden / "preprocessing" / f"{folder.name}_fingerprint_cases.json"
        expected = json.loads(path.read_text())
        for raw_case in raw.cases:
            wanted = expected[raw_case.id]
            case = read_case(raw_case, raw.labels)
            found = case_fingerprint(case, int(1e5 // len(raw.cases)))
            assert list(found.shape_after_crop) == wanted["shape_after_crop"]
            assert found.relative_size == pytest.approx(wanted["relative_size"], rel=1e-12)
            assert len(found.samples) == len(wanted["first20"])
            for samples, first in zip(found.samples, wanted["first20"], strict=True):
                np.testing.assert_array_equal(samples[: len(first)], np.float32(first))
            num_checked += 1
    assert num_checked


# ---------------------------------------------------------------------------------- fingerprint


def test_fingerprint_with_workers_is_the_same(tmp_path: Path) -> None:
    raw = open_raw(write_raw(tmp_path / "raw"))
    one = extract_fingerprint(raw, budget=3000)
    assert one == extract_fingerprint(raw, budget=3000, workers=2)
    assert one["spacings"] == [[2.0, 1.0, 1.0], [2.0, 1.0, 2.0], [2.0, 1.0, 3.0]]
    assert list(one) == sorted(one)


def test_channels_are_sampled_in_turn_and_the_ignore_label_counts() -> None:
    image = np.random.default_rng(0).normal(0, 1, (2, 4, 4, 4)).astype(np.float32)
    label = np.zeros((4, 4, 4), np.int16)
    label[1, 1], label[2, 2] = 1, 3
    geometry = Geometry((4, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), IDENTITY)
    found = case_fingerprint(Case("c", image, label, geometry), 50)
    random = np.random.RandomState(1234)
    for channel, samples in zip(image, found.samples, strict=True):
        np.testing.assert_array_equal(samples, random.choice(channel[label > 0], 50, replace=True))


def test_dataset_without_foreground_and_broken_cases_are_named(tmp_path: Path) -> None:
    raw = open_raw(write_raw(tmp_path / "empty", foreground=False))
    with pytest.raises(DatasetError, match="no case has a voxel labelled above 0"):
        extract_fingerprint(raw, budget=100)
    folder = write_raw(tmp_path / "broken")
    raw = open_raw(folder)
    for name in ("c0", "c2"):
        (folder / "imagesTr" / f"{name}_0000.mha").write_bytes(b"")
    with pytest.raises(DatasetError, match="(?s)2 of 3 cases.*'c0'.*'c2'"):
        extract_fingerprint(raw, budget=100)


def test_fingerprint_is_made_only_if_needed_and_kept(tmp_path: Path) -> None:
    raw, out = open_raw(write_raw(tmp_path / "raw")), tmp_path / "store"
    assert from_config.fingerprint_if_needed(make_config(), raw, out, workers=0) is None
    assert not out.exists()
    config = make_config(normalization=("CTNormalization",))
    kept = out / "dataset_fingerprint.json"
    kept.parent.mkdir()
    kept.write_text('{"kept": 1}')
    assert from_config.fingerprint_if_needed(config, raw, out, workers=0) == {"kept": 1}


# -------------------------------------------------------------------------------- plans of configs


def test_plans_take_every_field_from_the_config() -> None:
    config = make_config(
        plans_name="P",
        configuration="c",
        spacing_mm=(3.0, 2.0, 1.0),
        patch_size=(32, 64, 96),
        batch_size=4,
    )
    arch = ArchConfig(
        network="PlainConvUNet",
        features=(4, 8),
        kernel_sizes=((1, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2)),
        blocks=(2, 2),
        decoder_convs=(2,),
    )
    config = dataclasses.replace(config, arch=arch, loss=LossConfig(batch_dice=True))
    plans = from_config.plans_from_config(config, DATASET)
    assert plans.dataset_name == "Dataset001_Test"
    assert (plans.plans_name, plans.configuration, plans.data_identifier) == ("P", "c", "P_c")
    assert plans.spacing == (3.0, 2.0, 1.0)
    assert plans.patch_size == (32, 64, 96)
    assert plans.batch_size == 4
    assert plans.batch_dice is True
    assert plans.normalization == ("ZScoreNormalization",)
    assert plans.use_mask_for_norm == (False,)
    assert plans.intensity == ()
    assert (plans.arch.in_channels, plans.arch.num_outputs) == (1, 3)
    for name in ("network", "features", "kernel_sizes", "strides", "blocks", "decoder_convs"):
        assert getattr(plans.arch, name) == getattr(arch, name)
    assert Plans.from_nnunet(json.loads(json.dumps(plans.to_nnunet())), DATASET) == plans


def test_resampling_of_configs() -> None:
    torch = from_config.plans_from_config(make_config(), DATASET)
    lean = {"force_separate_z": False, "memefficient_seg_resampling": False}
    assert torch.resampling_image.name == torch.resampling_label.name == "resample_torch_fornnunet"
    assert dict(torch.resampling_image.kwargs) == {"is_seg": False, **lean}
    assert dict(torch.resampling_label.kwargs) == {"is_seg": True, **lean}
    spline = from_config.plans_from_config(make_config(resampling="spline"), DATASET)
    for plans in (torch, spline):
        assert plans.resampling_logits.name == "resample_data_or_seg_to_shape"
        assert dict(plans.resampling_logits.kwargs) == separate_z(order=1, is_seg=False)
    assert spline.resampling_image.name == "resample_data_or_seg_to_shape"
    assert dict(spline.resampling_image.kwargs) == separate_z(order=3, is_seg=False)
    assert dict(spline.resampling_label.kwargs) == separate_z(order=1, is_seg=True)


def separate_z(**kwargs: Any) -> dict[str, Any]:
    return {"order_z": 0, "force_separate_z": None, **kwargs}


def test_ct_needs_and_keeps_the_statistics() -> None:
    dataset = DATASET | {"channel_names": {"0": "CT"}}
    with pytest.raises(PlansError, match="fingerprint"):
        from_config.plans_from_config(make_config(), dataset)
    fingerprint = {"foreground_intensity_properties_per_channel": {"0": STATISTICS}}
    plans = from_config.plans_from_config(make_config(), dataset, fingerprint)
    assert plans.normalization == ("CTNormalization",)
    assert [vars(p) for p in plans.intensity] == [STATISTICS]
    zscore = make_config(normalization=("ZScoreNormalization",))
    assert from_config.plans_from_config(zscore, dataset).intensity == ()


def test_normalization_of_another_number_of_channels_is_refused() -> None:
    config = make_config(normalization=("ZScoreNormalization",) * 2)
    with pytest.raises(PlansError, match="2 scheme.*1 channel"):
        from_config.plans_from_config(config, DATASET)
