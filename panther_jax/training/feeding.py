"""The batches of a fold on the devices, and where its cases are kept (``data.resident``)."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from panther_jax.base.console import announced
from panther_jax.config.places import Fold
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.devices import memory, processes
from panther_jax.devices import mesh as mesh_module
from panther_jax.store.compressed import CompressedArray
from panther_jax.store.folds import fold_cases
from panther_jax.store.store import Store, StoredCase, in_memory, read_stored
from panther_jax.training.resident import (
    MAX_CASE_VOXELS,
    AnyBatch,
    Batch,
    ResidentCases,
    UncutBatch,
    resident_bytes,
    write_lines,
)
from panther_jax.training.sampling import (
    TRAIN_STREAM,
    VALIDATION_STREAM,
    BatchSource,
    BoxSource,
    Outline,
    Sampling,
    Stream,
    fold_code,
    iterate,
)

LOGGER = logging.getLogger("panther_jax")
DEVICE_SHARE = 0.25  # of an accelerator's memory; training needs the rest
HOST_SHARE = 0.5  # of the machine's available memory

Residence = Literal["device", "host", "stream"]
Wanted = Literal["auto", "device", "host", "stream"]


@dataclass(frozen=True)
class Streams:
    """The batches of a fold on the devices, each from a training step on.

    Those for training come ``loop.steps_per_call`` at a time, then with a leading axis of steps;
    those for online validation one by one.
    """

    train: Callable[[int], Iterator[AnyBatch]]
    validation: Callable[[int], Iterator[AnyBatch]]


def make_streams(
    config: TrainConfig,
    store: Store,
    fold: Fold,
    *,
    initial_patch: tuple[int, ...],
    mesh: jax.sharding.Mesh,
) -> Streams:
    """Open the cases of a fold and make its streams; training patches are ``initial_patch`` large.

    Raises:
        ConfigError: if the cases are to be in device memory and do not fit.
    """
    data, loop = config.data, config.loop
    train_ids, validation_ids = fold_cases(store, fold)
    with announced(f"reading {len(train_ids)} training and {len(validation_ids)} validation cases"):
        ids = dict.fromkeys((*train_ids, *validation_ids))
        kept = _keep({i: read_stored(store, i) for i in ids}, data.resident, mesh)

    def stream(ids: Sequence[str], kind: Stream, patch: tuple[int, ...], steps: int) -> Any:
        sampling = Sampling(
            patch=patch,
            final_patch=store.plans.patch_size,
            batch_size=data.batch_size,
            oversampling=data.foreground_oversampling,
            seed=loop.seed,
            fold=fold_code(fold),
            stream=kind,
            has_ignore=store.labels.ignore_id is not None,
        )
        source = kept.source(ids, sampling, steps, mesh_module.positions(mesh, data.batch_size))

        def batches(first: int, per_call: int = 1) -> Iterator[AnyBatch]:
            options = {"num_threads": data.num_threads, "prefetch": data.prefetch_batches}
            put = functools.partial(
                mesh_module.put_batch,
                mesh=mesh,
                batch_size=data.batch_size,
                batch_axis=int(per_call > 1),
            )
            made = iterate(source, first=first, per_call=per_call, **options)
            return (kept.batch(put(arrays), patch) for arrays in made)

        return batches

    train = stream(train_ids, TRAIN_STREAM, initial_patch, loop.total_steps)
    online = loop.validation_steps
    validation = stream(
        validation_ids, VALIDATION_STREAM, store.plans.patch_size, loop.epochs * online
    )
    return Streams(
        train=lambda step: train(step, loop.steps_per_call),
        validation=lambda step: validation(step // loop.steps_per_epoch * online),
    )


# ------------------------------------------------------------------------- where the cases are


@dataclass(frozen=True)
class _OnHost:
    """Cases in host memory or in files: batches are sent as patches."""

    cases: Mapping[str, StoredCase]

    def source(
        self, ids: Sequence[str], law: Sampling, steps: int, positions: tuple[int, ...]
    ) -> BatchSource:
        return BatchSource([self.cases[i] for i in ids], law, steps, positions)

    def batch(self, arrays: Mapping[str, jax.Array], _patch: tuple[int, ...]) -> Batch:
        return Batch(**arrays)


@dataclass(frozen=True)
class _OnDevice:
    """Cases in device memory: batches are sent as boxes."""

    cases: ResidentCases
    outlines: Mapping[str, Outline]
    mesh: jax.sharding.Mesh

    def source(
        self, ids: Sequence[str], law: Sampling, steps: int, positions: tuple[int, ...]
    ) -> BoxSource:
        return BoxSource([self.outlines[i] for i in ids], law, steps, positions)

    def batch(self, arrays: Mapping[str, jax.Array], patch: tuple[int, ...]) -> UncutBatch:
        return UncutBatch(self.cases, arrays["boxes"], patch=patch, mesh=self.mesh)


def _keep(
    cases: dict[str, StoredCase], wanted: Wanted, mesh: jax.sharding.Mesh
) -> _OnHost | _OnDevice:
    """Put opened cases where they are to be; empties ``cases`` if that is the device."""
    residence = choose_residence(wanted, tuple(cases.values()), mesh)
    if residence == "device":
        lines, outlines = write_lines(cases)
        held = jax.block_until_ready(mesh_module.replicate(lines, mesh))
        return _OnDevice(held, outlines, mesh)
    in_files = residence == "stream"
    return _OnHost(cases if in_files else {i: in_memory(case) for i, case in cases.items()})


def choose_residence(
    wanted: Wanted,
    cases: Sequence[StoredCase],
    mesh: jax.sharding.Mesh,
) -> Residence:
    """Where to keep cases, told from their sizes alone; all processes agree on ``device``.

    Raises:
        ConfigError: if ``device`` is wanted and they do not fit; names sizes and remedy.
    """
    chosen: Residence
    if wanted == "auto":
        room = _is_accelerated(mesh) and _device_has_room(cases, mesh)
        chosen = "device" if room else _on_host(cases)
    else:
        chosen = wanted
    if wanted == "device":
        _require_device_memory(cases, mesh)
    available = memory.available_memory()
    where = {
        "device": f"device memory ({_size(_device_memory(mesh) or available)} a device)",
        "host": f"host memory ({_size(available)} available)",
        "stream": f"their files ({_size(available)} of host memory available)",
    }
    LOGGER.info(
        "%d cases of %s stay in %s: data.resident %s",
        len(cases),
        _size(_num_bytes(cases)),
        where[chosen],
        chosen if chosen == wanted else f"{wanted}, which is {chosen} here",
    )
    if chosen == "stream" and any(_is_read_whole(case) for case in cases):
        LOGGER.warning(
            "every patch decompresses its whole case, for .npz files have no parts\n  Unpack them "
            "to .npy beside, as nnU-Net's training does, or preprocess with panther_jax.preprocess."
        )
    return chosen


def _is_read_whole(case: StoredCase) -> bool:
    return isinstance(case.image, CompressedArray) and not case.image.sliced


def _is_accelerated(mesh: jax.sharding.Mesh) -> bool:
    return mesh.local_devices[0].platform != "cpu"


def _device_has_room(cases: Sequence[StoredCase], mesh: jax.sharding.Mesh) -> bool:
    """Whether cases leave every accelerator what training needs, and pass through host memory."""
    limit, available = _device_memory(mesh), memory.available_memory()
    needed = resident_bytes(cases)
    lacking = limit is None or needed > DEVICE_SHARE * limit or _is_too_large(cases)
    (somewhere,) = processes.any_process(lacking or (available is not None and needed > available))
    return not somewhere


def _require_device_memory(cases: Sequence[StoredCase], mesh: jax.sharding.Mesh) -> None:
    local = mesh.local_devices
    copies = 1 if _is_accelerated(mesh) else len(local)  # devices of a CPU share its memory
    needed = copies * resident_bytes(cases)
    free = [found for found in map(memory.free_memory, local) if found is not None]
    lacking = bool(free) and needed > min(free)
    (somewhere,) = processes.any_process(lacking or _is_too_large(cases))
    if somewhere:
        elsewhere = jax.process_count() > 1 and not lacking
        raise ConfigError(
            f"data.resident is device, but {len(cases)} cases take {_size(needed)}, "
            f"{_size(min(free, default=None))} of device memory are free here"
            f"{', less in another process' if elsewhere else ''} (a case may have "
            f"{MAX_CASE_VOXELS} voxels at most)\n  Pass --data.resident host, or stream, or auto, "
            "which takes what fits."
        )


def _on_host(cases: Sequence[StoredCase]) -> Residence:
    available = memory.available_memory()
    fits = available is None or _num_bytes(cases) <= HOST_SHARE * available
    return "host" if fits else "stream"


def _device_memory(mesh: jax.sharding.Mesh) -> int | None:
    limits = [memory.memory_limit(device) for device in mesh.local_devices]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _num_bytes(cases: Sequence[StoredCase]) -> int:
    return sum(case.image.nbytes + case.label.nbytes for case in cases)


def _is_too_large(cases: Sequence[StoredCase]) -> bool:
    return max(case.label.size for case in cases) > MAX_CASE_VOXELS


def _size(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / 1e9:.3g} GB"
