"""The store that a run trains on: named, or made from raw data or phantoms."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from panther_jax.base.console import announced
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.images import raw_dataset
from panther_jax.planner import from_config
from panther_jax.preprocessing import pipeline
from panther_jax.store.store import Store, open_store
from panther_jax.training.options import Options

LOGGER = logging.getLogger("panther_jax")
DEMO_CASES = 15


# ---------------------------------------------------------------------------------------- data


def prepare_store(settings: TrainConfig, options: Options, places: Places) -> Store:
    """The store to train on: the one named, or made from the raw data set, or from phantoms."""
    if options.store is not None:
        return _checked(open_store(options.store), settings)
    if options.raw is not None:
        folder = options.raw
    elif options.demo:
        folder = _phantoms(settings, places)
    else:
        folder = places.raw(settings.data.dataset, source=settings.data.source)
    raw = raw_dataset.open_raw(folder)
    name = folder.resolve().name
    out = places.store(name, settings.data.data_identifier)
    fingerprint = from_config.fingerprint_if_needed(settings, raw, out, workers=_workers())
    plans = from_config.plans_from_config(settings, raw.dataset, fingerprint)
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


def _checked(store: Store, settings: TrainConfig) -> Store:
    arch, wanted = store.plans.arch, settings.arch
    for name in ("features", "strides", "blocks", "kernel_sizes", "decoder_convs"):
        if getattr(arch, name) != getattr(wanted, name):
            raise ConfigError(
                f"store {store.folder} was made for {name} {getattr(arch, name)}, the config has "
                f"{getattr(wanted, name)}\n  Preprocess with this config, or override arch.{name}."
            )
    if store.plans.patch_size != settings.data.patch_size:
        raise ConfigError(
            f"store {store.folder} was made for patches of {store.plans.patch_size}, the config "
            f"has {settings.data.patch_size}; pass --data.patch-size to match"
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
