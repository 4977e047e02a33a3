"""From logits to a label map on the raw grid, beside nnU-Net's own export function.

2 and 50 classes; each run is a process of its own. Logits are what each predictor hands over, the
same values: float32 on our side, float16 on nnU-Net's. Seconds are of the call alone, imports and
logits made before; the memory peak is the whole process's, logits and imports included.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

MIN_RATIO, MAX_MEMORY_RATIO = 1.0, 1 / 3
MIN_EQUAL = 0.999  # nnU-Net compares float16, in which noise has ties
CLASSES = {"cpu": ((2, 5), (50, 2)), "gpu": ((2, 5), (50, 2)), "toy": ((2, 1), (5, 1))}
"""Classes and rounds."""
SHAPES = {  # raw grid, its spacing, the network's spacing; z y x
    "cpu": ((64, 224, 288), (3.0, 1.2, 1.2), (3.0, 1.6, 1.6)),
    "gpu": ((64, 224, 288), (3.0, 1.2, 1.2), (3.0, 1.6, 1.6)),
    "toy": ((8, 24, 32), (3.0, 1.2, 1.2), (3.0, 1.6, 1.6)),
}
COMMON = """
import dataclasses, json, sys, time
import numpy as np
from benchmarks import harness, networks
from panther_jax.plans import Geometry, Labels, Properties
from panther_jax.resampling import target_shape
classes, grids, out = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
raw_shape, raw_spacing, spacing = map(tuple, grids)
size = dataclasses.replace(networks.TINY, num_outputs=classes)
plans = networks.make_plans(size, spacing=spacing)
labels = {"background": 0, **{f"label_{i}": i for i in range(1, classes)}}
dataset = {**networks.DATASET, "labels": labels}
identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
geometry = Geometry(raw_shape, raw_spacing, (0.0, 0.0, 0.0), identity)
properties = Properties(
    geometry=geometry,
    shape_before_crop=raw_shape,
    crop_box=tuple((0, n) for n in raw_shape),
    shape_before_resampling=raw_shape,
)
shape = target_shape(raw_shape, raw_spacing, spacing)
random = np.random.default_rng(0)
def head():
    coarse = random.standard_normal([-(-n // 8) for n in shape], np.float32)
    fine = coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2)[tuple(map(slice, shape))]
    return 3 * fine + random.standard_normal(shape, np.float32)
"""
OURS = """
from panther_jax import export
logits = np.empty((classes, *shape), np.float32)
for target in logits:
    target[...] = head().astype(np.float16)
made = Labels.from_dataset_json(dataset)
start = time.perf_counter()
found = export.logits_to_label(logits, properties, plans, made)
seconds = time.perf_counter() - start
"""
PEER = """
import os
for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[name] = "."
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape as convert,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from panther_jax.export import nnunet_properties
torch.set_num_threads(harness.cores())
logits = torch.empty((classes, *shape), dtype=torch.float16)
for target in logits:
    target[...] = torch.from_numpy(head())
manager = PlansManager(plans.to_nnunet())
settings = manager.get_configuration("3d_fullres")
names = manager.get_label_manager(dataset)
known = nnunet_properties(properties)
start = time.perf_counter()
found = convert(
    logits, manager, settings, names, known, num_threads_torch=harness.cores()
)
seconds = time.perf_counter() - start
"""
REPORT = """
peak = harness.peak_bytes()
np.save(out, np.asarray(found).astype(np.uint8))
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "shape": shape}))
"""


def _once(code: str, classes: int, setting: str, out: Path) -> harness.Measurement:
    arguments = str(classes), json.dumps(SHAPES[setting]), str(out)
    text = harness.run_python(
        "-c",
        COMMON + code + REPORT,
        *arguments,
        env=harness.environment(JAX_PLATFORMS="cpu"),
        timeout_seconds=1800,
    )
    found = json.loads(text.splitlines()[-1])
    return harness.Measurement(found["seconds"], found["peak_bytes"])


def measure(classes: int, rounds: int, setting: str) -> dict[str, Any]:
    """One number of classes: seconds, memory, and whether the label maps are equal."""
    with tempfile.TemporaryDirectory() as temporary:
        files = {side: Path(temporary) / f"{side}.npy" for side in ("ours", "peer")}
        found = harness.interleaved(
            {
                "ours": lambda: _once(OURS, classes, setting, files["ours"]),
                "peer": lambda: _once(PEER, classes, setting, files["peer"]),
            },
            rounds,
            warm_up=classes < 10,
        )
        equal = float((np.load(files["ours"]) == np.load(files["peer"])).mean())
    ours, peer = (harness.summarize(side, found[side]) for side in ("ours", "peer"))
    return {
        "classes": classes,
        "ours": ours,
        "peer": peer,
        "faster": harness.spread(harness.ratio(found["ours"], found["peer"])),
        "memory": ours.peak_bytes / max(peer.peak_bytes, 1),
        "equal": equal,
    }


def run(output: Path, setting: harness.Setting = "cpu") -> str:
    """Measure, write ``export.json``, return the lines to print."""
    harness.require("nnunetv2", "SimpleITK")
    measured = [measure(classes, rounds, setting) for classes, rounds in CLASSES[setting]]
    raw, raw_spacing, spacing = SHAPES[setting]
    text = f"raw grid {raw} at {raw_spacing} mm, network's at {spacing} mm, no files"
    rows, summaries, lines = [], [], [f"  {text}"]
    for found in measured:
        ours, peer, name = found["ours"], found["peer"], f"export of {found['classes']} classes"
        many = found["classes"] >= 10
        ratio = found["faster"]
        rows += [
            {
                "what": name,
                "ours": ours.median_seconds,
                "peer": peer.median_seconds,
                "ratio": ratio,
                "goal": MIN_RATIO,
                "met": ratio["median"] >= MIN_RATIO,
            },
            {
                "what": f"{name}: peak memory, GiB",
                "ours": ours.peak_bytes / 2**30,
                "peer": peer.peak_bytes / 2**30,
                "ratio": harness.spread((1 / found["memory"],) * 3),
                "goal": 3.0 if many else None,
                "met": found["memory"] <= MAX_MEMORY_RATIO if many else None,
            },
        ]
        lines.append(
            f"  {found['classes']} classes: {ours.median_seconds:.2f} s, nnU-Net "
            f"{peer.median_seconds:.2f} s: {ratio['median']:.2f} times ({ratio['min']:.2f} to "
            f"{ratio['max']:.2f}; goal {MIN_RATIO:g}); peak memory {ours.peak_bytes / 2**20:.0f} "
            f"MiB, nnU-Net {peer.peak_bytes / 2**20:.0f} MiB: {found['memory']:.2f}"
            f"{' (goal 0.33)' if many else ''}; {100 * found['equal']:.4f} % of voxels equal"
            f"{'' if found['equal'] >= MIN_EQUAL else ' (TOO FEW)'}"
        )
        for side in ("ours", "peer"):
            summaries.append(harness.Summary(**{**vars(found[side]), "name": f"{name}, {side}"}))
    facts = {
        "setting": text,
        "comparisons": [
            {k: v for k, v in m.items() if k not in ("ours", "peer")} for m in measured
        ],
        "rows": rows,
    }
    path = harness.write_result(output, "export", summaries, facts)
    return "\n".join([*lines, f"  {path}"])
