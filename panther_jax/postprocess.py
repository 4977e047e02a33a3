"""Post-processing of label maps: largest component, its search, the organisers' filter (spec 05).

``determine`` tries on cross-validated predictions whether keeping only the largest component helps
(§11.2), and writes ``postprocessing.json`` as nnU-Net does; ``apply`` replays such a file.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from panther_jax import command, metrics
from panther_jax.imageio import (
    SUPPORTED_ENDINGS,
    read_dataset_json,
    read_label,
    write_label,
)
from panther_jax.plans import Labels, LabelValue, read_json
from panther_jax.workers import Failure, map_cases

LOGGER = logging.getLogger("panther_jax")

LARGEST_COMPONENT = "remove_all_but_largest_component_from_segmentation"  # nnU-Net's name of it
MIN_COMPONENT_VOXELS = 10  # spec 05 §13.2
MIN_PANCREAS_SHARE = 0.15
JSON_NAME, FOLDER_NAME, SUMMARY_NAME = "postprocessing.json", "postprocessed", "summary.json"

Step = tuple[int, ...]
"""Labels whose union is reduced to its largest component."""


class PostprocessError(ValueError):
    """Predictions that cannot be post-processed; the message names them."""


# ---------------------------------------------------------------------------------- components


def keep_largest_component(
    label_map: Integer[np.ndarray, "..."], labels: LabelValue | Sequence[Any]
) -> Integer[np.ndarray, "..."]:
    """Set voxels of ``labels`` to 0 outside the largest component of their union (spec 05 §11.1).

    Neighbours touch at a corner or nearer. Of components of equal, largest size all stay.
    """
    result = label_map.copy()
    mask = np.isin(label_map, flat_labels(labels))
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return result
    inside = mask[box[0]]
    components = _components(inside, np.ones((3,) * mask.ndim))
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    result[box[0]][inside & (sizes[components] < sizes.max())] = 0
    return result


def flat_labels(labels: Any) -> Step:
    """One label, a region, or a list of either, as the labels in it, ascending.

    Raises:
        TypeError: if something else is in it.
    """
    if isinstance(labels, (list, tuple)):
        return tuple(sorted({value for part in labels for value in flat_labels(part)}))
    if not isinstance(labels, int):
        raise TypeError(f"label {labels!r} is not an integer")
    return (labels,)


def filter_components(
    tumor_mask: Bool[np.ndarray, "z y x"],
    pancreas_mask: Bool[np.ndarray, "_ _ _"],
    *,
    min_voxels: int = MIN_COMPONENT_VOXELS,
    min_share: float = MIN_PANCREAS_SHARE,
) -> Bool[np.ndarray, "z y x"]:
    """Keep components of enough voxels, enough of which lie in the pancreas (spec 05 §13.2).

    Neighbours share a face. Both limits are inclusive; the share is of the component.

    Raises:
        ValueError: if the masks are on different grids.
    """
    if tumor_mask.shape != pancreas_mask.shape:
        raise ValueError(
            f"tumour mask of shape {tumor_mask.shape}, pancreas mask of {pancreas_mask.shape}; "
            "resample the pancreas onto the tumour's grid"
        )
    components = _components(tumor_mask, None)
    sizes = np.bincount(components.ravel())
    inside = np.bincount(components[pancreas_mask], minlength=len(sizes))
    # a quotient, not a product: it alone is exact at the limit
    keep = (sizes >= min_voxels) & (inside / np.maximum(sizes, 1) >= min_share)
    keep[0] = False
    return keep[components]


def _components(mask: np.ndarray, structure: np.ndarray | None) -> np.ndarray:
    found: Any = ndimage.label(mask, structure)
    return found[0]


# -------------------------------------------------------------------------------------- search


@dataclass(frozen=True)
class _Case:
    """A prediction, its reference, and what its labels mean."""

    prediction: Path
    reference: Path
    classes: tuple[LabelValue, ...]
    ignore_id: int | None
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Search:
    """Result of :func:`determine_postprocessing`: the accepted chain, both summaries."""

    chain: tuple[Any, ...]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    predictions: tuple[Path, ...]

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The labels of each accepted step."""
        return tuple(flat_labels(labels) for labels in self.chain)

    def to_json(self) -> dict[str, Any]:
        """The content of nnU-Net's ``postprocessing.json`` (spec 05 §11.2)."""
        scores = {
            name: {key: summary[key] for key in ("foreground_mean", "mean")}
            for name, summary in (("input_folder", self.before), ("postprocessed", self.after))
        }
        return scores | {
            "postprocessing_fns": [LARGEST_COMPONENT] * len(self.chain),
            "postprocessing_kwargs": [{"labels_or_regions": labels} for labels in self.chain],
        }


def determine_postprocessing(
    predictions: Sequence[Path],
    references: Path,
    *,
    classes: Sequence[LabelValue],
    ignore_id: int | None = None,
    workers: int = 0,
) -> Search:
    """Search the largest-component steps that raise Dice (spec 05 §11.2).

    All foreground labels at once are tried first: accepted if the mean Dice rises and that of no
    class falls. Then each class, if there are several, on top of what was accepted: if its own
    Dice rises. ``classes`` are labels or regions in declared order.

    Raises:
        PostprocessError: if there is no prediction, a case twice, or a case cannot be scored.
    """
    cases = _paired(predictions, references, tuple(classes), ignore_id)
    chain: list[Any] = []
    before = best = _score(cases, chain, workers)
    together = list(flat_labels(classes))
    candidate = _score(cases, [together], workers)
    if _all_gain(best, candidate):
        chain, best = [together], candidate
    for value in classes if len(classes) > 1 else ():
        candidate = _score(cases, [*chain, value], workers)
        key = metrics.class_key(value)
        if candidate["mean"][key]["Dice"] > best["mean"][key]["Dice"]:
            chain, best = [*chain, value], candidate
    return Search(tuple(chain), before, best, tuple(case.prediction for case in cases))


def _all_gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    classes = zip(before["mean"].values(), after["mean"].values(), strict=True)
    return after["foreground_mean"]["Dice"] > before["foreground_mean"]["Dice"] and not any(
        new["Dice"] < old["Dice"] for old, new in classes
    )


def _paired(
    predictions: Sequence[Path],
    references: Path,
    classes: tuple[LabelValue, ...],
    ignore_id: int | None,
) -> list[_Case]:
    if not classes:
        raise PostprocessError("no class to post-process; dataset.json declares background only")
    by_name = {path.name: path for path in predictions}
    if len(by_name) < len(predictions):
        names = [path.name for path in predictions]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise PostprocessError(
            f"cases predicted twice: {', '.join(twice[:20])}\n"
            "  Each case must be in the validation of one fold only."
        )
    if not by_name:
        raise PostprocessError("no prediction to score; name a folder of label maps")
    missing = [name for name in by_name if not (references / name).is_file()]
    if missing:
        raise PostprocessError(
            f"{references}: no reference for {', '.join(missing[:20])}; references are named as "
            "predictions are"
        )
    return [
        _Case(path, references / name, classes, ignore_id) for name, path in sorted(by_name.items())
    ]


def _score(cases: Sequence[_Case], chain: Sequence[Any], workers: int) -> dict[str, Any]:
    """Summary of all cases after a chain of steps; predictions are read again, not kept."""
    steps = tuple(flat_labels(labels) for labels in chain)
    tasks = [(case.prediction.name, replace(case, steps=steps)) for case in cases]
    scored, broken = [], []
    for name, result in map_cases(_score_case, tasks, workers=workers):
        if isinstance(result, Failure):
            broken.append(f"{name}: {result.message}")
        else:
            scored.append(result)
    if broken:
        raise PostprocessError("\n".join(["cases that cannot be scored:", *sorted(broken)[:20]]))
    return metrics.summarise(scored)


def _score_case(case: _Case) -> dict[str, Any]:
    reference, _ = read_label(case.reference)
    prediction = postprocess(read_label(case.prediction)[0], case.steps)
    return {
        "metrics": metrics.label_counts(reference, prediction, case.classes, case.ignore_id),
        "prediction_file": str(case.prediction),
        "reference_file": str(case.reference),
    }


# -------------------------------------------------------------------------------------- replay


def read_postprocessing(path: Path) -> tuple[Step, ...]:
    """The steps of a ``postprocessing.json``.

    Raises:
        FileNotFoundError, PostprocessError: if it is missing, or names a function we do not know.
    """
    stored = read_json(path)
    functions = stored.get("postprocessing_fns") if isinstance(stored, Mapping) else None
    settings = stored.get("postprocessing_kwargs") if isinstance(stored, Mapping) else None
    if not isinstance(functions, list) or not isinstance(settings, list):
        raise PostprocessError(
            f"{path}: expected the lists 'postprocessing_fns' and 'postprocessing_kwargs', as "
            "`determine` writes them"
        )
    unknown = [name for name in functions if name != LARGEST_COMPONENT]
    if unknown or len(functions) != len(settings):
        raise PostprocessError(
            f"{path}: {len(functions)} functions {functions} with {len(settings)} settings; known "
            f"is {LARGEST_COMPONENT}, with 'labels_or_regions'"
        )
    try:
        return tuple(flat_labels(one["labels_or_regions"]) for one in settings)
    except (KeyError, TypeError, ValueError):
        raise PostprocessError(f"{path}: 'labels_or_regions' is missing or not integers") from None


def postprocess(
    label_map: Integer[np.ndarray, "z y x"], steps: Sequence[Step]
) -> Integer[np.ndarray, "z y x"]:
    """Apply steps in order."""
    for labels in steps:
        label_map = keep_largest_component(label_map, labels)
    return label_map


def postprocess_files(
    paths: Sequence[Path], steps: Sequence[Step], output: Path, *, workers: int = 0
) -> None:
    """Apply steps to label map files; they keep their names and geometry.

    Raises:
        PostprocessError: listing the files that cannot be used, after all others are done.
    """
    output.mkdir(parents=True, exist_ok=True)
    tasks = [(path.name, (path, tuple(steps), output / path.name)) for path in paths]
    broken = []
    for name, result in map_cases(_postprocess_file, tasks, workers=workers):
        if isinstance(result, Failure):
            broken.append(f"{name}: {result.message}")
    if broken:
        raise PostprocessError(
            "\n".join(
                [f"{len(broken)} of {len(tasks)} files cannot be post-processed:", *sorted(broken)]
            )
        )


def _postprocess_file(task: tuple[Path, tuple[Step, ...], Path]) -> None:
    path, steps, output = task
    label_map, geometry = read_label(path)
    write_label(output, postprocess(label_map, steps), geometry)


# -------------------------------------------------------------------------------------- command

EXAMPLE = """python -m panther_jax.postprocess determine --output data/post \\
      --predictions data/runs/mri_t2/fold_*/validation_final --references data/raw/D902/labelsTr
  python -m panther_jax.postprocess apply --input predictions --output cleaned \\
      --postprocessing data/post/postprocessing.json"""


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.postprocess",
        "Search, on validation cases, whether keeping only the largest component helps; apply it.",
        EXAMPLE,
    )
    parser.add_argument(
        "action", choices=("determine", "apply"), help="search, or use what it found"
    )
    search = parser.add_argument_group("determine")
    search.add_argument("--predictions", type=Path, nargs="+", help="folders of validated cases")
    search.add_argument("--references", type=Path, help="folder of reference label maps")
    search.add_argument("--dataset-json", type=Path, help="default: searched near both folders")
    replay = parser.add_argument_group("apply")
    replay.add_argument("--input", type=Path, help="folder of label maps")
    replay.add_argument("--postprocessing", type=Path, help="postprocessing.json of `determine`")
    parser.add_argument("--output", type=Path, help="folder; default for one --predictions: there")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    return parser


def _determine(arguments: argparse.Namespace) -> str:
    folders: list[Path] = arguments.predictions
    output = arguments.output or folders[0]
    _refuse([output / JSON_NAME, output / FOLDER_NAME], overwrite=arguments.overwrite)
    dataset = read_dataset_json(
        arguments.dataset_json or _find_dataset_json(folders[0], arguments.references)
    )
    labels = Labels.from_dataset_json(dataset)
    files = [path for folder in folders for path in _label_maps(folder, dataset["file_ending"])]
    search = determine_postprocessing(
        files,
        arguments.references,
        classes=[value for _, value in labels.classes],
        ignore_id=labels.ignore_id,
        workers=arguments.workers,
    )
    postprocess_files(
        search.predictions, search.steps, output / FOLDER_NAME, workers=arguments.workers
    )
    entries = [
        {**case, "prediction_file": str(output / FOLDER_NAME / Path(case["prediction_file"]).name)}
        for case in search.after["metric_per_case"]
    ]
    summary = {**search.after, "metric_per_case": entries}
    metrics.write_summary(output / FOLDER_NAME / SUMMARY_NAME, summary)
    metrics.write_summary(output / JSON_NAME, search.to_json())
    before, after = (s["foreground_mean"]["Dice"] for s in (search.before, search.after))
    accepted = ", then ".join(f"largest component of {labels}" for labels in search.chain)
    LOGGER.info("%s: mean Dice %.4f -> %.4f", accepted or "nothing helps", before, after)
    return str(output / JSON_NAME)


def _apply(arguments: argparse.Namespace) -> str:
    steps = read_postprocessing(arguments.postprocessing)
    paths = _label_maps(arguments.input, SUPPORTED_ENDINGS)
    output: Path = arguments.output
    if output.resolve() == arguments.input.resolve():
        raise command.UsageError("--output must be another folder than --input")
    _refuse([output / path.name for path in paths], overwrite=arguments.overwrite)
    postprocess_files(paths, steps, output, workers=arguments.workers)
    return str(output)


def _find_dataset_json(predictions: Path, references: Path) -> Path:
    folder = predictions.resolve()
    near = (folder, *folder.parents[:2], references.resolve().parent)
    for candidate in near:
        if (candidate / "dataset.json").is_file():
            return candidate / "dataset.json"
    raise FileNotFoundError(
        f"no dataset.json in {', '.join(map(str, near))}; name it with --dataset-json"
    )


def _label_maps(folder: Path, endings: str | tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected label maps in it")
    found = [p for p in sorted(folder.iterdir()) if p.name.endswith(endings) and p.name[0] != "."]
    if not found:
        raise FileNotFoundError(f"{folder} holds no label map ({endings})")
    return found


def _refuse(paths: Sequence[Path], *, overwrite: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise PostprocessError(f"{there[0]} exists; choose another --output, or pass --overwrite")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    needed = ("predictions", "references")
    if arguments.action == "apply":
        needed = ("input", "output", "postprocessing")
    elif arguments.predictions and len(arguments.predictions) > 1:
        needed = (*needed, "output")
    missing = [f"--{name}" for name in needed if getattr(arguments, name) is None]
    if missing:
        parser.error(f"{arguments.action} needs {', '.join(missing)}")
    if arguments.workers < 0:
        parser.error(f"--workers must not be negative, found {arguments.workers}")
    action = _determine if arguments.action == "determine" else _apply
    return command.run(lambda: action(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    raise SystemExit(main())
