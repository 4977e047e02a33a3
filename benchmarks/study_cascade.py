"""Does the cascade help? ``python -m benchmarks.study_cascade --output benchmarks/results``.

Trains foundation -> CT -> MRI and the MRI stage from scratch at the same budget, at the size of the
demo, over several seeds, and scores the tumour on held-out cases: on phantoms, on images made
around real tumour shapes (``--shapes``), and on real scans (``--ct-raw``, ``--mri-raw``). From the
same CT weights it also compares default and DA5 augmentation. A seed has a split of its own. Hours
on two cores; it goes on where it was stopped.
"""

import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from panther_jax.base import command
from panther_jax.base.console import table
from panther_jax.base.files import write_json
from panther_jax.images import phantom_dataset

METRICS = ("volumetric_dice", "surface_dice", "hausdorff95", "masd")
ARMS = {
    # name: starting weights, augmentation policy
    "scratch": (None, "no_mirroring"),
    "cascade": ("ct", "no_mirroring"),
    "cascade, default": ("ct", "default"),
    "cascade, da5": ("ct", "da5"),
}
COMPARISONS = (("cascade", "scratch"), ("cascade, da5", "cascade, default"))
PHANTOM_CASES, TRAINED_PHANTOMS, TRAINED_SHAPES = 20, 8, 12
FOUNDATION_SEED, CT_SEED, MRI_SEED = 3, 2, 0  # other patients in every stage


@dataclass(frozen=True)
class Setting:
    """A CT and an MRI raw dataset; splits of the MRI one, a fold a seed."""

    name: str
    ct: Path
    mri: Path


@dataclass(frozen=True)
class Study:
    """Where it works, for how long each stage trains, and on which cores."""

    folder: Path
    epochs: int
    mri_epochs: int
    jobs: int
    free_cores: "queue.Queue[set[int] | None]"

    def train(self, name: str, *options: str) -> Path:
        """Train with the command, if that is not done; returns the work directory."""
        workdir = self.folder / "runs" / name
        argv = ("panther_jax.train", "--demo", "--workdir", str(workdir), *options)
        argv += ("--root", str(self.folder), "--validation.checkpoints", "final", "--quiet")
        if not list(workdir.glob("fold_*/validation_final/summary.json")):
            self.call(argv)
        return workdir

    def bundle(self, run: Path) -> Path:
        """The bundle of a run."""
        out = self.folder / "weights" / run.relative_to(self.folder / "runs")
        if not out.is_dir():
            out.parent.mkdir(parents=True, exist_ok=True)
            self.call(("panther_jax.bundle", "--run", str(run), "--out", str(out), "--quiet"))
        return out

    def call(self, argv: Sequence[str]) -> None:
        """Run a command, on a core of its own if there are several jobs."""
        cores = self.free_cores.get()
        try:
            done = subprocess.run(
                [sys.executable, "-m", *argv],
                cwd=harness.ROOT,
                capture_output=True,
                text=True,
                check=False,
                preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
            )
        finally:
            self.free_cores.put(cores)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}\n{done.stderr[-2000:]}")


def core_queue(jobs: int) -> "queue.Queue[set[int] | None]":
    """One entry a job: the cores it may use, None for all."""
    cores: queue.Queue[set[int] | None] = queue.Queue()
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for number in range(jobs):
        cores.put({known[number % len(known)]} if jobs > 1 and known else None)
    return cores


# ---------------------------------------------------------------------------------------- data


def make_settings(
    folder: Path, seeds: Sequence[int], *, shapes: Path | None, ct: Path | None, mri: Path | None
) -> list[Setting]:
    """The datasets; those that are made are made once."""
    raw = folder / "raw"
    made = raw / "Dataset999_Phantom", raw / "Dataset902_Phantom"
    if not made[1].is_dir():
        phantom_dataset.make_phantom(
            made[0], modality="ct", num_cases=15, seed=CT_SEED, overwrite=True
        )
        phantom_dataset.make_phantom(made[1], modality="t2", num_cases=PHANTOM_CASES, seed=MRI_SEED)
    write_splits(made[1], TRAINED_PHANTOMS, seeds)
    settings = [Setting("phantom", *made)]
    if shapes is not None:
        settings.append(Setting("real shapes", *around_shapes(raw, shapes)))
        write_splits(settings[-1].mri, TRAINED_SHAPES, seeds)
    if ct is not None and mri is not None:
        settings.append(Setting("real scans", ct, mri))
    return settings


def around_shapes(raw: Path, shapes: Path) -> tuple[Path, Path]:
    """Images around label maps: of every two maps one becomes CT, the other T2."""
    maps = sorted(p for p in shapes.iterdir() if p.name.endswith((".nii.gz", ".mha")))
    made = []
    for number, modality, name in ((0, "ct", "Dataset999_Shapes"), (1, "t2", "Dataset902_Shapes")):
        made.append(raw / name)
        if made[-1].is_dir():
            continue
        chosen = raw / f".maps_{modality}"
        shutil.rmtree(chosen, ignore_errors=True)
        chosen.mkdir(parents=True)
        for path in maps[number::2]:
            (chosen / path.name).symlink_to(path.resolve())
        phantom_dataset.make_phantom(
            made[-1],
            modality=modality,  # type: ignore[arg-type]
            num_cases=len(maps),
            seed=(CT_SEED, MRI_SEED)[number],
            label_folder=chosen,
        )
    return made[0], made[1]


def write_splits(raw: Path, num_train: int, seeds: Sequence[int]) -> None:
    """A random split a seed: few cases to train, all others held out."""
    names = sorted(p.name.split(".")[0] for p in (raw / "labelsTr").iterdir())
    splits = []
    for seed in range(max(seeds) + 1):
        order = np.random.default_rng(seed).permutation(names).tolist()
        splits.append({"train": sorted(order[:num_train]), "val": sorted(order[num_train:])})
    write_json(raw / "splits_final.json", splits)


# ------------------------------------------------------------------------------------ training


def foundation(study: Study, seed: int) -> Path:
    """Weights of a model of many organs, on CT phantoms that nothing else uses."""
    raw = study.folder / "raw" / "Dataset619_PhantomOrgans"
    if not raw.is_dir():
        phantom_dataset.make_phantom(
            raw, modality="ct", num_cases=15, seed=FOUNDATION_SEED, organs=True
        )
    run = study.train(
        f"foundation/seed_{seed}", "--config", "multitalent.py", "--fold", "all",
        "--raw", str(raw), *fields(seed, study.epochs, "no_mirroring"),
    )  # fmt: skip
    return study.bundle(run)


def chain(study: Study, setting: Setting, seed: int) -> dict[str, list[dict[str, Any]]]:
    """CT stage, then the MRI stage in every arm; returns the held-out cases' scores."""
    place = f"{setting.name.replace(' ', '_')}/seed_{seed}"
    ct = study.train(
        f"{place}/ct", "--config", "ct_pancreas.py", "--fold", "all",
        "--raw", str(setting.ct), "--init", str(foundation(study, seed)),
        *fields(seed, study.epochs, "no_mirroring"),
    )  # fmt: skip
    starts = {"ct": str(study.bundle(ct)), None: "none"}
    scores = {}
    for arm, (start, policy) in ARMS.items():
        name = arm.replace(", ", "_")
        run = study.train(
            f"{place}/{name}", "--config", "mri_t2.py", "--fold", str(seed),
            "--raw", str(setting.mri), "--init", starts[start],
            *fields(seed, study.mri_epochs, policy),
        )  # fmt: skip
        panther = json.loads((run / f"fold_{seed}/validation_final/panther.json").read_text())
        scores[arm] = [
            {"case": c["subject"], **{m: c[m] for m in METRICS}} for c in panther["per_subject"]
        ]
    return scores


def fields(seed: int, epochs: int, policy: str) -> tuple[str, ...]:
    """Options of a training."""
    return (
        "--loop.seed", str(seed), "--loop.epochs", str(epochs), "--augment.policy", policy,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- results


def summary(scores: Mapping[int, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Means over held-out cases for each seed, and over seeds; differences seed by seed."""
    arms: dict[str, Any] = {}
    for arm in ARMS:
        arms[arm] = {}
        for metric in METRICS:
            means = [statistics.fmean(c[metric] for c in scores[s][arm]) for s in sorted(scores)]
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            arms[arm][metric] = {"mean": statistics.fmean(means), "sd": spread, "seeds": means}
    differences = {}
    for better, worse in COMPARISONS:
        differences[f"{better} - {worse}"] = {
            metric: [
                a - b
                for a, b in zip(
                    arms[better][metric]["seeds"], arms[worse][metric]["seeds"], strict=True
                )
            ]
            for metric in METRICS
        }
    return {"arms": arms, "differences_by_seed": differences}


def text_of(name: str, found: Mapping[str, Any]) -> str:
    """A setting's result as a table."""
    rows = [
        [arm, *(f"{v[m]['mean']:.3f} +- {v[m]['sd']:.3f}" for m in METRICS)]
        for arm, v in found["arms"].items()
    ]
    lines = [table([name, "Dice", "surface Dice", "HD95 mm", "MASD mm"], rows)]
    for what, values in found["differences_by_seed"].items():
        parts = ", ".join(
            f"{m} {statistics.fmean(values[m]):+.3f} ({' '.join(f'{d:+.3f}' for d in values[m])})"
            for m in ("volumetric_dice", "hausdorff95")
        )
        lines.append(f"{what}: {parts}")
    return "\n".join(lines)


def run_study(study: Study, settings: Sequence[Setting], seeds: Sequence[int]) -> dict[str, Any]:
    """All chains, several at a time; returns scores by setting and seed."""
    scores: dict[str, dict[int, Any]] = {s.name: {} for s in settings}
    foundation(study, seeds[0])  # preprocesses, which two processes must not do side by side
    with ThreadPoolExecutor(study.jobs) as pool:
        list(pool.map(lambda seed: foundation(study, seed), seeds))
        todo = [(setting, seed) for seed in seeds for setting in settings]
        found = pool.map(lambda job: chain(study, *job), todo)
        for (setting, seed), result in zip(todo, found, strict=True):
            scores[setting.name][seed] = result
            print(f"{setting.name}, seed {seed}: done", file=sys.stderr, flush=True)
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(
        "benchmarks.study_cascade",
        "Compare the cascade with training from scratch at the same budget.",
        "python -m benchmarks.study_cascade --folder /tmp/study --seeds 0 1 2",
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where data and runs go")
    add("--output", type=Path, default=harness.ROOT / "benchmarks" / "results")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=12, help="of foundation and CT stage (of 40 steps)")
    add("--mri-epochs", type=int, default=6, help="of the MRI stage (of 40 steps)")
    add("--shapes", type=Path, help="folder of label maps in PANORAMA coding")
    add("--ct-raw", type=Path, help="raw CT dataset of real scans")
    add("--mri-raw", type=Path, help="raw MRI dataset of real scans")
    add("--jobs", type=int, default=1, help="trainings side by side, each on one core")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        study = Study(
            arguments.folder.resolve(),
            arguments.epochs,
            arguments.mri_epochs,
            arguments.jobs,
            core_queue(arguments.jobs),
        )
        seeds = tuple(arguments.seeds)
        raws = {"ct": arguments.ct_raw, "mri": arguments.mri_raw}
        settings = make_settings(study.folder, seeds, shapes=arguments.shapes, **raws)
        scores = run_study(study, settings, seeds)
        found = {name: summary(by_seed) for name, by_seed in scores.items()}
        harness.write_result(
            arguments.output,
            "cascade",
            [],
            {
                "setting": "demo size: 16x48x48 patches at 3 mm, 8-16-32-64 features, 40 steps an "
                f"epoch; {study.epochs} epochs foundation and CT, {study.mri_epochs} epochs MRI",
                "seeds": list(seeds),
                "studies": found,
                "per_case": scores,
            },
        )
        return "\n\n".join(text_of(name, value) for name, value in found.items())

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
