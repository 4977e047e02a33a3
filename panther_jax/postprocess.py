"""Search post-processing and apply it: ``python -m panther_jax.postprocess``."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from panther_jax.base import command
from panther_jax.base.folds import FOLD_ALL
from panther_jax.evaluation import metrics
from panther_jax.evaluation.folds import SEEN
from panther_jax.evaluation.postprocessing import (
    PostprocessError,
    determine_postprocessing,
    postprocess_files,
    read_postprocessing,
)
from panther_jax.images.formats import FORMATS
from panther_jax.images.raw_dataset import read_dataset_json
from panther_jax.plans.labels import Labels

LOGGER = logging.getLogger("panther_jax")
JSON_NAME, FOLDER_NAME, SUMMARY_NAME = "postprocessing.json", "postprocessed", "summary.json"


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
    folders = _of_unseen_cases(arguments.predictions)
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


def _of_unseen_cases(folders: Sequence[Path]) -> list[Path]:
    """The folders without those of a fold of all cases, unless there is no other."""
    seen = [folder for folder in folders if folder.resolve().parent.name == FOLD_ALL]
    kept = [folder for folder in folders if folder not in seen]
    if seen:
        LOGGER.warning("%s: %s%s", seen[0], SEEN, "; it is left out" if kept else "")
    return kept or seen


def _apply(arguments: argparse.Namespace) -> str:
    steps = read_postprocessing(arguments.postprocessing)
    paths = _label_maps(arguments.input, FORMATS.names)
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
