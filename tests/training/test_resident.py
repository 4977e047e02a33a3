"""Patches cut on the device equal those cut on the host, bit by bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from panther_jax.devices.mesh import AXES, positions, put_batch, replicate
from panther_jax.training import resident, sampling

SHAPES = ((11, 13, 17), (5, 6, 20), (1, 30, 33), (16, 16, 16))
MESHES = ((1, 1), (2, 1), (2, 4))


@dataclasses.dataclass
class Stored:
    image: np.ndarray
    label: np.ndarray
    locations: list


def make_cases(num_channels=1, dtype=np.int8):
    """Cases of all shapes, of which none starts or ends as another does."""
    rng = np.random.default_rng(num_channels)
    cases = {}
    for number, shape in enumerate(SHAPES):
        image = rng.normal(size=(num_channels, *shape)).astype(np.float32)
        image[0, 0, 0, 0] = -0.0
        label = rng.integers(-1, np.iinfo(dtype).max, shape, endpoint=True, dtype=dtype)
        voxels = np.argwhere(label > 5)[:50]
        annotated = np.argwhere(label >= 0)[-60:]
        cases[f"case_{number}"] = Stored(image, label, [(1, voxels), ((-1, 0), annotated)])
    return cases


def bits(array):
    array = np.asarray(array)
    return array.view(np.int32) if array.dtype == np.float32 else array


def assert_same(found, image, label):
    assert found.image.dtype == np.float32 and found.label.dtype == np.int16
    np.testing.assert_array_equal(bits(found.image), bits(image))
    np.testing.assert_array_equal(found.label, label)


def on_device(cases, mesh):
    lines, outlines = resident.write_lines(dict(cases))
    return replicate(lines, mesh), outlines


def make_mesh(data, space):
    grid = np.array(jax.devices()[: data * space]).reshape(data, space)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("num_channels, dtype", [(1, np.int8), (3, np.int16)])
@pytest.mark.parametrize("patch", [(6, 8, 9), (20, 3, 40), (7, 10)])
def test_boxes_anywhere_are_cut_as_on_the_host(num_channels, dtype, patch):
    cases = make_cases(num_channels, dtype)
    lines, outlines = on_device(cases, make_mesh(1, 1))
    assert lines.label.dtype == dtype and lines.image.shape[0] == num_channels
    size = (1, *patch) if len(patch) == 2 else patch
    rng = np.random.default_rng(0)
    boxes, images, labels, missed, whole = [], [], [], 0, 0
    for name, case in cases.items():
        shape = case.label.shape
        assert outlines[name].shape == shape
        corners = [(0, 0, 0), tuple(-n for n in size), shape, (shape[0], 0, 0)]
        corners += [tuple(1 - n for n in size), tuple(n - 1 for n in shape)]
        for _ in range(60):
            low = [-n - 2 for n in size]
            corners.append(tuple(rng.integers(low, [n + 3 for n in shape]).tolist()))
        for start in corners:
            boxes.append((outlines[name].first_line, *shape, *start))
            image = sampling.crop_padded(case.image, start, size, sampling.IMAGE_PADDING)
            label = sampling.crop_padded(case.label, start, size, sampling.LABEL_PADDING)
            missed += not label.any() and not image.any()
            whole += all(0 <= s and s + p <= n for s, p, n in zip(start, size, shape, strict=True))
            if len(patch) == 2:
                image, label = image[:, 0], label[0]
            images.append(np.moveaxis(image, 0, -1))
            labels.append(label[..., None])
    assert missed > 10 and (whole > 0 or patch[-1] == 40)
    cut = jax.jit(lambda boxes: jax.vmap(lambda b: resident.cut_patch(lines, b, patch))(boxes))
    found = resident.Batch(*cut(jnp.array(boxes, jnp.int32)))
    assert_same(found, np.stack(images), np.stack(labels))


def laws():
    base = sampling.Sampling((8, 9, 10), (6, 8, 8), 4, 0.33, 3, 0, sampling.TRAIN_STREAM)
    yield base
    yield dataclasses.replace(base, stream=sampling.VALIDATION_STREAM, patch=(6, 8, 8))
    yield dataclasses.replace(base, has_ignore=True)
    yield dataclasses.replace(base, patch=(12, 11), final_patch=(8, 9))


@pytest.mark.parametrize("law", list(laws()), ids=["training", "validation", "ignore", "planar"])
@pytest.mark.parametrize("shape", MESHES)
def test_batches_equal_those_of_the_host_on_every_mesh(law, shape):
    cases, mesh = make_cases(), make_mesh(*shape)
    lines, outlines = on_device(cases, mesh)
    places = positions(mesh, 4)
    on_host = sampling.BatchSource(list(cases.values()), law, 30, places)
    boxes = sampling.BoxSource([outlines[name] for name in cases], law, 30, places)
    cut = jax.jit(resident.UncutBatch.cut)
    outside = 0
    for step in range(30):
        placed = put_batch(boxes[step], mesh, 4)["boxes"]
        found = cut(resident.UncutBatch(lines, placed, patch=law.patch, mesh=mesh))
        assert_same(found, on_host[step]["image"], on_host[step]["label"])
        outside += int((on_host[step]["label"] == -1).sum())
    assert outside > 100
    assert found.image.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, jax.P("data")), found.image.ndim
    )
    last = resident.UncutBatch(lines, placed, patch=law.patch, mesh=mesh)
    program = cut.lower(last).compile().as_text()
    for exchange in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert exchange not in program


def test_several_batches_are_taken_apart_step_by_step():
    mesh, law = make_mesh(2, 1), next(laws())
    lines, outlines = on_device(make_cases(), mesh)
    source = sampling.BoxSource(list(outlines.values()), law, 6, tuple(range(4)))
    stacked = {"boxes": np.stack([source[n]["boxes"] for n in range(6)])}
    placed = put_batch(stacked, mesh, 4, batch_axis=1)["boxes"]
    several = resident.UncutBatch(lines, placed, patch=law.patch, mesh=mesh)

    @jax.jit
    def all_patches(several):
        def one(count, drawn):
            return count + 1, several.of(drawn).cut()

        return jax.lax.scan(one, 0, several.drawn)

    count, found = all_patches(several)
    assert count == 6
    on_host = sampling.BatchSource(list(make_cases().values()), law, 6, tuple(range(4)))
    expected = [on_host[n] for n in range(6)]
    assert_same(found, *(np.stack([e[name] for e in expected]) for name in ("image", "label")))


def test_cases_are_written_once_and_their_bytes_are_known_before():
    cases = make_cases(2)
    needed = resident.resident_bytes(tuple(cases.values()))
    given = dict(cases)
    lines, outlines = resident.write_lines(given)
    assert not given  # so that a case need not be in memory twice
    assert needed == lines.image.nbytes + lines.label.nbytes
    voxels = sum(case.label.size for case in cases.values())
    assert lines.label.size - voxels < resident.LINE * len(cases)
    firsts = [outline.first_line for outline in outlines.values()]
    assert firsts == sorted(set(firsts)) and firsts[0] == 0
