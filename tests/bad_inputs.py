"""The table of malformed inputs: sound things to start from, one damage each, what must be said."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import report_runs
import weight_files as made
from tiny import IDENTITY, make_raw, write_scan
from weight_files import write_bundle

from panther_jax.base.files import write_json
from panther_jax.config.loading import load_config
from panther_jax.images import imageio, raw_dataset
from panther_jax.planner import from_config
from panther_jax.plans.geometry import Geometry
from panther_jax.preprocessing import pipeline

ROOT = Path(__file__).resolve().parent.parent
CACHE_OFF = "--loop.no-compilation-cache"
IMAGE, LABEL = "raw/imagesTr/case_1_0000.mha", "raw/labelsTr/case_1.mha"
SCAN, MR = "scans/case_1_0000.nii.gz", "in/images/abdominal-t2-mri/case.mha"
WEIGHTS, PTH = "bundle/fold_0.safetensors", "folder/fold_0/checkpoint_final.pth"
DATA, PLANS = "raw/dataset.json", "plans/plans.json"
SPEC = "spec/ensemble.json"
GRID = Geometry((12, 24, 24), (6.0, 6.0, 6.0), (1.0, 2.0, 3.0), IDENTITY)


def build(world: Path) -> Path:
    """Everything sound that the table starts from, a folder a part."""
    raw = make_raw(world / "raw")
    config, _ = load_config(str(ROOT / "configs" / "smoke.py"))
    opened = raw_dataset.open_raw(raw)
    plans = from_config.plans_from_config(config, opened.dataset, None)
    (world / "plans").mkdir()
    write_json(world / PLANS, plans.to_nnunet())
    pipeline.preprocess(opened, plans, world / "store")
    write_bundle(world / "bundle", folds=("0",))
    made.write_run(world / "run", made.RESIDUAL, steps=1, kinds={"best": 1, "final": 1})
    made.write_model_folder(world / "folder", made.RESIDUAL)
    write_scan(world / SCAN)
    write_scan(world / MR)
    cases = {f"case_{i}": radius for i, radius in enumerate((4, 5, 0))}
    report_runs.make_data(world / "cv", cases)
    for name, shift in (("a", 1), ("b", 2)):
        predicted = {"fold_0": {"case_0": 4, "case_1": 5}, "fold_1": {"case_2": 1}}
        run = report_runs.make_run(
            world / "cv", name, predicted, shift=shift, checkpoints=("final",)
        )
        for fold in predicted:
            path = run / fold / "run.json"
            others = [c for c in cases if c not in predicted[fold]]
            path.write_text(json.dumps(json.loads(path.read_text()) | {"training_cases": others}))
    for folder, shift in (("pred", 1), ("ref", 0)):
        for name, radius in cases.items():
            label = report_runs.label_map(radius or 3, shift)
            imageio.write_label(
                world / "maps" / folder / f"{name}.mha", label, report_runs.geometry()
            )
        write_json(world / "maps" / "dataset.json", report_runs.dataset_json(3))
    (world / "post").mkdir()
    steps = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
        "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}],
    }
    write_json(world / "post" / "postprocessing.json", steps)
    (world / "spec").mkdir()
    members = [{"name": n, "model": "../bundle"} for n in ("first", "second")]
    write_json(world / SPEC, {"members": members})
    (world / "download").mkdir()
    (world / "configs").mkdir()
    return world


# -------------------------------------------------------------------------------------- damages

Damage = Callable[[Path], object]


def put(name: str, content: str | bytes) -> Damage:
    """Write a file instead of what is there."""

    def damage(box):
        path = box / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def gone(name: str) -> Damage:
    """Remove a file or folder."""
    return lambda box: shutil.rmtree(box / name) if (box / name).is_dir() else os.remove(box / name)


def a_folder(name: str) -> Damage:
    """Put an empty folder in the place of a file."""
    return both(gone(name), lambda box: (box / name).mkdir())


def emptied(name: str) -> Damage:
    """Leave an empty folder."""
    return both(gone(name), lambda box: (box / name).mkdir())


def linked_nowhere(name: str) -> Damage:
    """Put a link to nothing in the place of a file."""
    return both(gone(name), lambda box: (box / name).symlink_to("nowhere"))


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda box: [damage(box) for damage in damages]


def cut(name: str, share: float = 0.5) -> Damage:
    """Truncate a file."""

    def damage(box):
        data = (box / name).read_bytes()
        (box / name).write_bytes(data[: int(len(data) * share)])

    return damage


def flipped(name: str, share: float = 0.7) -> Damage:
    """Turn the bits of a few bytes."""

    def damage(box):
        data = bytearray((box / name).read_bytes())
        at = int(len(data) * share)
        data[at : at + 4] = bytes(b ^ 0xFF for b in data[at : at + 4])
        (box / name).write_bytes(data)

    return damage


def noise(name: str, size: int = 2000) -> Damage:
    """Random bytes."""
    return put(name, np.random.default_rng(0).bytes(size))


def entry(name: str, where: str, value) -> Damage:
    """Set an entry of a JSON file, by keys with dots; ``...`` removes it."""

    def damage(box):
        content = json.loads((box / name).read_text())
        *path, last = (int(k) if k.isdigit() else k for k in where.split("."))
        node = content
        for key in path:
            node = node[key] if isinstance(node, list) else node[str(key)]
        last = last if isinstance(node, list) else str(last)
        if value is ...:
            del node[last]
        else:
            node[last] = value
        (box / name).write_text(json.dumps(content))

    return damage


def header(name: str, field: str, value: str) -> Damage:
    """Change a line of an uncompressed .mha's header."""

    def damage(box):
        import SimpleITK as sitk

        sitk.WriteImage(sitk.ReadImage(str(box / name)), str(box / name), useCompression=False)
        lines = (box / name).read_bytes().split(b"\n")
        at = next(i for i, line in enumerate(lines) if line.startswith(field.encode()))
        lines[at] = f"{field} = {value}".encode()
        (box / name).write_bytes(b"\n".join(lines))

    return damage


def nifti(name: str, at: int, data: bytes, ending: str = "") -> Damage:
    """Change bytes of a NIfTI header; the file is written uncompressed and packed again."""

    def damage(box):
        import gzip

        content = bytearray(gzip.decompress((box / name).read_bytes()))
        content[at : at + len(data)] = data
        (box / name).write_bytes(gzip.compress(bytes(content), 1))

    return damage


def image(name: str, change, geometry: Geometry = GRID) -> Damage:
    """Write another image: an array, or a function of the one that is there."""

    def damage(box):
        import SimpleITK as sitk

        array, _ = sitk.GetArrayFromImage(sitk.ReadImage(str(box / name))), None
        array = change(array) if callable(change) else change
        written = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
        if array.ndim == 3:
            written.SetSpacing(geometry.spacing_zyx[::-1])
            written.SetOrigin(geometry.origin_xyz)
            written.SetDirection(geometry.direction)
        sitk.WriteImage(written, str(box / name))

    return damage


def four_axes(name: str) -> Damage:
    """A 4-D image."""

    def damage(box):
        import SimpleITK as sitk

        array = np.ones((2, 4, 4, 4), np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(box / name))

    return damage


def with_nan(value=np.nan):
    """An array with one such voxel."""

    def change(array):
        array = array.astype(np.float32)
        array[2, 3, 4] = value
        return array

    return change


class Evil:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, ("echo broken into",)


def evil(name: str) -> Damage:
    """A torch file that runs a command."""

    def damage(box):
        with zipfile.ZipFile(box / name, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps({"network_weights": Evil()}, 2))
            file.writestr("archive/version", "3\n")

    return damage


def slipped(name: str) -> Damage:
    """An archive with a member that leads out of the folder."""

    def damage(box):
        with zipfile.ZipFile(box / name, "w") as file:
            file.writestr("../../outside.txt", "broken out")

    return damage


def torch_file(name: str, content) -> Damage:
    """Something else saved by torch; a function makes it."""

    def damage(box):
        import torch

        torch.save(content(), box / name)

    return damage


def spec(**changes) -> Damage:
    """Change the first member of the ensemble file, or top-level keys with ``top_``."""

    def damage(box):
        content = json.loads((box / SPEC).read_text())
        for key, value in changes.items():
            if key.startswith("top_"):
                content[key.removeprefix("top_")] = value
            else:
                content["members"][0][key] = value
        (box / SPEC).write_text(json.dumps(content))

    return damage


def config(body: str) -> Damage:
    """A config file of one's own."""
    return put("configs/own.py", body)


NESTED = "[" * 100_000
BIG_HEADER = (2**62).to_bytes(8, "little") + b"{}"


# ---------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Bad:
    """An input, the command that meets it, what the message must name, what may be left behind."""

    command: str
    argv: str
    name: str
    says: str
    damage: Damage | None = None
    code: int = 1
    leaves: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Command and name, for pytest."""
        return f"{self.command.rpartition('.')[2]}-{self.name.replace(' ', '_')}"


def group(command, argv, *rows, leaves=(), code=1):
    """Rows of (name, message, damage[, more arguments[, code]]) that share a command line."""
    for name, says, *more in rows:
        damage, extra, code_of_row = (*more, *(None, "", code)[len(more) :])
        yield Bad(command, f"{argv} {extra}", name, says, damage, code_of_row, leaves)


CHECK = (
    ("image empty", "case_1_0000.mha", put(IMAGE, "")),
    ("image text", "case_1_0000.mha", put(IMAGE, "not an image")),
    ("image cut", "case_1_0000.mha", cut(IMAGE)),
    ("image cut a little", "case_1_0000.mha", cut(IMAGE, 0.99)),
    ("image noise", "case_1_0000.mha", noise(IMAGE)),
    ("image flipped", "case_1_0000.mha", flipped(IMAGE)),
    ("image header only", "case_1_0000.mha.*cut", header(IMAGE, "DimSize", "90 90 90")),
    ("image NaN", "case_1_0000.mha: 1 of 6912 voxels", image(IMAGE, with_nan())),
    ("image infinite", "case_1_0000.mha: 1 of 6912 voxels", image(IMAGE, with_nan(np.inf))),
    ("image colour", "case_1_0000.mha.*colour", image(IMAGE, np.ones((4, 4, 4, 3), np.uint8))),
    ("image 4-D", "case_1_0000.mha.*4 dimensions", four_axes(IMAGE)),
    ("image spacing 0", "case_1_0000.mha", header(IMAGE, "ElementSpacing", "0 6 6")),
    ("image spacing nan", "case_1_0000.mha", header(IMAGE, "ElementSpacing", "nan 6 6")),
    ("image spacing text", "case_1_0000.mha", header(IMAGE, "ElementSpacing", "a b c")),
    (
        "image direction",
        "case_1_0000.mha.*\n?.*direction",
        header(IMAGE, "TransformMatrix", "1 0 0 1 0 0 0 0 1"),
    ),
    ("image huge", "case_1_0000.mha", header(IMAGE, "DimSize", "90000 90000 90000")),
    ("image too huge", "case_1_0000.mha", header(IMAGE, "DimSize", f"{2**62} {2**62} 9")),
    ("image size 0", "case_1_0000.mha", header(IMAGE, "DimSize", "0 24 24")),
    ("image size negative", "case_1_0000.mha", header(IMAGE, "DimSize", "-3 24 24")),
    ("image type", "case_1_0000.mha", header(IMAGE, "ElementType", "MET_BANANA")),
    (
        "image elsewhere",
        "case_1_0000.mha.*another file",
        header(IMAGE, "ElementDataFile", "/etc/hostname"),
    ),
    ("image listed", "case_1_0000.mha.*another file", header(IMAGE, "ElementDataFile", "LIST")),
    ("image constant", "case_1: channel 0 is constant", image(IMAGE, np.ones((12, 24, 24)))),
    ("image a folder", "case_1_0000.mha", a_folder(IMAGE)),
    ("image a dead link", "case_1_0000.mha", linked_nowhere(IMAGE)),
    ("image of other shape", "case_1.*shape", image(IMAGE, np.random.rand(5, 6, 7))),
    ("label missing", "case_1: missing label", gone(LABEL)),
    ("label empty", "case_1.mha", put(LABEL, "")),
    ("label cut", "case_1.mha", cut(LABEL)),
    ("label noise", "case_1.mha", noise(LABEL)),
    ("label fractions", "case_1.mha.*not whole", image(LABEL, np.full((12, 24, 24), 0.5))),
    ("label NaN", "case_1.mha.*NaN", image(LABEL, with_nan())),
    ("label negative", "values -3", image(LABEL, lambda a: a.astype(np.int16) - 3)),
    ("label undeclared", "values 7", image(LABEL, lambda a: a * 0 + 7)),
    (
        "label huge",
        "case_1.mha.*32 bits",
        image(LABEL, lambda a: a.astype(np.int64) + (1 << 40)),
    ),
    ("label spacing", "label spacing", header(LABEL, "ElementSpacing", "6 6 5")),
    ("label origin", "label origin", header(LABEL, "Offset", "1 2 4")),
    ("label direction", "label direction", header(LABEL, "TransformMatrix", "0 1 0 1 0 0 0 0 1")),
    ("label shape", "case_1.*shape", image(LABEL, np.zeros((3, 4, 5), np.uint8))),
    ("label colour", "case_1.mha", image(LABEL, np.ones((4, 4, 4, 3), np.uint8))),
    ("label background alone", "without foreground: case_1", image(LABEL, lambda a: a * 0)),
    ("dataset.json missing", "dataset.json", gone(DATA)),
    ("dataset.json empty", "dataset.json", put(DATA, "")),
    ("dataset.json text", "dataset.json", put(DATA, "{labels: }")),
    ("dataset.json cut", "dataset.json", cut(DATA)),
    ("dataset.json binary", "dataset.json", noise(DATA)),
    ("dataset.json a list", "dataset.json", put(DATA, "[1, 2]")),
    ("dataset.json a number", "dataset.json", put(DATA, "3")),
    ("dataset.json nested", "dataset.json", put(DATA, NESTED)),
    ("dataset.json long number", "dataset.json", put(DATA, "1" * 10_000)),
    ("dataset.json a folder", "dataset.json", a_folder(DATA)),
    ("labels missing", "'labels'", entry(DATA, "labels", ...)),
    ("labels a list", "'labels'", entry(DATA, "labels", ["background", "tumor"])),
    ("labels empty", "'labels'", entry(DATA, "labels", {})),
    ("label value a text", "label 'tumor'", entry(DATA, "labels.tumor", "one")),
    ("label value a fraction", "label 'tumor'", entry(DATA, "labels.tumor", 1.5)),
    ("label value negative", "label 'tumor'", entry(DATA, "labels.tumor", -1)),
    ("label value nested", "label 'tumor'", entry(DATA, "labels.tumor", [[1]])),
    ("no background", "'background'", entry(DATA, "labels.background", ...)),
    ("background 1", "background and tumor share", entry(DATA, "labels.background", 1)),
    ("labels with a gap", "consecutive", entry(DATA, "labels.pancreas", 5)),
    ("labels share a value", "share the value", entry(DATA, "labels.pancreas", 1)),
    ("ignore in between", "'ignore'", entry(DATA, "labels.ignore", 7)),
    ("ignore a list", "'ignore'", entry(DATA, "labels.ignore", [3])),
    ("regions without order", "regions_class_order", entry(DATA, "labels.tumor", [1, 2])),
    (
        "regions with a bad order",
        "regions_class_order",
        both(entry(DATA, "labels.tumor", [1, 2]), entry(DATA, "regions_class_order", ["a"])),
    ),
    ("regions_class_order a number", "regions_class_order", entry(DATA, "regions_class_order", 3)),
    ("channels missing", "channel_names", entry(DATA, "channel_names", ...)),
    ("channels a list", "channel_names", entry(DATA, "channel_names", ["MRI"])),
    ("channels from 1", "channel_names", entry(DATA, "channel_names", {"1": "MRI"})),
    ("channels none", "channel", entry(DATA, "channel_names", {})),
    ("two channels declared", "case_0.*expected 2", entry(DATA, "channel_names.1", "CT")),
    ("file ending", "file_ending", entry(DATA, "file_ending", ".png")),
    ("file ending a number", "file_ending", entry(DATA, "file_ending", 3)),
    ("file ending a path", "file_ending", entry(DATA, "file_ending", "/../../x.mha")),
    (
        "another reader",
        "SimpleITKIO",
        entry(DATA, "overwrite_image_reader_writer", "NibabelIOWithReorient"),
    ),
    ("numTraining", "numTraining", entry(DATA, "numTraining", 7)),
    ("numTraining a text", "numTraining", entry(DATA, "numTraining", "five")),
    ("listed cases a list", "'dataset' must map", entry(DATA, "dataset", [1])),
    ("listed case outside", r"\.\./x: the id", entry(DATA, "dataset", {"../x": {}})),
    ("listed case without label", "x: expected", entry(DATA, "dataset", {"x": {"images": ["a"]}})),
    (
        "listed images a number",
        "x: expected",
        entry(DATA, "dataset", {"x": {"images": 3, "label": "b"}}),
    ),
    ("a name without channel", "case_9.mha: no channel", put("raw/imagesTr/case_9.mha", "x")),
    ("a second channel", "case_1: 2 channels", put("raw/imagesTr/case_1_0001.mha", "x")),
    ("a channel too high", "case_9", put("raw/imagesTr/case_9_0004.mha", "x")),
    ("imagesTr missing", "imagesTr", gone("raw/imagesTr")),
    ("imagesTr empty", "imagesTr", emptied("raw/imagesTr")),
    ("labelsTr missing", "missing label", gone("raw/labelsTr")),
    ("raw missing", "raw is not a folder", gone("raw")),
    ("raw a file", "raw is not a folder", both(gone("raw"), put("raw", "x"))),
)


def plans_entry(key, value):
    """Change the plans' only configuration."""
    return entry(PLANS, f"configurations.smoke.{key}", value)


def arch_entry(key, value):
    """Change the network of the plans."""
    return plans_entry(f"architecture.arch_kwargs.{key}", value)


PREPROCESS = (
    ("plans missing", "plans.json", gone(PLANS)),
    ("plans empty", "plans.json", put(PLANS, "")),
    ("plans cut", "plans.json", cut(PLANS)),
    ("plans a list", "plans", put(PLANS, "[]")),
    ("plans a text", "plans", put(PLANS, '"plans"')),
    ("plans nested", "plans.json", put(PLANS, NESTED)),
    ("configurations missing", "configuration", entry(PLANS, "configurations", ...)),
    ("configurations a list", "configurations", entry(PLANS, "configurations", [1])),
    ("configuration a text", "smoke", entry(PLANS, "configurations.smoke", "x")),
    ("configuration unknown", "'3d_x' not found", None, "--configuration 3d_x"),
    ("inherits in a circle", "circle", plans_entry("inherits_from", "smoke")),
    ("inherits from nothing", "'nothing'.*not found", plans_entry("inherits_from", "nothing")),
    ("inherits from a list", "inherits", plans_entry("inherits_from", ["smoke"])),
    ("spacing missing", "'spacing'", plans_entry("spacing", ...)),
    ("spacing a text", "spacing", plans_entry("spacing", "abc")),
    ("spacing 0", "spacing", plans_entry("spacing", [0, 1, 1])),
    ("spacing negative", "spacing", plans_entry("spacing", [-1, 1, 1])),
    ("spacing NaN", "spacing", plans_entry("spacing", [float("nan"), 1, 1])),
    ("spacing of one axis", "spacing", plans_entry("spacing", [1])),
    ("patch 0", "patch", plans_entry("patch_size", [0, 16, 16])),
    ("patch a text", "patch", plans_entry("patch_size", "large")),
    ("patch of two axes", "patch", plans_entry("patch_size", [16, 16])),
    ("batch size a text", "batch_size", plans_entry("batch_size", "two")),
    ("batch size 0", "batch_size", plans_entry("batch_size", 0)),
    ("normalization unknown", "Banana", plans_entry("normalization_schemes", ["Banana"])),
    ("normalization a number", "normalization", plans_entry("normalization_schemes", 3)),
    ("normalization of none", "channel", plans_entry("normalization_schemes", [])),
    ("mask missing", "use_mask_for_norm", plans_entry("use_mask_for_norm", [])),
    (
        "CT without statistics",
        "statistics",
        plans_entry("normalization_schemes", ["CTNormalization"]),
    ),
    (
        "statistics a text",
        "foreground_intensity",
        entry(PLANS, "foreground_intensity_properties_per_channel", {"0": "high"}),
    ),
    (
        "statistics of a channel a",
        "foreground_intensity",
        entry(PLANS, "foreground_intensity_properties_per_channel", {"a": {}}),
    ),
    ("resampling unknown", "os.system", plans_entry("resampling_fn_data", "os.system")),
    ("resampling arguments", "resampling_fn_data", plans_entry("resampling_fn_data_kwargs", [3])),
    ("transpose twice", "transpose", entry(PLANS, "transpose_forward", [0, 0, 1])),
    ("transpose out", "transpose", entry(PLANS, "transpose_forward", [0, 1, 5])),
    ("transpose a text", "transpose", entry(PLANS, "transpose_forward", "zyx")),
    ("architecture missing", "'architecture'", plans_entry("architecture", ...)),
    ("architecture a text", "architecture", plans_entry("architecture", "UNet")),
    (
        "network unknown",
        "SwinUNETR",
        plans_entry("architecture.network_class_name", "monai.SwinUNETR"),
    ),
    ("operator unknown", "os.system", arch_entry("conv_op", "os.system")),
    ("activation unknown", "builtins.eval", arch_entry("nonlin", "builtins.eval")),
    ("norm unknown", "norm_op", arch_entry("norm_op", ["a"])),
    ("kernels even", "odd", arch_entry("kernel_sizes", [[2, 2, 2]] * 3)),
    ("kernels of two axes", "axes", arch_entry("kernel_sizes", [[3, 3]] * 3)),
    ("strides missing", "'strides'", arch_entry("strides", ...)),
    ("strides 0", "strides", arch_entry("strides", [[0, 1, 1]] * 3)),
    ("strides of two stages", "strides", arch_entry("strides", [[1, 1, 1]] * 2)),
    ("features negative", "features", arch_entry("features_per_stage", [-4, 8, 8])),
    ("features a text", "features", arch_entry("features_per_stage", "many")),
    ("stages a text", "n_stages", arch_entry("n_stages", "three")),
    ("blocks 0", "blocks", arch_entry("n_blocks_per_stage", [0, 0, 0])),
    ("decoder too short", "decoder", arch_entry("n_conv_per_stage_decoder", [1])),
    ("workers negative", "--workers", None, "--workers -1", 2),
    ("workers a text", "--workers", None, "--workers many", 2),
    ("out a file", "out", put("out", "x")),
    ("option unknown", "--spacing", None, "--spacing 1", 2),
    ("plans and config", "--config", None, "--config smoke", 2),
)
PREPROCESS_CASES = (  # found while at it: the other cases are done
    ("spacing too small", "would become", plans_entry("spacing", [1e-4] * 3)),
    ("spacing tiny", "case 'case_0'", plans_entry("spacing", [1e-300] * 3)),
    ("spacing too large", "would become", plans_entry("spacing", [9e4] * 3)),
    ("image cut", "case 'case_1'.*case_1_0000.mha", cut(IMAGE)),
    ("label on another grid", "case 'case_1': label origin", header(LABEL, "Offset", "1 2 4")),
    ("splits broken", "splits_final.json", put("raw/splits_final.json", '[{"train": 3}]')),
)
OWN = "import panther_jax.config as c\n"
CONFIGS = (
    ("config missing", "config 'nothing' not found", None, "nothing"),
    ("config syntax", r"own.py.*\n?.*SyntaxError", config("def get_config(:")),
    ("config without function", "own.py defines no", config("x = 1")),
    ("config raises", "own.py.*ZeroDivision", config("1 / 0")),
    ("config stops", "own.py", config("raise SystemExit(3)")),
    ("config function raises", "own.py", config("def get_config():\n    return {}['x']")),
    ("config of another type", "own.py.*returned dict", config("def get_config():\n    return {}")),
    (
        "config value",
        "lr must be positive",
        config(f"{OWN}def get_config():\n    return c.OptimConfig(lr=-1)"),
    ),
    (
        "config field",
        "own.py.*banana",
        config(f"{OWN}def get_config():\n    return c.OptimConfig(banana=1)"),
    ),
    ("config argument", "own.py takes no argument", config("def get_config(): pass"), "{own}:x=1"),
    ("config argument key", "'banana=1' is not understood", None, "mri_t2:banana=1"),
    ("config argument value", "aug=banana", None, "mri_t2:aug=banana"),
    ("config argument number", "epochs=many", None, "mri_t2:epochs=many"),
    ("config argument negative", "epochs", None, "mri_t2:epochs=-3"),
    ("config binary", "own.py", config("\0\1\2")),
    ("config a folder", "not found", lambda box: (box / "configs" / "own.py").mkdir()),
)
TRAIN = (
    ("fold a text", "--fold", None, "--fold first", 2),
    ("fold negative", "--fold", None, "--fold -1", 2),
    ("field unknown", "--loop.epoch", None, "--loop.epoch 3", 2),
    ("field a text", "--loop.epochs", None, "--loop.epochs many", 2),
    ("epochs 0", "loop.epochs", None, "--loop.epochs 0", 2),
    ("rate NaN", "optim.lr", None, "--optim.lr nan", 2),
    ("batch 0", "data.batch_size", None, "--data.batch-size 0", 2),
    ("dtype unknown", "--loop.compute-dtype", None, "--loop.compute-dtype float8", 2),
    ("patch misfit", "not divisible", None, "--data.patch-size 8 16 18"),
    ("patch too small", "single voxel", None, "--data.patch-size 4 4 4"),
    ("spacing NaN", "data.spacing_mm", None, "--data.spacing-mm nan 1 1", 2),
    ("start missing", "starting weights 'gone' not found", None, "--init gone"),
    ("raw missing", "raw", gone("raw")),
    ("label missing", "case_1: missing label", gone(LABEL)),
    ("root a file", "root", put("root", "x")),
)
TRAIN_STORE = (
    ("store missing", "store is not a store", gone("store")),
    (
        "store empty",
        "no complete case",
        lambda box: [p.unlink() for p in box.glob("store/case*.json")],
    ),
    (
        "store of another network",
        "features",
        entry(
            "store/plans.json",
            "configurations.smoke.architecture.arch_kwargs.features_per_stage",
            [4, 8, 16],
        ),
    ),
    ("store plans cut", "plans.json", cut("store/plans.json")),
    ("store dataset missing", "dataset.json", gone("store/dataset.json")),
    ("store splits broken", "splits_final.json", put("store/splits_final.json", "{}")),
    ("store case cut", "case_1.image.npy", cut("store/case_1.image.npy")),
    ("store case JSON", "case_1.json", put("store/case_1.json", "{}")),
    ("store case missing", "case_1", gone("store/case_1.json")),
    (
        "store case pickled",
        "case_1.label.npy",
        lambda box: np.save(box / "store/case_1.label.npy", np.array([{}]), allow_pickle=True),
    ),
    ("workdir of another run", "loop.seed: 5 -> 0", lambda box: _other_run(box)),
    (
        "workdir config broken",
        "config.json",
        both(lambda box: _other_run(box), put("work/config.json", "{")),
    ),
    (
        "workdir config of other fields",
        "unknown field",
        both(lambda box: _other_run(box), put("work/config.json", '{"banana": 1}')),
    ),
)


def _other_run(box):
    settings, _ = load_config(str(ROOT / "configs" / "smoke.py"))
    value = settings.to_json()
    value["loop"] |= {"seed": 5, "compilation_cache": False}
    (box / "work" / "fold_1").mkdir(parents=True)
    write_json(box / "work" / "config.json", value)


MODELS = (  # of predict and export: the model cannot be used
    ("model missing", "bundle does not exist", gone("bundle")),
    ("model a file", "bundle", both(gone("bundle"), put("bundle", "x"))),
    ("model an empty folder", "bundle", emptied("bundle")),
    ("weights missing", "no weights", gone(WEIGHTS)),
    ("weights empty", "fold_0.safetensors", put(WEIGHTS, "")),
    ("weights cut", "fold_0.safetensors", cut(WEIGHTS)),
    ("weights flipped", "fold_0.safetensors.*SHA-256", flipped(WEIGHTS)),
    (
        "weights with a huge header",
        "fold_0.safetensors",
        both(put(WEIGHTS, BIG_HEADER), entry("bundle/provenance.json", "sha256", {})),
    ),
    (
        "weights a pickle",
        "fold_0.safetensors",
        both(put(WEIGHTS, pickle.dumps(Evil())), entry("bundle/provenance.json", "sha256", {})),
    ),
    ("provenance broken", "provenance.json", put("bundle/provenance.json", "{")),
    ("provenance a list", "provenance.json", put("bundle/provenance.json", "[]")),
    ("checksums a list", "provenance.json", entry("bundle/provenance.json", "sha256", [])),
    ("plans missing", "plans.json", gone("bundle/plans.json")),
    ("plans broken", "plans.json", cut("bundle/plans.json")),
    ("plans a list", "plans", put("bundle/plans.json", "[]")),
    (
        "plans of another network",
        "does not fit",
        entry(
            "bundle/plans.json",
            "configurations.3d_fullres.architecture.arch_kwargs.features_per_stage",
            [4, 6, 8],
        ),
    ),
    ("dataset a list", "dataset.json", put("bundle/dataset.json", "[]")),
    ("dataset of more labels", "does not fit", entry("bundle/dataset.json", "labels.cyst", 3)),
    ("fold missing", "no fold 7", None, "--folds 7"),
)
PREDICT = (
    ("scan empty", "case_1_0000.nii.gz", put(SCAN, "")),
    ("scan cut", "case_1_0000.nii.gz", cut(SCAN)),
    ("scan text", "case_1_0000.nii.gz", put(SCAN, "x" * 500)),
    ("scan noise", "case_1_0000.nii.gz", noise(SCAN)),
    ("scan flipped", "case_1_0000.nii.gz", flipped(SCAN, 0.5)),
    ("scan sizes negative", "case_1_0000.nii.gz", nifti(SCAN, 42, b"\xf0\xff")),
    ("scan sizes huge", "case_1_0000.nii.gz", nifti(SCAN, 42, b"\xff\x7f" * 3)),
    ("scan of no axis", "case_1_0000.nii.gz", nifti(SCAN, 40, b"\x00\x00")),
    ("scan of 99 axes", "case_1_0000.nii.gz", nifti(SCAN, 40, b"\x63\x00")),
    ("scan spacing 0", "case_1_0000.nii.gz", nifti(SCAN, 80, b"\0" * 4)),
    ("scan type", "case_1_0000.nii.gz", nifti(SCAN, 70, b"\x39\x30")),
    ("scan NaN", "case_1_0000.nii.gz", nifti(SCAN, 352 + 4000, b"\xff\xff\xff\x7f")),
    ("scan unpacked beside", "case_1_0000.nii", put("scans/case_1_0000.nii", "x")),
    ("scan of two channels", "case_1.*2 channel", put("scans/case_1_0001.nii.gz", "x")),
)
PREDICT_NOTHING = (
    ("input missing", "scans does not exist", gone("scans")),
    ("input empty", "scans holds no image", emptied("scans")),
    (
        "input of another kind",
        "scans holds no image",
        both(emptied("scans"), put("scans/a.png", "x")),
    ),
    ("output a file", "out", put("out", "x")),
    ("step size 0", "--step-size", None, "--step-size 0", 2),
    ("step size 2", "--step-size", None, "--step-size 2", 2),
    ("step size NaN", "--step-size", None, "--step-size nan", 2),
    ("step size a text", "--step-size", None, "--step-size small", 2),
    ("tile batch 0", "--tile-batch", None, "--tile-batch 0", 2),
    ("dtype unknown", "--dtype", None, "--dtype int4", 2),
    ("sums and strategy", "--accumulate", None, "--accumulate reference --strategy vmap", 2),
    ("both models", "--ensemble", None, "--ensemble {spec}", 2),
    (
        "predicted otherwise",
        "made otherwise",
        put("out/predict_args.json", '{"members": [], "combine": "x"}'),
    ),
    ("record broken", "predict_args.json", put("out/predict_args.json", "{")),
    ("record a list", "predict_args.json", put("out/predict_args.json", "[]")),
)
RUNS = (
    ("run not finished", "no final checkpoint", gone("run/fold_0/checkpoints")),
    ("run config gone", "run is no model", gone("run/config.json")),
    ("run plans gone", "plans.json", gone("run/plans.json")),
    ("run plans changed", "another architecture", entry("run/dataset.json", "labels.cyst", 3)),
    ("run dataset broken", "dataset.json", put("run/dataset.json", "{")),
    (
        "run checkpoint damaged",
        "none of the checkpoints",
        lambda box: [
            p.write_bytes(b"x")
            for p in box.glob("run/fold_0/checkpoints/final/*/params/**/*")
            if p.is_file()
        ],
    ),
    (
        "run checkpoint meta",
        "none of the checkpoints",
        lambda box: [
            p.write_bytes(b"{")
            for p in box.glob("run/fold_0/checkpoints/final/*/meta/*")
            if p.is_file()
        ],
    ),
)
SPECS = (
    ("spec missing", "ensemble.json", gone(SPEC)),
    ("spec broken", "ensemble.json", put(SPEC, "{")),
    ("spec a list", "ensemble.json", put(SPEC, "[]")),
    ("spec nested", "ensemble.json", put(SPEC, NESTED)),
    ("no members", "'members'", spec(top_members=[])),
    ("members a text", "'members'", spec(top_members="all")),
    ("member a text", r"members\[0\]", spec(top_members=["a"])),
    ("key unknown", r"members\[0\].*banana", spec(banana=1)),
    ("top key unknown", "banana", spec(top_banana=1)),
    ("member missing", "'first' cannot be used", spec(model="../nowhere")),
    ("model a number", r"members\[0\].model", spec(model=3)),
    ("model empty", "'first' cannot be used", spec(model="")),
    ("name twice", "'second'", spec(name="second")),
    ("name a number", r"members\[0\].name", spec(name=3)),
    ("weight negative", r"members\[0\].weight", spec(weight=-1)),
    ("weight NaN", r"members\[0\].weight", spec(weight=float("nan"))),
    ("weight a text", r"members\[0\].weight", spec(weight="much")),
    ("weights all 0", "weight", both(spec(weight=0), entry(SPEC, "members.1.weight", 0))),
    ("both weights", "class_weights", spec(weight=1, class_weights={"lesion": 1})),
    ("class weights a list", "class_weights", spec(class_weights=[1])),
    ("class weights of no class", "banana", spec(class_weights={"banana": 1.0})),
    ("member step size 0", r"members\[0\].step_size", spec(step_size=0)),
    ("folds a text", r"members\[0\].folds", spec(folds="0")),
    ("folds empty", r"members\[0\].folds", spec(folds=[])),
    ("member fold missing", "fold 9", spec(folds=[9])),
    ("checkpoint unknown", r"members\[0\].checkpoint", spec(checkpoint="last")),
    ("checkpoint a list", r"members\[0\].checkpoint", spec(checkpoint=["final"])),
    ("mirror axes", r"members\[0\].mirror_axes", spec(mirror_axes=[0, 5])),
    ("mirror axes nested", r"members\[0\].mirror_axes", spec(mirror_axes=[[0]])),
    ("mirror axes a number", r"members\[0\].mirror_axes", spec(mirror_axes=1)),
    ("configuration unknown", "2d", spec(configuration="2d")),
    ("label map a list", "label_map", spec(label_map=["x"])),
    ("label map of no class", "banana", spec(label_map={"banana": "lesion"})),
    ("combine unknown", "'combine'", spec(top_combine="median")),
    ("combine a list", "'combine'", spec(top_combine=["median"])),
    ("decision unknown", "'decision'", spec(top_decision="vote")),
    ("decision a list", "'decision'", spec(top_decision=[1])),
    ("threshold 2", "threshold", spec(top_decision={"threshold": 2, "label": "lesion"})),
    ("threshold of no class", "banana", spec(top_decision={"threshold": 0.5, "label": "banana"})),
    ("labels broken", "label", spec(top_labels={"lesion": 1})),
    ("logits of weighted", "'logits'", spec(top_combine="logits", class_weights={"lesion": 1})),
)
CHECKPOINTS = (  # of nnU-Net
    ("file empty", "checkpoint_final.pth is empty", put(PTH, "")),
    ("file text", "not a torch checkpoint", put(PTH, "weights")),
    ("file HTML", "HTML", put(PTH, "<html>")),
    ("file HDF5", "HDF5", put(PTH, b"\x89HDF\r\n")),
    ("file LFS", "git lfs pull", put(PTH, "version https://git-lfs.github.com/spec/v1")),
    ("file gzip", "gzip", put(PTH, b"\x1f\x8b\x08\x00")),
    ("file a bare pickle", "bare pickle", put(PTH, pickle.dumps(Evil(), 4))),
    ("file that runs code", "(posix|nt).system", evil(PTH)),
    ("file that breaks out", "zip archive, but not", slipped(PTH)),
    ("file cut", "truncated", cut(PTH)),
    ("file flipped", "damaged", flipped(PTH)),
    ("file a folder", "is a folder", a_folder(PTH)),
    ("no weights", "network_weights", torch_file(PTH, lambda: {"epoch": 3})),
    ("a list", "list", torch_file(PTH, lambda: [1, 2])),
    ("weights of texts", "weight 'a'", torch_file(PTH, lambda: {"network_weights": {"a": "b"}})),
    (
        "weights of integers",
        "weight 'a'",
        torch_file(PTH, lambda: {"network_weights": {"a": __import__("torch").ones(3).int()}}),
    ),
    (
        "weights of another network",
        "checkpoint_final.pth",
        torch_file(PTH, lambda: made.checkpoint(made.PLAIN)),
    ),
    ("folder plans broken", "plans.json", put("folder/plans.json", "{")),
    ("folder plans a list", "plans", put("folder/plans.json", "[]")),
    (
        "plans without network",
        "architecture",
        entry("folder/plans.json", "configurations.3d_fullres.architecture", ...),
    ),
    ("folder dataset broken", "dataset.json", put("folder/dataset.json", "{")),
    ("folder dataset a list", "dataset.json", put("folder/dataset.json", "[]")),
    ("no fold", "fold_", gone("folder/fold_0")),
    ("folder missing", "folder", gone("folder")),
    ("folder without fold 3", "fold.*3", None, "--folds 3"),
)
IMPORT_ONLY = (
    ("configuration unknown", "2d", None, "--configuration 2d"),
    ("stem unknown", "banana", None, "--stem banana"),
    ("file name unknown", "checkpoint_x.pth", None, "--checkpoint-name checkpoint_x.pth"),
    ("plans beside a folder", "--plans", None, "--plans {plans}", 2),
    ("out exists", "out exists", put("out/x", "x")),
)
CHALLENGE = (
    ("no input", "abdominal-t2-mri holds no image", gone("in")),
    ("no image", "abdominal-t2-mri holds no image", gone(MR)),
    ("two images", "holds 2 images", put(f"{MR}.x.mha", "x")),
    (
        "image of another task",
        "other --task",
        both(lambda box: os.renames(box / MR, box / "in/images/abdominal-t1-mri/case.mha")),
    ),
    ("image empty", "case.mha", put(MR, "")),
    ("image cut", "case.mha", cut(MR)),
    ("image 4-D", "case.mha", four_axes(MR)),
    ("model missing", "bundle does not exist", gone("bundle")),
    ("model damaged", "SHA-256", flipped(WEIGHTS)),
    (
        "model without tumour",
        "no label named 'tumor'",
        entry("bundle/dataset.json", "labels", {"background": 0, "a": 1, "b": 2}),
    ),
    ("step size", "--step-size", None, "--step-size 7", 2),
    ("time limit 0", "--time-limit", None, "--time-limit 0", 2),
    ("time limit NaN", "--time-limit", None, "--time-limit nan", 2),
    ("margin negative", "--roi-margin", None, "--roi-margin -1", 2),
    ("margin NaN", "--roi-margin", None, "--roi-margin nan", 2),
    ("filter without model", "--component-filter", None, "--component-filter", 2),
    ("filter missing", "gone", None, "--component-filter gone"),
    ("mask exists", "exists", put("out/images/pancreatic-tumor-segmentation/case.mha", "x")),
    ("output a file", "out", put("out", "x")),
)
MAP, REF = "maps/pred/case_1.mha", "maps/ref/case_1.mha"
EVALUATE = (
    ("predictions missing", "pred", gone("maps/pred")),
    ("predictions empty", "pred", emptied("maps/pred")),
    ("references missing", "ref", gone("maps/ref")),
    ("dataset.json broken", "dataset.json", put("maps/dataset.json", "{")),
    ("dataset.json a list", "dataset.json", put("maps/dataset.json", "[]")),
    ("label unknown", "--label banana", None, "--label banana", 2),
    ("label and preset", "--label", None, "--label tumor --preset fork_a", 2),
    ("workers negative", "--workers", None, "--workers -2", 2),
    ("seed negative", "--seed", None, "--seed -1", 2),
    ("preset unknown", "--preset", None, "--preset mine", 2),
    ("output exists", "o.json exists", put("o.json", "x")),
    ("runs, too", "--runs", None, "--runs {cv}/runs/a", 2),
)
EVALUATE_CASES = (  # the others are scored
    ("map empty", "case_1.mha", put(MAP, "")),
    ("map cut", "case_1.mha", cut(MAP)),
    ("map of fractions", "case_1.mha", image(MAP, np.full((10, 24, 28), 0.5))),
    ("map of another shape", "case_1.*shape", image(MAP, np.zeros((3, 4, 5), np.uint8))),
    ("map moved", "case_1.*origin", header(MAP, "Offset", "9 9 9")),
    (
        "map of unknown labels",
        r"case_1.mha holds the labels \[9\]",
        image(MAP, lambda a: a * 0 + 9, report_runs.geometry()),
    ),
    ("map missing", "no prediction for .*case_1.mha", gone(MAP)),
    ("map twice", "case_1", put("maps/pred/case_1.nii.gz", "x")),
    ("reference missing", "no reference for .*case_1.mha", gone(REF)),
    ("reference noise", "case_1.mha", noise(REF)),
    (
        "reference of unknown labels",
        r"\[9\]",
        image(REF, lambda a: a * 0 + 9, report_runs.geometry()),
    ),
)
FOLD = "cv/runs/a/fold_0"
EVALUATE_RUNS = (
    ("run missing", "a is not a folder", gone("cv/runs/a")),
    ("run without folds", "no fold_K", both(gone(FOLD), gone("cv/runs/a/fold_1"))),
    ("fold not validated", "not validated", gone(f"{FOLD}/validation_final")),
    ("summary broken", "summary.json", put(f"{FOLD}/validation_final/summary.json", "{")),
    ("summary a list", "summary.json", put(f"{FOLD}/validation_final/summary.json", "[]")),
    (
        "summary without files",
        "summary.json",
        put(f"{FOLD}/validation_final/summary.json", '{"metric_per_case": [{}]}'),
    ),
    (
        "case in two folds",
        "two folds",
        lambda box: shutil.copy(
            box / FOLD / "validation_final/case_0.mha",
            box / "cv/runs/a/fold_1/validation_final/case_0.mha",
        ),
    ),
    ("two runs", "belong to 2 runs", None, "{cv}/runs/b"),
    ("no such checkpoint", "validation_best", None, "--checkpoint best"),
)
COMPARE = (
    ("file of another kind", "own.json was not written", put("spec/own.json", '{"format": "x"}')),
    ("file broken", "own.json", put("spec/own.json", "{")),
    (
        "file without scores",
        "own.json",
        put("spec/own.json", '{"format": "panther_jax.evaluation/1"}'),
    ),
    ("nothing there", "own.json", None),
)
SELECT = (
    ("candidate missing", "a is not a folder", gone("cv/runs/a")),
    ("candidate twice", "named twice", None, "--candidates {cv}/runs/a {cv}/runs/a"),
    ("candidate not validated", "not validated", gone(f"{FOLD}/validation_final")),
    (
        "candidate trained on it",
        "also trained on",
        entry(f"{FOLD}/run.json", "training_cases", ["case_0"]),
    ),
    (
        "training cases unknown",
        "training_cases|run.json",
        entry(f"{FOLD}/run.json", "training_cases", 3),
    ),
    ("run record broken", "run.json", put(f"{FOLD}/run.json", "{")),
    ("candidate without labels", "dataset.json", gone("cv/runs/a/dataset.json")),
    ("references missing", "refs", None, "--references {cv}/refs"),
    (
        "references empty",
        "no case",
        lambda box: (box / "cv/empty").mkdir(),
        "--references {cv}/empty",
    ),
    ("metric unknown", "--metric", None, "--metric banana", 2),
    ("metric twice", "--metric", None, "--metric dice dice", 2),
    ("weights too few", "--weights", None, "--weights 1", 2),
    ("weights negative", "--weights", None, "--weights -1 1 1 1 1", 2),
    ("weights NaN", "--weights", None, "--weights nan 1 1 1 1", 2),
    ("members 0", "--max-members", None, "--max-members 0", 2),
    ("label unknown", "banana", None, "--label banana"),
    ("output exists", "o.json exists", put("o.json", "x")),
    (
        "a fold of all",
        "lack cases|all cases",
        lambda box: os.rename(box / FOLD, box / "cv/runs/a/fold_all"),
    ),
    ("no probabilities", "probabilit", None),
    (
        "probabilities broken",
        "case_0.npz|config.json|probabilit",
        put(f"{FOLD}/validation_final/case_0.npz", "x"),
    ),
)
REPORT = (
    ("run missing", "a is not a folder", gone("cv/runs/a"), "", 2),
    ("run a file", "a is not a folder", both(gone("cv/runs/a"), put("cv/runs/a", "x")), "", 2),
    ("run empty", "runs/a", emptied("cv/runs/a"), "", 2),
    ("output a folder", "is a folder", None, "--output {cv}", 2),
    ("output a foreign file", "not a page", put("o.html", "mine"), "--output {box}/o.html", 2),
    ("worst cases 0", "--num-worst", None, "--num-worst 0", 2),
    ("worst cases a text", "--num-worst", None, "--num-worst few", 2),
    ("raw missing", "--raw", None, "--raw {box}/nothing", 2),
    ("checkpoint unknown", "--checkpoint", None, "--checkpoint last", 2),
    ("two runs without output", "--output", None, "--run {cv}/runs/a {cv}/runs/b", 2),
)
DETERMINE = (
    ("predictions missing", "pred", gone("maps/pred")),
    ("predictions empty", "pred", emptied("maps/pred")),
    ("references missing", "ref", gone("maps/ref")),
    ("reference missing", "case_1.mha", gone(REF)),
    ("map cut", "case_1.mha", cut(MAP)),
    ("map of another shape", "case_1", image(MAP, np.zeros((3, 4, 5), np.uint8))),
    ("dataset.json missing", "dataset.json", gone("maps/dataset.json")),
    ("dataset.json without labels", "labels", entry("maps/dataset.json", "labels", ...)),
    ("workers negative", "--workers", None, "--workers -1", 2),
    ("output exists", "exists", put("out/postprocessing.json", "x")),
)
POST = "post/postprocessing.json"
APPLY = (
    ("file missing", "postprocessing.json", gone(POST)),
    ("file broken", "postprocessing.json", put(POST, "{")),
    ("file a list", "postprocessing.json", put(POST, "[]")),
    ("file of another kind", "postprocessing.json", put(POST, "{}")),
    ("a function of one's own", "os.system", entry(POST, "postprocessing_fns", ["os.system"])),
    ("function a number", "postprocessing.json", entry(POST, "postprocessing_fns", [3])),
    (
        "labels a text",
        "postprocessing.json",
        entry(POST, "postprocessing_kwargs", [{"labels_or_regions": "x"}]),
    ),
    ("arguments too few", "postprocessing.json", entry(POST, "postprocessing_kwargs", [])),
    ("input missing", "pred", gone("maps/pred")),
    ("input empty", "pred", emptied("maps/pred")),
    ("output the input", "--output", None, "--output {maps}/pred", 2),
    ("cleaned output exists", "exists", put("out/case_1.mha", "x")),
)
BUNDLE = (
    ("run missing", "run is not a run", gone("run")),
    ("run of another kind", "run is not a run", gone("run/config.json")),
    ("run without folds", "no fold", gone("run/fold_0")),
    ("fold missing", "no fold 3", None, "--folds 3"),
    ("not finished", "no final checkpoint", gone("run/fold_0/checkpoints/final")),
    ("plans missing", "plans.json", gone("run/plans.json")),
    ("plans broken", "plans.json", cut("run/plans.json")),
    ("dataset missing", "dataset.json", gone("run/dataset.json")),
    ("record broken", "run.json", put("run/fold_0/run.json", "{")),
    ("record a list", "run.json", put("run/fold_0/run.json", "[]")),
    ("summary broken", "summary.json", put("run/fold_0/validation_final/summary.json", "{}")),
    ("checkpoint unknown", "--checkpoint", None, "--checkpoint last", 2),
    ("out exists", "out exists", put("out/x", "x")),
    RUNS[-2][:2] + (RUNS[-2][2],),
)
STAGES = (
    ("folds a text", "--folds", None, "--folds first", 2),
    ("jobs 0", "--jobs", None, "--jobs 0", 2),
    ("option unknown", "--banana", None, "--banana", 2),
    ("argument left over", "banana", None, "banana", 2),
    ("stale twice", "--keep-stale", None, "--restart-stale --keep-stale", 2),
    ("task unknown", "--task", None, "--task t9", 2),
    ("specialist missing", "nothing.py", None, "--specialists nothing.py", 2),
    ("specialist argument", "aug=banana", None, "--specialists mri_t2.py:aug=banana", 2),
    ("foundation missing", "gone", None, "--foundation gone", 2),
    ("foundation not there", "weights/multitalent", None, "--print-commands"),
    ("script nowhere", "foundation", None, "--slurm {box}/no/where.sh"),
)
WEIGHTS = (("folder missing", "bundle.*does not exist", gone("bundle")),)
GALLERY = (
    ("out of another kind", ".png", None, "--out {box}/o.gif", 2),
    ("raw missing", "raw", gone("raw")),
    ("case unknown", "banana", None, "--case banana", 2),
    ("image cut", "case_1_0000.mha", cut(IMAGE), "--case case_1"),
    ("modality unknown", "--modality", None, "--modality pet", 2),
    ("config missing", "nothing.py", None, "--config nothing.py"),
)
PLANNING = (
    ("raw missing", "raw is not a folder", gone("raw")),
    ("planner unknown", "banana", None, "--planner banana"),
    ("memory 0", "gpu.memory", None, "--gpu-memory-gb 0", 2),
    ("memory NaN", "gpu.memory", None, "--gpu-memory-gb nan", 2),
    ("memory a text", "--gpu-memory-gb", None, "--gpu-memory-gb much", 2),
    ("spacing 0", "spacing", None, "--target-spacing 0 1 1", 2),
    ("spacing NaN", "spacing", None, "--target-spacing nan 1 1", 2),
    ("spacing of two axes", "--target-spacing", None, "--target-spacing 1 1", 2),
    ("workers negative", "--workers", None, "--workers -1", 2),
    ("normalization unknown", "Banana", None, "--panther --panther-normalization Banana", 2),
    ("plans missing", "gone.json", None, "--from-plans {box}/gone.json"),
    ("plans a list", "plans.json|plans", put(PLANS, "[]"), "--from-plans {plans}/plans.json"),
    ("plans broken", "plans.json", put(PLANS, "{"), "--from-plans {plans}/plans.json"),
    (
        "plans of other channels",
        "channel",
        entry(DATA, "channel_names", {}),
        "--from-plans {plans}/plans.json",
    ),
    ("fingerprint broken", "dataset_fingerprint.json", put("out/dataset_fingerprint.json", "{")),
    ("fingerprint a list", "dataset_fingerprint.json", put("out/dataset_fingerprint.json", "[]")),
    (
        "fingerprint of another",
        "dataset_fingerprint.json",
        put("out/dataset_fingerprint.json", "{}"),
    ),
    ("image cut", "case_1", cut(IMAGE)),
    ("out a file", "out", put("out", "x")),
)
CONVERT = (
    ("panther empty", "download", None, "panther --task t1 --source {download}"),
    ("panther missing", "gone", None, "panther --task t2 --source {box}/gone"),
    ("panther task", "--task", None, "panther --task t3 --source {download}", 2),
    ("msd empty", "download", None, "msd --source {download}"),
    ("panorama empty", "download", None, "panorama --source {download}"),
    ("merge of one missing", "gone", None, "merge --inputs {raw} {box}/gone"),
    ("merge of twins", "case_0", None, "merge --inputs {raw} {raw}"),
    ("merge workers", "--workers", None, "merge --inputs {raw} --workers -1", 2),
    ("phantom of 0 cases", "--cases", None, "phantom --cases 0", 2),
    ("phantom seed", "--seed", None, "phantom --seed -1", 2),
    ("phantom labels missing", "gone", None, "phantom --labels {box}/gone"),
    ("phantom labels empty", "download", None, "phantom --labels {download}"),
    (
        "phantom labels broken",
        "a.nii.gz",
        put("download/a.nii.gz", "x"),
        "phantom --labels {download}",
    ),
    ("action unknown", "banana", None, "banana", 2),
)
HEADER = ("out/plans.json", "out/dataset.json", "out/splits_final.json", "out/predict*.json")
TORCH = "weight_conversion"
TABLE: tuple[Bad, ...] = (
    *group(
        "panther_jax.datasets",
        "check {raw} --output {box}/report.json",
        *CHECK,
        leaves=("report.json",),
    ),
    *(
        Bad("panther_jax.datasets", f"{row[3]} --out {{out}}", row[0], row[1], row[2], (*row, 1)[4])
        for row in CONVERT
    ),
    *group("panther_jax.planning", "--raw {raw} --out {out}", *PLANNING),
    *group(
        "panther_jax.preprocess", "--raw {raw} --plans {plans}/plans.json --out {out}", *PREPROCESS
    ),
    *group(
        "panther_jax.preprocess",
        "--raw {raw} --plans {plans}/plans.json --out {out}",
        *PREPROCESS_CASES,
        leaves=(
            *HEADER,
            "out/case_[!1]*",
            "out/references/case_[!1]*",
            "out/provenance/sources.json",
        ),  # fmt: skip
    ),
    *(
        Bad(
            "panther_jax.train",
            f"--config {(*row, '{own}')[3]} --root {{root}} --raw {{raw}}",
            row[0],
            row[1],
            row[2],
            2,
        )
        for row in CONFIGS
    ),
    *group(
        "panther_jax.train",
        f"--config smoke --raw {{raw}} --root {{root}} {CACHE_OFF}",
        *TRAIN,
        leaves=("root/*",),
    ),
    *group(
        "panther_jax.train",
        f"--config smoke --store {{store}} --workdir {{work}} {CACHE_OFF}",
        *TRAIN_STORE,
        leaves=("work/*",),
    ),
    *group(
        "panther_jax.predict",
        "--model {bundle} --input {scans} --output {out}",
        *MODELS,
        *PREDICT_NOTHING,
    ),
    *group(
        "panther_jax.predict",
        "--model {bundle} --input {scans} --output {out}",
        *PREDICT,
        leaves=HEADER,
    ),
    *group(
        "panther_jax.predict",
        "--model {bundle} --input {scans} --output {out}",
        ("scan without channel", "case_9.nii.gz has no channel", put("scans/case_9.nii.gz", "x")),
        leaves=(*HEADER, "out/case_1.nii.gz"),
    ),
    *group("panther_jax.predict", "--model {run} --input {scans} --output {out}", *RUNS),
    *group("panther_jax.predict", "--ensemble {spec} --input {scans} --output {out}", *SPECS),
    *group("panther_jax.predict", "--model {folder} --input {scans} --output {out}", *CHECKPOINTS),
    *group(
        "panther_jax.predict_challenge",
        "--task t2 --model {bundle} --input {in} --output {out}",
        *CHALLENGE,
        leaves=("out/images*",),
    ),
    *group(
        "panther_jax.evaluate",
        "--predictions {maps}/pred --references {maps}/ref --output {box}/o.json",
        *EVALUATE,
    ),
    *group(
        "panther_jax.evaluate",
        "--predictions {maps}/pred --references {maps}/ref --output {box}/o.json",
        *EVALUATE_CASES,
        leaves=("o.*",),
    ),
    *group("panther_jax.evaluate", "--output {box}/o.json --runs {cv}/runs/a", *EVALUATE_RUNS),
    *group(
        "panther_jax.evaluate",
        "--output {box}/o.json --compare {cv}/runs/a {box}/spec/own.json",
        *COMPARE,
    ),
    *group(
        "panther_jax.ensemble",
        "select --candidates {cv}/runs/a {cv}/runs/b --references {cv}/raw/Dataset902_Made"
        " --output {box}/o.json",
        *SELECT,
    ),
    *group("panther_jax.report", "--run {cv}/runs/a", *REPORT),
    *group(
        "panther_jax.postprocess",
        "determine --predictions {maps}/pred --references {maps}/ref --output {out}",
        *DETERMINE,
    ),
    *group(
        "panther_jax.postprocess",
        "apply --input {maps}/pred --postprocessing {post}/postprocessing.json --output {out}",
        *APPLY,
    ),
    *group("panther_jax.bundle", "--run {run} --out {out}", *BUNDLE),
    *group("panther_jax.stages", "--task t2 --root {root}", *STAGES),
    *group("panther_jax.weights.__main__", "show {bundle}", *WEIGHTS),
    *group(
        "panther_jax.weights.__main__",
        "get --root {box}",
        ("name unknown", "banana.*", None, "banana"),
        ("name nearly known", "(?s)winner-t3.*winner-t", None, "winner-t3"),
        ("DOI of another place", "10.1000/1", None, "10.1000/1"),
    ),
    *group("panther_jax.weights.__main__", "", ("action unknown", "fetch", None, "fetch", 2)),
    *group("panther_jax.augment.gallery", "--raw {raw} --out {box}/o.png", *GALLERY),
    *group(
        f"{TORCH}.import_nnunet", "--model-folder {folder} --out {out}", *CHECKPOINTS, *IMPORT_ONLY
    ),
    *group(f"{TORCH}.export_nnunet", "--model {bundle} --out {out}", *MODELS),
    *group(
        f"{TORCH}.verify",
        "--model-folder {folder} --bundle {bundle}",
        *MODELS[3:8],
        ("folder missing", "folder", gone("folder")),
        ("tolerance", "--tolerance", None, "--tolerance x", 2),
    ),
)
