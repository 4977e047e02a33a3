"""Charts place points where they belong, outlines follow pixels, PNGs decode to what went in."""

import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panther_jax.plans.geometry import Geometry
from panther_jax.reporting import charts, pictures
from panther_jax.reporting.charts import Axis, Curve, Dots
from panther_jax.reporting.pictures import Mask

EYE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def elements(svg, name, kind=None):
    found = ElementTree.fromstring(svg).iter(name)
    return [e for e in found if kind is None or e.get("class") == kind]


def labelled(svg):
    """Tick labels as {number: (x, y)}."""
    places = {}
    for text in elements(svg, "text"):
        if text.get("x") and re.fullmatch(r"−?[\d.e+]+", text.text or ""):
            places[float(text.text.replace("−", "-"))] = (
                float(text.get("x")),
                float(text.get("y")),
            )
    return places


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low, width):
    high = low + width
    found = charts.ticks(low, high)
    tolerance = 1e-6 * width + 1e-12 * abs(low)  # ends count as inside, floats are rounded
    assert 1 <= len(found) <= 12
    assert all(low - tolerance <= t <= high + tolerance for t in found)
    steps = np.diff(found)
    assert np.all(steps > 0)
    if len(steps) and abs(low) < 1e3 * width:
        assert f"{steps[0]:.3e}"[0] in "125" or f"{steps[0]:.0e}"[0] in "125"


def test_a_curve_runs_through_its_points_and_breaks_at_gaps():
    curve = Curve("loss", (1.0, 2.0, 3.0, 4.0, 5.0), (0.0, 1.0, math.nan, 0.5, 0.0), 1, 1)
    svg = charts.line_chart([curve], x=Axis("epoch", whole=True), y=Axis("loss"), title="a & b")
    path = elements(svg, "path", "curve")[0]
    assert "var(--c1)" in path.get("stroke") and path.get("stroke-dasharray")
    places = re.findall(r"([ML])([\d.]+) ([\d.]+)", path.get("d"))
    assert [p[0] for p in places] == ["M", "L", "M", "L"]
    heights = [float(p[2]) for p in places]
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    assert heights == [bottom, top, (top + bottom) / 2, bottom]
    across = [float(p[1]) for p in places]
    assert across[0] == charts.LEFT and across[-1] == charts.WIDTH - charts.RIGHT
    assert ElementTree.fromstring(svg).get("aria-label") == "a & b"


def test_charts_of_nothing_one_point_and_equal_values_are_charts():
    for values in ((), (3.0,), (2.0, 2.0), (math.nan, math.inf), (0.0, 0.0)):
        x = tuple(float(i) for i in range(len(values)))
        svg = charts.line_chart([Curve("c", x, values)], x=Axis("x"), y=Axis("y"), title="t")
        assert "nan" not in svg and "inf" not in svg
        drawn = "".join(e.get("d") for e in elements(svg, "path", "curve"))
        assert drawn.endswith("h0") == (len(values) == 1)  # a dot; without length it would not show
        points = tuple((a, b, "hint") for a, b in zip(x, values, strict=True))
        dots = charts.scatter_chart(
            [Dots("d", points)],
            x=Axis("x", low=0.0, scale="sqrt"),
            y=Axis("y", low=0.0, scale="sqrt"),
            title="t",
            identity=True,
        )
        assert "nan" not in dots and "inf" not in dots
        finite = sum(map(math.isfinite, values))
        assert len(elements(dots, "path", "dot")) == finite


def test_dots_lie_where_the_ticks_say():
    points = ((0.0, 0.0, "none"), (50.0, 100.0, "<b>"), (100.0, 50.0, "half"))
    svg = charts.scatter_chart(
        [Dots("d", points)],
        x=Axis("a", low=0.0, scale="sqrt"),
        y=Axis("b", low=0.0),
        title="t",
    )
    dots = [e.get("d") for e in elements(svg, "path", "dot")]
    places = [tuple(map(float, re.match(r"M([\d.]+) ([\d.]+)", d).groups())) for d in dots]
    width = charts.WIDTH - charts.RIGHT - charts.LEFT
    assert places[0] == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert places[1][1] == charts.TOP and places[2][0] == charts.WIDTH - charts.RIGHT
    assert abs(places[1][0] - (charts.LEFT + width * math.sqrt(0.5))) < 0.06  # one decimal
    assert [e.text for e in elements(svg, "title")] == ["none", "<b>", "half"]
    assert "<b>" not in svg
    assert {0.0, 20.0, 100.0} <= set(labelled(svg))


# ------------------------------------------------------------------------------------- pictures


def filled(path, shape):
    """Pixels inside an outline, by the even-odd rule along rows."""
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    horizontal = np.zeros((shape[0] + 1, shape[1]), int)
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path):
        if way == "v":
            crossings[int(y) : int(y) + int(length), int(x)] += 1
        else:
            horizontal[int(y), int(x) : int(x) + int(length)] += 1
    by_rows = np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
    by_columns = np.cumsum(horizontal, axis=0)[:-1] % 2 == 1
    assert np.array_equal(by_rows, by_columns)
    return by_rows


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_an_outline_encloses_the_mask_and_nothing_else(seed, height, width):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    assert np.array_equal(filled(pictures.outline_path(mask), mask.shape), mask)


def test_runs_of_edges_are_merged():
    mask = np.zeros((50, 60), bool)
    mask[10:40, 5:55] = True
    assert sorted(re.findall(r"M[^M]+", pictures.outline_path(mask))) == [
        "M5 10h50",
        "M5 10v30",
        "M5 40h50",
        "M55 10v30",
    ]


def test_png_decodes_to_the_pixels():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (13, 7), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(pictures.grey_png(pixels)))
    assert decoded.mode == "L"
    assert np.array_equal(np.asarray(decoded), pixels)


def decoded(view):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(view.png)))


@pytest.mark.parametrize("stored", ["as it is", "flipped", "permuted"])
def test_planes_are_shown_as_radiologists_look(stored):
    """A bright corner at the patient's head, front and right, however the voxels are stored."""
    standard = np.zeros((6, 7, 8), np.float32)  # feet-head, front-back, right-left
    standard[-2:, :2, :2] = 100.0
    mask = np.zeros(standard.shape, bool)
    mask[4, 1, 1] = True
    spacing, direction = (3.0, 2.0, 1.0), EYE
    image, voxels = standard, mask
    if stored == "flipped":
        image, voxels = (a[::-1, ::-1, ::-1] for a in (standard, mask))
        direction = tuple(-d for d in EYE)
    if stored == "permuted":  # the array's axes are right-left, feet-head, front-back
        image, voxels = (a.transpose(2, 0, 1) for a in (standard, mask))
        spacing = (1.0, 3.0, 2.0)
        # index axis x runs along y, index axis y along z, index axis z along x
        direction = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    geometry = Geometry(image.shape, spacing, (0.0, 0.0, 0.0), direction)
    views = pictures.three_planes(image, [Mask(0, True, voxels)], geometry, window=(0.0, 100.0))
    assert [v.plane for v in views] == ["axial", "coronal", "sagittal"]
    assert [v.shape for v in views] == [(7, 8), (6, 8), (6, 7)]
    assert [v.spacing for v in views] == [(2.0, 1.0), (3.0, 1.0), (3.0, 2.0)]
    assert [(v.number, v.num_slices) for v in views] == [(5, 6), (2, 7), (2, 8)]
    for view in views:
        pixels = decoded(view)
        assert pixels[0, 0] == 255 and pixels[-1, -1] == 0, view.plane
    marked = [filled(v.outlines[0][2], v.shape) for v in views]
    assert [tuple(map(int, np.argwhere(m)[0])) for m in marked] == [(1, 1), (1, 1), (1, 1)]
    assert [m.sum() for m in marked] == [1, 1, 1]


def test_planes_are_cut_around_the_strong_masks_and_go_through_the_first():
    image = np.zeros((40, 300, 300), np.float32)
    reference, other, weak = (np.zeros(image.shape, bool) for _ in range(3))
    reference[20:23, 100:110, 100:110] = True
    reference[20, 100:120, 100:110] = True
    other[20, 130:140, 100:110] = True
    weak[:, 250:260, 250:260] = True
    geometry = Geometry(image.shape, (5.0, 1.0, 1.0), (0.0, 0.0, 0.0), EYE)
    masks = [Mask(0, True, reference), Mask(1, True, other), Mask(0, False, weak)]
    axial = pictures.three_planes(image, masks, geometry)[0]
    assert axial.number == 21
    # 40 mm and 10 mm of masks, made 140 mm at least
    assert axial.shape == (140, 140)
    assert [(who, strong) for who, strong, _ in axial.outlines] == [(0, True), (1, True)]
    whole = pictures.three_planes(image, masks[2:], geometry)[0]
    assert whole.shape == (300, 300) and whole.number == 21


def test_an_image_of_one_slice_is_shown_as_it_is():
    image = np.zeros((1, 20, 30), np.float32)
    flat = Geometry((1, 20, 30), (999.0, 1.0, 1.0), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))
    views = pictures.three_planes(image, [Mask(0, True, image == 0)], flat)
    assert [(v.plane, v.shape, v.sides) for v in views] == [("slice", (20, 30), ("", ""))]
    svg = charts.view_svg(views[0], 'an "alt" <text>')
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'an "alt" <text>' and root.get("viewBox") == "0 0 30 20"
    assert len(list(root.iter("image"))) == 1


def test_a_view_of_a_large_image_stays_small():
    image = np.random.default_rng(0).normal(size=(3, 512, 512)).astype(np.float32)  # the worst
    geometry = Geometry(image.shape, (5.0, 1.0, 1.0), (0.0, 0.0, 0.0), EYE)
    axial = pictures.three_planes(image, [Mask(0, True, image > 9)], geometry)[0]
    assert axial.shape == (512, 512)
    assert len(charts.view_svg(axial, "noise")) < 360e3
