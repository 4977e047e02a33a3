"""Phantom cases as a raw data set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from panther_jax.base.errors import DatasetError
from panther_jax.base.files import write_json, writing_folder
from panther_jax.images import imageio, phantom
from panther_jax.images.raw_dataset import Case

CHANNELS = {"ct": "CT", "t1": "MRI", "t2": "MRI"}
ENDINGS = {"ct": ".nii.gz", "t1": ".mha", "t2": ".mha"}
DEFAULT_CASES = 10
PATIENTS = {"t2": 0, "t1": 1, "ct": 2}
"""A seed a modality, so that networks trained on one have not seen the patients of another."""

Progress = Callable[[str, int, int], None]


# ------------------------------------------------------------------------------------- phantom


def make_phantom(
    out: Path,
    *,
    modality: phantom.Modality = "t2",
    num_cases: int = DEFAULT_CASES,
    seed: int = 0,
    size: phantom.Size = "small",
    label_folder: Path | None = None,
    organs: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a phantom dataset to the folder ``out``, which appears when it is complete.

    The same seed gives the same anatomy in every modality. With ``label_folder``, one case is made
    around each of its label maps (PANORAMA coding), up to ``num_cases`` of them. ``organs`` labels
    the organs around instead of tumour and pancreas, as a foundation model's data would.

    Raises:
        DatasetError: if ``out`` exists and is not to be overwritten, or there are no label maps.
    """
    if organs and label_folder:
        raise DatasetError("--organs draws its own anatomy; leave --labels out")
    if out.exists() and not overwrite:
        raise DatasetError(
            f"{out} exists; pass --overwrite to replace it, or choose another folder"
        )
    label_files = _label_files(label_folder) if label_folder else None
    count = num_cases if label_files is None else min(num_cases, len(label_files))
    with writing_folder(out) as temporary:
        for name in ("imagesTr", "labelsTr"):
            (temporary / name).mkdir(parents=True)
        for index in range(count):
            case = phantom.make_phantom_case(
                index,
                modality=modality,
                seed=seed,
                size=size,
                label_file=None if label_files is None else label_files[index],
                organs=organs,
            )
            _write_case(temporary, case, ENDINGS[modality])
            if progress is not None:
                progress(case.id, index + 1, count)
        entries = {
            "channel_names": {"0": CHANNELS[modality]},
            "labels": phantom.ORGAN_LABELS if organs else phantom.LABELS,
            "numTraining": count,
            "file_ending": ENDINGS[modality],
            "name": out.name,
            "description": f"procedural abdominal phantom, {modality}, seed {seed}",
        }
        write_json(temporary / "dataset.json", entries)


def _write_case(folder: Path, case: Case, ending: str) -> None:
    assert case.label is not None, case.id
    image = case.image[0].astype(np.int16)  # phantoms are whole numbers
    imageio.write_image(folder / "imagesTr" / f"{case.id}_0000{ending}", image, case.geometry)
    imageio.write_label(folder / "labelsTr" / f"{case.id}{ending}", case.label, case.geometry)


def _label_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.glob("*") if p.name.endswith((".nii.gz", ".mha", ".nrrd")))
    if not files:
        raise DatasetError(f"{folder} holds no label maps (.nii.gz, .mha or .nrrd)")
    return files
