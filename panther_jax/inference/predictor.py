"""One case from image to label map: members, folds, and how they are combined (spec 05).

A :class:`CasePredictor` works in three steps - prepare, infer, finish - so that a caller can do
those of neighbouring cases side by side. Read or write no files here.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from panther_jax.base.errors import PantherError
from panther_jax.devices.memory import available_memory
from panther_jax.devices.mesh import AXES, replicate, split_patches
from panther_jax.ensembles.combination import decide
from panther_jax.images.imageio import write_label
from panther_jax.inference import export, strategies
from panther_jax.inference.building import Settings, build_predictor, network_forward
from panther_jax.inference.members import PREPROCESSING, Ensemble
from panther_jax.inference.sliding_window import default_tile_batch, host_bytes
from panther_jax.inference.tiles import padded_size, tile_starts
from panther_jax.network.unet import Execution, Net, apply
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans
from panther_jax.preprocessing.pipeline import preprocess_image
from panther_jax.preprocessing.resampling import target_shape
from panther_jax.weights.models import Model

LOGGER = logging.getLogger("panther_jax")
MEMORY_SHARE = 0.9  # of what is available; the rest is for what surrounds the arrays

Progress = Callable[[int, int], None]


class ImageError(PantherError, ValueError):
    """An image that the model cannot predict."""


@dataclass(frozen=True)
class Prepared:
    """A case on the grids of the networks: an image and its properties for each member."""

    images: tuple[np.ndarray, ...]
    properties: tuple[Properties, ...]


@dataclass(frozen=True)
class Prediction:
    """A label map on the raw grid, with probabilities (output, z, y, x) if they were asked for."""

    label: np.ndarray
    probabilities: np.ndarray | None
    properties: Properties

    @property
    def geometry(self) -> Geometry:
        """The raw grid: that of the image."""
        return self.properties.geometry

    def write(self, path: str | Path) -> None:
        """Write the label map; the ending says how.

        Raises:
            DatasetError: if it cannot be written so.
        """
        write_label(Path(path), self.label, self.geometry)


# ---------------------------------------------------------------------------------- prediction


@dataclass(frozen=True)
class CasePredictor:
    """An ensemble ready to predict many cases; it holds the compiled networks."""

    ensemble: Ensemble
    settings: Settings = Settings()
    _forwards: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    _arranged: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def labels(self) -> Labels:
        """What the label maps hold."""
        return self.ensemble.labels

    def prepare(self, image: np.ndarray, geometry: Geometry | Sequence[float]) -> Prepared:
        """Preprocess an image (channel, z, y, x) for each member; equal preprocessing is shared.

        Raises:
            ValueError: if channels do not match, a voxel is not finite, an axis is empty, or the
                memory would not suffice.
        """
        image = _checked_image(image, self.ensemble.members[0].model)
        made: dict[tuple[Any, ...], tuple[np.ndarray, Properties]] = {}
        for member in self.ensemble.members:
            plans = member.model.plans
            key = _preprocessing(plans)
            if key not in made:
                _require_memory(image, geometry, plans, self.settings, len(self.ensemble.members))
                made[key] = preprocess_image(image, geometry, plans)
        chosen = [made[_preprocessing(m.model.plans)] for m in self.ensemble.members]
        return Prepared(tuple(i for i, _ in chosen), tuple(p for _, p in chosen))

    def infer(self, case: Prepared, progress: Progress | None = None) -> tuple[Any, ...]:
        """Logits of each member on its network's grid, mean over its folds."""
        members = self.ensemble.members
        lazy = self.ensemble.combination is None
        totals = [self._num_tiles(i, image) for i, image in enumerate(case.images)]
        found = []
        for index, image in enumerate(case.images):
            predict, params = self._member(index, image)
            tell = _shifted(progress, totals, index)
            found.append(predict(params, image, tell, lazy=lazy))
        if self.ensemble.combine == "logits":
            return (_mean_logits(found, [m.weight for m in members]),)
        return tuple(found)

    def finish(
        self, case: Prepared, logits: Sequence[Any], *, probabilities: bool = False
    ) -> Prediction:
        """From logits to a label map on the raw grid, and probabilities if asked for."""
        ensemble = self.ensemble
        if ensemble.combination is None or ensemble.combine == "logits":
            model = ensemble.members[0].model
            parts = logits[0], case.properties[0], model.plans, model.labels
            decision = None if ensemble.combination is None else ensemble.combination.decision
            if not probabilities and (decision is None or decision.kind != "threshold"):
                return Prediction(export.logits_to_label(*parts), None, case.properties[0])
            heads = logits[0] if isinstance(logits[0], np.ndarray) else logits[0].to_host()
            found = export.logits_to_probabilities(heads, *parts[1:])
            label = decide(found, model.labels, decision)
            return Prediction(label, found if probabilities else None, case.properties[0])
        return _combined(ensemble, case, logits, probabilities)

    def predict(
        self,
        image: np.ndarray,
        geometry: Geometry | Sequence[float],
        *,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> Prediction:
        """All three steps; ``geometry`` may be just the spacing z, y, x in mm."""
        case = self.prepare(image, geometry)
        logits = self.infer(case, progress)
        return self.finish(case, logits, probabilities=probabilities)

    def _member(self, index: int, image: np.ndarray) -> tuple[Any, Any]:
        """The compiled predictor of a member and its parameters, arranged by the strategy."""
        tile = self._tile(index, image)
        if (index, tile) not in self._arranged:
            self._arranged[index, tile] = self._arrange(index, image, tile)
        return self._arranged[index, tile]

    def _tile(self, index: int, image: np.ndarray) -> tuple[int, ...]:
        """The patch of the plans, or the image rounded up to what the network and devices share."""
        plans = self.ensemble.members[index].model.plans
        if not self.settings.whole_volume:
            return plans.patch_size
        size = image.shape[-len(plans.patch_size) :]
        units = [math.prod(s[a] for s in plans.arch.strides) for a in range(len(size))]
        units[0] *= jax.local_device_count()
        return tuple(-(-n // unit) * unit for n, unit in zip(size, units, strict=True))

    def _arrange(self, index: int, image: np.ndarray, tile: tuple[int, ...]) -> tuple[Any, Any]:
        member, settings = self.ensemble.members[index], self.settings
        model, plans = member.model, member.model.plans
        num_tiles = self._num_tiles(index, image) // len(model.folds)
        batch = settings.tile_batch or default_tile_batch(tile)
        if settings.whole_volume:
            forward, params = self._split_forward(model)
            return self._make(index, tile, 1, forward), params
        reference = settings.accumulate == "reference"
        arranged = strategies.arrange(
            self._forward(plans),
            model.params,
            tile_shape=(batch, *tile, model.num_channels),
            # spec 05 §6: the reference rounds each fold's logits on their own
            strategy="loop" if reference else settings.strategy,
            num_tiles=num_tiles * 2 ** len(member.mirror_axes),
            reserved_bytes=4 * image[0].size * (2 * plans.arch.num_outputs + model.num_channels),
        )
        if len(model.folds) > 1:
            LOGGER.info("%s: %d folds, %s", model.name, len(model.folds), arranged.why)
        return self._make(index, tile, batch, arranged.forward), arranged.parameter_sets

    def _make(self, index: int, tile: tuple[int, ...], batch: int, forward: Any) -> Any:
        member = self.ensemble.members[index]
        return build_predictor(
            member.model.plans,
            self.settings,
            mirror_axes=member.mirror_axes,
            step_size=member.step_size,
            forward=forward,
            tile=tile,
            tile_batch=batch,
        )

    def _split_forward(self, model: Model) -> tuple[Any, tuple[Any, ...]]:
        """The network on one tile split over all devices, and the folds' parameters on each."""
        found = np.array(jax.local_devices()).reshape(1, -1)
        mesh = jax.sharding.Mesh(found, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
        net = Net(model.plans.arch, Execution.auto(self.settings.dtype, space=found.size))
        split = split_patches(mesh)

        def forward(params: Any, tiles: jax.Array) -> jax.Array:
            return apply(net, params, split(tiles), full_only=True)[0]

        return forward, tuple(replicate(params, mesh) for params in model.params)

    def _forward(self, plans: Plans) -> Any:
        """The network as a function; one for each architecture, so that it compiles once."""
        if plans.arch not in self._forwards:
            self._forwards[plans.arch] = network_forward(plans.arch, self.settings.dtype)
        return self._forwards[plans.arch]

    def _num_tiles(self, index: int, image: np.ndarray) -> int:
        member = self.ensemble.members[index]
        tile = self._tile(index, image)
        size = padded_size(image.shape[1:], tile)
        starts = tile_starts(size[3 - len(tile) :], tile, member.step_size)
        slices = size[0] if len(tile) == 2 else 1
        return slices * math.prod(len(s) for s in starts) * len(member.model.folds)


def _preprocessing(plans: Plans) -> tuple[Any, ...]:
    return tuple(getattr(plans, name) for name in PREPROCESSING)


def _shifted(progress: Progress | None, totals: Sequence[int], index: int) -> Progress | None:
    """Progress over the tiles of all members, from that of one."""
    if progress is None:
        return None
    before = sum(totals[:index])

    def tell(done: int, total: int) -> None:
        # with the members of a fold side by side there are fewer calls than tiles
        progress(before + done * totals[index] // total, sum(totals))

    return tell


def _mean_logits(parts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    total = np.zeros(parts[0].shape, np.float32)
    for part, weight in zip(parts, weights, strict=True):
        for target, values in zip(total, part, strict=True):
            target += np.float32(weight) * values
    total /= np.float32(sum(weights))
    return total


def _combined(
    ensemble: Ensemble, case: Prepared, logits: Sequence[np.ndarray], probabilities: bool
) -> Prediction:
    """Mean of probabilities slab by slab, so that only those to be kept are ever there."""
    combination = ensemble.combination
    assert combination is not None
    labels = [m.model.labels for m in ensemble.members]
    views, heads = [], []
    for member, part, properties in zip(ensemble.members, logits, case.properties, strict=True):
        view = export.raw_view(part[0], properties, member.model.plans)
        views.append(view)
        heads.append([view.prepared(head) for head in part])
    first = views[0]
    label = np.zeros(first.raw_shape, export.label_dtype(combination.labels))
    kept = None
    if probabilities:
        shape = len(combination.classes), first.raw_shape, combination.labels
        kept = export.empty_probabilities(*shape)

    def work(rows: slice) -> None:
        parts = [
            view.probabilities(part, rows, own)
            for view, part, own in zip(views, heads, labels, strict=True)
        ]
        found = combination.combine(parts)
        label[first.crop][rows] = combination.decide(found)
        if kept is not None:
            kept[(slice(None), *first.crop)][:, rows] = combination.normalised(found)

    with export.slab_threads(first.slabs()) as for_all_slabs:
        for_all_slabs(work)
    return Prediction(label, kept, case.properties[0])


# -------------------------------------------------------------------------------------- checks


def _checked_image(
    image: Float[np.ndarray, "*shape"], model: Model
) -> Float[np.ndarray, "channel z y x"]:
    if image.ndim != 4:
        raise ImageError(f"image of shape {image.shape}; expected (channel, z, y, x)")
    if image.shape[0] != model.num_channels:
        names = model.dataset.get("channel_names", model.dataset.get("modality"))
        raise ImageError(
            f"image has {image.shape[0]} channel(s), model {model.name!r} takes "
            f"{model.num_channels}: {names}\n  Give one file a channel, CASE_0000, CASE_0001, ..."
        )
    if 0 in image.shape:
        raise ImageError(f"image of shape {image.shape} is empty along an axis; export it again")
    broken = sum(int((~np.isfinite(channel)).sum()) for channel in image)
    if broken:
        raise ImageError(
            f"{broken} of {image.size} voxels are NaN or infinite\n"
            "  Replace them (by the background's value), or export the image again."
        )
    return image


def _require_memory(
    image: np.ndarray,
    geometry: Geometry | Sequence[float],
    plans: Plans,
    settings: Settings,
    num_members: int,
) -> None:
    """Refuse, before anything large is made, what the memory does not hold."""
    available = available_memory()
    if available is None:
        return
    spacing_zyx = geometry.spacing_zyx if isinstance(geometry, Geometry) else geometry
    spacing = tuple(float(spacing_zyx[a]) for a in plans.transpose_forward)
    wanted = plans.spacing if len(plans.spacing) == 3 else (spacing[0], *plans.spacing)
    for cropped in (False, True):  # the crop is looked at only where it decides
        box = _extent(image) if cropped else image.shape[1:]
        shape = tuple(box[a] for a in plans.transpose_forward)
        size = target_shape(shape, spacing, wanted)
        on_host = jax.default_backend() == "cpu" or settings.accumulate_on == "host"
        outputs = plans.arch.num_outputs if on_host or settings.accumulate == "reference" else 2
        needed = host_bytes(
            size,
            plans.patch_size,
            num_channels=image.shape[0],
            num_outputs=outputs * num_members,
        )
        if needed <= MEMORY_SHARE * available:
            return
    raise ImageError(
        f"{tuple(image.shape[1:])} voxels of {_mm(spacing_zyx)} mm become {size} at {_mm(wanted)} "
        f"mm; predicting {plans.arch.num_outputs} outputs there takes {needed / 1e9:.1f} GB of "
        f"memory, {available / 1e9:.1f} GB are available\n"
        "  Is the spacing in the header right? Else crop the image, or use a larger machine."
    )


def _mm(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _extent(image: np.ndarray) -> tuple[int, ...]:
    """Size of the box around all voxels that are nonzero in any channel."""
    occupied = np.zeros(image.shape[1:], bool)
    for channel in image:
        occupied |= channel != 0
    sizes = []
    for axis in range(3):
        where = np.flatnonzero(occupied.any(axis=tuple(a for a in range(3) if a != axis)))
        sizes.append(int(where[-1] - where[0]) + 1 if where.size else image.shape[1 + axis])
    return tuple(sizes)
