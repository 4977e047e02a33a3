"""What tells one store's content from another's."""

import hashlib
from pathlib import Path

from panther_jax.store.layout import DATASET, PLANS, SPLITS
from panther_jax.store.store import stored_ids


def store_identity(folder: Path) -> str:
    """SHA-256 over plans, ``dataset.json``, splits, and what is recorded of each case.

    A case's JSON holds its geometry, sizes and voxels a label; arrays are not read. Of folders that
    nnU-Net preprocessed, only what they have of it counts.
    """
    digest = hashlib.sha256()
    for name in (PLANS, DATASET, SPLITS, *(f"{case}.json" for case in stored_ids(folder))):
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()
