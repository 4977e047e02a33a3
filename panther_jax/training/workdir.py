"""The folder of a run: made, or made sure to be of the same run."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panther_jax.base.files import read_object, write_json
from panther_jax.config import loading
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.plans.plans import Plans
from panther_jax.store.store import Store
from panther_jax.training import trained_on
from panther_jax.training.options import Options

LOGGER = logging.getLogger("panther_jax")
FREE_SECTIONS = ("log", "validation", "devices")
"""Config sections that may change between sessions of a run: they do not touch the training."""
FREE_DATA_FIELDS = ("resident", "num_threads", "prefetch_batches", "source")
"""Likewise: how batches get to the device, not what they hold."""
FREE_INIT_FIELDS = ("source",)


# ------------------------------------------------------------------------------ work directory


def open_workdir(
    workdir: Path, folder: Path, settings: TrainConfig, store: Store, options: Options
) -> None:
    """Make the work directory, or make sure that it is of the same run.

    Raises:
        ConfigError: with the fields that differ, if it belongs to another config or other plans.
    """
    if options.restart and folder.exists():
        LOGGER.info("discarding %s", folder)
        shutil.rmtree(folder)
    others = [f for f in workdir.glob("fold_*") if f.is_dir() and f != folder]
    fresh = not folder.exists() and not others
    config_path, plans_path = workdir / "config.json", workdir / "plans.json"
    if not fresh and config_path.is_file():
        stored = _stored_config(config_path).to_json()
        changed = config_changes(stored, settings.to_json())
        if changed and not options.allow_config_change:
            raise ConfigError(
                f"{workdir} belongs to a run with another config (stored -> now):\n  "
                + "\n  ".join(changed)
                + "\n  Choose another --workdir, discard it with --restart, or pass "
                "--allow-config-change."
            )
        for line in changed:
            LOGGER.warning("config changed: %s", line)
    if not fresh and plans_path.is_file():
        stored_plans = Plans.from_nnunet(read_object(plans_path), store.dataset)
        if stored_plans.arch != store.plans.arch:
            raise ConfigError(
                f"{plans_path} holds another architecture than the store {store.folder}; choose "
                "another --workdir or discard it with --restart"
            )
    allow_change = options.allow_config_change
    trained_on.check_data(folder, store, options.fold, allow_change=allow_change)
    write_json(config_path, settings.to_json())
    write_json(plans_path, store.plans.to_nnunet())
    write_json(workdir / "dataset.json", store.dataset)


def _stored_config(path: Path) -> TrainConfig:
    try:
        return TrainConfig.from_json(read_object(path))
    except (TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"{path} is not a config of this version: {error}\n  Choose another --workdir, or "
            "delete that file."
        ) from None


def config_changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines ``field: stored -> now`` of the fields that decide what is trained, as JSON configs."""
    return loading.differences(_fixed(stored), _fixed(now))


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    free = {"data": FREE_DATA_FIELDS, "init": FREE_INIT_FIELDS}
    return {
        section: {k: v for k, v in fields.items() if k not in free.get(section, ())}
        for section, fields in settings.items()
        if section not in FREE_SECTIONS
    }
