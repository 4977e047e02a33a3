"""A whole epoch beside nnU-Net's own trainer, on the same preprocessed cases and the same cores.

Phantoms, preprocessed by nnU-Net; both sides read that folder. An epoch is loading, augmentation,
training steps, online validation, log, picture and checkpoints, as each side's own code does it.
Both keep one process alive and take turns, an epoch each; the first does not count. Workers of the
side that waits fill their queues and stop. Waiting is the time spent asking the loader for a batch.
Our cases lie where ``data.resident auto`` puts them; where a budget says so, a further process of
ours takes several steps a call.
"""

import dataclasses
import json
import os
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness, networks

DATASET_ID, FOLD = 777, 0
NAME = f"Dataset{DATASET_ID}_Benchmark"
TRAINERS = {"default": "nnUNetTrainer", "da5": "nnUNetTrainerDA5"}
GPU_GOALS = {"default": 1.5, "da5": 3.0}
SETTLE_SECONDS = 1.0
MAX_WAIT = 0.02


@dataclasses.dataclass(frozen=True)
class Budget:
    """A network with its patches, and how long an epoch is.

    ``per_call`` are the numbers of steps a call that are measured beside single steps.
    """

    size: networks.Size
    steps: int
    validation_steps: int
    rounds: int
    policies: tuple[str, ...]
    num_cases: int = 6
    per_call: tuple[int, ...] = ()


BUDGETS: Mapping[str, Budget] = {
    "cpu": Budget(networks.DEMO, 40, 8, 2, ("default", "da5")),
    "gpu": Budget(networks.FULL, 50, 10, 2, ("default", "da5"), 10, (10,)),
    "toy": Budget(networks.TINY, 4, 2, 1, ("default",), 5, (2,)),
}
MAKE = """
import json, os, sys
from pathlib import Path
if __name__ == "__main__":
    from benchmarks import networks
    from panther_jax import datasets
    raw, out = map(Path, sys.argv[1:3])
    size, count, full = map(json.loads, sys.argv[3:])
    size = networks.Size.from_json(size)
    datasets.make_phantom(raw, modality="t2", num_cases=count, size="full" if full else "small")
    spacing = (1.0, 1.0, 1.0) if full else (3.0, 3.0, 3.0)
    plans = {**networks.make_plans(size, spacing=spacing).to_nnunet(), "dataset_name": raw.name}
    out.mkdir(parents=True)
    (out / "BenchmarkPlans.json").write_text(json.dumps(plans))
    (out / "dataset_fingerprint.json").write_text("{}")  # the trainer only copies it
    (out / "dataset.json").write_text((raw / "dataset.json").read_text())
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    DefaultPreprocessor(verbose=False).run(raw.name, "3d_fullres", "BenchmarkPlans", 2)
"""


class Gate:
    """Lets a training loop in a thread do one epoch at a time."""

    def __init__(self, steps: int):
        self.steps, self.calls = steps, 0
        self.go = threading.Semaphore(0)
        self.arrivals: queue.Queue[float | BaseException] = queue.Queue()
        self.started = 0.0

    def before_step(self) -> None:
        """Wait at the start of an epoch until it is wanted."""
        if self.calls % self.steps == 0:
            self.arrivals.put(time.perf_counter())
            self.go.acquire()
            self.started = time.perf_counter()
        self.calls += 1

    def arrived(self) -> float:
        """When the loop came to the next epoch; raises what ended it."""
        found = self.arrivals.get(timeout=900)
        if isinstance(found, BaseException):
            raise found
        return found

    def epoch(self) -> float:
        """Let an epoch pass; its seconds."""
        self.go.release()
        return self.arrived() - self.started


def serve_ours(
    store_folder: str, budget: Mapping[str, Any], policy: str, per_call: int = 1
) -> Callable[..., Any]:
    """Answer ``()`` with seconds of an epoch, of them waiting, and the losses."""
    from panther_jax import train
    from panther_jax.config import schema
    from panther_jax.store.store import open_store
    from panther_jax.training import records

    size = networks.Size.from_json(budget["size"])
    store = open_store(Path(store_folder))
    arch, steps = size.arch, budget["steps"]
    settings = schema.TrainConfig(
        data=schema.DataConfig(
            NAME, configuration="3d_fullres", patch_size=size.patch, batch_size=size.batch
        ),
        augment=schema.AugmentConfig(policy=policy),  # type: ignore[arg-type]
        arch=schema.ArchConfig(
            arch.network, arch.features, arch.kernel_sizes, arch.strides, arch.blocks,
            arch.decoder_convs,
        ),
        loop=schema.LoopConfig(
            epochs=1000, steps_per_epoch=steps, steps_per_call=per_call,
            validation_steps=budget["validation_steps"],
        ),
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(dir=Path(store_folder).parent))
    loop, state, counters = train.prepare(settings, store, folder, fold=FOLD, bundle=None)
    loop = train.compile_step(loop, state)
    gate, step = Gate(steps // per_call), loop.train_step

    def gated(*arguments: Any) -> Any:
        gate.before_step()
        return step(*arguments)

    def body() -> None:
        try:
            train.run_loop(dataclasses.replace(loop, train_step=gated), state, counters)
        except BaseException as error:
            gate.arrivals.put(error)

    threading.Thread(target=body, daemon=True).start()
    gate.arrived()

    def handle() -> Any:
        seconds = gate.epoch()
        row = records.read_metrics(loop.metrics.path)[-1]
        return {
            "seconds": seconds,
            "waiting": row["wait_share"] * row["seconds"],
            "losses": (row["train_loss"], row["validation_loss"]),
            "peak_bytes": harness.peak_bytes(),
        }

    return handle


def serve_peer(budget: Mapping[str, Any], policy: str) -> Callable[..., Any]:
    """As :func:`serve_ours`, for the trainer that nnU-Net has for this augmentation."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(harness.cores())
    trainer = get_trainer_from_args(
        NAME, "3d_fullres", FOLD, TRAINERS[policy], "BenchmarkPlans", device=device
    )
    trainer.num_iterations_per_epoch = budget["steps"]
    trainer.num_val_iterations_per_epoch = budget["validation_steps"]
    trainer.initialize()
    trainer.on_train_start()
    waited = [0.0]

    def batch(loader: Any) -> Any:
        start = time.perf_counter()
        found = next(loader)
        waited[0] += time.perf_counter() - start
        return found

    def epoch() -> None:
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs = [
            trainer.train_step(batch(trainer.dataloader_train)) for _ in range(budget["steps"])
        ]
        trainer.on_train_epoch_end(outputs)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            outputs = [
                trainer.validation_step(batch(trainer.dataloader_val))
                for _ in range(budget["validation_steps"])
            ]
            trainer.on_validation_epoch_end(outputs)
        trainer.on_epoch_end()

    def handle() -> Any:
        waited[0] = 0.0
        seconds = harness.timed(epoch, 1)
        return {"seconds": seconds, "waiting": waited[0], "peak_bytes": harness.peak_bytes()}

    return handle


def measure(budget: Budget, policy: str, folders: tuple[Path, Path]) -> dict[str, Any]:
    """One augmentation: epochs of both sides in turn."""
    preprocessed, results = folders
    store = preprocessed / "BenchmarkPlans_3d_fullres"
    calls = {_side(number): number for number in (1, *budget.per_call)}
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in (*calls, "peer")}
    plain = {**dataclasses.asdict(budget), "size": budget.size.to_json()}
    with ExitStack() as stack:
        asks = {
            side: stack.enter_context(
                harness.serving(
                    "benchmarks.bench_epoch:serve_ours", str(store), plain, policy, number
                )
            )
            for side, number in calls.items()
        }
        places = _places(preprocessed.parent, results)
        asks["peer"] = stack.enter_context(
            harness.serving("benchmarks.bench_epoch:serve_peer", plain, policy, variables=places)
        )

        def once(side: str) -> harness.Measurement:
            time.sleep(SETTLE_SECONDS)  # the other side's workers fill their queues
            answers[side].append(asks[side]())
            last = answers[side][-1]
            return harness.Measurement(last["seconds"], last["peak_bytes"])

        found = harness.interleaved({side: partial(once, side) for side in asks}, budget.rounds)
    share = {
        side: statistics.median(a["waiting"] / a["seconds"] for a in runs[1:])
        for side, runs in answers.items()
    }
    return {
        "policy": policy,
        "ours": harness.summarize(f"epoch, {policy}", found["ours"]),
        "peer": harness.summarize(f"epoch, {policy}, nnU-Net", found["peer"]),
        "faster": harness.spread(harness.ratio(found["ours"], found["peer"])),
        "wait_share": share["ours"],
        "peer_wait_share": share["peer"],
        "losses": [a.get("losses") for a in answers["ours"]],
        "per_call": {
            number: {
                "seconds": harness.summarize(side, found[side]).median_seconds,
                "faster": harness.spread(harness.ratio(found[side], found["peer"])),
                "wait_share": share[side],
            }
            for side, number in calls.items()
            if number > 1
        },
    }


def _side(per_call: int) -> str:
    return "ours" if per_call == 1 else f"ours, {per_call} steps a call"


def _places(preprocessed: Path, results: Path) -> dict[str, str]:
    raw = preprocessed.parent / "raw"
    return {
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(preprocessed),
        "nnUNet_results": str(results),
    }


def run(output: Path, setting: harness.Setting = "cpu") -> str:
    """Measure, write ``epoch.json``, return the lines to print."""
    harness.require("nnunetv2", "SimpleITK", "grain", "blosc2")
    budget = BUDGETS[setting]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        preprocessed, results = folder / "preprocessed" / NAME, folder / "results"
        _make(budget, folder, full=setting == "gpu")
        measured, failed = [], {}
        for policy in budget.policies:
            try:
                measured.append(measure(budget, policy, (preprocessed, results)))
            except RuntimeError as error:  # one side's trainer may want what is not installed
                failed[policy] = str(error).splitlines()[0]
    if not measured:
        raise RuntimeError(f"no augmentation could be measured: {failed}")
    goals = GPU_GOALS if setting == "gpu" else {}
    text = (
        f"{setting}: {budget.size.label}, {budget.steps} training and "
        f"{budget.validation_steps} validation steps, {budget.num_cases} phantoms"
    )
    summaries, rows = [], []
    lines = [f"  {text}; {harness.cores()} cores of {harness.machine()['cpu']}"]
    for found in measured:
        ours, peer, ratio = found.pop("ours"), found.pop("peer"), found["faster"]
        goal = goals.get(found["policy"])
        summaries += [ours, peer]
        rows += _rows(found, ours.median_seconds, peer.median_seconds, goal)
        lines.append(
            f"  {found['policy']}: {ours.median_seconds:.2f} s, nnU-Net {peer.median_seconds:.2f} "
            f"s: {ratio['median']:.2f} times ({ratio['min']:.2f} to {ratio['max']:.2f}"
            + (f"; goal {goal:g}" if goal else "")
            + f"); waiting {100 * found['wait_share']:.1f} %, nnU-Net "
            f"{100 * found['peer_wait_share']:.1f} %"
        )
        lines += [
            f"    {number} steps a call: {other['seconds']:.2f} s, waiting "
            f"{100 * other['wait_share']:.1f} %"
            for number, other in found["per_call"].items()
        ]
    facts = {"setting": text, "comparisons": measured, "failed": failed, "rows": rows}
    lines += [f"  {policy} failed: {why}" for policy, why in failed.items()]
    path = harness.write_result(output, "epoch", summaries, facts)
    return "\n".join([*lines, f"  {path}"])


def _rows(
    found: Mapping[str, Any], ours: float, peer: float, goal: float | None
) -> list[dict[str, Any]]:
    ratio, wait = found["faster"], found["wait_share"]
    several = [
        {
            "what": f"epoch, augmentation {found['policy']}: {number} steps a call",
            "ours": other["seconds"],
            "peer": peer,
            "ratio": other["faster"],
            "goal": None,
            "met": None,
        }
        for number, other in found["per_call"].items()
    ]
    return [
        {
            "what": f"epoch, augmentation {found['policy']}",
            "ours": ours,
            "peer": peer,
            "ratio": ratio,
            "goal": goal,
            "met": None if goal is None else ratio["median"] >= goal,
        },
        {
            "what": f"epoch, augmentation {found['policy']}: share of waiting",
            "ours": wait,
            "peer": found["peer_wait_share"],
            "ratio": None,
            "goal": f"< {MAX_WAIT:g}",
            "met": wait < MAX_WAIT,
        },
        *several,
    ]


def _make(budget: Budget, folder: Path, *, full: bool) -> None:
    script = folder / "make.py"  # workers are spawned: they need a main module
    script.write_text(MAKE)
    places = _places(folder / "preprocessed", folder / "results")
    arguments = (
        str(Path(places["nnUNet_raw"]) / NAME),
        str(folder / "preprocessed" / NAME),
        json.dumps(budget.size.to_json()),
        json.dumps(budget.num_cases),
        json.dumps(full),
    )
    paths = os.pathsep.join(filter(None, (str(harness.ROOT), os.environ.get("PYTHONPATH"))))
    env = harness.environment(PYTHONPATH=paths, OMP_NUM_THREADS="1", **places)
    harness.run_python(str(script), *arguments, env=env, timeout_seconds=1200)
