"""The network: parity with the reference's outputs and training steps, rules of initialisation."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch_names import canonical_params

from panther_jax.base.errors import PlansError
from panther_jax.config.schema import LossConfig, OptimConfig
from panther_jax.network import unet
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.labels import Labels
from panther_jax.plans.plans import Plans
from panther_jax.training import losses, optim, targets

# Compiles in a fraction of the time; what is compared is arithmetic, not speed.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
EXACT = [
    unet.Execution("xla", exact_stats=True),
    unet.Execution("xla"),
    unet.Execution("dshift2d"),
]


def torch_state(path):
    """The weights of a checkpoint, read with the safe loader."""
    torch = pytest.importorskip("torch")
    allowed = [
        (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        type(np.dtype("float32")),
        type(np.dtype("float64")),
    ]
    with torch.serialization.safe_globals(allowed):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in checkpoint["network_weights"].items()}


def channels_last(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


@pytest.mark.golden
@pytest.mark.torch
def test_logits_of_every_golden_network(golden):
    folders = sorted(
        {p.parent.parent for p in golden.glob("weights/*/*/fold_0/checkpoint_final.pth")}
    )
    tested = 0
    for folder in folders:
        plans_json = json.loads((folder / "plans.json").read_text())
        dataset = json.loads((folder / "dataset.json").read_text())
        configuration = folder.name.rsplit("__", 1)[1]
        arch = Plans.from_nnunet(plans_json, dataset, configuration).arch
        io = np.load(folder.parent / "io.npz")
        state = torch_state(folder / "fold_0" / "checkpoint_final.pth")
        params = jax.tree.map(jnp.asarray, canonical_params(state))
        for execution in EXACT:
            net = unet.build(arch, execution)
            outputs = quick_jit(lambda p, x, net=net: unet.apply(net, p, x))(
                params, channels_last(io["input"])
            )
            expected = [io[f"logits_{i}"] for i in range(len(outputs))]
            assert f"logits_{len(outputs)}" not in io
            for output, wanted in zip(outputs, expected, strict=True):
                # 2e-4 absolute: the tolerance of the reference cases at float32.
                np.testing.assert_allclose(output, np.moveaxis(wanted, 1, -1), atol=2e-4, rtol=0)
        tested += 1
    assert tested


@pytest.mark.golden
def test_parameter_tree_of_resenc_l(golden):
    tables = sorted((golden / "weights").glob("*_keys.json"))
    assert tables
    for path in tables:
        table = json.loads(path.read_text())
        arch = ArchSpec.from_nnunet(
            table["architecture"],
            in_channels=table["input_channels"],
            num_outputs=table["num_classes"],
        )
        assert unet.count_params(arch) == table["n_parameters"]
        leaves = list(unet.walk(unet.param_shapes(arch)))
        assert len(leaves) == table["n_parameter_tensors"]
        sizes = sorted(math.prod(leaf.shape) for _, leaf in leaves)
        assert sizes == sorted(
            math.prod(row["shape"]) for row in table["optimizer_parameter_order"]
        )


@pytest.mark.golden
def test_training_steps_follow_the_reference(golden):
    runs = json.loads((golden / "training" / "sgd_trajectory.json").read_text())
    arrays = np.load(golden / "training" / "sgd_trajectory.npz")
    for run in runs:
        prefix = f"r{run['index']}_"
        ndim = run["dim"]
        arch = ArchSpec(
            "ResidualEncoderUNet",
            in_channels=arrays[f"{prefix}inputs"].shape[2],
            num_outputs=run["num_classes"],
            features=tuple(run["features"]),
            kernel_sizes=((run["kernel"],) * ndim,) * run["n_stages"],
            strides=tuple(tuple(s) for s in run["strides"]),
            blocks=tuple(run["n_blocks"]),
            decoder_convs=tuple(run["n_conv_decoder"]),
        )
        labels = Labels((("background", 0), *((f"c{i}", i) for i in range(1, run["num_classes"]))))
        net = unet.build(arch, unet.Execution("xla", exact_stats=True))

        def tree(kind, prefix=prefix):
            start = f"{prefix}{kind}/"
            return canonical_params(
                {k.removeprefix(start): arrays[k] for k in arrays.files if k.startswith(start)}
            )

        loss_fn = losses.deep_supervised(
            losses.make_loss(LossConfig(), labels, batch_dice=run["batch_dice"]),
            losses.deep_supervision_weights(len(run["ds_weights"])),
        )
        settings = OptimConfig(
            lr=run["initial_lr"],
            weight_decay=run["weight_decay"],
            momentum=run["momentum"],
            skip_unused_head=True,
        )
        schedule = optim.make_schedule(settings, run["poly_max_steps"], 1)
        optimizer = optim.make_optimizer(settings, schedule)

        @jax.jit
        def step(params, state, image, label, run=run, net=net, loss_fn=loss_fn, opt=optimizer):
            wanted = targets.deep_supervision_targets(label, net.arch.output_strides)

            def objective(params):
                outputs = unet.apply(net, params, image)
                return loss_fn(outputs, wanted), outputs

            (loss, outputs), grads = jax.value_and_grad(objective, has_aux=True)(params)
            clipped, norm = optim.clip_by_global_norm(grads, run["clip"])
            updates, state = opt.update(clipped, state, params)
            return optax.apply_updates(params, updates), state, (loss, norm, outputs, grads)

        params = jax.tree.map(jnp.asarray, tree("init"))
        state = optimizer.init(params)
        for t in range(run["steps"]):
            image = channels_last(arrays[f"{prefix}inputs"][t])
            label = channels_last(arrays[f"{prefix}targets"][t]).astype(jnp.int32)
            params, state, (loss, norm, outputs, grads) = step(params, state, image, label)
            assert float(loss) == pytest.approx(run["losses"][t], abs=2e-5)
            assert float(norm) == pytest.approx(run["grad_norms"][t], abs=2e-5)
            if t == 0:
                for i, output in enumerate(outputs):
                    wanted = arrays[f"{prefix}logits_step0_out{i}"]
                    np.testing.assert_allclose(output, np.moveaxis(wanted, 1, -1), atol=1e-5)
                unscaled = dict(unet.walk(grads))
                for path, wanted in unet.walk(tree("grad0")):
                    np.testing.assert_allclose(unscaled[path], wanted, atol=1e-5, err_msg=str(path))
        trained = dict(unet.walk(params))
        for path, wanted in unet.walk(tree("final")):
            np.testing.assert_allclose(trained[path], wanted, atol=2e-5, err_msg=str(path))
    assert runs


def residual(features=(4, 6, 8), **kwargs):
    n = len(features)
    settings = {
        "network": "ResidualEncoderUNet",
        "in_channels": 1,
        "num_outputs": 3,
        "features": features,
        "kernel_sizes": ((3, 3, 3),) * n,
        "strides": ((1, 1, 1),) + ((2, 2, 2),) * (n - 1),
        "blocks": (1,) * n,
        "decoder_convs": (1,) * (n - 1),
    }
    return ArchSpec(**{**settings, **kwargs})


@pytest.mark.parametrize(
    "arch",
    [
        residual(bottleneck_channels=(2, 3, 4), kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3))),
        residual(strides=((1, 1, 1), (1, 2, 2), (2, 1, 2)), in_channels=2, stem_channels=5),
        residual(network="PlainConvUNet", nonlin_first=True, decoder_convs=(2, 1)),
        residual(features=(6, 6), kernel_sizes=((3, 3),) * 2, strides=((1, 1), (2, 2))),
    ],
)
def test_formulations_agree_forward_and_backward(arch):
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        unet.init_params(arch, jax.random.key(0)),
    )
    shape = (2, *(8,) * arch.ndim, arch.in_channels)
    x = jax.random.normal(jax.random.key(1), shape)

    def value_and_grad(execution):
        net = unet.build(arch, execution)

        def objective(params):
            outputs = unet.apply(net, params, x)
            return sum(jnp.sum(jnp.square(o)) for o in outputs) / 100, outputs

        return quick_jit(jax.value_and_grad(objective, has_aux=True))(params)

    (_, wanted), wanted_grads = value_and_grad(EXACT[0])
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted_grads))
    assert wanted[0].shape == (2, *(8,) * arch.ndim, arch.num_outputs)
    assert len(wanted) == arch.num_stages - 1
    for execution in EXACT[-1:]:
        (_, outputs), grads = value_and_grad(execution)
        for a, b in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)  # float32 sums in another order
        for path, grad in unet.walk(grads):
            expected = dict(unet.walk(wanted_grads))[path]
            # A pre-activation within rounding of 0 takes the other slope of the leaky ReLU: one
            # voxel of 512 changes a gradient by about 1e-3; a wrong backward pass by order 1.
            np.testing.assert_allclose(grad, expected, atol=3e-3 * largest, err_msg="/".join(path))


def test_initialisation_follows_the_rules():
    arch = residual(features=(16, 24, 32))
    params = dict(unet.walk(unet.init_params(arch, jax.random.key(0))))
    gain = math.sqrt(2 / (1 + 0.01**2))
    for path, leaf in params.items():
        name = "/".join(path)
        if path[-1] == "bias":
            assert not leaf.any(), name
        elif path[-1] == "scale":
            assert (leaf == (0.0 if "/conv2/" in name else 1.0)).all(), name
        else:
            fan_channels = leaf.shape[-1] if "transpconvs" in name else leaf.shape[-2]
            std = gain / math.sqrt(fan_channels * math.prod(leaf.shape[:-2]))
            # The standard deviation of n normal draws has a relative error of 1 / sqrt(2 n).
            assert float(leaf.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * leaf.size)), name
    same = dict(unet.walk(unet.init_params(arch, jax.random.key(0))))
    other = dict(unet.walk(unet.init_params(arch, jax.random.key(1))))
    stem = ("encoder", "stem", "conv", "kernel")
    assert (params[stem] == same[stem]).all() and not (params[stem] == other[stem]).all()


def test_bfloat16_stays_close_and_keeps_float32_logits_and_gradients():
    arch = residual()
    params = unet.init_params(arch, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 8, 1))
    exact = quick_jit(lambda p: unet.apply(unet.build(arch), p, x))(params)
    net = unet.build(arch, unet.Execution("xla", "bfloat16"))

    @jax.jit
    def forward_and_back(params):
        outputs, pullback = jax.vjp(lambda p: unet.apply(net, p, x), params)
        return outputs, pullback(outputs)[0]

    outputs, grads = forward_and_back(params)
    alone = quick_jit(lambda p: unet.apply(net, p, x, full_only=True))(params)
    assert len(alone) == 1
    np.testing.assert_allclose(alone[0], outputs[0], atol=1e-2 * float(jnp.abs(exact[0]).max()))
    assert all(o.dtype == jnp.float32 for o in outputs)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    for a, b in zip(outputs, exact, strict=True):
        # bfloat16 has 8 bits: some 1e-2 relative to the largest logit after a dozen layers.
        np.testing.assert_allclose(a, b, atol=0.05 * float(jnp.abs(b).max()))


def test_wrong_input_is_named():
    arch = residual()
    params = unet.init_params(arch, jax.random.key(0))
    with pytest.raises(PlansError, match="not divisible"):
        unet.apply(unet.build(arch), params, jnp.zeros((1, 8, 8, 6, 1)))
    with pytest.raises(ValueError, match="2 channels, the network takes 1"):
        unet.apply(unet.build(arch), params, jnp.zeros((1, 8, 8, 8, 2)))
    with pytest.raises(PlansError, match="single voxel"):
        arch.check_patch((4, 4, 4))
