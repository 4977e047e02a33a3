"""Finding, loading, overriding and comparing configs; every mistake is named."""

import dataclasses
import json

import pytest

from panther_jax.config import demo, loading, schema
from panther_jax.panther.cases import TASK2_CASE

MINIMAL = """
from panther_jax.config import DataConfig, TrainConfig

def get_config():
    return TrainConfig(data=DataConfig(dataset="Dataset001_Toy"))
"""
WITH_ARGUMENT = """
from panther_jax.config import DataConfig, LoopConfig, TrainConfig, parse_argument

def get_config(argument=""):
    given = parse_argument(argument, ("epochs",))
    epochs = int(given.get("epochs", 7))
    return TrainConfig(
        data=DataConfig(dataset="Dataset001_Toy"), loop=LoopConfig(epochs=epochs)
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


def test_names_are_resolved_in_the_documented_order(folder, tmp_path):
    (folder / "toy.py").write_text(MINIMAL)
    assert loading.find_config("toy") == folder / "toy.py"
    assert loading.find_config("toy.py") == folder / "toy.py"
    other = tmp_path / "elsewhere.py"
    other.write_text(MINIMAL)
    assert loading.find_config(str(other)) == other
    assert (
        loading.find_config("smoke").name == "smoke.py"
    )  # next to the package, or installed with it
    (folder / "smoke.py").write_text(MINIMAL)
    assert loading.find_config("smoke") == folder / "smoke.py"


def test_an_unknown_config_lists_folders_and_close_names(folder):
    (folder / "mri_t9.py").write_text(MINIMAL)
    with pytest.raises(schema.ConfigError, match=r"(?s)searched: .*did you mean .*mri_t9") as error:
        loading.find_config("mri_t8")
    assert str(folder) in str(error.value)


def test_arguments_reach_get_config_and_name_the_run(folder):
    (folder / "plain.py").write_text(MINIMAL)
    (folder / "args.py").write_text(WITH_ARGUMENT)
    config, source = loading.load_config("args.py:epochs=3")
    assert config.loop.epochs == 3
    assert source.run_name == "args_epochs_3" and len(source.sha256) == 64
    assert loading.load_config("args")[0].loop.epochs == 7
    with pytest.raises(schema.ConfigError, match="plain.py takes no argument"):
        loading.load_config("plain:epochs=3")
    with pytest.raises(schema.ConfigError, match="'epoch=3' is not understood.*epochs"):
        loading.load_config("args:epoch=3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function get_config"),
        ("def get_config():\n    return 3", "returned int, expected TrainConfig"),
        ("raise RuntimeError('oh')", "cannot be read: RuntimeError: oh"),
        ("def get_config(:", "cannot be read: SyntaxError"),
    ],
)
def test_a_broken_file_is_named(folder, text, message):
    (folder / "broken.py").write_text(text)
    with pytest.raises(schema.ConfigError, match=message):
        loading.load_config("broken")


def test_variants_of_the_t2_stage():
    config, source = loading.load_config(
        "mri_t2.py:aug=none,epochs=150,lr=2e-3,schedule=cosine,init=none"
    )
    assert config.augment.policy == "none" and config.init.bundle is None
    assert (config.loop.epochs, config.optim.lr) == (150, 2e-3)
    assert config.optim.schedule == "cosine_warmup"
    default, _ = loading.load_config("mri_t2")
    assert (default.optim.optimizer, default.optim.lr, default.optim.momentum) == (
        "sgd",
        1e-3,
        0.99,
    )
    assert default.data.patch_size == (192, 192, 192) and default.loop.epochs == 1000
    assert (default.init.bundle, default.init.stem) == ("mri_t1", "reinit")
    from_ct, _ = loading.load_config("mri_t2:init=ct")
    assert from_ct.init.bundle == "ct_pancreas" and "bundle" in from_ct.init.source
    for wrong in ("aug=fancy", "epochs=many", "schedule=linear", "init=ct2"):
        with pytest.raises(schema.ConfigError, match=wrong.split("=")[1]):
            loading.load_config(f"mri_t2:{wrong}")


@pytest.mark.parametrize(
    "name, dataset, modality, bundle, batch",
    [
        ("ct_pancreas", "Dataset999_PancreasPretrain", "ct", "multitalent", 4),
        ("mri_t1", "Dataset901_PANTHER", "t1", "ct_pancreas", 2),
        ("mri_t2", "Dataset902_PANTHER_HR", "t2", "mri_t1", 2),
        ("mri_combined", "Dataset903_PANTHER_COMBINED", "t2", "ct_pancreas", 2),
        (
            "mri_combined_tumor_only",
            "Dataset906_PANTHER_COMBINED_onlyTumor",
            "t2",
            "ct_pancreas",
            2,
        ),
    ],
)
def test_stages_share_the_recipe_and_differ_in_their_data(name, dataset, modality, bundle, batch):
    stage, _ = loading.load_config(name)
    assert (stage.data.dataset, stage.data.modality) == (dataset, modality)
    assert (stage.init.bundle, stage.init.stem) == (bundle, "reinit")
    assert "data/weights/" in stage.init.source and stage.data.source
    assert stage.data.batch_size == batch
    foundation, _ = loading.load_config("multitalent")
    assert stage.arch == foundation.arch
    for field in ("spacing_mm", "patch_size"):
        assert getattr(stage.data, field) == getattr(foundation.data, field)
    assert (stage.optim.lr, stage.optim.optimizer) == (1e-3, "sgd")
    assert stage.validation.checkpoints == ("final", "best")
    variant, _ = loading.load_config(
        f"{name}:val=task2,aug=da5_fork,warmup=15,schedule=poly_warmup"
    )
    assert variant.validation.cases == TASK2_CASE and variant.augment.policy == "da5_fork"
    assert (variant.optim.warmup_epochs, variant.optim.schedule) == (15, "poly_warmup")
    docstring = source_of(name).split('"""')[1]
    for heading in ("Launch:", "Arguments:", "Expected:", "Duration:", "Memory:"):
        assert heading in docstring


def source_of(name):
    return loading.find_config(name).read_text(encoding="utf-8")


def test_demo_changes_data_size_and_budget_only():
    config, _ = loading.load_config("mri_t2")
    small = demo(config)
    for section in ("loss", "validation", "log"):
        assert getattr(small, section) == getattr(config, section)
    assert small.augment.policy == "no_mirroring"
    da5, _ = loading.load_config("mri_t2:aug=da5")
    assert demo(da5).augment == da5.augment
    assert small.arch.features == (8, 16, 32, 64) and small.data.patch_size == (16, 48, 48)
    assert small.loop.total_steps < 1000 and small.init.bundle is None


def test_overrides_are_typed():
    config, _ = loading.load_config("smoke")
    changed = loading.apply_overrides(
        config,
        ["--optim.lr", "0.003", "--data.patch-size", "8", "32", "32", "--loop.seed=4"],
        prog="train",
    )
    assert changed.optim.lr == 0.003 and changed.loop.seed == 4
    assert changed.data.patch_size == (8, 32, 32)
    expected = dataclasses.replace(config.loop, seed=4)
    assert changed.loop == expected and changed.arch == config.arch


@pytest.mark.parametrize(
    "arguments",
    [["--optim.learning-rate", "1"], ["--optim.lr", "fast"], ["--optim.schedule", "linear"]],
)
def test_wrong_overrides_exit_with_two(arguments, capsys):
    config, _ = loading.load_config("smoke")
    with pytest.raises(SystemExit) as stop:
        loading.apply_overrides(config, arguments, prog="train")
    assert stop.value.code == 2
    assert arguments[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("data", "batch_size", 0),
        ("data", "patch_size", (1, 0, 1)),
        ("data", "spacing_mm", (1.0, -1.0, 1.0)),
        ("data", "foreground_oversampling", 1.5),
        ("optim", "lr", 0.0),
        ("optim", "momentum", 1.0),
        ("loop", "epochs", 0),
        ("loop", "seed", -1),
        ("validation", "step_size", 0.0),
        ("log", "every_steps", 0),
    ],
)
def test_values_out_of_range_are_named(section, field, value):
    part = getattr(loading.load_config("smoke")[0], section)
    with pytest.raises(schema.ConfigError, match=f"{section}.{field}.*found"):
        dataclasses.replace(part, **{field: value})


def test_json_round_trip_and_unknown_fields():
    config, _ = loading.load_config("mri_t2")
    stored = json.loads(json.dumps(config.to_json()))
    assert schema.TrainConfig.from_json(stored) == config
    stored["optim"]["rate"] = 1
    with pytest.raises(schema.ConfigError, match=r"config.optim: unknown field.*rate"):
        schema.TrainConfig.from_json(stored)


def test_differences_name_each_leaf():
    config, _ = loading.load_config("smoke")
    other = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=9, seed=2))
    assert loading.differences(config.to_json(), other.to_json()) == [
        "loop.epochs: 2 -> 9",
        "loop.seed: 0 -> 2",
    ]
    assert loading.differences(config.to_json(), json.loads(json.dumps(config.to_json()))) == []
