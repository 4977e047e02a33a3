"""DICOM scans of a made patient, whom no message may name."""

import dicom_files as made
import numpy as np
from dicom_files import Stack

from panther_jax.plans.labels import Labels

LABELS = Labels((("background", 0), ("lesion", 1), ("pancreas", 2)))
PRIVATE = ("ller", "4711", "19500102", "ACC-12345", "House", "Hospital", "T2 TSE", "1.2.3.4")
SHAPE = (16, 14, 16)


def scan(number=0, **changes):
    voxels = np.random.default_rng(number).normal(300, 60, SHAPE).astype(np.int16)
    voxels[:2] = 0
    uid = f"1.2.3.4.{5 + number}"
    axes = made.turned((4.0, 3.0, -5.0))[:2].tolist()
    return Stack(voxels, *axes, spacing=(1.2, 1.0, 0.9), series=uid, number=number, **changes)
