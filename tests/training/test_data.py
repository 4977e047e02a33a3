"""Which plans a run trains by: the config's, those of a file, those of the store."""

import dataclasses
import json

import numpy as np
import pytest
from planar import planar_smoke
from tiny import make_raw

from panther_jax import train
from panther_jax.base.errors import PlansError
from panther_jax.config.loading import load_config
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError
from panther_jax.planner.from_config import plans_from_config
from panther_jax.store.store import open_store
from panther_jax.training.data import planned, prepare_store
from panther_jax.training.options import Options
from panther_jax.training.settings import resolve


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw(tmp_path_factory.mktemp("raw") / "Dataset902_Tiny", num_cases=2)


@pytest.fixture(scope="module")
def plans_file(raw, tmp_path_factory):
    """Plans of two configurations, 2d and an heir of it, and of a cascade."""
    dataset = json.loads((raw / "dataset.json").read_text())
    config = planar_smoke()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, plans_name="MyPlans", resampling="spline")
    )
    plans = plans_from_config(config, dataset).to_nnunet()
    block = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    block["norm_op_kwargs"]["eps"] = 1e-3  # no config says this
    plans["configurations"]["wide"] = {"inherits_from": "2d", "patch_size": [16, 24]}
    plans["configurations"]["last"] = {"inherits_from": "2d", "previous_stage": "2d"}
    path = tmp_path_factory.mktemp("plans") / "MyPlans.json"
    path.write_text(json.dumps(plans))
    return path


def resolved(*overrides, **options):
    settings, _ = resolve(Options(fold=0, config="smoke", **options), overrides)
    return settings


def test_plans_decide_all_but_the_recipe(plans_file, tmp_path):
    smoke, _ = load_config("smoke")
    settings = resolved(root=tmp_path, from_plans=f"{plans_file}:wide")
    data, arch = settings.data, settings.arch
    assert (data.patch_size, data.spacing_mm, data.batch_size) == ((16, 24), (6.0, 6.0), 2)
    assert (data.plans_name, data.configuration, data.resampling) == ("MyPlans", "wide", "spline")
    assert data.normalization == ("ZScoreNormalization",)
    assert arch == planar_smoke().arch
    assert (settings.optim, settings.loop, settings.augment) == (
        smoke.optim,
        smoke.loop,
        smoke.augment,
    )
    changed = resolved(
        "--data.batch-size", "5", "--data.patch-size", "8", "8",
        root=tmp_path, from_plans=f"{plans_file}:wide",
    )  # fmt: skip
    assert (changed.data.batch_size, changed.data.patch_size) == (5, (8, 8))
    assert changed.data.spacing_mm == (6.0, 6.0)


def test_the_store_is_made_by_the_plans_and_options_outweigh_them(plans_file, raw, tmp_path):
    options = Options(0, tmp_path, raw=raw, from_plans=f"{plans_file}:wide")
    settings, _ = resolve(
        dataclasses.replace(options, config="smoke"), ["--data.patch-size", "8", "16"]
    )
    store = prepare_store(settings, options, Places(tmp_path))
    assert store.folder.name == "MyPlans_wide"
    assert store.plans.patch_size == (8, 16) and store.plans.arch.norm_eps == 1e-3
    assert store.plans.resampling_image.name == "resample_data_or_seg_to_shape"
    assert store.plans.dataset_name == raw.name and store.plans.arch.num_outputs == 3

    smoke, _ = load_config("smoke")
    named = Options(0, tmp_path, store=store.folder)
    with pytest.raises(ConfigError, match=r"(?s)arch.strides: .*data.patch_size: .*--from-plans"):
        prepare_store(planned(smoke, named), named, Places(tmp_path))
    named = dataclasses.replace(named, from_plans="store")
    settings = planned(smoke, named)
    again = prepare_store(settings, named, Places(tmp_path))
    assert again.plans == store.plans
    other = dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, spacing_mm=(5.0, 6.0))
    )
    with pytest.raises(ConfigError, match=r"(?s)spacing: \(6.0, 6.0\) -> \(5.0, 6.0\).*--raw"):
        prepare_store(other, named, Places(tmp_path))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{}", "holds several configurations; name one.*:2d"),
        ("{}:3d", "configuration '3d' not found"),
        ("{}:last", "predictions of '2d'"),
        ("nowhere.json", "nowhere.json is no file"),
        ("store", "needs --store"),
    ],
)
def test_plans_that_cannot_be_used_are_named(plans_file, tmp_path, spec, message):
    named = Options(0, tmp_path, from_plans=spec.format(plans_file))
    smoke, _ = load_config("smoke")
    with pytest.raises((PlansError, ConfigError, FileNotFoundError), match=f"(?s){message}"):
        planned(smoke, named)
    assert train.main(["--config", "smoke", "--from-plans", spec.format(plans_file)]) == 2


def test_a_run_keeps_the_plans_that_it_trained_by(plans_file, raw, tmp_path):
    arguments = ["--config", "smoke", "--root", tmp_path, "--raw", raw, "--prepare-only", "--quiet"]
    assert train.main([*map(str, arguments), "--from-plans", f"{plans_file}:2d"]) == 0
    store = open_store(tmp_path / "store" / raw.name / "MyPlans_2d")
    from panther_jax.training.workdir import open_workdir

    options = Options("all", tmp_path, store=store.folder, from_plans="store")
    settings, _ = resolve(
        dataclasses.replace(options, config="smoke"), ["--data.patch-size", "8", "8"]
    )
    found = prepare_store(settings, options, Places(tmp_path))
    open_workdir(tmp_path / "run", tmp_path / "run" / "fold_all", settings, found, options)
    kept = json.loads((tmp_path / "run" / "plans.json").read_text())
    assert kept["configurations"]["2d"]["patch_size"] == [8, 8]
    assert np.isclose(found.plans.arch.norm_eps, 1e-3)
