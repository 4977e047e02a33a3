"""Make small run folders as training leaves them: data, label maps, scores, epochs."""

import json
import math

import numpy as np

from panther_jax.config.schema import DataConfig, TrainConfig
from panther_jax.evaluation import metrics
from panther_jax.images import imageio
from panther_jax.plans.geometry import Geometry

SHAPE = (10, 24, 28)
SPACING = (3.0, 2.0, 2.0)
DATASET = "Dataset902_Made"
PLANS = "nnUNetResEncUNetLPlans_demo"
EYE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def geometry(shape=SHAPE):
    return Geometry(shape, SPACING, (0.0, 0.0, 0.0), EYE)


def label_map(radius, shift=0, shape=SHAPE):
    z, y, x = np.indices(shape)
    middle = [n / 2 for n in shape]
    away = np.hypot((z - middle[0]) * 1.5, np.hypot(y - middle[1], x - middle[2] - shift))
    label = np.where(away < radius + 3, 2, 0).astype(np.int16)
    label[away < radius] = 1
    return label


def make_data(root, cases, shape=SHAPE):
    """Raw data set and the references of a store; ``cases`` maps ids to radii (0: no tumour)."""
    raw, store = root / "raw" / DATASET, root / "store" / DATASET / PLANS
    random = np.random.default_rng(0)
    for name, radius in cases.items():
        image = random.normal(size=shape).astype(np.float32) + label_map(radius, shape=shape)
        imageio.write_image(raw / "imagesTr" / f"{name}_0000.mha", image, geometry(shape))
        for folder in (raw / "labelsTr", store / "references"):
            imageio.write_label(
                folder / f"{name}.mha", label_map(radius, shape=shape), geometry(shape)
            )
    for folder in (raw, store):
        (folder / "dataset.json").write_text(json.dumps(dataset_json(len(cases))))


def dataset_json(num_cases):
    return {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumor": 1, "pancreas": 2},
        "numTraining": num_cases,
        "file_ending": ".mha",
    }


def make_run(
    root, name, folds, *, shift=1, epochs=5, finished=True, lr=0.01, checkpoints=("final", "best")
):
    """A run; ``folds`` maps fold names to ``{case: radius of the prediction}``."""
    run = root / "runs" / name
    run.mkdir(parents=True)
    config = TrainConfig(DataConfig(dataset=DATASET)).to_json()
    config["loop"]["epochs"], config["optim"]["lr"] = 5, lr
    (run / "config.json").write_text(json.dumps(config))
    plans = {"dataset_name": DATASET, "transpose_backward": [0, 1, 2], "plans_name": "made"}
    (run / "plans.json").write_text(json.dumps(plans))
    (run / "dataset.json").write_text(json.dumps(dataset_json(3)))
    for fold, cases in folds.items():
        folder = run / fold
        folder.mkdir()
        info = {"panther_jax": "0.1.0", "packages": {"jax": "0.10.2"}, "device": "1 x cpu"}
        info |= {"finished": finished, "command": ["train.py"], "seed": 0, "git_revision": None}
        (folder / "run.json").write_text(json.dumps(info))
        rows = [epoch_row(e) for e in range(epochs)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        if finished:
            for checkpoint in checkpoints:
                make_validation(root, folder / f"validation_{checkpoint}", cases, shift)
    return run


def epoch_row(epoch):
    return {
        "step": 10 * (epoch + 1),
        "epoch": epoch,
        "train_loss": 0.5 - 0.1 * epoch,
        "validation_loss": 0.5 - 0.08 * epoch,
        "pseudo_dice": {"tumor": None if epoch == 0 else 0.1 * epoch, "pancreas": 0.15 * epoch},
        "mean_pseudo_dice": 0.1 * epoch,
        "ema": 0.09 * epoch,
        "lr": 0.01 * (1 - epoch / 10),
        "seconds": 2.5,
        "wait_share": 0.01,
    }


def make_validation(root, folder, cases, shift=1):
    entries, panther = [], []
    for case, predicted in cases.items():
        stored = root / "store" / DATASET / PLANS / "references" / f"{case}.mha"
        reference, place = imageio.read_label(stored)
        prediction = label_map(predicted, shift, reference.shape)
        imageio.write_label(folder / f"{case}.mha", prediction, place)
        entries.append(
            {
                "metrics": metrics.label_counts(reference, prediction, [1, 2]),
                "prediction_file": f"elsewhere/{case}.mha",
                "reference_file": str(stored),
            }
        )
        scores = metrics.panther_case(reference == 1, prediction == 1, spacing_zyx=SPACING)
        panther.append({"subject": case, **scores})
    values = {"preset": "default", "spacing_order": "geometric", "per_subject": panther}
    (folder / "panther.json").write_text(json.dumps(values))
    metrics.write_summary(folder / "summary.json", metrics.summarise(entries))


def dices(run, fold, checkpoint="final"):
    path = run / fold / f"validation_{checkpoint}" / "panther.json"
    found = json.loads(path.read_text())["per_subject"]
    return {c["subject"]: c["volumetric_dice"] for c in found}


def mean(values):
    return math.fsum(values) / len(values)
