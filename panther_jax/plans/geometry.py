"""Physical space of a voxel grid, and how a case came from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# ------------------------------------------------------------------------------------ geometry


@dataclass(frozen=True)
class Geometry:
    """Physical space of a voxel grid: shape, spacing (z, y, x), origin (x, y, z), direction.

    Lengths are in mm; ``direction`` is ITK's direction matrix, row by row.
    """

    shape_zyx: tuple[int, ...]
    spacing_zyx: tuple[float, ...]
    origin_xyz: tuple[float, ...]
    direction: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The geometry as a JSON-able dictionary."""
        return {
            "shape_zyx": list(self.shape_zyx),
            "spacing_zyx": list(self.spacing_zyx),
            "origin_xyz": list(self.origin_xyz),
            "direction": list(self.direction),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Geometry":
        """Inverse of :meth:`to_json`."""
        return Geometry(
            shape_zyx=tuple(int(n) for n in value["shape_zyx"]),
            spacing_zyx=tuple(float(s) for s in value["spacing_zyx"]),
            origin_xyz=tuple(float(o) for o in value["origin_xyz"]),
            direction=tuple(float(d) for d in value["direction"]),
        )


# ---------------------------------------------------------------------------------- properties


@dataclass(frozen=True)
class Properties:
    """How a case came from its raw grid: what the inverse of preprocessing needs.

    ``geometry`` is that of the raw image; crop box and shapes are after ``transpose_forward``;
    ``crop_box`` holds half-open ``(low, high)`` pairs, an axis.
    """

    geometry: Geometry
    shape_before_crop: tuple[int, ...]
    crop_box: tuple[tuple[int, int], ...]
    shape_before_resampling: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The properties as a JSON-able dictionary."""
        return {
            "geometry": self.geometry.to_json(),
            "shape_before_crop": list(self.shape_before_crop),
            "crop_box": [list(pair) for pair in self.crop_box],
            "shape_before_resampling": list(self.shape_before_resampling),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Properties":
        """Inverse of :meth:`to_json`."""
        return Properties(
            geometry=Geometry.from_json(value["geometry"]),
            shape_before_crop=tuple(int(n) for n in value["shape_before_crop"]),
            crop_box=tuple((int(low), int(high)) for low, high in value["crop_box"]),
            shape_before_resampling=tuple(int(n) for n in value["shape_before_resampling"]),
        )
