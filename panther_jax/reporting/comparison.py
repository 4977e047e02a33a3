"""The report's page about several runs: side by side, and paired case by case with the first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from panther_jax.config import loading
from panther_jax.evaluation import statistics
from panther_jax.reporting import overlays, records, sections
from panther_jax.reporting.charts import Axis, Dots, scatter_chart
from panther_jax.reporting.page import Card, CaseFigure, Figure, Page, Row, Section, Table
from panther_jax.reporting.records import CaseRecord, RunRecord
from panther_jax.reporting.sections import MM3_PER_ML, interval_text, text

SAME_VOLUME = 1e-3
"""Largest relative difference of a case's reference volume between runs."""
NUM_CHANGED = 2
"""Greatest losses, and as many gains, that are pictured."""


@dataclass(frozen=True)
class _Pairs:
    """The cases that all runs have, by id, in the order of the runs; and what was left out."""

    cases: dict[str, tuple[CaseRecord, ...]]
    notices: tuple[str, ...]


def _paired(runs: Sequence[RunRecord], checkpoint: str) -> _Pairs:
    by_run = [{c.id: c for c in reversed(run.cases(checkpoint))} for run in runs]
    common = [i for i in by_run[0] if all(i in cases for cases in by_run)]
    everything = set().union(*by_run)
    notices = []
    if len(common) < len(everything):
        notices.append(
            f"{len(common)} of {len(everything)} cases were validated in all runs; only they are "
            "compared"
        )
    pairs, differing = {}, []
    for case_id in sorted(common):
        found = tuple(cases[case_id] for cases in by_run)
        volumes = [c.scores["gt_volume"] for c in found]
        if max(volumes) - min(volumes) > SAME_VOLUME * max(volumes):
            differing.append(case_id)
        else:
            pairs[case_id] = found
    if differing:
        notices.append(
            f"{len(differing)} case(s) have another reference in another run and are not compared: "
            f"{', '.join(differing[: records.MAX_LISTED])}"
        )
    orders = {
        f.validations[checkpoint].spacing_order
        for run in runs
        for f in run.folds
        if checkpoint in f.validations
    }
    if len(orders) > 1:
        notices.append(f"distances were measured with different spacing orders: {sorted(orders)}")
    return _Pairs(pairs, tuple(notices))


def comparison_page(runs: Sequence[RunRecord], checkpoint: str, *, raw: Path | None) -> Page:
    """The page of several runs; differences are to the first."""
    name = sections.class_name(runs[0])
    pairs = _paired(runs, checkpoint)
    notices = [f"{run.name}: {n}" for run in runs for n in run.all_notices()]
    notices += [f"{run.name}: {n}" for run in runs for n in run.unvalidated(checkpoint)]
    parts = [_side_by_side(runs, checkpoint, name, pairs)]
    if pairs.cases:
        parts += [
            _differences(runs, pairs),
            _changed_overlays(runs, pairs, raw),
            Section("cases", "Cases, greatest loss first", tables=(_paired_cases(runs, pairs),)),
            sections.scatter([(r.name, r.cases(checkpoint)) for r in runs], name),
        ]
    parts.append(sections.learning_curves([(r.name, r.folds) for r in runs]))
    parts += [_changed_settings(runs), sections.settings_section(runs)]
    return Page(
        title=f"{len(runs)} runs compared",
        subtitle=f"{', '.join(r.name for r in runs)}; {checkpoint} checkpoint; "
        f"differences are to {runs[0].name}",
        notices=(*notices, *pairs.notices),
        cards=_comparison_cards(runs, checkpoint, pairs),
        sections=tuple(parts),
        footer=sections.footer(),
    )


def _comparison_cards(
    runs: Sequence[RunRecord], checkpoint: str, pairs: _Pairs
) -> tuple[Card, ...]:
    cards = []
    for place, run in enumerate(runs):
        cases = [found[place] for found in pairs.cases.values()] or run.cases(checkpoint)
        cells = sections.metric_cells(cases, "volumetric_dice")
        over = f"{cells[1]} common cases" if pairs.cases else f"{cells[1]} cases"
        cards.append(Card(f"mean Dice, {run.name}", cells[2], f"{over}; 95 % CI {cells[3]}"))
    return tuple(cards)


def _side_by_side(runs: Sequence[RunRecord], checkpoint: str, name: str, pairs: _Pairs) -> Section:
    tables = [
        Table(
            "The runs",
            ("run", "data set", "folds", "state"),
            tuple(
                Row(
                    (
                        r.name,
                        r.dataset_name,
                        ", ".join(f.name.removeprefix("fold_") for f in r.folds),
                        "finished" if all(f.finished for f in r.folds) else "not finished",
                    )
                )
                for r in runs
            ),
            num_left=4,
        ),
        sections.mean_table(
            [(r.name, r.cases(checkpoint)) for r in runs], name, "Means over each run's own cases"
        ),
    ]
    if pairs.cases and any(len(r.cases(checkpoint)) > len(pairs.cases) for r in runs):
        common = [(r.name, [p[i] for p in pairs.cases.values()]) for i, r in enumerate(runs)]
        tables.append(sections.mean_table(common, name, "Means over the cases of all runs"))
    return Section("runs", "Side by side", tables=tuple(tables))


def _differences(runs: Sequence[RunRecord], pairs: _Pairs) -> Section:
    """Each run against the first, case by case."""
    sentences, tables, figures = [], [], []
    for place, run in enumerate(runs[1:], start=1):
        ours = [(found[0], found[place]) for found in pairs.cases.values()]
        figures.append(_paired_scatter(runs[0], run, ours, place))
        finite = [p for p in ours if len(sections.as_subjects(p)) == 2]
        if not finite:
            sentences.append(f"No case has finite scores in both {runs[0].name} and {run.name}.")
            continue
        changes = statistics.compare(
            sections.as_subjects([a for a, _ in finite]),
            sections.as_subjects([b for _, b in finite]),
        )
        sentences.append(
            statistics.sentence(
                changes, num_cases=len(finite), baseline=runs[0].name, candidate=run.name
            )
        )
        rows = tuple(_change_row(c) for c in changes)
        caption = f"{run.name} minus {runs[0].name}, {len(finite)} paired cases"
        header = ("metric", runs[0].name, run.name, "difference", "95 % CI", "p", "p, Holm")
        header += ("cases better", "worse", "verdict")
        tables.append(Table(caption, header, rows))
    return Section(
        "differences",
        "Paired differences",
        tuple(sentences),
        figures=tuple(figures),
        tables=tuple(tables),
    )


def _change_row(change: statistics.MetricChange) -> Row:
    is_volume = change.aggregate == statistics.RMSE
    scale = 1 / MM3_PER_ML if is_volume else 1.0
    decimals = 3 if change.better == "up" else 1 if is_volume else 2
    found = change.difference
    return Row(
        (
            statistics.aggregate_title(change.aggregate),
            *(text(v * scale, decimals) for v in (found.baseline, found.candidate)),
            text(found.interval.estimate * scale, decimals),
            interval_text(found.interval, decimals, scale),
            *(sections.UNKNOWN if math.isnan(p) else f"{p:.2g}" for p in (found.p, change.p_holm)),
            str(change.num_better),
            str(change.num_worse),
            change.verdict,
        )
    )


def _paired_scatter(
    first: RunRecord, second: RunRecord, pairs: Sequence[tuple[CaseRecord, CaseRecord]], colour: int
) -> Figure:
    points = tuple(
        (a.dice, b.dice, f"{a.id}: {first.name} {text(a.dice)}, {second.name} {text(b.dice)}")
        for a, b in pairs
    )
    svg = scatter_chart(
        [Dots(second.name, points, colour)],
        x=Axis(f"Dice, {first.name}", low=0.0, high=1.0),
        y=Axis(f"Dice, {second.name}", low=0.0, high=1.0),
        identity=True,
        title=f"Dice of {second.name} against Dice of {first.name}, a point a case",
    )
    return Figure(svg, f"Above the dashed line {second.name} is better than {first.name}")


def _change(found: Sequence[CaseRecord]) -> float:
    """Difference of the last run's Dice to the first's; NaN counts as the greatest loss."""
    change = found[-1].dice - found[0].dice
    return -math.inf if math.isnan(change) else change


def _paired_cases(runs: Sequence[RunRecord], pairs: _Pairs) -> Table:
    header = ("case", "reference ml", *(f"Dice {r.name}" for r in runs))
    header += tuple(f"{r.name} − {runs[0].name}" for r in runs[1:])
    rows = []
    for found in sorted(pairs.cases.values(), key=_change):
        failed = any(c.outcome != "scored" for c in found)
        cells = (
            found[0].id,
            text(sections.volume_ml(found[0], "gt_volume"), 1),
            *(text(c.dice) for c in found),
            *(text(c.dice - found[0].dice) for c in found[1:]),
        )
        rows.append(Row(cells, "bad" if failed else ""))
    caption = f"Dice by case, sorted by {runs[-1].name} minus {runs[0].name}; failures marked"
    return Table(caption, header, tuple(rows))


def _changed_overlays(runs: Sequence[RunRecord], pairs: _Pairs, raw: Path | None) -> Section:
    """The cases in which the last run loses most and gains most to the first."""
    ordered = sorted(pairs.cases.values(), key=_change)
    losses = [f for f in ordered if _change(f) < 0][:NUM_CHANGED]
    gains = [f for f in reversed(ordered) if _change(f) > 0][:NUM_CHANGED]
    figures: list[CaseFigure] = []
    for what, group in (("Loss", losses), ("Gain", gains)):
        for found in group:
            scores = ", ".join(f"{r.name} {text(c.dice)}" for r, c in zip(runs, found, strict=True))
            views = overlays.case_views(found, runs, raw=raw)
            figures.append(sections.case_figure(f"{what}: {found[0].id}, Dice {scores}", views))
    return Section(
        "overlays",
        "Overlays of the greatest losses and gains",
        (f"Of {runs[-1].name} to {runs[0].name}.",) if figures else ("No case changed.",),
        legend=sections.comparison_legend(runs) if figures else (),
        cases=tuple(figures),
    )


def _changed_settings(runs: Sequence[RunRecord]) -> Section:
    tables, sentences = [], []
    for run in runs[1:]:
        lines = loading.differences(dict(runs[0].config), dict(run.config))
        rows = tuple(Row((n, v)) for n, _, v in (line.partition(": ") for line in lines))
        if rows:
            caption = f"{runs[0].name} → {run.name}"
            tables.append(Table(caption, ("setting", "value"), rows, num_left=2))
        else:
            sentences.append(f"{run.name} has the settings of {runs[0].name}.")
    return Section("changed", "Settings that differ", tuple(sentences), tables=tuple(tables))
