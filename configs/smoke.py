"""The whole pipeline at toy size: CPU, well under a minute, for tests and continuous integration.

Launch:    python -m panther_jax.train --config smoke.py --raw RAW
Expected:  nothing but that it runs: a few steps of a two-stage network of four channels.
"""

from panther_jax.config import (
    ArchConfig,
    DataConfig,
    LoopConfig,
    OptimConfig,
    TrainConfig,
    ValidationConfig,
)


def get_config() -> TrainConfig:
    """Three stages of 4-8-8 features, patches of 8x16x16 at 6 mm, two epochs of three steps."""
    return TrainConfig(
        data=DataConfig(
            dataset="Dataset902_PANTHER_HR",
            modality="t2",
            configuration="smoke",
            spacing_mm=(6.0, 6.0, 6.0),
            patch_size=(8, 16, 16),
            num_threads=2,
        ),
        arch=ArchConfig(
            features=(4, 8, 8),
            kernel_sizes=((3, 3, 3),) * 3,
            strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
            blocks=(1, 1, 1),
            decoder_convs=(1, 1),
        ),
        optim=OptimConfig(optimizer="adamw", lr=1e-3),
        loop=LoopConfig(epochs=2, steps_per_epoch=3, validation_steps=1),
        validation=ValidationConfig(mirror=False),
    )
