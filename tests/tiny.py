"""Tiny raw data sets in nnU-Net layout: a bright box inside a less bright one, in noise."""

import json

import numpy as np

from panther_jax.images.imageio import write_image, write_label
from panther_jax.plans.geometry import Geometry

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
TURNED = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
LABELS = {"background": 0, "tumor": 1, "pancreas": 2}


def make_raw(folder, *, num_cases=5, shape=(12, 24, 24), spacing=(6.0, 6.0, 6.0), labels=None):
    """Write ``num_cases`` MR cases; labels 1 inside 2, at a place that varies by case."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number in range(num_cases):
        rng = np.random.default_rng(number)
        label = np.zeros(shape, np.int16)
        corner = [int(rng.integers(1, n // 3)) for n in shape]
        outer = tuple(slice(c, c + n // 2) for c, n in zip(corner, shape, strict=True))
        inner = tuple(slice(c + 1, c + n // 4) for c, n in zip(corner, shape, strict=True))
        label[outer], label[inner] = 2, 1
        image = 100 + 50 * (label == 2) + 90 * (label == 1) + rng.normal(0, 5, shape)
        geometry = Geometry(shape, spacing, (1.0, 2.0, 3.0), IDENTITY)
        write_image(
            folder / "imagesTr" / f"case_{number}_0000.mha", image.astype(np.float32), geometry
        )
        write_label(folder / "labelsTr" / f"case_{number}.mha", label, geometry)
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": labels or LABELS,
        "numTraining": num_cases,
        "file_ending": ".mha",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def write_scan(path, shape=(20, 22, 18), spacing=(1.2, 1.0, 0.9), seed=0):
    rng = np.random.default_rng(seed)
    image = 100 + 20 * rng.standard_normal(shape).astype(np.float32)
    image[:2] = 0  # cropped away
    geometry = Geometry(shape, spacing, (-3.0, 4.5, 10.0), TURNED)
    write_image(path, image, geometry)
    return path
