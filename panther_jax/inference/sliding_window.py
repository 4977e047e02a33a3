"""Sliding-window prediction: tiles, their weights, mirroring, accumulation (spec 05 §2-§6).

A *tile* is a window of the preprocessed image. The network is a function
``forward(params, tiles (B, *tile, C)) -> logits (B, *tile, K)`` that JAX can trace; ``params`` is
any pytree. It is compiled once; what depends on the size of an image is small and compiles fast.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from panther_jax.devices.compiler import compiled
from panther_jax.devices.memory import free_memory
from panther_jax.inference.tiles import (
    Starts,
    batches,
    importance_map,
    mirror_combinations,
    pad_to_tile,
    padded_size,
    tile_starts,
    weight_sum,
)

log = logging.getLogger("panther_jax")

SLICE_BUCKET = 32  # number of slices of 2-D predictions is rounded up to a multiple of this
BUCKETS = 8  # a tile's edge divided by this is the step of compiled sizes
BATCH_VOXELS = 1 << 21  # small tiles are batched up to so many voxels on accelerators
MAX_BATCH = 8
SCRATCH_BYTES = 1024  # a voxel of a batch of tiles: what the network's activations may take
_TOO_LARGE = (
    "not enough device memory for an image of %s voxels with %d outputs beside tiles of %s; "
    "adding up the tiles in host memory instead"
)

Forward = Callable[[Any, Any], Any]
Progress = Callable[[int, int], None]
Predictor = Callable[..., Any]
Place = Literal["auto", "device", "host"]

# -------------------------------------------------------------------------------- sliding window


@dataclass(frozen=True)
class DeviceLogits:
    """Logits left on the device; iterating fetches one class (Z, Y, X) at a time."""

    total: Any  # (K, *bucket)
    inner: tuple[slice, ...]

    def __len__(self) -> int:
        return self.total.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.asarray(self.total[head])[self.inner] for head in range(len(self)))

    def to_host(self) -> np.ndarray:
        """All classes (K, Z, Y, X)."""
        if _platform(self.total) == "cpu":
            return np.asarray(self.total)[(slice(None), *self.inner)]  # no copy
        shape = tuple(s.stop - s.start for s in self.inner)
        logits = np.empty((len(self), *shape), np.float32)
        for index, head in enumerate(self):
            logits[index] = head
        return logits


@dataclass(frozen=True)
class _Work:
    """One image on its way: padded, where its tiles are, who wants to know how far it is."""

    padded: np.ndarray
    inner: tuple[slice, ...]
    starts: Starts
    num_members: int
    progress: Progress | None

    @property
    def size(self) -> tuple[int, ...]:
        return self.padded.shape[1:]

    @property
    def num_tiles(self) -> int:
        return math.prod(len(s) for s in self.starts)

    def tell(self, done: int, result: Any) -> None:
        if self.progress is not None:
            result.block_until_ready()  # or it would report what is queued, not what is done
            self.progress(done, self.num_members * self.num_tiles)


def make_predictor(
    forward: Forward,
    *,
    tile: tuple[int, ...],
    num_outputs: int,
    mirror_axes: tuple[int, ...] = (),
    step_size: float = 0.5,
    gaussian: bool = True,
    accumulate: Literal["float32", "reference"] = "float32",
    accumulate_on: Place = "auto",
    tile_batch: int | None = None,
) -> Predictor:
    """Make ``predict(params, image (C,Z,Y,X), progress=None, lazy=False) -> logits (K,Z,Y,X)``.

    Images smaller than the tile are padded with 0, centred. A tile of two axes predicts slice by
    slice. ``mirror_axes`` are spatial axes of the tile; logits are averaged over all mirrored
    variants. A list or tuple of ``params`` stands for members (folds) whose logits are averaged, in
    one accumulator, one member's parameters on the device at a time.

    ``accumulate="float32"`` returns float32. ``accumulate_on`` says where the tiles add up; "auto"
    decides from sizes: on the host for CPUs and for what does not fit on the device, with the same
    result. ``lazy`` leaves logits that add up on the device there, as :class:`DeviceLogits`.
    ``accumulate="reference"`` sums in float16 on the host as nnU-Net does (spec 05 §5.1), a member
    after the other (§6), and returns float16.
    ``tile_batch`` tiles go through the network at once (default: 1 on CPU, more of small tiles on
    accelerators). ``progress(done, total)`` is called after each batch of tiles. One predictor
    should serve many cases and parameter sets: it holds the compiled functions.

    Raises:
        ValueError: if tile, mirror axes, step size or accumulation mode are not usable.
    """
    _check_settings(tile, mirror_axes, step_size, accumulate, accumulate_on)
    window = tile if len(tile) == 3 else (1, *tile)
    weights = importance_map(tile) if gaussian else np.ones(tile, np.float16)
    weights = weights.reshape(window)
    batch = tile_batch or default_tile_batch(tile)
    run = _mirrored(compiled(forward), mirror_combinations(mirror_axes))
    engine = _Engine(
        on_device=_device_accumulation(run, weights, num_outputs, batch, tile),
        on_host=_host_accumulation(run, weights, num_outputs, batch, tile),
        num_outputs=num_outputs,
        tile=tile,
        step_size=step_size,
        batch=batch,
        accumulate=accumulate,
        accumulate_on=accumulate_on,
    )
    return engine.predict


@dataclass(frozen=True)
class _Engine:
    """What a predictor is made of: its two accumulations and the settings that choose."""

    on_device: Callable[..., Any]
    on_host: Callable[..., np.ndarray]
    num_outputs: int
    tile: tuple[int, ...]
    step_size: float
    batch: int
    accumulate: str
    accumulate_on: Place

    def predict(
        self,
        params: Any,
        image: Float[np.ndarray, "channel z y x"],
        progress: Progress | None = None,
        lazy: bool = False,
    ) -> Any:
        members = list(params) if isinstance(params, (list, tuple)) else [params]
        if not members:
            raise ValueError("no parameters to predict with; name at least one fold")
        work = self._work(image, len(members), progress)
        if self.accumulate == "reference":
            parts = range(len(members))
            logits = mean_logits(
                self.on_host(members[n : n + 1], work, np.float16, n) for n in parts
            )
            return _checked(logits[(slice(None), *work.inner)], self.accumulate)
        place = self.accumulate_on
        if place == "auto":
            window = self.tile if len(self.tile) == 3 else (1, *self.tile)
            place = _place(members[0], work, self.num_outputs, window, self.batch)
        if place == "device":
            try:
                return self.on_device(members, work, lazy)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                log.warning(_TOO_LARGE, work.size, self.num_outputs, self.tile)
        logits = self.on_host(members, work, np.float32, 0)
        return _checked(logits[(slice(None), *work.inner)], self.accumulate)

    def _work(self, image: np.ndarray, num_members: int, progress: Progress | None) -> _Work:
        flat = len(self.tile) == 2
        padded, inner = pad_to_tile(image, (1, *self.tile) if flat else self.tile)
        starts = tile_starts(padded.shape[4 - len(self.tile) :], self.tile, self.step_size)
        if flat:
            starts = (tuple(range(padded.shape[1])), *starts)
        return _Work(padded, inner, starts, num_members, progress)


def _check_settings(
    tile: tuple[int, ...],
    mirror_axes: tuple[int, ...],
    step_size: float,
    accumulate: str,
    accumulate_on: str,
) -> None:
    if len(tile) not in (2, 3) or any(k < 1 for k in tile):
        raise ValueError(f"tile {tile} must have 2 or 3 positive sizes")
    if any(not 0 <= a < len(tile) for a in mirror_axes) or len(set(mirror_axes)) < len(mirror_axes):
        raise ValueError(f"mirror axes {mirror_axes} must be distinct and below {len(tile)}")
    if not 0 < step_size <= 1:
        raise ValueError(f"step size is {step_size}; expected a fraction of the tile in (0, 1]")
    if accumulate not in ("float32", "reference"):
        raise ValueError(f"accumulate is {accumulate!r}; expected 'float32' or 'reference'")
    if accumulate_on not in ("auto", "device", "host"):
        raise ValueError(f"accumulate_on is {accumulate_on!r}; expected 'auto', 'device' or 'host'")


def _checked(logits: np.ndarray, accumulate: str) -> np.ndarray:
    for head in logits:
        if not np.isfinite(head).all():
            raise ValueError(_not_finite(accumulate))
    return logits


def _not_finite(accumulate: str) -> str:
    return (
        f"the predicted logits are infinite or NaN with accumulate={accumulate!r}; the network "
        "diverged, or its logits are too large for float16 (use accumulate='float32' and dtype "
        "float32)"
    )


def mean_logits(
    logits: Iterable[Float[np.ndarray, "output z y x"]],
) -> Float[np.ndarray, "output z y x"]:
    """Unweighted mean over parameter sets (folds), in their order and dtype (spec 05 §6).

    Takes an iterator, so that two arrays at most are in memory. float16 is rounded after each sum.

    Raises:
        ValueError: if there is nothing to average.
    """
    total, count = None, 0
    for one in logits:
        total = one.copy() if total is None else np.add(total, one, out=total)
        count += 1
    if total is None:
        raise ValueError("no logits to average; name at least one fold or model")
    return np.divide(total, total.dtype.type(count), out=total) if count > 1 else total


# ------------------------------------------------------------------------ what is decided by size


def default_tile_batch(tile: tuple[int, ...]) -> int:
    """Tiles in one call of the network: one on a CPU, on accelerators enough to keep them busy."""
    if jax.default_backend() == "cpu":
        return 1
    return min(MAX_BATCH, max(1, BATCH_VOXELS // math.prod(tile)))


def host_bytes(
    size: tuple[int, ...], tile: tuple[int, ...], *, num_channels: int, num_outputs: int
) -> int:
    """Host memory that predicting an image of ``size`` takes where tiles add up on the host."""
    return 4 * math.prod(padded_size(size, tile)) * (2 * num_channels + num_outputs + 1)


def _place(params: Any, work: _Work, num_outputs: int, window: tuple[int, ...], batch: int) -> Any:
    """Where to add up: on a CPU in NumPy, which needs no compilation and no second copy."""
    leaf = next((x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)), None)
    device = jax.devices()[0] if leaf is None else min(leaf.devices(), key=lambda d: d.id)
    if device.platform == "cpu":
        return "host"
    free = free_memory(device)
    if free is None:
        return "device"
    # Twice the outputs: those of the case before may still be there, being exported.
    voxels = math.prod(_bucket(work.size, window))
    needed = 4 * voxels * (2 * num_outputs + work.padded.shape[0] + 1)
    needed += batch * math.prod(window) * (SCRATCH_BYTES + 8 * num_outputs)
    if needed <= free:
        return "device"
    log.info(
        "an image of %s voxels with %d outputs would take %.1f GB of device memory, %.1f GB are "
        "free: adding up the tiles in host memory",
        work.size,
        num_outputs,
        needed / 1e9,
        free / 1e9,
    )
    return "host"


def _platform(array: Any) -> str:
    return next(iter(array.devices())).platform


def _bucket(size: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """The compiled shape for a size: the tile, then steps of a part of it (spec 08 §8.6)."""
    rounded = []
    for n, k in zip(size, window, strict=True):
        unit = SLICE_BUCKET if k == 1 else max(1, k // BUCKETS)
        rounded.append(k + math.ceil((n - k) / unit) * unit)
    return tuple(rounded)


# ------------------------------------------------------------------------------------- the tiles


def _mirrored(run: Forward, combinations: tuple[tuple[int, ...], ...]) -> Forward:
    """The mean over mirrored variants, each through the one compiled network."""
    if not combinations:
        return run
    flip = partial(jax.jit, static_argnums=1)(jnp.flip)

    @partial(jax.jit, static_argnums=2, donate_argnums=0)
    def add_flipped(total: jax.Array, logits: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return total + jnp.flip(logits, axes)

    @partial(jax.jit, donate_argnums=0)
    def divide(total: jax.Array) -> jax.Array:
        return total / (len(combinations) + 1)

    def predict_tiles(params: Any, tiles: jax.Array) -> jax.Array:
        total = run(params, tiles)
        for axes in combinations:
            flipped_axes = tuple(a + 1 for a in axes)
            total = add_flipped(total, run(params, flip(tiles, flipped_axes)), flipped_axes)
        return divide(total)

    return predict_tiles


def _placement(params: Any) -> Any:
    """Where image and accumulator must be: on the parameters' devices, replicated."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            if isinstance(leaf.sharding, jax.sharding.NamedSharding):
                return jax.NamedSharding(leaf.sharding.mesh, jax.P())
            return leaf.sharding
    return None


def _transferred(params: Any) -> Any:
    """Parameters on a device: once, not with every tile."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        return params
    return jax.device_put(params)


# ------------------------------------------------------------------------------- accumulation


def _device_accumulation(
    run: Forward, weights: np.ndarray, num_outputs: int, batch: int, tile: tuple[int, ...]
) -> Callable[..., Any]:
    window = weights.shape

    @jax.jit
    def cut(image: jax.Array, starts: jax.Array) -> jax.Array:
        corners = [(start[0], start[1], start[2], 0) for start in starts]
        size = (*window, image.shape[-1])
        tiles = jnp.stack([jax.lax.dynamic_slice(image, c, size) for c in corners])
        return tiles.reshape(batch, *tile, image.shape[-1])

    @partial(jax.jit, donate_argnums=0)
    def add(total: jax.Array, logits: jax.Array, weight: jax.Array, starts: Any, count: Any):
        logits = jnp.moveaxis(logits.astype(jnp.float32), -1, 1)
        logits = logits.reshape(batch, num_outputs, *window)
        for number in range(batch):  # one after the other: tiles overlap
            corner = (0, starts[number, 0], starts[number, 1], starts[number, 2])
            here = jax.lax.dynamic_slice(total, corner, (num_outputs, *window))
            product = jnp.where(number < count, logits[number] * weight, 0.0)
            total = jax.lax.dynamic_update_slice(total, here + product, corner)
        return total

    @partial(jax.jit, donate_argnums=0)
    def normalise(total: jax.Array, weight_sum: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = total / weight_sum
        return logits, jnp.isfinite(logits).all()

    @lru_cache(maxsize=2)
    def padded_sum(size: tuple[int, ...], starts: Starts) -> np.ndarray:
        rim = [(0, b - n) for b, n in zip(_bucket(size, window), size, strict=True)]
        return np.pad(weight_sum(size, starts, weights), rim, constant_values=1.0)

    def accumulate(members: Sequence[Any], work: _Work, lazy: bool) -> Any:
        bucket = _bucket(work.size, window)
        image = np.zeros((*bucket, work.padded.shape[0]), np.float32)
        image[tuple(slice(n) for n in work.size)] = np.moveaxis(work.padded, 0, -1)
        total = placed = weight = None
        done = 0
        for params in members:
            params = _transferred(params)
            place = _placement(params)
            if total is None:
                placed = jax.device_put(image, place)
                weight = jax.device_put(weights.astype(np.float32), place)
                total = jnp.zeros((num_outputs, *bucket), jnp.float32, device=place)
            for starts, used in batches(work.starts, batch):
                total = add(total, run(params, cut(placed, starts)), weight, starts, used)
                done += used
                work.tell(done, total)
        sums = padded_sum(work.size, work.starts) * np.float32(len(members))
        logits, finite = normalise(total, jax.device_put(sums, _placement(total)))
        if not finite:
            raise ValueError(_not_finite("float32"))
        found = DeviceLogits(logits, work.inner)
        return found if lazy else found.to_host()

    return accumulate


def _host_accumulation(
    run: Forward, weights: np.ndarray, num_outputs: int, batch: int, tile: tuple[int, ...]
) -> Callable[..., np.ndarray]:
    window = weights.shape

    def tiles_at(work: _Work, starts: np.ndarray) -> np.ndarray:
        tiles = np.empty((batch, *window, work.padded.shape[0]), np.float32)
        for target, start in zip(tiles, starts, strict=True):
            here = tuple(slice(s, s + k) for s, k in zip(start, window, strict=True))
            target[...] = np.moveaxis(work.padded[(slice(None), *here)], 0, -1)
        return tiles.reshape(batch, *tile, -1)

    def accumulate(members: Sequence[Any], work: _Work, dtype: Any, earlier: int) -> np.ndarray:
        total = np.zeros((num_outputs, *work.size), dtype)
        weight_sum = np.zeros(work.size, dtype)
        weight = weights.astype(dtype)

        def add(logits: Any, starts: np.ndarray, used: int) -> None:
            logits = np.asarray(logits, np.float32).reshape(batch, *window, num_outputs)
            for number in range(used):
                bounds = zip(starts[number], window, strict=True)
                here = tuple(slice(s, s + k) for s, k in bounds)
                # spec 05 §5.1: product and sum are float32, what is stored is of the dtype
                for head in range(num_outputs):
                    total[(head, *here)] += logits[number, ..., head] * weight
                weight_sum[here] += weight

        done = earlier * work.num_tiles
        waiting = None  # one batch computes while the one before is added
        for params in members:
            params = _transferred(params)
            place = _placement(params)
            for starts, used in batches(work.starts, batch):
                logits = run(params, jax.device_put(tiles_at(work, starts), place))
                if waiting is not None:
                    add(*waiting)
                waiting = (logits, starts, used)
                done += used
                work.tell(done, logits)
        if waiting is not None:
            add(*waiting)
        with np.errstate(over="ignore", invalid="ignore"):  # reported by the caller
            return np.divide(total, weight_sum, out=total)

    return accumulate
