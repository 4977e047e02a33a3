"""Where things are under the root folder, and what to do about a missing one (spec 00 §0.4)."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Fold = int | Literal["all"]
"""A fold of a data set's split by its number, or all cases."""

DOWNLOADS = {
    901: "download Zenodo record 15192302 (PANTHER) and convert it with "
    "`python -m panther_jax.datasets panther --task t1`",
    902: "download Zenodo record 15192302 (PANTHER) and convert it with "
    "`python -m panther_jax.datasets panther --task t2`",
    999: "convert MSD Task07 and PANORAMA with `python -m panther_jax.datasets msd|panorama|merge`",
}


@dataclass(frozen=True)
class Places:
    """The folders under ``root``: raw data sets, stores, weights, runs."""

    root: Path

    def raw(self, dataset: str) -> Path:
        """Raw data set: under the root, else under ``nnUNet_raw`` if that holds it.

        Raises:
            FileNotFoundError: naming the places searched and how to get the data set.
        """
        folder = self.root / "raw" / dataset
        if (folder / "dataset.json").is_file():
            return folder
        searched = [folder]
        environment = os.environ.get("nnUNet_raw")
        if environment:
            searched.append(Path(environment) / dataset)
            if (searched[-1] / "dataset.json").is_file():
                return searched[-1]
        number = re.match(r"Dataset(\d{3})_", dataset)
        hint = DOWNLOADS.get(
            int(number.group(1)) if number else -1, "put it there in nnU-Net layout"
        )
        raise FileNotFoundError(
            f"raw data set {dataset} not found\n  searched: {', '.join(map(str, searched))}\n"
            f"  To get it, {hint}; or name a folder with --raw, a preprocessed one with --store,\n"
            "  or try the pipeline on made-up cases with --demo."
        )

    def phantoms(self, dataset: str, modality: str) -> Path:
        """Raw data set of phantoms that stand in for ``dataset`` in a demo."""
        return self.root / "raw" / f"{dataset[:10]}_Phantom{modality.upper()}"

    def store(self, dataset: str, data_identifier: str) -> Path:
        """Preprocessed store of a data set."""
        return self.root / "store" / dataset / data_identifier

    def bundle(self, name: str) -> Path:
        """Bundle by path, or by name under the weights folder.

        Raises:
            FileNotFoundError: if there is none, with the ways to get one.
        """
        for folder in (Path(name), self.root / "weights" / name):
            if folder.is_dir():
                return folder
        raise FileNotFoundError(
            f"starting weights {name!r} not found\n"
            f"  searched: {Path(name)}, {self.root / 'weights' / name}\n"
            "  Import them with `python -m weight_conversion.import_nnunet`, train the stage that "
            "makes them,\n  or start from scratch with --init none."
        )

    def run(self, run_name: str) -> Path:
        """Work directory of a run."""
        return self.root / "runs" / run_name

    @staticmethod
    def fold(workdir: Path, fold: Fold) -> Path:
        """Folder of one fold in a work directory."""
        return workdir / f"fold_{fold}"
