"""The sheet of augmentations: what it shows, and its command."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import IDENTITY, make_raw

from panther_jax.augment import gallery, recipes
from panther_jax.images.raw_dataset import Case
from panther_jax.plans.geometry import Geometry


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


def test_every_transform_of_every_policy_has_a_panel():
    titles = " ".join(title for _, members in gallery.panels() for title, _ in members)
    words = {"shift": "brightness +", "gamma_inverted": "inverted gamma", "rectangles": "rectangle"}
    words |= {"contrast_unclipped": "unclipped", "sharpen": "sharpening"}
    for policy in recipes.POLICIES:
        for step in recipes.policy_spec(policy).steps:
            assert words.get(step.kind, step.kind.replace("_", " ")) in titles, step.kind
    for word in ("rotation", "scale", "mirror", "rot90", "transpose", "dummy 2-D", "mask", "cubic"):
        assert word in titles


def test_panels_change_the_image(tmp_path):
    patch = gallery.cut_patch(make_case((8, 16, 16), (3, 6, 6)))
    image, label = jnp.asarray(patch.image), jnp.asarray(patch.label)
    for title, change in gallery._geometry_panels()[-6:]:
        changed, moved = change(image, label)
        assert changed.shape == moved.shape == (8, 16, 16)
        assert (changed != gallery._crop(image, label)[0]).any(), title


def test_command_draws_a_scan(tmp_path, monkeypatch, capsys):
    raw, out = make_raw(tmp_path / "raw", num_cases=2), tmp_path / "new" / "sheet.png"
    few = [("one", gallery._geometry_panels()[:2]), ("two", gallery._local_panels()[-1:])]
    monkeypatch.setattr(gallery, "panels", lambda: iter(few))
    assert gallery.main(["--out", str(out), "--raw", str(raw), "--case", "case_1"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and str(out) in capsys.readouterr().out
    assert list(out.parent.iterdir()) == [out]
    assert gallery.main(["--out", str(out), "--raw", str(raw), "--case", "nobody"]) == 2
    assert gallery.main(["--out", str(tmp_path / "sheet.jpg")]) == 2
    assert gallery.main(["--out", str(out), "--raw", str(tmp_path / "nowhere")]) == 1
