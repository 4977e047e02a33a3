import json
import shutil

import numpy as np
import pytest
from tiny import IDENTITY, LABELS, make_raw

from panther_jax import ensemble
from panther_jax.base.console import LOGGER
from panther_jax.ensembles import selection, specification
from panther_jax.evaluation import folds, metrics
from panther_jax.images import imageio
from panther_jax.plans.geometry import Geometry

SHAPE, SPACING = (6, 14, 12), (3.0, 1.2, 1.2)
GRID = Geometry(SHAPE, SPACING, (0.0, 0.0, 0.0), IDENTITY)
NUM_CASES, NUM_FOLDS = 6, 3
# Tumour probability of the candidates (columns) in groups of voxels. Mixed 2:1:0 the first three,
# which are tumour, lie above one half and the fourth, which is not, below; no other mixture of up
# to ten members is right everywhere, and the third candidate only does harm.
GROUPS = (
    (30, (0.95, 0.00, 0.20)),
    (25, (0.30, 0.98, 0.20)),
    (15, (0.45, 0.80, 0.20)),
    (40, (0.00, 0.90, 0.95)),
)
SPLITS = [
    {
        "train": [f"case_{n}" for n in range(NUM_CASES) if n % NUM_FOLDS != fold],
        "val": [f"case_{n}" for n in range(NUM_CASES) if n % NUM_FOLDS == fold],
    }
    for fold in range(NUM_FOLDS)
]


@pytest.fixture(autouse=True)
def no_handlers_left():
    """Commands log to the standard error of their test, which is closed after it."""
    yield
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)


def tumor_probability(candidate, number):
    """A candidate's map of a case, and the reference: a block that moves a little by case.

    The groups lie in it one after the other, but for the last, which is far away.
    """
    voxels = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    shift = number % 3
    block = voxels[1:5, 2 + shift : 7 + shift, 1:5].ravel()
    far = voxels[1:5, 2 + shift : 4 + shift, 7:12].ravel()
    found, reference = np.zeros(np.prod(SHAPE)), np.zeros(np.prod(SHAPE), np.int16)
    start = 0
    for i, (size, values) in enumerate(GROUPS):
        places = far if i == 3 else block[start : start + size]
        found[places] = values[candidate]
        reference[places] = 1 if i < 3 else 2
        start += size
    assert len(far) == GROUPS[3][0]
    return found.reshape(SHAPE), reference.reshape(SHAPE)


def make_candidates(folder, *, labels=LABELS, num_candidates=3):
    """References, and cross-validated runs with probabilities, their splits beside them."""
    for number in range(NUM_CASES):
        _, reference = tumor_probability(0, number)
        imageio.write_label(folder / "raw" / "labelsTr" / f"case_{number}.mha", reference, GRID)
    (folder / "raw" / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    (folder / "splits_final.json").write_text(json.dumps(SPLITS))
    runs = [folder / "runs" / name for name in ("first", "second", "third")[:num_candidates]]
    for candidate, run in enumerate(runs):
        for number in range(NUM_CASES):
            validation = run / f"fold_{number % NUM_FOLDS}" / "validation_final"
            tumor, _ = tumor_probability(candidate, number)
            rest = [1 - tumor] if len(labels) == 2 else [1 - tumor, 0 * tumor]
            probabilities = np.stack([rest[0], tumor, *rest[1:]]).astype(np.float32)
            imageio.write_label(validation / f"case_{number}.mha", probabilities.argmax(0), GRID)
            np.savez_compressed(validation / f"case_{number}.npz", probabilities=probabilities)
        for fold, split in enumerate(SPLITS):
            entry = {"training_cases": split["train"]}
            (run / f"fold_{fold}" / "run.json").write_text(json.dumps(entry))
        (run / "dataset.json").write_text(json.dumps({"labels": labels}))
        settings = {"validation": {"mirror": candidate > 0, "step_size": 0.25}}
        (run / "config.json").write_text(json.dumps(settings))
    return runs


def select(folder, runs, *arguments, output="ensemble.json"):
    given = ["--candidates", *runs, "--references", folder / "raw", "--output", folder / output]
    return ensemble.main(["select", *map(str, given), *map(str, arguments), "--workers", "1"])


# ---------------------------------------------------------------------------------------- found


def test_the_best_mixture_of_three_candidates_is_found(tmp_path, capsys):
    runs = make_candidates(tmp_path)
    assert select(tmp_path, runs) == 0
    text = capsys.readouterr().out
    spec = specification.read_ensemble(tmp_path / "ensemble.json")
    assert [(m.name, m.weight) for m in spec.members] == [("first", 2.0), ("second", 1.0)]
    assert [m.model.resolve() for m in spec.members] == [r.resolve() for r in runs[:2]]
    assert spec.members[0].folds == ("0", "1", "2") and spec.members[0].step_size == 0.25
    assert [m.mirror_axes for m in spec.members] == [(), "checkpoint"]
    written = json.loads((tmp_path / "ensemble.json").read_text())
    assert written["members"][0]["model"] == "runs/first"  # relative to the file

    report = json.loads((tmp_path / "ensemble.selection.json").read_text())
    assert [s["added"] for s in report["steps"]] == ["first", "second", "first"]
    assert report["final"]["members"] == {"first": 2, "second": 1}
    best = {"mean_volumetric_dice": 1.0, "mean_surface_dice": 1.0, "mean_hausdorff95": 0.0}
    assert {k: report["final"]["aggregates"][k] for k in best} == best
    assert report["final"]["aggregates"]["tumor_burden_rmse"] == 0.0
    assert report["num_cases"] == NUM_CASES and "2 × first, 1 × second" in text
    for candidate in report["candidates"]:
        assert candidate["name"] in text and candidate["objective"] <= 1.0
    assert report["candidates"][0]["aggregates"]["mean_volumetric_dice"] == pytest.approx(
        2 * 30 / (70 + 30)  # the first alone finds its own group
    )
    assert not list(tmp_path.glob(".selection-*"))  # the cache is gone

    assert select(tmp_path, runs) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_no_other_mixture_is_as_good(tmp_path):
    """All mixtures of up to four members, by brute force on whole grids."""
    dice = {}
    for counts in np.ndindex(5, 5, 5):
        if 0 < sum(counts) <= 4:
            found = []
            for number in range(NUM_CASES):
                parts = [tumor_probability(c, number) for c in range(3)]
                mixed = sum(n * p for n, (p, _) in zip(counts, parts, strict=True)) / sum(counts)
                found.append(metrics.dice(parts[0][1] == 1, mixed > 0.5))
            dice[counts] = np.mean(found)
    best = max(dice.values())
    assert best == 1.0 and [c for c, d in dice.items() if d == best] == [(2, 1, 0)]


def test_metrics_and_weights_decide(tmp_path):
    runs = make_candidates(tmp_path)
    arguments = ("--metric", "dice", "hd95", "--weights", 3, "1", "--max-members", 1)
    assert select(tmp_path, runs, *arguments) == 0
    report = json.loads((tmp_path / "ensemble.selection.json").read_text())
    assert report["metrics"] == {"mean_volumetric_dice": 3.0, "mean_hausdorff95": 1.0}
    assert sum(report["final"]["members"].values()) == 1
    assert select(tmp_path, runs, "--metric", "dice", "--weights", 1, 2) == 2
    assert select(tmp_path, runs, "--metric", "dice", "--weights", -1) == 2


def test_candidates_of_the_tumor_alone_take_part(tmp_path):
    full = make_candidates(tmp_path, num_candidates=1)
    other = tmp_path / "other"
    tumor_only = make_candidates(other, labels={"background": 0, "tumor": 1}, num_candidates=2)
    assert select(tmp_path, [full[0], tumor_only[1]], "--metric", "dice") == 0
    report = json.loads((tmp_path / "ensemble.selection.json").read_text())
    dice = [c["aggregates"]["mean_volumetric_dice"] for c in report["candidates"]]
    # alone each decides by its own classes; the second finds two groups and a wrong one
    assert dice == pytest.approx([2 * 30 / 100, 2 * 40 / (70 + 80)])


def test_workers_change_nothing(tmp_path):
    runs = make_candidates(tmp_path)
    for number in (1, 2):
        name = f"{number}.json"
        assert select(tmp_path, runs, "--workers", number, output=name) == 0
    one, two = (json.loads((tmp_path / f"{n}.selection.json").read_text()) for n in (1, 2))
    assert one | {"ensemble": ""} == two | {"ensemble": ""}


# -------------------------------------------------------------------------------------- refused


def test_cases_that_were_trained_on_are_refused(tmp_path, capsys):
    runs = make_candidates(tmp_path)
    path = runs[1] / "fold_2" / "run.json"
    path.write_text(json.dumps({"training_cases": ["case_0", "case_2"]}))
    assert select(tmp_path, runs) == 1
    log = capsys.readouterr().err
    assert "1 case(s) were also trained on: case_2" in log and "second" in log
    assert not (tmp_path / "ensemble.json").exists()

    path.write_text(json.dumps({}))  # not recorded: then by the splits
    assert select(tmp_path, runs) == 1
    assert "--splits FILE" in capsys.readouterr().err
    assert select(tmp_path, runs, "--splits", tmp_path / "splits_final.json") == 0
    wrong = [SPLITS[0], SPLITS[2], SPLITS[1]]
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert select(tmp_path, runs, "--splits", tmp_path / "wrong.json", "--overwrite") == 1
    assert "were also trained on: case_2, case_5" in capsys.readouterr().err
    (tmp_path / "short.json").write_text(json.dumps(SPLITS[:2]))
    assert select(tmp_path, runs, "--splits", tmp_path / "short.json", "--overwrite") == 1
    assert "has 2 folds" in capsys.readouterr().err

    (runs[1] / "fold_2").rename(runs[1] / "fold_all")
    assert select(tmp_path, runs, "--overwrite") == 1
    log = capsys.readouterr().err
    assert "fold_all is left out" in log and "lack cases that others validated" in log
    for fold in ("fold_0", "fold_1"):
        shutil.rmtree(runs[1] / fold)
    assert select(tmp_path, runs, "--overwrite") == 1
    assert "trained on all cases" in capsys.readouterr().err


def test_splits_are_taken_from_the_store_of_the_references(tmp_path, capsys):
    """A run that has not recorded its cases, validated with the references of a store."""
    (run,) = make_candidates(tmp_path, num_candidates=1)
    fold = folds.find_folds([run])[0]
    assert folds.store_of(fold) is None
    store = tmp_path / "store"
    (store / "references").mkdir(parents=True)
    for path in (tmp_path / "raw" / "labelsTr").iterdir():
        (store / "references" / path.name).write_bytes(path.read_bytes())
    (store / "plans.json").write_text("{}")
    entries = [
        {"prediction_file": p.name, "reference_file": str(store / "references" / p.name)}
        for p in fold.predictions.values()
    ]
    (fold.validation / "summary.json").write_text(json.dumps({"metric_per_case": entries}))
    assert folds.store_of(folds.find_folds([run])[0]) == store


def test_missing_cases_and_probabilities(tmp_path, capsys):
    runs = make_candidates(tmp_path)
    gone = runs[2] / "fold_1" / "validation_final"
    for ending in (".mha", ".npz"):
        (gone / f"case_4{ending}").unlink()
    assert select(tmp_path, runs) == 1
    assert "third: 1: case_4" in capsys.readouterr().err
    assert select(tmp_path, runs, "--allow-missing") == 0
    report = json.loads((tmp_path / "ensemble.selection.json").read_text())
    assert report["num_cases"] == NUM_CASES - 1 and "case_4" not in report["cases"]

    (gone / "case_1.npz").unlink()
    assert select(tmp_path, runs, "--allow-missing", "--overwrite") == 1
    log = capsys.readouterr().err
    assert "lacks the probabilities of 1 case(s): case_1" in log and "--store" in log
    (runs[2] / "config.json").unlink()
    assert select(tmp_path, runs, "--allow-missing", "--overwrite") == 1
    assert "nnUNetv2_train" in capsys.readouterr().err


def test_candidates_that_make_no_sense(tmp_path, capsys):
    runs = make_candidates(tmp_path)
    for given, message in (
        ([runs[0], runs[0]], "named twice"),
        ([tmp_path / "none"], "is not a folder"),
        ([runs[0].parent], "holds no fold_K folder"),
    ):
        assert select(tmp_path, given) == 1
        assert message in capsys.readouterr().err
    (runs[1] / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "cyst": 1}}))
    assert select(tmp_path, runs) == 1
    assert "does not predict 'tumor'" in capsys.readouterr().err
    damaged = runs[0] / "fold_0" / "validation_final" / "case_0.npz"
    damaged.write_bytes(b"PK")
    assert select(tmp_path, [runs[0], runs[2]]) == 1
    assert "case_0" in capsys.readouterr().err
    assert select(tmp_path, runs, "--max-members", 0) == 2


def test_names_of_like_named_runs_differ(tmp_path):
    one = make_candidates(tmp_path / "a")
    other = make_candidates(tmp_path / "b")
    found = folds.open_candidates([one[0], other[0], one[1]])
    assert [c.name for c in found] == ["first (1)", "first (2)", "second"]
    assert selection.MAX_MEMBERS == 10  # spec 05 §10.5


def test_missing_probabilities_are_computed_from_the_checkpoint(tmp_path, capsys):
    """They decide as the validation did, and what was validated stays as it was."""
    import jax
    import jax.numpy as jnp

    from panther_jax.config.loading import load_config
    from panther_jax.config.places import Places
    from panther_jax.inference import members
    from panther_jax.network import unet
    from panther_jax.store.folds import fold_cases
    from panther_jax.training import data, validation, workdir
    from panther_jax.training.options import Options
    from panther_jax.weights.checkpoint import Checkpoints, Counters, TrainState

    raw, root = make_raw(tmp_path / "Dataset902_Tiny"), tmp_path / "root"
    config, _ = load_config("smoke")
    options = Options(fold=0, root=root, raw=raw)
    store = data.prepare_store(config, options, Places(root))
    run = root / "runs" / "smoke"
    workdir.open_workdir(run, run / "fold_0", config, store, options)
    net = unet.build(store.plans.arch, unet.Execution.auto("float32"))
    params = unet.init_params(net.arch, jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, {"none": jnp.zeros(1)})
    Checkpoints(run / "fold_0" / "checkpoints").save("final", state, Counters())
    fold = run / "fold_0" / "validation_final"
    predict = validation.fold_predictor(
        store.plans, config.validation, dtype="float32", mirror_axes=()
    )
    validation.validate(store, fold_cases(store, 0)[1], predict, params, fold)
    before = {p.name: p.read_bytes() for p in fold.iterdir()}
    assert not list(fold.glob("*.npz"))
    output = tmp_path / "spec.json"
    given = ["select", "--candidates", run, "--references", raw, "--output", output]
    assert ensemble.main([str(a) for a in given]) == 0
    labels = list(folds.label_files(fold)[0].items())
    for case, path in labels:
        with np.load(fold / f"{case}.npz") as found:
            decided = found["probabilities"].argmax(axis=0)
        # argmax of probabilities and of logits may differ at ties (spec 05 §8.1)
        assert (decided == imageio.read_label(path)[0]).mean() > 0.999
    assert labels and {n: (fold / n).read_bytes() for n in before} == before
    assert not list((run / "fold_0").glob(".validation*"))
    spec = specification.read_ensemble(output)
    assert [(m.name, m.folds, m.mirror_axes) for m in spec.members] == [("smoke", ("0",), ())]
    (member,) = members.load_ensemble(spec).members  # as `predict --ensemble` does
    assert member.model.folds == ("0",) and member.step_size == config.validation.step_size
    report = json.loads((tmp_path / "spec.selection.json").read_text())
    panther = json.loads((fold / "panther.json").read_text())
    assert report["final"]["aggregates"] == pytest.approx(panther["aggregates"], rel=1e-3)

    for file in fold.glob("*.npz"):
        file.unlink()
    plans = json.loads((run / "plans.json").read_text())
    plans["configurations"]["smoke"]["spacing"] = [3.0, 6.0, 6.0]
    (run / "plans.json").write_text(json.dumps(plans))
    assert ensemble.main([*map(str, given), "--overwrite"]) == 1
    assert "was not made for" in capsys.readouterr().err and not list(fold.glob("*.npz"))
