"""A sheet of pictures: every augmentation at its extremes, on a phantom or on a scan.

The slice shown is the middle one of a patch around the labelled structures; all panels share one
grey window, so brightness and contrast can be compared.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from panther_jax.augment import fork, intensity, local, spatial
from panther_jax.base import command
from panther_jax.base.files import write_bytes
from panther_jax.images.phantom import MODALITIES, make_phantom_case
from panther_jax.images.raw_dataset import Case, open_raw, read_case

MAX_PATCH = (32, 176, 176)
COLUMNS = 10
PANEL, GAP, TITLE, HEADING = 1.24, 0.05, 0.2, 0.26  # inches
DPI, GREYS = 100, 24
DEGREES_30 = np.pi / 6
OUTLINES = ("#ff5050", "#ffc83c", "#50c8ff", "#78e678")

Volume = Any
Panel = tuple[str, Callable[[Volume, Volume], tuple[Volume, Volume]]]


@dataclass(frozen=True)
class Patch:
    """An initial patch, twice the size of what is shown; image z-scored, label -1 outside."""

    name: str
    image: np.ndarray
    label: np.ndarray


def panels() -> Iterator[tuple[str, tuple[Panel, ...]]]:
    """Give the groups of panels: a heading, and titles with functions of (image, label)."""
    yield "geometry (default, DA5)", _geometry_panels()
    yield "intensity (default, DA5)", _intensity_panels()
    yield "local (DA5)", _local_panels()
    yield "the winning fork's DA5", _fork_panels()


def _geometry_panels() -> tuple[Panel, ...]:
    none, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    turn = partial(_moved, spatial.resampling("linear", "linear"))
    nearest = partial(_moved, spatial.resampling("nearest", "nearest"))
    return (
        ("centre crop", _crop),
        ("rotation -30° in plane", partial(turn, (-DEGREES_30, 0.0, 0.0), one)),
        ("rotation +30° in plane", partial(turn, (DEGREES_30, 0.0, 0.0), one)),
        ("rotation +30° all axes", partial(turn, (DEGREES_30,) * 3, one)),
        ("dummy 2-D: 135°", partial(turn, (0.75 * np.pi, 0.0, 0.0), one)),
        ("scale 0.7 (larger)", partial(turn, none, (0.7, 0.7, 0.7))),
        ("scale 1.4 (smaller)", partial(turn, none, (1.4, 1.4, 1.4))),
        ("DA5 scale 1, 0.7, 1.43", partial(turn, none, (1.0, 0.7, 1.43))),
        ("ord0: 30°, scale 0.7", partial(nearest, (DEGREES_30, 0.0, 0.0), (0.7, 0.7, 0.7))),
        ("elastic (in no policy)", _elastic),
        ("mirror y", partial(_oriented, (0, 1, 2), (False, True, False))),
        ("mirror x", partial(_oriented, (0, 1, 2), (False, False, True))),
        ("mirror z", partial(_oriented, (0, 1, 2), (True, False, False))),
        ("rot90, k = 1", partial(_oriented, (0, 2, 1), (False, True, False))),
        ("transpose y, x", partial(_oriented, (0, 2, 1), (False, False, False))),
        ("mask: 0 where label -1", _masked),
    )


def _intensity_panels() -> tuple[Panel, ...]:
    return (
        ("noise σ 0.1", _on_image(_noise)),
        ("blur σ 0.5", _valued(intensity.apply_blur, (0.5, 0.5, 0.5))),
        ("blur σ 1 (default's max)", _valued(intensity.apply_blur, (1.0, 1.0, 1.0))),
        ("blur σ 1.5 (DA5's max)", _valued(intensity.apply_blur, (1.5, 1.5, 1.5))),
        ("brightness × 0.75", _valued(intensity.apply_brightness, 0.75)),
        ("brightness × 1.25", _valued(intensity.apply_brightness, 1.25)),
        ("brightness - 1 (2 sd)", _valued(intensity.apply_shift, -1.0)),
        ("brightness + 1 (2 sd)", _valued(intensity.apply_shift, 1.0)),
        ("contrast 0.75", _valued(intensity.apply_contrast, 0.75)),
        ("contrast 1.25", _valued(intensity.apply_contrast, 1.25)),
        ("DA5 contrast 0.5", _valued(intensity.apply_contrast, 0.5)),
        ("DA5 contrast 2, clipped", _valued(intensity.apply_contrast, 2.0)),
        ("DA5 contrast 2, unclipped", _valued(partial(intensity.apply_contrast, clip=False), 2.0)),
        ("low resolution 0.5", _valued(intensity.apply_low_resolution, (0.5, 0.5, 0.5))),
        ("DA5 low res. 0.25", _valued(intensity.apply_low_resolution, (0.25, 0.25, 0.25))),
        ("low res. 0.25, dummy 2-D", _valued(intensity.apply_low_resolution, (1.0, 0.25, 0.25))),
        ("gamma 0.7", _valued(intensity.apply_gamma, 0.7)),
        ("gamma 1.5", _valued(intensity.apply_gamma, 1.5)),
        ("inverted gamma 0.7", _valued(partial(intensity.apply_gamma, invert=True), 0.7)),
        ("inverted gamma 1.5", _valued(partial(intensity.apply_gamma, invert=True), 1.5)),
    )


def _local_panels() -> tuple[Panel, ...]:
    return (
        ("median 2", _on_image(partial(local.median_filter, size=2))),
        ("median 7", _on_image(partial(local.median_filter, size=7))),
        ("4 blank rectangles", _on_image(partial(_blanked, count=4))),
        ("gradient -5", _on_image(partial(_windowed, local.apply_gradient, -5.0))),
        ("gradient +5", _on_image(partial(_windowed, local.apply_gradient, 5.0))),
        ("local gamma 0.01", _on_image(partial(_windowed, local.apply_local_gamma, 0.01))),
        ("local gamma 4", _on_image(partial(_windowed, local.apply_local_gamma, 4.0))),
        ("sharpening 0.1", _valued(local.apply_sharpen, 0.1)),
        ("sharpening 1", _valued(local.apply_sharpen, 1.0)),
    )


def _fork_panels() -> tuple[Panel, ...]:
    cubic = partial(_moved, fork.resampling("cubic", "linear"))
    return (
        ("cubic: 30°, scale 0.7", partial(cubic, (DEGREES_30, 0.0, 0.0), (0.7, 0.7, 0.7))),
        ("blur σ 1.5", _valued(fork.apply_blur, (1.5, 1.5, 1.5))),
        ("cubic low res. 0.25", _valued(fork.apply_low_resolution, (0.25, 0.25, 0.25))),
        ("inverted gamma 0.7", _valued(partial(fork.apply_gamma, invert=True), 0.7)),
        ("inverted gamma 1.5", _valued(partial(fork.apply_gamma, invert=True), 1.5)),
        ("5 blank rectangles", _on_image(partial(_blanked, count=5))),
        ("sharpening 1, clipped", _valued(fork.apply_sharpen, 1.0)),
    )


def _size(volume: Volume) -> tuple[int, ...]:
    return tuple(n // 2 for n in volume.shape)


def _crop(image: Volume, label: Volume) -> tuple[Volume, Volume]:
    size = _size(image)
    return spatial.centre_crop(image, size), spatial.centre_crop(label, size, -1)


def _on_image(change: Callable[[Volume], Volume]) -> Callable[..., tuple[Volume, Volume]]:
    def run(image: Volume, label: Volume) -> tuple[Volume, Volume]:
        image, label = _crop(image, label)
        return change(image), label

    return run


def _valued(apply: Callable[..., Volume], value: Any) -> Callable[..., tuple[Volume, Volume]]:
    return _on_image(lambda image: apply(image, jnp.asarray(value, jnp.float32)))


def _moved(
    how: spatial.Resampling, angles: Any, scales: Any, image: Volume, label: Volume
) -> tuple[Volume, Volume]:
    draw = spatial.SpatialDraw(jnp.asarray(True), jnp.asarray(angles), jnp.asarray(scales))
    (image,), label = spatial.apply_spatial((image,), label, draw, patch_size=_size(image), how=how)
    return image, label


def _elastic(image: Volume, label: Volume) -> tuple[Volume, Volume]:
    size = _size(image)
    noise = jax.random.normal(jax.random.key(0), (3, *size))
    offsets = spatial.elastic_offsets(
        noise, jnp.full(3, 0.1), jnp.asarray([1.0, size[1] / 15, size[2] / 15])
    )
    grid = spatial.sampling_grid(jnp.eye(3), image.shape, size, offsets)
    return spatial.resample_linear(image, grid), spatial.resample_label_linear(label, grid)


def _oriented(axes: Any, flips: Any, image: Volume, label: Volume) -> tuple[Volume, Volume]:
    orientation = spatial.Orientation(jnp.asarray(axes), jnp.asarray(flips))
    image, label = (spatial.apply_orientation(x, orientation) for x in _crop(image, label))
    return image, label


def _masked(image: Volume, label: Volume) -> tuple[Volume, Volume]:
    image, label = _crop(image, label)
    steps = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[1:]), indexing="ij")
    outside = steps[0] ** 2 + steps[1] ** 2 > 0.8  # as a nonzero mask would have it
    label = jnp.where(outside, -1, label)
    return spatial.apply_mask(image, label), label


def _noise(image: Volume) -> Volume:
    noise = jax.random.normal(jax.random.key(1), image.shape)
    return intensity.apply_noise(image, jnp.float32(0.1), noise)


def _blanked(image: Volume, count: int) -> Volume:
    # In percent of the patch; in plane a tenth to a third, along z enough to meet the slice shown.
    lower = np.array([(0, 11, 17), (12, 51, 14), (25, 34, 62), (6, 20, 45), (18, 67, 67)])
    size = np.array([(97, 33, 23), (81, 23, 33), (69, 33, 33), (88, 17, 14), (75, 28, 17)])
    lower, size = (x[:count] * np.array(image.shape) // 100 for x in (lower, size))
    boxes = local.Rectangles(jnp.int32(count), jnp.asarray(lower), jnp.asarray(size))
    return local.apply_rectangles(image, boxes)


def _windowed(apply: Callable[..., Volume], amount: float, image: Volume) -> Volume:
    centre, width = jnp.asarray([0.5, 0.3, 0.3]), jnp.asarray(image.shape, jnp.float32) / 4
    return apply(image, local.Window(centre, width, jnp.float32(amount)))


def cut_patch(case: Case) -> Patch:
    """Cut an initial patch around the labelled structures from the first channel, z-scored."""
    image = case.image[0].astype(np.float32)
    image = (image - image.mean()) / max(float(image.std()), 1e-8)
    label = np.zeros(image.shape, np.int16) if case.label is None else case.label
    marked = np.argwhere(label > 0)
    if len(marked):
        centre = ((marked.min(axis=0) + marked.max(axis=0)) // 2).tolist()
    else:
        centre = [n // 2 for n in image.shape]
    edge = min(MAX_PATCH[1], *image.shape[1:])  # square, for quarter turns
    size = (min(MAX_PATCH[0], image.shape[0]), edge, edge)
    slices, padding = [], []
    for middle, wanted, n in zip(centre, (2 * n for n in size), image.shape, strict=True):
        start = int(middle) - wanted // 2
        slices.append(slice(max(start, 0), max(min(start + wanted, n), 0)))
        padding.append((max(-start, 0), max(start + wanted - n, 0)))
    cut = tuple(slices)
    return Patch(
        name=case.id,
        image=np.pad(image[cut], padding),
        label=np.pad(label[cut].astype(np.int16), padding, constant_values=-1),
    )


def draw_sheet(patch: Patch) -> bytes:
    """Draw all panels; returns a PNG file."""
    from matplotlib.figure import Figure

    groups = [(heading, members) for heading, members in panels()]
    num_rows = sum(-(-len(members) // COLUMNS) for _, members in groups)
    image, label = jnp.asarray(patch.image), jnp.asarray(patch.label)
    size = _size(image)
    shown = np.asarray(_crop(image, label)[0])[size[0] // 2]
    window = tuple(np.percentile(shown, (0.5, 99.8)))
    row_height = PANEL + TITLE
    height = num_rows * row_height + len(groups) * HEADING + 0.4
    figure = Figure(figsize=(COLUMNS * (PANEL + GAP) + GAP, height), dpi=DPI)
    top = height - 0.32
    caption = f"Every augmentation at its extremes: {patch.name}, one slice of {size} voxels"
    caption += "; label 1 red, 2 yellow; one grey window for all"
    _write(figure, GAP, height - 0.24, caption, size=11)
    for heading, members in groups:
        _write(figure, GAP, top - HEADING + 0.03, heading, size=9)
        top -= HEADING
        for number, (title, change) in enumerate(members):
            row, column = divmod(number, COLUMNS)
            corner = (GAP + column * (PANEL + GAP), top - (row + 1) * row_height)
            result = jax.jit(_middle(change))(image, label)
            axes = figure.add_axes(_share(figure, (*corner, PANEL, PANEL)))
            _draw_panel(axes, title, [np.asarray(x) for x in result], window)
        top -= -(-len(members) // COLUMNS) * row_height
    return _compressed(figure)


def _middle(change: Callable[..., tuple[Volume, Volume]]) -> Callable[..., Any]:
    def run(image: Volume, label: Volume) -> tuple[Volume, ...]:
        return tuple(x[x.shape[0] // 2] for x in change(image, label))

    return run


def _write(figure: Any, left: float, bottom: float, text: str, *, size: float) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, bottom / height, text, fontsize=size, weight="bold", color="black")


def _share(figure: Any, box: tuple[float, ...]) -> tuple[float, float, float, float]:
    width, height = figure.get_size_inches()
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _draw_panel(axes: Any, title: str, shown: Sequence[np.ndarray], window: Any) -> None:
    image, label = shown
    axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], interpolation="antialiased")
    for value in (v for v in np.unique(label).tolist() if v > 0):
        colour = OUTLINES[(value - 1) % len(OUTLINES)]
        axes.contour(label == value, levels=[0.5], colors=[colour], linewidths=0.9)
    axes.set_title(title, fontsize=6.5, pad=2)
    axes.set_axis_off()


def _compressed(figure: Any) -> bytes:
    # Few colours, chosen so that outlines keep theirs: the sheet goes into documentation.
    from PIL import Image

    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", facecolor="white")
    picture = Image.open(whole).convert("RGB")
    colours = [(grey,) * 3 for grey in np.linspace(0, 255, GREYS).astype(int).tolist()]
    for outline in OUTLINES:
        full = np.array([int(outline[i : i + 2], 16) for i in (1, 3, 5)])
        colours += [tuple((full * share).astype(int).tolist()) for share in (1.0, 0.75, 0.5)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in colours for value in colour])
    picture = picture.quantize(palette=palette, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def _subject(raw: Path | None, case_id: str | None, modality: Any) -> Case:
    if raw is None:
        return make_phantom_case(0, modality=modality, size="full")
    dataset = open_raw(raw)
    cases = {case.id: case for case in dataset.cases}
    if case_id is not None and case_id not in cases:
        raise command.UsageError(f"no case {case_id!r} in {raw}; there are {', '.join(cases)}")
    if not cases:
        raise ValueError(f"{raw} holds no training cases (imagesTr)")
    return read_case(cases[case_id or next(iter(cases))], dataset.labels)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(
        "panther_jax.augment.gallery",
        "Draw every augmentation at its extremes into one PNG file, on a phantom or on a scan.",
        "python -m panther_jax.augment.gallery --out augmentation.png",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    parser.add_argument("--raw", type=Path, help="raw dataset whose first scan to show instead")
    parser.add_argument("--case", help="another case of the raw dataset")
    parser.add_argument("--modality", choices=MODALITIES, default="t2", help="of the phantom")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        out = arguments.out
        if out.suffix.lower() != ".png":
            raise command.UsageError(f"--out {out}: expected a name that ends in .png")
        picture = draw_sheet(cut_patch(_subject(arguments.raw, arguments.case, arguments.modality)))
        write_bytes(out, picture)
        return f"{out} ({len(picture) / 1000:.0f} kB)"

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
