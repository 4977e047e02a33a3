"""Does memory stay flat? ``python -m benchmarks.soak [--cases 200] [--steps 2000]``.

Predicts many small cases, each of another size, in one process, and trains many tiny steps in
another. Growth is what memory, open files and threads gain between the second fifth of the time and
the last: the first fifth compiles and fills caches.
"""

import argparse
import dataclasses
import json
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

CASES, STEPS, EPOCHS = 200, 2000, 20
PERIOD_SECONDS = 0.25
PARTS = 5
RESULT = Path(__file__).parent / "results" / "soak.json"


@dataclass(frozen=True)
class Sample:
    """What a process holds at a time: resident bytes, open files, threads."""

    seconds: float
    bytes: int
    files: int
    threads: int


def sample() -> Sample:
    """What this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = pages * os.sysconf("SC_PAGE_SIZE")
    folders = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return Sample(time.monotonic(), held, *folders)


class Sampler:
    """Samples in the background, from entering to leaving."""

    def __init__(self, period_seconds: float = PERIOD_SECONDS):
        self.samples: list[Sample] = []
        self._end = threading.Event()
        self._period = period_seconds
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(self._period):
            self.samples.append(sample())

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """Gain between the second fifth and the last: medians, so that a single peak does not count."""
    size = len(samples) // PARTS
    if not size:
        raise ValueError(f"{len(samples)} samples are too few; soak for longer")
    early, late = samples[size : 2 * size], samples[-size:]
    found: dict[str, Any] = {}
    for name in ("bytes", "files", "threads"):
        a, b = (statistics.median(getattr(s, name) for s in part) for part in (early, late))
        found[name] = {"early": a, "late": b, "growth": b - a}
    found["peak_bytes"] = max(s.bytes for s in samples)
    found["seconds"] = round(samples[-1].seconds - samples[0].seconds, 1)
    found["num_samples"] = len(samples)
    return found


def line(name: str, count: int, found: dict[str, Any]) -> str:
    """One line for people."""
    grown, before = found["bytes"]["growth"] / 2**20, found["bytes"]["early"] / 2**20
    return (
        f"{name}: {count} in {found['seconds']:.0f} s; memory {before:.0f} MiB {grown:+.1f} MiB, "
        f"open files {found['files']['growth']:+g}, threads {found['threads']['growth']:+g}"
    )


# -------------------------------------------------------------------------------------- the work


def soak_predict(cases: int, folder: Path) -> dict[str, Any]:
    """Predict ``cases`` scans, each of another size, with one loaded model."""
    import jax

    from panther_jax.config import loading
    from panther_jax.images import imageio
    from panther_jax.images.cases import find_tasks
    from panther_jax.inference.folder import predict_cases
    from panther_jax.inference.loading import load
    from panther_jax.network import unet
    from panther_jax.planner import from_config
    from panther_jax.plans.geometry import Geometry
    from panther_jax.weights import bundle

    settings, _ = loading.load_config("smoke")
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "tumor": 1, "pancreas": 2},
        "numTraining": 1,
        "file_ending": ".mha",
    }
    plans = from_config.plans_from_config(settings, dataset, None)
    params = jax.tree.map(np.asarray, unet.init_params(plans.arch, jax.random.key(0)))
    bundle.save_bundle(
        folder / "bundle",
        params={"0": params},
        plans=plans.to_nnunet(),
        dataset=dataset,
        provenance={"inference_allowed_mirroring_axes": []},
    )
    random = np.random.default_rng(0)
    eye = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    for number in range(cases):
        shape = (8 + number % 11, 20 + number % 13, 20 + number % 17)
        image = random.standard_normal(shape, np.float32)
        geometry = Geometry(shape, (6.0, 6.0, 6.0), (0.0, 0.0, 0.0), eye)
        imageio.write_image(folder / "in" / f"case_{number:04d}_0000.mha", image, geometry)
    tasks = find_tasks(folder / "in", folder / "out", num_channels=1, file_ending=".mha")
    predictor = load(folder / "bundle")
    with Sampler() as sampler:
        report = predict_cases(predictor, tasks)
    if report.failed or len(report.done) != cases:
        raise RuntimeError(f"{len(report.failed)} of {cases} cases failed: {report.failed}")
    return growth(sampler.samples)


def soak_train(steps: int, folder: Path) -> dict[str, Any]:
    """Train ``steps`` tiny steps, with a checkpoint and a picture an epoch."""
    from panther_jax import train
    from panther_jax.config import loading
    from panther_jax.config.places import Places
    from panther_jax.images import phantom_dataset
    from panther_jax.training import data
    from panther_jax.training.options import Options

    settings, _ = loading.load_config("smoke")
    epochs = min(EPOCHS, steps)
    loop = dataclasses.replace(settings.loop, epochs=epochs, steps_per_epoch=steps // epochs)
    settings = dataclasses.replace(settings, loop=loop)
    raw = folder / "Dataset902_Soak"
    phantom_dataset.make_phantom(raw, modality="t2", num_cases=5, seed=0)
    options = Options(fold=0, root=folder, raw=raw)
    store = data.prepare_store(settings, options, Places(folder))
    made = folder / "run"
    made.mkdir()
    loaded, state, counters = train.prepare(settings, store, made, fold=0, bundle=None)
    loaded = train.compile_step(loaded, state)
    with Sampler() as sampler:
        train.run_loop(loaded, state, counters)
    return growth(sampler.samples)


# -------------------------------------------------------------------------------------- command


def _in_a_process(what: str, count: int) -> dict[str, Any]:
    """Soak in a process of its own, whose memory is nobody else's."""
    text = harness.run_python("-m", "benchmarks.soak", "--only", what, str(count))
    return json.loads(text.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run both and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES, help="to predict (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="to train (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.only:
        logging.getLogger("panther_jax").setLevel(logging.ERROR)
        work = {"predict": soak_predict, "train": soak_train}[arguments.only[0]]
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(work(int(arguments.only[1]), Path(folder))))
        return 0
    result: dict[str, Any] = {"machine": harness.machine(), "git_commit": harness.git_commit()}
    for what, count in (("predict", arguments.cases), ("train", arguments.steps)):
        found = _in_a_process(what, count)
        result[what] = {"count": count, **found}
        print(line(what, count, found), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
