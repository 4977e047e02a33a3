"""Stand-ins of the published records: their layout as far as known, a tiny network, random weights.

Folder, trainer and plans names, members and checkpoints are those of the winners' readme.
"""

import copy
import dataclasses
import io
import json
import zipfile

import weight_files as made

SPACING = (6.0, 6.0, 6.0)
DATASET = {**made.DATASET, "labels": {"background": 0, "tumor": 1, "pancreas": 2}}
TRAINER = "nnUNetTrainer1e3"
MODELS = {
    "winner-ct": ("Dataset999_PancCTPretrain", "nnUNetResEncUNetLPlans", "3d_fullres_bs4", ["all"]),
    "winner-t1": (
        "Dataset901_PANTHER",
        "nnUNetResEncUNetLPlansPancCTMultiTalentV2",
        "3d_fullres_iso1x1x1",
        ["0", "1", "2", "3", "4", "5"],
    ),
    "winner-t2": (
        "Dataset902_PANTHER_HR",
        "nnUNetResEncUNetLPlansTask1PancCTMultiTalentV2",
        "3d_fullres_iso1x1x1",
        ["0", "1", "2", "3", "4"],
    ),
}


def model_folder(name: str) -> str:
    """Path of a model in its record."""
    dataset, plans, configuration, _ = MODELS[name]
    return f"{dataset}/{TRAINER}__{plans}__{configuration}"


def plans_of(name: str) -> dict:
    """Plans whose configuration inherits all but a field from another, as the winners' do."""
    dataset, plans_name, configuration, _ = MODELS[name]
    plans = dataclasses.replace(made.make_plans(made.RESIDUAL), spacing=SPACING).to_nnunet()
    full = plans["configurations"]["3d_fullres"]
    child = {"inherits_from": "3d_fullres", "batch_size": 4}
    configurations = {"3d_fullres": full, configuration: child}
    return {**plans, "dataset_name": dataset, "plans_name": plans_name,
            "configurations": configurations}  # fmt: skip


def model_files(name: str, *, folds=None, extra_folds=()) -> dict[str, bytes]:
    """The files of a model by path; ``extra_folds`` lie beside the published members."""
    import torch

    where, plans = model_folder(name), plans_of(name)
    files = {
        f"{where}/plans.json": json.dumps(plans).encode(),
        f"{where}/dataset.json": json.dumps(DATASET).encode(),
        f"{where}/dataset_fingerprint.json": b"{}",
    }
    for seed, fold in enumerate([*(folds or MODELS[name][3]), *extra_folds]):
        content = made.checkpoint(made.RESIDUAL, seed, trainer_name=TRAINER)
        content["init_args"] |= {
            "plans": copy.deepcopy(plans),
            "configuration": MODELS[name][2],
            "fold": fold,
            "dataset_json": DATASET,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files[f"{where}/fold_{fold}/checkpoint_best.pth"] = buffer.getvalue()
        files[f"{where}/fold_{fold}/debug.json"] = b"{}"
    return files


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip archive of files by path."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return buffer.getvalue()


def winners_archive(*names: str, top: str = "nnUNet_results/") -> bytes:
    """One archive of several models."""
    return zipped({top + path: content for name in names
                   for path, content in model_files(name).items()})  # fmt: skip
