"""The preprocessed store: plain ``.npy`` files with a JSON a case."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer

from panther_jax.base.errors import StoreError
from panther_jax.base.files import (
    json_bytes,
    read_json,
    read_object,
    remove_stale,
    write_error,
    write_json,
    writing_together,
)
from panther_jax.images.imageio import label_values
from panther_jax.plans.geometry import Properties
from panther_jax.plans.labels import Labels, LabelValue
from panther_jax.plans.plans import NORMALIZATION_BY_CHANNEL, Plans
from panther_jax.store.compressed import CompressedArray
from panther_jax.store.layout import (
    DATASET,
    FINGERPRINT,
    PLANS,
    REFERENCES,
    RESERVED,
    SPLITS,
)
from panther_jax.store.nnunet import (
    NnunetFolder,
    is_nnunet_folder,
    open_folder,
    read_folder_case,
    reference_file,
)

FORMAT_VERSION = 1
WITHOUT_STATISTICS = {*NORMALIZATION_BY_CHANNEL.values(), "ZScoreNormalization"} - {
    "CTNormalization"
}


@dataclass(frozen=True)
class StoredCase:
    """A preprocessed case. ``label`` holds -1 outside the nonzero mask.

    ``locations`` has an entry a requested class or region, in the order of spec 02 §4.7: sampled
    voxel coordinates z, y, x in this grid, (n, 3), empty where the class is absent. Opened, arrays
    may be mapped or compressed files; :func:`in_memory` reads them.
    """

    id: str
    image: Float32[np.ndarray, "channel z y x"] | Float32[CompressedArray, "channel z y x"]
    label: Integer[np.ndarray, "z y x"] | Integer[CompressedArray, "z y x"]
    locations: tuple[tuple[LabelValue, Integer[np.ndarray, "_ 3"]], ...]
    properties: Properties


@dataclass(frozen=True)
class Store:
    """An opened store; ``case_ids`` are sorted. ``nnunet`` is set if nnU-Net made the folder."""

    folder: Path
    plans: Plans
    labels: Labels
    dataset: dict[str, Any]
    case_ids: tuple[str, ...]
    nnunet: NnunetFolder | None = None

    @property
    def splits_file(self) -> Path:
        """The splits: in the store, for nnU-Net's folders beside it."""
        folder = self.folder if self.nnunet is None else self.folder.parent
        return folder / SPLITS

    def reference(self, case_id: str) -> Path:
        """The raw label map of a case, which validation compares with."""
        if self.nnunet is not None:
            return reference_file(self.nnunet, case_id)
        return self.folder / REFERENCES / f"{case_id}{self.dataset['file_ending']}"


# ------------------------------------------------------------------------------------- reading


def open_store(folder: Path) -> Store:
    """Read the store's plans, dataset.json and list of cases; no arrays.

    A folder that nnU-Net preprocessed is a store too.

    Raises:
        FileNotFoundError: if the folder or one of its JSON files is missing.
        StoreError: if it holds no case.
    """
    folder = Path(folder)
    if not (folder / PLANS).is_file():
        if is_nnunet_folder(folder):
            return _nnunet_store(open_folder(folder))
        raise FileNotFoundError(
            f"{folder} is not a store: it has no {PLANS}, and no cases of nnU-Net\n"
            "  Make it with: python -m panther_jax.preprocess --raw RAW --out STORE --config FILE"
        )
    dataset = read_object(folder / DATASET)
    case_ids = stored_ids(folder)
    if not case_ids:
        raise StoreError(f"{folder} holds no complete case; run panther_jax.preprocess again")
    return Store(
        folder=folder,
        plans=Plans.from_nnunet(read_object(folder / PLANS), dataset),
        labels=Labels.from_dataset_json(dataset),
        dataset=dataset,
        case_ids=case_ids,
    )


def _nnunet_store(source: NnunetFolder) -> Store:
    labels = Labels.from_dataset_json(source.dataset)
    return Store(source.folder, source.plans, labels, source.dataset, source.case_ids, source)


def stored_ids(folder: Path) -> tuple[str, ...]:
    """Ids of the cases that have a JSON, sorted."""
    names = (p.name for p in folder.glob("*.json"))
    return tuple(sorted(n.removesuffix(".json") for n in names if n not in RESERVED))


def read_stored(store: Store, case_id: str) -> StoredCase:
    """Open one case, memory-mapped and read-only; :func:`in_memory` reads it whole.

    Compressed files of nnU-Net cannot be mapped and are decompressed as they are indexed.

    Raises:
        StoreError: if a file is missing, truncated, or not the array that the case's JSON names.
    """
    if store.nnunet is not None:
        found = read_folder_case(store.nnunet, case_id)
        return StoredCase(case_id, found.image, found.label, found.locations, found.properties)
    entry = _read_entry(store.folder, case_id)
    arrays = {}
    for name in ("image", "label"):
        path = _array_path(store.folder, case_id, name)
        arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
    with np.load(_locations_path(store.folder, case_id), allow_pickle=False) as stored:
        locations = tuple(
            (_key(key), stored[str(i)]) for i, key in enumerate(entry["location_keys"])
        )
    properties = Properties.from_json(entry["properties"])
    return StoredCase(case_id, arrays["image"], arrays["label"], locations, properties)


def in_memory(case: StoredCase) -> StoredCase:
    """The case with nothing left in files."""
    arrays = {name: getattr(case, name) for name in ("image", "label")}
    in_files = (np.memmap, CompressedArray)
    mapped = {name: np.array(a) for name, a in arrays.items() if isinstance(a, in_files)}
    return replace(case, **mapped)


def voxel_counts(store: Store, case_id: str) -> dict[int, int]:
    """Voxels of each value in a stored label map, without reading it (nnU-Net's are read)."""
    if store.nnunet is not None:
        label = read_folder_case(store.nnunet, case_id).label
        values, numbers = label_values(np.asarray(label))
        return {int(value): int(n) for value, n in zip(values, numbers, strict=True)}
    counts = _read_entry(store.folder, case_id)["voxel_counts"]
    return {int(value): int(count) for value, count in counts.items()}


def is_complete(folder: Path, case_id: str) -> bool:
    """Tell whether a case's JSON is there and its files are what it says."""
    try:
        _read_entry(folder, case_id)
    except (StoreError, FileNotFoundError):
        return False
    return True


def _key(key: Any) -> LabelValue:
    return tuple(key) if isinstance(key, list) else key


def _array_path(folder: Path, case_id: str, name: str) -> Path:
    return folder / f"{case_id}.{name}.npy"


def _locations_path(folder: Path, case_id: str) -> Path:
    return folder / f"{case_id}.locations.npz"


def _read_entry(folder: Path, case_id: str) -> dict[str, Any]:
    path = folder / f"{case_id}.json"
    if not path.is_file():
        raise StoreError(
            f"case {case_id!r} is not in the store {folder}; run panther_jax.preprocess again"
        )
    try:
        entry = read_object(path)
        if entry["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {entry['version']}, expected {FORMAT_VERSION}")
        files = dict(entry["files"])
        expected = {
            folder / file["name"]: (int(file["bytes"]), _array_entry(entry["arrays"].get(name)))
            for name, file in files.items()
        }
        if not {"image", "label", "locations"} <= set(files):
            raise KeyError("files")
        Properties.from_json(entry["properties"])
        _ = entry["location_keys"], entry["voxel_counts"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"{path} cannot be used: {type(error).__name__}: {error}\n"
            "  Delete it and run panther_jax.preprocess again; it redoes this case only."
        ) from None
    for path_of_file, (num_bytes, array) in expected.items():
        _check_file(path_of_file, num_bytes, array)
    return entry


def _array_entry(entry: Any) -> dict[str, Any] | None:
    return None if entry is None else {"shape": list(entry["shape"]), "dtype": str(entry["dtype"])}


def _check_file(path: Path, num_bytes: int, array: Mapping[str, Any] | None) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != num_bytes:
        state = "is missing" if found is None else f"has {found} bytes"
        raise StoreError(
            f"{path} {state}, expected {num_bytes} bytes: truncated, changed or deleted.\n"
            "  Run panther_jax.preprocess again with the same options; it redoes this case only."
        )
    if array is None:
        return
    try:
        header = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise StoreError(f"{path} is not an .npy file: {error}") from None
    if list(header.shape) != list(array["shape"]) or str(header.dtype) != array["dtype"]:
        raise StoreError(
            f"{path} holds {header.dtype} {header.shape}, expected {array['dtype']} "
            f"{tuple(array['shape'])}; run panther_jax.preprocess again"
        )


# ------------------------------------------------------------------------------------- writing


def write_stored(
    folder: Path,
    case: StoredCase,
    *,
    reference: Path | None = None,
    file_ending: str = "",
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write a case, with a copy of its raw label map ``reference``; all of it or nothing.

    ``sources`` are digests of the files that it was made from.

    Raises:
        WriteError: if the disk is full or a file cannot be written.
        StoreError: if the case is named like one of the store's own files.
    """
    if f"{case.id}.json" in RESERVED:
        raise StoreError(f"case {case.id!r}: a case cannot be named so in a store; rename it")
    keyed = {str(i): coordinates for i, (_, coordinates) in enumerate(case.locations)}
    paths: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "image": (
            _array_path(folder, case.id, "image"),
            lambda path: _write_array(path, np.asarray(case.image)),
        ),
        "label": (
            _array_path(folder, case.id, "label"),
            lambda path: _write_array(path, np.asarray(case.label)),
        ),
        "locations": (
            _locations_path(folder, case.id),
            lambda path: np.savez(path, **keyed),  # type: ignore[arg-type]
        ),
    }
    if reference is not None:
        target = folder / REFERENCES / f"{case.id}{file_ending}"
        paths["reference"] = (target, lambda path: shutil.copyfile(reference, path))
    json_path = folder / f"{case.id}.json"
    sizes = {}
    with writing_together() as files:
        for name, (path, write) in paths.items():
            temporary = files.beside(path)
            write(temporary)
            sizes[name] = (path.relative_to(folder), temporary.stat().st_size)
        entry = _entry(case, sizes) | ({"sources": dict(sources)} if sources else {})
        files.beside(json_path).write_bytes(json_bytes(entry))
        # never an old JSON beside new arrays
        json_path.unlink(missing_ok=True)


def _entry(case: StoredCase, files: Mapping[str, tuple[Path, int]]) -> dict[str, Any]:
    values, counts = label_values(np.asarray(case.label))
    return {
        "version": FORMAT_VERSION,
        "case": case.id,
        "properties": case.properties.to_json(),
        "files": {n: {"name": p.as_posix(), "bytes": size} for n, (p, size) in files.items()},
        "arrays": {
            name: {"shape": list(array.shape), "dtype": str(array.dtype)}
            for name, array in (("image", case.image), ("label", case.label))
        },
        "location_keys": [list(k) if isinstance(k, tuple) else k for k, _ in case.locations],
        "voxel_counts": {str(int(v)): int(n) for v, n in zip(values, counts, strict=True)},
    }


def _write_array(path: Path, array: np.ndarray) -> None:
    # not numpy.save: it loses the error number with which a full disk is told from other failures
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


# ---------------------------------------------------------------------------- the store's header


def prepare_store(
    folder: Path,
    plans: Plans,
    dataset: Mapping[str, Any],
    *,
    fingerprint: Mapping[str, Any] | None = None,
) -> None:
    """Make the folder with its plans and dataset.json; clear what a killed run left behind.

    What does not change the stored arrays (patch, batch, network) may differ from an existing
    store's plans, and is brought up to date.

    Raises:
        StoreError: naming the fields in which an existing store was made from other plans.
        WriteError: if the folder cannot be written.
    """
    if (folder / PLANS).is_file() and (folder / DATASET).is_file():
        old_dataset = read_object(folder / DATASET)
        old = Plans.from_nnunet(read_object(folder / PLANS), old_dataset)
        problems = _changes(_recipe(old, old_dataset), _recipe(plans, dataset))
        if problems:
            listed = "\n".join(f"  {p}" for p in problems)
            raise StoreError(
                f"store {folder} was made from other plans (stored -> wanted):\n{listed}\n"
                "  Use another --out, or delete the store to make it anew."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    for place in (folder, folder / REFERENCES):
        remove_stale(place)
    headers = ((PLANS, plans.to_nnunet()), (DATASET, dict(dataset)), (FINGERPRINT, fingerprint))
    for name, value in headers:
        # JSON has no tuples: compare what would be written
        current = read_json(folder / name) if (folder / name).is_file() else None
        if value is not None and json.loads(json_bytes(value)) != current:
            write_json(folder / name, value)


def _recipe(plans: Plans, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the stored arrays depend on, as JSON values."""
    # a scheme that a user's file adds may use the statistics too
    needs_statistics = not {*plans.normalization} <= WITHOUT_STATISTICS
    recipe = {
        "spacing": plans.spacing,
        "normalization_schemes": plans.normalization,
        "use_mask_for_norm": plans.use_mask_for_norm,
        "resampling_fn_data": _resampling(plans.resampling_image),
        "resampling_fn_seg": _resampling(plans.resampling_label),
        "transpose_forward": plans.transpose_forward,
        "intensity": [vars(p) for p in plans.intensity] if needs_statistics else [],
        "labels": Labels.from_dataset_json(dataset).to_dataset_json(),
        "channel_names": dataset.get("channel_names", dataset.get("modality")),
    }
    return json.loads(json.dumps(recipe))


def _resampling(resampler: Any) -> dict[str, Any]:
    speed_only = ("num_threads", "device")
    kwargs = {k: v for k, v in resampler.kwargs if k not in speed_only}
    return {"name": resampler.name, **kwargs}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]
