"""The labels of a data set: names, ids, regions, the ignore id."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from panther_jax.base.errors import PlansError

# -------------------------------------------------------------------------------------- labels

LabelValue = int | tuple[int, ...]


@dataclass(frozen=True)
class Labels:
    """The label declaration of a ``dataset.json`` (spec 02 §6): names, ids, regions, ignore id."""

    names: tuple[tuple[str, LabelValue], ...]
    regions_class_order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        values = dict(self.names)
        if len(values) != len(self.names):
            raise PlansError(f"labels: a name occurs twice in {[n for n, _ in self.names]}")
        if values.get("background") != 0:
            raise PlansError(
                "labels: 'background': 0 is mandatory, found "
                f"{values.get('background')!r}; declare it in dataset.json"
            )
        ignore = values.get("ignore")
        if ignore is not None and ignore != max(self.ids) + 1:
            raise PlansError(
                f"labels: 'ignore' must be the highest label + 1 = {max(self.ids) + 1}, "
                f"found {ignore!r}"
            )
        if self.has_regions:
            order = self.regions_class_order
            if order is None or len(order) != len(self.regions):
                raise PlansError(
                    f"labels: 'regions_class_order' must list one integer for each of the "
                    f"{len(self.regions)} regions, found {order!r}"
                )
        elif self.ids != tuple(range(len(self.ids))):
            raise PlansError(
                f"labels: ids must be consecutive from 0, found {list(self.ids)}; "
                "renumber the labels in dataset.json and the label files"
            )

    @property
    def ids(self) -> tuple[int, ...]:
        """All label ids except the ignore id, ascending, background included."""
        found: set[int] = set()
        for name, value in self.names:
            if name != "ignore":
                found.update(value if isinstance(value, tuple) else (value,))
        return tuple(sorted(found))

    @property
    def foreground_ids(self) -> tuple[int, ...]:
        """All label ids but background and ignore, ascending."""
        return tuple(i for i in self.ids if i != 0)

    @property
    def ignore_id(self) -> int | None:
        """The id whose voxels are left out of loss and metrics, or None."""
        value = dict(self.names).get("ignore")
        return None if value is None else int(value)  # type: ignore[arg-type]

    @property
    def has_regions(self) -> bool:
        """True if any label is declared as several ids, which makes the task region-based."""
        return any(isinstance(v, tuple) and len(v) > 1 for _, v in self.names)

    @property
    def regions(self) -> tuple[LabelValue, ...]:
        """Regions in declaration order, without background and ignore; empty in label mode."""
        if not self.has_regions:
            return ()
        return tuple(v for n, v in self.names if n != "ignore" and v not in (0, (0,)))

    @property
    def num_outputs(self) -> int:
        """Network output channels: the regions, or all labels with background."""
        return len(self.regions) if self.has_regions else len(self.ids)

    @property
    def classes(self) -> tuple[tuple[str, LabelValue], ...]:
        """What is scored, by name: the regions, or the foreground labels in ascending order."""
        if self.has_regions:
            return tuple((n, v) for n, v in self.names if n != "ignore" and v not in (0, (0,)))
        flat = ((n, v[0] if isinstance(v, tuple) else v) for n, v in self.names if n != "ignore")
        return tuple(sorted(((n, v) for n, v in flat if v != 0), key=lambda item: item[1]))

    @property
    def allowed_values(self) -> tuple[int, ...]:
        """Values that a label file may hold."""
        ignore = self.ignore_id
        return self.ids if ignore is None else (*self.ids, ignore)

    @staticmethod
    def from_dataset_json(dataset: Mapping[str, Any]) -> "Labels":
        """Read ``labels`` and ``regions_class_order`` of a dataset.json dictionary.

        Raises:
            PlansError: if labels are missing, not integers, or not consistent.
        """
        labels = dataset.get("labels")
        if not isinstance(labels, Mapping) or not labels:
            raise PlansError(
                "dataset.json: 'labels' must map names to integers, e.g. "
                '{"background": 0, "tumor": 1}'
            )
        names = tuple((str(name), _label_value(str(name), value)) for name, value in labels.items())
        order = dataset.get("regions_class_order")
        if order is not None and not (
            isinstance(order, (list, tuple)) and all(isinstance(i, int) for i in order)
        ):
            raise PlansError(
                f"dataset.json: 'regions_class_order' is {order!r}; expected a list of integers"
            )
        return Labels(names, None if order is None else tuple(order))

    def to_dataset_json(self) -> dict[str, Any]:
        """The ``labels`` (and ``regions_class_order``) entries of a dataset.json."""
        entry: dict[str, Any] = {
            "labels": {n: list(v) if isinstance(v, tuple) else v for n, v in self.names}
        }
        if self.regions_class_order is not None:
            entry["regions_class_order"] = list(self.regions_class_order)
        return entry


def _label_value(name: str, value: Any) -> LabelValue:
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in items):
        raise PlansError(
            f"dataset.json: label {name!r} is {value!r}; expected a non-negative integer or a list "
            "of them"
        )
    return tuple(items) if isinstance(value, (list, tuple)) else value
