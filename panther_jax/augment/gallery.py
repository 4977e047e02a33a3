"""A sheet of pictures: every augmentation at its extremes, on a phantom or on a scan.

The slice shown is the middle one of a patch around the labelled structures; all panels share one
grey window, so brightness and contrast can be compared. What there is to show, the policies and
their transforms say themselves, those of a user's config, too (`--config`).
"""

import dataclasses
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

from panther_jax.augment import policies, spatial
from panther_jax.augment.recipes import find_policy
from panther_jax.augment.transform import PatchGeometry, Transform
from panther_jax.base import command
from panther_jax.config import POLICIES, load_config
from panther_jax.images.phantom import MODALITIES, make_phantom_case
from panther_jax.images.raw_dataset import Case, open_raw, read_case

MAX_PATCH = (32, 176, 176)
COLUMNS = 10
PANEL, GAP, TITLE, HEADING = 1.24, 0.05, 0.2, 0.26  # inches
DPI, GREYS = 100, 24
DEGREES_30 = np.pi / 6
OUTLINES = ("#ff5050", "#ffc83c", "#50c8ff", "#78e678")

Volume = Any
Change = Callable[[Volume, Volume], tuple[Volume, Volume]]


@dataclass(frozen=True)
class Patch:
    """An initial patch, twice the size of what is shown; image z-scored, label -1 outside."""

    name: str
    image: np.ndarray
    label: np.ndarray


def panels(
    patch_size: tuple[int, ...], names: Sequence[str] | None = None
) -> dict[str, dict[str, Change]]:
    """Give, by heading and title, functions of (image, label): the extremes of the policies.

    ``names`` are policies, None all that there are; what several have in common is shown once.

    Raises:
        ValueError: for an unknown policy.
    """
    groups: dict[str, dict[str, Change]] = {spatial.FAMILY: {"centre crop": _crop}}
    for name in POLICIES.names if names is None else names:
        for family, title, change in _policy_panels(name, patch_size):
            groups.setdefault(family, {}).setdefault(title, change)
    groups[spatial.FAMILY] |= {
        "elastic (in no policy)": _elastic,
        "mask: 0 where label -1": _masked,
    }
    return groups


def _policy_panels(name: str, patch_size: tuple[int, ...]) -> Iterator[tuple[str, str, Change]]:
    policy = find_policy(name)
    # Three-dimensional: what slice-by-slice transforms do is among the examples.
    patch = dataclasses.replace(
        policies.patch_geometry(name, patch_size),
        dummy_2d=False,
        rotation_range_rad=(-DEGREES_30, DEGREES_30),
    )
    if (warp := policy.warp) is not None:
        for title, value in warp.examples(patch):
            yield warp.family, title, partial(_warped, warp, value, patch)
    for part in filter(None, (policy.mirror, policy.reorientation)):
        for title, value in part.examples(patch):
            yield part.family, title, partial(_oriented, part, value)
    for transform in policy.transforms:
        for title, value in transform.examples(patch):
            yield transform.family, title, partial(_transformed, transform, value)


def _size(volume: Volume) -> tuple[int, ...]:
    return tuple(n // 2 for n in volume.shape)


def _crop(image: Volume, label: Volume) -> tuple[Volume, Volume]:
    size = _size(image)
    return spatial.centre_crop(image, size), spatial.centre_crop(label, size, -1)


def _warped(
    warp: spatial.Warp, value: Any, patch: PatchGeometry, image: Volume, label: Volume
) -> tuple[Volume, Volume]:
    (image,), label = warp.apply((image,), label, value, patch)
    return image, label


def _oriented(part: Any, value: Any, image: Volume, label: Volume) -> tuple[Volume, Volume]:
    image, label = (part.apply(volume, value) for volume in _crop(image, label))
    return image, label


def _transformed(
    transform: Transform, value: Any, image: Volume, label: Volume
) -> tuple[Volume, Volume]:
    image, label = _crop(image, label)
    return transform.apply(image, value), label


def _elastic(image: Volume, label: Volume) -> tuple[Volume, Volume]:
    size = _size(image)
    noise = jax.random.normal(jax.random.key(0), (3, *size))
    offsets = spatial.elastic_offsets(
        noise, jnp.full(3, 0.1), jnp.asarray([1.0, size[1] / 15, size[2] / 15])
    )
    grid = spatial.sampling_grid(jnp.eye(3), image.shape, size, offsets)
    return spatial.resample_linear(image, grid), spatial.resample_label_linear(label, grid)


def _masked(image: Volume, label: Volume) -> tuple[Volume, Volume]:
    image, label = _crop(image, label)
    steps = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[1:]), indexing="ij")
    outside = steps[0] ** 2 + steps[1] ** 2 > 0.8  # as a nonzero mask would have it
    label = jnp.where(outside, -1, label)
    return spatial.apply_mask(image, label), label


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


def draw_sheet(patch: Patch, names: Sequence[str] | None = None) -> bytes:
    """Draw all panels of the policies ``names``, None for all; returns a PNG file."""
    from matplotlib.figure import Figure

    image, label = jnp.asarray(patch.image), jnp.asarray(patch.label)
    size = _size(image)
    groups = panels(size, names)
    num_rows = sum(-(-len(members) // COLUMNS) for members in groups.values())
    shown = np.asarray(_crop(image, label)[0])[size[0] // 2]
    window = tuple(np.percentile(shown, (0.5, 99.8)))
    row_height = PANEL + TITLE
    height = num_rows * row_height + len(groups) * HEADING + 0.4
    figure = Figure(figsize=(COLUMNS * (PANEL + GAP) + GAP, height), dpi=DPI)
    top = height - 0.32
    whose = "Every augmentation" if names is None else f"Augmentation {', '.join(names)}"
    caption = f"{whose} at its extremes: {patch.name}, one slice of {size} voxels"
    caption += "; label 1 red, 2 yellow; one grey window for all"
    _write(figure, GAP, height - 0.24, caption, size=11)
    for heading, members in groups.items():
        _write(figure, GAP, top - HEADING + 0.03, heading, size=9)
        top -= HEADING
        for number, (title, change) in enumerate(members.items()):
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
    parser.add_argument("--config", help="training config whose policy to show instead of all")
    parser.add_argument("--modality", choices=MODALITIES, default="t2", help="of the phantom")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        out = arguments.out
        if out.suffix.lower() != ".png":
            raise command.UsageError(f"--out {out}: expected a name that ends in .png")
        names = arguments.config and (load_config(arguments.config)[0].augment.policy,)
        subject = _subject(arguments.raw, arguments.case, arguments.modality)
        picture = draw_sheet(cut_patch(subject), names)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial_file = out.with_name(f".{out.name}.partial")
        partial_file.write_bytes(picture)
        partial_file.replace(out)
        return f"{out} ({len(picture) / 1000:.0f} kB)"

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
