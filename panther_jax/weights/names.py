"""What a model's name means: an existing path, or known public weights under ``ROOT/weights``."""

import difflib
from pathlib import Path

from panther_jax.base.errors import PantherError
from panther_jax.config.places import Places
from panther_jax.weights.public import KNOWN, PublicWeights, of_record
from panther_jax.weights.show import Found, find_models


class ModelNotFound(PantherError, FileNotFoundError):
    """A known name whose weights are not there, or a name that is nearly a known one."""


class AmbiguousModel(PantherError, ValueError):
    """A known name under which several models lie; the message lists them."""


def resolve_model(name_or_path: str | Path, root: Path) -> Path:
    """The folder of a model: an existing path as it is, else a known name's model under ``root``.

    Anything else comes back as a path, for the caller to say what it expected there.

    Raises:
        ModelNotFound: if a known name's weights are not there, with how to get them.
        AmbiguousModel: if there are several and nothing tells which is meant.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if path.exists():
        return path
    if name not in KNOWN:
        if path.parent == Path() and (near := difflib.get_close_matches(name, KNOWN, 1, 0.75)):
            raise ModelNotFound(
                f"{name} is neither a folder nor a known name; did you mean {near[0]}?\n"
                "  `python -m panther_jax.weights list` shows the names."
            )
        return path
    entry = KNOWN[name]
    for place in places(entry, root):
        if (model := model_in(place, entry, own=place.name == name)) is not None:
            return model.path
    raise ModelNotFound(_how_to_get(entry, root))


def named_start(name: str, where: Places, *, source: str = "") -> Path:
    """The folder of starting weights: a known name's, else a bundle's as ``where`` has it.

    ``source`` says how to get that bundle.

    Raises:
        FileNotFoundError, AmbiguousModel: with what to do.
    """
    return resolve_model(name, where.root) if name in KNOWN else where.bundle(name, source=source)


def published_checkpoint(*names: str | Path) -> str | None:
    """The checkpoint to predict with, where all are known names that agree; None else."""
    found = {KNOWN[str(n)].checkpoint if str(n) in KNOWN and not Path(n).exists() else None
             for n in names}  # fmt: skip
    return found.pop() if len(found) == 1 else None


def places(entry: PublicWeights, root: Path) -> tuple[Path, ...]:
    """Where weights may be: under their own name, or in another download of the same record."""
    others = [other.name for other in of_record(entry.record) if other != entry]
    names = [entry.name, *others, f"zenodo-{entry.record}"]
    return tuple(root / "weights" / name for name in names)


def model_in(place: Path, entry: PublicWeights, *, own: bool) -> Found | None:
    """The model in a folder that is the known one; in its ``own`` folder a single one suffices.

    Told by path, then by the data set in its plans.

    Raises:
        AmbiguousModel: if there are several and nothing tells which is meant.
    """
    found = find_models(place) if place.is_dir() else ()
    if not found:
        return None
    by_path = [m for m in found if _hinted(m.path.relative_to(place).as_posix(), entry)]
    chosen = by_path or [m for m in found if _hinted(m.dataset or "", entry)]
    if not chosen and own:
        chosen = list(found)
    if len(chosen) > 1:
        if not own:
            return None
        listed = "\n".join(f"  {model.path}" for model in chosen)
        raise AmbiguousModel(
            f"{entry.name}: {place} holds {len(chosen)} models, and nothing tells which is meant:\n"
            f"{listed}\n  Name one of these folders instead."
        )
    return chosen[0] if chosen else None


def _hinted(text: str, entry: PublicWeights) -> bool:
    return any(hint.casefold() in text.casefold() for hint in entry.folders)


def _how_to_get(entry: PublicWeights, root: Path) -> str:
    option = "" if root == Path("data") else f" --root {root}"
    return (
        f"{entry.name} ({entry.what}) is not there\n"
        f"  searched: {', '.join(map(str, places(entry, root)))}\n"
        f"  Get it with `python -m panther_jax.weights get {entry.name}{option}`, or name a folder."
    )
