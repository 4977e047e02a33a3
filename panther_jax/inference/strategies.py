"""How the members of an ensemble of one architecture run: one program, or one after another.

All strategies give the mean of the members' logits; they differ in memory, time to compile and
time to run (spec 08a §A.7). ``loop`` calls one program a member, members outside tiles; ``scan``
loops inside the program; ``vmap`` runs all members side by side; ``shard`` puts members on devices.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from panther_jax.devices.compiler import compiled
from panther_jax.devices.memory import free_memory

LOGGER = logging.getLogger("panther_jax")

Strategy = Literal["vmap", "scan", "loop", "shard"]
STRATEGIES: tuple[Strategy, ...] = ("vmap", "scan", "loop", "shard")
Forward = Callable[[Any, Any], Any]
Device = Any  # jax.Device, which type checkers take for a variable

AXIS = "member"
MIN_FORWARDS = 200  # fewer calls of the network are done before a measurement has paid for itself
MAX_SECONDS = 20.0  # of one run of all members, in a measurement; longer is decided by rule
MARGIN = 0.95  # others must be faster than the loop by so much: they take more memory
RESIDENT_SHARE = 0.25  # of free memory, that all members of a loop may keep on the device
_EXHAUSTED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Arrangement:
    """Members ready to predict: ``forward(params, tiles)`` for each ``params`` of :meth:`passes`.

    Every pass stands for equally many members: the ensemble's logits are the plain mean of the
    passes' results. ``why`` is a sentence for the user.
    """

    strategy: Strategy
    why: str
    forward: Forward
    parameter_sets: tuple[Any, ...]
    device: Device | None = None

    def passes(self) -> Iterator[Any]:
        """Parameters on the device, one set after the other; one set but for ``loop``."""
        for params in self.parameter_sets:
            yield params if self.device is None else jax.device_put(params, self.device)


def arrange(
    forward: Forward,
    members: Sequence[Any],
    *,
    tile_shape: tuple[int, ...],
    strategy: str = "auto",
    num_tiles: int | None = None,
    reserved_bytes: int = 0,
    devices: Sequence[Device] | None = None,
) -> Arrangement:
    """Arrange members of one architecture; ``auto`` decides by :func:`choose`.

    ``members`` are parameter trees of equal shapes, best on the host; ``forward`` is the pure
    network of one of them, on tiles of ``tile_shape`` (batch, *tile, channel).

    Raises:
        ValueError: if there is no member, the shapes differ, or the strategy is unknown.
    """
    devices = tuple(devices or jax.local_devices())
    _check_members(members)
    if strategy not in (*STRATEGIES, "auto"):
        raise ValueError(f"strategy is {strategy!r}; expected auto, {', '.join(STRATEGIES)}")
    picked, why = cast(Strategy, strategy), f"strategy {strategy}, as asked for"
    if strategy == "auto":
        picked, why = choose(
            forward,
            members,
            tile_shape=tile_shape,
            num_tiles=num_tiles,
            reserved_bytes=reserved_bytes,
            devices=devices,
        )
    if picked == "loop":
        return _arranged_loop(forward, members, why, devices[0])
    mesh = _member_mesh(len(members), devices) if picked == "shard" else None
    params = _placed(members, mesh, devices[0])
    return Arrangement(picked, why, make_forward(picked, forward, mesh=mesh), (params,))


def _check_members(members: Sequence[Any]) -> None:
    if not members:
        raise ValueError("no member to arrange; name at least one model and fold")
    first = jax.tree.structure(members[0]), [np.shape(x) for x in jax.tree.leaves(members[0])]
    for number, member in enumerate(members[1:], start=1):
        found = jax.tree.structure(member), [np.shape(x) for x in jax.tree.leaves(member)]
        if found != first:
            raise ValueError(
                f"member {number} has parameters of other names or shapes than member 0; members "
                "of different architectures have to run one after another"
            )


def _arranged_loop(
    forward: Forward, members: Sequence[Any], why: str, device: Device
) -> Arrangement:
    free = free_memory(device)
    if free is not None and len(members) * _num_bytes(members[0]) <= RESIDENT_SHARE * free:
        members = [jax.device_put(member, device) for member in members]
    return Arrangement("loop", why, forward, tuple(members), device)


# -------------------------------------------------------------------------------- the programs


def stack_members(members: Sequence[Any], *, multiple_of: int = 1) -> Mapping[str, Any]:
    """Stack parameter trees on the host, with each member's weight in the mean.

    Repeats of the last member with weight 0 fill up to a multiple.
    """
    num = len(members)
    total = math.ceil(num / multiple_of) * multiple_of
    filled = [*members, *[members[-1]] * (total - num)]
    weights = np.where(np.arange(total) < num, 1 / num, 0.0).astype(np.float32)
    stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *filled)
    return {"members": stacked, "weights": weights}


def make_forward(strategy: Strategy, forward: Forward, *, mesh: Mesh | None = None) -> Forward:
    """Make ``forward(params, tiles)`` -> mean logits, for what :func:`stack_members` returns.

    ``loop`` is the forward function itself, for one member's parameters. ``shard`` needs a mesh
    with the axis ``member``, whose size divides the number of stacked members.
    """
    if strategy == "loop":
        return forward
    if strategy == "scan":
        return lambda params, tiles: _scanned(forward, params, tiles)
    if strategy == "vmap":
        return lambda params, tiles: _side_by_side(forward, params, tiles)
    assert mesh is not None, "shard needs a mesh"

    def on_devices(params: Any, tiles: Any) -> Any:
        return lax.psum(_side_by_side(forward, params, tiles), AXIS)

    # spec 08a §A.4: never jit + NamedSharding over members, every device would compute them all
    specs = (jax.P(AXIS), jax.P())
    return jax.shard_map(on_devices, mesh=mesh, in_specs=specs, out_specs=jax.P())


def _scanned(forward: Forward, params: Any, tiles: Any) -> Any:
    def add(total: Any, member: Any) -> tuple[Any, None]:
        one, weight = member
        return total + weight * forward(one, tiles), None

    first = jax.tree.map(lambda leaf: leaf[0], params["members"])
    logits = jax.eval_shape(forward, first, tiles)
    total = jnp.zeros(logits.shape, logits.dtype)
    return lax.scan(add, total, (params["members"], params["weights"]))[0]


def _side_by_side(forward: Forward, params: Any, tiles: Any) -> Any:
    logits = jax.vmap(forward, (0, None))(params["members"], tiles)
    weights = params["weights"].reshape(-1, *(1,) * (logits.ndim - 1))
    return jnp.sum(weights * logits, axis=0)  # not a matrix product, which may round to bfloat16


def _member_mesh(num_members: int, devices: Sequence[Device]) -> Mesh:
    """As few devices as the largest number of members a device allows."""
    each = math.ceil(num_members / len(devices))
    count = math.ceil(num_members / each)
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def _placed(members: Sequence[Any], mesh: Mesh | None, device: Device) -> Any:
    if mesh is None:
        return jax.device_put(stack_members(members), device)
    stacked = stack_members(members, multiple_of=mesh.size)
    return jax.device_put(stacked, NamedSharding(mesh, jax.P(AXIS)))


# --------------------------------------------------------------------------------- the decision


def choose(
    forward: Forward,
    members: Sequence[Any],
    *,
    tile_shape: tuple[int, ...],
    num_tiles: int | None = None,
    reserved_bytes: int = 0,
    devices: Sequence[Device] | None = None,
    free_bytes: int | None = None,
) -> tuple[Strategy, str]:
    """Pick a strategy for this device by memory and a short measurement, and say why.

    ``num_tiles`` is how many tiles each member will see, as far as known: few do not pay for a
    measurement. ``reserved_bytes`` are needed for other things on the device (image, accumulator).
    ``free_bytes`` replaces what the device says is free.
    """
    devices = tuple(devices or jax.local_devices())
    num, several = len(members), len(devices) > 1
    if num == 1:
        return "loop", "strategy loop: one member"
    real_devices = several and devices[0].platform != "cpu"
    by_rule: Strategy = "shard" if real_devices else "loop"
    if num_tiles is not None and num * num_tiles < MIN_FORWARDS:
        return by_rule, (
            f"strategy {by_rule}: {num} members on {num_tiles} tiles are done before a measurement "
            "would pay"
        )
    first = jax.device_put(members[0], devices[0])
    one = compiled(forward).lower(first, jax.ShapeDtypeStruct(tile_shape, jnp.float32)).compile()
    free = free_memory(devices[0]) if free_bytes is None else free_bytes
    needed = _needed_bytes(num, _num_bytes(members[0]), _scratch_bytes(one), len(devices))
    candidates = _candidates(devices)
    fitting: list[Strategy]
    fitting = [s for s in candidates if free is None or needed[s] + reserved_bytes <= free]
    lacking: list[Strategy] = [s for s in candidates if s not in fitting]
    notes = [f"{s} would need {_gigabytes(needed[s])} of {_gigabytes(free)}" for s in lacking]
    if not fitting:
        return "loop", f"strategy loop: {', '.join(notes)}"
    seconds: dict[Strategy, float] = {"loop": num * _seconds(one, first, tile_shape)}
    if seconds["loop"] > MAX_SECONDS:
        by_rule = by_rule if by_rule in fitting else "loop"
        notes.insert(0, f"a tile takes {seconds['loop']:.0f} s, too long to try others")
        return by_rule, f"strategy {by_rule}: {', '.join(notes)}"
    for strategy in fitting:
        measured = _try(strategy, forward, members, tile_shape=tile_shape, devices=devices)
        if measured is None:
            notes.append(f"{strategy} does not fit")
        else:
            seconds[strategy] = measured
    return _fastest(seconds, notes)


def _fastest(seconds: Mapping[Strategy, float], notes: Sequence[str]) -> tuple[Strategy, str]:
    picked = min(seconds, key=lambda s: seconds[s] * (MARGIN if s == "loop" else 1.0))
    others = [f"{s} {seconds[s]:.3g} s" for s in seconds if s != picked]
    text = ", ".join([f"{seconds[picked]:.3g} s a tile for all members", *others, *notes])
    return picked, f"strategy {picked}: {text}"


def _candidates(devices: Sequence[Device]) -> tuple[Strategy, ...]:
    """What might beat the loop; no form of ``vmap`` does on a CPU (spec 08a §A.2)."""
    shard: tuple[Strategy, ...] = ("shard",) if len(devices) > 1 else ()
    return (*shard, "scan") if devices[0].platform == "cpu" else (*shard, "scan", "vmap")


def _needed_bytes(num: int, params: int, scratch: int, num_devices: int) -> dict[Strategy, int]:
    """Bytes on a device: parameters, their sliced copies, and scratch (spec 08a §A.3)."""
    each = math.ceil(num / num_devices)
    return {
        "loop": params + scratch,
        "scan": (num + 1) * params + scratch,
        "vmap": 2 * num * params + num * scratch,
        "shard": each * (2 * params + scratch),
    }


def _try(
    strategy: Strategy,
    forward: Forward,
    members: Sequence[Any],
    *,
    tile_shape: tuple[int, ...],
    devices: Sequence[Device],
) -> float | None:
    """Seconds of one tile for all members; None if the memory does not suffice."""
    mesh = _member_mesh(len(members), devices) if strategy == "shard" else None
    try:
        params = _placed(members, mesh, devices[0])
        run = compiled(make_forward(strategy, forward, mesh=mesh))
        return _seconds(run, params, tile_shape)
    except jax.errors.JaxRuntimeError as error:
        if _EXHAUSTED not in str(error):
            raise
        return None


def _seconds(run: Callable[..., Any], params: Any, tile_shape: tuple[int, ...]) -> float:
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, jax.P())
    tiles = jax.device_put(np.ones(tile_shape, np.float32), sharding)
    jax.block_until_ready(run(params, tiles))  # compiles, and fills caches
    best, spent = math.inf, 0.0
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(params, tiles))
        best = min(best, time.perf_counter() - start)
        spent += time.perf_counter() - start
        if spent > 1.0:
            break
    return best


def _num_bytes(params: Any) -> int:
    return sum(4 * math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(params))


def _scratch_bytes(compiled: Any) -> int:
    analysis = compiled.memory_analysis()  # None where the platform has no such analysis
    return int(getattr(analysis, "temp_size_in_bytes", 0) or 0)


def _gigabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.3g} GB"
