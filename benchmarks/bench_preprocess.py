"""Preprocessing of full-size phantoms to 1 mm: seconds a case and peak memory, beside nnU-Net.

Both read image and label map, crop, normalise, resample, sample class locations and write the case
in their own format, with one worker. Seconds are those of the case alone: imports, plans and the
file system's cache are warm; the memory peak is the whole process's. nnU-Net's preprocessor is
called as its command does.
"""

import json
import tempfile
from pathlib import Path

from benchmarks import harness

ROUNDS = {"t1 torch": 2, "t1 spline": 1, "ct torch": 2, "ct spline": 1}
MIN_RATIO = 3.0
MODALITIES = ("t1", "ct")
RESAMPLINGS = ("torch", "spline")
MAKE = """
import sys
from pathlib import Path
from panther_jax import datasets, imageio, planning
for modality in sys.argv[2:]:
    folder = Path(sys.argv[1]) / f"Dataset001_{modality}"
    datasets.make_phantom(folder, modality=modality, num_cases=1, size="full")
    raw = imageio.open_raw(folder)
    fingerprint = planning.extract_fingerprint(raw, budget=100_000)
    for resampling in ("torch", "spline"):
        options = planning.PlanOptions(
            panther=True, plans_name=resampling, panther_resampling=resampling
        )
        plans = planning.plan_dataset(raw, fingerprint, options)
        planning.write_plans(Path(sys.argv[1]) / modality / resampling, plans, folder)
    print(imageio.read_image(raw.cases[0].images)[1].shape_zyx, flush=True)
"""
OURS = """
import json, time, sys
from pathlib import Path
from panther_jax import imageio, plans, preprocess, store
raw_folder, plans_folder, out = map(Path, sys.argv[1:])
raw = imageio.open_raw(raw_folder)
made = json.loads((plans_folder / "plans.json").read_text())
settings = plans.Plans.from_nnunet(made, raw.dataset, "3d_fullres_iso1x1x1")
import SimpleITK, scipy.ndimage
start = time.perf_counter()
case = imageio.read_case(raw.cases[0], raw.labels)
stored = preprocess.preprocess_case(case, settings, raw.labels)
store.write_stored(out, stored)
seconds = time.perf_counter() - start
shape = stored.image.shape
"""
PEER = """
import json, os, time, sys
from pathlib import Path
for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[name] = sys.argv[3]
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
raw_folder, plans_folder, out = map(Path, sys.argv[1:])
plans = PlansManager(str(plans_folder / "plans.json"))
settings = plans.get_configuration("3d_fullres_iso1x1x1")
dataset = json.loads((raw_folder / "dataset.json").read_text())
image = next((raw_folder / "imagesTr").iterdir())
label = next((raw_folder / "labelsTr").iterdir())
work = DefaultPreprocessor(verbose=False)
start = time.perf_counter()
work.run_case_save(str(out / "case"), [str(image)], str(label), plans, settings, dataset)
seconds = time.perf_counter() - start
shape = None
"""
REPORT = """
from benchmarks import harness
print(json.dumps({"seconds": seconds, "peak_bytes": harness.peak_bytes(), "shape": shape}))
"""


def _python(code: str, *arguments: str) -> str:
    return harness.run_python("-c", code, *arguments, timeout_seconds=1800)


def _case(code: str, raw: Path, plans: Path) -> harness.Measurement:
    with tempfile.TemporaryDirectory() as out:
        found = json.loads(
            _python(code + REPORT, str(raw), str(plans), out).splitlines()[-1],
        )
    return harness.Measurement(found["seconds"], found["peak_bytes"])


def _compare(folder: Path, modality: str, resampling: str) -> tuple[list[harness.Summary], dict]:
    raw, plans = folder / f"Dataset001_{modality}", folder / modality / resampling
    found = harness.interleaved(
        {
            f"{modality} {resampling}": lambda: _case(OURS, raw, plans),
            f"{modality} {resampling}, nnU-Net": lambda: _case(PEER, raw, plans),
        },
        ROUNDS[f"{modality} {resampling}"],
        warm_up=False,  # every run is a process of its own that warms up by itself
    )
    ours, peer = found.values()
    summaries = [harness.summarize(name, values) for name, values in found.items()]
    faster = harness.ratio(ours, peer)
    memory = summaries[0].peak_bytes / max(summaries[1].peak_bytes, 1)
    return summaries, {
        "peer_seconds_over_ours": dict(zip(("median", "min", "max"), faster, strict=True)),
        "our_peak_memory_over_peer": memory,
        "met": faster[0] >= MIN_RATIO and memory <= 1,
    }


def run(output: Path) -> str:
    """Measure, write ``preprocess.json``, return the lines to print."""
    summaries, facts = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shapes = _python(MAKE, temporary, *MODALITIES).splitlines()
        lines = [
            f"  {m}: {s} voxels (z y x), to 1 mm" for m, s in zip(MODALITIES, shapes, strict=True)
        ]
        for modality in MODALITIES:
            for resampling in RESAMPLINGS:
                pair, fact = _compare(folder, modality, resampling)
                summaries += pair
                facts[f"{modality} {resampling}"] = fact
                ratio = fact["peer_seconds_over_ours"]
                lines += [
                    *(f"  {summary.line()}" for summary in pair),
                    f"    {ratio['median']:.2f} times as fast ({ratio['min']:.2f} to "
                    f"{ratio['max']:.2f}; bar {MIN_RATIO:g}), memory "
                    f"{fact['our_peak_memory_over_peer']:.2f} of the peer's (bar 1)",
                ]
    setting = "PANTHER's 3d_fullres_iso1x1x1, one case, one worker, file to preprocessed file"
    path = harness.write_result(
        output,
        "preprocess",
        summaries,
        {
            "setting": setting,
            "shapes_zyx": dict(zip(MODALITIES, shapes, strict=True)),
            **{"cases": facts},
        },
    )
    return "\n".join([f"  {setting}", *lines, f"  {path}"])
