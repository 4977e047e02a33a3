"""nnU-Net's preprocessed folders as stores; pickles that do anything else are refused unrun."""

import collections
import dataclasses
import io
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_plans import toy_plans

from panther_jax.base.errors import StoreError
from panther_jax.images.imageio import write_label
from panther_jax.images.splits import make_splits
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.plans import Resampler
from panther_jax.store import pickles, store
from panther_jax.store.compressed import CompressedArray
from panther_jax.store.folds import fold_cases

TORCH = Resampler("resample_torch_fornnunet", (("force_separate_z", False), ("is_seg", False)))
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "tumor": 1, "pancreas": 2},
    "numTraining": 6,
    "file_ending": ".mha",
}
PLANS = toy_plans(
    TORCH,
    dataset_name="Dataset001_Toy",
    plans_name="ToyPlans",
    configuration="3d",
    transpose_forward=(2, 0, 1),
    data_identifier="ToyPlans_3d",
)
NUM_CASES = 6


def arrays_of(number: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(number)
    image = random.normal(0, 1, (1, 5, 6, 7)).astype(np.float32)
    return image, random.integers(-1, 3, (1, 5, 6, 7)).astype(np.int16)


def properties_of(label: np.ndarray) -> dict[str, Any]:
    """As nnU-Net leaves them: NumPy scalars, tuples, rows (0, z, y, x), an absent class's list."""
    rows = np.argwhere(label == 1)
    return {
        "sitk_stuff": {
            "spacing": (1.5, 2.5, 3.5),
            "origin": (1.0, 2.0, 3.0),
            "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        },
        "spacing": [np.float64(3.5), np.float64(2.5), np.float64(1.5)],
        "shape_before_cropping": (9, 7, 8),  # after transpose_forward
        "bbox_used_for_cropping": [[1, 6], [0, 6], [1, 8]],
        "shape_after_cropping_and_before_resampling": (5, 6, 7),
        "class_locations": {1: rows, 2: []},
    }


def write_folder(root: Path, kind: str) -> Path:
    """A preprocessed dataset of one configuration, its arrays of the given kind."""
    folder = root / "Dataset001_Toy" / "ToyPlans_3d"
    folder.mkdir(parents=True)
    (folder.parent / "dataset.json").write_text(json.dumps(DATASET))
    (folder.parent / "ToyPlans.json").write_text(json.dumps(PLANS.to_nnunet()))
    for number in range(NUM_CASES):
        image, label = arrays_of(number)
        path = folder / f"case_{number}"
        if kind == "b2nd":
            blosc2 = pytest.importorskip("blosc2")
            blosc2.asarray(image, urlpath=f"{path}.b2nd", mode="w")
            blosc2.asarray(label, urlpath=f"{path}_seg.b2nd", mode="w")
        elif kind == "npz":
            np.savez_compressed(f"{path}.npz", data=image, seg=label)
        else:
            np.save(f"{path}.npy", image)
            np.save(f"{path}_seg.npy", label)
        Path(f"{path}.pkl").write_bytes(pickle.dumps(properties_of(label)))
    return folder


@pytest.mark.parametrize("kind", ["b2nd", "npz", "npy"])
@pytest.mark.parametrize("resident", [True, False])
def test_a_preprocessed_folder_is_a_store(tmp_path: Path, kind: str, resident: bool) -> None:
    folder = write_folder(tmp_path, kind)
    opened = store.open_store(folder)
    assert opened.plans == PLANS
    assert opened.case_ids == tuple(f"case_{n}" for n in range(NUM_CASES))
    for number, case_id in enumerate(opened.case_ids):
        image, label = arrays_of(number)
        case = store.read_stored(opened, case_id)
        case = store.in_memory(case) if resident else case
        np.testing.assert_array_equal(case.image, image)
        np.testing.assert_array_equal(case.label, label[0])
        assert isinstance(case.image, np.memmap) == (kind == "npy" and not resident)
        (tumor, rows), (pancreas, none) = case.locations
        assert (tumor, pancreas, none.shape) == (1, 2, (0, 3))
        np.testing.assert_array_equal(rows, np.argwhere(label[0] == 1))
        geometry = case.properties.geometry
        assert geometry.shape_zyx == (7, 8, 9) and geometry.spacing_zyx == (3.5, 2.5, 1.5)
        assert case.properties.crop_box == ((1, 6), (0, 6), (1, 8))
        values, counts = np.unique(label, return_counts=True)
        assert store.voxel_counts(opened, case_id) == dict(
            zip(values.tolist(), counts.tolist(), strict=True)
        )


@pytest.mark.parametrize("kind", ["b2nd", "npz"])
def test_a_compressed_case_tells_its_size_before_it_is_read(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path, kind)
    opened = store.open_store(folder)
    case = store.read_stored(opened, "case_0")
    image, label = arrays_of(0)
    assert isinstance(case.image, CompressedArray) and isinstance(case.label, CompressedArray)
    assert (case.image.shape, case.image.nbytes) == (image.shape, image.nbytes)
    assert (case.label.shape, case.label.dtype, case.label.ndim) == (label[0].shape, "int16", 3)
    assert case.image.sliced == (kind == "b2nd")
    box = (..., slice(1, 3), slice(0, 2), slice(4, 6))
    np.testing.assert_array_equal(case.image[box], image[box])
    np.testing.assert_array_equal(case.label[1:3, :, 2], label[0, 1:3, :, 2])
    path = folder / f"case_0.{kind}"
    path.write_bytes(path.read_bytes()[:-40])  # what was opened is damaged later
    with pytest.raises(StoreError, match=f"case_0.{kind} cannot be read"):
        np.asarray(case.image)


def test_references_and_splits_lie_beside_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "npz")
    opened = store.open_store(folder)
    assert fold_cases(opened, 0) == make_splits(opened.case_ids)[0]
    splits = [{"train": ["case_0"], "val": ["case_1"]}]
    (folder.parent / "splits_final.json").write_text(json.dumps(splits))
    assert fold_cases(opened, 0) == (("case_0",), ("case_1",))
    geometry = Geometry((2, 2, 2), (1.0,) * 3, (0.0,) * 3, (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    truth = folder.parent / "gt_segmentations" / "case_3.mha"
    write_label(truth, np.zeros((2, 2, 2), np.int16), geometry)
    assert opened.reference("case_3") == truth


def test_plans_of_the_folders_own_name_are_taken(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "npz")
    other = dataclasses.replace(PLANS, plans_name="Another", batch_size=7).to_nnunet()
    other["configurations"]["3d_bs4"] = {"inherits_from": "3d", "batch_size": 4}
    (folder.parent / "Another.json").write_text(json.dumps(other))
    (folder.parent / "not_plans.json").write_text("[1")
    assert store.open_store(folder).plans == PLANS
    (folder.parent / "ToyPlans.json").unlink()
    assert store.open_store(folder).plans.batch_size == 7
    (folder.parent / "Another.json").unlink()
    with pytest.raises(FileNotFoundError, match="data_identifier 'ToyPlans_3d'"):
        store.open_store(folder)


def test_damage_is_named(tmp_path: Path) -> None:
    for kind in ("b2nd", "npz", "npy"):
        folder = write_folder(tmp_path / kind, kind)
        opened = store.open_store(folder)
        path = folder / f"case_1.{kind}"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(StoreError, match=f"case_1.{kind} cannot be read"):
            store.read_stored(opened, "case_1")
        with pytest.raises(StoreError, match="'case_9' is not in"):
            store.read_stored(opened, "case_9")
    np.save(folder / "case_2.npy", np.zeros((1, 2, 2, 2), np.float32))
    with pytest.raises(StoreError, match="image float32.*expected"):
        store.read_stored(opened, "case_2")
    (folder / "case_3.pkl").write_bytes(pickle.dumps({"spacing": [1.0]}))
    with pytest.raises(StoreError, match="case_3.pkl is not what nnU-Net's SimpleITKIO"):
        store.read_stored(opened, "case_3")


def test_without_blosc2_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = store.open_store(write_folder(tmp_path, "b2nd"))
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'panther-jax"):
        store.read_stored(opened, "case_0")


# ---------------------------------------------------------------------------------- the pickle

numbers = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
)
dtypes = st.sampled_from(["int8", "uint16", "int64", ">i4", "float32", "float64", "bool"])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def arrays(draw: Any) -> np.ndarray:
    shape, dtype = draw(shapes), draw(dtypes)
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    return np.asfortranarray(values) if draw(st.booleans()) else values


@given(
    value=st.recursive(
        st.one_of(numbers, arrays(), arrays().map(lambda a: a.sum())),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text(max_size=3), inner, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=8,
    ),
    protocol=st.integers(2, pickle.HIGHEST_PROTOCOL),
)
@settings(max_examples=60, deadline=None)
def test_containers_numbers_and_arrays_survive(
    value: Any, protocol: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("pickles") / "case.pkl"
    path.write_bytes(pickle.dumps({"value": value}, protocol))
    assert_same(pickles.read_pickle(path)["value"], value)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, (np.ndarray, np.generic)):
        np.testing.assert_array_equal(found, expected)
        if isinstance(expected, np.ndarray):
            assert found.dtype == expected.dtype and found.shape == expected.shape
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert found == expected


class Runs:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def forged(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def named(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")
OBJECT_ARRAY = np.array([{}, []], dtype=object)
STRUCTURED = np.zeros(2, dtype=[("a", "i4"), ("b", "O")])
MALICIOUS = {
    "a shell command": pickle.dumps({"a": Runs(os.system, "touch MARK")}),
    "an evaluation": pickle.dumps({"a": Runs(eval, "open('MARK', 'w')")}),
    "a file": pickle.dumps({"a": Runs(io.open, "MARK", "w")}),
    "an attribute of a module": forged(named("nnunetv2", "x")),
    "nested names": forged(b"\x8c\x05numpy\x8c\x0acore.exec1\x93"),
    "numpy's own importer": forged(named("numpy", "load"), b"\x8c\x04MARK\x85R"),
    "numpy's testing": forged(named("numpy.testing._private.utils", "runstring"), b"."),
    "an ordered dictionary": pickle.dumps(collections.OrderedDict(a=1)),
    "an object array": pickle.dumps({"a": OBJECT_ARRAY}),
    "a structured array": pickle.dumps({"a": STRUCTURED}),
    "no dictionary": pickle.dumps([1]),
    "a function by itself": forged(b"}\x8c\x01a", RECONSTRUCT, b"s"),
    "a change of a function": forged(RECONSTRUCT, b"}\x8c\x08__call__K\x01sb"),
    "attributes of a function": forged(RECONSTRUCT, b"N}\x8c\x06_buildK\x01s\x86b"),
    "an instance of a function": forged(RECONSTRUCT, b")\x81"),
    "a huge bytearray": forged(named("builtins", "bytearray"), b"J\xff\xff\xff\x7f\x85R"),
    "a cut file": pickle.dumps({"a": 1})[:-3],
    "an empty file": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_anything_else_is_refused_before_it_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "case.pkl"
    path.write_bytes(MALICIOUS[kind])
    with pytest.raises(StoreError, match="case.pkl is refused"):
        pickles.read_pickle(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.pkl"]


@pytest.mark.parametrize("change", ["bytes", "shape", "order", "code"])
def test_forged_arrays_are_refused(change: str, tmp_path: Path) -> None:
    whole = pickle.dumps({"a": np.arange(12, dtype=np.int32).reshape(3, 4)}, 4)
    forgeries = {
        "bytes": (b"C0", b"C/"),  # one byte of data less than the shape needs
        "shape": (b"K\x03K\x04", b"K\x63K\x04"),
        "order": (b"\x8c\x01<", b"\x8c\x01!"),
        "code": (b"\x8c\x02i4", b"\x8c\x02O8"),
    }
    old, new = forgeries[change]
    assert old in whole
    path = tmp_path / "case.pkl"
    path.write_bytes(whole.replace(old, new))
    with pytest.raises(StoreError, match="case.pkl is refused"):
        pickles.read_pickle(path)
