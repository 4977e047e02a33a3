"""Make a bundle of a run's weights: ``python -m panther_jax.bundle --run RUN --out BUNDLE``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from panther_jax.base import command
from panther_jax.config.schema import CHECKPOINTS
from panther_jax.weights.from_run import make_bundle

EXAMPLE = "python -m panther_jax.bundle --run data/runs/ct_pancreas --out data/weights/ct_pancreas"


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.bundle", "Make a bundle of a run's weights, to start from or pass on.", EXAMPLE
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="work directory of a run")
    add("--out", type=Path, required=True, help="folder of the bundle")
    add("--folds", nargs="+", default=[], metavar="K", help="numbers, all or fold_all (all)")
    add("--checkpoint", choices=CHECKPOINTS, default="final", help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace the bundle if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        make_bundle(
            arguments.run,
            arguments.out,
            folds=arguments.folds,
            checkpoint=arguments.checkpoint,
            overwrite=arguments.overwrite,
        )
        return str(arguments.out)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
