"""Every command with malformed input: one message that names thing and remedy, no trace of it."""

import fnmatch
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from bad_inputs import ROOT, TABLE, Bad, build

from panther_jax.base import command

SECONDS = 10.0
PARTS = (
    "raw", "plans", "store", "bundle", "run", "folder", "scans", "in", "cv", "maps", "post", "spec",
    "download", "configs",
)  # fmt: skip
REMEDY = re.compile(
    r"expected|choose|pass |--\w|\b(re)?run\b|[Ff]ix|[Rr]emove|[Cc]opy|[Rr]ename|[Dd]eclare|must|"
    r"[Nn]ame|[Tt]rain|there (is|are)|make|[Rr]estore|[Dd]elete|give|[Pp]ut|[Cc]orrect|did you "
    r"mean|[Ii]mport|[Uu]se|unpack|lower|[Ee]xport|convert|[Rr]esample|[Rr]eplace|[Ss]ave|download|"
    r"another|[Tt]ake|missing|does not exist|[Ll]eave|[Rr]enumber|needs|only|check|[Pp]redict"
)
"""Words of which a message that says what to do, or what was expected, has at least one."""
INTERNAL = re.compile(
    r"^error: (unexpected|'[^']*'$)|NoneType|object is not|has no attribute|unhashable|"
    r"to unpack|not subscriptable|out of range|JaxRuntimeError|list indices",
    re.MULTILINE,
)
"""What a message looks like that nobody wrote."""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("world"))


def prepare(bad: Bad, world: Path, box: Path) -> list[str]:
    """Copy what the row names, damage it, and return the command line."""
    for part in PARTS:
        # the spec of an ensemble names the bundle beside it
        if f"{{{part}}}" in bad.argv or (part == "bundle" and "{spec}" in bad.argv):
            shutil.copytree(world / part, box / part)
    for part in ("spec", "configs", "raw", "plans"):
        (box / part).mkdir(exist_ok=True)
    if bad.damage is not None:
        bad.damage(box)
    places = {part: str(box / part) for part in (*PARTS, "out", "root", "work")}
    places |= {"box": str(box), "spec": str(box / "spec" / "ensemble.json")}
    places["own"] = str(box / "configs" / "own.py")
    return [argument.format(**places) for argument in shlex.split(bad.argv)]


def snapshot(box: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in box.rglob("*"):
        if not path.is_dir():
            status = path.lstat()
            found[path.relative_to(box).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("bad", TABLE, ids=lambda b: b.id)
def test_malformed_input(bad, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path.parent))
    monkeypatch.delenv("nnUNet_raw", raising=False)
    argv = prepare(bad, world, tmp_path)
    before = snapshot(tmp_path)
    main = importlib.import_module(bad.command).main
    capfd.readouterr()
    start = time.monotonic()
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    seconds = time.monotonic() - start
    out, err = capfd.readouterr()
    assert code == bad.code, err
    assert seconds < SECONDS
    assert "Traceback" not in out + err, err
    if "╭─" in err:  # a field of the config: tyro's box
        message = err
    else:
        assert err.count("error: ") == 1, err
        message = err[err.index("error: ") :]
    assert re.search(bad.says, message, re.DOTALL), message
    assert REMEDY.search(message) or "usage:" in err, message  # argparse's own
    assert not INTERNAL.search(message), message
    changed = {p for p, s in snapshot(tmp_path).items() if before.get(p) != s} | {
        p for p in before if not (tmp_path / p).exists() and not (tmp_path / p).is_symlink()
    }
    left = [p for p in changed if not any(fnmatch.fnmatch(p, g) for g in bad.leaves)]
    assert not left, left


SUBPROCESSES = (
    "datasets-image_cut",
    "evaluate-predictions_missing",
    "postprocess-a_function_of_one's_own",
    "stages-jobs_0",
)


@pytest.mark.parametrize("name", SUBPROCESSES)
def test_malformed_input_as_a_user_types_it(name, world, tmp_path):
    bad = next(b for b in TABLE if b.id == name)
    argv = [sys.executable, "-m", bad.command, *prepare(bad, world, tmp_path)]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, check=False
    )
    assert done.returncode == bad.code and not done.stdout
    assert re.search(bad.says, done.stderr, re.DOTALL) and "Traceback" not in done.stderr


def test_debug_shows_the_traceback(world, tmp_path, capfd):
    bad = next(b for b in TABLE if b.id == "postprocess-file_broken")
    argv = prepare(bad, world, tmp_path)
    main = importlib.import_module(bad.command).main
    assert main([*argv, "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_what_nobody_foresaw_is_one_message_too(capfd):
    def body():
        return {}["nothing"]

    assert command.run(body, quiet=False, debug=False) == command.FAILED
    err = capfd.readouterr().err
    assert "unexpected KeyError: 'nothing'" in err and "--debug" in err
    assert "Traceback" not in err
    assert command.run(body, quiet=False, debug=True) == command.FAILED
    assert "in body" in capfd.readouterr().err


def test_the_table_covers_every_command():
    counts = Counter(bad.command for bad in TABLE)
    assert len(TABLE) >= 150 and len({bad.id for bad in TABLE}) == len(TABLE)
    commands = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for package in ("panther_jax", "weight_conversion")
        for path in (ROOT / package).rglob("*.py")
        if "def main(argv" in path.read_text(encoding="utf-8")
    }
    assert commands == set(counts), commands ^ set(counts)
