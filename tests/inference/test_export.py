import json
import tracemalloc

import numpy as np
import pytest

from panther_jax.base.errors import StoreError
from panther_jax.inference import export
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.geometry import Geometry, Properties
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans, Resampler
from panther_jax.store.pickles import read_pickle, write_pickle

LOGITS_RESAMPLER = Resampler(
    "resample_data_or_seg_to_shape",
    (("force_separate_z", None), ("is_seg", False), ("order", 1), ("order_z", 0)),
)


def noise(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tiny_plans(spacing, transpose=(0, 1, 2), resampler=LOGITS_RESAMPLER):
    ndim = len(spacing)
    arch = ArchSpec(
        network="PlainConvUNet",
        in_channels=1,
        num_outputs=3,
        features=(4, 8),
        kernel_sizes=((3,) * ndim,) * 2,
        strides=((1,) * ndim, (2,) * ndim),
        blocks=(1, 1),
        decoder_convs=(1,),
    )
    return Plans(
        dataset_name="Dataset001_Toy",
        plans_name="toy",
        configuration="toy",
        spacing=tuple(spacing),
        patch_size=(8,) * ndim,
        batch_size=2,
        batch_dice=False,
        normalization=("ZScoreNormalization",),
        use_mask_for_norm=(False,),
        resampling_image=resampler,
        resampling_label=resampler,
        resampling_logits=resampler,
        arch=arch,
        transpose_forward=tuple(transpose),
    )


def properties_of(shape_before_crop, crop_box, spacing_zyx, transpose=(0, 1, 2)):
    raw_shape = [0] * 3
    for axis, source in enumerate(transpose):
        raw_shape[source] = shape_before_crop[axis]
    geometry = Geometry(
        tuple(raw_shape),
        tuple(spacing_zyx),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    )
    box = tuple((int(low), int(high)) for low, high in crop_box)
    return Properties(geometry, tuple(shape_before_crop), box, tuple(h - lo for lo, h in box))


def golden_exports(golden):
    arrays = np.load(golden / "inference" / "export.npz")
    index = json.loads((golden / "inference" / "export.json").read_text())
    assert index
    for case, entry in index.items():
        transpose = tuple(entry["transpose_forward"])
        stored = entry["properties"]
        properties = properties_of(
            stored["shape_before_cropping"],
            stored["bbox_used_for_cropping"],
            stored["spacing"],
            transpose,
        )
        plans = tiny_plans(entry["config_spacing"], transpose)
        labels = Labels.from_dataset_json(entry["dataset_json"])
        found = {k.split("__")[1]: arrays[k] for k in arrays.files if k.split("__")[0] == case}
        yield case, found, properties, plans, labels


@pytest.mark.golden
def test_label_maps_equal_the_reference(golden):
    for case, arrays, properties, plans, labels in golden_exports(golden):
        label = export.logits_to_label(arrays["logits"], properties, plans, labels)
        assert label.dtype == arrays["seg"].dtype
        assert label.shape == properties.geometry.shape_zyx == arrays["seg"].shape
        # README: equal but for float16 ties
        assert (label != arrays["seg"]).mean() <= 0.001, case


@pytest.mark.golden
def test_probabilities_equal_the_reference(golden):
    for case, arrays, properties, plans, labels in golden_exports(golden):
        found = export.logits_to_probabilities(arrays["logits"], properties, plans, labels)
        assert found.dtype == np.float32
        assert found.shape == arrays["probs"].shape
        # README: a float16 ulp of the logits
        np.testing.assert_allclose(found, arrays["probs"], atol=2e-3, err_msg=case)
        np.testing.assert_array_equal(found == 0, arrays["probs"] == 0, err_msg=case)


TUMOR = Labels((("background", 0), ("tumor", 1), ("pancreas", 2)))
REGIONS = Labels((("background", 0), ("whole", (1, 2)), ("tumor", 1)), (2, 1))


def test_label_map_is_placed_and_transposed_back():
    transpose = (2, 0, 1)
    properties = properties_of((9, 6, 7), ((2, 8), (1, 4), (3, 7)), (1.0, 2.0, 3.0), transpose)
    plans = tiny_plans((3.0, 1.0, 2.0), transpose)  # the raw spacing, transposed: no resampling
    logits = noise(3, 6, 3, 4)
    label = export.logits_to_label(logits, properties, plans, TUMOR)
    assert label.shape == (6, 7, 9) and label.dtype == np.uint8
    expected = np.zeros((9, 6, 7), np.uint8)
    expected[2:8, 1:4, 3:7] = logits.argmax(axis=0)
    np.testing.assert_array_equal(label.transpose(transpose), expected)

    found = export.logits_to_probabilities(logits, properties, plans, TUMOR)
    powers = np.exp(logits.astype(np.float64))
    everywhere = np.zeros((3, 9, 6, 7))
    everywhere[0] = 1
    everywhere[:, 2:8, 1:4, 3:7] = powers / powers.sum(axis=0)
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), everywhere, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_first_of_equal_classes_wins_after_rounding(dtype):
    properties = properties_of((1, 1, 3), ((0, 1), (0, 1), (0, 3)), (1.0, 1.0, 1.0))
    logits = np.array([[1.0, 2.0, 1.0], [1.0, 2.0001, 3.0], [1.0, 2.0002, 3.0]])
    logits = logits.reshape(3, 1, 1, 3).astype(dtype)
    label = export.logits_to_label(logits, properties, tiny_plans((1.0, 1.0, 1.0)), TUMOR)
    assert label.ravel().tolist() == ([0, 0, 1] if dtype == np.float16 else [0, 2, 1])


def test_resampled_values_are_compared_in_the_dtype_of_the_logits():
    # Between the samples of output 1 lie values that float16 rounds to those of output 0.
    properties = properties_of((1, 1, 4), ((0, 1), (0, 1), (0, 4)), (1.0, 1.0, 0.5))
    plans = tiny_plans((1.0, 1.0, 1.0))
    logits = np.zeros((3, 1, 1, 2), np.float16)
    logits[0], logits[1] = 1.0, np.array([1.0, np.nextafter(np.float16(1), np.float16(2))])
    logits[2] = -1
    half = export.logits_to_label(logits, properties, plans, TUMOR).ravel()
    single = export.logits_to_label(logits.astype(np.float32), properties, plans, TUMOR).ravel()
    assert half.tolist() == [0, 0, 1, 1]
    assert single.tolist() == [0, 1, 1, 1]


def test_regions_overwrite_in_class_order():
    properties = properties_of((1, 1, 4), ((0, 1), (0, 1), (0, 4)), (1.0, 1.0, 1.0))
    plans = tiny_plans((1.0, 1.0, 1.0))
    logits = np.array([[1.0, 1.0, -1.0, 0.0], [-1.0, 2.0, 2.0, 0.0]], np.float32)
    logits = logits.reshape(2, 1, 1, 4)
    label = export.logits_to_label(logits, properties, plans, REGIONS)
    assert label.ravel().tolist() == [2, 1, 1, 0]  # exactly 0.5 is not inside
    found = export.logits_to_probabilities(logits, properties, plans, REGIONS)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_two_dimensional_plans_keep_the_slices():
    properties = properties_of((3, 8, 6), ((0, 3), (0, 8), (0, 6)), (5.0, 1.0, 1.0))
    logits = noise(3, 3, 4, 3)
    label = export.logits_to_label(logits, properties, tiny_plans((2.0, 2.0)), TUMOR)
    assert label.shape == (3, 8, 6)
    for z in range(3):
        alone = properties_of((1, 8, 6), ((0, 1), (0, 8), (0, 6)), (5.0, 1.0, 1.0))
        one = export.logits_to_label(
            logits[:, z : z + 1], alone, tiny_plans((5.0, 2.0, 2.0)), TUMOR
        )
        np.testing.assert_array_equal(label[z], one[0])


def test_many_labels_need_sixteen_bits():
    names = (("background", 0), *((f"label {i}", i) for i in range(1, 256)))
    properties = properties_of((1, 1, 2), ((0, 1), (0, 1), (0, 2)), (1.0, 1.0, 1.0))
    logits = np.zeros((256, 1, 1, 2), np.float32)
    logits[255, ..., 1] = 1
    plans = tiny_plans((1.0, 1.0, 1.0))
    label = export.logits_to_label(logits, properties, plans, Labels(names))
    assert label.dtype == np.uint16 and label.ravel().tolist() == [0, 255]


def peak_of(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_for_a_label_map_does_not_grow_with_the_number_of_classes():
    shape = (40, 96, 96)
    properties = properties_of(shape, tuple((0, n) for n in shape), (1.0, 1.0, 1.0))
    plans = tiny_plans((2.0, 2.0, 2.0))
    peaks = []
    for num_classes in (3, 30):
        others = tuple((f"label {i}", i) for i in range(1, num_classes))
        labels = Labels((("background", 0), *others))
        logits = noise(num_classes, 20, 48, 48)
        peaks.append(
            peak_of(lambda x=logits, n=labels: export.logits_to_label(x, properties, plans, n))
        )
    voxels = shape[0] * shape[1] * shape[2]
    assert peaks[1] < 1.1 * peaks[0]
    # a label map, the highest logits, and slabs of a few arrays; never all classes
    assert peaks[1] < voxels * (1 + 4) + 8 * 8 * export.SLAB_VOXELS


def test_classes_may_come_one_by_one():
    properties = properties_of((6, 7, 8), ((0, 6), (1, 7), (0, 8)), (1.0, 1.0, 2.0))
    plans = tiny_plans((1.5, 1.5, 1.5))
    logits = noise(3, 4, 5, 9)
    whole = export.logits_to_label(logits, properties, plans, TUMOR)
    one_by_one = export.logits_to_label(iter(list(logits)), properties, plans, TUMOR)
    np.testing.assert_array_equal(whole, one_by_one)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("name", ["spline", "torch", "cubic"])
def test_slabs_change_nothing(monkeypatch, transpose, name):
    resampler = {
        "spline": LOGITS_RESAMPLER,
        "torch": Resampler("resample_torch_fornnunet", (("force_separate_z", None),)),
        "cubic": Resampler("resample_data_or_seg_to_shape", (("order", 3), ("order_z", 0))),
    }[name]
    properties = properties_of((9, 12, 11), ((1, 9), (0, 12), (2, 9)), (1.0, 2.0, 1.5), transpose)
    plans = tiny_plans((2.0, 1.4, 1.7), transpose, resampler)
    logits = noise(3, 5, 10, 6)
    whole = export.logits_to_label(logits, properties, plans, TUMOR)
    probabilities = export.logits_to_probabilities(logits, properties, plans, TUMOR)
    monkeypatch.setattr(export, "SLAB_VOXELS", 1)  # one raw slice at a time
    np.testing.assert_array_equal(export.logits_to_label(logits, properties, plans, TUMOR), whole)
    sliced = export.logits_to_probabilities(logits, properties, plans, TUMOR)
    np.testing.assert_allclose(sliced, probabilities, atol=1e-6)  # float32 sums in another order
    assert (probabilities.argmax(0) == whole).mean() > 0.999
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)


def test_saved_probabilities_are_what_nnunet_reads(tmp_path):
    properties = properties_of((6, 7, 8), ((0, 6), (1, 7), (0, 8)), (1.0, 1.0, 2.0))
    found = np.abs(noise(3, 6, 7, 8))
    export.save_probabilities(tmp_path, "case", found, properties)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.json", "case.npz", "case.pkl"]
    with np.load(tmp_path / "case.npz") as arrays:
        assert arrays.files == ["probabilities"]
        np.testing.assert_array_equal(arrays["probabilities"], found)
    entry = read_pickle(tmp_path / "case.pkl")
    assert entry["spacing"] == [1.0, 1.0, 2.0]
    assert entry["sitk_stuff"]["spacing"] == (2.0, 1.0, 1.0)
    assert entry["bbox_used_for_cropping"] == [[0, 6], [1, 7], [0, 8]]
    stored = json.loads((tmp_path / "case.json").read_text())
    assert Properties.from_json(stored) == properties


def test_only_plain_values_are_pickled(tmp_path):
    with pytest.raises(StoreError, match="ndarray"):
        write_pickle(tmp_path / "x.pkl", {"a": [np.zeros(2)]})
    assert not list(tmp_path.iterdir())
