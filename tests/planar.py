"""The smoke config slice by slice, for the tests of 2-D training."""

import dataclasses

from panther_jax.config.loading import load_config

PATCH = (16, 16)


def planar_smoke(*, policy="none", batch_size=2):
    """Three stages of 4-8-8 features on slices of 16x16 at 6 mm; nothing is augmented."""
    config, _ = load_config("smoke")
    replace = dataclasses.replace
    return replace(
        config,
        data=replace(
            config.data,
            configuration="2d",
            spacing_mm=(6.0, 6.0),
            patch_size=PATCH,
            batch_size=batch_size,
        ),
        augment=replace(config.augment, policy=policy),
        arch=replace(
            config.arch,
            kernel_sizes=((3, 3),) * 3,
            strides=((1, 1), (2, 2), (2, 2)),
        ),
        loop=replace(config.loop, compilation_cache=False),
        validation=replace(config.validation, mirror=True),
    )
