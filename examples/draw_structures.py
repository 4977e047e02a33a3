"""Draw a structure set over a slice of its series, by SimpleITK and pydicom alone.

    python examples/draw_structures.py --series FOLDER --rtstruct FILE --out overlay.png

The slice is the one on which the contours have most points.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np


def draw(folder: Path, rtstruct: Path, out: Path) -> None:
    """Draw one slice and its contours to a picture."""
    import matplotlib
    import pydicom
    import SimpleITK as sitk

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    dataset = pydicom.dcmread(rtstruct)
    names = {r.ROINumber: r.ROIName for r in dataset.StructureSetROISequence}
    contours = list(_contours(dataset, image))
    if not contours:
        raise SystemExit(f"{rtstruct} holds no contour")
    counts: Counter[int] = Counter()
    for _, points in contours:
        counts[round(points[0, 2])] += len(points)
    number = counts.most_common(1)[0][0]
    plane = sitk.GetArrayViewFromImage(image)[number]
    spacing = image.GetSpacing()
    figure, axis = plt.subplots(
        figsize=(5, 5 * plane.shape[0] * spacing[1] / plane.shape[1] / spacing[0])
    )
    low, high = np.percentile(plane, (1, 99.5))
    axis.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=spacing[1] / spacing[0])
    for roi, points in contours:
        if round(points[0, 2]) == number:
            closed = np.vstack([points, points[:1]])
            label = names.pop(roi.ReferencedROINumber, None)
            colour = np.array(roi.ROIDisplayColor, float) / 255
            axis.plot(closed[:, 0], closed[:, 1], color=colour, linewidth=1.2, label=label)
    axis.legend(loc="lower right", fontsize=8)
    axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(out, dpi=80)
    plt.close(figure)


def _contours(dataset: Any, image: Any) -> Any:
    """Each contour with its ROI, as points of column, row and slice in voxels."""
    for roi in dataset.ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            yield roi, np.array([image.TransformPhysicalPointToContinuousIndex(p) for p in points])


def main(argv: list[str] | None = None) -> int:
    """Draw the picture; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--series", type=Path, required=True, help="folder of the series alone")
    parser.add_argument("--rtstruct", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="PNG")
    arguments = parser.parse_args(argv)
    draw(arguments.series, arguments.rtstruct, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
