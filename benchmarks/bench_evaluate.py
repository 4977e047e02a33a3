"""Evaluation of full-size cases: seconds beside the organisers' method, and whether results agree.

Both score the same label maps, read from files, one after the other in one process on one core, by
the organisers' rules (their order of spacings, their penalty for an empty prediction). The peer
does what their script does with the surface-distance library (spec 06 §4). Imports do not count;
we also make nnU-Net's counts meanwhile. Of ten cases six are found, three are found with a false
island elsewhere in the body, and one is missed.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness

NUM_CASES = 50
SHAPE, SPACING = (72, 258, 318), (3.0, 1.1875, 1.1875)  # the median T1 case of PANTHER, z y x
ROUNDS = 3
MIN_RATIO = 3.0
TOLERANCE = 1e-9  # relative, as of the reference cases
KINDS = ("found", "found and a false island", "missed")
MAKE = """
import json, sys
from pathlib import Path
import numpy as np
from scipy import ndimage
from panther_jax import imageio
from panther_jax.plans import Geometry
folder, count, shape, spacing = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
geometry = Geometry(tuple(shape), tuple(spacing), (0.0, 0.0, 0.0), identity)
axes = [np.arange(n, dtype=np.float32) * s for n, s in zip(shape, spacing)]
def blob(random, center, radius):
    z, y, x = (a - c for a, c in zip(axes, center))
    squared = (z * z)[:, None, None] + (y * y)[:, None] + x * x
    rough = random.normal(0, 1, [n // 4 + 2 for n in shape]).astype(np.float32)
    rough = ndimage.zoom(ndimage.gaussian_filter(rough, 1), 4, order=1)
    return squared < (radius * (1 + 0.5 * rough[tuple(slice(n) for n in shape)])) ** 2
for number in range(count):
    random = np.random.default_rng(number)
    extent = np.multiply(shape, spacing)
    center = extent * random.uniform(0.4, 0.6, 3)
    radius = random.uniform(8, 22)
    reference = blob(random, center, radius)
    prediction = np.zeros_like(reference)
    if number % 10 < 9:
        prediction = blob(random, center + random.normal(0, 3, 3), radius)
    if 6 <= number % 10 < 9:
        prediction |= blob(random, extent * random.uniform(0.1, 0.3, 3), 6.0)
    for name, mask in (("references", reference), ("predictions", prediction)):
        path = folder / name / f"case_{number:02d}.mha"
        imageio.write_label(path, mask.astype(np.int16), geometry)
"""
OURS = """
import json, sys, time
from pathlib import Path
from panther_jax import scoring
import SimpleITK
folder, found, seconds = Path(sys.argv[1]), {}, {}
settings = scoring.Scoring(preset="organisers")
files = [
    scoring.CaseFiles(p.name.removesuffix(".mha"), p, folder / "references" / p.name)
    for p in sorted((folder / "predictions").iterdir())
]
scoring.score_case(files[0], settings)
for case in files:
    start = time.perf_counter()
    found[case.id] = scoring.score_case(case, settings).panther
    seconds[case.id] = time.perf_counter() - start
"""
PEER = """
import json, sys, time, warnings
from pathlib import Path
import numpy as np
warnings.simplefilter("ignore")
import SimpleITK as sitk
import surface_distance as library
folder, found, seconds = Path(sys.argv[1]), {}, {}
def score(prediction_path, reference_path):
    prediction_image = sitk.ReadImage(str(prediction_path))
    reference_image = sitk.ReadImage(str(reference_path))
    prediction = sitk.GetArrayFromImage(prediction_image)
    reference = sitk.GetArrayFromImage(reference_image).astype(np.uint8)
    spacing = reference_image.GetSpacing()
    assert prediction.shape == reference.shape
    assert np.allclose(prediction_image.GetSpacing(), spacing, rtol=0, atol=1e-4)
    reference_mask = reference != 0
    voxel = float(np.prod(spacing))
    values = np.unique(prediction)
    if len(values) == 1:
        largest = float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
        return {
            "volumetric_dice": 0.0, "surface_dice": 0.0, "hausdorff95": largest, "masd": largest,
            "gt_volume": float(reference_mask.sum() * voxel), "pred_volume": 0.0,
            "time_score": 0.0,
        }
    prediction_mask = prediction > 0
    surfaces = library.compute_surface_distances(reference_mask, prediction_mask, spacing)
    return {
        "volumetric_dice": float(library.compute_dice_coefficient(reference_mask, prediction_mask)),
        "surface_dice": float(library.compute_surface_dice_at_tolerance(surfaces, 5)),
        "hausdorff95": float(library.compute_robust_hausdorff(surfaces, 95)),
        "masd": float(np.mean(library.compute_average_surface_distance(surfaces))),
        "gt_volume": float(reference_mask.sum() * voxel),
        "pred_volume": float(prediction_mask.sum() * voxel),
    }
files = sorted((folder / "predictions").iterdir())
score(files[0], folder / "references" / files[0].name)
for path in files:
    start = time.perf_counter()
    found[path.name.removesuffix(".mha")] = score(path, folder / "references" / path.name)
    seconds[path.name.removesuffix(".mha")] = time.perf_counter() - start
"""
REPORT = """
from benchmarks import harness
print(json.dumps({"seconds": seconds, "peak_bytes": harness.peak_bytes(), "found": found}))
"""


def _python(code: str, *arguments: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return harness.run_python("-c", code, *arguments, env=env, timeout_seconds=3600)


def difference(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """Largest relative difference of any metric of any case.

    Raises:
        RuntimeError: if they scored other cases, or other metrics.
    """
    if {c: set(v) for c, v in ours.items()} != {c: set(v) for c, v in peer.items()}:
        raise RuntimeError("the two scored other cases or metrics")
    pairs = [(ours[case][m], peer[case][m]) for case in ours for m in ours[case]]
    return max(abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0 for a, b in pairs)


def _kind(case: str) -> str:
    number = int(case.removeprefix("case_")) % 10
    return KINDS[0 if number < 6 else 1 if number < 9 else 2]


def run(output: Path, *, num_cases: int = NUM_CASES, shape: tuple[int, ...] = SHAPE) -> str:
    """Measure, write ``evaluate.json``, return the lines to print."""
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}

    def once(name: str, code: str, folder: str) -> harness.Measurement:
        result = json.loads(_python(code + REPORT, folder).splitlines()[-1])
        results[name].append(result)
        return harness.Measurement(sum(result["seconds"].values()), result["peak_bytes"])

    with tempfile.TemporaryDirectory() as folder:
        _python(MAKE, folder, *map(json.dumps, (num_cases, shape, SPACING)))
        found = harness.interleaved(
            {
                "panther_jax": lambda: once("ours", OURS, folder),
                "organisers' method": lambda: once("peer", PEER, folder),
            },
            ROUNDS,
            warm_up=False,  # both score a case before they count
        )
    apart = difference(results["ours"][-1]["found"], results["peer"][-1]["found"])
    if not apart <= TOLERANCE:
        raise RuntimeError(f"results differ by {apart:.3g} relative, more than {TOLERANCE:g}")
    faster = harness.ratio(*found.values())
    kinds = {kind: _kind_ratio(results, kind) for kind in KINDS}
    summaries = [harness.summarize(name, values) for name, values in found.items()]
    setting = f"{num_cases} cases of {shape} voxels, one process, one core, from files to metrics"
    facts = {
        "setting": setting,
        "peer_seconds_over_ours": dict(zip(("median", "min", "max"), faster, strict=True)),
        "peer_seconds_over_ours_by_kind": kinds,
        "largest_relative_difference": apart,
        "met": faster[0] >= MIN_RATIO,
    }
    path = harness.write_result(output, "evaluate", summaries, facts)
    by_kind = ", ".join(f"{kind} {r:.1f}" for kind, r in kinds.items() if not math.isnan(r))
    return "\n".join(
        [
            f"  {setting}",
            *(f"  {summary.line()}" for summary in summaries),
            f"    {faster[0]:.2f} times as fast ({faster[1]:.2f} to {faster[2]:.2f}; bar "
            f"{MIN_RATIO:g}); by kind: {by_kind}; results differ by {apart:.1e} at most",
            f"  {path}",
        ]
    )


def _kind_ratio(results: dict[str, list[dict[str, Any]]], kind: str) -> float:
    """Seconds of the peer over ours for the cases of a kind, least of all rounds each."""
    sums = {
        name: min(sum(t for case, t in r["seconds"].items() if _kind(case) == kind) for r in runs)
        for name, runs in results.items()
    }
    return sums["peer"] / sums["ours"] if sums["ours"] else math.nan
