"""``--demo``: the same code at the size of a laptop."""

import dataclasses

from panther_jax.config.schema import TrainConfig

# ---------------------------------------------------------------------------------- demo size


def demo(config: TrainConfig) -> TrainConfig:
    """The same stage at the size and budget of a laptop: data, size and budget are replaced.

    Four stages of 8-16-32-64 features (three see too little of the anatomy around), a patch of
    16x48x48 at 3 mm (small enough to be rotated in all planes, not in one as far-from-cubic patches
    are), AdamW for a few hundred steps; SGD at the recipe's rate leaves zero Dice only after far
    more. The default augmentation goes without mirroring: so few steps of so small a network do not
    learn the anatomy in eight reflections. A 2-D stage stays 2-D: slices of 48x48, eight a step.
    """
    replace = dataclasses.replace
    planar = len(config.data.patch_size) == 2
    axes = slice(1, None) if planar else slice(None)
    policy = "no_mirroring" if config.augment.policy == "default" else config.augment.policy
    return replace(
        config,
        data=replace(
            config.data,
            configuration="demo_2d" if planar else "demo",
            spacing_mm=(3.0, 3.0, 3.0)[axes],
            patch_size=(16, 48, 48)[axes],
            batch_size=8 if planar else 2,
            resident="auto",
        ),
        augment=replace(config.augment, policy=policy),
        arch=replace(
            config.arch,
            features=(8, 16, 32, 64),
            kernel_sizes=((3, 3, 3)[axes],) * 4,
            strides=((1, 1, 1)[axes], *((2, 2, 2)[axes],) * 3),
            blocks=(1, 1, 1, 1),
            decoder_convs=(1, 1, 1),
        ),
        optim=replace(config.optim, optimizer="adamw", amsgrad=False, lr=5e-3, schedule="poly"),
        loop=replace(
            config.loop, epochs=16, steps_per_epoch=40, steps_per_call=1, validation_steps=6
        ),
        init=replace(config.init, bundle=None),
    )
