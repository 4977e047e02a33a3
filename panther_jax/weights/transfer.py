"""Starting weights moved into a network, and a table of what was taken."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from panther_jax.base.errors import CheckpointError
from panther_jax.network.unet import Params, walk
from panther_jax.weights.bundle import _unflatten

# ----------------------------------------------------------------------------- starting weights


@dataclass(frozen=True)
class Transfer:
    """What became of each parameter: names loaded, left fresh by rule, not used of the source."""

    params: Params
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    unused: tuple[str, ...]

    def report(self) -> str:
        """One line of counts."""
        return (
            f"{len(self.loaded)} parameters loaded, {len(self.skipped)} fresh by rule, "
            f"{len(self.unused)} of the source not used"
        )


def transfer(source: Params, fresh: Params, *, stem: Literal["copy", "reinit"]) -> Transfer:
    """Start ``fresh`` parameters from ``source`` by the rules of spec 01 §5.

    Heads stay fresh always, the stem with ``reinit``; every other parameter must be in the source
    with the same shape. All are checked before any is taken.

    Raises:
        CheckpointError: with a table of what is missing or of another shape.
    """
    stored = {"/".join(p): leaf for p, leaf in walk(source)}
    loaded, skipped, missing, reshaped = [], [], [], []
    for path, leaf in walk(fresh):
        name = "/".join(path)
        if name.startswith("decoder/heads/") or (
            stem == "reinit" and name.startswith("encoder/stem/")
        ):
            skipped.append(name)
        elif name not in stored:
            missing.append(name)
        elif tuple(stored[name].shape) != tuple(leaf.shape):
            reshaped.append(f"{name}: {tuple(stored[name].shape)} -> {tuple(leaf.shape)}")
        else:
            loaded.append(name)
    if missing or reshaped:
        raise CheckpointError(_misfit(loaded, skipped, missing, reshaped))
    taken = set(loaded)
    flat = {
        "/".join(p): stored["/".join(p)] if "/".join(p) in taken else leaf
        for p, leaf in walk(fresh)
    }
    unused = tuple(name for name in stored if name not in taken)
    return Transfer(_unflatten(flat), tuple(loaded), tuple(skipped), unused)


def _misfit(
    loaded: Sequence[str], skipped: Sequence[str], missing: Sequence[str], reshaped: Sequence[str]
) -> str:
    lines = [
        f"starting weights do not fit: {len(loaded)} fit, {len(skipped)} skipped by rule, "
        f"{len(missing)} missing, {len(reshaped)} of another shape (stored -> expected)"
    ]
    lines += [f"  missing: {name}" for name in missing[:10]]
    lines += [f"  shape:   {name}" for name in reshaped[:10]]
    if missing and all(name.startswith("encoder/stem/") for name in missing):
        lines.append("  The source has no stem: start it anew with --init.stem reinit.")
    else:
        lines.append("  Take the architecture from the bundle's plans, or another bundle.")
    return "\n".join(lines)
