"""Compare nnU-Net with ours on one image: ``python -m weight_conversion.verify``.

First the networks, on random input: nnU-Net builds its own and computes in float32 on the CPU. Then
the label maps that both predictors make of an image, from its voxels to the raw grid. The weights
of both come from the same checkpoints, or ours from a bundle made of them.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from panther_jax.base import command
from panther_jax.base.console import table
from panther_jax.base.errors import PantherError
from weight_conversion import import_nnunet

if TYPE_CHECKING:  # JAX and torch load when there is something to compare: --help must be quick
    from panther_jax.plans.architecture import ArchSpec
    from panther_jax.plans.plans import Plans

EXAMPLE = (
    "python -m weight_conversion.verify --model-folder "
    "nnUNet_results/Dataset902_PANTHER/nnUNetTrainer__nnUNetPlans__3d_fullres "
    "--bundle data/weights/t2"
)
TOLERANCE = 2e-4  # spec 01 §2.6
MIN_SIZE = 16


class Mismatch(PantherError, RuntimeError):
    """Networks or label maps disagree, or one side cannot predict."""


@dataclass(frozen=True)
class LabelMaps:
    """Both label maps of an image (z, y, x): voxels of each label, and how many differ."""

    what: str
    shape: tuple[int, ...]
    theirs: Mapping[int, int]
    ours: Mapping[int, int]
    different: int


@dataclass(frozen=True)
class Difference:
    """Logits of one output of one fold, highest resolution first: largest and mean difference."""

    fold: str
    output: int
    shape: tuple[int, ...]
    largest: float
    mean: float
    magnitude: float


def compare(
    model_folder: Path,
    *,
    bundle: Path | None = None,
    folds: Sequence[str] = (),
    checkpoint: str = "final",
    seed: int = 0,
) -> tuple[Difference, ...]:
    """Run both networks of each fold on the same random input.

    Raises:
        ModuleNotFoundError: without torch or nnunetv2.
        ValueError, RuntimeError: if files cannot be read or do not fit.
    """
    from panther_jax.weights.bundle import load_bundle
    from weight_conversion.torch_files import read_checkpoint

    imported = import_nnunet.read_model_folder(model_folder, folds=folds, checkpoint=checkpoint)
    ours = imported.bundle() if bundle is None else load_bundle(bundle)
    ours.require_complete("verify it")
    arch = imported.bundle().plans.arch
    if ours.plans.arch != arch:
        raise Mismatch(f"{bundle} is of another architecture than {model_folder}")
    rng = np.random.default_rng(seed)
    found = []
    for fold, path in import_nnunet.find_folds(model_folder, folds, checkpoint).items():
        if fold not in ours.params:
            raise Mismatch(f"{bundle} holds no fold {fold}; there are {', '.join(ours.params)}")
        image = rng.standard_normal((1, arch.in_channels, *_input_size(arch)), np.float32)
        theirs = reference_logits(arch, read_checkpoint(path).weights, image)
        for i, (a, b) in enumerate(
            zip(theirs, port_logits(arch, ours.params[fold], image), strict=True)
        ):
            gap = np.abs(a - b)
            found.append(
                Difference(
                    fold, i, a.shape, float(gap.max()), float(gap.mean()), float(np.abs(a).max())
                )
            )
    return tuple(found)


def compare_label_maps(
    model_folder: Path,
    *,
    bundle: Path | None = None,
    image: Sequence[Path] = (),
    folds: Sequence[str] = (),
    checkpoint: str = "final",
) -> LabelMaps:
    """Predict one image with nnU-Net and with ours in reference accumulation.

    ``image`` is a file a channel; without it, the image is made up.

    Raises:
        ModuleNotFoundError: without torch or nnunetv2.
        Mismatch: if nnU-Net cannot predict with the folder.
        ValueError, RuntimeError: if files cannot be read or do not fit.
    """
    from panther_jax.images.imageio import read_image
    from panther_jax.inference import members
    from panther_jax.inference.predictor import CasePredictor, Settings
    from panther_jax.weights import models

    paths = import_nnunet.find_folds(model_folder, folds, checkpoint)
    imported = import_nnunet.read_model_folder(model_folder, folds=folds, checkpoint=checkpoint)
    ours = imported.bundle()
    if image:
        voxels, geometry = read_image(image)
        spacing = geometry.spacing_zyx
    else:
        voxels, spacing = synthetic_image(ours.plans)
    theirs = reference_labels(model_folder, voxels, spacing, paths=paths)
    model = models.load_model(
        model_folder if bundle is None else bundle,
        folds=[_option(fold) for fold in paths],
        checkpoint=checkpoint,  # type: ignore[arg-type]
    )
    member = members.Member(model, ours.mirror_axes, step_size=0.5)
    predictor = CasePredictor(members.Ensemble((member,), None), Settings(accumulate="reference"))
    labels = predictor.predict(voxels, spacing).label
    return LabelMaps(
        ", ".join(map(str, image)) or "made-up image",
        labels.shape,
        _counts(theirs),
        _counts(labels),
        int((theirs != labels).sum()),
    )


def _option(fold: str) -> str:
    return "fold_all" if fold == "all" else fold


def _counts(labels: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(labels, return_counts=True)
    return {int(v): int(n) for v, n in zip(values, counts, strict=True)}


def synthetic_image(plans: "Plans", seed: int = 0) -> tuple[np.ndarray, tuple[float, ...]]:
    """Noise, smooth and rough, on the raw grid that needs two tiles an axis; (image, spacing).

    (channel, z, y, x) in the range of the channels' intensities, spacing in mm. A 2-D model gets
    three slices.
    """
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    tile, spacing = list(plans.patch_size), list(plans.spacing)
    shape = [-(-n * 5 // 4) for n in tile]
    if len(shape) == 2:
        shape, spacing = [3, *shape], [spacing[0], *spacing]
    back = plans.transpose_backward
    shape, spacing = [shape[a] for a in back], [spacing[a] for a in back]
    channels = []
    for c in range(plans.arch.in_channels):
        rough = rng.standard_normal(shape)
        noise = 4 * ndimage.gaussian_filter(rng.standard_normal(shape), 2.0) + 0.2 * rough
        known = plans.intensity[c] if c < len(plans.intensity) else None
        mean, std = (100.0, 30.0) if known is None else (known.mean, known.std)
        mean, std = (mean, std) if np.isfinite([mean, std]).all() else (100.0, 30.0)
        channels.append(mean + std * noise)
    return np.asarray(channels, np.float32), tuple(spacing)


def reference_labels(
    model_folder: Path,
    image: np.ndarray,
    spacing: Sequence[float],
    *,
    paths: Mapping[str, Path],
) -> np.ndarray:
    """The label map that nnU-Net's predictor makes of an image, mirroring as it does by default.

    The checkpoints pass our safe loader first: nnU-Net's own runs what a file holds.

    Raises:
        ModuleNotFoundError: without nnunetv2.
        Mismatch: with nnU-Net's words, if it cannot predict.
    """
    from weight_conversion.torch_files import read_torch, torch

    try:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "verify needs nnU-Net itself; install it with pip install nnunetv2"
        ) from None
    for path in paths.values():
        read_torch(path)
    predictor: Any = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False
    )
    folds = tuple(int(f) if f.isdigit() else f for f in paths)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nnU-Net's and torch's own
            predictor.initialize_from_trained_model_folder(
                str(model_folder), folds, next(iter(paths.values())).name
            )
            return predictor.predict_single_npy_array(
                image, {"spacing": list(spacing)}, None, None, False
            )
    except Exception as error:  # whatever nnU-Net stumbles over
        raise Mismatch(
            f"nnU-Net cannot predict with {model_folder}: {type(error).__name__}: {error}\n"
            "  Export the model again; plans.json or dataset.json may lack an entry."
        ) from error


def _input_size(arch: "ArchSpec") -> tuple[int, ...]:
    """At least 16 voxels an axis, and at least two at the lowest resolution."""
    return tuple(d * max(2, -(-MIN_SIZE // d)) for d in arch.divisor)


def reference_logits(
    arch: "ArchSpec", weights: Mapping[str, np.ndarray], image: np.ndarray
) -> list[np.ndarray]:
    """Logits of nnU-Net's network, channel first, highest resolution first.

    Raises:
        ModuleNotFoundError: without nnunetv2.
    """
    from weight_conversion.mapping import strip_prefixes
    from weight_conversion.torch_files import torch

    try:
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "verify needs nnU-Net itself; install it with pip install nnunetv2"
        ) from None
    # The description comes from our own checked architecture: nnU-Net imports by name what it says.
    block: dict[str, Any] = arch.to_nnunet()
    network = get_network_from_plans(
        block["network_class_name"],
        block["arch_kwargs"],
        block["_kw_requires_import"],
        arch.in_channels,
        arch.num_outputs,
        deep_supervision=True,
    )
    names = strip_prefixes(list(weights))
    tensors = (torch.from_numpy(value) for value in weights.values())
    network.load_state_dict(dict(zip(names, tensors, strict=True)))
    network.eval()
    with torch.no_grad():
        outputs = network(torch.from_numpy(image))
    return [tensor.numpy() for tensor in outputs]


def port_logits(arch: "ArchSpec", params: Mapping[str, Any], image: np.ndarray) -> list[np.ndarray]:
    """The same of our network: float32 at the highest matmul precision, on the CPU."""
    import jax

    from panther_jax.network import unet

    net = unet.build(arch, unet.Execution("xla", exact_stats=True))
    cpu = jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"), jax.default_device(cpu):
        tree = jax.tree.map(np.asarray, params)
        outputs = jax.jit(lambda p, x: unet.apply(net, p, x))(tree, np.moveaxis(image, 1, -1))
    return [np.moveaxis(np.asarray(output), -1, 1) for output in outputs]


# ------------------------------------------------------------------------------------- command


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(
        "weight_conversion.verify",
        "Predict an image with nnU-Net and with ours, and print what differs.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--model-folder", type=Path, required=True, help="nnU-Net model folder")
    add("--bundle", type=Path, help="bundle imported from it (default: convert in memory)")
    add("--folds", nargs="+", default=[], metavar="K", help="numbers, all or fold_all (all)")
    help_image = "image to predict, a file a channel (default: a made-up one)"
    add("--image", type=Path, nargs="+", default=[], metavar="FILE", help=help_image)
    help_checkpoint = "final (default), best, or a file's name"
    add("--checkpoint", default="final", metavar="final|best|NAME", help=help_checkpoint)
    add("--checkpoint-name", help="the same as --checkpoint NAME")
    add("--tolerance", type=float, default=TOLERANCE, help=f"largest difference ({TOLERANCE:g})")
    return parser


def _run(arguments: argparse.Namespace) -> str:
    chosen: dict[str, Any] = {
        "bundle": arguments.bundle,
        "folds": arguments.folds,
        "checkpoint": arguments.checkpoint_name or arguments.checkpoint,
    }
    networks = _compared_networks(compare(arguments.model_folder, **chosen), arguments.tolerance)
    maps = compare_label_maps(arguments.model_folder, image=arguments.image, **chosen)
    rows = [
        (str(label), str(maps.theirs.get(label, 0)), str(maps.ours.get(label, 0)))
        for label in sorted({*maps.theirs, *maps.ours})
    ]
    text = table((f"label of {'x'.join(map(str, maps.shape))} voxels", "nnU-Net", "ours"), rows)
    if maps.different:
        raise Mismatch(
            f"the label maps of {maps.what} differ in {maps.different} of "
            f"{math.prod(maps.shape)} voxels\n{text}\n{networks}\n"
            "  Where the networks agree, look for what preprocessing or the plans say differently."
        )
    note = "" if len(maps.ours) > 1 else ", of one label only: name a better --image"
    return f"{networks}\n\n{text}\n\nthe label maps of {maps.what} are equal{note}"


def _compared_networks(differences: Sequence[Difference], tolerance: float) -> str:
    rows = [
        (
            f"fold {d.fold}, output {d.output}",
            "x".join(map(str, d.shape)),
            f"{d.largest:.2e}",
            f"{d.mean:.2e}",
            f"{d.magnitude:.2f}",
        )
        for d in differences
    ]
    text = table(("logits", "shape", "largest diff", "mean diff", "largest logit"), rows)
    worst = max(d.largest for d in differences)
    if not worst <= tolerance:
        raise Mismatch(
            f"the networks disagree: largest difference {worst:.2e}, allowed {tolerance:g}\n{text}"
        )
    return f"{text}\n\nthe networks agree: largest difference {worst:.2e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
