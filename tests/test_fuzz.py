"""Readers of other people's files, fed with damaged and made-up ones: an own error, or a result.

Nothing crashes, hangs, runs, or escapes as an error of another type. Examples are few and always
the same; for more: ``PANTHER_JAX_FUZZ=5000 pytest tests/test_fuzz.py``.
"""

import copy
import io
import json
import os
import pickle
import struct
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import weight_files as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weight_files import write_bundle

from panther_jax.base import files
from panther_jax.base.errors import CheckpointError, DatasetError, FileError, PlansError, StoreError
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.ensembles.specification import EnsembleError, read_ensemble
from panther_jax.images import raw_dataset
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans
from panther_jax.store import store
from panther_jax.store.pickles import read_pickle
from panther_jax.weights.bundle import load_bundle

DEADLINE = timedelta(seconds=5)  # a hang
MANY = "PANTHER_JAX_FUZZ"
FEW = settings(
    max_examples=int(os.environ.get(MANY, 60)),
    derandomize=MANY not in os.environ,
    deadline=DEADLINE,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS | st.sampled_from([0, -1, 1e-300, 1e300, 10**30, "os.system", "../../x", "final"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def places(value, here=()):
    """The way to every entry of a JSON value."""
    yield here
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*here, key))
    elif isinstance(value, list):
        for number in range(len(value)):
            yield from places(value[number], (*here, number))


@st.composite
def damaged(draw, sound):
    """A JSON value with one to three entries replaced or removed."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        ways = [p for p in places(value) if p]
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        node = value
        for key in way:
            node = node[key]
        if draw(st.booleans()) and draw(st.booleans()):
            del node[last]
        else:
            node[last] = draw(VALUES)
    return value


@st.composite
def broken(draw, content):
    """Bytes that are changed here and there, cut, or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change", "change", "cut", "insert", "repeat"]))
        if kind == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        else:
            data[at:at] = data[at : at + 16]
    return bytes(data)


# ----------------------------------------------------------------------------------------- JSON

PLANS = made.make_plans(made.RESIDUAL).to_nnunet()


@FEW
@given(damaged(PLANS))
def test_plans(plans):
    try:
        read = Plans.from_nnunet(plans, made.DATASET)
    except PlansError as error:
        assert len(str(error)) > 10
    else:
        json.dumps(read.to_nnunet())
        again = Plans.from_nnunet(json.loads(json.dumps(read.to_nnunet())), made.DATASET)
        assert repr(again.arch) == repr(read.arch)  # NaN equals nothing


@FEW
@given(damaged(made.DATASET | {"regions_class_order": [1, 2]}))
def test_labels(dataset):
    try:
        labels = Labels.from_dataset_json(dataset)
    except PlansError:
        return
    assert labels.num_outputs >= 1 and labels.allowed_values


@FEW
@given(damaged(made.DATASET | {"dataset": {"a": {"images": ["a.mha"], "label": "b.mha"}}}))
def test_dataset_json(tmp_path, dataset):
    (tmp_path / "imagesTr").mkdir(exist_ok=True)
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises((PlansError, DatasetError)):  # the files are not there
        raw_dataset.open_raw(tmp_path)


SPEC = {
    "members": [
        {"name": "a", "model": "x", "weight": 1.0, "folds": [0, 1], "mirror_axes": [0, 2]},
        {"name": "b", "model": "y", "class_weights": {"lesion": 1}, "label_map": {"x": "lesion"}},
    ],
    "combine": "probabilities",
    "decision": {"threshold": 0.5, "label": "lesion"},
    "labels": {"background": 0, "lesion": 1},
}


@FEW
@given(damaged(SPEC))
def test_ensembles(tmp_path, spec):
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    try:
        found = read_ensemble(tmp_path / "spec.json")
    except EnsembleError as error:
        assert "spec.json" in str(error)
    else:
        assert found.members


@FEW
@given(damaged(TrainConfig(made.DataConfig("Dataset777_Tiny")).to_json()))
def test_stored_configs(value):
    try:
        config = TrainConfig.from_json(value)
    except ConfigError as error:
        assert len(str(error)) > 10
    else:
        json.dumps(config.to_json())


CASE = store.StoredCase(
    "case",
    np.zeros((1, 2, 3, 4), np.float32),
    np.zeros((2, 3, 4), np.int8),
    ((1, np.zeros((2, 3), np.int32)),),
    Properties(
        Geometry((2, 3, 4), (1.0,) * 3, (0.0,) * 3, tuple(np.eye(3).ravel().tolist())),
        (2, 3, 4),
        ((0, 2), (0, 3), (0, 4)),
        (2, 3, 4),
    ),
)


@FEW
@given(data=st.data())
def test_stored_cases(tmp_path, data):
    store.write_stored(tmp_path, CASE)
    path = tmp_path / "case.json"
    entry = data.draw(damaged(json.loads(path.read_text())))
    path.write_text(json.dumps(entry))
    assert store.is_complete(tmp_path, "case") in (True, False)


@FEW
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | broken(b'{"a": [1, 2]}'))
def test_any_bytes_as_json(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    for read in (files.read_json, files.read_object):
        try:
            read(tmp_path / "x.json")
        except FileError as error:
            assert "x.json" in str(error)


# -------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle") / "b", folds=("0",))


def copied(bundle, folder):
    folder.mkdir(exist_ok=True)
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@FEW
@given(data=st.data())
def test_bundles(bundle, tmp_path, data):
    folder = copied(bundle, tmp_path / "b")
    name = data.draw(st.sampled_from(["plans.json", "dataset.json", "provenance.json"]))
    value = data.draw(damaged(json.loads((folder / name).read_text())))
    (folder / name).write_text(json.dumps(value))
    try:
        load_bundle(folder)
    except (CheckpointError, FileError) as error:
        assert len(str(error)) > 10


@FEW
@given(data=st.data())
def test_weights_of_bundles(bundle, tmp_path, data):
    folder = copied(bundle, tmp_path / "b")
    (folder / "provenance.json").write_text("{}")  # nothing to compare the weights with
    path = folder / "fold_0.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(damaged(header))).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    else:
        path.write_bytes(data.draw(broken(content[: 8 + size])) + content[8 + size :])
    try:
        load_bundle(folder)
    except (CheckpointError, FileError) as error:
        assert "fold_0.safetensors" in str(error)


def test_tensors_named_like_folders_of_others(bundle, tmp_path):
    folder = copied(bundle, tmp_path / "b")
    (folder / "provenance.json").write_text("{}")
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for names in (("a", "a/b"), ("a/b", "a"), ("", "/"), ("../../x", "//")):
        offsets = ([0, 4], [4, 8])
        header = {n: entry | {"data_offsets": o} for n, o in zip(names, offsets, strict=True)}
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + b"\0" * 8
        (folder / "fold_0.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="fold_0.safetensors"):
            load_bundle(folder)


# -------------------------------------------------------------------------------------- pickles

ENTRY = {
    "spacing": [1.0, 2.0, 3.0],
    "sitk_stuff": {"origin": (0.0, 1.0, 2.0), "direction": tuple(np.eye(3).ravel())},
    "shape_before_cropping": (4, 5, 6),
    "bbox_used_for_cropping": [[0, 4], [0, 5], [0, 6]],
    "class_locations": {1: np.arange(8, dtype=np.int64).reshape(2, 4), (1, 2): []},
    "number": np.float64(3.5),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nnunet_pickles(tmp_path, protocol):
    content = pickle.dumps(ENTRY, protocol)
    path = tmp_path / "case.pkl"

    @FEW
    @given(broken(content))
    def check(data):
        path.write_bytes(data)
        try:
            found = read_pickle(path)
        except StoreError as error:
            assert "case.pkl" in str(error)
        else:
            assert isinstance(found, dict)

    check()


OPCODES = st.lists(
    st.sampled_from(
        [
            b"\x80\x02", b"(", b")", b"]", b"}", b"K\x01", b"X\x01\0\0\0a", b"q\0", b"h\0", b"a",
            b"s", b"u", b"e", b"t", b"l", b"d", b"R", b"b", b"o", b"0", b"1", b"2", b".", b"N",
            b"\x81", b"\x85", b"\x86", b"\x93", b"\x94", b"cos\nsystem\n", b"cnumpy\ndtype\n",
            b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"c__builtin__\nset\n", b"P1\n", b"Q",
            b"\x8a\xff" + b"\xff" * 255, b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8,
        ]
    ),
    max_size=30,
)  # fmt: skip


@FEW
@given(OPCODES)
def test_made_up_pickles(tmp_path, opcodes):
    path = tmp_path / "case.pkl"
    path.write_bytes(b"".join(opcodes) + b".")
    try:
        assert isinstance(read_pickle(path), dict)
    except StoreError:
        pass


def laughing(depth=60):
    """A small value that is enormous when written out."""
    value = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


def test_what_grows_when_written_out_is_refused(tmp_path):
    start = time.monotonic()
    path = tmp_path / "case.pkl"
    path.write_bytes(pickle.dumps({"laughs": laughing()}))
    with pytest.raises(StoreError, match="entries"):
        read_pickle(path)
    circle = []
    circle.append(circle)
    path.write_bytes(pickle.dumps({"circle": circle}))
    with pytest.raises(StoreError, match="refused"):
        read_pickle(path)
    assert time.monotonic() - start < 20


# ---------------------------------------------------------------------------------- torch files


@pytest.fixture(scope="module")
def torch_bytes(tmp_path_factory):
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("torch") / "checkpoint_final.pth"
    torch.save(made.checkpoint(made.RESIDUAL), path)
    return path.read_bytes()


def repacked(content, change):
    """A torch file whose pickle went through ``change``, with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as new:
        for member in archive.infolist():
            data = archive.read(member)
            new.writestr(
                member.filename, change(data) if member.filename.endswith("data.pkl") else data
            )
    return out.getvalue()


@settings(FEW, max_examples=FEW.max_examples // 2)
@given(data=st.data())
def test_torch_files(torch_bytes, tmp_path, data):
    from weight_conversion import import_nnunet
    from weight_conversion.torch_files import TorchFileError

    path = tmp_path / "checkpoint_final.pth"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(broken(torch_bytes)))
    else:
        path.write_bytes(repacked(torch_bytes, lambda p: data.draw(broken(p))))
    try:
        import_nnunet.read_single(path)
    except (TorchFileError, FileError, ValueError, CheckpointError) as error:
        assert not isinstance(error, UnicodeError) and str(error)


def test_a_torch_file_that_grows_is_refused(tmp_path, torch_bytes):
    import torch

    from weight_conversion.torch_files import TorchFileError, read_checkpoint

    path = tmp_path / "checkpoint_final.pth"
    torch.save(made.checkpoint(made.RESIDUAL, logging=laughing()), path)
    with pytest.raises(TorchFileError, match="entries"):
        read_checkpoint(path)


class Marker:
    """Leaves a file behind when unpickled by anything that runs what it reads."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_file_runs(tmp_path, torch_bytes):
    from weight_conversion.torch_files import TorchFileError, read_checkpoint

    mark = tmp_path / "it_ran"
    payload = pickle.dumps({"a": Marker(mark)}, 2)
    readers = {
        "case.pkl": (read_pickle, payload),
        "checkpoint.pth": (read_checkpoint, repacked(torch_bytes, lambda _: payload)),
        "bare.pth": (read_checkpoint, payload),
    }
    for name, (read, content) in readers.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((StoreError, TorchFileError)):
            read(tmp_path / name)
    array = tmp_path / "case_1.image.npy"
    np.save(array, np.array([Marker(mark)], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        np.load(array, allow_pickle=False)  # as the store and the ensembles do
    assert not Path(mark).exists()
    pickle.loads(payload)  # the payload does work
    assert mark.is_dir()
