"""How far a step of the cascade is, read from what it left.

A training is done only if it had the config, the starting weights and the data that the chain would
give it now. Weights are followed by checksum, data by the identity of the store, what is derived
from them by the age of files. No JAX.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from panther_jax.base.errors import FileError
from panther_jax.base.files import read_object
from panther_jax.config.schema import TrainConfig
from panther_jax.plans.plans import Plans
from panther_jax.store.identity import store_identity
from panther_jax.store.store import is_complete
from panther_jax.training.workdir import config_changes

Status = Literal["done", "to do", "stale", "missing"]
MAX_LISTED = 3
ARCH_FIELDS = ("network", "features", "kernel_sizes", "strides", "blocks", "decoder_convs")


@dataclass(frozen=True)
class State:
    """How far a step is, and why.

    ``stale`` was made with another config, from other weights or data than the chain gives now;
    ``missing`` cannot be run before somebody provides something.
    """

    status: Status
    why: str = ""


@dataclass(frozen=True)
class Training:
    """A fold as the chain would train it: from the weights ``start``, on the cases of ``store``."""

    folder: Path
    settings: TrainConfig
    start: Path | None
    store: Path


def training_state(wanted: Training) -> State:
    """Whether a fold is trained and validated, and with what the chain would give it."""
    folder = wanted.folder
    about = _json(folder / "run.json")
    validated = (folder / "validation_final" / "summary.json").is_file()
    begun = bool(about.get("finished")) or any(folder.glob("checkpoints/*"))
    if not begun:
        unfit = _unfit(wanted)
        return State("missing", unfit) if unfit else State("to do")
    for look in (_other_config, _other_start, _other_data):
        if reason := look(wanted, about):
            return State("stale", reason)
    return State("done" if about.get("finished") and validated else "to do")


def _other_config(wanted: Training, about: Mapping[str, Any]) -> str:
    stored = about.get("config") or _json(wanted.folder.parent / "config.json")
    if not stored:
        return ""
    try:
        known = TrainConfig.from_json(dict(stored)).to_json()
    except ValueError as error:
        return f"{wanted.folder} was trained with a config of another version: {error}"
    changed = [
        line
        for line in config_changes(known, wanted.settings.to_json())
        if not line.startswith("init.bundle:")  # by content, below
    ]
    if not changed:
        return ""
    more = f" and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
    listed = ", ".join(changed[:MAX_LISTED]) + more
    return f"{wanted.folder} was trained with another config (then -> now): {listed}"


def _other_start(wanted: Training, about: Mapping[str, Any]) -> str:
    recorded, start = about.get("starting_weights"), wanted.start
    if not recorded:
        return f"{wanted.folder} was trained from scratch, now it starts from {start}" * bool(start)
    before = Path(str(recorded.get("bundle")))
    if start is None:
        return f"{wanted.folder} was trained from {before}, now it starts from scratch"
    then, now = recorded.get("sha256"), _json(start / "provenance.json").get("sha256")
    same_place = before.resolve() == start.resolve()
    if then and now:
        if then == now:
            return ""
        if same_place:
            return f"{wanted.folder} was trained from {start}, which has changed since"
    elif same_place:
        return ""
    return f"{wanted.folder} was trained from {before}, now it starts from {start}"


def _other_data(wanted: Training, about: Mapping[str, Any]) -> str:
    recorded = about.get("data_sha256")
    if not recorded or not (wanted.store / "dataset.json").is_file():
        return ""
    if store_identity(wanted.store) == recorded:
        return ""
    return f"{wanted.folder} was trained on other data than {wanted.store} holds now"


def _unfit(wanted: Training) -> str:
    """Why the starting weights that are there cannot start the network, if they cannot."""
    start = wanted.start
    if start is None or not (start / "provenance.json").is_file():
        return ""  # of a model folder of nnU-Net the configuration is not known here
    try:
        plans = Plans.from_nnunet(
            read_object(start / "plans.json"), read_object(start / "dataset.json")
        )
    except (FileError, FileNotFoundError):
        return ""  # its reader says more, when it is read
    wrong = [
        f"{name} {getattr(plans.arch, name)}, the config has {getattr(wanted.settings.arch, name)}"
        for name in ARCH_FIELDS
        if getattr(plans.arch, name) != getattr(wanted.settings.arch, name)
    ]
    if not wrong:
        return ""
    return (
        f"{start} are weights of another network: {wrong[0]}\n  Name others with --start, or "
        "override the config's arch with --arch.FIELD."
    )


def store_state(folder: Path, source: str = "") -> State:
    """Whether every case of a data set is preprocessed; ``source`` says what raw data lacks."""
    wanted = _json(folder / "dataset.json").get("numTraining")
    names = [p.name.removesuffix(".locations.npz") for p in folder.glob("*.locations.npz")]
    whole = sum(is_complete(folder, name) for name in names)
    if wanted and whole >= wanted:
        return State("done")
    return State("missing", source) if source else State("to do")


@dataclass(frozen=True)
class Bundled:
    """The weights of a fold as a bundle should hold them."""

    folder: Path
    run: Path
    fold: str
    checkpoint: str


def bundle_state(wanted: Bundled) -> State:
    """Whether a bundle holds the checkpoint that its run has now, of the fold that is wanted."""
    about = _json(wanted.folder / "provenance.json")
    if not about:
        return State("to do")
    known = about.get("checkpoints", {}).get(wanted.fold)
    source = Path(str(about.get("source")))
    if not known or source.resolve() != wanted.run.resolve():
        return State("to do", f"{wanted.folder} is of another run or fold")
    if known.get("checkpoint", wanted.checkpoint) != wanted.checkpoint:
        return State("to do", f"{wanted.folder} holds the {known['checkpoint']} checkpoint")
    trained = _json(wanted.run / f"fold_{wanted.fold}" / "run.json").get("params_sha256")
    if trained and known.get("params_sha256") != trained:
        return State("to do", f"{wanted.run} was trained again since")
    return State("done")


def derived(output: Path, inputs: Sequence[Path]) -> State:
    """Whether a file that is quickly made again is there and newer than what it is made of."""
    if not output.is_file():
        return State("to do")
    made = output.stat().st_mtime_ns
    newer = [path for path in inputs if path.is_file() and path.stat().st_mtime_ns > made]
    return State("to do", f"{newer[0]} is newer") if newer else State("done")


def _json(path: Path) -> Mapping[str, Any]:
    return read_object(path) if path.is_file() else {}
