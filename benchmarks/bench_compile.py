"""Compilation of the training step and of the forward pass: cold, and from the persistent cache.

Each run is a new process: seconds are those of tracing, lowering and compiling, not of imports. The
warm run finds the cache that the cold one left. PyTorch's eager mode compiles nothing; on a GPU the
peer is the first call of its compiled step (``torch.compile``), where that is possible.
"""

import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness, networks

GOALS = {"cold": 120.0, "warm": 15.0}
SIZES = {
    "cpu": (networks.LARGE,),
    "gpu": (networks.FULL,),
    "toy": (networks.TINY,),
}
ROUNDS = {"cpu": 1, "gpu": 1, "toy": 1}
OURS = """
import json, sys, time
from benchmarks import networks, ours
from panther_jax import convolution
import jax
size = networks.Size.from_json(json.loads(sys.argv[1]))
task = ours.make_task(size)
jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(3)))
def compiled(function, *arguments):
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return {"lower": middle - start, "compile": time.perf_counter() - middle}
step, (state, batch, key) = ours.train_step(size, task)
shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, batch))
found = {"step": compiled(step, *shapes, key)}
found["forward"] = compiled(convolution.compiled(task.outputs), shapes[0].params, shapes[1].image)
print(json.dumps(found))
"""
PEER = """
import json, sys, time
from benchmarks import networks, peer
size = networks.Size.from_json(json.loads(sys.argv[1]))
works = peer.Works(size, peer.Variant("cuda", "float16", False, True), None)
start = time.perf_counter()
works.step()
first = time.perf_counter() - start
start = time.perf_counter()
works.step()
print(json.dumps({"step": {"compile": first - (time.perf_counter() - start)}}))
"""


def _once(code: str, size: networks.Size, cache: str) -> dict[str, Any]:
    env = harness.environment(
        JAX_COMPILATION_CACHE_DIR=cache,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        TORCHINDUCTOR_CACHE_DIR=os.path.join(cache, "inductor"),
    )
    found = harness.run_python(
        "-c", code, json.dumps(size.to_json()), env=env, timeout_seconds=1200
    )
    return json.loads(found.splitlines()[-1])


def measure(size: networks.Size, rounds: int, *, peer: bool) -> dict[str, Any]:
    """Seconds by work and state of the cache, one number a round."""
    runs: list[dict[str, dict[str, Any]]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            runs.append({state: _once(OURS, size, cache) for state in GOALS})
    found: dict[str, Any] = {
        work: {state: [sum(run[state][work].values()) for run in runs] for state in GOALS}
        for work in ("step", "forward")
    }
    found["lower"] = [run["cold"]["step"]["lower"] for run in runs]
    if peer:
        with tempfile.TemporaryDirectory() as cache:
            try:
                seconds = [_once(PEER, size, cache)["step"]["compile"] for _ in GOALS]
                found["peer"] = dict(zip(GOALS, seconds, strict=True))
            except RuntimeError as error:
                found["peer_failed"] = str(error).splitlines()[-1]
    return found


def run(output: Path, setting: harness.Setting = "cpu") -> str:
    """Measure, write ``compile.json``, return the lines to print."""
    harness.require("flax", "optax")
    sizes, rounds = SIZES[setting], ROUNDS[setting]
    measured = {s.label: measure(s, rounds, peer=setting == "gpu") for s in sizes}
    summaries, rows, lines = [], [], []
    for label, found in measured.items():
        for work in ("step", "forward"):
            for state, goal in GOALS.items():
                seconds = found[work][state]
                name = f"{label}: {work}, {state}"
                runs = [harness.Measurement(s) for s in seconds]
                summaries.append(harness.summarize(name, runs))
                if work == "step":
                    rows.append(_row(label, state, statistics.median(seconds), found, goal))
        lines.append(_line(label, found))
    facts = {
        "setting": f"{setting}: new processes; trace, lower and compile, without imports",
        "sizes": measured,
        "rows": rows,
        "networks": [dataclasses.asdict(size) for size in sizes],
    }
    path = harness.write_result(output, "compile", summaries, facts)
    return "\n".join([f"  {facts['setting']}", *lines, f"  {path}"])


def _row(
    label: str, state: str, seconds: float, found: dict[str, Any], goal: float
) -> dict[str, Any]:
    peer = found.get("peer", {}).get(state)
    ratio = None if peer is None else harness.spread((peer / seconds,) * 3)
    return {
        "what": f"compile of the train step, {label}, {state}",
        "ours": seconds,
        "peer": peer,
        "ratio": ratio,
        "goal": f"< {goal:g} s",
        "met": seconds < goal,
    }


def _line(label: str, found: dict[str, Any]) -> str:
    parts = [
        f"{work} {statistics.median(found[work]['cold']):.1f} s cold, "
        f"{statistics.median(found[work]['warm']):.1f} s warm"
        for work in ("step", "forward")
    ]
    peer = found.get("peer")
    more = f"; torch.compile {peer['cold']:.1f} s cold, {peer['warm']:.1f} s warm" if peer else ""
    goals = ", ".join(f"{state} {goal:g} s" for state, goal in GOALS.items())
    return f"  {label}: {'; '.join(parts)} (goals of the step: {goals}){more}"
