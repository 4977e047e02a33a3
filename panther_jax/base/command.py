"""What all commands share: option spelling, logging, one message a failure, exit codes."""

import argparse
import errno
import logging
import traceback
from collections.abc import Callable, Sequence

from panther_jax.base import plugins
from panther_jax.base.console import setup_logging
from panther_jax.base.errors import PantherError

LOGGER = logging.getLogger("panther_jax")
DONE, FAILED, WRONG_USAGE = 0, 1, 2
FORESEEN = (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError)
"""What the system, the libraries and functions called with values out of range raise."""


class UsageError(PantherError, ValueError):
    """A command line that makes no sense; exit code 2."""


def normalized(argv: Sequence[str]) -> list[str]:
    """Arguments with ``_`` in option names written as ``-``; values are left alone."""
    result = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        result.append(f"{name}{equals}{value}")
    return result


def parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser with ``--quiet`` and ``--debug``, and an example under the help."""
    made = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--quiet", action="store_true", help="warnings and errors only")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_plugin_option(made)
    return made


def add_plugin_option(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--plugin FILE``, which loads the file when the command line is read."""
    parser.add_argument(
        "--plugin",
        type=plugins.plugin_argument,
        action="append",
        default=default,
        metavar="FILE",
        help="Python file that adds what a config or plans name (docs/extending.md); may be given "
        f"several times, as {plugins.VARIABLE} may list several",
    )


def run(body: Callable[[], str | None], *, quiet: bool, debug: bool) -> int:
    """Run the body of a command: print its result, turn a failure into one message and a code."""
    setup_logging(quiet=quiet)
    try:
        result = body()
    except UsageError as error:
        return _failed(error, WRONG_USAGE, debug)
    except KeyboardInterrupt:
        LOGGER.error("stopped; run the same command again to continue")
        return FAILED
    except (PantherError, *FORESEEN) as error:
        return _failed(error, FAILED, debug)
    except Exception as error:  # nobody foresaw it: say so, in one message too
        return _failed(_unexpected(error), FAILED, debug)
    if result:
        print(result)
    return DONE


def _unexpected(error: Exception) -> RuntimeError:
    unexpected = RuntimeError(
        f"unexpected {type(error).__name__}: {error}\n  This is a defect of panther_jax, or a file "
        "that it should have refused; run the command again with --debug and report what it prints."
    )
    unexpected.__cause__ = error
    return unexpected


def _failed(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror and not isinstance(error, PantherError):
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += "\n  Free some space and run the same command again: what is done is kept."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text += "\n  Choose another place, or get the right to write there."
    LOGGER.error("error: %s", text or type(error).__name__)
    return code
