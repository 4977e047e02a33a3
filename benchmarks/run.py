"""Run benchmark suites: ``python -m benchmarks.run [--suite NAME …] [--output DIR]``.

A suite is a file ``bench_NAME.py`` here with a function ``run(output) -> str``: it measures, writes
``NAME.json`` under ``output``, and returns what to print.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from panther_jax import command

FOLDER = Path(__file__).resolve().parent


def suites() -> tuple[str, ...]:
    """Names of the suites."""
    return tuple(sorted(p.stem.removeprefix("bench_") for p in FOLDER.glob("bench_*.py")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    known = suites()
    parser = command.parser(
        "benchmarks.run",
        f"Run benchmarks, ours and the peer interleaved. Suites: {', '.join(known)}.",
        "python -m benchmarks.run --suite import",
    )
    parser.add_argument("--suite", nargs="+", metavar="NAME", default=list(known), choices=known)
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="where JSON goes")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        texts = []
        for name in arguments.suite:
            module = importlib.import_module(f"benchmarks.bench_{name}")
            texts.append(f"{name}\n{module.run(arguments.output)}")
        return "\n\n".join(texts)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
