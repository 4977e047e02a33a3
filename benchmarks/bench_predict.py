"""Prediction of a whole case, from file to file, beside nnU-Net's predictor on the same weights.

One and five folds, with and without mirroring. The weights are random, made as a bundle and
exported to nnU-Net's model folder. Each side has a process for each number of folds; the two take
turns. Models are loaded and programs compiled before (reported apart); a run reads the image,
preprocesses, predicts, resamples back and writes the label map. The memory peak is the process's,
on an accelerator the device's too. Our strategies for five folds are run beside each other.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness, networks

GOALS: Mapping[str, float] = {"cpu": 1.0, "gpu": 2.0, "toy": 1.0}
MIN_EQUAL = 0.999
STRATEGIES = ("loop", "scan", "vmap")
NUM_FOLDS = 5
PLACES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class Work:
    """A network, a raw image (z y x), and rounds by (folds, mirrored)."""

    size: networks.Size
    raw_shape: tuple[int, int, int]
    rounds: Mapping[tuple[int, bool], int]
    strategy_rounds: int
    raw_spacing: tuple[float, ...] = (3.0, 1.2, 1.2)
    spacing: tuple[float, ...] = (3.0, 1.5, 1.5)


CPU_SIZE = networks.Size("8-64", (8, 16, 32, 64), (1, 2, 2, 2), (32, 64, 64), 2)
WORKS: Mapping[str, Work] = {
    "cpu": Work(
        CPU_SIZE,
        (32, 108, 108),
        {(1, False): 5, (1, True): 2, (5, False): 3, (5, True): 1},
        1,
    ),
    "gpu": Work(
        networks.FULL,
        (96, 360, 360),
        {(1, False): 5, (1, True): 3, (5, False): 3, (5, True): 2},
        2,
        spacing=(1.0, 1.0, 1.0),
    ),
    "toy": Work(
        networks.TINY,
        (12, 30, 30),
        {(1, False): 1, (5, True): 1},
        1,
    ),
}
MAKE = """
import json, sys
from pathlib import Path
import numpy as np
from benchmarks import networks
from panther_jax import imageio, model
from panther_jax.checkpoint import save_bundle
from panther_jax.plans import Geometry
from weight_conversion.export_nnunet import export
folder, size, spacing, shape, raw_spacing, folds = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
size = networks.Size.from_json(size)
params = {}
for fold in range(folds):
    rng = np.random.default_rng(fold)
    tree = {}
    for path, leaf in model.walk(model.param_shapes(size.arch)):
        fan = max(1, int(np.prod(leaf.shape[:-1]))) if len(leaf.shape) > 1 else 4
        values = rng.standard_normal(leaf.shape, np.float32) / np.float32(fan**0.5)
        if "heads" in path and path[-1] == "kernel":  # else one class wins everywhere
            values -= values.mean(axis=-2, keepdims=True)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = values + np.float32(path[-1] == "scale")
    params[str(fold)] = tree
plans = networks.make_plans(size, spacing=tuple(spacing)).to_nnunet()
about = {"inference_allowed_mirroring_axes": [0, 1, 2]}
save_bundle(
    folder / "bundle", params=params, plans=plans, dataset=networks.DATASET, provenance=about
)
export(folder / "bundle", folder / "nnunet")
rng = np.random.default_rng(0)
axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
image = 100 * np.exp(-4 * sum(a**2 for a in axes)) + rng.normal(50, 15, shape)
identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
geometry = Geometry(tuple(shape), tuple(raw_spacing), (0.0, 0.0, 0.0), identity)
(folder / "in").mkdir()
imageio.write_image(folder / "in" / "case_0000.nii.gz", image.astype(np.float32), geometry)
"""


def serve_ours(folder: str, num_folds: int, cache: str) -> Callable[..., Any]:
    """Answer ``("predict", mirror, strategy)`` with seconds, ``("facts",)``."""
    import jax

    from benchmarks import ours
    from panther_jax.inference import loading
    from panther_jax.inference.folder import predict_folder

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    folds = tuple(map(str, range(num_folds)))
    source, out = Path(folder) / "in", Path(folder) / f"ours_{num_folds}"
    loaded: dict[Any, Any] = {}

    def handle(what: str, *arguments: Any) -> Any:
        if what == "facts":
            device = jax.devices()[0].device_kind
            return {"host": harness.peak_bytes(), "device": ours.device_peak(), "name": device}
        mirror, strategy = arguments
        if arguments not in loaded:
            loaded[arguments] = loading.load(
                Path(folder) / "bundle", folds=folds, mirror=mirror, strategy=strategy
            )
        start = time.perf_counter()
        report = predict_folder(loaded[arguments], source, Path(f"{out}_{mirror}"), overwrite=True)
        seconds = time.perf_counter() - start
        if report.failed:
            raise RuntimeError(f"prediction failed: {report.failed}")
        return seconds

    return handle


def serve_peer(folder: str, num_folds: int, device: str) -> Callable[..., Any]:
    """As :func:`serve_ours`, for ``nnUNetPredictor``."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    if device == "cpu":
        torch.set_num_threads(harness.cores())
    source, out = Path(folder) / "in", Path(folder) / f"peer_{num_folds}"
    loaded: dict[bool, Any] = {}

    def load(mirror: bool) -> Any:
        predictor = nnUNetPredictor(
            use_mirroring=mirror,
            device=torch.device(device),
            perform_everything_on_device=device == "cuda",
            allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(
            str(Path(folder) / "nnunet"),
            tuple(range(num_folds)),  # pyright: ignore[reportArgumentType]
        )
        return predictor

    def handle(what: str, *arguments: Any) -> Any:
        if what == "facts":
            used = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            return {"host": harness.peak_bytes(), "device": used}
        mirror = arguments[0]
        if mirror not in loaded:
            loaded[mirror] = load(mirror)
        Path(f"{out}_{mirror}").mkdir(exist_ok=True)
        start = time.perf_counter()
        loaded[mirror].predict_from_files_sequential(
            str(source), f"{out}_{mirror}", save_probabilities=False, overwrite=True
        )
        return time.perf_counter() - start

    return handle


def measure(work: Work, setting: str, folder: Path) -> dict[str, Any]:
    """All combinations, and the strategies."""
    comparisons, memory, first = [], {}, {}
    for folds in sorted({folds for folds, _ in work.rounds}):
        device = "cuda" if setting == "gpu" else "cpu"
        with ExitStack() as stack:
            asks = {
                "ours": stack.enter_context(
                    harness.serving(
                        "benchmarks.bench_predict:serve_ours", str(folder), folds,
                        str(folder / "cache"),
                    )
                ),
                "peer": stack.enter_context(
                    harness.serving(
                        "benchmarks.bench_predict:serve_peer", str(folder), folds, device,
                        variables=dict.fromkeys(PLACES, str(folder)),
                    )
                ),
            }  # fmt: skip
            for (wanted, mirror), rounds in work.rounds.items():
                if wanted == folds:
                    first[f"{folds} {mirror}"] = asks["ours"]("predict", mirror, "auto")
                    comparisons.append(_compare(asks, folds, mirror, rounds))
                    comparisons[-1]["equal"] = _equal(folder, folds, mirror)
            memory[folds] = {side: ask("facts") for side, ask in asks.items()}
    return {
        "comparisons": comparisons,
        "memory": memory,
        "first_call_seconds": first,
        "strategies": _strategies(work, folder),
    }


def _compare(
    asks: Mapping[str, Callable[..., float]], folds: int, mirror: bool, rounds: int
) -> dict[str, Any]:
    def once(ask: Callable[..., float]) -> harness.Measurement:
        return harness.Measurement(ask("predict", mirror, "auto"))

    # Ours is compiled by now; where a round takes long, the peer needs no warming up either.
    found = harness.interleaved(
        {side: partial(once, ask) for side, ask in asks.items()}, rounds, warm_up=rounds > 1
    )
    name = f"{folds} fold{'s' * (folds > 1)}, {'with' if mirror else 'no'} mirroring"
    return {
        "what": name,
        "ours": harness.summarize(name, found["ours"]),
        "peer": harness.summarize(f"{name}, nnU-Net", found["peer"]),
        "faster": harness.spread(harness.ratio(found["ours"], found["peer"])),
    }


def _equal(folder: Path, folds: int, mirror: bool) -> float:
    from panther_jax.images import imageio

    names = [folder / f"{side}_{folds}_{mirror}" / "case.nii.gz" for side in ("ours", "peer")]
    ours, peer = (imageio.read_label(name)[0] for name in names)
    return float((ours == peer).mean())


def _strategies(work: Work, folder: Path) -> dict[str, list[float]]:
    """Seconds of five folds without mirroring, by strategy; the first of each is not counted."""
    target = "benchmarks.bench_predict:serve_ours"
    with harness.serving(target, str(folder), NUM_FOLDS, str(folder / "cache")) as ask:

        def once(strategy: str) -> harness.Measurement:
            return harness.Measurement(ask("predict", False, strategy))

        candidates = {name: partial(once, name) for name in STRATEGIES}
        found = harness.interleaved(candidates, work.strategy_rounds)
    return {name: [m.seconds for m in runs] for name, runs in found.items()}


def run(output: Path, setting: harness.Setting = "cpu") -> str:
    """Measure, write ``predict.json``, return the lines to print."""
    harness.require("nnunetv2", "SimpleITK")
    work, goal = WORKS[setting], GOALS[setting]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = subprocess.run(
            [sys.executable, "-c", MAKE, temporary, *_make_arguments(work)],
            cwd=harness.ROOT, env=harness.environment(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"making the model failed:\n{made.stderr[-2000:]}")
        measured = measure(work, setting, folder)
    text = f"{work.size.label.replace(' batch 2', '')} tiles, image {work.raw_shape}, file to file"
    summaries, rows = [], []
    lines = [f"  {text}; {harness.cores()} cores of {harness.machine()['cpu']}"]
    for found in measured["comparisons"]:
        ours, peer, ratio = found.pop("ours"), found.pop("peer"), found["faster"]
        summaries += [ours, peer]
        rows.append(
            {
                "what": f"predict a case, {found['what']}",
                "ours": ours.median_seconds,
                "peer": peer.median_seconds,
                "ratio": ratio,
                "goal": goal,
                "met": ratio["median"] >= goal,
            }
        )
        lines.append(
            f"  {found['what']}: {ours.median_seconds:.2f} s, nnU-Net {peer.median_seconds:.2f} s: "
            f"{ratio['median']:.2f} times ({ratio['min']:.2f} to {ratio['max']:.2f}; goal {goal:g})"
            f"; {100 * found['equal']:.3f} % of voxels equal"
            f"{'' if found['equal'] >= MIN_EQUAL else ' (TOO FEW)'}"
        )
    lines += _facts_lines(measured)
    facts = {"setting": f"{setting}: {text}", **measured, "rows": rows}
    path = harness.write_result(output, "predict", summaries, facts)
    return "\n".join([*lines, f"  {path}"])


def _make_arguments(work: Work) -> list[str]:
    import json

    size = replace(work.size, batch=1).to_json()
    values = (size, work.spacing, work.raw_shape, work.raw_spacing, NUM_FOLDS)
    return [json.dumps(v) for v in values]


def _facts_lines(measured: Mapping[str, Any]) -> list[str]:
    lines = []
    for folds, sides in measured["memory"].items():
        host = {side: facts["host"] / 2**20 for side, facts in sides.items()}
        device = {side: facts["device"] / 2**20 for side, facts in sides.items()}
        more = f", device {device['ours']:.0f} and {device['peer']:.0f}" if device["ours"] else ""
        lines.append(
            f"  peak host memory, {folds} fold(s): {host['ours']:.0f} MiB, nnU-Net "
            f"{host['peer']:.0f} MiB{more}"
        )
    runs = measured["strategies"]
    best = ", ".join(f"{name} {min(times):.2f} s" for name, times in runs.items())
    return [*lines, f"  strategies, {NUM_FOLDS} folds, no mirroring: {best}"]
