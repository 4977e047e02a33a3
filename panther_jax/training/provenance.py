"""``run.json``: what made a run."""

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import panther_jax
from panther_jax.base.files import read_object, write_json
from panther_jax.config.loading import ConfigSource
from panther_jax.config.schema import TrainConfig
from panther_jax.store.identity import store_identity
from panther_jax.store.store import Store
from panther_jax.training.options import Options


def device_name() -> str:
    """The devices that JAX uses, e.g. ``1 x NVIDIA H200`` or ``1 x cpu``."""
    import jax

    found = jax.devices()
    among = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(found)} x {found[0].device_kind}{among}"


def record(folder: Path, entries: dict[str, Any]) -> None:
    """Add entries to the fold's ``run.json``; the first process of a run does."""
    import jax

    if jax.process_index():
        return
    path = folder / "run.json"
    known = read_object(path) if path.is_file() else {}
    write_json(path, {**known, **entries})


def beginning(
    config: TrainConfig, store: Store, starting_weights: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a fold began with: its config, starting weights, and the data of its store."""
    return {
        "config": config.to_json(),
        "starting_weights": starting_weights,
        "data_sha256": store_identity(store.folder),
    }


def provenance(
    settings: TrainConfig, source: ConfigSource, options: Options, store: Store
) -> dict[str, Any]:
    """What is known of a session when it starts: versions, device, command, config, seed."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "panther_jax": panther_jax.__version__,
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": device_name(),
        "git_revision": _git_revision(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "config_file": str(source.path),
        "config_sha256": source.sha256,
        "config_argument": source.argument,
        "fold": options.fold,
        "seed": settings.loop.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": False,
        "store": str(store.folder.resolve()),
        "raw": None if options.raw is None else str(options.raw.resolve()),
    }


def _git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
