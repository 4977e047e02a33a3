"""What the seed alone changes: ``python -m benchmarks.study_seeds --folder DIR``.

Trains the demo with several seeds, or finds it trained, and writes the Dice of the held-out cases
with mean and standard deviation over seeds to ``results/seeds.json``.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from panther_jax.base import command
from panther_jax.base.console import table


def trained(folder: Path, seed: int) -> dict[str, float]:
    """Mean Dice a class of the demo with a seed."""
    workdir = folder / f"seed_{seed}"
    path = workdir / "fold_0" / "validation_final" / "summary.json"
    if not path.is_file():
        argv = ("--config", "mri_t2.py", "--demo", "--workdir", str(workdir), "--loop.seed")
        subprocess.run(
            [sys.executable, "-m", "panther_jax.train", *argv, str(seed), "--root", str(folder)],
            cwd=harness.ROOT,
            check=True,
        )
    found = json.loads(path.read_text())["mean"]
    labels = json.loads((workdir / "dataset.json").read_text())["labels"]
    return {name: found[str(value)]["Dice"] for name, value in labels.items() if value}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(
        "benchmarks.study_seeds",
        "Train the demo with several seeds and compare.",
        "python -m benchmarks.study_seeds --folder /tmp/seeds",
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where data and runs go")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--output", type=Path, default=harness.ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        found = {seed: trained(arguments.folder.resolve(), seed) for seed in arguments.seeds}
        names = list(next(iter(found.values())))
        values = {name: [scores[name] for scores in found.values()] for name in names}
        overall = {
            name: {"mean": statistics.fmean(v), "sd": statistics.stdev(v), "seeds": v}
            for name, v in values.items()
        }
        facts = {"setting": "demo, final checkpoint, held-out cases", "dice": overall}
        harness.write_result(arguments.output, "seeds", [], facts)
        rows = [[str(s), *(f"{d[n]:.3f}" for n in names)] for s, d in found.items()]
        rows.append(["mean", *(f"{overall[n]['mean']:.3f}" for n in names)])
        rows.append(["sd", *(f"{overall[n]['sd']:.3f}" for n in names)])
        return table(["seed", *names], rows)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
