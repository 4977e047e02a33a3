"""The shape of the code: who imports whom, what is free of JAX and torch, how long things are."""

import ast
import builtins
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "panther_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
ALL_CODE = [*MODULES, *sorted((ROOT / "weight_conversion").glob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TRAIN_LINES = 600, 60, 250

# A room imports only rooms that stand before it; the faces beside them import any, and each other.
ROOMS = (
    "base", "plans", "config", "images", "store", "preprocessing", "planner", "evaluation",
    "ensembles", "reporting", "network", "augment", "devices", "weights", "inference", "training",
    "panther",
)  # fmt: skip
JAX_FREE_ROOMS = ROOMS[: ROOMS.index("network")]
JAX_FREE = (
    "config", "predict", "evaluate", "preprocess", "planning", "datasets", "stages",
    "report", "postprocess", "bundle", "inference.tiles", "inference.export", "inference.folder",
    "inference.loading", "training.session", "training.workdir", "training.data",
    "training.signals", "training.provenance", "training.options", "training.dry_run",
    "panther.chain", "panther.archives",
    "panther.configurations", "panther.roi", "panther.runner", "panther.recipe",
)  # fmt: skip
LAZY = {
    "SimpleITK", "grain", "tyro", "matplotlib", "PIL", "orbax", "safetensors", "pydicom",
    "highdicom",
}  # fmt: skip


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(tree, *, top_level_only=False):
    """Modules imported, as (name, at top level)."""
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(name):
    """The room of a dotted module name of the package, or None for a face."""
    first = name.partition(".")[0]
    return first if (PACKAGE / first / "__init__.py").is_file() else None


def test_every_folder_is_a_room():
    folders = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    room = room_of(name)
    for imported in imports(parsed(path)):
        target = imported.removeprefix("panther_jax.")
        if room and imported.startswith("panther_jax."):
            other = room_of(target)
            assert other, f"{name} imports the face {target}: move what it needs into a room"
            assert ROOMS.index(other) <= ROOMS.index(room), f"{name} imports {target}"
        assert imported.split(".")[0] not in ("torch", "nnunetv2", "multiprocessing.fork")
        assert imported != "pickle" or name == "store.pickles", f"{name} imports pickle"
        assert imported.split(".")[0] != "flax" or name == "network.unet"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_optional_and_slow_libraries_are_imported_where_used(path):
    for imported in imports(parsed(path), top_level_only=True):
        assert imported.split(".")[0] not in LAZY, f"{imported} at the top of {path.name}"


def run_python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )


def test_jax_free_modules_do_not_load_jax():
    rooms = [module_name(p) for p in MODULES if room_of(module_name(p)) in JAX_FREE_ROOMS]
    lines = [f"import panther_jax.{n}" for n in (*rooms, *JAX_FREE)]
    done = run_python("\n".join([*lines, "import sys", "print('jax' in sys.modules)"]))
    assert done.stdout.strip() == "False", done.stderr


def test_compute_modules_load_without_the_io_libraries():
    blocked = ("SimpleITK", "grain", "tyro", "dm_pix", "skimage", "matplotlib", "torch")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import panther_jax.train, panther_jax.inference.sliding_window, panther_jax.augment.policies
print('loaded')
"""
    done = run_python(code)
    assert done.stdout.strip() == "loaded", done.stderr


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    limit = MAX_TRAIN_LINES if path.name == "train.py" else MAX_FILE_LINES
    assert lines <= limit, f"{path.name} has {lines} lines"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_public_functions_are_documented_and_take_few_positional_parameters(path):
    for node in parsed(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) <= 5, f"{path.name}:{node.name}"


def test_no_code_runs_from_files_of_others():
    """No eval, exec, pickle, shell strings or fork anywhere in the package."""
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "os.fork"), path
                assert not any(
                    k.arg == "shell"
                    or (k.arg == "allow_pickle" and ast.unparse(k.value) != "False")
                    for k in node.keywords
                ), f"{path.name}:{node.lineno}"


def test_every_error_class_derives_from_the_one_base():
    """Private ones, caught where they are raised, excepted."""
    builtin = {n for n, v in vars(builtins).items() if isinstance(v, type)}
    builtin = {n for n in builtin if issubclass(getattr(builtins, n), BaseException)}
    classes = [n for p in ALL_CODE for n in ast.walk(parsed(p)) if isinstance(n, ast.ClassDef)]
    bases = [(c.name, {ast.unparse(b).rpartition(".")[2] for b in c.bases}) for c in classes]
    errors, derived, before = set(builtin), {"PantherError"}, 0
    while len(errors) + len(derived) != before:  # until no class is added any more
        before = len(errors) + len(derived)
        errors |= {name for name, above in bases if above & errors}
        derived |= {name for name, above in bases if above & derived}
    own = {n for n in errors - builtin if not n.startswith("_")}
    assert len(own) > 20 and own <= derived, own - derived


MODULE_OF = {"orbax-checkpoint": "orbax", "dm-pix": "dm_pix", "pillow": "PIL"}


def test_every_declared_dependency_is_imported():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in declared}
    imported = {i.partition(".")[0] for p in ALL_CODE for i in imports(parsed(p))}
    unused = {n for n in names if MODULE_OF.get(n, n) not in imported}
    assert len(names) > 10 and not unused


def test_files_are_replaced_in_one_place():
    """Whoever writes a file takes ``base.files``: nobody else renames."""
    for path in [*ALL_CODE, *sorted((ROOT / "benchmarks").glob("*.py"))]:
        if path == PACKAGE / "base" / "files.py":
            continue
        for node in ast.walk(parsed(path)):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.attr if isinstance(called, ast.Attribute) else ""
            # texts take two arguments, dataclasses a field by its name
            of_path = name == "replace" and len(node.args) == 1 and not node.keywords
            of_os = name == "replace" and ast.unparse(called) == "os.replace"
            moves = of_path or of_os or name in ("rename", "renames", "mkstemp")
            assert not moves, f"{path.name}:{getattr(node, 'lineno', 0)}"


def test_every_config_loads_and_survives_json(monkeypatch):
    from panther_jax.config.laptop import demo
    from panther_jax.config.loading import load_config
    from panther_jax.config.schema import TrainConfig

    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "configs").glob("*.py"))
    assert files
    for path in files:
        config, source = load_config(path.name)
        assert source.path == path
        for variant in (config, demo(config)):
            through_json = json.loads(json.dumps(variant.to_json()))
            assert TrainConfig.from_json(through_json) == variant
        assert "Launch:" in path.read_text(), f"{path.name} does not say how to launch it"


def test_readme_starts_with_the_two_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "panther_jax.train --config mri_t2.py --demo" in blocks[0]
    assert "pytest" in blocks[1]


def test_readme_names_only_options_that_exist():
    text = (ROOT / "README.md").read_text()
    for command in re.findall(r"python -m (panther_jax(?:\.\w+)+)", text):
        assert (ROOT / (command.replace(".", "/") + ".py")).is_file(), command
