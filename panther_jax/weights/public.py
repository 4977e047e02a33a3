"""The known public weights, as data (spec 03 §7.7, 01 §4.1). What is not known is None."""

import dataclasses
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from panther_jax.base.console import table
from panther_jax.base.errors import PantherError
from panther_jax.config.schema import CheckpointName

DOI_PREFIX = "10.5281/zenodo."
UNKNOWN = "not known"


class UnknownWeights(PantherError, ValueError):
    """Something that is neither a known name nor the DOI of a Zenodo record."""


@dataclass(frozen=True)
class PublicWeights:
    """Weights of one model in a record.

    ``folders`` are parts of paths that tell the model from others of its record, ``model_folder``
    where it lies as far as published; ``members`` are its folds.
    """

    name: str
    record: str
    what: str
    stage: str
    folders: tuple[str, ...] = ()
    model_folder: str | None = None
    members: tuple[str, ...] | None = None
    checkpoint: CheckpointName | None = None
    license: str | None = None
    citation: str | None = None
    facts: tuple[str, ...] = ()

    @property
    def doi(self) -> str:
        """DOI of the record."""
        return DOI_PREFIX + self.record

    def to_json(self) -> dict[str, Any]:
        """All fields and the DOI, as plain values."""
        return {**dataclasses.asdict(self), "doi": self.doi}


_WINNER = (
    "O. F. Durugol, M. Rokuss, Y. Kirchhoff, K. H. Maier-Hein: A Multi-Stage Fine-Tuning and "
    "Ensembling Strategy for Pancreatic Tumor Segmentation in Diagnostic and Therapeutic MRI. "
    "arXiv:2508.21775, 2025"
)
_ENTRIES = (
    PublicWeights(
        "winner-t1",
        "17212158",
        "the PANTHER winner's model of task 1 (T1 MRI): pancreas and tumour",
        "task 1",
        folders=("Dataset901",),
        model_folder="Dataset901_PANTHER/nnUNetTrainer1e3__nnUNetResEncUNetLPlans"
        "PancCTMultiTalentV2__3d_fullres_iso1x1x1",
        members=("0", "1", "2", "3", "4", "5"),
        checkpoint="best",
        citation=_WINNER,
        facts=(
            "six members; which training each comes from is not published",
            "trained from the CT stage (winner-ct)",
            "closed test, 30 cases: Dice 0.7265, HD95 8.60 mm, MASD 1.67 mm",
        ),
    ),
    PublicWeights(
        "winner-t2",
        "17212158",
        "the PANTHER winner's model of task 2 (T2 MRI of an MR-Linac): pancreas and tumour",
        "task 2",
        folders=("Dataset902",),
        model_folder="Dataset902_PANTHER_HR/nnUNetTrainer1e3__nnUNetResEncUNetLPlans"
        "Task1PancCTMultiTalentV2__3d_fullres_iso1x1x1",
        members=("0", "1", "2", "3", "4"),
        checkpoint="best",
        citation=_WINNER,
        facts=(
            "trained from task 1 (winner-t1), by the name of its plans",
            "closed test, 30 cases: Dice 0.5289, HD95 23.0 mm, MASD 5.13 mm",
        ),
    ),
    PublicWeights(
        "winner-ct",
        "17212158",
        "the PANTHER winner's CT stage, to start from: pancreas and tumour in CT",
        "CT",
        folders=("Dataset999",),
        model_folder="Dataset999_PancCTPretrain/nnUNetTrainer1e3__nnUNetResEncUNetLPlans"
        "__3d_fullres_bs4",
        members=("all",),
        checkpoint="best",
        citation=_WINNER,
        facts=("trained on 765 cases with tumours of MSD and PANORAMA, from MultiTalentV2",),
    ),
    PublicWeights(
        "multitalent",
        "13753413",
        "MultiTalent foundation weights (CT, MRI, PET), to start from",
        "foundation",
        folders=("Dataset619",),
        model_folder="Dataset619_nativemultistem/MultiTalent_trainer_multistems_4000ep__"
        "nnUNetResEncUNetL1x1x1_Plans_znorm_bs24__3d_fullres",
        members=("all",),
        checkpoint="final",
        citation="C. Ulrich, F. Isensee, T. Wald, M. Zenk, M. Baumgartner, K. H. Maier-Hein: "
        "MultiTalent: A Multi-Dataset Approach to Medical Image Segmentation. MICCAI 2023, "
        "arXiv:2303.14444 (the method; what to cite for the record is not known)",
        facts=(
            "the record also holds Dataset617: two models of CT alone",
            "a stem and heads for each of its data sets: training starts both anew",
            "this file has 4000 epochs and is V1 in the winners' log; a V2 of 6000 epochs is named "
            "there and may not be public, though their readme equates V2 with this record",
        ),
    ),
    PublicWeights(
        "baseline",
        "15211865",
        "the PANTHER organisers' baseline",
        "tasks 1 and 2",
        facts=(
            "trained in three folds; task 2 starts from task 1",
            "closed test of task 2, 30 cases: Dice 0.4784, HD95 24.2 mm, MASD 8.12 mm",
            "which model folders the record holds is not known: name one of those that show lists",
        ),
    ),
)
KNOWN = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def of_record(record: str) -> tuple[PublicWeights, ...]:
    """The known weights that a record holds."""
    return tuple(entry for entry in KNOWN.values() if entry.record == record)


def parse_target(text: str) -> tuple[str, PublicWeights | None]:
    """The record, and the known weights if there is one, that a name, DOI or address means.

    Raises:
        UnknownWeights: naming what is known.
    """
    if text in KNOWN:
        return KNOWN[text].record, KNOWN[text]
    match = re.fullmatch(
        r"(?:(?:https?://)?(?:doi\.org/)?(?:doi:)?10\.5281/zenodo\.|"
        r"(?:https?://)?(?:www\.)?zenodo\.org/records?/)?(\d{1,12})/?",
        text.strip(),
        re.IGNORECASE,
    )
    if match is None:
        raise UnknownWeights(
            f"{text!r} is neither a known name nor the DOI of a Zenodo record\n  Known: "
            f"{', '.join(KNOWN)}; a DOI looks like {DOI_PREFIX}13753413."
        )
    entries = of_record(match[1])
    return match[1], entries[0] if len(entries) == 1 else None


def listing(places: dict[str, str]) -> str:
    """The table as text; ``places`` says where weights are that are here already."""
    rows = [
        [e.name, e.stage, e.record, _members(e), e.license or UNKNOWN, places.get(e.name, "-")]
        for e in KNOWN.values()
    ]
    lines = [table(["name", "for", "Zenodo", "members", "licence", "here"], rows), ""]
    for entry in KNOWN.values():
        lines += [f"{entry.name}: {entry.what}", f"  doi:{entry.doi}"]
        lines += [f"  {fact}" for fact in entry.facts]
        lines += [f"  cite: {entry.citation or UNKNOWN}"]
    lines += ["", "A licence that is not known here is shown by `get`, where the record states it."]
    return "\n".join(lines)


def _members(entry: PublicWeights) -> str:
    if entry.members is None:
        return UNKNOWN
    return f"{' '.join(entry.members)}, {entry.checkpoint or 'checkpoint ' + UNKNOWN}"
