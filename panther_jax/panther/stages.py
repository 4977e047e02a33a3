"""The stages of the challenge's method as a table: what each trains, from what, and hands on.

A new stage is one row here and a config; the chain and its runner know no stage by name. A user's
file adds a row to :data:`STAGES`.
"""

from dataclasses import dataclass

from panther_jax.base import plugins
from panther_jax.base.registry import Registry
from panther_jax.config.schema import CheckpointName
from panther_jax.panther import downloads

NUMBERED = tuple("01234")


@dataclass(frozen=True)
class HandedOn:
    """The weights that the next stage starts from: of which config argument, fold, checkpoint."""

    variant: str = ""
    fold: str = "all"
    checkpoint: CheckpointName = "best"


@dataclass(frozen=True)
class Stage:
    """One stage.

    ``variants`` are arguments of ``config``, each a training of its own in every fold; ``start`` is
    the stage that its weights come from, ``weights`` the name of its own. A stage that is
    ``imported`` is downloaded instead of trained, as the text says.

    In a demo it trains for ``demo_epochs`` (its config's if None), on phantoms made with
    ``demo_phantoms`` (those of its modality if none) in ``demo_dataset``.
    """

    name: str
    config: str
    weights: str
    start: str | None
    variants: tuple[str, ...] = ("",)
    folds: tuple[str, ...] = ("all",)
    handed_on: HandedOn = HandedOn()
    imported: str = ""
    demo_epochs: int | None = None
    demo_dataset: str = ""
    demo_phantoms: tuple[str, ...] = ()

    def spec(self, variant: str) -> str:
        """The config with an argument, as ``panther_jax.train`` takes it."""
        return f"{self.config}:{variant}" if variant else self.config


# Aggressive augmentation for overlap, the default one for boundaries (spec 05 §10.1).
BOTH_AUGMENTATIONS = ("aug=da5_fork", "")

_ROWS = (
    Stage(
        name="multitalent",
        config="multitalent.py",
        weights="multitalent",
        start=None,
        handed_on=HandedOn(checkpoint="final"),
        imported=downloads.WEIGHTS["multitalent"],
        demo_dataset="Dataset619_PhantomOrgans",
        # a seed of its own: patients that no later stage sees
        demo_phantoms=("--organs", "--modality", "ct", "--cases", "15", "--seed", "3"),
    ),
    Stage(name="ct", config="ct_pancreas.py", weights="ct_pancreas", start="multitalent"),
    Stage(
        name="t1",
        config="mri_t1.py",
        weights="mri_t1",
        start="ct",
        variants=BOTH_AUGMENTATIONS,
        folds=(*NUMBERED, "all"),
        demo_epochs=8,
    ),
    Stage(
        name="t2",
        config="mri_t2.py",
        weights="mri_t2",
        start="t1",
        variants=BOTH_AUGMENTATIONS,
        folds=NUMBERED,
        demo_epochs=8,
    ),
    Stage(
        name="combined",
        config="mri_combined.py",
        weights="mri_combined",
        start="ct",
        variants=BOTH_AUGMENTATIONS,
        folds=NUMBERED,
        demo_epochs=8,
    ),
    Stage(
        name="combined-tumor",
        config="mri_combined_tumor_only.py",
        weights="mri_combined_tumor_only",
        start="ct",
        variants=BOTH_AUGMENTATIONS,
        folds=NUMBERED,
        demo_epochs=8,
    ),
)
"""The published chain is multitalent, ct, t1, t2; task 1 has six members (spec 03 §7.7)."""

STAGES: Registry[Stage] = Registry(
    "stage",
    remedy=f"{plugins.HINT}; panther_jax.panther.stages.STAGES.add('NAME')(Stage(...)) adds one",
)
"""The table by name; a stage stands after the one that it starts from."""
for _row in _ROWS:
    STAGES.add(_row.name)(_row)


def stages() -> dict[str, Stage]:
    """The table by name, each stage after the one that it starts from."""
    return {name: STAGES.find(name) for name in STAGES.names}
