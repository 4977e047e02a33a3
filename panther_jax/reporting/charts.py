"""Charts as SVG text for an HTML page: curves, scatter plots, images with outlines. No scripts.

Colours are the CSS variables ``--c0`` to ``--c5`` and ``--ink``, ``--grid`` of the page, so that
charts follow its light and dark scheme; outlines over images have the fixed ``OUTLINE_COLOURS``.
All text that is passed in is escaped.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from panther_jax.reporting.pictures import View

NUM_COLOURS = 6
DASHES = ("", "6 3", "1.5 3")
OUTLINE_COLOURS = ("#56b4e9", "#ff8c1a", "#ffff66", "#ff9de2", "#3ddc97", "#ffffff")
"""Blue for the reference, orange for a prediction: colour-blind readers tell these apart, and the
further ones from them by lightness. All are bright, for grey images."""
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40
SCALE_BAR_MM = 20
_SHAPES = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "m-3-3h6v6h-6z",
    "m0-4l4 7h-8z",
    "m0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z",
    "m-4-3h8l-4 7z",
    "m-4-1.2h2.8v-2.8h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8z",
)

Scale = Literal["linear", "sqrt"]


@dataclass(frozen=True)
class Curve:
    """A line through points in the order given; it is broken where y is not finite."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Dots:
    """Points ``(x, y, text)`` of one colour and shape; the text shows when one is pointed at."""

    label: str
    points: tuple[tuple[float, float, str], ...]
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """What an axis shows. ``low`` and ``high`` are included whatever the data; None follows it."""

    label: str
    low: float | None = None
    high: float | None = None
    scale: Scale = "linear"
    whole: bool = False
    """Ticks at whole numbers only."""


@dataclass(frozen=True)
class _Placed:
    """An axis with its range and ticks; ``pixels`` are of its low and of its high end."""

    axis: Axis
    low: float
    high: float
    ticks: tuple[float, ...]
    pixels: tuple[float, float]

    def __call__(self, value: float) -> float:
        low, high, at = (_scaled(v, self.axis.scale) for v in (self.low, self.high, value))
        start, end = self.pixels
        return start + (at - low) / (high - low) * (end - start)


def _scaled(value: float, scale: Scale) -> float:
    return math.sqrt(max(value, 0.0)) if scale == "sqrt" else value


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> tuple[float, ...]:
    """Round numbers (1, 2, 5 times a power of ten) from ``low`` to ``high``, about ``count``."""
    step = _round_step((high - low) / max(count, 1))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(_clean(n * step, step) for n in range(first, last + 1))


def _clean(value: float, step: float) -> float:
    return round(value, max(0, 1 - math.floor(math.log10(step))))  # 0.30000000000000004


def _round_step(raw: float) -> float:
    if not (raw > 0 and math.isfinite(raw)):
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1.0, 2.0, 5.0) if raw <= m * power * 1.0001), 10.0 * power)


def _placed(axis: Axis, values: Sequence[float], pixels: tuple[float, float]) -> _Placed:
    finite = [v for v in values if math.isfinite(v)]
    finite += [v for v in (axis.low, axis.high) if v is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low <= 1e-5 * max(abs(low), abs(high)):
        margin = 1.0 if axis.whole else max(abs(high) * 0.1, 1e-6)
        low, high = (low if axis.low == low else low - margin), high + margin
    if axis.scale == "sqrt":
        found = {_nice_square(high, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
        return _Placed(axis, max(low, 0.0), high, tuple(sorted(found)), pixels)
    found = ticks(low, high, whole=axis.whole)
    step = found[1] - found[0] if len(found) > 1 else 0.0
    # the range ends at ticks, unless the axis' own end or whole numbers say otherwise
    if axis.low is None and not axis.whole and step:
        low = _clean(math.floor(low / step + 1e-9) * step, step)
    if axis.high is None and not axis.whole and step:
        high = _clean(math.ceil(high / step - 1e-9) * step, step)
    return _Placed(axis, low, high, ticks(low, high, whole=axis.whole), pixels)


def _nice_square(high: float, share: float) -> float:
    """A round number near the given share of a square-root axis, not above its end."""
    value = high * share**2
    if value <= 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(value))
    fitting = [m for m in (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if m * unit <= value * 1.0001]
    return _clean(fitting[-1] * unit, unit)


# -------------------------------------------------------------------------------------- charts


def line_chart(curves: Sequence[Curve], *, x: Axis, y: Axis, title: str) -> str:
    """Curves over common axes; ``title`` is what a screen reader says."""
    placed_x, placed_y = _axes(
        x, y, [v for c in curves for v in c.x], [v for c in curves for v in c.y]
    )
    parts = [
        f'<path class="curve" d="{path}" stroke="var(--c{c.colour % NUM_COLOURS})"'
        f' stroke-dasharray="{DASHES[c.dash % len(DASHES)]}">'
        f"<title>{escape(c.label)}</title></path>"
        for c in curves
        if (path := _curve_path(c, placed_x, placed_y))
    ]
    return _chart([*_frame(placed_x, placed_y), *parts], title)


def scatter_chart(
    groups: Sequence[Dots], *, x: Axis, y: Axis, title: str, identity: bool = False
) -> str:
    """Points over common axes, with the line y = x if ``identity``; not finite ones are left out.

    Both axes have the same range if ``identity``.
    """
    xs = [p[0] for g in groups for p in g.points]
    ys = [p[1] for g in groups for p in g.points]
    if identity:
        xs = ys = [*xs, *ys]
    placed_x, placed_y = _axes(x, y, xs, ys)
    parts = _frame(placed_x, placed_y)
    if identity:
        low, high = placed_x.low, placed_x.high
        parts.append(
            f'<path class="identity" d="M{placed_x(low):.1f} {placed_y(low):.1f}'
            f'L{placed_x(high):.1f} {placed_y(high):.1f}"/>'
        )
    for group in groups:
        shape, colour = _SHAPES[group.colour % len(_SHAPES)], group.colour % NUM_COLOURS
        for px, py, text in group.points:
            if math.isfinite(px) and math.isfinite(py):
                parts.append(
                    f'<path class="dot" fill="var(--c{colour})" '
                    f'd="M{placed_x(px):.1f} {placed_y(py):.1f}{shape}">'
                    f"<title>{escape(text)}</title></path>"
                )
    return _chart(parts, title)


def swatch(colour: int, *, dash: int = 0, dots: bool = False) -> str:
    """A sample of a curve or of a dot, for a legend."""
    stroke = f"var(--c{colour % NUM_COLOURS})"
    if dots:
        inside = f'<path fill="{stroke}" d="M12 6{_SHAPES[colour % len(_SHAPES)]}"/>'
    else:
        pattern = DASHES[dash % len(DASHES)]
        inside = f'<path class="curve" stroke="{stroke}" stroke-dasharray="{pattern}" d="M1 6h22"/>'
    return f'<svg class="swatch" viewBox="0 0 24 12" aria-hidden="true">{inside}</svg>'


def outline_swatch(who: int, *, strong: bool = True) -> str:
    """A sample of an outline over an image, for a legend."""
    sample = _outline(who, strong, "M2 6h20", halo=False)
    return f'<svg class="swatch dark" viewBox="0 0 24 12" aria-hidden="true">{sample}</svg>'


def _outline(who: int, strong: bool, path: str, *, halo: bool = True) -> str:
    # the reference is drawn first and wider, so that it shows under a prediction that equals it
    kind = f"{'strong' if strong else 'weak'} {'prediction' if who else 'reference'}"
    colour = OUTLINE_COLOURS[who % len(OUTLINE_COLOURS)]
    drawn = f'<path class="outline {kind}" stroke="{colour}" d="{path}"/>'
    return f'<path class="halo" d="{path}"/>{drawn}' if halo and strong and not who else drawn


def _axes(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> tuple[_Placed, _Placed]:
    return (
        _placed(x, xs, (float(LEFT), float(WIDTH - RIGHT))),
        _placed(y, ys, (float(HEIGHT - BOTTOM), float(TOP))),
    )


def _curve_path(curve: Curve, x: _Placed, y: _Placed) -> str:
    parts, pen_down = [], False
    for at, value in zip(curve.x, curve.y, strict=True):
        if not (math.isfinite(at) and math.isfinite(value)):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{x(at):.1f} {y(value):.1f}")
        if not pen_down:
            parts.append("h0")  # a lone point shows as a dot
        pen_down = True
    return "".join(parts)


def _frame(x: _Placed, y: _Placed) -> list[str]:
    """Grid lines, tick labels and axis labels."""
    left, bottom, right = LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y.ticks:
        at = y(value)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        parts.append(
            f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for value in x.ticks:
        at = x(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{bottom}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{_number(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{left} {TOP}V{bottom}H{right}"/>')
    middle_x, middle_y = (left + right) / 2, (TOP + bottom) / 2
    parts.append(
        f'<text x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.axis.label)}</text>'
    )
    parts.append(
        f'<text transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.axis.label)}</text>"
    )
    return parts


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _chart(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


# -------------------------------------------------------------------------------------- images


def view_svg(view: View, alt: str) -> str:
    """An image slice in mm, with its outlines, a scale bar and the letters of its sides."""
    rows, columns = view.shape
    height, width = rows * view.spacing[0], columns * view.spacing[1]
    data = base64.b64encode(view.png).decode("ascii")
    unit = max(height, width) / 100
    outlines = "".join(_outline(*outline) for outline in view.outlines)
    return (
        f'<svg class="view" viewBox="0 0 {width:.6g} {height:.6g}" role="img" '
        f'aria-label="{escape(alt)}">'
        f'<image width="{width:.6g}" height="{height:.6g}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
        f'<g transform="scale({view.spacing[1]:.6g} {view.spacing[0]:.6g})">{outlines}</g>'
        f"{_marks(view, width, height, unit)}</svg>"
    )


def _marks(view: View, width: float, height: float, unit: float) -> str:
    size = f'font-size="{4.2 * unit:.3g}"'
    left, top = view.sides
    bar = (
        f'<path class="bar" d="M{3 * unit:.4g} {height - 3 * unit:.4g}h{SCALE_BAR_MM}"/>'
        f'<text class="mark" x="{3 * unit:.4g}" y="{height - 5 * unit:.4g}" {size}>'
        f"{SCALE_BAR_MM} mm</text>"
    )
    return (
        f"{bar if width > 2 * SCALE_BAR_MM else ''}"
        f'<text class="mark" x="{2 * unit:.4g}" y="{height / 2:.4g}" {size}>{escape(left)}</text>'
        f'<text class="mark" x="{width / 2:.4g}" y="{6 * unit:.4g}" {size} '
        f'text-anchor="middle">{escape(top)}</text>'
    )
