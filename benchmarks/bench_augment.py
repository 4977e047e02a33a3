"""Augmentation: CPU time a sample on one core, beside nnU-Net's own pipeline run as it is.

Both keep one process alive, on the same core, and take turns; what is measured is the process's CPU
time for a block of samples, deep-supervision targets included, so other load on the machine does
not count. With a GPU, also the time of a batch of two 192^3 patches, alone and inside the step.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness

ROUNDS = 5
SETTINGS = (("default", 64, 24), ("default", 96, 12), ("da5", 64, 16), ("da5", 96, 8))
"""Policy, patch edge, samples a block."""
OUTPUT_STRIDES = tuple((2**level,) * 3 for level in range(5))
GOAL = 2.0
GPU_EDGE, GPU_BATCH, GPU_GOALS = 192, 2, {"default": 0.05, "da5": 0.15}


def make_sample(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Noise and smooth blobs of three labels."""
    import numpy as np
    from scipy import ndimage

    rng = np.random.default_rng(0)
    image = rng.standard_normal(shape).astype(np.float32)
    field = ndimage.gaussian_filter(rng.standard_normal(shape).astype(np.float32), 6)
    return image, np.digitize(field, np.quantile(field, (0.8, 0.95))).astype(np.int16)


def serve_ours(policy: str, edge: int) -> None:
    """Answer requests for blocks of samples on standard input with CPU seconds."""
    _pin()
    import jax
    import jax.numpy as jnp

    from panther_jax.augment import policies
    from panther_jax.training import targets

    initial = policies.patch_geometry(policy, (edge,) * 3).initial_patch_size
    image, label = (jnp.asarray(x)[None, ..., None] for x in make_sample(initial))
    augment = policies.make_batch_augment(policy, patch_size=(edge,) * 3, label_ids=(0, 1, 2))

    @jax.jit
    def one(key):
        images, labels = augment(key, image, label)
        return images, targets.deep_supervision_targets(labels, OUTPUT_STRIDES)

    keys = iter(range(10**9))
    _serve(lambda: jax.block_until_ready(one(jax.random.key(next(keys)))), initial)


def serve_peer(policy: str, edge: int) -> None:
    """As `serve_ours`, for the pipeline that nnU-Net's trainer builds."""
    _pin()
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import (
        nnUNetTrainerDA5,
    )

    from panther_jax.augment import policies

    torch.set_num_threads(1)
    trainer = {"default": nnUNetTrainer, "da5": nnUNetTrainerDA5}[policy]
    geometry = policies.patch_geometry(policy, (edge,) * 3)
    transforms = trainer.get_training_transforms(
        np.array(geometry.patch_size),
        geometry.rotation_range_rad,
        [[1 / factor for factor in strides] for strides in OUTPUT_STRIDES],
        geometry.mirror_axes,
        geometry.dummy_2d,
        use_mask_for_norm=[False],
    )
    image, label = (torch.from_numpy(x)[None] for x in make_sample(geometry.initial_patch_size))

    def one():
        with torch.no_grad():
            transforms(image=image.clone(), segmentation=label.clone())

    _serve(one, geometry.initial_patch_size)


def _pin() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _serve(one: Callable[[], Any], initial: tuple[int, ...]) -> None:
    one()
    sys.stdout.write(json.dumps(initial) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            one()
        sys.stdout.write(f"{time.process_time() - start}\n")
        sys.stdout.flush()


@contextmanager
def serving(function: str, policy: str, edge: int) -> Iterator[Callable[[int], float]]:
    """Start a server; gives the function from a number of samples to its CPU seconds."""
    code = f"from benchmarks import bench_augment as b; b.{function}({policy!r}, {edge})"
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=harness.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    requests, answers = server.stdin, server.stdout

    def ask(count: int) -> float:
        requests.write(f"{count}\n")
        requests.flush()
        return float(_answer(answers, function))

    try:
        _answer(answers, function)
        yield ask
    finally:
        requests.close()
        server.wait(60)


def _answer(answers: Any, function: str) -> str:
    line = answers.readline()
    if not line:
        raise RuntimeError(f"{function} stopped without an answer; its error is above")
    return line


def measure_cpu(policy: str, edge: int, count: int) -> tuple[list[harness.Summary], dict]:
    """Compare one setting; seconds are of one sample."""
    with serving("serve_ours", policy, edge) as ours, serving("serve_peer", policy, edge) as peer:

        def block(ask: Callable[[int], float]) -> harness.Measurement:
            return harness.Measurement(ask(count) / count)

        names = f"{policy} {edge}^3", f"{policy} {edge}^3, nnU-Net"
        candidates = {
            name: partial(block, ask) for name, ask in zip(names, (ours, peer), strict=True)
        }
        found = harness.interleaved(candidates, ROUNDS)
    summaries = [harness.summarize(name, found[name]) for name in names]
    # Few samples cost most of the time: rates are of all samples together, not of a median block.
    per_second = [len(found[name]) / sum(m.seconds for m in found[name]) for name in names]
    faster = harness.ratio(*(found[name] for name in names))
    return summaries, {
        "policy": policy,
        "edge": edge,
        "samples": count * ROUNDS,
        "samples_per_second_per_core": per_second[0],
        "peer_samples_per_second_per_core": per_second[1],
        "faster": per_second[0] / per_second[1],
        "faster_by_round": dict(zip(("median", "min", "max"), faster, strict=True)),
        "goal": GOAL,
        "met": per_second[0] / per_second[1] >= GOAL,
    }


def device_times(
    edge: int = GPU_EDGE, *, calls: tuple[int, int] = (60, 20), needs_gpu: bool = True
) -> dict[str, Any] | None:
    """Seconds of a batch on the accelerator, alone and within the step; None without one."""
    import jax

    if needs_gpu and jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0].device_kind
    steps = {name: _step_seconds(name, edge, calls[1]) for name in ("none", *GPU_GOALS)}
    times = {"device": device, "edge": edge, "batch": GPU_BATCH, "step_seconds_none": steps["none"]}
    for name, goal in GPU_GOALS.items():
        share = steps[name] / steps["none"] - 1
        times[name] = {
            "alone_seconds": _alone_seconds(name, edge, calls[0]),
            "step_seconds": steps[name],
            "share_of_step": share,
            "goal": goal,
            "met": share < goal,
        }
    return times


def _batch(policy: str, edge: int) -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from panther_jax.augment import policies

    size = policies.patch_geometry(policy, (edge,) * 3).initial_patch_size
    arrays = [np.repeat(x[None, ..., None], GPU_BATCH, 0) for x in make_sample(size)]
    augment = policies.make_batch_augment(policy, patch_size=(edge,) * 3, label_ids=(0, 1, 2))
    return augment, *(jax.device_put(jnp.asarray(x)) for x in arrays)


def _alone_seconds(policy: str, edge: int, calls: int) -> float:
    import jax

    augment, image, label = _batch(policy, edge)
    compiled = jax.jit(augment)
    jax.block_until_ready(compiled(jax.random.key(0), image, label))
    keys = [jax.random.key(number) for number in range(1, calls + 1)]
    start = time.perf_counter()
    for key in keys:
        result = compiled(key, image, label)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def _step_seconds(policy: str, edge: int, calls: int) -> float:
    import jax

    from benchmarks import networks, ours
    from panther_jax.devices import compiler
    from panther_jax.training import resident, step

    size = networks.Size("ResEnc-L", *networks.RESENC_L, (edge,) * 3, GPU_BATCH)
    task = ours.make_task(size, policy=policy)
    _, image, label = _batch(policy, edge)
    state, batch, key = ours.make_state(size, task), resident.Batch(image, label), jax.random.key(1)
    train_step = compiler.compiled(step.make_train_step(task), donate_argnums=0)
    state, _ = train_step(state, batch, key)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(calls):
        state, _ = train_step(state, batch, key)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / calls


def _on_device() -> dict[str, Any] | None:
    code = "import json; from benchmarks import bench_augment as b; "
    code += "print(json.dumps(b.device_times()))"
    return json.loads(harness.run_python("-c", code, env=harness.environment()).splitlines()[-1])


def run(output: Path, setting: harness.Setting = "cpu") -> str:
    """Measure, write ``augment.json``, return the lines to print.

    In the GPU setting the CPU part needs nnU-Net and is left out without it.
    """
    if setting == "toy":
        raise harness.Skipped("has no toy setting")
    settings = SETTINGS
    if setting == "gpu" and importlib.util.find_spec("nnunetv2") is None:
        settings = ()
    measured = [measure_cpu(*setting) for setting in settings]
    on_device = _on_device()
    facts = {
        "setting": "1 channel, 3 labels, 5 resolutions of targets, one core, CPU time",
        "comparisons": [fact for _, fact in measured],
        "accelerator": on_device,
    }
    summaries = [summary for pair, _ in measured for summary in pair]
    path = harness.write_result(output, "augment", summaries, facts)
    lines = [f"  {facts['setting']}; {harness.machine()['cpu']}"]
    for _, fact in measured:
        spread = fact["faster_by_round"]
        lines.append(
            f"  {fact['policy']} {fact['edge']}^3: {fact['samples_per_second_per_core']:.1f} "
            f"samples/s, nnU-Net {fact['peer_samples_per_second_per_core']:.1f}: "
            f"{fact['faster']:.2f} times (by round {spread['min']:.2f} to {spread['max']:.2f}; "
            f"goal {GOAL})"
        )
    lines += _device_lines(on_device)
    return "\n".join([*lines, f"  {path}"])


def _device_lines(times: dict[str, Any] | None) -> list[str]:
    if times is None:
        return ["  no GPU: times at 192^3 not measured"]
    return [
        f"  {times['device']}, {times['edge']}^3 batch {times['batch']}, {name}: alone "
        f"{1e3 * times[name]['alone_seconds']:.1f} ms, {100 * times[name]['share_of_step']:.1f} % "
        f"of the step of {1e3 * times['step_seconds_none']:.0f} ms (goal {100 * goal:.0f} %)"
        for name, goal in GPU_GOALS.items()
    ]
