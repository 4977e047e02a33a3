"""Run benchmark suites: ``python -m benchmarks.run [--suite NAME …] [--setting cpu|gpu|toy]``.

A suite is a file ``bench_NAME.py`` here with a function ``run(output) -> str``, which may take a
``setting`` too: it measures, writes ``NAME.json`` under ``output``, and returns what to print. A
suite that fails or cannot run here is named, with the reason; the others go on. At the end come
the summary page and its picture.
"""

import importlib
import inspect
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, summary
from panther_jax.base import command
from panther_jax.base.console import duration

FOLDER = Path(__file__).resolve().parent
LOGGER = logging.getLogger("panther_jax")


class SuiteError(RuntimeError):
    """Suites that failed; the others ran."""


def suites() -> tuple[str, ...]:
    """Names of the suites."""
    return tuple(sorted(p.stem.removeprefix("bench_") for p in FOLDER.glob("bench_*.py")))


def run_suite(name: str, output: Path, setting: harness.Setting) -> str:
    """Run one suite; what it prints.

    Raises:
        harness.Skipped: if something that it needs is not there.
    """
    try:
        module = importlib.import_module(f"benchmarks.bench_{name}")
    except ImportError as error:
        raise harness.Skipped(f"cannot be imported here: {error}") from error
    if "setting" in inspect.signature(module.run).parameters:
        return module.run(output, setting)
    if setting == "toy":
        raise harness.Skipped("has no toy setting")
    return module.run(output)


def run_suites(
    names: Sequence[str], output: Path, setting: harness.Setting
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Run suites one after the other: what they print, those skipped, those that failed."""
    texts, skipped, failed = [], {}, {}
    for name in names:
        LOGGER.info("suite %s…", name)
        start = time.monotonic()
        try:
            text = run_suite(name, output, setting)
            texts.append(f"{name}, {duration(time.monotonic() - start)}\n{text}")
        except harness.Skipped as error:
            skipped[name] = f"skipped: {error}"
        except Exception as error:
            LOGGER.debug("suite %s", name, exc_info=error)
            failed[name] = f"failed: {type(error).__name__}: {error}"
        LOGGER.info("suite %s: %s", name, duration(time.monotonic() - start))
    return texts, skipped, failed


def report(
    names: Sequence[str], output: Path, setting: harness.Setting, first: Sequence[str] = ()
) -> str:
    """Run suites and write the summary; everything that there is to print, the table last.

    Raises:
        SuiteError: with the same text, if a suite failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    texts, skipped, failed = run_suites(names, output, setting)
    notes = {name: why.splitlines()[0] for name, why in (skipped | failed).items()}
    path = summary.write(output, notes)
    rows = [row for result in summary.read_results(output).values()
            for row in summary.rows_of(result) if row.suite in names]  # fmt: skip
    lines = [summary.table_line(row) for row in rows]
    problems = [f"{name} {why}" for name, why in (skipped | failed).items()]
    text = "\n\n".join([*first, *texts, *problems, "\n".join([*lines, str(path)])])
    if failed:
        raise SuiteError(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    known = suites()
    parser = command.parser(
        "benchmarks.run",
        f"Run benchmarks, ours and the peer interleaved. Suites: {', '.join(known)}.",
        "python -m benchmarks.run --suite import",
    )
    parser.add_argument("--suite", nargs="+", metavar="NAME", default=list(known), choices=known)
    parser.add_argument(
        "--output", type=Path,
        help="where JSON goes (default: results, results/gpu, or for toys nowhere that stays)",
    )  # fmt: skip
    parser.add_argument(
        "--setting", choices=harness.SETTINGS, default="cpu",
        help="sizes: for a CPU, for a GPU (checks its numbers first), or toys (default: cpu)",
    )  # fmt: skip
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        if arguments.setting == "gpu":
            from benchmarks import gpu

            return gpu.report(arguments.suite, arguments.output or FOLDER / "results" / "gpu")
        if arguments.setting == "toy" and arguments.output is None:
            with tempfile.TemporaryDirectory() as folder:
                return report(arguments.suite, Path(folder), "toy")
        return report(arguments.suite, arguments.output or FOLDER / "results", arguments.setting)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
