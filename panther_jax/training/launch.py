"""A training run from the command line to its folder."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import panther_jax
from panther_jax.base import command
from panther_jax.base.console import setup_logging
from panther_jax.base.errors import PlansError, StoreError
from panther_jax.config import loading
from panther_jax.config.laptop import demo
from panther_jax.config.loading import ConfigSource
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.planner import from_config
from panther_jax.plans.architecture import NETWORKS
from panther_jax.preprocessing.normalization import NORMALIZATIONS
from panther_jax.store.store import Store
from panther_jax.training.data import planned, prepare_store
from panther_jax.training.options import Fold, Options, Result, TrainFold, parse
from panther_jax.training.provenance import _provenance, device_name, record
from panther_jax.training.signals import LostProcess
from panther_jax.training.workdir import open_workdir
from panther_jax.weights.names import named_start

LOGGER = logging.getLogger("panther_jax")


def main(train_fold: TrainFold, argv: Sequence[str]) -> int:
    """Run the training command; returns the exit code."""
    arguments, overrides = parse(argv)
    fold: Fold = "all" if arguments.fold == "all" else int(arguments.fold)
    names = {f.name for f in dataclasses.fields(Options)}
    given = {k: v for k, v in vars(arguments).items() if k in names}
    options = Options(**{**given, "fold": fold})
    setup_logging(quiet=arguments.quiet)
    try:
        settings, source = resolve(arguments.config, overrides, options)
        require_known(settings)
    except (ConfigError, PlansError, StoreError, FileNotFoundError) as error:
        LOGGER.error("error: %s", error)
        return command.WRONG_USAGE
    code = command.run(
        lambda: execute(train_fold, settings, source, options, quiet=arguments.quiet),
        quiet=arguments.quiet,
        debug=arguments.debug,
    )
    if code and (options.distributed or options.coordinator):
        # An orderly end would wait for the other processes, of which one may be gone.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


def resolve(
    spec: str, overrides: Sequence[str], options: Options
) -> tuple[TrainConfig, ConfigSource]:
    """The config of a command line: file, ``--demo``, plans, ``--init``, then overrides."""
    settings, source = loading.load_config(spec)
    if options.demo:
        settings = demo(settings)
    settings = planned(settings, options)
    if options.init is not None:
        bundle = None if options.init == "none" else options.init
        settings = dataclasses.replace(
            settings, init=dataclasses.replace(settings.init, bundle=bundle, source="")
        )
    settings = loading.apply_overrides(settings, overrides, prog="python -m panther_jax.train")
    return settings, source


def require_known(settings: TrainConfig) -> None:
    """Make sure, before any work, that there is what the config names.

    Raises:
        ConfigError: naming the field and what there is.
    """
    from panther_jax.training.losses import require_loss

    require_loss(settings.loss)
    if settings.arch.network not in NETWORKS.names:
        raise ConfigError(f"arch.network: {NETWORKS.unknown(settings.arch.network)}")
    for scheme in settings.data.normalization or ():
        if scheme not in NORMALIZATIONS.names:
            raise ConfigError(f"data.normalization: {NORMALIZATIONS.unknown(scheme)}")


def execute(
    train_fold: TrainFold,
    settings: TrainConfig,
    source: ConfigSource,
    options: Options,
    *,
    quiet: bool,
) -> str:
    """Prepare data and work directory, train, and return what the command prints."""
    _set_up_jax(settings, deterministic=options.deterministic)
    primary = _join(options)
    quiet = quiet or not primary
    setup_logging(quiet=quiet)
    places = Places(options.root)
    workdir = options.workdir or places.run(source.run_name + ("_demo" if options.demo else ""))
    folder = places.fold(workdir, options.fold)
    LOGGER.info(
        "panther_jax %s, JAX %s on %s\nconfig %s\nwork directory %s",
        panther_jax.__version__,
        importlib.metadata.version("jax"),
        device_name(),
        source.path,
        workdir,
    )
    if options.dry_run:
        return describe(settings, options, places, workdir)
    init = settings.init
    bundle = named_start(init.bundle, places, source=init.source) if init.bundle else None
    try:
        store = _one_by_one("store", lambda: prepare_store(settings, options, places))
        if options.prepare_only:
            return str(store.folder)
        if primary:
            open_workdir(workdir, folder, settings, store, options)
        setup_logging(quiet=quiet, file=folder / "log.txt" if primary else None)
        record(folder, _provenance(settings, source, options) | _data_of(store, options))
        tables = train_fold(settings, store, folder, fold=options.fold, bundle=bundle)
    except Exception as error:
        LOGGER.debug("stopped", exc_info=error)
        raise _explained(error) from error
    return f"{folder}\n\n{tables}" if primary else ""


def _join(options: Options) -> bool:
    """Join the other processes of the run, if there are any; whether this is the first one."""
    from panther_jax.devices import processes

    if options.distributed or options.coordinator:
        processes.connect(options.coordinator, options.num_processes, options.process_id)
    return processes.is_primary()


def _one_by_one(what: str, make: Callable[[], Result]) -> Result:
    """Let the first process do something on disk; the others then find it done."""
    from panther_jax.devices import processes

    if processes.is_primary():
        result = make()
        processes.wait_for_all(what)
        return result
    processes.wait_for_all(what)
    return make()


def _explained(error: Exception) -> Exception:
    from panther_jax.devices import processes

    if processes.lost_process(error):
        return LostProcess(
            "another process of this run is gone, so this one cannot go on\n  Start all of them "
            "again with the same commands: the run resumes from its last checkpoint, also on "
            "another number of devices."
        )
    return error


def _set_up_jax(settings: TrainConfig, *, deterministic: bool) -> None:
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if settings.loop.compilation_cache:
        from panther_jax.devices import compiler

        compiler.use_compilation_cache()


def _data_of(store: Store, options: Options) -> dict[str, Any]:
    """Where the data lies, for what needs it after the training, such as an export."""
    raw = None if options.raw is None else str(options.raw.resolve())
    return {"store": str(store.folder.resolve()), "raw": raw}


# ------------------------------------------------------------------------------------- dry run


def describe(settings: TrainConfig, options: Options, places: Places, workdir: Path) -> str:
    """What ``--dry-run`` prints: config, paths, device, parameters, estimated memory."""
    from panther_jax.network.unet import count_params

    typical = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumor": 1, "pancreas": 2},
    }
    no_statistics = dataclasses.replace(settings.data, normalization=("NoNormalization",))
    plain = dataclasses.replace(settings, data=no_statistics)
    arch = from_config.plans_from_config(plain, typical, None).arch
    parameters = count_params(arch)
    slots = {"sgd": 1, "adam": 2, "adamw": 3}[settings.optim.optimizer]
    width = 4 if settings.loop.compute_dtype == "float32" or "cpu" in device_name() else 2
    activations = settings.data.batch_size * width * activation_values(settings)
    state = 4 * parameters * (2 + slots)
    dataset = options.raw or options.store or places.root / "raw" / settings.data.dataset
    return "\n".join(
        [
            json.dumps(settings.to_json(), indent=2),
            f"data            {dataset}",
            f"work directory  {places.fold(workdir, options.fold)}",
            f"device          {device_name()}",
            f"parameters      {parameters:,} (one input channel, three outputs)",
            f"memory          about {(state + activations) / 2**30:.1f} GiB: "
            f"{state / 2**30:.2f} state and gradients, {activations / 2**30:.1f} activations",
        ]
    )


def activation_values(settings: TrainConfig) -> int:
    """Values a sample kept for the backward pass: two a convolution output (spec 08 §8.3)."""
    arch, size = settings.arch, list(settings.data.patch_size)
    total, sizes = 0, []
    for stage, features in enumerate(arch.features):
        size = [-(-n // s) for n, s in zip(size, arch.strides[stage], strict=True)]
        sizes.append(math.prod(size))
        per_block = 2 if arch.network == "ResidualEncoderUNet" else 1
        total += 2 * per_block * arch.blocks[stage] * features * sizes[-1]
    for stage, convs in enumerate(reversed(arch.decoder_convs)):
        total += 2 * (convs + 1) * arch.features[stage] * sizes[stage]
    return total
