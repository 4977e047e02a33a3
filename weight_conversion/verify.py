"""Compare nnU-Net's network with ours on random input: ``python -m weight_conversion.verify``.

nnU-Net builds its network and computes in float32 on the CPU; the weights of both come from the
same checkpoint through the safe loader, or ours from a bundle made of it.
"""

import argparse
import sys
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

EXAMPLE = (
    "python -m weight_conversion.verify --model-folder "
    "nnUNet_results/Dataset902_PANTHER/nnUNetTrainer__nnUNetPlans__3d_fullres "
    "--bundle data/weights/t2"
)
TOLERANCE = 2e-4  # spec 01 §2.6
MIN_SIZE = 16


class Mismatch(PantherError, RuntimeError):
    """The networks disagree."""


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
    checkpoint_name: str = import_nnunet.FINAL,
    seed: int = 0,
) -> tuple[Difference, ...]:
    """Run both networks of each fold on the same random input.

    Raises:
        ModuleNotFoundError: without torch or nnunetv2.
        ValueError, RuntimeError: if files cannot be read or do not fit.
    """
    from panther_jax.weights.bundle import load_bundle
    from weight_conversion.torch_files import read_checkpoint

    imported = import_nnunet.read_model_folder(
        model_folder, folds=folds, checkpoint_name=checkpoint_name
    )
    ours = imported.bundle() if bundle is None else load_bundle(bundle)
    ours.require_complete("verify it")
    arch = imported.bundle().plans.arch
    if ours.plans.arch != arch:
        raise Mismatch(f"{bundle} is of another architecture than {model_folder}")
    rng = np.random.default_rng(seed)
    found = []
    for fold in imported.params:
        path = import_nnunet.find_folds(model_folder, [fold], checkpoint_name)[fold]
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
        "Run nnU-Net's network and ours on random input and print the differences of the logits.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--model-folder", type=Path, required=True, help="nnU-Net model folder")
    add("--bundle", type=Path, help="bundle imported from it (default: convert in memory)")
    add("--folds", nargs="+", default=[], metavar="K", help="folds (default: each numbered one)")
    add("--checkpoint-name", default=import_nnunet.FINAL, help="file name in the fold folders")
    add("--tolerance", type=float, default=TOLERANCE, help=f"largest difference ({TOLERANCE:g})")
    return parser


def _run(arguments: argparse.Namespace) -> str:
    differences = compare(
        arguments.model_folder,
        bundle=arguments.bundle,
        folds=arguments.folds,
        checkpoint_name=arguments.checkpoint_name,
    )
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
    if not worst <= arguments.tolerance:
        raise Mismatch(
            f"the networks disagree: largest difference {worst:.2e}, allowed "
            f"{arguments.tolerance:g}\n{text}"
        )
    return f"{text}\n\nthe networks agree: largest difference {worst:.2e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(command.normalized(sys.argv[1:] if argv is None else argv))
    return command.run(lambda: _run(arguments), quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
