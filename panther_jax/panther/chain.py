"""The cascade of a task as a graph of steps, and how far each of them is (spec 03 §7.3-7.4).

A step is one command and the files that show that it is done. Trained and imported weights are
followed by checksum through the chain; what is derived from them, by the age of files. No JAX.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from panther_jax.base.files import read_object
from panther_jax.config import loading, schema
from panther_jax.config.laptop import demo
from panther_jax.config.places import Places
from panther_jax.store.store import is_complete

Task = Literal["t1", "t2"]
Status = Literal["done", "to do", "stale", "missing"]
CT_STAGE = "ct_pancreas"
FOUNDATION = "multitalent"
SPECIALISTS = {
    "t1": ("mri_t1.py:aug=da5_fork", "mri_t1.py"),
    "t2": ("mri_t2.py:aug=da5_fork", "mri_t2.py"),
}
"""Aggressive augmentation for overlap, the default one for boundaries (spec 05 §10.1)."""
DEMO_MRI_EPOCHS = 8
DEMO_SEED = 3  # of the foundation's phantoms: patients that no later stage sees
DOWNLOAD = (
    "the foundation weights are not there\n"
    "  Download and unpack MultiTalentV2_challengeversion.zip (Zenodo record 13753413) and name "
    "its model\n  folder (the one that holds fold_all) with --foundation, or leave them out with "
    "--foundation none."
)


@dataclass(frozen=True)
class State:
    """How far a step is: ``stale`` was made from weights that have changed since."""

    status: Status
    why: str = ""


@dataclass(frozen=True)
class Step:
    """One command of the cascade: ``argv`` follows ``python -m``; empty if it cannot be run."""

    name: str
    argv: tuple[str, ...]
    needs: tuple[str, ...]
    look: Callable[[], State]

    @property
    def state(self) -> State:
        """How far the step is now."""
        return self.look()


@dataclass(frozen=True)
class Plan:
    """What is asked for; ``overrides`` are config fields for every training.

    ``foundation``: an nnU-Net model folder to import, None to use the bundle that is there,
    ``"none"`` to start the CT stage from scratch.
    """

    task: Task
    root: Path
    folds: tuple[str, ...]
    specialists: tuple[str, ...]
    foundation: str | None = None
    demo: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def places(self) -> Places:
        """The folders."""
        return Places(self.root)

    def run_folder(self, spec: str) -> Path:
        """Work directory of a config, as ``panther_jax.train`` names it."""
        name = loading.load_config(spec)[1].run_name
        return self.places.run(name + "_demo" * self.demo)

    def raw_folder(self, spec: str) -> Path:
        """Raw data set that a config trains on."""
        data = self._data(spec)
        if self.demo:
            return self.places.phantoms(data.dataset, data.modality)
        try:
            return self.places.raw(data.dataset)
        except FileNotFoundError:  # its training will say so, with the remedy
            return self.root / "raw" / data.dataset

    def store_folder(self, spec: str) -> Path:
        """Store that a config trains on."""
        return self.places.store(self.raw_folder(spec).name, self._data(spec).data_identifier)

    def _data(self, spec: str) -> schema.DataConfig:
        settings, _ = loading.load_config(spec)
        return demo(settings).data if self.demo else settings.data

    def weights_folder(self, name: str) -> Path:
        """Bundle of a stage."""
        return self.root / "weights" / (name + "_demo" * self.demo)


# --------------------------------------------------------------------------------------- graph


def cascade(plan: Plan) -> tuple[Step, ...]:
    """All steps of a task, each after those it needs.

    Raises:
        ConfigError: if a specialist's config cannot be loaded.
    """
    steps = [*_foundation(plan)]
    last = steps[-1].name if steps else None
    foundation = plan.weights_folder(FOUNDATION) if last else None
    ct = _training(plan, f"{CT_STAGE}.py", "all", start=foundation, needs=last)
    steps += [ct, _bundle(plan, f"{CT_STAGE}.py", CT_STAGE, needs=ct.name)]
    start, bundle = plan.weights_folder(CT_STAGE), steps[-1].name
    stores: dict[Path, Step] = {}
    scored = []
    for spec in plan.specialists:
        folder = plan.store_folder(spec)
        if folder not in stores:
            stores[folder] = _store(plan, spec, folder, needs=bundle)
            steps.append(stores[folder])
        store = stores[folder].name
        folds = [_training(plan, spec, f, start=start, needs=store) for f in plan.folds]
        scored.append(_cross_validation(plan, spec, tuple(f.name for f in folds)))
        steps += [*folds, scored[-1]]
    needs = tuple(step.name for step in scored)
    return (*steps, _selection(plan, needs), _report(plan, needs))


def _foundation(plan: Plan) -> tuple[Step, ...]:
    if plan.foundation == "none":
        return ()
    folder = plan.weights_folder(FOUNDATION)
    if plan.demo:
        return _demo_foundation(plan, folder)
    argv: tuple[str, ...] = ()
    if plan.foundation is not None:
        source = ("--model-folder", plan.foundation, "--folds", "all", "--stem", "reinit")
        argv = ("weight_conversion.import_nnunet", *source, "--out", str(folder))

    def look() -> State:
        if (folder / "provenance.json").is_file():
            return State("done")
        return State("to do") if argv else State("missing", DOWNLOAD)

    return (Step(_weights_name(folder), argv, (), look),)


def _demo_foundation(plan: Plan, folder: Path) -> tuple[Step, ...]:
    raw = plan.root / "raw" / "Dataset619_PhantomOrgans"
    make = Step(
        f"raw/{raw.name}",
        ("panther_jax.datasets", "phantom", "--organs", "--modality", "ct", "--cases", "15")
        + ("--seed", str(DEMO_SEED), "--out", str(raw)),
        (),
        lambda: State("done" if (raw / "dataset.json").is_file() else "to do"),
    )
    train = _training(
        plan, f"{FOUNDATION}.py", "all", start=None, needs=make.name, more=("--raw", str(raw))
    )
    return make, train, _bundle(plan, f"{FOUNDATION}.py", FOUNDATION, needs=train.name)


def _store(plan: Plan, spec: str, folder: Path, *, needs: str) -> Step:
    # A step of its own: folds that start side by side must not preprocess side by side.
    argv = ("panther_jax.train", "--config", spec, "--prepare-only", "--root", str(plan.root))
    argv += ("--init", "none", *("--demo",) * plan.demo, *plan.overrides)
    name = f"store/{folder.parent.name}/{folder.name}"
    return Step(name, argv, (needs,), lambda: store_state(folder))


def _training(
    plan: Plan,
    spec: str,
    fold: str,
    *,
    start: Path | None,
    needs: str | None,
    more: tuple[str, ...] = (),
) -> Step:
    folder = plan.places.fold(plan.run_folder(spec), "all" if fold == "all" else int(fold))
    of_task = spec in plan.specialists
    argv = ("panther_jax.train", "--config", spec, "--fold", fold, "--root", str(plan.root), *more)
    argv += ("--init", str(start) if start else "none", *("--demo",) * plan.demo)
    if of_task:
        argv += ("--validation.save-probabilities",)
        argv += ("--loop.epochs", str(DEMO_MRI_EPOCHS)) * plan.demo
    argv += plan.overrides
    return Step(
        f"{folder.parent.name} fold {fold}",
        argv,
        (needs,) if needs else (),
        lambda: training_state(folder, start),
    )


def _bundle(plan: Plan, spec: str, name: str, *, needs: str) -> Step:
    run, folder = plan.run_folder(spec), plan.weights_folder(name)
    out = ("--out", str(folder), "--overwrite")
    argv = ("panther_jax.bundle", "--run", str(run), "--folds", "all", *out)
    return Step(_weights_name(folder), argv, (needs,), lambda: bundle_state(folder, run, "all"))


def _cross_validation(plan: Plan, spec: str, needs: tuple[str, ...]) -> Step:
    run = plan.run_folder(spec)
    folds = [str(run / f"fold_{fold}") for fold in plan.folds]
    output = run / "crossval.json"
    argv = ("panther_jax.evaluate", "--runs", *folds, "--output", str(output), "--overwrite")
    inputs = [Path(fold) / "validation_final" / "summary.json" for fold in folds]
    return Step(f"{run.name} cross-validation", argv, needs, lambda: derived(output, inputs))


def _selection(plan: Plan, needs: tuple[str, ...]) -> Step:
    output = plan.root / "ensembles" / f"task{plan.task[1]}{'_demo' * plan.demo}.json"
    runs = [str(plan.run_folder(spec)) for spec in plan.specialists]
    argv = ("panther_jax.ensemble", "select", "--candidates", *runs)
    references = plan.raw_folder(plan.specialists[0])
    argv += ("--references", str(references), "--output", str(output), "--overwrite")
    inputs = [Path(run) / "crossval.json" for run in runs]
    return Step(f"ensembles/{output.name}", argv, needs, lambda: derived(output, inputs))


def _report(plan: Plan, needs: tuple[str, ...]) -> Step:
    output = plan.root / "reports" / f"task{plan.task[1]}{'_demo' * plan.demo}.html"
    runs = [str(plan.run_folder(spec)) for spec in plan.specialists]
    argv = ("panther_jax.report", "--run", *runs, "--output", str(output), "--overwrite")
    inputs = [Path(run) / "crossval.json" for run in runs]
    return Step(f"reports/{output.name}", argv, needs, lambda: derived(output, inputs))


def _weights_name(folder: Path) -> str:
    return f"weights/{folder.name}"


# -------------------------------------------------------------------------------------- states


def training_state(folder: Path, start: Path | None) -> State:
    """Whether a fold is trained and validated, from the starting weights that are there now."""
    about = _json(folder / "run.json")
    recorded = about.get("starting_weights") or {}
    now = _json(start / "provenance.json").get("sha256") if start else None
    if recorded and now and recorded.get("sha256") != now:
        return State("stale", f"{folder} was trained from {start}, which has changed since")
    validated = (folder / "validation_final" / "summary.json").is_file()
    return State("done" if about.get("finished") and validated else "to do")


def store_state(folder: Path) -> State:
    """Whether every case of a data set is preprocessed."""
    wanted = _json(folder / "dataset.json").get("numTraining")
    names = [p.name.removesuffix(".locations.npz") for p in folder.glob("*.locations.npz")]
    whole = sum(is_complete(folder, name) for name in names)
    return State("done" if wanted and whole >= wanted else "to do")


def bundle_state(folder: Path, run: Path, fold: str) -> State:
    """Whether a bundle holds the weights that its run has now."""
    known = _json(folder / "provenance.json").get("checkpoints", {}).get(fold, {})
    trained = _json(run / f"fold_{fold}" / "run.json").get("params_sha256")
    if not known:
        return State("to do")
    if trained and known.get("params_sha256") != trained:
        return State("to do", f"{run} was trained again since")
    return State("done")


def derived(output: Path, inputs: Sequence[Path]) -> State:
    """Whether a file that is quickly made again is there and newer than what it is made of."""
    if not output.is_file():
        return State("to do")
    made = output.stat().st_mtime_ns
    newer = [path for path in inputs if path.is_file() and path.stat().st_mtime_ns > made]
    return State("to do", f"{newer[0]} is newer") if newer else State("done")


def _json(path: Path) -> Mapping[str, Any]:
    return read_object(path) if path.is_file() else {}


# ------------------------------------------------------------------------------------- drawing


def draw(steps: Sequence[Step]) -> str:
    """The graph as text: every step under the last one it needs, with its state."""
    children: dict[str | None, list[Step]] = {}
    for step in steps:
        children.setdefault(step.needs[-1] if step.needs else None, []).append(step)
    lines: list[tuple[str, State]] = []

    def visit(step: Step, indent: str, *, is_last: bool, depth: int) -> None:
        branch = ("└─ " if is_last else "├─ ") if depth else ""
        joins = f" (joins {len(step.needs)})" if len(step.needs) > 1 else ""
        lines.append((f"{indent}{branch}{step.name}{joins}", step.state))
        below = children.get(step.name, [])
        deeper = indent + (("   " if is_last else "│  ") if depth else "")
        for child in below:
            visit(child, deeper, is_last=child is below[-1], depth=depth + 1)

    for root in children.get(None, []):
        visit(root, "", is_last=True, depth=0)
    width = max(len(text) for text, _ in lines)
    return "\n".join(
        f"{text:<{width}}  " + ": ".join(filter(None, (state.status, *state.why.splitlines()[:1])))
        for text, state in lines
    )


# ------------------------------------------------------------------------------------ clusters


def command_of(step: Step) -> str:
    """The step as a line for a shell."""
    return shlex.join((Path(sys.executable).name, "-m", *step.argv))


def layers(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps that do not need each other, layer after layer."""
    level: dict[str, int] = {}
    for step in steps:
        level[step.name] = 1 + max((level.get(n, -1) for n in step.needs), default=-1)
    found: list[list[Step]] = [[] for _ in range(1 + max(level.values(), default=-1))]
    for step in steps:
        found[level[step.name]].append(step)
    return [layer for layer in found if layer]


def slurm_script(steps: Sequence[Step], *, folder: Path) -> str:
    """A script that submits itself: one job array a layer, each after the one before."""
    cases, submissions, number = [], [], 0
    for layer in layers(steps):
        first = number
        for step in layer:
            cases.append(f"  {number}) exec {command_of(step)} ;; # {step.name}")
            number += 1
        after = " --dependency=afterok:$job" if submissions else ""
        submissions.append(
            f'job=$(sbatch --parsable "$@" --array={first}-{number - 1}{after} "$script")'
        )
    return "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH --job-name=panther --gres=gpu:1 --cpus-per-task=8 --mem=64G --time=48:00:00",
            "# Submit: bash SCRIPT [options of sbatch, e.g. --partition=gpu]. A failed step",
            "# leaves what it did; write and submit the script again, it holds what is left.",
            f"cd {shlex.quote(str(folder.resolve()))} || exit 1",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            "esac",
            "set -e",
            'script=$(readlink -f "$0")',
            *submissions,
            f'echo "submitted {number} steps; the last job array is $job"',
            "",
        ]
    )
