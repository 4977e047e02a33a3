"""One page and one picture of all suites, from their JSON: ``python -m benchmarks.summary``.

Every suite's ratio is the peer's seconds (or bytes) over ours: above 1 we are better. Nothing is
measured here, and nothing is left out: a suite without a figure is listed as such.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panther_jax.base import command

FOLDER = Path(__file__).resolve().parent / "results"
PAGE, PICTURE, GPU = "README.md", "summary.png", "gpu"
ORDER = (
    "numerics", "train_step", "epoch", "augment", "predict", "export", "preprocess", "evaluate",
    "import", "compile",
)  # fmt: skip
LIBRARIES = ("jax", "torch", "nnunetv2")
CROWDED = 1.5
"""Load average over the number of cores from which on a machine was not idle."""
GPU_ONLY = (
    (
        "train_step",
        "step of ResEnc-L at 192³, batch 2, at least 1.3 times as fast as the peer's best",
    ),
    ("train_step", "the same at 45 % of the bfloat16 roofline, with no more peak memory"),
    ("epoch", "at least 1.5 times as fast with default augmentation, 3 times with DA5"),
    ("epoch", "within 5 % of its bare steps, waiting less than 2 %"),
    ("augment", "default under 5 %, DA5 under 15 % of the step at 192³"),
    ("predict", "five folds at least 2 times as fast"),
    ("compile", "the step at 192³ in less than 120 s, from the cache in less than 15 s"),
)
"""Goals that only a GPU can answer: suite, goal."""
INTRODUCTION = """# What was measured

Written by `python -m benchmarks.run` from the JSON files beside this page. Each suite runs ours and
the peer (nnU-Net as installed, or what its line says) in turn on the same machine; the ratio is the
peer's over ours, above 1 we are better, and its range is that of the rounds. Goals are those that
the project set itself; *open* means that the figure here does not reach it. A figure holds for the
machine, the sizes and the commit named with its suite, and for no other.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table; ``ours`` and ``peer`` in the unit that ``what`` names, else seconds."""

    suite: str
    what: str
    ours: float | None
    peer: float | None
    ratio: Mapping[str, float] | None
    goal: float | str | None
    met: bool | None


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON of every suite in a folder, in the order of the page."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and "suite" in value and "machine" in value:
            found[value["suite"]] = value
    known = [name for name in ORDER if name in found]
    ordered = {name: found[name] for name in [*known, *sorted(set(found) - set(known))]}
    if (folder / GPU).is_dir():
        ordered |= {f"{n}, on a GPU": value for n, value in read_results(folder / GPU).items()}
    return ordered


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The lines of a suite: its ``rows``, or what the older suites hold in their own shapes."""
    suite = str(result["suite"])
    if "rows" in result:
        return [Row(suite, **row) for row in result["rows"]]
    made = {"augment": _augment, "preprocess": _preprocess, "evaluate": _evaluate}
    if suite == "import":
        return _import(result)
    return made[suite](result) if suite in made else []


def _medians(result: Mapping[str, Any]) -> dict[str, float]:
    return {entry["name"]: entry["median_seconds"] for entry in result["results"]}


def _augment(result: Mapping[str, Any]) -> list[Row]:
    rows = []
    for found in result["comparisons"]:
        ours = 1 / found["samples_per_second_per_core"]
        peer = 1 / found["peer_samples_per_second_per_core"]
        ratio = {**found["faster_by_round"], "median": found["faster"]}
        what = f"augment a sample on one core, {found['policy']} {found['edge']}³"
        rows.append(Row("augment", what, ours, peer, ratio, found["goal"], found["met"]))
    return rows


def _preprocess(result: Mapping[str, Any]) -> list[Row]:
    seconds = _medians(result)
    return [
        Row(
            "preprocess",
            f"preprocess a full-size case, {name}",
            seconds.get(name),
            seconds.get(f"{name}, nnU-Net"),
            found["peer_seconds_over_ours"],
            3.0,
            found["met"],
        )
        for name, found in result["cases"].items()
    ]


def _evaluate(result: Mapping[str, Any]) -> list[Row]:
    ours, peer = list(_medians(result).values())[:2]
    ratio = result["peer_seconds_over_ours"]
    return [Row("evaluate", result["setting"], ours, peer, ratio, 3.0, result["met"])]


def _import(result: Mapping[str, Any]) -> list[Row]:
    ours, peer = list(_medians(result).values())[:2]
    ratio, memory = result["peer_seconds_over_ours"], result["peak_memory_over_file_size"]
    bars, theirs = result["bars"], result["peer_peak_memory_over_file_size"]
    limit = bars["peak_memory_over_file_size"]
    return [
        Row("import", "import a ResEnc-L checkpoint", ours, peer, ratio,
            f"< {bars['seconds']:g} s", ours < bars["seconds"]),
        Row("import", "the same: peak memory over the file's size", memory, theirs, None,
            f"< {limit:g}", memory < limit),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------- page


def number(value: float | None) -> str:
    """Three significant digits, no exponent."""
    if value is None or not math.isfinite(value):
        return "-"
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 5)}f}"


def verdict(row: Row) -> str:
    """Met, open, or nothing where there is no goal."""
    return {True: "met", False: "**open**", None: ""}[row.met]


def table_line(row: Row) -> str:
    """A line of the table in Markdown."""
    ratio = "-"
    if row.ratio is not None:
        low, high = number(row.ratio["min"]), number(row.ratio["max"])
        ratio = f"{number(row.ratio['median'])} ({low} to {high})"
    goal = row.goal if isinstance(row.goal, str) else number(row.goal) if row.goal else ""
    cells = (row.what, number(row.ours), number(row.peer), ratio, str(goal), verdict(row))
    return f"| {' | '.join(cells)} |"


def machine_line(result: Mapping[str, Any]) -> str:
    """On what, when, at which commit; says so if the machine was busy with something else."""
    machine = result["machine"]
    device = machine.get("accelerator") or "no accelerator"
    commit = result.get("git_commit") or "no commit"
    short = commit[:10] + (" with changes not committed" if commit.endswith("+") else "")
    load = machine["load_average"][0]
    busy = f"; load average {load:g} at the end" if load > CROWDED * machine["cores"] else ""
    versions = machine.get("versions", {})
    known = [f"{name} {versions[name]}" for name in LIBRARIES if name in versions]
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {device}; "
        f"{', '.join(known) or 'versions not noted'}; commit {short}; "
        f"{result['date'][:16].replace('T', ' ')}{busy}"
    )


def page(results: Mapping[str, Mapping[str, Any]], notes: Mapping[str, str]) -> str:
    """The page; ``notes`` says of suites that were skipped or failed why."""
    rows = [row for result in results.values() for row in rows_of(result)]
    counted = [row.met for row in rows if row.met is not None]
    parts = [
        INTRODUCTION,
        f"{sum(counted)} of {len(counted)} goals met, {len(counted) - sum(counted)} open. "
        "Seconds unless the line names another unit.\n",
        f"![ratios]({PICTURE})\n",
    ]
    for suite, result in results.items():
        lines = [table_line(row) for row in rows_of(result)]
        parts.append(
            "\n".join(
                [
                    f"## {suite}\n",
                    f"{result.get('setting', '')}  \n{machine_line(result)}\n",
                    "| what | ours | peer | peer over ours (range) | goal | |",
                    "|---|---|---|---|---|---|",
                    *(lines or ["| no comparable figure in its JSON | | | | | |"]),
                    "",
                ]
            )
        )
    unanswered = [
        f"- {suite}: {goal}" for suite, goal in GPU_ONLY if f"{suite}, on a GPU" not in results
    ]
    if unanswered:
        title = "## Open for want of a GPU: nothing was measured on one\n"
        parts.append("\n".join([title, *unanswered, ""]))
    if notes:
        parts.append("\n".join(["## Not measured in the last run\n"]
                               + [f"- {n}: {why}" for n, why in notes.items()] + [""]))  # fmt: skip
    return "\n".join(parts)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Ratios with their ranges on a logarithmic axis; 1 is the peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(row, row.ratio) for row in rows if row.ratio is not None]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.27 * len(shown)), layout="constrained")
    for place, (row, ratio) in enumerate(shown):
        color = {True: "tab:green", False: "tab:red", None: "tab:gray"}[row.met]
        axes.plot([ratio["min"], ratio["max"]], [place] * 2, color=color, linewidth=2)
        axes.plot(ratio["median"], place, "o", color=color, markersize=5)
        if isinstance(row.goal, (int, float)):
            axes.plot(row.goal, place, "|", color="black", markersize=10)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [row.what for row, _ in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("peer over ours (dots: medians, lines: ranges of the rounds, ticks: goals)")
    axes.grid(axis="x", alpha=0.3, which="both")
    axes.set_title("green: goal met, red: open, grey: no goal", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(folder: Path, notes: Mapping[str, str] | None = None) -> Path:
    """Write page and picture of what a folder holds; returns the page."""
    results = read_results(folder)
    rows = [row for result in results.values() for row in rows_of(result)]
    path = folder / PAGE
    path.write_text(page(results, notes or {}), encoding="utf-8")
    try:
        picture(rows, folder / PICTURE)
    except ImportError:  # a machine without matplotlib: the page is what counts
        pass
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(
        "benchmarks.summary",
        "Write the page and the picture of all benchmark results.",
        "python -m benchmarks.summary --output benchmarks/results",
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="where the JSON files are")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    return command.run(
        lambda: str(write(arguments.output)), quiet=arguments.quiet, debug=arguments.debug
    )


if __name__ == "__main__":
    sys.exit(main())
