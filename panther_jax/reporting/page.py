"""The report's page: its parts as data, and their rendering to one self-contained HTML file.

The template escapes all text; only SVG made by ``charts`` is passed through. The page loads
nothing, runs nothing, and its content security policy forbids both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

TEMPLATE = "page.html.j2"
GENERATOR = "panther_jax.report"


@dataclass(frozen=True)
class Row:
    """Cells of a table row, the first its header; ``kind`` is ``bad`` to point it out."""

    cells: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; all columns but the first ``num_left`` are numbers."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    num_left: int = 1


@dataclass(frozen=True)
class LegendEntry:
    """A sample as SVG and what it stands for."""

    swatch: str
    label: str


@dataclass(frozen=True)
class Figure:
    """A chart with its caption and legend."""

    svg: str
    caption: str
    legend: tuple[LegendEntry, ...] = ()


@dataclass(frozen=True)
class CaseFigure:
    """Views of a case as ``(svg, caption)``, with a title and notes."""

    title: str
    views: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page; its content appears in the order of the fields."""

    id: str
    title: str
    text: tuple[str, ...] = ()
    legend: tuple[LegendEntry, ...] = ()
    figures: tuple[Figure, ...] = ()
    cases: tuple[CaseFigure, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    """Tables that are closed until a reader opens them."""


@dataclass(frozen=True)
class Card:
    """A number of the headline."""

    label: str
    value: str
    detail: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    notices: tuple[str, ...]
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    footer: str


def render(page: Page) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = (resources.files("panther_jax.reporting") / TEMPLATE).read_text(encoding="utf-8")
    text = environment.from_string(source).render(page=page, generator=GENERATOR)
    # lone surrogates, from JSON escapes or undecodable file names, cannot be written as UTF-8
    return text.encode("utf-8", "replace").decode("utf-8")


def is_report(head: str) -> bool:
    """Tell from the beginning of a file whether :func:`render` made it."""
    return f'<meta name="generator" content="{GENERATOR}">' in head


def flat(value: object, prefix: str = "") -> Sequence[tuple[str, str]]:
    """Leaves of nested JSON objects as ``(dotted name, text)``."""
    if isinstance(value, dict):
        return [
            leaf for k, v in value.items() for leaf in flat(v, f"{prefix}.{k}" if prefix else k)
        ]
    return [(prefix, _text(value))]


def _text(value: object, limit: int = 300) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
