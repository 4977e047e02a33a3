"""The chain of stages up to a task as a graph of steps (spec 03 §7.3-7.4, §7.7).

A step is one command and the files that show that it is done. What the stages are is in
:mod:`panther_jax.panther.stages`, how far a step is in :mod:`panther_jax.panther.states`. No JAX.
"""

import functools
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from panther_jax.config import loading
from panther_jax.config.places import Places
from panther_jax.config.schema import ConfigError, DataConfig, TrainConfig
from panther_jax.panther.stages import STAGES, HandedOn, Stage, stages
from panther_jax.panther.states import (
    Bundled,
    State,
    Training,
    bundle_state,
    derived,
    store_state,
    training_state,
)
from panther_jax.training.options import Options
from panther_jax.training.settings import resolve
from panther_jax.weights.names import named_start

NAME = "cascade"
SCRATCH = "none"


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
    """What is asked for.

    ``task`` is the stage to reach; ``variants`` are arguments of its config, or whole configs, and
    ``folds`` its folds (the table's, if not given). ``name`` begins the names of the chain's runs,
    weights and results. ``starts`` are weights by the stage that starts from them (a folder, a
    bundle's name, or ``none`` for scratch): no stage before it is trained. ``handed_on`` says, by
    stage, which weights the next one starts from. ``foundation`` is an nnU-Net model folder to
    import. ``overrides`` are config fields for every training.
    """

    task: str
    root: Path
    folds: tuple[str, ...] = ()
    specialists: tuple[str, ...] = ()
    name: str = NAME
    starts: Mapping[str, str] = field(default_factory=dict)
    handed_on: Mapping[str, HandedOn] = field(default_factory=dict)
    foundation: str | None = None
    demo: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def stage(self) -> Stage:
        """The stage to reach."""
        return stages()[self.task]

    @property
    def specs(self) -> tuple[str, ...]:
        """The configs of the stage to reach."""
        return self.specialists or tuple(self.stage.spec(v) for v in self.stage.variants)

    @property
    def members(self) -> tuple[str, ...]:
        """The folds of the stage to reach."""
        return self.folds or self.stage.folds

    @property
    def places(self) -> Places:
        """The folders."""
        return Places(self.root)

    def named(self, name: str) -> str:
        """A name of this chain's own."""
        return f"{self.name}_{name}{'_demo' * self.demo}"

    def run_folder(self, spec: str) -> Path:
        """Work directory of a config in this chain."""
        return self.places.run(self.named(loading.load_config(spec)[1].run_name))

    def raw_folder(self, stage: Stage, data: DataConfig) -> Path:
        """Raw data set that a stage trains on."""
        if self.demo and stage.demo_dataset:
            return self.root / "raw" / stage.demo_dataset
        if self.demo:
            return self.places.phantoms(data.dataset, data.modality)
        try:
            return self.places.raw(data.dataset)
        except FileNotFoundError:  # its store will say so, with the remedy
            return self.root / "raw" / data.dataset

    def weights_folder(self, stage: Stage) -> Path:
        """Weights of a stage: the chain's own bundle, or what was imported."""
        own = not stage.imported or self.demo
        return self.root / "weights" / (self.named(stage.weights) if own else stage.weights)

    def handing_on(self, stage: Stage) -> HandedOn:
        """Which weights of a stage the next one starts from."""
        return self.handed_on.get(stage.name, stage.handed_on)


# --------------------------------------------------------------------------------------- graph


def cascade(plan: Plan) -> tuple[Step, ...]:
    """All steps of a task, each after those it needs.

    Raises:
        ConfigError: if a config cannot be loaded, or the plan names what the chain does not have.
        FileNotFoundError: if weights to start from are not there.
    """
    _require_known(plan)
    graph = _Graph(plan)
    stage = plan.stage
    start, needs = graph.start_of(stage)
    scored = []
    for spec in plan.specs:
        folds = {
            fold: graph.train(stage, spec, fold, start=start, needs=needs) for fold in plan.members
        }
        numbered = [fold for fold in folds if fold.isdigit()]
        if numbered:
            validated = tuple(folds[fold] for fold in numbered)
            scored.append(graph.cross_validate(spec, numbered, needs=validated))
    if scored:
        graph.select(tuple(scored))
        graph.report(tuple(scored))
    return tuple(graph.steps.values())


def chain_of(plan: Plan) -> tuple[Stage, ...]:
    """The stages that a plan goes through, the first one first."""
    known = stages()
    found = [plan.stage]
    while found[0].start is not None and found[0].name not in _starts(plan):
        found.insert(0, known[found[0].start])
    return tuple(found)


def _starts(plan: Plan) -> Mapping[str, str]:
    """Weights to start from; ``--foundation none`` leaves out what is not trained but imported."""
    if plan.foundation != SCRATCH:
        return plan.starts
    known = stages()
    after = [s.name for s in known.values() if s.start and known[s.start].imported]
    return {**dict.fromkeys(after, SCRATCH), **plan.starts}


def _require_known(plan: Plan) -> None:
    if plan.task not in stages():
        raise ConfigError(STAGES.unknown(plan.task))
    if plan.stage.imported:
        raise ConfigError(f"stage {plan.task} is imported, not trained: {plan.stage.imported}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", plan.name):
        raise ConfigError(f"a chain's name may hold letters, digits, . and -; found {plan.name!r}")
    names = [stage.name for stage in chain_of(plan)]
    starting = names if stages()[names[0]].start else names[1:]
    for option, given, allowed in (
        ("--start", plan.starts, starting),
        ("--hand-on", plan.handed_on, names[:-1]),
    ):
        wrong = sorted(set(given) - set(allowed))
        if wrong:
            raise ConfigError(
                f"{option} {wrong[0]}: this chain goes {' -> '.join(names)}; there {option} is for "
                f"{', '.join(allowed) or 'none of them'}"
            )


class _Graph:
    """Steps by name while they are put together; a method adds one and gives its name."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps: dict[str, Step] = {}
        self._settings: dict[tuple[str, Path | None], TrainConfig] = {}

    def _add(
        self, name: str, argv: tuple[str, ...], needs: Sequence[str], look: Callable[[], State]
    ) -> str:
        self.steps.setdefault(name, Step(name, argv, tuple(needs), look))
        return name

    # ------------------------------------------------------------------------------- weights

    def start_of(self, stage: Stage) -> tuple[Path | None, tuple[str, ...]]:
        """The weights that a stage starts from, and the steps that make them."""
        given = _starts(self.plan).get(stage.name)
        if given == SCRATCH or stage.start is None:
            return None, ()
        if given is not None:
            return named_start(given, self.plan.places), ()
        before = stages()[stage.start]
        return self.plan.weights_folder(before), (self.weights(before),)

    def weights(self, stage: Stage) -> str:
        """The weights that a stage hands on."""
        folder = self.plan.weights_folder(stage)
        name = f"weights/{folder.name}"
        if stage.imported and not self.plan.demo:
            return self._add(name, self._import_command(folder), (), lambda: self._imported(stage))
        start, needs = self.start_of(stage)
        hand = self.plan.handing_on(stage)
        spec = stage.spec(hand.variant)
        run = self.plan.run_folder(spec)
        trained = self.train(stage, spec, hand.fold, start=start, needs=needs)
        fold = "fold_all" if hand.fold == "all" else hand.fold
        argv = ("panther_jax.bundle", "--run", str(run), "--folds", fold)
        argv += ("--checkpoint", hand.checkpoint, "--out", str(folder), "--overwrite")
        wanted = Bundled(folder, run, hand.fold, hand.checkpoint)
        return self._add(name, argv, (trained,), functools.partial(bundle_state, wanted))

    def _import_command(self, folder: Path) -> tuple[str, ...]:
        if self.plan.foundation is None:
            return ()
        source = ("--model-folder", self.plan.foundation, "--stem", "reinit")
        return ("weight_conversion.import_nnunet", *source, "--out", str(folder))

    def _imported(self, stage: Stage) -> State:
        if (self.plan.weights_folder(stage) / "provenance.json").is_file():
            return State("done")
        if self.plan.foundation is not None:
            return State("to do")
        why = f"{stage.imported}\n  Name that folder with --foundation, or leave it out with "
        return State("missing", f"{why}--foundation {SCRATCH}.")

    # ------------------------------------------------------------------------------ training

    def train(
        self, stage: Stage, spec: str, fold: str, *, start: Path | None, needs: Sequence[str]
    ) -> str:
        """One fold of a config."""
        plan, settings = self.plan, self.settings(stage, spec, start)
        raw = plan.raw_folder(stage, settings.data)
        store = plan.places.store(raw.name, settings.data.data_identifier)
        prepared = self.store(stage, spec, settings)
        run = plan.run_folder(spec)
        folder = plan.places.fold(run, "all" if fold == "all" else int(fold))
        argv = (*self._training_command(stage, spec), "--fold", fold, "--workdir", str(run))
        argv += ("--init", str(start) if start else SCRATCH)
        if fold.isdigit():
            argv += ("--validation.save-probabilities",)
        argv += self._overrides(stage)
        wanted = Training(folder, settings, start, store)
        look = functools.partial(training_state, wanted)
        return self._add(f"{run.name} fold {fold}", argv, (prepared, *needs), look)

    def store(self, stage: Stage, spec: str, settings: TrainConfig) -> str:
        """The preprocessed data: folds that start side by side must not preprocess side by side."""
        plan, data = self.plan, settings.data
        raw = plan.raw_folder(stage, data)
        folder = plan.places.store(raw.name, data.data_identifier)
        argv = (*self._training_command(stage, spec), "--prepare-only", "--init", SCRATCH)
        argv += self._overrides(stage)
        needs: tuple[str, ...] = ()
        if plan.demo and stage.demo_dataset:
            needs = (self._phantoms(stage, raw),)
        lacking = "" if plan.demo else self._lacking(data)
        name = f"store/{folder.parent.name}/{folder.name}"
        return self._add(name, argv, needs, functools.partial(store_state, folder, lacking))

    def settings(self, stage: Stage, spec: str, start: Path | None) -> TrainConfig:
        """The config that every fold of a training gets, as ``panther_jax.train`` resolves it."""
        key = (spec, start)
        if key not in self._settings:
            init = SCRATCH if start is None else str(start)
            options = Options(
                fold="all", root=self.plan.root, config=spec, init=init, demo=self.plan.demo
            )
            self._settings[key] = resolve(options, self._overrides(stage))[0]
        return self._settings[key]

    def _overrides(self, stage: Stage) -> tuple[str, ...]:
        shortened = self.plan.demo and stage.demo_epochs is not None
        return (*("--loop.epochs", str(stage.demo_epochs)) * shortened, *self.plan.overrides)

    def _training_command(self, stage: Stage, spec: str) -> tuple[str, ...]:
        plan = self.plan
        argv = ("panther_jax.train", "--config", spec, "--root", str(plan.root))
        if not plan.demo:
            return argv
        raw = ("--raw", str(plan.root / "raw" / stage.demo_dataset)) if stage.demo_dataset else ()
        return (*argv, "--demo", *raw)

    def _lacking(self, data: DataConfig) -> str:
        try:
            self.plan.places.raw(data.dataset, source=data.source)
        except FileNotFoundError as error:
            return str(error)
        return ""

    def _phantoms(self, stage: Stage, raw: Path) -> str:
        argv = ("panther_jax.datasets", "phantom", *stage.demo_phantoms, "--out", str(raw))
        done = raw / "dataset.json"
        return self._add(
            f"raw/{raw.name}", argv, (), lambda: State("done" if done.is_file() else "to do")
        )

    # ------------------------------------------------------------------------------- results

    def cross_validate(self, spec: str, folds: Sequence[str], *, needs: Sequence[str]) -> str:
        """The scores of the numbered folds of a config."""
        run = self.plan.run_folder(spec)
        folders = [run / f"fold_{fold}" for fold in folds]
        output = run / "crossval.json"
        argv = ("panther_jax.evaluate", "--runs", *map(str, folders), "--output", str(output))
        inputs = [folder / "validation_final" / "summary.json" for folder in folders]
        look = functools.partial(derived, output, inputs)
        return self._add(f"{run.name} cross-validation", (*argv, "--overwrite"), needs, look)

    def select(self, needs: Sequence[str]) -> str:
        """The ensemble that scores best."""
        plan, runs = self.plan, self._runs()
        output = plan.root / "ensembles" / f"{plan.named(plan.task)}.json"
        data = loading.load_config(plan.specs[0])[0].data
        argv = ("panther_jax.ensemble", "select", "--candidates", *map(str, runs))
        argv += ("--references", str(plan.raw_folder(plan.stage, data)))
        return self._result(f"ensembles/{output.name}", argv, output, needs)

    def report(self, needs: Sequence[str]) -> str:
        """The page about the runs."""
        plan = self.plan
        output = plan.root / "reports" / f"{plan.named(plan.task)}.html"
        argv = ("panther_jax.report", "--run", *map(str, self._runs()))
        return self._result(f"reports/{output.name}", argv, output, needs)

    def _result(self, name: str, argv: tuple[str, ...], output: Path, needs: Sequence[str]) -> str:
        inputs = [run / "crossval.json" for run in self._runs()]
        argv += ("--output", str(output), "--overwrite")
        return self._add(name, argv, needs, functools.partial(derived, output, inputs))

    def _runs(self) -> list[Path]:
        return [self.plan.run_folder(spec) for spec in self.plan.specs]


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
    drawn = [
        f"{text:<{width}}  " + ": ".join(filter(None, (state.status, *state.why.splitlines()[:1])))
        for text, state in lines
    ]
    lacking = {s.why: f"{t.strip('│└├─ ')}: {s.why}" for t, s in lines if s.status == "missing"}
    return "\n".join([*drawn, *([""] if lacking else []), *lacking.values()])


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
