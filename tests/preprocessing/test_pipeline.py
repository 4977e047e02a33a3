"""Preprocessing: golden cases, the rules of spec 02 §4, and what happens when things go wrong."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from toy_plans import toy_plans

from panther_jax import preprocess
from panther_jax.base.errors import StoreError, WriteError
from panther_jax.images import splits
from panther_jax.images.imageio import write_image, write_label
from panther_jax.images.raw_dataset import Case, open_raw, read_case
from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import IntensityProperties, Plans, Resampler
from panther_jax.preprocessing import cropping, locations, normalization, pipeline
from panther_jax.preprocessing.label_resampling import resample_label
from panther_jax.store import store

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
LABELS = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
TORCH = Resampler("resample_torch_fornnunet", (("force_separate_z", False),))
SPLINE = Resampler(
    "resample_data_or_seg_to_shape", (("force_separate_z", None), ("order", 1), ("order_z", 0))
)


def make_plans(**changes: Any) -> Plans:
    return toy_plans(TORCH, **{"resampling_logits": SPLINE, **changes})


def make_geometry(shape: tuple[int, ...], spacing: tuple[float, ...] = (3.0, 1.2, 1.2)) -> Geometry:
    return Geometry(shape, spacing, (1.0, 2.0, 3.0), IDENTITY)


def make_case(seed: int = 0, shape: tuple[int, int, int] = (6, 9, 8)) -> Case:
    random = np.random.default_rng(seed)
    image = random.normal(50, 20, (1, *shape)).astype(np.float32)
    label = np.zeros(shape, np.int16)
    label[2:4, 3:7, 2:6] = 2
    label[2, 4:6, 3:5] = 1
    return Case(f"case_{seed:03d}", image, label, make_geometry(shape))


@pytest.fixture
def raw_folder(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "Dataset001_Test", 5)


def write_raw(folder: Path, num_cases: int) -> Path:
    for seed in range(num_cases):
        case = make_case(seed)
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_image(folder / "imagesTr" / f"{case.id}_0000.nii.gz", case.image[0], case.geometry)
        assert case.label is not None
        write_label(folder / "labelsTr" / f"{case.id}.nii.gz", case.label, case.geometry)
    dataset = {
        "channel_names": {"0": "MRI"},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
        **LABELS.to_dataset_json(),
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


# -------------------------------------------------------------------------------------- golden


def golden_datasets(golden: Path) -> list[Path]:
    folders = sorted((golden / "preprocessing" / "raw").iterdir())
    assert folders
    return folders


@pytest.mark.golden
def test_whole_chain(golden: Path) -> None:
    folder = golden / "preprocessing"
    num_checked = 0
    for raw_path in golden_datasets(golden):
        raw = open_raw(raw_path)
        raw_cases = {case.id: case for case in raw.cases}
        plans_file = f"{raw_path.name}_plans_used_for_preprocessing.json"
        stored_plans = json.loads((folder / plans_file).read_text())
        properties_file = f"{raw_path.name}_preprocessed_properties.json"
        expected_properties = json.loads((folder / properties_file).read_text())
        for path in sorted(folder.glob(f"{raw_path.name}__*.npz")):
            _, case_id, configuration, kind = path.stem.split("__")
            expected = expected_properties[path.stem]
            forward = {"transpose_forward": expected["transpose_forward"]}
            plans = Plans.from_nnunet(stored_plans | forward, raw.dataset, configuration)
            case = read_case(raw_cases[case_id], raw.labels)
            if kind == "train":
                check_training_case(case, plans, raw.labels, np.load(path), expected)
            else:
                check_prediction_case(case, plans, np.load(path), expected)
            num_checked += 1
    assert num_checked


def check_training_case(
    case: Case, plans: Plans, labels: Labels, arrays: Any, expected: dict[str, Any]
) -> None:
    found = pipeline.preprocess_case(case, plans, labels)
    assert found.image.dtype == np.float32
    # 1e-4: float32 statistics and interpolation in another order
    np.testing.assert_allclose(found.image, arrays["data"], rtol=0, atol=1e-4)
    assert found.label.dtype == arrays["seg"].dtype
    differing = np.mean(found.label != arrays["seg"][0])
    torch = plans.resampling_label.name == "resample_torch_fornnunet"
    assert differing <= (0.001 if torch else 0.0)  # torch: float16 ties
    keys = [list(k) if isinstance(k, tuple) else k for k, _ in found.locations]
    expected_keys = expected["class_locations_keys"]
    assert keys == [json.loads(k) if isinstance(k, str) else k for k in expected_keys]
    if differing == 0:
        for key, coordinates in found.locations:
            name = "_".join(map(str, key)) if isinstance(key, tuple) else str(key)
            np.testing.assert_array_equal(coordinates, arrays[f"loc_{name}"][:, 1:])
    check_properties(found.properties, expected)


def check_prediction_case(case: Case, plans: Plans, arrays: Any, expected: dict[str, Any]) -> None:
    image, properties = pipeline.preprocess_image(case.image, case.geometry, plans)
    np.testing.assert_allclose(image, arrays["data"], rtol=0, atol=1e-4)
    check_properties(properties, expected)
    # without a label the reference gives a mask: 0 inside, -1 outside
    forward = plans.transpose_forward
    transposed = case.image.transpose(0, *(a + 1 for a in forward))
    _, mask, _ = cropping.crop_to_nonzero(transposed)
    spacing = tuple(case.geometry.spacing_zyx[a] for a in forward)
    wanted = plans.spacing if len(plans.spacing) == 3 else (spacing[0], *plans.spacing)
    shape, kind = arrays["seg"].shape[1:], plans.resampling_label
    mask = resample_label(mask, shape, kind, spacing=spacing, new_spacing=wanted)
    assert np.mean(mask != arrays["seg"][0]) <= 0.001


def check_properties(found: Any, expected: dict[str, Any]) -> None:
    wanted = expected["properties"]
    assert list(found.geometry.spacing_zyx) == wanted["spacing"]
    assert list(found.geometry.origin_xyz) == wanted["sitk_stuff"]["origin"]
    assert list(found.geometry.direction) == wanted["sitk_stuff"]["direction"]
    assert list(found.shape_before_crop) == wanted["shape_before_cropping"]
    assert [list(pair) for pair in found.crop_box] == wanted["bbox_used_for_cropping"]
    after = wanted["shape_after_cropping_and_before_resampling"]
    assert list(found.shape_before_resampling) == after


@pytest.mark.golden
def test_cropping(golden: Path) -> None:
    arrays = np.load(golden / "preprocessing" / "cropping_units.npz")
    cases = json.loads((golden / "preprocessing" / "cropping_units.json").read_text())
    assert any(f"x{name}" in arrays for name in cases)
    for name, expected in cases.items():
        if f"x{name}" not in arrays:  # all zeros: the full extent, nothing inside
            shape = arrays[f"seg_none_{name}"].shape
            _, mask, box = cropping.crop_to_nonzero(np.zeros(shape, np.float32))
            np.testing.assert_array_equal(mask, arrays[f"seg_none_{name}"][0])
            assert [list(pair) for pair in box] == expected["bbox"]
            continue
        image, label = arrays[f"x{name}"], arrays[f"s{name}"][0].astype(np.int16)
        cropped, found, box = cropping.crop_to_nonzero(image, label)
        assert [list(pair) for pair in box] == expected["bbox"]
        np.testing.assert_array_equal(cropped, arrays[f"data{name}"])
        np.testing.assert_array_equal(found, arrays[f"seg{name}"][0])
        _, mask, _ = cropping.crop_to_nonzero(image)
        assert str(mask.dtype) == expected["seg_none_dtype"]
        np.testing.assert_array_equal(mask, arrays[f"seg_none{name}"][0])


@pytest.mark.golden
def test_normalization(golden: Path) -> None:
    arrays = np.load(golden / "preprocessing" / "normalization_units.npz")
    text = (golden / "preprocessing" / "normalization_units.json").read_text()
    given = json.loads(text)["intensityproperties"]
    intensity = IntensityProperties(**({"median": 0.0, "min": 0.0, "max": 0.0} | given))
    x, inside = arrays["x"], arrays["seg"] >= 0
    constant = np.full(arrays["zscore_const"].shape, 7, np.float32)
    found = {
        "zscore": normalization.normalize(x, "ZScoreNormalization"),
        "zscore_mask": normalization.normalize(x, "ZScoreNormalization", inside=inside),
        "zscore_const": normalization.normalize(constant, "ZScoreNormalization"),
        "ct": normalization.normalize(x, "CTNormalization", intensity=intensity),
        "rescale01": normalization.normalize(x, "RescaleTo01Normalization"),
        "nonorm": normalization.normalize(x, "NoNormalization"),
    }
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, arrays[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.golden
def test_locations(golden: Path) -> None:
    arrays = np.load(golden / "preprocessing" / "foreground_locations.npz")
    label = arrays["seg"][0]
    kinds: dict[str, list[Any]] = {}
    for name in arrays:
        kind, _, entry = name.partition("__")
        if entry and not kind.startswith("fork"):
            values = tuple(int(v) for v in entry.split("_"))
            kinds.setdefault(kind, []).append((values if len(values) > 1 else values[0], name))
    assert kinds
    for kind, entries in kinds.items():
        # the file's `small` was made with 50 samples and 2 % coverage
        limits = {"max_locations": 50, "min_coverage": 0.02} if kind == "small" else {}
        found = locations.sample_locations(label, [request for request, _ in entries], **limits)
        for (_, coordinates), (_, name) in zip(found, entries, strict=True):
            np.testing.assert_array_equal(coordinates, arrays[name][:, 1:], err_msg=name)
            assert not np.any(arrays[name][:, 0])


# --------------------------------------------------------------------------------- pure functions


def test_hole_inside_belongs_to_the_mask_and_open_strip_does_not() -> None:
    image = np.ones((1, 7, 7, 7), np.float32)
    image[0, 3, 3, 3] = 0
    image[0, :, 0, 0] = 0
    label = np.zeros((7, 7, 7), np.uint8)
    label[2, 0, 0] = 1  # labelled voxels outside the mask are kept
    _, found, box = cropping.crop_to_nonzero(image, label)
    assert box == ((0, 7),) * 3
    assert found[3, 3, 3] == 0
    assert found[2, 0, 0] == 1
    assert np.sum(found == -1) == 6


def test_diagonal_gap_closes_a_hole() -> None:
    # face neighbours only: a way out through an edge does not count (spec 02 §4.2)
    image = np.ones((1, 3, 5, 5), np.float32)
    image[0, 1, 2, 2] = image[0, 0, 1, 2] = 0
    _, mask, _ = cropping.crop_to_nonzero(image)
    assert mask[1, 2, 2] == 0
    assert mask[0, 1, 2] == -1


def test_rgb_refuses_other_values() -> None:
    image = np.array([[[0.0, 255.0]]], np.float32)
    np.testing.assert_array_equal(
        normalization.normalize(image, "RGBTo01Normalization"), np.array([[[0, 1]]], np.float32)
    )
    with pytest.raises(ValueError, match="expected 0 to 255"):
        normalization.normalize(image * 2, "RGBTo01Normalization")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scheme", normalization.NORMALIZATIONS.names)
def test_normalisation_in_place_gives_the_same(scheme: str, masked: bool) -> None:
    random = np.random.default_rng(5)
    channel = random.uniform(0, 255, (4, 5, 6)).astype(np.float32)
    inside = random.random(channel.shape) > 0.3 if masked else None
    intensity = IntensityProperties(
        max=255.0, mean=100.0, median=90.0, min=0.0, percentile_00_5=20.0, percentile_99_5=200.0,
        std=40.0,
    )  # fmt: skip
    options: Any = {"intensity": intensity, "inside": inside}
    given = channel.copy()
    expected = normalization.normalize(channel, scheme, **options)
    np.testing.assert_array_equal(channel, given)
    assert normalization.normalize(channel, scheme, **options, out=channel) is channel
    np.testing.assert_array_equal(channel, expected)


def test_ct_without_statistics_and_unknown_schemes_are_refused() -> None:
    image = np.zeros((2, 2, 2), np.float32)
    with pytest.raises(ValueError, match="CTNormalization needs"):
        normalization.normalize(image, "CTNormalization")
    with pytest.raises(ValueError, match="unknown normalization 'Other'"):
        normalization.normalize(image, "Other")


def test_location_requests() -> None:
    assert locations.location_requests(LABELS) == (1, 2)
    ignore = Labels((*LABELS.names, ("ignore", 3)))
    assert locations.location_requests(ignore) == (1, 2, (-1, 0, 1, 2))
    regions = Labels((("background", 0), ("whole", (1, 2)), ("tumor", 1)), (2, 1))
    assert locations.location_requests(regions) == ((1, 2), 1)


def test_locations_of_an_absent_class_are_empty_and_draw_nothing() -> None:
    label = np.zeros((4, 5, 6), np.int8)
    label[1:3, 2:4, 1:5] = 2
    found = locations.sample_locations(label, (1, 2))
    assert found[0][1].shape == (0, 3)
    alone = locations.sample_locations(label, (2,))
    np.testing.assert_array_equal(found[1][1], alone[0][1])
    expected = {tuple(c) for c in np.argwhere(label == 2).tolist()}
    assert {tuple(c) for c in found[1][1].tolist()} == expected


def test_locations_do_not_depend_on_the_parts_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.random.default_rng(6).integers(-1, 3, (5, 6, 7)).astype(np.int8)
    requests = (1, (2, -1), 9)
    expected = locations.sample_locations(label, requests)
    for part in (1, 11, label.size):
        monkeypatch.setattr(locations, "SEARCHED_AT_ONCE", part)
        found = locations.sample_locations(label, requests)
        for (key, coordinates), (wanted, known) in zip(found, expected, strict=True):
            assert key == wanted
            np.testing.assert_array_equal(coordinates, known)


def test_large_labels_widen_the_type() -> None:
    case = make_case()
    assert case.label is not None
    case.label[2:4, 3:7, 2:6] = 200
    names = (("background", 0), *((str(i), i) for i in range(1, 201)))
    found = pipeline.preprocess_case(case, make_plans(), Labels(names))
    assert found.label.dtype == np.int16
    assert found.label.max() == 200
    assert pipeline.preprocess_case(make_case(), make_plans(), LABELS).label.dtype == np.int8


def test_what_is_given_is_left_alone() -> None:
    case, again = make_case(), make_case()
    pipeline.preprocess_case(case, make_plans(spacing=case.geometry.spacing_zyx), LABELS)
    np.testing.assert_array_equal(case.image, again.image)
    np.testing.assert_array_equal(case.label, again.label)


def test_wrong_number_of_channels_and_vanishing_axes_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="2 channel"):
        pipeline.preprocess_image(np.repeat(case.image, 2, 0), case.geometry, make_plans())
    with pytest.raises(ValueError, match="check the spacing"):
        pipeline.preprocess_image(case.image, (0.01, 1.0, 1.0), make_plans())


def test_slices_of_a_2d_configuration_keep_their_distance() -> None:
    case = make_case()
    plans = make_plans(spacing=(0.6, 0.6))
    image, _ = pipeline.preprocess_image(case.image, case.geometry, plans)
    assert image.shape == (1, 6, 18, 16)
    # the spacing alone is enough
    again, properties = pipeline.preprocess_image(case.image, case.geometry.spacing_zyx, plans)
    np.testing.assert_array_equal(again, image)
    assert properties.geometry.shape_zyx == case.image.shape[1:]


@given(
    st.tuples(*[st.integers(3, 9)] * 3),
    st.tuples(*[st.sampled_from([0.7, 1.0, 1.6, 3.1])] * 3),
    st.permutations([0, 1, 2]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_what_preprocessing_remembers_leads_back(
    shape: tuple[int, int, int], spacing: tuple[float, ...], forward: list[int], torch: bool
) -> None:
    random = np.random.default_rng(0)
    image = np.zeros((1, *shape), np.float32)
    image[:, 1:, : shape[1] - 1] = random.uniform(1, 2, (1, shape[0] - 1, shape[1] - 1, shape[2]))
    kind = TORCH if torch else SPLINE
    plans = make_plans(
        transpose_forward=tuple(forward), spacing=(1.0, 1.3, 0.9), resampling_logits=kind
    )
    found, properties = pipeline.preprocess_image(image, make_geometry(shape, spacing), plans)
    label = resample_label(
        (found[0] > 0).astype(np.int8),
        properties.shape_before_resampling,
        kind,
        spacing=plans.spacing,
        new_spacing=tuple(spacing[a] for a in forward),
    )
    raw = np.zeros(properties.shape_before_crop, np.int8)
    box = tuple(slice(low, high) for low, high in properties.crop_box)
    raw[box] = label + 1
    raw = raw.transpose(plans.transpose_backward)
    assert raw.shape == shape
    np.testing.assert_array_equal(raw > 0, image[0] != 0)


@given(
    st.integers(0, 1000),
    st.tuples(*[st.integers(6, 12)] * 3),
    st.tuples(*[st.sampled_from([1.0, 1.7, 2.6])] * 3),
    st.permutations([0, 1, 2]),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_labels_come_back_from_a_finer_grid(
    seed: int, shape: tuple[int, int, int], spacing: Any, forward: list[int], torch: bool
) -> None:
    random = np.random.default_rng(seed)
    image = random.uniform(1, 2, (1, *shape)).astype(np.float32)
    image[:, 0], image[:, :, :, -1] = 0, 0  # a border that the crop takes away
    label = np.zeros(shape, np.int16)
    for value in (2, 1):
        corner = [int(random.integers(1, n // 2)) for n in shape]
        label[tuple(slice(c, c + 3) for c in corner)] = value
    label[:, :, -1] = 0
    kind = TORCH if torch else SPLINE
    plans = make_plans(
        transpose_forward=tuple(forward),
        spacing=(0.9, 0.7, 0.8),
        resampling_image=kind,
        resampling_label=kind,
    )
    case = Case("c", image, label, make_geometry(shape, spacing))
    stored = pipeline.preprocess_case(case, plans, LABELS)
    properties = stored.properties
    assert properties.geometry == case.geometry
    back = resample_label(
        stored.label,
        properties.shape_before_resampling,
        kind,
        spacing=plans.spacing,
        new_spacing=tuple(spacing[a] for a in forward),
    )
    raw = np.zeros(properties.shape_before_crop, np.int16)
    raw[tuple(slice(low, high) for low, high in properties.crop_box)] = np.maximum(back, 0)
    raw = raw.transpose(plans.transpose_backward)
    assert raw.shape == shape
    # a voxel like all its neighbours is restored; at edges of a box interpolation may decide anew
    inner = ndimage.minimum_filter(label, 3) == ndimage.maximum_filter(label, 3)
    assert inner.any()
    np.testing.assert_array_equal(raw[inner], label[inner])
    assert np.mean(raw != label) <= 0.1


def test_store_holds_every_case(raw_folder: Path, tmp_path: Path) -> None:
    raw, out, seen = open_raw(raw_folder), tmp_path / "store", []
    pipeline.preprocess(raw, make_plans(), out, progress=lambda *call: seen.append(call))
    assert seen == [(f"case_{i:03d}", i + 1, 5) for i in range(5)]
    opened = store.open_store(out)
    assert opened.plans == make_plans()
    for raw_case in raw.cases:
        expected = pipeline.preprocess_case(
            read_case(raw_case, raw.labels), make_plans(), raw.labels
        )
        for resident in (True, False):
            found = store.read_stored(opened, raw_case.id)
            found = store.in_memory(found) if resident else found
            np.testing.assert_array_equal(found.image, expected.image)
            np.testing.assert_array_equal(found.label, expected.label)
            assert found.properties == expected.properties
            assert [k for k, _ in found.locations] == [1, 2]
            for (_, a), (_, b) in zip(found.locations, expected.locations, strict=True):
                np.testing.assert_array_equal(a, b)
        assert raw_case.label is not None
        reference = opened.reference(raw_case.id)
        assert reference.read_bytes() == raw_case.label.read_bytes()
    assert len(splits.read_splits(out / "splits_final.json")) == 5


def test_running_again_touches_nothing_and_repairs_what_is_broken(
    raw_folder: Path, tmp_path: Path
) -> None:
    raw, out = open_raw(raw_folder), tmp_path / "store"
    pipeline.preprocess(raw, make_plans(), out)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    pipeline.preprocess(raw, make_plans(), out)
    assert before == {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()
    }
    broken = out / "case_002.image.npy"
    broken.write_bytes(broken.read_bytes()[:-7])
    (out / "case_003.json").write_text("{")
    (out / ".case_001.image.npy.0123.tmp").write_bytes(b"left behind")
    seen: list[str] = []
    pipeline.preprocess(raw, make_plans(), out, progress=lambda i, *_: seen.append(i))
    assert seen == ["case_002", "case_003"]
    assert {p: p.read_bytes() for p in before} == {p: content for p, (_, content) in before.items()}


def test_other_plans_are_refused_and_named(raw_folder: Path, tmp_path: Path) -> None:
    raw, out = open_raw(raw_folder), tmp_path / "store"
    pipeline.preprocess(raw, make_plans(), out)
    changed = make_plans(spacing=(2.0, 1.0, 1.1), normalization=("NoNormalization",))
    with pytest.raises(StoreError, match="(?s)spacing: .*1.1.*normalization_schemes"):
        pipeline.preprocess(raw, changed, out)
    # what the arrays do not depend on is brought up to date
    pipeline.preprocess(raw, make_plans(batch_size=7), out)
    assert store.open_store(out).plans.batch_size == 7


def test_all_broken_cases_are_named_and_the_others_done(raw_folder: Path, tmp_path: Path) -> None:
    bad = make_case(9)
    assert bad.label is not None
    bad.label[0, 0, 0] = 9
    write_label(raw_folder / "labelsTr" / "case_001.nii.gz", bad.label, bad.geometry)
    (raw_folder / "imagesTr" / "case_003_0000.nii.gz").write_bytes(b"no image")
    out = tmp_path / "store"
    with pytest.raises(pipeline.PreprocessError, match="(?s)2 of 5.*case_001.*case_003"):
        pipeline.preprocess(open_raw(raw_folder), make_plans(), out)
    assert store.stored_ids(out) == ("case_000", "case_002", "case_004")


def test_full_disk_is_one_clear_error(
    raw_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = open_raw(raw_folder), tmp_path / "store"
    write, written = store._write_array, []

    def full(file: Any, array: np.ndarray) -> None:
        written.append(file)
        write(file, array)
        if len(written) == 4:  # the second case's label
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "_write_array", full)
        with pytest.raises(WriteError, match="case_001.label.npy: the disk is full"):
            pipeline.preprocess(raw, make_plans(), out)
    assert store.stored_ids(out) == ("case_000",)
    assert not list(out.glob("*case_001*"))
    assert not list(out.rglob("*.tmp"))
    pipeline.preprocess(raw, make_plans(), out)
    assert len(store.stored_ids(out)) == 5


def test_ct_without_statistics_stops_before_any_case(raw_folder: Path, tmp_path: Path) -> None:
    plans = make_plans(normalization=("CTNormalization",))
    with pytest.raises(pipeline.PreprocessError, match="intensity statistics"):
        pipeline.preprocess(open_raw(raw_folder), plans, tmp_path / "store")
    assert not (tmp_path / "store").exists()


# --------------------------------------------------------------------------------------- workers
# Processes are started by spawn, which has to import this file: functions stand at the top level.


def test_workers_write_the_same_store(raw_folder: Path, tmp_path: Path) -> None:
    raw = open_raw(raw_folder)
    for name, workers in (("one", 1), ("two", 2)):
        pipeline.preprocess(raw, make_plans(), tmp_path / name, workers=workers)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*"))
    for file in files:
        if (tmp_path / "one" / file).is_file():
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def run(*arguments: Any) -> int:
    return preprocess.main([str(a) for a in arguments])


def test_command(raw_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plans.json").write_text(json.dumps(make_plans().to_nnunet()))
    out = tmp_path / "my_store"
    plans = ("--plans", tmp_path / "plans.json", "--configuration=test")
    assert run("--raw", raw_folder, f"--out={out}", *plans) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert len(store.open_store(out).case_ids) == 5
    assert run("--raw", tmp_path / "absent", "--out", out, *plans) == 1
    assert "absent is not a folder" in capsys.readouterr().err
    for wrong in (
        ["--raw", raw_folder, "--out", out],
        ["--raw", raw_folder, *plans, "--out", out, "--workers=-1"],
    ):
        with pytest.raises(SystemExit) as exit_info:
            run(*wrong)
        assert exit_info.value.code == 2


def test_command_with_a_config(raw_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(
        "from panther_jax.config import DataConfig, TrainConfig, demo\n"
        "def get_config():\n"
        "    return demo(TrainConfig(DataConfig('Dataset001_Test')))\n"
    )
    out = tmp_path / "store"
    assert run("--raw", raw_folder, "--out", out, "--config", config) == 0
    opened = store.open_store(out)
    assert opened.plans.spacing == (3.0, 3.0, 3.0)
    assert not (out / "dataset_fingerprint.json").exists()


def test_help_is_quick_and_imports_no_jax() -> None:
    code = (
        "import sys; from panther_jax import planning, preprocess, store\n"
        "assert not {'jax', 'SimpleITK', 'tyro'} & set(sys.modules), 'heavy import'\n"
        "preprocess.main(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "example:" in result.stdout
