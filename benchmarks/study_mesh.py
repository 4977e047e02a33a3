"""What devices tell each other in a training step: ``python -m benchmarks.study_mesh``.

Compiles the step of ResEnc-L at 192 voxels for meshes of eight virtual CPU devices, without running
it, and adds up the bytes of its collectives, beside the least that the mesh needs: every gradient
once (data), two slices of halo a convolution and direction (space). From these and an assumed step
time it models scaling; a model is no measurement, and its assumptions are in the result.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from panther_jax.base import command
from panther_jax.base.console import table

MESHES = ((1, 1), (2, 1), (8, 1), (1, 2), (2, 2), (2, 4))
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s16": 2, "pred": 1, "f64": 8}
KINDS = ("collective-permute", "all-reduce", "all-gather", "all-to-all", "reduce-scatter")
ASSUMED = {
    # spec 08 §8.3: what a plain port may hope for on one H200; links as their makers state them
    "step_ms_batch_2": 110.0,
    "inside_node_gb_per_s": 300.0,
    "between_nodes_gb_per_s": 40.0,
    "devices_a_node": 8,
    "gradient_overlap": 0.5,
}
COMPILE = """
import json, sys
from benchmarks import study_mesh
print(json.dumps(study_mesh.compiled(*json.loads(sys.argv[1]))))
"""


def compiled(data: int, space: int, patch: int) -> dict[str, Any]:
    """Compile the step for a mesh in this process; returns the bytes of its collectives."""
    import jax
    import jax.numpy as jnp

    from panther_jax.config.loading import load_config
    from panther_jax.config.schema import DevicesConfig
    from panther_jax.devices.mesh import make_mesh, split_patches
    from panther_jax.network import unet
    from panther_jax.panther.configurations import multitalent_arch
    from panther_jax.plans.labels import Labels
    from panther_jax.training import losses, optim, resident
    from panther_jax.training.step import Task, make_train_step
    from panther_jax.weights.checkpoint import TrainState

    arch = multitalent_arch(1, 3)
    size = (patch,) * 3
    batch_size = max(2, data)
    wanted = DevicesConfig(data, space)
    mesh = make_mesh(wanted, batch_size=batch_size, patch_size=size, arch=arch)
    config, _ = load_config("mri_t2")
    labels = Labels.from_dataset_json({"labels": {"background": 0, "tumor": 1, "pancreas": 2}})
    loss = losses.make_loss(config.loss, labels, batch_dice=False)
    weights = losses.deep_supervision_weights(arch.num_stages - 1)
    task = Task(
        net=unet.build(arch, unet.Execution(backend="xla")),
        labels=labels,
        loss_fn=losses.deep_supervised(loss, weights),
        split=split_patches(mesh),
        augment=lambda _key, image, label: (image, label),
        optimizer=optim.make_optimizer(config.optim, lambda _: config.optim.lr),
        clip_norm=12.0,
        deep_supervision=True,
    )
    everywhere, in_batch = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))

    def abstract(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    params = abstract(unet.param_shapes(arch), everywhere)
    optimiser = abstract(jax.eval_shape(task.optimizer.init, params), everywhere)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), params, optimiser)
    shape = (batch_size, *size, 1)
    batch = resident.Batch(
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=in_batch),
        jax.ShapeDtypeStruct(shape, jnp.int16, sharding=in_batch),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    start = time.perf_counter()
    program = jax.jit(make_train_step(task)).lower(state, batch, key).compile()
    found = collectives(program.as_text())
    return {
        "mesh": [data, space],
        "batch_size": batch_size,
        "compile_seconds": time.perf_counter() - start,
        "collectives": found,
        "ideal_bytes": ideal(arch, size, data=data, space=space, samples=batch_size // data),
        "parameters": unet.count_params(arch),
    }


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Number and bytes a device of each kind of collective in a compiled program's text."""
    found = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for line in program.splitlines():
        for kind in KINDS:
            match = re.search(rf"= (.*?) {kind}(?:-start)?\(", line)
            if match:
                found[kind]["count"] += 1
                found[kind]["bytes"] += _bytes(match.group(1))
    return found


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        if dtype in BYTES:
            total += BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
    return total


def ideal(
    arch: Any, size: tuple[int, ...], *, data: int, space: int, samples: int
) -> dict[str, int]:
    """Least bytes a device: gradients reduced once; halos of 3-voxel kernels, both directions."""
    from panther_jax.network.unet import count_params

    gradients = 4 * count_params(arch) if data * space > 1 else 0
    halos = 0
    if space > 1:
        planes = [
            math.prod(
                n // math.prod(s[a] for s in arch.strides[: i + 1]) for a, n in enumerate(size) if a
            )
            for i in range(arch.num_stages)
        ]
        for i, plane in enumerate(planes):
            here, before = arch.features[i], arch.features[max(i - 1, 0)]
            convs = [(before, here)] + [(here, here)] * (2 * arch.blocks[i] - 1)
            if i < arch.num_stages - 1:
                convs += [(2 * here, here)] + [(here, here)] * (arch.decoder_convs[-1 - i] - 1)
            for cin, cout in convs:
                halos += 4 * samples * plane * 2 * (cin + cout)  # input forward, gradient backward
    return {"all-reduce": gradients, "collective-permute": halos}


def modelled(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Efficiency of 8 to 512 devices with two samples each, gradients between nodes."""
    parameters = results[0]["parameters"]
    rows = []
    for count in (8, 16, 64, 512):
        nodes = count // ASSUMED["devices_a_node"]
        link = ASSUMED["inside_node_gb_per_s"] if nodes <= 1 else ASSUMED["between_nodes_gb_per_s"]
        # a ring sends and receives every gradient about twice
        reduce_ms = 2 * 4 * parameters * (count - 1) / count / (link * 1e9) * 1e3
        hidden = (
            ASSUMED["gradient_overlap"] * ASSUMED["step_ms_batch_2"] * 0.66
        )  # the backward part
        step = ASSUMED["step_ms_batch_2"] + max(0.0, reduce_ms - hidden)
        rows.append(
            {
                "devices": count,
                "batch_size": 2 * count,
                "gradient_exchange_ms": reduce_ms,
                "efficiency": ASSUMED["step_ms_batch_2"] / step,
            }
        )
    return rows


def compile_all(patch: int) -> list[dict[str, Any]]:
    """Compile every mesh in a process of its own with eight virtual devices."""
    results = []
    for shape in MESHES:
        env = {
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        }
        text = harness.run_python("-c", COMPILE, json.dumps([*shape, patch]), env=env)
        results.append(json.loads(text.splitlines()[-1]))
        print(f"mesh {shape}: compiled", file=sys.stderr, flush=True)
    return results


def text_of(results: Sequence[dict[str, Any]], model: Sequence[dict[str, Any]]) -> str:
    """Both tables."""
    rows = []
    for found in results:
        data, space = found["mesh"]
        got, least = found["collectives"], found["ideal_bytes"]
        cells = [f"{data}x{space}", str(found["batch_size"])]
        for kind in ("all-reduce", "collective-permute"):
            cells.append(f"{got[kind]['bytes'] / 1e6:.0f} / {least[kind] / 1e6:.0f}")
        cells.append(str(sum(got[k]["count"] for k in ("all-gather", "all-to-all"))))
        rows.append([*cells, f"{found['compile_seconds']:.0f}"])
    header = [
        "mesh",
        "batch",
        "all-reduce MB / least",
        "permute MB / least",
        "gathers",
        "compile s",
    ]
    modelled_rows = [
        [str(m["devices"]), f"{m['gradient_exchange_ms']:.1f}", f"{100 * m['efficiency']:.0f} %"]
        for m in model
    ]
    return "\n\n".join(
        [
            table(header, rows),
            table(["devices (model)", "gradient exchange ms", "efficiency"], modelled_rows),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(
        "benchmarks.study_mesh",
        "Bytes between devices in a training step, from the compiled program.",
        "python -m benchmarks.study_mesh",
    )
    parser.add_argument("--output", type=Path, default=harness.ROOT / "benchmarks" / "results")
    parser.add_argument("--patch", type=int, default=192, help="voxels an axis (%(default)s)")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        results = compile_all(arguments.patch)
        model = modelled(results)
        facts = {
            "setting": f"ResEnc-L, {arguments.patch} voxels an axis, float32, bytes a device",
            "meshes": results,
            "model": {"assumed, not measured": ASSUMED, "rows": model},
        }
        harness.write_result(arguments.output, "mesh", [], facts)
        return text_of(results, model)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
