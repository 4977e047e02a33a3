"""The networks that benchmarks run, their work in FLOPs, and the data that both sides get.

Free of JAX and torch: ours and the peer build the same from it, each in a process of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.plans import IntensityProperties, Plans, Resampler

DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "tumor": 1, "pancreas": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


@dataclass(frozen=True)
class Size:
    """A residual-encoder U-Net with what goes through it; 3^3 kernels, strides of 2."""

    name: str
    features: tuple[int, ...]
    blocks: tuple[int, ...]
    patch: tuple[int, ...]
    batch: int
    num_outputs: int = 3

    @property
    def arch(self) -> ArchSpec:
        """The architecture."""
        stages = len(self.features)
        return ArchSpec(
            network="ResidualEncoderUNet",
            in_channels=1,
            num_outputs=self.num_outputs,
            features=self.features,
            kernel_sizes=((3, 3, 3),) * stages,
            strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
            blocks=self.blocks,
            decoder_convs=(1,) * (stages - 1),
        )

    @property
    def label(self) -> str:
        """Name, patch and batch for people."""
        return f"{self.name}, {'x'.join(map(str, self.patch))} batch {self.batch}"

    def to_json(self) -> dict[str, Any]:
        """For a process's command line."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Size":
        """Inverse of :meth:`to_json`."""
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return Size(**made)


RESENC_L = ((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6))
TINY = Size("tiny", (4, 8, 8), (1, 1, 1), (8, 16, 16), 2)
DEMO = Size("demo 8-64", (8, 16, 32, 64), (1, 1, 1, 1), (16, 48, 48), 2)
MIDDLE = Size("16-128", (16, 32, 64, 128), (1, 2, 2, 2), (32, 64, 64), 2)
LARGE = Size("ResEnc-L", *RESENC_L, (64, 64, 64), 1)
FULL = Size("ResEnc-L", *RESENC_L, (192, 192, 192), 2)


def forward_flops(size: Size) -> int:
    """Multiplications and additions of all convolutions of a forward pass, 2 a product."""
    arch = size.arch
    voxels = [
        math.prod(
            n // math.prod(s[a] for s in arch.strides[: i + 1]) for a, n in enumerate(size.patch)
        )
        for i in range(arch.num_stages)
    ]
    products = voxels[0] * _kernel(arch, 0) * arch.in_channels * arch.features[0]
    channels = arch.features[0]
    for stage, features in enumerate(arch.features):
        for _ in range(arch.blocks[stage]):
            products += voxels[stage] * _kernel(arch, stage) * features * (channels + features)
            if channels != features:
                products += voxels[stage] * channels * features
            channels = features
    for stage in reversed(range(arch.num_stages - 1)):
        features, below = arch.features[stage], arch.features[stage + 1]
        products += voxels[stage] * below * features  # transposed: each output voxel has one tap
        products += voxels[stage] * _kernel(arch, stage) * 2 * features * features
        products += voxels[stage] * features * arch.num_outputs
    return 2 * size.batch * products


def _kernel(arch: ArchSpec, stage: int) -> int:
    return math.prod(arch.kernel_sizes[stage])


def make_batch(size: Size, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise (B, *patch, 1) float32, and boxes of labels (B, *patch, 1) int16."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((size.batch, *size.patch, 1), np.float32)
    coarse = rng.integers(0, size.num_outputs, (size.batch, *(n // 4 for n in size.patch), 1))
    label = coarse.astype(np.int16)
    for axis in (1, 2, 3):
        label = np.repeat(label, 4, axis)
    return image, label


def make_targets(size: Size, label: np.ndarray) -> tuple[np.ndarray, ...]:
    """The label at the resolution of each output; both sides' loss gets the same."""
    return tuple(
        np.ascontiguousarray(label[:, :: s[0], :: s[1], :: s[2]]) for s in size.arch.output_strides
    )


def supervision_weights(count: int) -> tuple[float, ...]:
    """Weights of the outputs, highest resolution first: halved each time, the last 0, sum 1."""
    weights = [*(0.5**i for i in range(count - 1)), 0.0] if count > 1 else [1.0]
    return tuple(w / sum(weights) for w in weights)


def make_plans(
    size: Size, *, spacing: tuple[float, ...] = (1.0, 1.0, 1.0), order_z: int = 0
) -> Plans:
    """Plans of a network with nnU-Net's usual resampling."""
    kwargs = (("force_separate_z", None), ("is_seg", False), ("order", 3), ("order_z", order_z))
    image = Resampler("resample_data_or_seg_to_shape", kwargs)

    def changed(**values: Any) -> Resampler:
        return Resampler(image.name, tuple((k, values.get(k, v)) for k, v in kwargs))

    return Plans(
        dataset_name="Dataset777_Benchmark",
        plans_name="BenchmarkPlans",
        configuration="3d_fullres",
        spacing=spacing,
        patch_size=size.patch,
        batch_size=size.batch,
        batch_dice=False,
        normalization=("ZScoreNormalization",),
        use_mask_for_norm=(False,),
        resampling_image=image,
        resampling_label=changed(is_seg=True, order=1),
        resampling_logits=changed(order=1),
        arch=size.arch,
        intensity=(IntensityProperties(0.0, 1.0, 0.0, -5.0, 5.0, -4.0, 4.0),),
        data_identifier="BenchmarkPlans_3d_fullres",
    )
