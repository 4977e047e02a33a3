"""Whether two images lie on one grid."""

from collections.abc import Sequence
from pathlib import Path

from panther_jax.base.errors import DatasetError
from panther_jax.plans.geometry import Geometry

GEOMETRY_TOLERANCES = (1e-3, 1e-3, 1e-4)  # spacing mm, origin mm, direction


# ------------------------------------------------------------------------------------ geometry


def geometry_differences(
    a: Geometry,
    b: Geometry,
    *,
    names: tuple[str, str] = ("label", "image"),
    tolerances: tuple[float, float, float] = GEOMETRY_TOLERANCES,
) -> tuple[str, ...]:
    """List what differs beyond the tolerances of spacing, origin (mm) and direction."""
    compared = (
        ("shape", " voxels", a.shape_zyx, b.shape_zyx, 0.0),
        ("spacing", " mm", a.spacing_zyx, b.spacing_zyx, tolerances[0]),
        ("origin", " mm", a.origin_xyz, b.origin_xyz, tolerances[1]),
        ("direction", "", a.direction, b.direction, tolerances[2]),
    )
    return tuple(
        f"{names[0]} {what} {_numbers(x)}{unit} differs from {names[1]} {what} {_numbers(y)}{unit}"
        for what, unit, x, y, tolerance in compared
        if len(x) != len(y) or any(abs(p - q) > tolerance for p, q in zip(x, y, strict=True))
    )


def check_geometry(
    case_id: str,
    a: Geometry,
    b: Geometry,
    *,
    names: tuple[str, str] = ("label", "image"),
    paths: tuple[Path | str, Path | str] | None = None,
    spacing_tolerance_mm: float = GEOMETRY_TOLERANCES[0],
    origin_tolerance_mm: float = GEOMETRY_TOLERANCES[1],
    direction_tolerance: float = GEOMETRY_TOLERANCES[2],
) -> None:
    """Compare two grids that must be the same; ``names`` and ``paths`` are those of a and b.

    Raises:
        DatasetError: naming the case, what differs, both files, and the remedy.
    """
    tolerances = (spacing_tolerance_mm, origin_tolerance_mm, direction_tolerance)
    found = geometry_differences(a, b, names=names, tolerances=tolerances)
    if not found:
        return
    lines = [f"case {case_id!r}: {found[0]}", *(f"  and {phrase}" for phrase in found[1:])]
    if paths is not None:
        lines += [f"  {name}: {path}" for name, path in zip(names, paths, strict=True)][::-1]
    remedy = f"  Resample the {names[0]} to the grid of the {names[1]}"
    if not any(" shape " in phrase for phrase in found):
        remedy += ", or copy the header if the voxels do correspond"
    raise DatasetError("\n".join([*lines, f"{remedy}."]))


def _numbers(values: Sequence[float]) -> str:
    # Six decimals show the smallest difference that counts, and hide a writer's rounding.
    return f"({', '.join(str(v if isinstance(v, int) else round(v, 6) + 0.0) for v in values)})"
