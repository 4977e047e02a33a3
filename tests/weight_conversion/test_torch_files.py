"""Torch files are read without running anything; every other kind of file gets its own message."""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import PosixPath, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import weight_files as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from weight_conversion import import_nnunet, torch_files
from weight_conversion.torch_files import TorchFileError, read_checkpoint

pytestmark = pytest.mark.torch


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, marker, how="open"):
        self.marker, self.how = str(marker), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.marker}",)
        if self.how == "eval":
            return eval, (f"open({self.marker!r}, 'w')",)
        return open, (self.marker, "w")


class SetStateBomb:
    """An innocent looking object whose state runs code."""

    def __init__(self, marker):
        self.state = Bomb(marker)


def malicious(kind, marker):
    weights = OrderedDict(w=torch.zeros(2))
    bomb = Bomb(marker, kind if kind in ("system", "eval") else "open")
    return {
        "inside weights": {"network_weights": OrderedDict(w=torch.zeros(2), x=bomb)},
        "class": {"network_weights": weights, "init_args": SetStateBomb(marker)},
        "itself": bomb,
    }.get(kind, {"network_weights": weights, "init_args": {"plans": bomb}})


@pytest.mark.parametrize("kind", ["open", "system", "eval", "inside weights", "class", "itself"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_before_anything_runs(tmp_path, kind, protocol):
    path, marker = tmp_path / "bad.pth", tmp_path / "it-ran"
    torch.save(malicious(kind, marker), path, pickle_protocol=protocol)
    with pytest.raises(TorchFileError, match="was refused"):
        read_checkpoint(path)
    out = tmp_path / "bundle"
    assert import_nnunet.main(["--checkpoint", str(path), "--out", str(out)]) == 1
    assert not marker.exists() and not out.exists()
    # The bomb is real: the usual way of loading sets it off.
    if kind == "open" and protocol == 2:
        torch.load(path, weights_only=False)["init_args"]["plans"].close()
        assert marker.exists()


def test_the_refusal_names_what_the_file_asks_for(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save(malicious("system", tmp_path / "it-ran"), path)
    with pytest.raises(TorchFileError, match=r"asks for (posix|nt)\.system"):
        read_checkpoint(path)
    import_nnunet.main(["--checkpoint", str(path), "--out", str(tmp_path / "b")])
    assert "Traceback" not in capsys.readouterr().err


def test_the_list_of_allowed_types_does_not_leak(tmp_path):
    path = tmp_path / "good.pth"
    torch.save(made.checkpoint(made.FLAT), path)
    before = set(torch.serialization.get_safe_globals())
    assert read_checkpoint(path).entries["_best_ema"] == 0.5
    assert set(torch.serialization.get_safe_globals()) == before


def test_scalars_written_under_the_old_numpy_are_read(tmp_path):
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save(made.checkpoint(made.FLAT, logging={"a": [np.float32(1.5)]}), new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in data
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            target.writestr(name, data)
    assert read_checkpoint(old).entries["logging"] == {"a": [np.float32(1.5)]}


def test_data_of_numpy_slices_and_paths_is_read(tmp_path):
    """What trainers of one's own put into their arguments and logs is data, not code."""
    held = {
        "integer": np.int64(3),
        "flag": np.bool_(True),
        "float": np.float64(0.25),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "slice": slice(1, np.int32(7), None),
        "pure": PurePosixPath("/data/raw"),
        "path": PosixPath("runs/a"),
        "windows": PureWindowsPath("C:/data"),
    }
    path = tmp_path / "good.pth"
    entries = {"init_args": {**made.checkpoint(made.FLAT)["init_args"], **held}, "logging": held}
    torch.save(made.checkpoint(made.FLAT, **entries), path)
    checkpoint = read_checkpoint(path)
    for found in (checkpoint.entries["init_args"], checkpoint.entries["logging"]):
        assert (found["integer"], found["flag"], found["float"]) == (3, True, 0.25)
        for name in ("array", "fortran"):
            assert found[name].dtype == held[name].dtype
            np.testing.assert_array_equal(found[name], held[name])
        assert found["slice"] == slice(1, 7, None)
        assert (found["pure"], found["path"]) == ("/data/raw", "runs/a")
        assert found["windows"] == "C:\\data"
    import_nnunet.read_single(path)


@pytest.mark.parametrize(
    "value", [np.array([None]), np.array(["a"], object), np.zeros(2, [("a", "f4")])]
)
def test_arrays_that_are_not_numeric_are_refused(tmp_path, value):
    path = tmp_path / "bad.pth"
    torch.save(made.checkpoint(made.FLAT, logging={"a": value}), path)
    with pytest.raises(TorchFileError, match="was refused"):
        read_checkpoint(path)


def test_a_refusal_says_where_the_file_asks(tmp_path):
    path = tmp_path / "bad.pth"
    content = made.checkpoint(made.FLAT)
    content["init_args"]["callback"] = Bomb(tmp_path / "it-ran", "system")
    torch.save(content, path)
    with pytest.raises(TorchFileError, match=r"system \(in 'init_args' after 'callback'\)"):
        read_checkpoint(path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["running_mean", "num_batches_tracked"])
def test_batch_norm_is_refused_by_name(tmp_path, name):
    path = tmp_path / "bn.pth"
    content = made.checkpoint(made.FLAT)
    kind = torch.int64 if name == "num_batches_tracked" else torch.float32
    content["network_weights"][f"encoder.stem.convs.0.norm.{name}"] = torch.zeros(1, dtype=kind)
    torch.save(content, path)
    with pytest.raises(TorchFileError, match="(?s)network with batch norm.*instance norm"):
        read_checkpoint(path)


# ------------------------------------------------------------------------------- other files


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, w=np.zeros(3))
    return buffer.getvalue()


def zip_bytes(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def npy_bytes():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def legacy_bytes():
    buffer = io.BytesIO()
    torch.save({"network_weights": {}}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def safetensors_bytes():
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 4


FOREIGN = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "legacy": (legacy_bytes(), "bare pickle, perhaps in the format of PyTorch before 1.6"),
    "pickle": (pickle.dumps({"a": 1}), "bare pickle"),
    "npz": (npz_bytes(), "NumPy archive"),
    "npy": (npy_bytes(), "NumPy array"),
    "safetensors": (safetensors_bytes(), "safetensors file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 600, "HDF5 file"),
    "keras": (zip_bytes("metadata.json", "config.json", "model.weights.h5"), "Keras model"),
    "script": (zip_bytes("m/data.pkl", "m/constants.pkl", "m/code/x.py"), "TorchScript"),
    "zip": (zip_bytes("a/fold_all/checkpoint_final.pth"), "unpack it first"),
    "gzip": (gzip.compress(b"x"), "gzip archive"),
    "html": (b"<!DOCTYPE html><html>", "failed download"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "text": (b"hello, I am no checkpoint at all", "its first bytes are 68 65"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds_each_get_their_message(tmp_path, kind, capsys):
    content, message = FOREIGN[kind]
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(content)
    with pytest.raises(TorchFileError, match=message):
        read_checkpoint(path)
    out = tmp_path / "bundle"
    assert import_nnunet.main(["--checkpoint", str(path), "--out", str(out)]) == 1
    assert not out.exists() and "Traceback" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def good_bytes():
    buffer = io.BytesIO()
    torch.save(made.checkpoint(made.FLAT), buffer)
    return buffer.getvalue()


def test_a_compressed_copy_is_refused(tmp_path, good_bytes):
    path = tmp_path / "c.pth"
    with (
        zipfile.ZipFile(io.BytesIO(good_bytes)) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(TorchFileError, match="compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_called_so(tmp_path, good_bytes, share):
    path = tmp_path / "cut.pth"
    path.write_bytes(good_bytes[: max(4, int(share * len(good_bytes)))])
    with pytest.raises(TorchFileError, match="truncated or damaged"):
        read_checkpoint(path)


def test_a_damaged_tensor_is_found_by_its_checksum(tmp_path, good_bytes):
    with zipfile.ZipFile(io.BytesIO(good_bytes)) as archive:
        member = next(i for i in archive.infolist() if "/data/" in i.filename)
        data = archive.read(member)
    at = good_bytes.index(data)
    flipped = bytearray(good_bytes)
    flipped[at] ^= 1
    path = tmp_path / "flipped.pth"
    path.write_bytes(flipped)
    with pytest.raises(TorchFileError, match=f"checksum of '{member.filename}'"):
        read_checkpoint(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_random_damage_never_gives_other_weights(tmp_path, good_bytes, data):
    content = bytearray(good_bytes)
    directory = good_bytes.index(b"PK\x01\x02")  # half of the damage goes to the zip's directory
    places = st.integers(0, len(content) - 1) | st.integers(directory, len(content) - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "fuzzed.pth"
    path.write_bytes(content)
    try:
        found = read_checkpoint(path).weights
    except TorchFileError:
        return
    for name, value in made.state_dict(made.FLAT).items():
        np.testing.assert_array_equal(found[name], value.numpy())


def test_files_without_network_weights_are_described(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, path)
    with pytest.raises(TorchFileError, match="no 'network_weights', only state_dict, epoch"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(TorchFileError, match="holds a list"):
        read_checkpoint(path)
    torch.save({"network_weights": {"a": torch.zeros(1, dtype=torch.int64)}}, path)
    with pytest.raises(TorchFileError, match="weight 'a' is a torch.int64 tensor"):
        read_checkpoint(path)
    torch.save({"network_weights": {"a": 3.0}}, path)
    with pytest.raises(TorchFileError, match="weight 'a' is a float"):
        read_checkpoint(path)
    with pytest.raises(TorchFileError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")


def test_a_bare_state_dict_and_half_precision_are_read(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save({"a": torch.tensor([1.5], dtype=torch.bfloat16)}, path)
    weights = read_checkpoint(path).weights
    assert weights["a"].dtype == np.float32 and weights["a"][0] == 1.5


# ------------------------------------------------------------------------------------- writing


def test_names_of_one_tensor_share_its_memory_in_the_file(tmp_path):
    path = tmp_path / "w.pth"
    torch_files.write_torch(path, {"network_weights": made.state_dict(made.RESIDUAL)})
    state = read_checkpoint(path).weights
    values = sum({v.ctypes.data: v.nbytes for v in state.values()}.values())
    assert sum(v.nbytes for v in state.values()) > 3 * values
    a, b = "encoder.stem.convs.0.conv.weight", "decoder.encoder.stem.convs.0.all_modules.0.weight"
    assert state[a].ctypes.data == state[b].ctypes.data


def test_a_write_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises((pickle.PicklingError, AttributeError)):
        torch_files.write_torch(path, {"f": lambda: None})
    assert list(tmp_path.iterdir()) == []
