"""Public weights: ``python -m panther_jax.weights list``, ``get NAME``, ``show PATH``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from panther_jax.base import command
from panther_jax.weights import show
from panther_jax.weights.names import AmbiguousModel, places, resolve_model
from panther_jax.weights.public import KNOWN, listing

EXAMPLE = "python -m panther_jax.weights get winner-t1"


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "panther_jax.weights",
        "Known public weights: list them, get them, show what model folders hold. A mirror of "
        "Zenodo is named by the environment variable PANTHER_JAX_ZENODO_API.",
        EXAMPLE,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|get|show")
    listed = actions.add_parser("list", help="the known public weights")
    listed.add_argument("--json", action="store_true", help="for programs")
    got = actions.add_parser("get", help="download weights, or verify those that are there")
    got.add_argument("what", metavar="NAME|DOI", help="a known name, or a Zenodo record")
    got.add_argument("--out", type=Path, help="folder (default: ROOT/weights/NAME)")
    shown = actions.add_parser("show", help="what the models in a folder are")
    shown.add_argument("what", metavar="PATH|NAME", help="a folder, or a known name")
    shown.add_argument("--json", action="store_true", help="for programs")
    for action in (listed, got, shown):
        action.add_argument("--root", type=Path, default=Path("data"),
                            help="root that holds weights (default: %(default)s)")  # fmt: skip
        for option in ("--quiet", "--debug"):  # also after the action
            action.add_argument(option, action="store_true", default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS)  # fmt: skip
    return parser


def _list(arguments: argparse.Namespace) -> str:
    if arguments.json:
        return json.dumps([entry.to_json() for entry in KNOWN.values()], indent=2)
    there = {name: next((p for p in places(entry, arguments.root) if p.is_dir()), None)
             for name, entry in KNOWN.items()}  # fmt: skip
    return listing({name: str(place) for name, place in there.items() if place is not None})


def _get(arguments: argparse.Namespace) -> str:
    from panther_jax.weights.download import get

    found = get(arguments.what, out=arguments.out, root=arguments.root)
    models = show.find_models(found.folder)
    first = f"{found.folder}: " + ("downloaded" if found.fresh else "was there, and is unchanged")
    return "\n\n".join([first, *(model.to_text() for model in models)])


def _show(arguments: argparse.Namespace) -> str:
    folder = Path(arguments.what)
    if not folder.exists() and arguments.what in KNOWN:
        try:
            folder = resolve_model(arguments.what, arguments.root)
        except AmbiguousModel:  # all of them, to choose by
            folder = places(KNOWN[arguments.what], arguments.root)[0]
    models = show.require_models(folder)
    if arguments.json:
        return json.dumps([model.to_json() for model in models], indent=2)
    return "\n\n".join(model.to_text() for model in models)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    actions = {"list": _list, "get": _get, "show": _show}
    return command.run(
        lambda: actions[arguments.action](arguments), quiet=arguments.quiet, debug=arguments.debug
    )


if __name__ == "__main__":
    sys.exit(main())
