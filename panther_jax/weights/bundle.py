"""A bundle: weights of all folds with plans, labels and provenance."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panther_jax.base.checksums import file_sha256
from panther_jax.base.errors import CheckpointError
from panther_jax.base.files import read_object, refuse_existing, write_json, writing_folder
from panther_jax.network.unet import Params, param_shapes, walk
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans

OPTIONAL_PARTS = {"stem": "encoder/stem/", "heads": "decoder/heads/"}


# -------------------------------------------------------------------------------------- bundles


@dataclass(frozen=True)
class ModelBundle:
    """A model ready to predict or to start from: plans, labels, parameters of each fold.

    ``absent`` names the parts (``stem``, ``heads``) that imported weights came without; such a
    bundle is only good to start from.
    """

    plans: Plans
    labels: Labels
    params: Mapping[str, Params]
    provenance: Mapping[str, Any]
    absent: tuple[str, ...] = ()

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Axes that may be mirrored at inference: those that training flipped."""
        return tuple(self.provenance.get("inference_allowed_mirroring_axes") or ())

    def require_complete(self, what: str) -> None:
        """Refuse to predict with or export a bundle that lacks its stem or heads.

        Raises:
            CheckpointError: naming ``what`` cannot be done.
        """
        if self.absent:
            raise CheckpointError(
                f"cannot {what}: the bundle has no {' and no '.join(self.absent)}, it was imported "
                "to start training from\n  Train from it with `python -m panther_jax.train --init`."
            )


def save_bundle(
    folder: Path,
    *,
    params: Mapping[str, Params],
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Write a bundle: ``params`` by fold name (``""`` for a single model), JSON beside them.

    ``provenance`` gains the SHA-256 of every weight file. The folder appears when complete.

    Raises:
        CheckpointError, WriteError: if the folder exists or cannot be written.
    """
    refuse_existing(folder, overwrite=overwrite)
    with writing_folder(folder) as temporary:
        checksums = {}
        for fold, tree in params.items():
            path = temporary / _weights_name(fold)
            checksums[path.name] = _write_safetensors(path, tree)
        write_json(temporary / "plans.json", plans)
        write_json(temporary / "dataset.json", dataset)
        write_json(temporary / "provenance.json", {**provenance, "sha256": checksums})


def _write_safetensors(path: Path, tree: Params) -> str:
    """Write the tensors of one fold and return the SHA-256 of the file."""
    from safetensors.numpy import save_file

    # contiguous views of a mapped file are written from it; others are copied, one fold at a time
    save_file({"/".join(p): np.ascontiguousarray(leaf, "<f4") for p, leaf in walk(tree)}, path)
    return file_sha256(path)


def load_bundle(folder: Path) -> ModelBundle:
    """Read a bundle and verify its checksums.

    Raises:
        CheckpointError: if something is missing, damaged, or does not fit its plans.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for name in ("plans.json", "dataset.json", "provenance.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a bundle: it holds no {name}")
    dataset = read_object(folder / "dataset.json")
    plans = Plans.from_nnunet(read_object(folder / "plans.json"), dataset)
    provenance = read_object(folder / "provenance.json")
    checksums = provenance.get("sha256", {})
    if not isinstance(checksums, dict):
        raise CheckpointError(
            f"{folder / 'provenance.json'}: 'sha256' must map file names to checksums, found "
            f"{type(checksums).__name__}\n  Copy the bundle again."
        )
    params: dict[str, Params] = {}
    absent: dict[str, None] = {}
    for path in sorted(folder.glob("*.safetensors")):
        expected = checksums.get(path.name)
        if expected and file_sha256(path) != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one of provenance.json\n"
                "  Copy the bundle again, or make it anew."
            )
        try:
            tree = _unflatten(load_file(path))
        except (SafetensorError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file: {error}\n  Copy the bundle again."
            ) from None
        absent |= dict.fromkeys(_absent_parts(path, tree, plans))
        params[_fold_name(path.name)] = tree
    if not params:
        raise CheckpointError(f"bundle {folder} holds no weights (*.safetensors)")
    return ModelBundle(plans, Labels.from_dataset_json(dataset), params, provenance, tuple(absent))


def _absent_parts(path: Path, tree: Params, plans: Plans) -> tuple[str, ...]:
    """Which of stem and heads are left out; anything else that does not fit is an error."""
    stored = {"/".join(p): tuple(leaf.shape) for p, leaf in walk(tree)}
    wanted = {"/".join(p): tuple(leaf.shape) for p, leaf in walk(param_shapes(plans.arch))}
    absent = []
    for part, prefix in OPTIONAL_PARTS.items():
        names = [name for name in wanted if name.startswith(prefix)]
        if names and not any(name.startswith(prefix) for name in stored):
            absent.append(part)
            for name in names:
                del wanted[name]
    wrong = sorted(n for n in {*stored, *wanted} if stored.get(n) != wanted.get(n))
    if wrong:
        lines = [f"  {n}: {stored.get(n)}, expected {wanted.get(n)}" for n in wrong[:10]]
        raise CheckpointError(
            f"{path} does not fit the plans.json beside it; {len(wrong)} parameter(s) differ:\n"
            + "\n".join(lines)
            + "\n  Import or train the model again."
        )
    return tuple(absent)


def params_sha256(params: Params) -> str:
    """SHA-256 of parameters by value: names, shapes, bytes; the same wherever they are stored."""
    digest = hashlib.sha256()
    for path, leaf in sorted(walk(params), key=lambda item: item[0]):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{'/'.join(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _weights_name(fold: str) -> str:
    return f"fold_{fold}.safetensors" if fold else "params.safetensors"


def _fold_name(file: str) -> str:
    return (
        file.removesuffix(".safetensors").removeprefix("fold_")
        if file != "params.safetensors"
        else ""
    )


def _unflatten(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for name, leaf in flat.items():
        node, *path = tree, *name.split("/")
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree
