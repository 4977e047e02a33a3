"""Which folds of a model and which of their checkpoints are used: one rule for every command."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from panther_jax.base.errors import PantherError

LOGGER = logging.getLogger("panther_jax")
ALL, FOLD_ALL = "all", "fold_all"


class FoldsError(PantherError, ValueError):
    """Folds or checkpoints that a model does not have; the message says which there are."""


def choose_folds(
    folder: Path,
    present: Sequence[str],
    wanted: Sequence[str] = (),
    *,
    what: str = "fold",
    by: str = "with --folds",
) -> tuple[str, ...]:
    """The folds to take of those ``present``, by name (``"0"``, or ``"all"``: that of all cases).

    Nothing wanted, or ``all``, means each numbered fold, and the fold of all cases only if there is
    no other; ``fold_all`` means that fold. Other names may start with ``fold_`` too. The log says
    what was taken, and ``by`` what means others are named.

    Raises:
        FoldsError: naming those that are missing.
    """
    names = list(dict.fromkeys(_plain(fold) for fold in wanted))
    numbered = sorted((fold for fold in present if fold.isdigit()), key=int)
    every = numbered or list(present)
    taken: dict[str, None] = {}
    missing = []
    for name in names or [ALL]:
        found = every if name == ALL else [ALL if name == FOLD_ALL else name]
        missing += [fold for fold in found if fold not in present]
        taken |= dict.fromkeys(found)
    if missing or not taken:
        raise FoldsError(
            f"{folder} has no {what} {', '.join(missing)}".rstrip()
            + f"; there are: {', '.join(present) or 'none'}\n"
            "  Choose others with --folds and --checkpoint, or train what is missing."
        )
    left = [fold for fold in present if fold not in taken]
    note = ""
    if left and not set(names) - {ALL}:
        note = f"; fold_{', fold_'.join(left)} is left out, name it {by} to take it"
    if tuple(taken) != ("",):
        LOGGER.info("%s: fold %s%s", folder, ", ".join(taken), note)
    return tuple(taken)


def choose_checkpoint(
    folder: Path, folds_of: Mapping[str, Sequence[str]], checkpoint: str, wanted: Sequence[str] = ()
) -> str:
    """The checkpoint to take: the one asked for, or ``best`` where no fold has the final one.

    ``folds_of`` are the folds that have each checkpoint; of those ``wanted``, if any are.
    """
    asked = {_plain(fold) for fold in wanted} - {ALL}
    asked = {ALL if fold == FOLD_ALL else fold for fold in asked}

    def having(name: str) -> list[str]:
        return [fold for fold in folds_of.get(name, ()) if not asked or fold in asked]

    if checkpoint == "final" and not having("final") and having("best"):
        LOGGER.warning(
            "%s holds no final checkpoint of fold %s: the best one is taken",
            folder,
            ", ".join(having("best")),
        )
        return "best"
    return checkpoint


def _plain(fold: str) -> str:
    return fold if fold == FOLD_ALL else fold.removeprefix("fold_")
