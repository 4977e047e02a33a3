"""The devices of a run as a mesh ``(data, space)``, and arrays on it."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from panther_jax.config.schema import ConfigError, DevicesConfig
from panther_jax.plans.architecture import ArchSpec

LOGGER = logging.getLogger("panther_jax")
AXES = ("data", "space")

# ---------------------------------------------------------------------------------------- mesh


def make_mesh(
    wanted: DevicesConfig, *, batch_size: int, patch_size: Sequence[int], arch: ArchSpec
) -> jax.sharding.Mesh:
    """The mesh that batches of patches are split over.

    Left to itself, as many devices along ``data`` as divide the batch, and what is left along
    ``space``; on CPUs ``space`` is used only when asked for.

    Raises:
        ConfigError: if the devices cannot share the batch; names the batch sizes that they can.
    """
    devices = jax.devices()
    spaces = space_sizes(patch_size, arch)
    along, across = _layout(wanted, len(devices), batch_size=batch_size, spaces=spaces)
    if along * across < len(devices):
        LOGGER.info("using %d of %d devices", along * across, len(devices))
    chosen = np.array(devices[: along * across]).reshape(along, across)
    return jax.sharding.Mesh(chosen, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def space_sizes(patch_size: Sequence[int], arch: ArchSpec) -> tuple[int, ...]:
    """Numbers of devices that can share a patch: each has a slice of it at every resolution."""
    extent = patch_size[0]
    lowest = extent // math.prod(stride[0] for stride in arch.strides)
    return tuple(n for n in range(1, extent + 1) if extent % n == 0 and lowest >= n)


def _layout(
    wanted: DevicesConfig, count: int, *, batch_size: int, spaces: Sequence[int]
) -> tuple[int, int]:
    if wanted.data and batch_size % wanted.data:
        divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ConfigError(
            f"devices.data is {wanted.data}, which does not divide batches of {batch_size}\n"
            f"  Use one of {divisors}, or a batch size that is a multiple of {wanted.data}."
        )
    if wanted.space and wanted.space not in spaces:
        raise ConfigError(
            f"devices.space is {wanted.space}; patches can be split over {_listed(spaces)}"
        )
    found = [
        (d * s, d, s)
        for d, s in _fitting(batch_size, spaces, wanted, limit=count)
        if d * s <= count
    ]
    if not found:
        raise ConfigError(
            f"devices.data {wanted.data or 'auto'} x devices.space {wanted.space or 'auto'} need "
            f"more than the {count} device(s) there are"
        )
    used, along, across = max(found)
    fixed = wanted.data and wanted.space
    whole = jax.process_count() > 1 or jax.default_backend() != "cpu"
    if used < count and ((whole and not fixed) or jax.process_count() > 1):
        sizes = [
            b
            for b in range(1, 4 * count + 1)
            if any(d * s == count for d, s in _fitting(b, spaces, wanted, limit=count))
        ]
        raise ConfigError(
            f"{count} devices cannot share batches of {batch_size}; batch sizes that they can: "
            f"{_listed(sizes)}\n  Set --data.batch-size, or use {used} of them with --devices.data "
            f"{along} --devices.space {across}."
        )
    return along, across


def _fitting(
    batch_size: int, spaces: Sequence[int], wanted: DevicesConfig, *, limit: int
) -> list[tuple[int, int]]:
    data = [wanted.data] if wanted.data else range(1, limit + 1)
    if wanted.space:
        spaces = [wanted.space]
    elif jax.default_backend() == "cpu" and jax.process_count() == 1:
        spaces = [1]  # for a CPU's sake one would not: its devices are the same cores
    return [(d, s) for d in data if batch_size % d == 0 for s in spaces]


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:12])) or "none"


# ------------------------------------------------------------------------------------- batches


def positions(mesh: jax.sharding.Mesh, batch_size: int) -> tuple[int, ...]:
    """Places of the global batch that this process makes: those of its devices."""
    share = batch_size // mesh.shape["data"]
    here = jax.process_index()
    rows = [r for r, row in enumerate(mesh.devices) if any(d.process_index == here for d in row)]
    return tuple(row * share + i for row in rows for i in range(share))


def put_batch(
    arrays: Mapping[str, np.ndarray],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *,
    batch_axis: int = 0,
) -> dict[str, jax.Array]:
    """A batch on the devices, split along ``data``; ``arrays`` hold this process's positions."""
    steps = (None,) * batch_axis
    sharding = jax.NamedSharding(mesh, jax.P(*steps, "data"))
    if jax.process_count() == 1:
        return jax.device_put(dict(arrays), sharding)
    first = positions(mesh, batch_size)[0]

    def placed(array: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[batch_axis].indices(batch_size)
            return array[(*index[:batch_axis], slice(start - first, stop - first))]

        shape = (*array.shape[:batch_axis], batch_size, *array.shape[batch_axis + 1 :])
        return jax.make_array_from_callback(shape, sharding, piece)

    with jax.transfer_guard("allow"):  # the loop's guard takes this one for an accident
        return {name: placed(array) for name, array in arrays.items()}


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays, equal in all processes, on every device of the mesh."""
    sharding = jax.NamedSharding(mesh, jax.P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def placed(leaf: Any) -> jax.Array:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(placed(jax.random.key_data(leaf)))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: value[index or ...]
        )

    return jax.tree.map(placed, tree)


def split_patches(mesh: jax.sharding.Mesh) -> Any:
    """A function for use under jit: lays patches (B, *patch, C) out over the whole mesh."""
    if mesh.shape["space"] == 1:
        return lambda patches: patches
    sharding = jax.NamedSharding(mesh, jax.P(*AXES))
    return lambda patches: jax.lax.with_sharding_constraint(patches, sharding)


def on_one_device(tree: Any) -> Any:
    """Replicated arrays as this process's own, on its first device."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)
