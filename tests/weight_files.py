"""Made-up networks, model folders, runs and torch files for the tests of ``weight_conversion``."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from panther_jax.config.schema import ArchConfig, DataConfig, LoopConfig, OptimConfig, TrainConfig
from panther_jax.network import unet
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.plans import IntensityProperties, Plans, Resampler
from panther_jax.training import optim
from panther_jax.weights.bundle import save_bundle
from panther_jax.weights.checkpoint import Checkpoints, Counters, TrainState
from weight_conversion import mapping

DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "lesion": 1, "pancreas": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
RESIDUAL = ArchSpec(
    "ResidualEncoderUNet",
    1,
    3,
    (4, 6, 6),
    ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    (1, 2, 1),
    (1, 2),
)
PLAIN = dataclasses.replace(RESIDUAL, network="PlainConvUNet", nonlin_first=True)
FLAT = dataclasses.replace(
    RESIDUAL,
    kernel_sizes=((3, 3),) * 3,
    strides=((1, 1), (2, 2), (2, 1)),
    bottleneck_channels=(2, 3, 3),
)
DROPPED = dataclasses.replace(RESIDUAL, dropout_rate=0.2, stem_channels=5, conv_bias=False)
NETWORKS = {"residual": RESIDUAL, "plain": PLAIN, "flat": FLAT, "dropout": DROPPED}
RESENC_L = ArchSpec(
    "ResidualEncoderUNet",
    1,
    2,
    (32, 64, 128, 256, 320, 320),
    ((3, 3, 3),) * 6,
    ((1, 1, 1),) + ((2, 2, 2),) * 5,
    (1, 3, 4, 6, 6, 6),
    (1,) * 5,
)


def make_plans(arch, *, patch=16, configuration="3d_fullres"):
    """Plans of a network; patch edges in voxels."""
    spline = Resampler(
        "resample_data_or_seg_to_shape",
        (("force_separate_z", None), ("is_seg", False), ("order", 1), ("order_z", 0)),
    )
    labels = dataclasses.replace(
        spline, kwargs=tuple((k, True if k == "is_seg" else v) for k, v in spline.kwargs)
    )
    return Plans(
        dataset_name="Dataset777_Tiny",
        plans_name="TinyPlans",
        configuration=configuration,
        spacing=(1.0,) * arch.ndim,
        patch_size=(patch,) * arch.ndim,
        batch_size=2,
        batch_dice=False,
        normalization=("ZScoreNormalization",) * arch.in_channels,
        use_mask_for_norm=(False,) * arch.in_channels,
        resampling_image=spline,
        resampling_label=labels,
        resampling_logits=spline,
        arch=arch,
        intensity=(IntensityProperties(0.0, 1.0, 0.0, -5.0, 5.0, -4.0, 4.0),),
        data_identifier=f"TinyPlans_{configuration}",
    )


def random_params(arch, seed=0):
    """Parameters that are nowhere zero, so that a swapped or dropped tensor shows."""
    rng = np.random.default_rng(seed)
    tree = {}
    for path, struct in unet.walk(unet.param_shapes(arch)):
        fan = max(1, math.prod(struct.shape[:-1])) if len(struct.shape) > 1 else 4
        leaf = rng.standard_normal(struct.shape, np.float32) / np.float32(fan**0.5)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf + np.float32(path[-1] == "scale")
    return tree


def state_dict(arch, seed=0):
    """A torch state dict with all aliases."""
    from weight_conversion import torch_files

    tensors = mapping.to_state(random_params(arch, seed), arch)
    return torch_files.make_state_dict(tensors, mapping.names_of(arch).keys)


def checkpoint(arch, seed=0, **entries):
    """The entries of a checkpoint that the predictor needs, and some more."""
    import torch

    plans = make_plans(arch)
    return {
        "network_weights": state_dict(arch, seed),
        "trainer_name": "nnUNetTrainer",
        "init_args": {
            "plans": plans.to_nnunet(),
            "configuration": plans.configuration,
            "fold": 0,
            "dataset_json": DATASET,
            "device": torch.device("cpu"),
        },
        "inference_allowed_mirroring_axes": (0, 1, 2)[: arch.ndim],
        "_best_ema": np.float64(0.5),
        "current_epoch": 2,
        **entries,
    }


def write_model_folder(folder, arch, folds=("0",)):
    """An nnU-Net model folder."""
    import torch

    for seed, fold in enumerate(folds):
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.save(checkpoint(arch, seed), folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(make_plans(arch).to_nnunet()))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


def multi_state(arch, stems, heads, seed=0):
    """A state dict in the grammar of MultiTalent: stems and heads (channels, classes) by id."""
    import torch

    ordinary = state_dict(arch, seed)
    state = type(ordinary)()
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for key, tensor in ordinary.items():
        canonical = mapping.canonical_name(key)
        if canonical.startswith(mapping.STEM):
            for name, channels in stems.items():
                shape = list(tensor.shape)
                if tensor.ndim > 1:
                    shape[1] = channels
                new = made.setdefault((canonical, name), torch.randn(shape, generator=generator))
                state[key.replace("stem.", f"stem.{name}.")] = new
        elif canonical.startswith(mapping.HEADS):
            for name, classes in heads.items():
                shape = [classes, *tensor.shape[1:]]
                key_of_id = key.replace("seg_layers.", f"seg_layers.{name}.")
                state[key_of_id] = torch.randn(shape, generator=generator)
        else:
            state[key] = tensor
    return state


def write_run(
    workdir,
    arch,
    *,
    optimizer="sgd",
    policy="default",
    steps=3,
    kinds=None,
    plans=None,
    dataset=DATASET,
    seed=0,
):
    """A run as training leaves it: ``steps`` epochs of one step, with random gradients."""
    settings = TrainConfig(
        data=DataConfig(
            "Dataset777_Tiny",
            patch_size=(16,) * arch.ndim,
            spacing_mm=(1.0,) * arch.ndim,
            configuration="3d_fullres" if arch.ndim == 3 else "2d",
        ),
        arch=ArchConfig(
            arch.network,
            arch.features,
            arch.kernel_sizes,
            arch.strides,
            arch.blocks,
            arch.decoder_convs,
        ),
        optim=OptimConfig(optimizer=optimizer, lr=0.02),
        loop=LoopConfig(epochs=4, steps_per_epoch=1),
    )
    config = settings.to_json()
    config["augment"]["policy"] = policy
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "plans.json").write_text(json.dumps((plans or make_plans(arch)).to_nnunet()))
    (workdir / "dataset.json").write_text(json.dumps(dataset))
    tx = optim.make_optimizer(settings.optim, optim.make_schedule(settings.optim, 4, 1))
    params = jax.tree.map(jnp.asarray, random_params(arch, seed))
    opt_state = tx.init(params)
    checkpoints = Checkpoints(workdir / "fold_0" / "checkpoints")
    rows = []
    update = jax.jit(lambda g, s, p: _updated(tx, g, s, p))
    for step in range(1, steps + 1):
        grads = random_params(arch, seed=100 + step)
        params, opt_state = update(grads, opt_state, params)
        rows.append(
            {
                "step": step,
                "epoch": step - 1,
                "train_loss": 1.0 / step,
                "validation_loss": 2.0 / step,
                "pseudo_dice": {"lesion": 0.1 * step, "pancreas": None},
                "mean_pseudo_dice": 0.1 * step,
                "ema": 0.1 * step,
                "lr": 0.02 / step,
                "seconds": 2.0,
            }
        )
        for kind, at in (kinds or {"best": 1, "final": steps}).items():
            if at == step:
                state = TrainState(jnp.asarray(step, jnp.int32), params, opt_state)
                counters = Counters(step, ema=0.1 * step, best_ema=0.1, best_step=1)
                checkpoints.save(kind, state, counters)
    (workdir / "fold_0" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return params, opt_state


def _updated(tx, grads, opt_state, params):
    updates, opt_state = tx.update(grads, opt_state, params)
    return jax.tree.map(jnp.add, params, updates), opt_state


def write_bundle(folder, arch=RESIDUAL, folds=("0", "1"), dataset=DATASET, **plans):
    save_bundle(
        folder,
        params={fold: random_params(arch, seed) for seed, fold in enumerate(folds)},
        plans=make_plans(arch, **plans).to_nnunet(),
        dataset=dataset,
        provenance={"inference_allowed_mirroring_axes": [0, 2]},
    )
    return folder
