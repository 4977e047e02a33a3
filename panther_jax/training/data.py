"""The store that a run trains on: named, or made from raw data or phantoms."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from panther_jax.base.console import announced
from panther_jax.config.loading import differences
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.images import raw_dataset
from panther_jax.images.raw_dataset import RawDataset
from panther_jax.planner import from_config, from_plans
from panther_jax.plans.plans import Plans
from panther_jax.preprocessing import pipeline
from panther_jax.store.store import Store, open_store
from panther_jax.training.options import Options

LOGGER = logging.getLogger("panther_jax")
STORE = "store"
"""What `--from-plans` calls the plans of `--store`."""
DEMO_CASES = 15


# ---------------------------------------------------------------------------------------- data


def planned(settings: TrainConfig, options: Options) -> TrainConfig:
    """The config with what the plans of ``--from-plans`` decide.

    A ``--store`` that nnU-Net preprocessed decides by its own plans unless others are named.

    Raises:
        ConfigError, PlansError, StoreError, FileNotFoundError: if there are no such plans.
    """
    plans = _named_plans(options)
    if plans is None:
        return settings
    changed = from_plans.config_from_plans(settings, plans)
    lines = differences(settings.to_json(), changed.to_json())
    LOGGER.info(
        "configuration %s of %s decides (config -> plans):\n  %s",
        plans.configuration,
        plans.plans_name,
        "\n  ".join(lines) or "nothing that the config says otherwise",
    )
    return changed


def _named_plans(options: Options) -> Plans | None:
    if options.from_plans not in (None, STORE):
        return from_plans.read_plans(options.from_plans)
    if options.store is None:
        if options.from_plans == STORE:
            raise ConfigError("--from-plans store needs --store FOLDER; or name a plans file")
        return None
    store = open_store(options.store)
    decides = options.from_plans == STORE or store.nnunet is not None
    return store.plans if decides else None


def prepare_store(settings: TrainConfig, options: Options, places: Places) -> Store:
    """The store to train on: the one named, or made from the raw data set, or from phantoms."""
    if options.store is not None:
        return _named_store(open_store(options.store), settings, options)
    if options.raw is not None:
        folder = options.raw
    elif options.demo:
        folder = _phantoms(settings, places)
    else:
        folder = places.raw(settings.data.dataset, source=settings.data.source)
    raw = raw_dataset.open_raw(folder)
    name = folder.resolve().name
    out = places.store(name, settings.data.data_identifier)
    plans, fingerprint = _plans_and_fingerprint(settings, options, raw, out)
    plans = dataclasses.replace(plans, dataset_name=name)
    plans.arch.check_patch(plans.patch_size)
    with announced(f"preprocessing {len(raw.cases)} cases of {folder} to {out}"):
        pipeline.preprocess(
            raw,
            plans,
            out,
            workers=_workers(),
            progress=_case_lines("preprocessed"),
            fingerprint=fingerprint,
        )
    return open_store(out)


def _plans_and_fingerprint(
    settings: TrainConfig, options: Options, raw: RawDataset, out: Path
) -> tuple[Plans, dict[str, Any] | None]:
    if options.from_plans is not None:
        plans = from_plans.read_plans(options.from_plans, raw.dataset)
        return from_plans.plans_with_config(plans, settings), None
    fingerprint = from_config.fingerprint_if_needed(settings, raw, out, workers=_workers())
    return from_config.plans_from_config(settings, raw.dataset, fingerprint), fingerprint


def _named_store(store: Store, settings: TrainConfig, options: Options) -> Store:
    """The store with the plans that the run trains by; makes sure that its cases fit them."""
    if options.from_plans is None and store.nnunet is None:
        return _checked(store, settings)
    plans = store.plans
    if options.from_plans not in (None, STORE):
        plans = from_plans.read_plans(options.from_plans, store.dataset)
    plans = from_plans.plans_with_config(plans, settings)
    from_plans.require_same_arrays(store.plans, plans, store.folder)
    plans.arch.check_patch(plans.patch_size)
    return dataclasses.replace(store, plans=plans)


def _checked(store: Store, settings: TrainConfig) -> Store:
    arch, wanted = store.plans.arch, settings.arch
    names = ("features", "strides", "blocks", "kernel_sizes", "decoder_convs")
    fields = [(f"arch.{n}", getattr(arch, n), getattr(wanted, n)) for n in names]
    fields.append(("data.patch_size", store.plans.patch_size, settings.data.patch_size))
    different = [f"{name}: {ours} -> {asked}" for name, ours, asked in fields if ours != asked]
    if different:
        raise ConfigError(
            f"store {store.folder} was made for another network or patch (stored -> config):\n  "
            + "\n  ".join(different)
            + "\n  Train as the store's plans say with --from-plans store, or preprocess with "
            "this config."
        )
    return store


def _phantoms(settings: TrainConfig, places: Places) -> Path:
    from panther_jax.images import phantom_dataset

    folder = places.phantoms(settings.data.dataset, settings.data.modality)
    if not (folder / "dataset.json").is_file():
        with announced(f"making {DEMO_CASES} phantom cases in {folder}"):
            phantom_dataset.make_phantom(
                folder,
                modality=settings.data.modality,
                num_cases=DEMO_CASES,
                seed=phantom_dataset.PATIENTS[settings.data.modality],
                progress=_case_lines("made"),
            )
    return folder


def _case_lines(what: str) -> Callable[[str, int, int], None]:
    start = time.monotonic()

    def tell(case_id: str, done: int, total: int) -> None:
        left = (time.monotonic() - start) / max(done, 1) * (total - done)
        LOGGER.info("  %s %s (%d/%d), left %.0f s", what, case_id, done, total, left)

    return tell


def _workers() -> int:
    return min(8, os.cpu_count() or 1)
