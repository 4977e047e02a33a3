"""Choose an ensemble by its metrics: ``python -m panther_jax.ensemble select --candidates RUN …``.

Candidates are cross-validated runs. Each case is scored with what was predicted for it by the fold
that did not train on it (spec 05 §10.5); the result is a file for ``predict --ensemble``.
"""

import argparse
import contextlib
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panther_jax.base import command, workers
from panther_jax.base.command import UsageError
from panther_jax.base.console import Progress, table
from panther_jax.base.files import move, read_object, scratch_folder, write_json
from panther_jax.config.schema import CHECKPOINTS, CheckpointName
from panther_jax.ensembles import selection
from panther_jax.ensembles.selection import (
    Candidates,
    CaseSources,
    Mixture,
    Selection,
    SelectionError,
)
from panther_jax.ensembles.specification import EnsembleSpec, MemberSpec, write_ensemble
from panther_jax.evaluation import folds, metrics, statistics
from panther_jax.evaluation.folds import (
    Candidate,
    Fold,
    common_cases,
    open_candidates,
    validation_settings,
)
from panther_jax.plans.labels import Labels, LabelValue
from panther_jax.plans.plans import Plans
from panther_jax.store.store import Store, open_store

LOGGER = logging.getLogger("panther_jax")
FORMAT = "panther_jax.selection/1"
MAX_LISTED = 20
MAX_WORKERS = 4  # each unpacks the probabilities of one case
MM3_IN_ML = 1000.0
EXAMPLE = (
    "python -m panther_jax.ensemble select --candidates data/runs/mri_t2 data/runs/mri_t2_da5 "
    "--references data/raw/Dataset902_PantherT2 --output ensemble.json"
)


# ------------------------------------------------------------------------------- probabilities


def complete_probabilities(
    candidates: Sequence[Candidate],
    case_ids: Sequence[str],
    checkpoint: CheckpointName,
    *,
    store: Path | None = None,
) -> None:
    """Compute the probabilities that a validation has not kept, from the fold's checkpoint.

    They stay beside the fold's label maps. ``store`` is where the preprocessed cases are, if it is
    not the one of the references that the fold was validated with.

    Raises:
        FileNotFoundError: if there is no checkpoint or no store to compute them with.
    """
    for candidate in candidates:
        for fold in candidate.folds:
            missing = [
                case
                for case in case_ids
                if case in fold.predictions and not folds.probability_file(fold, case).is_file()
            ]
            if missing:
                _compute(fold, missing, checkpoint, _store(fold, missing, store))


def _store(fold: Fold, missing: Sequence[str], store: Path | None) -> Path:
    found = store or folds.store_of(fold)
    if found is not None and (fold.run / "config.json").is_file():
        return found
    remedy = (
        "Name the preprocessed store with --store, or train with --validation.save-probabilities."
        if (fold.run / "config.json").is_file()
        else "Let nnU-Net write them: nnUNetv2_train … --val --npz"
    )
    raise FileNotFoundError(
        f"{fold.validation} lacks the probabilities of {len(missing)} case(s): "
        f"{', '.join(missing[:MAX_LISTED])}\n  {remedy}"
    )


def _compute(fold: Fold, case_ids: Sequence[str], checkpoint: CheckpointName, folder: Path) -> None:
    from panther_jax.training import validation
    from panther_jax.weights import models

    store = open_store(folder)
    settings = validation_settings(fold.run)
    loaded = models.load_model(fold.run, folds=(str(fold.number),), checkpoint=checkpoint)
    dtype = read_object(fold.run / "config.json")["loop"]["compute_dtype"]
    _require_same_grid(store, loaded.plans, fold.run)
    predict = validation.fold_predictor(
        loaded.plans, settings, dtype=dtype, mirror_axes=loaded.mirror_axes
    )
    label = f"{fold.run.name} {fold.name}: predicting case"
    with (
        contextlib.closing(Progress(len(case_ids), label=label)) as bar,
        scratch_folder(fold.validation) as temporary,
    ):
        validation.validate(
            store,
            case_ids,
            predict,
            loaded.params[0],
            temporary,
            save_probabilities=True,
            progress=lambda case, done, _total: bar.update(done, case),
        )
        for case in case_ids:
            for ending in (".json", ".pkl", ".npz"):  # the npz last: it says that all is there
                if (temporary / f"{case}{ending}").is_file():
                    move(temporary / f"{case}{ending}", fold.validation / f"{case}{ending}")


def _require_same_grid(store: Store, plans: Plans, run: Path) -> None:
    fields = ("spacing", "normalization", "use_mask_for_norm", "transpose_forward", "intensity")
    for name in fields:
        if getattr(store.plans, name) != getattr(plans, name):
            raise SelectionError(
                f"the store {store.folder} was not made for {run}: {name} is "
                f"{getattr(store.plans, name)}, expected {getattr(plans, name)}\n"
                "  Name the store that the run was trained on with --store."
            )


# ------------------------------------------------------------------------------------ selection


@dataclass(frozen=True)
class Settings:
    """What to choose by, and how the cases are read."""

    weights: Mapping[str, float]
    max_members: int = selection.MAX_MEMBERS
    label: str | None = None
    num_workers: int = 1


def select(
    candidates: Sequence[Candidate],
    case_ids: Sequence[str],
    references: Mapping[str, Path],
    settings: Settings,
    *,
    reference_labels: Labels | None = None,
    cache: Path,
) -> Selection:
    """Choose members for the best aggregates; what the mixtures need is kept in ``cache``.

    Raises:
        ValueError: if the candidates' classes or files do not go together.
    """
    name, value = _tumor(settings.label, reference_labels or candidates[0].labels)
    known = Candidates(
        tuple(c.name for c in candidates),
        tuple(c.labels for c in candidates),
        tuple(_class(c, name) for c in candidates),
    )
    sources = [
        CaseSources(
            case,
            references[case],
            tuple(folds.probability_file(c.fold_of[case], case) for c in candidates),
        )
        for case in case_ids
    ]
    thresholds = selection.tumor_thresholds(known.labels, known.tumor, settings.max_members)
    work = functools.partial(
        selection.compact_case,
        folder=cache,
        candidates=known,
        reference_value=value,
        thresholds=thresholds,
    )
    pool = selection.Pool(known, _compact(work, sources, settings.num_workers))
    scored = 0

    def tell(counts: selection.Counts) -> None:
        nonlocal scored
        scored += 1
        LOGGER.debug("mixture %d: %s", scored, counts)

    LOGGER.info(
        "scoring %d candidates and their mixtures on %d cases…", len(candidates), len(sources)
    )
    found = selection.select(
        pool.score,
        len(candidates),
        settings.weights,
        max_members=settings.max_members,
        progress=tell,
    )
    LOGGER.info("%d mixtures scored", scored)
    return found


def _compact(
    work: Any, sources: Sequence[CaseSources], num_workers: int
) -> tuple[selection.CompactCase, ...]:
    bar = Progress(len(sources), label="reading probabilities: case", every_seconds=5.0)
    found, failed = {}, {}
    tasks = [(s.id, s) for s in sources]
    results = workers.map_cases(work, tasks, workers=num_workers)
    for done, (case_id, result) in enumerate(results, start=1):
        if isinstance(result, workers.Failure):
            failed[case_id] = result.message
        else:
            found[case_id] = result
        bar.update(done, case_id)
    bar.close()
    if failed:
        lines = [f"  {case}: {text}" for case, text in sorted(failed.items())[:MAX_LISTED]]
        raise SelectionError(f"{len(failed)} case(s) cannot be used:\n" + "\n".join(lines))
    return tuple(found[s.id] for s in sources)


def _tumor(name: str | None, labels: Labels) -> tuple[str, LabelValue]:
    if name is None:
        return metrics.scored_label(labels)
    named = dict(labels.classes)
    if name not in named:
        raise SelectionError(f"--label {name!r} is not declared; there are: {', '.join(named)}")
    return name, named[name]


def _class(candidate: Candidate, name: str) -> LabelValue:
    named = dict(candidate.labels.classes)
    if name not in named:
        raise SelectionError(
            f"candidate {candidate.name} does not predict {name!r}, but {', '.join(named)}\n"
            "  Leave it out, or name another class with --label."
        )
    return named[name]


def ensemble_spec(
    candidates: Sequence[Candidate], mixture: Mixture, checkpoint: CheckpointName
) -> EnsembleSpec:
    """The ensemble file's content: members predict as they were validated."""
    members = []
    for candidate, count in zip(candidates, mixture.counts, strict=True):
        if not count:
            continue
        settings = validation_settings(candidate.run)
        members.append(
            MemberSpec(
                candidate.name,
                candidate.run,
                folds=tuple(str(fold.number) for fold in candidate.folds),
                checkpoint=checkpoint,
                weight=float(count),
                mirror_axes="checkpoint" if settings.mirror else (),
                step_size=settings.step_size,
            )
        )
    return EnsembleSpec(tuple(members))


# -------------------------------------------------------------------------------------- results


def selection_json(
    candidates: Sequence[Candidate],
    found: Selection,
    settings: Settings,
    case_ids: Sequence[str],
    *,
    spec: Path,
) -> dict[str, Any]:
    """The whole selection as a JSON-able dictionary."""
    names = [c.name for c in candidates]

    def entry(mixture: Mixture) -> dict[str, Any]:
        counts = zip(names, mixture.counts, strict=True)
        return {
            "members": {name: n for name, n in counts if n},
            "aggregates": dict(mixture.aggregates),
            "objective": mixture.objective,
        }

    ranks = statistics.mean_ranks([single.aggregates for single in found.singles])
    return {
        "format": FORMAT,
        "ensemble": spec.name,
        "metrics": dict(settings.weights),
        "num_cases": len(case_ids),
        "cases": list(case_ids),
        "candidates": [
            {"name": c.name, "model": str(c.run), "mean_rank": rank, **entry(single)}
            for c, rank, single in zip(candidates, ranks, found.singles, strict=True)
        ],
        "steps": [{"added": names[step.added], **entry(step)} for step in found.steps],
        "final": entry(found.final),
    }


def selection_text(result: Mapping[str, Any]) -> str:
    """Tables of the candidates, the steps and the final ensemble."""
    header = [
        *(statistics.aggregate_title(name) for name in statistics.aggregate_names()),
        "objective",
    ]
    singles = [[c["name"], *_cells(c), f"{c['mean_rank']:.1f}"] for c in result["candidates"]]
    steps = [
        [f"{number}. + {step['added']}", *_cells(step)]
        for number, step in enumerate(result["steps"], start=1)
    ]
    final = result["final"]
    mixture = ", ".join(f"{n} × {name}" for name, n in final["members"].items())
    best = max(result["candidates"], key=lambda c: c["objective"])
    gain = final["objective"] - best["objective"]
    return "\n\n".join(
        [
            table(["candidate", *header, "mean rank"], singles),
            table(["step", *header], steps),
            table(["ensemble", *header], [[mixture, *_cells(final)]]),
            f"objective of {result['num_cases']} out-of-fold cases: "
            f"{', '.join(_weighted(result['metrics']))}; {gain:+.3f} over the best candidate. "
            "Choosing on the same cases flatters the choice a little.",
        ]
    )


def _weighted(weights: Mapping[str, float]) -> list[str]:
    titles = {name: statistics.aggregate_title(name) for name in weights}
    return [f"{weight:g} × {titles[name]}" for name, weight in weights.items() if weight]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    values = [
        entry["aggregates"][name] / (MM3_IN_ML if name == statistics.RMSE else 1)
        for name in statistics.aggregate_names()
    ]
    return [f"{value:.3f}" for value in (*values, entry["objective"])]


# -------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("panther_jax.ensemble", "Choose the members of an ensemble.", EXAMPLE)
    actions = parser.add_subparsers(dest="action", required=True)
    choose = actions.add_parser(
        "select",
        help="greedily, by metrics of out-of-fold predictions",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = choose.add_argument
    add("--candidates", type=Path, nargs="+", required=True, metavar="RUN")
    add("--references", type=Path, required=True, metavar="DIR", help="label maps, or a data set")
    add("--output", type=Path, required=True, metavar="SPEC.json", help="for predict --ensemble")
    add("--overwrite", action="store_true", help="replace the output")
    add(
        "--metric",
        nargs="+",
        metavar="M",
        help=f"what to choose by: {', '.join(selection.objective_names())} (default: all)",
    )
    add("--weights", type=float, nargs="+", metavar="W", help="a weight a metric (default: 1)")
    add("--max-members", type=int, default=selection.MAX_MEMBERS, help="default: %(default)s")
    add("--label", help="class to score (default: the tumor)")
    add("--checkpoint", choices=CHECKPOINTS, default="final", help="default: %(default)s")
    add("--splits", type=Path, help="splits_final.json, if runs do not know theirs")
    add("--store", type=Path, help="preprocessed cases, to compute missing probabilities from")
    add("--allow-missing", action="store_true", help="score on the cases that all have validated")
    add("--cache", type=Path, help="folder for unpacked probabilities (default: beside the output)")
    add(
        "--workers", type=int, help=f"processes that unpack (default: cores, at most {MAX_WORKERS})"
    )
    for action in actions.choices.values():
        action.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS)
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
        command.add_plugin_option(action, default=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    return command.run(lambda: _select(arguments), quiet=arguments.quiet, debug=arguments.debug)


def _select(arguments: argparse.Namespace) -> str:
    settings = _settings(arguments)
    output: Path = arguments.output
    report = output.with_name(output.name.removesuffix(".json") + ".selection.json")
    if output.exists() and not arguments.overwrite:
        raise SelectionError(f"{output} exists; pass --overwrite to replace it, or name another")
    candidates = open_candidates(
        arguments.candidates, arguments.checkpoint, splits=arguments.splits
    )
    folder = folds.reference_folder(arguments.references)
    references, twice = folds.label_files(folder)
    if twice:
        raise SelectionError("\n".join(f"case {c!r}: {text}" for c, text in twice.items()))
    cases = common_cases(candidates, references, allow_missing=arguments.allow_missing)
    reference_labels = folds.read_labels(folds.find_dataset_json([folder]))
    _tumor(settings.label, reference_labels or candidates[0].labels)  # before hours of predicting
    complete_probabilities(candidates, cases, arguments.checkpoint, store=arguments.store)
    cache: Path = arguments.cache or output.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".selection-", dir=cache) as temporary:
        found = select(
            candidates,
            cases,
            references,
            settings,
            reference_labels=reference_labels,
            cache=Path(temporary),
        )
    write_ensemble(output, ensemble_spec(candidates, found.final, arguments.checkpoint))
    result = selection_json(candidates, found, settings, cases, spec=output)
    write_json(report, result)
    return f"{selection_text(result)}\n\n{output}\n{report}"


def _settings(arguments: argparse.Namespace) -> Settings:
    known = selection.objective_names()
    names = arguments.metric or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--metric {unknown[0]!r} is not one of {', '.join(known)}")
    given = arguments.weights or [1.0] * len(names)
    if len(given) != len(names):
        raise UsageError(f"{len(given)} --weights for {len(names)} metrics: {', '.join(names)}")
    if len(set(names)) != len(names):
        raise UsageError(f"--metric names one twice: {', '.join(names)}")
    if any(not w >= 0 for w in given) or not any(given):
        raise UsageError(f"--weights must be positive or 0, not all 0, found {given}")
    if arguments.max_members < 1:
        raise UsageError(f"--max-members must be at least 1, found {arguments.max_members}")
    if arguments.workers is not None and arguments.workers < 0:
        raise UsageError(f"--workers must not be negative, found {arguments.workers}")
    weights = {known[n]: w for n, w in zip(names, given, strict=True)}
    count = (
        min(MAX_WORKERS, os.cpu_count() or 1) if arguments.workers is None else arguments.workers
    )
    return Settings(weights, arguments.max_members, arguments.label, count)


if __name__ == "__main__":
    sys.exit(main())
