"""Importing: parity with the reference's logits, what is written and reported, starting weights."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weight_files as made
from torch_names import without_prefixes

torch = pytest.importorskip("torch")
from panther_jax.base.errors import (
    CheckpointError,
    PlansError,
)
from panther_jax.base.folds import FoldsError
from panther_jax.network import unet
from panther_jax.plans.architecture import ArchSpec
from panther_jax.weights.bundle import load_bundle
from panther_jax.weights.transfer import transfer
from weight_conversion import export_nnunet, import_nnunet, mapping, torch_files
from weight_conversion.mapping import ConversionError

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-4  # of the reference cases, absolute, float32


def logits(arch, params, image):
    """Our logits for a channel-first image, channel first."""
    net = unet.build(arch, unet.Execution("xla", exact_stats=True))
    tree = jax.tree.map(jnp.asarray, params)
    x = jnp.asarray(np.moveaxis(image, 1, -1))
    outputs = jax.jit(lambda p, x: unet.apply(net, p, x))(tree, x)
    return [np.moveaxis(np.asarray(o), -1, 1) for o in outputs]


def assert_logits(arch, params, image, expected):
    outputs = logits(arch, params, image)
    assert len(outputs) == len(expected)
    for output, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, wanted, atol=TOLERANCE, rtol=0)


def same_trees(a, b):
    a, b = dict(unet.walk(a)), dict(unet.walk(b))
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def model_folders(golden):
    return sorted({p.parent.parent for p in golden.glob("*/**/fold_*/checkpoint_final.pth")})


# -------------------------------------------------------------------------------------- golden


@pytest.mark.golden
def test_imported_golden_networks_give_the_reference_logits(golden, tmp_path, capsys):
    tested = 0
    for number, folder in enumerate(model_folders(golden)):
        out = tmp_path / str(number)
        assert import_nnunet.main(["--model_folder", str(folder), "--out", str(out)]) == 0
        assert str(out) in capsys.readouterr().out
        bundle = load_bundle(out)
        assert sorted(bundle.params) == sorted(
            p.parent.name.removeprefix("fold_") for p in folder.glob("fold_*/checkpoint_final.pth")
        )
        reference = folder.parent / "io.npz"
        if not reference.is_file():
            continue
        io = np.load(reference)
        count = sum(name.startswith("logits_") for name in io.files)
        expected = [io[f"logits_{i}"] for i in range(count)]
        for params in bundle.params.values():
            assert_logits(bundle.plans.arch, params, io["input"], expected)
        tested += 1
    assert tested


@pytest.mark.golden
def test_import_export_import_is_bit_exact(golden, tmp_path):
    for number, folder in enumerate(model_folders(golden)):
        first, again = tmp_path / f"{number}a", tmp_path / f"{number}b"
        imported = import_nnunet.read_model_folder(folder)
        imported.save(first)
        exported = tmp_path / f"{number}x"
        export_nnunet.export(first, exported)
        import_nnunet.read_model_folder(exported).save(again)
        assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in again.iterdir())
        for path in first.glob("*.safetensors"):
            assert path.read_bytes() == (again / path.name).read_bytes()
        for path in folder.glob("fold_*/checkpoint_final.pth"):
            original = torch_files.read_checkpoint(path)
            copy = torch_files.read_checkpoint(exported / path.relative_to(folder))
            names = without_prefixes(original.weights)  # ours are written bare
            assert list(copy.weights) == names, "all names, in torch's order"
            for name, value in zip(names, original.weights.values(), strict=True):
                np.testing.assert_array_equal(copy.weights[name], value)
            assert set(copy.entries) == set(original.entries)
            assert copy.mirror_axes == original.mirror_axes


@pytest.mark.golden
def test_multi_stem_cases(golden, tmp_path):
    folder = golden / "weights" / "multistem"
    meta = json.loads((folder / "meta.json").read_text())
    io = np.load(folder / "io.npz")
    sources = sorted(folder.glob("*checkpoint*.pth"))
    with pytest.raises(ConversionError) as caught:
        import_nnunet.read_single(sources[0], stem="copy")
    for stem, channels in meta["stems"].items():
        assert f"{stem}: {channels} input channel" in str(caught.value)
    for case in meta["cases"]:
        arch = ArchSpec.from_nnunet(
            meta["architecture"],
            in_channels=case["input_channels"],
            num_outputs=case["num_classes"],
        )
        chosen = "reinit" if case["rule"] == "panther" else case["stem_id"]
        out = tmp_path / str(case["index"])
        arguments = ["--checkpoint", str(sources[0]), "--stem", chosen, "--out", str(out)]
        assert import_nnunet.main(arguments) == 0
        bundle = load_bundle(out)
        assert bundle.absent == (("stem", "heads") if chosen == "reinit" else ("heads",))
        init = torch_files.read_checkpoint(folder / case["target_init"])
        fresh = mapping.convert(init.weights, arch).params
        rule = "reinit" if chosen == "reinit" else "copy"
        started = transfer(bundle.params[""], fresh, stem=rule)
        index = case["index"]
        names = sorted(n for n in io.files if n.startswith(f"case{index}_logits_"))
        assert names
        expected = [io[name] for name in names]
        assert_logits(arch, started.params, io[f"input_{index}"], expected)


# ------------------------------------------------------------------------------------- a bundle


@pytest.mark.parametrize("name", made.NETWORKS)
def test_a_model_folder_becomes_a_bundle_with_its_origin(tmp_path, name):
    arch = made.NETWORKS[name]
    folder = made.write_model_folder(tmp_path / "m", arch, ("0", "3"))
    out = tmp_path / "b"
    arguments = ["--model-folder", str(folder), "--out", str(out), "--license", "CC-BY-4.0"]
    assert import_nnunet.main(arguments) == 0
    bundle = load_bundle(out)
    assert bundle.plans.arch == arch and bundle.absent == ()
    assert same_trees(bundle.params["0"], made.random_params(arch, 0))
    assert same_trees(bundle.params["3"], made.random_params(arch, 1))
    assert bundle.mirror_axes == (0, 1, 2)[: arch.ndim]
    provenance = bundle.provenance
    assert provenance["license"] == "CC-BY-4.0" and provenance["source"] == str(folder)
    record = provenance["checkpoints"]["3"]
    assert len(record["sha256"]) == 64 and record["best_ema"] == 0.5 and record["epochs"] == 2
    memory = import_nnunet.read_model_folder(folder).bundle()
    assert memory.plans == bundle.plans and same_trees(memory.params["0"], bundle.params["0"])


def test_the_library_reads_what_our_writer_writes(tmp_path):
    from safetensors.numpy import load_file

    made_ = import_nnunet.read_model_folder(made.write_model_folder(tmp_path / "m", made.DROPPED))
    made_.save(tmp_path / "b")
    found = load_file(tmp_path / "b" / "fold_0.safetensors")
    expected = {"/".join(p): leaf for p, leaf in unet.walk(made.random_params(made.DROPPED))}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[k], expected[k]) for k in found)


def test_a_damaged_or_foreign_bundle_is_refused(tmp_path):
    imported = import_nnunet.read_model_folder(made.write_model_folder(tmp_path / "m", made.FLAT))
    imported.save(tmp_path / "b")
    weights = tmp_path / "b" / "fold_0.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_bundle(tmp_path / "b")
    other = dataclasses.replace(imported, plans=made.make_plans(made.RESIDUAL).to_nnunet())
    other.save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="does not fit the plans.json beside it"):
        load_bundle(tmp_path / "c")


def test_folds_and_checkpoints_are_chosen_by_one_rule(tmp_path, caplog):
    folder = made.write_model_folder(tmp_path / "m", made.FLAT, ("0", "1", "all"))
    assert list(import_nnunet.read_model_folder(folder).params) == ["0", "1"]
    assert list(import_nnunet.read_model_folder(folder, folds=["all"]).params) == ["0", "1"]
    assert list(import_nnunet.read_model_folder(folder, folds=["fold_all"]).params) == ["all"]
    with pytest.raises(FoldsError, match="fold 7; there are: 0, 1, all"):
        import_nnunet.read_model_folder(folder, folds=["7"])
    with pytest.raises(FileNotFoundError, match="found: fold_0/checkpoint_final.pth"):
        import_nnunet.read_model_folder(folder, checkpoint="checkpoint_x.pth")
    (folder / "fold_1" / "checkpoint_final.pth").rename(folder / "fold_1" / "checkpoint_best.pth")
    assert list(import_nnunet.find_folds(folder)) == ["0"]
    assert list(import_nnunet.find_folds(folder, checkpoint="best")) == ["1"]
    with caplog.at_level("WARNING", "panther_jax"):
        assert list(import_nnunet.find_folds(folder, ["1"])) == ["1"]
    assert "no final checkpoint of fold 1: the best one is taken" in caplog.text
    base = ["--model-folder", str(folder), "--out"]
    for number, spelling in enumerate(
        (["--checkpoint", "best"], ["--checkpoint-name", "checkpoint_best.pth"])
    ):
        assert import_nnunet.main([*base, str(tmp_path / f"b{number}"), *spelling]) == 0
        assert set(load_bundle(tmp_path / f"b{number}").params) == {"1"}


def test_nothing_is_written_where_something_does_not_fit(tmp_path, capsys):
    folder = made.write_model_folder(tmp_path / "m", made.RESIDUAL)
    (folder / "plans.json").write_text(json.dumps(made.make_plans(made.PLAIN).to_nnunet()))
    out = tmp_path / "b"
    before = sorted(tmp_path.rglob("*"))
    assert import_nnunet.main(["--model-folder", str(folder), "--out", str(out)]) == 1
    assert "The file is of a ResidualEncoderUNet" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_bundle_is_kept_unless_overwritten(tmp_path, capsys):
    folder, out = made.write_model_folder(tmp_path / "m", made.FLAT), tmp_path / "b"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    arguments = ["--model-folder", str(folder), "--out", str(out)]
    assert import_nnunet.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err and (out / "mine.txt").is_file()
    assert import_nnunet.main([*arguments, "--overwrite"]) == 0
    assert not (out / "mine.txt").exists() and load_bundle(out).params


def test_wrong_usage_is_told_apart(tmp_path):
    with pytest.raises(SystemExit) as caught:
        import_nnunet.main(["--out", str(tmp_path / "b")])
    assert caught.value.code == 2
    missing = ["--model-folder", str(tmp_path / "no"), "--out", str(tmp_path / "b")]
    assert import_nnunet.main(missing) == 1


@pytest.mark.parametrize("module", ["import_nnunet", "export_nnunet", "verify"])
def test_help_is_quick_and_shows_an_example(module):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"weight_conversion.{module}", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0 and "example:" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"jax", "torch"}, "heavy libraries load only when there is work"
    assert seconds < 20  # two on an idle machine; what counts is the line above


# ---------------------------------------------------------------------------- plans and stems


def test_configurations_inherit_and_old_plans_are_understood(tmp_path):
    plans = made.make_plans(made.PLAIN).to_nnunet()
    entry = plans["configurations"]["3d_fullres"]
    old = {key: value for key, value in entry.items() if key != "architecture"}
    arch = dataclasses.replace(made.PLAIN, features=(4, 6, 6), nonlin_first=False)
    old |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 6,
        "n_conv_per_stage_encoder": list(arch.blocks),
        "n_conv_per_stage_decoder": list(arch.decoder_convs),
        "conv_kernel_sizes": [list(k) for k in arch.kernel_sizes],
        "pool_op_kernel_sizes": [list(s) for s in arch.strides],
    }
    plans["configurations"] = {"base": old, "3d_fullres": {"inherits_from": "base"}}
    folder = made.write_model_folder(tmp_path / "m", arch)
    (folder / "plans.json").write_text(json.dumps(plans))
    bundle = import_nnunet.read_model_folder(folder).bundle()
    assert bundle.plans.arch == arch and bundle.plans.configuration == "3d_fullres"
    del old["conv_kernel_sizes"]
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(PlansError, match="'conv_kernel_sizes' of the older format"):
        import_nnunet.read_model_folder(folder)


def test_a_second_cascade_stage_is_refused(tmp_path):
    folder = made.write_model_folder(tmp_path / "m", made.FLAT)
    plans = made.make_plans(made.FLAT).to_nnunet()
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(PlansError, match="second stage of nnU-Net's cascade"):
        import_nnunet.read_model_folder(folder)


def test_a_multi_dataset_file_starts_training_but_does_not_predict(tmp_path, capsys):
    path, out = tmp_path / "checkpoint_final.pth", tmp_path / "b"
    content = made.checkpoint(made.RESIDUAL, current_epoch=4000)
    stems, heads = {"035": 1, "221": 2}, {"035": 7, "221": 2}
    content["network_weights"] = made.multi_state(made.RESIDUAL, stems, heads)
    content["init_args"]["dataset_json"] = {"dataset_ids": ["035", "221"]}
    torch.save(content, path)
    base = ["--checkpoint", str(path), "--out", str(out)]
    assert import_nnunet.main(base) == 1 and not out.exists()
    assert "221: 2 input channel(s)" in capsys.readouterr().err
    assert import_nnunet.main([*base, "--stem", "221"]) == 0
    bundle = load_bundle(out)
    assert bundle.plans.arch.in_channels == 2
    assert import_nnunet.main([*base, "--stem", "reinit", "--overwrite"]) == 0
    bundle = load_bundle(out)
    assert bundle.absent == ("stem", "heads")
    with pytest.raises(CheckpointError, match="no stem and no heads"):
        bundle.require_complete("predict")
    arch = dataclasses.replace(made.RESIDUAL, in_channels=2, num_outputs=4)
    fresh = made.random_params(arch, seed=9)
    started = transfer(bundle.params[""], fresh, stem="reinit")
    assert same_trees(started.params["encoder"]["stem"], fresh["encoder"]["stem"])
    assert same_trees(started.params["decoder"]["heads"], fresh["decoder"]["heads"])
    source = made.random_params(made.RESIDUAL)
    assert same_trees(started.params["encoder"]["stages"], source["encoder"]["stages"])
    assert same_trees(started.params["decoder"]["transpconvs"], source["decoder"]["transpconvs"])
    with pytest.raises(CheckpointError):
        transfer(bundle.params[""], fresh, stem="copy")


# ------------------------------------------------------------------------------------ full size


@pytest.mark.slow
def test_a_full_size_file_in_the_grammar_of_the_foundation_weights(tmp_path):
    stems = {"035": 1, "221": 2, "351_5": 1}
    heads = {"035": 3, "221": 2, "351_5": 19}
    content = made.checkpoint(made.RESENC_L, trainer_name="MultiTalent_trainer_multistems_4000ep")
    content["network_weights"] = made.multi_state(made.RESENC_L, stems, heads)
    content["init_args"]["dataset_json"] = {"dataset_ids": list(stems)}
    folder = tmp_path / "MultiTalent__Plans__3d_fullres" / "fold_all"
    folder.mkdir(parents=True)
    torch.save(content, folder / "checkpoint_final.pth")
    (folder.parent / "plans.json").write_text(json.dumps(content["init_args"]["plans"]))
    (folder.parent / "dataset.json").write_text(json.dumps({"dataset_ids": list(stems)}))
    del content
    out = tmp_path / "multitalent"
    arguments = ["--model-folder", str(folder.parent), "--folds", "all", "--stem", "reinit"]
    done = subprocess.run(
        [sys.executable, "-m", "weight_conversion.import_nnunet", *arguments, "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "taken: 250 tensors" in done.stdout  # spec 01 §5.2: 250 of 264
    bundle = load_bundle(out)
    fresh = unet.init_params(made.RESENC_L, jax.random.key(0))
    started = transfer(bundle.params["all"], fresh, stem="reinit")
    assert len(started.loaded) == 250 and len(started.skipped) == 14
    source = made.random_params(made.RESENC_L)
    assert same_trees(started.params["encoder"]["stages"], source["encoder"]["stages"])
