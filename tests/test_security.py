"""What the code may call, and what files of others cannot make it do."""

import ast
import json
import os
import zipfile
from pathlib import Path

import pytest
import weight_files as made
from bad_inputs import put, slipped
from tiny import make_raw
from weight_files import write_bundle

from panther_jax.base.errors import CheckpointError, DatasetError
from panther_jax.evaluation import folds
from panther_jax.evaluation.folds import CrossValidationError
from panther_jax.images import imageio, raw_dataset
from panther_jax.weights import bundle

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("panther_jax", "weight_conversion", "configs", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "execfile", "os.system", "os.popen", "os.execv",
    "os.execl", "os.execvp", "os.spawnl", "os.startfile", "pty.spawn", "os.fork", "runpy.run_path",
    "runpy.run_module", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput",
    "yaml.load", "yaml.unsafe_load", "shutil.unpack_archive", "tempfile.mktemp", "code.interact",
    "pandas.read_pickle", "joblib.load", "numpy.loads", "torch.hub.load", "jsonpickle.decode",
}  # fmt: skip
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "tarfile",
    "yaml", "pty", "runpy", "code", "xml.etree.ElementTree", "telnetlib", "ftplib", "socket",
    "urllib.request", "http.client", "requests",
}  # fmt: skip
FORBIDDEN_METHODS = {"extract", "extractall", "unpack_archive"}
REVIEWED = {
    (
        "panther_jax/store/pickles.py",
        "import pickle",
    ): "restricted in, plain values out",
    (
        "panther_jax/base/plugins.py",
        "exec_module",
    ): "configs and plugins are Python: the user's own code, named by the user",
    ("panther_jax/__init__.py", "import_module"): "modules of the package, by its own table",
    ("panther_jax/library.py", "import_module"): "modules of the package, by their names",
    ("weight_conversion/torch_files.py", "torch.load"): "weights_only=True with a list of types",
    ("benchmarks/run.py", "import_module"): "modules of this repository, by its own table",
    ("benchmarks/harness.py", "import_module"): "modules of this repository, by its own table",
}
"""Where something is allowed, and why. Whoever adds a line has read the code there."""


def name_of(node):
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def keyword(call, name):
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def findings(source):
    """What a source does that needs a second look."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{n}" for n in names)]
            yield from (f"import {n}" for n in names if n in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        last = called.rpartition(".")[2]
        if called in FORBIDDEN_CALLS or last in FORBIDDEN_METHODS:
            yield called
        if last in ("exec_module", "import_module"):
            yield last
        if keyword(node, "shell") not in (None, "False"):
            yield f"{called} in a shell"
        if called in ("np.load", "numpy.load") and keyword(node, "allow_pickle") != "False":
            yield f"{called} without allow_pickle=False"
        elif keyword(node, "allow_pickle") not in (None, "False"):
            yield f"{called} with allow_pickle"
        if called == "torch.load":
            yield "torch.load" if keyword(node, "weights_only") == "True" else "torch.load unsafe"
        if last == "Environment" and keyword(node, "autoescape") != "True":
            yield "templates without escaping"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_dangerous_calls_are_in_reviewed_places_only(path):
    place = path.relative_to(ROOT).as_posix()
    found = set(findings(path.read_text(encoding="utf-8")))
    if place.startswith("benchmarks/"):  # they read what they have just written themselves
        found -= {"np.load without allow_pickle=False"}
    new = {what for what in found if (place, what) not in REVIEWED}
    assert not new, f"{place} uses {new}: avoid it, or review it and enter it above"


def test_reviewed_places_exist():
    for place, what in REVIEWED:
        if (ROOT / place).is_file():
            assert what in set(findings((ROOT / place).read_text(encoding="utf-8"))), (place, what)


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "exec(x)",
        "import pickle",
        "from pickle import loads",
        "import os\nos.system(x)",
        "subprocess.run(x, shell=True)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "np.savez(x, allow_pickle=True)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "zipfile.ZipFile(x).extractall(y)" and "archive.extractall(y)",
        "import tarfile",
        "yaml.load(x)",
        "jinja2.Environment()",
        "importlib.import_module(x)",
        "from urllib.request import urlopen",
    ],
)
def test_the_scan_sees_it(source):
    assert set(findings(source)) - {what for _, what in REVIEWED if what == "x"}


# ------------------------------------------------------------------------------- files of others


def test_archives_are_never_unpacked_and_paths_do_not_lead_out(tmp_path):
    from weight_conversion.torch_files import TorchFileError, read_checkpoint

    box = tmp_path / "a" / "b" / "box"
    box.mkdir(parents=True)
    slipped("checkpoint.pth")(box)
    with pytest.raises(TorchFileError, match="not a torch checkpoint"):
        read_checkpoint(box / "checkpoint.pth")
    with zipfile.ZipFile(box / "case.npz", "w") as file:
        file.writestr("../../outside.npy", b"x")
        file.writestr("probabilities.npy", b"no array")
    with pytest.raises(CrossValidationError, match="cannot be read"):
        folds.unpack_probabilities(box / "case.npz", box / "unpacked.npy")
    made_files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert made_files <= {f"a/b/box/{n}" for n in ("checkpoint.pth", "case.npz", "unpacked.npy")}


@pytest.mark.parametrize("case_id", ["../out", "a/b", "..", ".", "", "a\\b", "/etc/x"])
def test_case_ids_that_lead_out_of_the_folder_are_refused(tmp_path, case_id):
    raw = make_raw(tmp_path / "raw", num_cases=1)
    dataset = json.loads((raw / "dataset.json").read_text())
    entry = {"images": ["imagesTr/case_0_0000.mha"], "label": "labelsTr/case_0.mha"}
    (raw / "dataset.json").write_text(json.dumps(dataset | {"dataset": {case_id: entry}}))
    with pytest.raises(DatasetError, match="cannot be used as a file name"):
        raw_dataset.open_raw(raw)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.mha", "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
         "ElementSpacing = 1 1 1\nElementDataFile = secret.raw\n"),
        ("a.nrrd", "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"
         "data file: secret.raw\n\n"),
    ],
)  # fmt: skip
def test_an_image_cannot_make_us_read_another_file(tmp_path, name, header):
    put("secret.raw", b"12345678")(tmp_path)
    put(name, header)(tmp_path)
    with pytest.raises(DatasetError, match="another file, 'secret.raw'"):
        imageio.read_image([tmp_path / name])


def test_the_checksum_of_a_bundle_is_verified(tmp_path):
    folder = write_bundle(tmp_path / "bundle", folds=("0",))
    path = folder / "fold_0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last bit of a weight: the file is as readable as before
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        bundle.load_bundle(folder)
    content[-1] ^= 1
    path.write_bytes(content)
    assert bundle.load_bundle(folder).plans.arch == made.RESIDUAL


def test_plans_cannot_name_code(tmp_path):
    """Import paths in plans are looked up in tables; nothing is imported by name."""
    from panther_jax.base.errors import PlansError
    from panther_jax.plans.plans import Plans

    plans = made.make_plans(made.RESIDUAL).to_nnunet()
    entry = plans["configurations"]["3d_fullres"]
    for where, key in (
        (entry["architecture"], "network_class_name"),
        *((entry["architecture"]["arch_kwargs"], k) for k in ("conv_op", "norm_op", "nonlin")),
        *((entry, f"resampling_fn_{k}") for k in ("data", "seg", "probabilities")),
    ):
        before, where[key] = where[key], "os.system"
        with pytest.raises(PlansError, match="system"):
            Plans.from_nnunet(plans, made.DATASET)
        where[key] = before
    Plans.from_nnunet(plans, made.DATASET)


def test_the_statement_is_there():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    for word in ("config", "Python", "safetensors", "pickle", "weights_only", "SHA-256"):
        assert word in text
    assert os.path.exists(ROOT / "tests" / "test_security.py")
