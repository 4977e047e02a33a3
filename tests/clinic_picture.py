"""Make the picture of docs/clinic.md: PYTHONPATH=.:tests python tests/clinic_picture.py

A phantom's scan as a DICOM series, its label map as a structure set, drawn by the example.
"""

import runpy
import tempfile
from pathlib import Path

import dicom_files as made
import numpy as np

from panther_jax.images import phantom
from panther_jax.images.dicom_objects import ModelDescription
from panther_jax.images.dicom_series import find_series
from panther_jax.images.rtstruct import write_rtstruct
from panther_jax.plans.labels import Labels

ROOT = Path(__file__).resolve().parent.parent


def main(out: Path) -> None:
    case = phantom.make_phantom_case(0)
    grid = case.geometry
    axes = np.array(grid.direction).reshape(3, 3).T
    stack = made.Stack(
        np.round(case.image[0]).clip(0).astype(np.uint16),
        tuple(axes[0]),
        tuple(axes[1]),
        origin=grid.origin_xyz,
        spacing=grid.spacing_zyx,
        step=tuple(axes[2] * grid.spacing_zyx[0]),
    )
    labels = Labels(tuple(phantom.LABELS.items()))
    with tempfile.TemporaryDirectory() as name:
        folder, rtstruct = Path(name) / "series", Path(name) / "rt.dcm"
        made.write(folder, stack)
        (series,) = find_series(folder).series
        label = case.label if np.linalg.det(axes) > 0 else case.label[::-1]
        write_rtstruct(label, series, labels, ModelDescription("phantom", "0", "0" * 64), rtstruct)
        draw = runpy.run_path(str(ROOT / "examples" / "draw_structures.py"))["draw"]
        draw(folder, rtstruct, out)


if __name__ == "__main__":
    main(ROOT / "docs" / "clinic.png")
