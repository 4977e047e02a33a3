"""The command line of ``panther_jax.train`` but for the config's own fields."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from panther_jax.base import command
from panther_jax.config.places import Fold

EXAMPLE = "python -m panther_jax.train --config mri_t2.py --demo"


@dataclass(frozen=True)
class Options:
    """The command line of ``panther_jax.train`` but for the config's own fields."""

    fold: Fold
    root: Path
    config: str = ""
    workdir: Path | None = None
    raw: Path | None = None
    store: Path | None = None
    from_plans: str | None = None
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
    quiet: bool = False
    debug: bool = False


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
    add(
        "--from-plans",
        metavar="PLANS[:CONFIGURATION]|store",
        help="take grid, patch, batch and network from nnU-Net plans, or from the store's",
    )
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


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
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
    fold = "all" if arguments.fold == "all" else int(arguments.fold)
    names = {f.name for f in dataclasses.fields(Options)}
    given = {k: v for k, v in vars(arguments).items() if k in names}
    return Options(**{**given, "fold": fold}), rest
