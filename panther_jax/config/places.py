"""Where things are under the root folder, and what to do about a missing one (spec 00 §0.4)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Fold = int | Literal["all"]
"""A fold of a data set's split by its number, or all cases."""

HOW_TO_START = (
    "Import them with `python -m weight_conversion.import_nnunet`, train the stage that makes them"
)


@dataclass(frozen=True)
class Places:
    """The folders under ``root``: raw data sets, stores, weights, runs."""

    root: Path

    def raw(self, dataset: str, *, source: str = "") -> Path:
        """Raw data set: under the root, else under ``nnUNet_raw`` if that holds it.

        ``source`` says how to get it.

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
        how = source or "put it there in nnU-Net layout"
        raise FileNotFoundError(
            f"raw data set {dataset} not found\n  searched: {', '.join(map(str, searched))}\n"
            f"  To get it, {how}; or name a folder with --raw, a preprocessed one with --store,\n"
            "  or try the pipeline on made-up cases with --demo."
        )

    def phantoms(self, dataset: str, modality: str) -> Path:
        """Raw data set of phantoms that stand in for ``dataset`` in a demo."""
        return self.root / "raw" / f"{dataset[:10]}_Phantom{modality.upper()}"

    def store(self, dataset: str, data_identifier: str) -> Path:
        """Preprocessed store of a data set."""
        return self.root / "store" / dataset / data_identifier

    def bundle(self, name: str, *, source: str = "") -> Path:
        """Bundle by path, or by name under the weights folder; ``source`` says how to get it.

        Raises:
            FileNotFoundError: if there is none, with the ways to get one.
        """
        for folder in (Path(name), self.root / "weights" / name):
            if folder.is_dir():
                return folder
        raise FileNotFoundError(
            f"starting weights {name!r} not found\n"
            f"  searched: {Path(name)}, {self.root / 'weights' / name}\n"
            f"  {source or HOW_TO_START}, or start from scratch with --init none."
        )

    def run(self, run_name: str) -> Path:
        """Work directory of a run."""
        return self.root / "runs" / run_name

    @staticmethod
    def fold(workdir: Path, fold: Fold) -> Path:
        """Folder of one fold in a work directory."""
        return workdir / f"fold_{fold}"
