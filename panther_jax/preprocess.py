"""Preprocess a raw data set into a store: ``python -m panther_jax.preprocess``."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panther_jax.base import command
from panther_jax.base.files import read_object
from panther_jax.config.loading import load_config
from panther_jax.images.raw_dataset import RawDataset, open_raw
from panther_jax.library import Face
from panther_jax.planner.from_config import fingerprint_if_needed, plans_from_config
from panther_jax.plans.plans import Plans
from panther_jax.preprocessing.pipeline import preprocess
from panther_jax.store import layout

logger = logging.getLogger("panther_jax")


# -------------------------------------------------------------------------------------- command

EXAMPLE = """python -m panther_jax.preprocess --raw data/raw/Dataset901_PANTHER \\
      --config mri_t1 --out data/store/Dataset901_PANTHER/plans_3d --workers 4"""


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.preprocess",
        "Preprocess a raw dataset into a store. Running it again continues.",
        EXAMPLE,
    )
    parser.add_argument("--raw", type=Path, required=True, help="raw dataset, nnU-Net layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of the store")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--plans", type=Path, help="nnU-Net plans.json")
    source.add_argument("--config", help="training config, NAME[:ARG] or a file")
    parser.add_argument("--configuration", help="configuration in --plans, e.g. 3d_fullres")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    return parser


def read_plans(
    path: Path, raw: RawDataset, configuration: str | None
) -> tuple[Plans, Mapping[str, Any] | None]:
    """A configuration of a plans.json, and the fingerprint that lies beside it, if one does.

    Raises:
        FileNotFoundError, PlansError: if the plans cannot be used.
    """
    beside = path.parent / layout.FINGERPRINT
    fingerprint = read_object(beside) if beside.is_file() else None
    return Plans.from_nnunet(read_object(path), raw.dataset, configuration), fingerprint


def _plans_and_fingerprint(
    arguments: argparse.Namespace, raw: RawDataset
) -> tuple[Plans, Mapping[str, Any] | None]:
    if arguments.plans is not None:
        return read_plans(arguments.plans, raw, arguments.configuration)
    config, _ = load_config(arguments.config)
    fingerprint = fingerprint_if_needed(config, raw, arguments.out, workers=arguments.workers)
    return plans_from_config(config, raw.dataset, fingerprint), fingerprint


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    if arguments.workers < 0:
        parser.error(f"--workers must not be negative, found {arguments.workers}")
    if arguments.config is not None and arguments.configuration is not None:
        parser.error("--configuration belongs to --plans; a config names its own")

    def body() -> str:
        raw = open_raw(arguments.raw)
        plans, fingerprint = _plans_and_fingerprint(arguments, raw)
        preprocess(
            raw,
            plans,
            arguments.out,
            workers=arguments.workers,
            progress=lambda case_id, done, total: logger.info("[%d/%d] %s", done, total, case_id),
            fingerprint=fingerprint,
        )
        return str(arguments.out)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


sys.modules[__name__].__class__ = Face  # panther_jax.preprocess is a function too


if __name__ == "__main__":
    raise SystemExit(main())
