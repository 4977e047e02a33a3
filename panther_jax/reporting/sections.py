"""Sections of the report's page: scores, cases, overlays, learning curves, settings."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import panther_jax
from panther_jax.evaluation import statistics
from panther_jax.evaluation.metrics import METRICS, PANTHER_METRICS, scored_label
from panther_jax.reporting import charts, overlays
from panther_jax.reporting.charts import Axis, Curve, Dots
from panther_jax.reporting.overlays import CaseViews
from panther_jax.reporting.page import CaseFigure, Figure, LegendEntry, Row, Section, Table, flat
from panther_jax.reporting.records import (
    SEVERITY,
    VOLUMES,
    CaseRecord,
    FoldRecord,
    Outcome,
    RunRecord,
    number,
)

MM3_PER_ML = 1000.0
UNKNOWN = "–"
OUTCOMES: Mapping[Outcome, str] = {
    "no_result": "no result: the case is in the fold's splits, but was not validated",
    "undefined": "a score is not a number",
    "missed": "missed: nothing predicted",
    "false_positive": "false alarm: predicted, but not in the reference",
    "no_overlap": "predicted elsewhere: no overlap",
    "scored": "",
}
SPREAD_HEADER = ("metric", "cases", "mean", "95 % CI", "SD", "median", "IQR", "worst")
ALL_FOLDS = "all"


def text(value: float, decimals: int = 3) -> str:
    """A number for a table."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞"
    rounded = f"{value:.{decimals}f}"
    return rounded.replace("-", "−" if float(rounded) else "")


def interval_text(interval: statistics.Interval, decimals: int, scale: float = 1.0) -> str:
    """Limits as ``low to high``."""
    if math.isnan(interval.low):
        return UNKNOWN
    return f"{text(interval.low * scale, decimals)} to {text(interval.high * scale, decimals)}"


def class_name(run: RunRecord) -> str:
    """Name of the class that the PANTHER metrics score."""
    return scored_label(run.labels)[0] if run.labels else "first class"


def metric_titles(name: str) -> dict[str, str]:
    """Title of each metric of a case; ``name`` is the class's."""
    rows = {metric: METRICS.find(metric) for metric in METRICS.names}
    return {m: (row.caption or row.title).replace("{label}", name) for m, row in rows.items()}


def metric_text(case: CaseRecord, metric: str) -> str:
    """A metric of a case for a table."""
    return text(case.scores[metric], METRICS.find(metric).decimals)


def by_id(cases: Sequence[CaseRecord]) -> list[CaseRecord]:
    """Cases in the order in which ``evaluate`` draws them, so that intervals are the same."""
    return sorted(cases, key=lambda c: c.id)


def metric_cells(cases: Sequence[CaseRecord], metric: str) -> tuple[str, ...]:
    """A PANTHER metric over cases, as in :data:`SPREAD_HEADER`."""
    values = [c.scores[metric] for c in by_id(cases)]
    return _metric_row(metric, metric, values).cells


def _metric_row(title: str, metric: str, values: Sequence[float]) -> Row:
    row = METRICS.find(metric)
    return spread_row(title, values, row.decimals, is_up=row.higher_is_better)


def as_subjects(cases: Sequence[CaseRecord]) -> list[dict[str, Any]]:
    """Cases as ``statistics`` takes them: those with finite scores and volumes.

    A metric that a user's file added may be missing where it was not known yet.
    """
    required = (*PANTHER_METRICS, *VOLUMES)
    return [
        {"subject": c.id, **{n: v for n, v in c.scores.items() if math.isfinite(v)}}
        for c in cases
        if all(math.isfinite(c.scores[n]) for n in required)
    ]


def volume_ml(case: CaseRecord, which: str) -> float:
    """``gt_volume`` or ``pred_volume`` in ml."""
    return case.scores[which] / MM3_PER_ML


def footer() -> str:
    """What wrote the page, and how intervals were made."""
    return (
        f"Written by panther_jax {panther_jax.__version__} on {time.strftime('%Y-%m-%d %H:%M')}. "
        f"Intervals: {statistics.LEVEL:.0%} {statistics.METHOD}; rough below some 20 cases. "
        "For research: no medical device."
    )


# -------------------------------------------------------------------------------------- scores


def failures(cases: Sequence[CaseRecord], several_folds: bool) -> Section:
    """Cases that went wrong, the worst first."""
    bad = [c for c in cases if c.outcome != "scored"]
    counts = ", ".join(
        f"{n} {name.replace('_', ' ')}"
        for name in SEVERITY[:-1]
        if (n := sum(c.outcome == name for c in bad))
    )
    if not bad:
        sentence = f"None of {len(cases)} cases: each has a result that overlaps its reference."
        return Section("failures", "Failures", (sentence,))
    rows = tuple(
        Row(
            (
                c.id,
                *([c.fold] if several_folds else []),
                OUTCOMES[c.outcome],
                text(volume_ml(c, "gt_volume"), 1),
                text(volume_ml(c, "pred_volume"), 1),
            ),
            "bad",
        )
        for c in bad
    )
    fold = ("fold",) if several_folds else ()
    header = ("case", *fold, "what happened", "reference ml", "prediction ml")
    table = Table("Failures", header, rows, num_left=2 + len(fold))
    return Section(
        "failures", "Failures", (f"{len(bad)} of {len(cases)}: {counts}.",), (), (), (), (table,)
    )


def spread_table(cases: Sequence[CaseRecord], name: str, caption: str) -> Table:
    """Each metric over cases: mean with its interval, spread, and the worst value."""
    titles, cases = metric_titles(name), by_id(cases)
    rows = [
        _metric_row(title, metric, [c.scores[metric] for c in cases])
        for metric, title in titles.items()
    ]
    errors = [(c.scores["pred_volume"] - c.scores["gt_volume"]) / MM3_PER_ML for c in cases]
    rows.append(spread_row("volume error ml, absolute", [abs(e) for e in errors], 1, is_up=False))
    rows.append(_rmse_row(as_subjects(cases)))
    others = dict.fromkeys(k for c in cases for k in c.classes if k != name)
    for other in others:
        dice = [c.classes.get(other, math.nan) for c in cases]
        rows.append(spread_row(f"Dice {other}", dice, 3, is_up=True))
    return Table(caption, SPREAD_HEADER, tuple(rows))


def spread_row(title: str, values: Sequence[float], decimals: int, *, is_up: bool) -> Row:
    """One metric over cases; values that are not finite are counted, not averaged."""
    finite = np.array([v for v in values if math.isfinite(v)])
    count = str(len(finite)) if len(finite) == len(values) else f"{len(finite)} of {len(values)}"
    if not len(finite):
        return Row((title, count, *[UNKNOWN] * (len(SPREAD_HEADER) - 2)))
    low, middle, high = np.quantile(finite, (0.25, 0.5, 0.75)).tolist()
    spread = float(finite.std(ddof=1)) if len(finite) > 1 else math.nan
    cells = (
        text(float(finite.mean()), decimals),
        interval_text(statistics.mean_interval(finite), decimals),
        text(spread, decimals),
        text(middle, decimals),
        f"{text(low, decimals)} to {text(high, decimals)}",
        text(float(finite.min() if is_up else finite.max()), decimals),
    )
    return Row((title, count, *cells))


def _rmse_row(subjects: Sequence[Mapping[str, Any]]) -> Row:
    empty = [UNKNOWN] * 4
    if not subjects:
        return Row(("volume RMSE ml", "0", UNKNOWN, UNKNOWN, *empty))
    columns = statistics.aggregate_columns(subjects, statistics.RMSE)
    found = statistics.bootstrap_interval(*columns)
    mean = text(found.estimate / MM3_PER_ML, 1)
    interval = interval_text(found, 1, 1 / MM3_PER_ML)
    return Row(("volume RMSE ml", str(len(subjects)), mean, interval, *empty))


def fold_table(run: RunRecord, checkpoint: str) -> Table:
    """Mean of each metric by fold, and over all cases."""
    name = class_name(run)
    groups = [
        (f.name, f.validations[checkpoint].cases) for f in run.folds if checkpoint in f.validations
    ]
    groups.append(("all cases", run.cases(checkpoint)))
    return mean_table(groups, name, f"Means by fold, {checkpoint} checkpoint")


def mean_table(
    groups: Sequence[tuple[str, Sequence[CaseRecord]]], name: str, caption: str
) -> Table:
    """Means of the metrics over the cases of each group, not finite ones left out."""
    header = (
        "",
        "cases",
        *metric_titles(name).values(),
        "volume RMSE ml",
        "missed",
        "false alarms",
    )
    rows = []
    for title, cases in groups:
        means = [
            text(_mean([c.scores[m] for c in cases]), METRICS.find(m).decimals)
            for m in METRICS.names
        ]
        counts = [str(sum(c.outcome == o for c in cases)) for o in ("missed", "false_positive")]
        rmse = _rmse_row(as_subjects(cases)).cells[2]
        rows.append(Row((title, str(len(cases)), *means, rmse, *counts)))
    return Table(caption, header, tuple(rows))


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def scatter(groups: Sequence[tuple[str, Sequence[CaseRecord]]], name: str) -> Section:
    """Predicted against reference volume, and Dice against reference volume, by group."""
    volumes, scores = [], []
    for colour, (title, cases) in enumerate(groups):
        points = [
            (
                volume_ml(c, "gt_volume"),
                volume_ml(c, "pred_volume"),
                c.dice,
                f"{c.id}: reference {text(volume_ml(c, 'gt_volume'), 1)} ml, prediction "
                f"{text(volume_ml(c, 'pred_volume'), 1)} ml, Dice {text(c.dice)}",
            )
            for c in cases
        ]
        volumes.append(Dots(title, tuple((x, y, hint) for x, y, _, hint in points), colour))
        scores.append(Dots(title, tuple((x, dice, hint) for x, _, dice, hint in points), colour))
    reference = Axis("reference volume, ml (square-root scale)", low=0.0, scale="sqrt")
    predicted = Axis("predicted volume, ml", low=0.0, scale="sqrt")
    legend = [LegendEntry(charts.swatch(g.colour, dots=True), g.label) for g in volumes]
    first = charts.scatter_chart(
        volumes,
        x=reference,
        y=predicted,
        identity=True,
        title=f"Predicted against reference volume of {name}, a point a case",
    )
    second = charts.scatter_chart(
        scores,
        x=reference,
        y=Axis(f"Dice {name}", low=0.0, high=1.0),
        title=f"Dice of {name} against its reference volume, a point a case",
    )
    return Section(
        "scatter",
        "Volume and size",
        legend=tuple(legend) if len(groups) > 1 else (),
        figures=(
            Figure(first, f"Volume of {name}; on the dashed line both agree"),
            Figure(second, f"Dice of {name} against its volume"),
        ),
    )


def case_table(cases: Sequence[CaseRecord], name: str, several_folds: bool) -> Table:
    """All cases, worst first."""
    others = tuple(dict.fromkeys(k for c in cases for k in c.classes if k != name))
    fold = ("fold",) if several_folds else ()
    header = (
        "case",
        *fold,
        *metric_titles(name).values(),
        "reference ml",
        "prediction ml",
        "difference ml",
        *(f"Dice {o}" for o in others),
    )
    rows = []
    for c in cases:
        reference, predicted = (volume_ml(c, v) for v in ("gt_volume", "pred_volume"))
        cells = (
            c.id,
            *([c.fold] if several_folds else []),
            *(metric_text(c, m) for m in METRICS.names),
            *(text(v, 1) for v in (reference, predicted, predicted - reference)),
            *(text(c.classes.get(o, math.nan)) for o in others),
        )
        rows.append(Row(cells, "" if c.outcome == "scored" else "bad"))
    return Table("All cases, worst first", header, tuple(rows), num_left=1 + len(fold))


# ------------------------------------------------------------------------------------ overlays


def chosen_cases(cases: Sequence[CaseRecord], num_worst: int) -> tuple[tuple[str, CaseRecord], ...]:
    """Cases to show, of those sorted worst first: the worst ones, the median, the best."""
    shown = [c for c in cases if c.outcome != "no_result"]
    if not shown:
        return ()
    chosen: dict[int, str] = {}
    for place in range(min(num_worst, len(shown))):
        chosen[place] = "Worst" if place == 0 else f"{place + 1}. worst"
    if len(shown) > 2:
        chosen[len(shown) // 2] = "Median"
    if len(shown) > 1:
        chosen[len(shown) - 1] = "Best"
    return tuple((chosen[place], shown[place]) for place in sorted(chosen))


def overlay_section(
    run: RunRecord, checkpoint: str, *, raw: Path | None, num_worst: int
) -> Section:
    """Worst, median and best case in three planes, reference and prediction outlined."""
    figures = []
    for title, case in chosen_cases(run.cases(checkpoint), num_worst):
        found = overlays.case_views([case], [run], raw=raw)
        heading = f"{title}: {case.id}, Dice {text(case.dice)}"
        trouble = OUTCOMES[case.outcome]
        figures.append(case_figure(f"{heading} ({trouble})" if trouble else heading, found))
    return Section(
        "overlays",
        "Overlays",
        (
            "Axial, coronal and sagittal slice, each where the reference's area is largest, cut to "
            "the surroundings of reference and prediction.",
        ),
        legend=_outline_legend(run, ("reference", "prediction")),
        cases=tuple(figures),
    )


def _outline_legend(run: RunRecord, names: Sequence[str]) -> tuple[LegendEntry, ...]:
    main = class_name(run)
    entries = [LegendEntry(charts.outline_swatch(w), f"{n}, {main}") for w, n in enumerate(names)]
    others = [n for n, _ in run.labels.classes if n != main] if run.labels else []
    if others and len(names) == 2:
        for who, name in enumerate(names):
            swatch = charts.outline_swatch(who, strong=False)
            entries.append(LegendEntry(swatch, f"{name}, {' and '.join(others)}"))
    return tuple(entries)


def comparison_legend(runs: Sequence[RunRecord]) -> tuple[LegendEntry, ...]:
    """The reference's outline and one of each run."""
    names = ("reference", *(r.name for r in runs))
    return tuple(LegendEntry(charts.outline_swatch(who), n) for who, n in enumerate(names))


def case_figure(title: str, found: CaseViews) -> CaseFigure:
    """Views of a case as SVG with captions."""
    views = []
    for view in found.views:
        caption = f"{view.plane}, slice {view.number} of {view.num_slices}"
        views.append((charts.view_svg(view, f"{title}. {caption}, with outlines"), caption))
    return CaseFigure(title, tuple(views), found.notes)


# -------------------------------------------------------------------------------------- curves


def learning_curves(groups: Sequence[tuple[str, Sequence[FoldRecord]]]) -> Section:
    """Losses, pseudo-Dice and learning rate of all folds; a group is a colour."""
    named = [(colour, title, f) for colour, (title, fs) in enumerate(groups) for f in fs if f.rows]
    if not named:
        return Section("curves", "Learning curves", ("No epoch was recorded.",))
    classes = list(dict.fromkeys(k for _, _, f in named for r in f.rows for k in _pseudo_dice(r)))
    plots = (
        ("Loss", "loss", {"training": "train_loss", "validation": "validation_loss"}, Axis("loss")),
        ("Pseudo-Dice on validation patches", "Dice", {c: c for c in classes}, _unit("Dice")),
        ("Moving average, which picks the best checkpoint", "Dice", {"": "ema"}, _unit("Dice")),
        ("Learning rate", "rate", {"": "lr"}, Axis("learning rate", low=0.0)),
        ("Seconds an epoch", "seconds", {"": "seconds"}, Axis("seconds", low=0.0)),
    )
    figures = tuple(_curve_figure(named, caption, keys, axis) for caption, _, keys, axis in plots)
    colours = [LegendEntry(charts.swatch(c), title) for c, (title, _) in enumerate(groups)]
    return Section(
        "curves",
        "Learning curves",
        legend=tuple(colours) if len(groups) > 1 else (),
        figures=tuple(f for f in figures if f is not None),
    )


def _unit(label: str) -> Axis:
    return Axis(label, low=0.0, high=1.0)


def _pseudo_dice(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found = row.get("pseudo_dice")
    return found if isinstance(found, Mapping) else {}


def _curve_figure(
    named: Sequence[tuple[int, str, FoldRecord]], caption: str, keys: Mapping[str, str], axis: Axis
) -> Figure | None:
    curves, legend = [], []
    for dash, (kind, key) in enumerate(keys.items()):
        for colour, title, fold in named:
            y = tuple(number(_pseudo_dice(r).get(key, r.get(key))) for r in fold.rows)
            if any(map(math.isfinite, y)):
                x = tuple(number(r["epoch"]) + 1 for r in fold.rows)
                label = ", ".join(dict.fromkeys(n for n in (title, fold.name, kind) if n))
                curves.append(Curve(label, x, y, colour, dash))
        legend.append(LegendEntry(charts.swatch(charts.NUM_COLOURS - 1, dash=dash), kind))
    if not curves:
        return None
    svg = charts.line_chart(
        curves, x=Axis("epoch", whole=True), y=axis, title=f"{caption} over epochs"
    )
    return Figure(svg, caption, tuple(legend) if len(keys) > 1 else ())


# ------------------------------------------------------------------------------------ settings


def settings_section(runs: Sequence[RunRecord]) -> Section:
    """Config, plans, versions and the like, closed until opened."""
    tables = []
    for run in runs:
        of = f" of {run.name}" if len(runs) > 1 else ""
        for title, value in (
            (f"Settings{of}", run.config),
            (f"Plans{of}", run.plans),
            (f"Data set{of}", run.dataset),
        ):
            tables.append(_value_table(title, value))
        for fold in run.folds:
            title = f"Versions, device and command{of}, {fold.name}"
            tables.append(_value_table(title, fold.info))
    return Section(
        "settings", "Settings and versions", folded=tuple(t for t in tables if t is not None)
    )


def _value_table(caption: str, value: Mapping[str, Any]) -> Table | None:
    rows = tuple(Row(leaf) for leaf in flat(dict(value)))
    return Table(caption, ("name", "value"), rows, num_left=2) if rows else None
