"""Batches: which cases, which patches, made by Grain's threads (spec 03 §4, 07 §7.6).

The host cuts the patches, or only says where they lie in cases that the device holds. What sample
``i`` of step ``n`` holds is a function of (seed, fold, stream, n, i) and nothing else: step n can
be made without the steps before it, resuming is exact, and the numbers depend neither on the number
of threads nor on that of processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from panther_jax.config.places import Fold
from panther_jax.store.compressed import CompressedArray

TRAIN_STREAM, VALIDATION_STREAM, INIT_STREAM = 0, 1, 2
FOLD_ALL = 1000
IMAGE_PADDING, LABEL_PADDING = 0, -1

Stream = Literal[0, 1, 2]
Case = TypeVar("Case")


@runtime_checkable
class PatchCase(Protocol):
    """What a batch needs of a stored case: image (C,Z,Y,X), label (Z,Y,X), class locations."""

    @property
    def image(self) -> np.ndarray | CompressedArray: ...  # noqa: D102
    @property
    def label(self) -> np.ndarray | CompressedArray: ...  # noqa: D102
    @property
    def locations(self) -> Sequence[tuple[Any, np.ndarray]]: ...  # noqa: D102


@runtime_checkable
class Draws(Protocol):
    """The two calls that the sampling law makes of a ``numpy.random.Generator``."""

    def choice(self, a: int, /) -> Any: ...  # noqa: D102
    def integers(self, low: int, high: int, /) -> Any: ...  # noqa: D102


def fold_code(fold: Fold) -> int:
    """The number that stands for a fold in random keys."""
    return FOLD_ALL if fold == "all" else fold


def sample_rng(
    seed: int, fold: int, stream: Stream, step: int, position: int
) -> np.random.Generator:
    """The generator of one sample of one step; ``fold`` is coded by :func:`fold_code`."""
    return np.random.default_rng((seed, fold, stream, step, position))


# ------------------------------------------------------------------------------- sampling law


def num_random(batch_size: int, oversampling: float) -> int:
    """Samples at the front of a batch that are *not* forced onto foreground (spec 03 §4.2)."""
    return round(batch_size * (1 - oversampling))


def start_range(
    shape: Sequence[int], patch: Sequence[int], final_patch: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Lowest and highest patch start an axis, both inclusive (spec 03 §4.3).

    ``patch`` is what is cut, ``final_patch`` what the network sees of it.
    """
    bounds = []
    for size, cut, final in zip(shape, patch, final_patch, strict=True):
        pad = max(cut - final, cut - size)
        half = -(-pad // 2)
        bounds.append((-half, size + half - cut))
    return tuple(bounds)


def select_voxel(
    rng: Draws,
    locations: Sequence[tuple[Any, Int[np.ndarray, "_ 3"]]],
    *,
    forced: bool,
    has_ignore: bool,
) -> tuple[int, ...] | None:
    """A voxel to centre on: of a uniformly drawn class if forced, else of the annotated area.

    None asks for a uniform position. Tuple keys that hold -1 mark the annotated area (§4.4).
    """
    if forced:
        eligible = [(key, voxels) for key, voxels in locations if len(voxels)]
        classes = [(key, voxels) for key, voxels in eligible if not _is_annotated(key)]
        eligible = classes or eligible
        if not eligible:
            return None
        _, voxels = eligible[int(rng.choice(len(eligible)))]
    elif has_ignore:
        voxels = next((v for key, v in locations if _is_annotated(key)), np.empty((0, 3), int))
        if not len(voxels):
            return None
    else:
        return None
    return tuple(int(c) for c in voxels[int(rng.choice(len(voxels)))])


def _is_annotated(key: Any) -> bool:
    return isinstance(key, tuple) and -1 in key


def patch_start(
    rng: Draws,
    bounds: Sequence[tuple[int, int]],
    patch: Sequence[int],
    voxel: Sequence[int] | None,
) -> tuple[int, ...]:
    """Start of a patch: uniform within ``bounds``, or so that ``voxel`` lies at ``patch // 2``.

    Only the lower bound clamps a centred patch; it may stick out at the far border (spec 03 §4.3).
    """
    if voxel is None:
        return tuple(int(rng.integers(low, high + 1)) for low, high in bounds)
    return tuple(max(low, v - p // 2) for (low, _), v, p in zip(bounds, voxel, patch, strict=True))


def crop_padded(
    array: np.ndarray | CompressedArray, start: Sequence[int], size: Sequence[int], padding: int
) -> np.ndarray:
    """Cut a box out of the last axes of an array; what lies outside is ``padding``.

    A box that misses the array completely is all zero, as in the reference (spec 03 §4.3).
    """
    lead = array.shape[: array.ndim - len(size)]
    inside, target = [], []
    for low, extent, n in zip(start, size, array.shape[len(lead) :], strict=True):
        first, last = max(low, 0), min(low + extent, n)
        if last <= first:
            return np.zeros((*lead, *size), array.dtype)
        inside.append(slice(first, last))
        target.append(slice(first - low, last - low))
    out = np.full((*lead, *size), padding, array.dtype)
    out[(..., *target)] = array[(..., *inside)]
    return out


# ------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Sampling:
    """How batches are drawn: everything but the cases. ``fold`` is coded by :func:`fold_code`."""

    patch: tuple[int, ...]
    final_patch: tuple[int, ...]
    batch_size: int
    oversampling: float
    seed: int
    fold: int
    stream: Stream
    has_ignore: bool = False

    @property
    def size_zyx(self) -> tuple[int, ...]:
        """Voxels of a patch along z, y, x; a planar one is a slice."""
        return _solid(self.patch)

    def draw(
        self,
        cases: Sequence[Case],
        step: int,
        position: int,
        *,
        shape_of: Callable[[Any], Sequence[int]],
    ) -> tuple[Case, tuple[int, ...]]:
        """The case of a sample, and where its patch starts in it, z, y, x."""
        rng = sample_rng(self.seed, self.fold, self.stream, step, position)
        case: Any = cases[int(rng.choice(len(cases)))]
        forced = position >= num_random(self.batch_size, self.oversampling)
        voxel = select_voxel(rng, case.locations, forced=forced, has_ignore=self.has_ignore)
        bounds = start_range(shape_of(case), self.size_zyx, _solid(self.final_patch))
        return case, patch_start(rng, bounds, self.size_zyx, voxel)


def _solid(patch: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *patch) if len(patch) == 2 else patch


@dataclass(frozen=True)
class _Source(Generic[Case]):
    """What Grain reads: batch n at index n.

    ``positions`` are the places of the global batch that this process makes.
    """

    cases: Sequence[Case]
    sampling: Sampling
    num_steps: int
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return self.num_steps


@dataclass(frozen=True)
class BatchSource(_Source[PatchCase]):
    """Patches: ``image`` (B, *patch, C) float32 and ``label`` (B, *patch, 1) int16."""

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        samples = [self._sample(int(index), i) for i in self.positions]
        return {
            "image": np.stack([image for image, _ in samples]),
            "label": np.stack([label for _, label in samples]),
        }

    def _sample(
        self, step: int, position: int
    ) -> tuple[Float[np.ndarray, "..."], Int[np.ndarray, "..."]]:
        law = self.sampling
        case, start = law.draw(self.cases, step, position, shape_of=lambda c: c.label.shape)
        image = crop_padded(case.image, start, law.size_zyx, IMAGE_PADDING)
        label = crop_padded(case.label, start, law.size_zyx, LABEL_PADDING).astype(np.int16)
        if len(law.patch) == 2:
            image, label = image[:, 0], label[0]
        return np.moveaxis(image, 0, -1).astype(np.float32, copy=False), label[..., None]


@dataclass(frozen=True)
class Outline:
    """What drawing needs of a case that the device holds; ``first_line`` is where it starts."""

    first_line: int
    shape: tuple[int, ...]
    locations: Sequence[tuple[Any, np.ndarray]]


@dataclass(frozen=True)
class BoxSource(_Source[Outline]):
    """Where the patches of :class:`BatchSource` lie: ``boxes`` (B, 7) int32.

    A box is the case's first line on the device, its shape z, y, x, and the patch's start z, y, x.
    """

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        return {"boxes": np.array([self._box(int(index), i) for i in self.positions], np.int32)}

    def _box(self, step: int, position: int) -> tuple[int, ...]:
        case, start = self.sampling.draw(self.cases, step, position, shape_of=lambda c: c.shape)
        return case.first_line, *case.shape, *start


def iterate(
    source: BatchSource | BoxSource,
    *,
    first: int,
    num_threads: int,
    prefetch: int,
    per_call: int = 1,
) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches from step ``first`` on, in order, made ahead by Grain's threads.

    With ``per_call`` > 1 as many batches come at a time, stacked on a new first axis.
    """
    import grain

    dataset = grain.MapDataset.source(source)[first:]
    if per_call > 1:
        dataset, prefetch = dataset.batch(per_call), -(-prefetch // per_call)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))
