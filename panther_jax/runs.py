"""A training run from the command line to its folder: options, data, work directory, run.json.

What trains is in ``train.py``; here is what surrounds it. No JAX but for the name of the device.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import panther_jax
from panther_jax import command, config, imageio, planning, preprocess
from panther_jax.config import ConfigError, ConfigSource, TrainConfig
from panther_jax.log import announced, setup_logging, write_json
from panther_jax.places import Places
from panther_jax.plans import Plans, read_object
from panther_jax.store import Store, open_store

LOGGER = logging.getLogger("panther_jax")
DEMO_CASES = 15
DEMO_SEEDS = {"t2": 0, "t1": 1, "ct": 2}
"""Other patients in every modality: a stage must not have seen those that a later one validates."""
FREE_SECTIONS = ("log", "validation", "devices")
"""Config sections that may change between sessions of a run: they do not touch the training."""
FREE_DATA_FIELDS = ("resident", "num_threads", "prefetch_batches")
"""Likewise: how batches get to the device, not what they hold."""
EXAMPLE = "python -m panther_jax.train --config mri_t2.py --demo"

Fold = int | Literal["all"]
TrainFold = Callable[..., str]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """The command line of ``panther_jax.train`` but for the config's own fields."""

    fold: Fold
    root: Path
    workdir: Path | None = None
    raw: Path | None = None
    store: Path | None = None
    init: str | None = None
    demo: bool = False
    restart: bool = False
    prepare_only: bool = False
    allow_config_change: bool = False
    dry_run: bool = False
    deterministic: bool = False
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def make_parser() -> argparse.ArgumentParser:
    """The options that are not fields of the config."""
    parser = command.parser(
        "panther_jax.train",
        "Train one stage on one fold. Preprocesses first if need be; resumes by itself.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help="config file, or its bare name, e.g. mri_t2.py")
    add("--fold", default="0", help="fold number, or all (default 0)")
    add("--workdir", type=Path, help="work directory (default ROOT/runs/CONFIG)")
    add(
        "--root", type=Path, default=Path("data"), help="root of raw, store, weights, runs (./data)"
    )
    add("--raw", type=Path, help="raw data set in nnU-Net layout, instead of ROOT/raw/DATASET")
    add("--store", type=Path, help="preprocessed store, instead of ROOT/store/DATASET/PLANS")
    add("--init", metavar="MODEL|none", help="starting weights: a folder, or a name (weights list)")
    add("--demo", action="store_true", help="phantom data, small network, a budget of minutes")
    add("--restart", action="store_true", help="discard what the fold's folder holds")
    add("--prepare-only", action="store_true", help="make the store that training reads, and stop")
    add("--allow-config-change", action="store_true", help="resume although the config differs")
    add("--dry-run", action="store_true", help="show config, paths, device, size; do nothing")
    add("--deterministic", action="store_true", help="reproducible results on a GPU, slower")
    several = parser.add_argument_group("several processes", "start each with the same command")
    add = several.add_argument
    add("--distributed", action="store_true", help="SLURM, GKE or a TPU pod tells who they are")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens, to say it by hand")
    add("--num-processes", type=int, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="K", help="which one this is, from 0")
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into the options here and the config's ``--section.field`` overrides."""
    given = command.normalized(argv)
    wants_help = any(a in ("-h", "--help") for a in given)
    parser = make_parser()
    arguments, rest = parser.parse_known_args([a for a in given if a not in ("-h", "--help")])
    if wants_help:
        parser.print_help()
        if arguments.config:
            print("\nfields of the config, with its values as defaults:\n")
            rest = ["--help"]
        else:
            print("\nname a config to see its fields: --config mri_t2.py --help")
            raise SystemExit(0)
    if not arguments.config:
        parser.error(f"--config is required, e.g. {EXAMPLE}")
    if arguments.fold != "all" and not arguments.fold.isdigit():
        parser.error(f"--fold must be a number or all, found {arguments.fold!r}")
    return arguments, rest


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
    except (ConfigError, FileNotFoundError) as error:
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
    """The config of a command line: file, then ``--demo``, then ``--init``, then overrides."""
    settings, source = config.load_config(spec)
    if options.demo:
        settings = config.demo(settings)
    if options.init is not None:
        bundle = None if options.init == "none" else options.init
        settings = dataclasses.replace(
            settings, init=dataclasses.replace(settings.init, bundle=bundle)
        )
    settings = config.apply_overrides(settings, overrides, prog="python -m panther_jax.train")
    return settings, source


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
    bundle = places.bundle(settings.init.bundle) if settings.init.bundle else None
    try:
        store = _one_by_one("store", lambda: prepare_store(settings, options, places))
        if options.prepare_only:
            return str(store.folder)
        if primary:
            open_workdir(workdir, folder, settings, store, options)
        setup_logging(quiet=quiet, file=folder / "log.txt" if primary else None)
        record(folder, _provenance(settings, source, options))
        tables = train_fold(settings, store, folder, fold=options.fold, bundle=bundle)
    except Exception as error:
        LOGGER.debug("stopped", exc_info=error)
        raise _explained(error) from error
    return f"{folder}\n\n{tables}" if primary else ""


def _join(options: Options) -> bool:
    """Join the other processes of the run, if there are any; whether this is the first one."""
    from panther_jax import devices

    if options.distributed or options.coordinator:
        devices.connect(options.coordinator, options.num_processes, options.process_id)
    return devices.is_primary()


def _one_by_one(what: str, make: Callable[[], Result]) -> Result:
    """Let the first process do something on disk; the others then find it done."""
    from panther_jax import devices

    if devices.is_primary():
        result = make()
        devices.wait_for_all(what)
        return result
    devices.wait_for_all(what)
    return make()


def _explained(error: Exception) -> Exception:
    from panther_jax import devices

    if devices.lost_process(error):
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
        from panther_jax import devices

        devices.use_compilation_cache()


def device_name() -> str:
    """The devices that JAX uses, e.g. ``1 x NVIDIA H200`` or ``1 x cpu``."""
    import jax

    found = jax.devices()
    among = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(found)} x {found[0].device_kind}{among}"


# ------------------------------------------------------------------------------------- signals


class LostProcess(RuntimeError):
    """Another process of the run died."""


class Interrupted(RuntimeError):
    """A signal asked to stop; everything is saved."""


@dataclass
class StopRequest:
    """Set by SIGINT, SIGTERM or SIGUSR1; read between steps. A second Ctrl-C stops at once."""

    by: str | None = None

    def listen(self) -> None:
        """Install the handlers."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    @staticmethod
    def after_training() -> None:
        """Nobody reads between steps any more: let the signals stop the process at once."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)

    def _handle(self, number: int, _frame: Any) -> None:
        self.by = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
        folder = places.raw(settings.data.dataset)
    raw = imageio.open_raw(folder)
    name = folder.resolve().name
    out = places.store(name, settings.data.data_identifier)
    fingerprint = planning.fingerprint_if_needed(settings, raw, out, workers=_workers())
    plans = planning.plans_from_config(settings, raw.dataset, fingerprint)
    plans = dataclasses.replace(plans, dataset_name=name)
    plans.arch.check_patch(plans.patch_size)
    with announced(f"preprocessing {len(raw.cases)} cases of {folder} to {out}"):
        preprocess.preprocess(
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
    from panther_jax import datasets

    folder = places.phantoms(settings.data.dataset, settings.data.modality)
    if not (folder / "dataset.json").is_file():
        with announced(f"making {DEMO_CASES} phantom cases in {folder}"):
            datasets.make_phantom(
                folder,
                modality=settings.data.modality,
                num_cases=DEMO_CASES,
                seed=DEMO_SEEDS[settings.data.modality],
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
        changed = config.differences(_fixed(stored), _fixed(settings.to_json()))
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
    folder.mkdir(parents=True, exist_ok=True)
    write_json(config_path, settings.to_json())
    write_json(plans_path, read_object(store.folder / "plans.json"))
    write_json(workdir / "dataset.json", store.dataset)


def _stored_config(path: Path) -> TrainConfig:
    try:
        return TrainConfig.from_json(read_object(path))
    except (TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"{path} is not a config of this version: {error}\n  Choose another --workdir, or "
            "delete that file."
        ) from None


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    fixed = {k: v for k, v in settings.items() if k not in FREE_SECTIONS}
    return {**fixed, "data": {k: v for k, v in fixed["data"].items() if k not in FREE_DATA_FIELDS}}


def record(folder: Path, entries: dict[str, Any]) -> None:
    """Add entries to the fold's ``run.json``; the first process of a run does."""
    import jax

    if jax.process_index():
        return
    path = folder / "run.json"
    known = read_object(path) if path.is_file() else {}
    write_json(path, {**known, **entries})


def _provenance(settings: TrainConfig, source: ConfigSource, options: Options) -> dict[str, Any]:
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


# ------------------------------------------------------------------------------------- dry run


def describe(settings: TrainConfig, options: Options, places: Places, workdir: Path) -> str:
    """What ``--dry-run`` prints: config, paths, device, parameters, estimated memory."""
    from panther_jax.model import count_params

    typical = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumor": 1, "pancreas": 2},
    }
    no_statistics = dataclasses.replace(settings.data, normalization=("NoNormalization",))
    plain = dataclasses.replace(settings, data=no_statistics)
    arch = planning.plans_from_config(plain, typical, None).arch
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
