"""The sheet of augmentations: what it shows, and its command."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IDENTITY, make_raw

from panther_jax import config
from panther_jax.augment import gallery, policies, recipes
from panther_jax.augment.transform import Draw, Example, Transform
from panther_jax.images.raw_dataset import Case
from panther_jax.plans.geometry import Geometry

# Compiling takes most of the time of these tests, running next to none.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_case(shape, corner):
    rng = np.random.default_rng(0)
    label = np.zeros(shape, np.int16)
    label[tuple(slice(c, c + 3) for c in corner)] = 1
    geometry = Geometry(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), IDENTITY)
    return Case("tiny", rng.normal(50, 9, (1, *shape)).astype(np.float32), label, geometry)


@pytest.mark.parametrize("corner", [(0, 0, 0), (4, 9, 14), (7, 17, 21)])
def test_patch_is_centred_on_the_labels(corner):
    case = make_case((10, 20, 24), corner)
    patch = gallery.cut_patch(case)
    assert patch.image.shape == patch.label.shape == (20, 40, 40)
    assert patch.label[10, 20, 20] == 1 and (patch.label == 1).sum() == 27
    outside = patch.label == -1
    assert (patch.image[outside] == 0).all() and (patch.image[~outside] != 0).all()
    assert abs(case.image.mean()) > 40 > 1 > abs(patch.image[~outside].mean())  # z-scored


PATCH = (8, 16, 16)


def test_every_transform_of_every_policy_has_a_panel():
    groups = gallery.panels(PATCH)
    titles = " ".join(title for members in groups.values() for title in members)
    for policy in recipes.BUILT_IN:
        patch = policies.patch_geometry(policy, PATCH)
        for transform in recipes.find_policy(policy).transforms:
            examples = list(transform.examples(patch))
            assert examples, transform
            assert all(title in groups[transform.family] for title, _ in examples)
    words = ["noise", "blur", "brightness ×", "brightness +", "contrast", "unclipped", "gamma"]
    words += ["inverted gamma", "low resolution", "median", "rectangles", "gradient", "local gamma"]
    words += ["sharpening", "rotation", "scale", "mirror", "rot90", "transpose", "dummy 2-D"]
    for word in (*words, "mask", "cubic", "wide blur", "clipped sharpening"):
        assert word in titles, word


def test_panels_change_the_image():
    patch = gallery.cut_patch(make_case((8, 16, 16), (3, 6, 6)))
    image, label = jnp.asarray(patch.image), jnp.asarray(patch.label)
    plain = gallery._crop(image, label)[0]
    groups = gallery.panels(PATCH)
    for title, change in [*groups["geometry"].items()][1:]:
        changed, moved = quick_jit(change)(image, label)
        assert changed.shape == moved.shape == PATCH
        assert (changed != plain).any(), title
    for title, change in [*groups["intensity"].items()][::4]:  # all take long to compile
        changed, same = quick_jit(change)(image, label)
        assert (changed != plain).any() and (same == gallery._crop(image, label)[1]).all(), title


@dataclass(frozen=True, kw_only=True)
class Negative(Transform):
    family: ClassVar[str] = "mine"

    def sample(self, key, num_channels, patch):
        return Draw(self.gated(key, num_channels, 0)[0], jnp.full(num_channels, -1.0))

    def apply(self, volume, value):
        return value * volume

    def examples(self, patch):
        yield Example("negative", jnp.float32(-1))


def test_a_users_transform_is_shown(monkeypatch):
    monkeypatch.setattr(config.POLICIES, "_added", {})
    default = recipes.find_policy("default")
    added = (*default.transforms, Negative(gate=(0.0, 0.1)))
    config.POLICIES.add("negative")(lambda: dataclasses.replace(default, transforms=added))
    change = gallery.panels(PATCH)["mine"]["negative"]
    only = gallery.panels(PATCH, ["negative"])
    assert set(only) == {"geometry", "intensity", "mine"}
    patch = gallery.cut_patch(make_case((8, 16, 16), (3, 6, 6)))
    image, label = jnp.asarray(patch.image), jnp.asarray(patch.label)
    np.testing.assert_array_equal(change(image, label)[0], -gallery._crop(image, label)[0])


def test_command_draws_a_scan(tmp_path, monkeypatch, capsys):
    raw, out = make_raw(tmp_path / "raw", num_cases=2), tmp_path / "new" / "sheet.png"
    asked = []

    def few(patch_size, names=None):
        asked.append(names)
        groups = all_panels(patch_size, names)
        return {heading: dict([*members.items()][:2]) for heading, members in groups.items()}

    all_panels = gallery.panels
    monkeypatch.setattr(gallery, "panels", few)
    assert gallery.main(["--out", str(out), "--raw", str(raw), "--case", "case_1"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out
    assert list(out.parent.iterdir()) == [out]
    assert gallery.main(["--out", str(out), "--raw", str(raw), "--config", "smoke"]) == 0
    assert asked == [None, ("default",)]
    assert gallery.main(["--out", str(out), "--raw", str(raw), "--case", "nobody"]) == 2
    assert gallery.main(["--out", str(out), "--raw", str(raw), "--config", "nothing"]) == 1
    assert gallery.main(["--out", str(tmp_path / "sheet.jpg")]) == 2
    assert gallery.main(["--out", str(out), "--raw", str(tmp_path / "nowhere")]) == 1
