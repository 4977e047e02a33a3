"""The day with a GPU, in one command: ``python -m benchmarks.gpu``.

First whether the numbers are right: single convolutions at the sizes of ResEnc-L and the gradient
of a small network, in float32 at the highest precision against the CPU, and in bfloat16 against
float32. Then the suites in their GPU setting; one whose peer is not installed is left out, with the
reason. Needs JAX, Flax, Optax and NumPy, for the peer PyTorch (nnU-Net or not); nothing else.
``--setting toy`` goes through the same on a CPU.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, networks
from panther_jax.base import command

LOGGER = logging.getLogger("panther_jax")
SUITES = ("train_step", "compile", "augment", "epoch", "predict", "export")
NUMERICS = networks.Size("8-32", (8, 16, 32), (1, 2, 2), (32, 32, 32), 2)
LAYERS: Mapping[str, tuple[tuple[int, int, int, int], ...]] = {
    "gpu": ((32, 32, 192, 1), (64, 32, 192, 1), (1, 32, 192, 1), (32, 64, 192, 2),
            (64, 64, 96, 1), (128, 128, 48, 1), (256, 256, 24, 1), (320, 320, 12, 1)),
    "toy": ((8, 8, 12, 1), (1, 8, 12, 1), (8, 16, 12, 2)),
}  # fmt: skip
"""Channels in and out, edge, stride."""
TOLERANCES = {
    # relative L2 errors; float32 sums in another order, bfloat16 has 8 bits
    "convolution, float32": 1e-5,
    "convolution, bfloat16": 1e-2,
    "network, float32": 1e-4,
    "network, bfloat16": 5e-2,
    "gradient, float32": 1e-3,
    "gradient, bfloat16": 0.25,
}


def relative_error(found: Any, wanted: Any) -> float:
    """L2 norm of the difference over that of what is wanted; infinite if not all is finite."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in _pairs(found, wanted)
    ]
    if not all(np.isfinite(a).all() for a, _ in pairs):
        return float("inf")
    difference = sum(float(np.square(a - b).sum()) for a, b in pairs)
    return float(np.sqrt(difference / max(sum(float(np.square(b).sum()) for _, b in pairs), 1e-30)))


def _pairs(found: Any, wanted: Any) -> Any:
    import jax

    return zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)


# ------------------------------------------------------------------------------------ numerics


def serve_checks(setting: str) -> Callable[..., Any]:
    """Answer ``(name, ...)``: a layer's or the network's errors; run in a process of its own."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")

    def handle(what: str, *arguments: Any) -> Any:
        if what == "device":
            device = jax.devices()[0]
            return {"platform": device.platform, "kind": device.device_kind, "jax": jax.__version__}
        if what == "layer":
            return layer_errors(tuple(arguments))
        return network_errors(NUMERICS if setting == "gpu" else networks.TINY)

    return handle


def layer_errors(layer: tuple[int, ...]) -> dict[str, float]:
    """Errors of a convolution and its two gradients, bfloat16 against float32 on the device.

    Where the peer of a layer is small, float32 is compared with the CPU too.
    """
    import jax
    import jax.numpy as jnp

    from panther_jax.network.convolution import convolve

    cin, cout, edge, stride = layer
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, edge, edge, edge, cin), np.float32)
    kernel = rng.standard_normal((3, 3, 3, cin, cout), np.float32) / np.float32((27 * cin) ** 0.5)

    def all_three(x: Any, kernel: Any) -> Any:
        def run(x: Any, kernel: Any) -> Any:
            return convolve(x, kernel, (stride,) * 3, "xla")

        result, pull = jax.vjp(run, x, kernel)
        return result, *pull(jnp.sign(result).astype(result.dtype))

    # The sign of the result is the gradient that comes back; both precisions get the same one.
    def given(x: Any, kernel: Any, back: Any) -> Any:
        result, pull = jax.vjp(lambda x, k: convolve(x, k, (stride,) * 3, "xla"), x, kernel)
        return result, *pull(back.astype(result.dtype))

    wide = jax.jit(all_three)(x, kernel)
    back = jnp.sign(wide[0])
    narrow = jax.jit(given)(jnp.asarray(x, jnp.bfloat16), kernel, back)
    errors = {"bfloat16": max(relative_error(a, b) for a, b in zip(narrow, wide, strict=True))}
    if edge <= 48:
        with jax.default_device(jax.devices("cpu")[0]):
            slow = jax.jit(given)(*map(np.asarray, (x, kernel, back)))
        errors["float32"] = max(relative_error(a, b) for a, b in zip(wide, slow, strict=True))
    return errors


def network_errors(size: networks.Size) -> dict[str, float]:
    """Errors of logits and gradients of a small network: float32 against the CPU, bfloat16."""
    import jax
    import jax.numpy as jnp

    from benchmarks import ours
    from panther_jax.network import unet

    image, label = networks.make_batch(size)
    wanted = networks.make_targets(size, label)
    rng = np.random.default_rng(1)
    params = jax.tree.map(  # the scales that start at zero would hide half of the network
        lambda a: np.asarray(a) + rng.normal(0, 0.1, a.shape).astype(np.float32),
        unet.init_params(size.arch, jax.random.key(0)),
    )

    def run(dtype: str, device: Any) -> Any:
        task = ours.make_task(size, dtype)
        net = unet.build(size.arch, unet.Execution("xla", dtype))  # type: ignore[arg-type]

        def objective(params: Any) -> Any:
            outputs = unet.apply(net, params, jnp.asarray(image))
            return task.loss_fn(outputs, tuple(jnp.asarray(t) for t in wanted)), outputs

        with jax.default_device(device):
            function = jax.jit(jax.value_and_grad(objective, has_aux=True))
            (_, outputs), gradient = function(params)
            return outputs, gradient

    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    reference, wide, narrow = run("float32", cpu), run("float32", here), run("bfloat16", here)
    return {
        f"{part}, {name}": relative_error(found[index], reference[index])
        for name, found in (("float32", wide), ("bfloat16", narrow))
        for index, part in enumerate(("network", "gradient"))
    }


def _answers(setting: str, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a process of checks answers; after one that fails, its message, a new one goes on."""
    found: list[Any] = []
    while len(found) < len(requests):
        try:
            target = "benchmarks.gpu:serve_checks"
            with harness.serving(target, setting, timeout_seconds=240) as ask:
                while len(found) < len(requests):
                    found.append(ask(*requests[len(found)]))
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
    return found


def check(output: Path, setting: str) -> tuple[str, bool]:
    """Check the numbers, write ``numerics.json``; what to print, and whether all is well."""
    rows: list[dict[str, Any]] = []
    lines: list[str] = []

    def note(what: str, error: float | str, tolerance: float) -> None:
        good = not isinstance(error, str) and error <= tolerance
        value = error if isinstance(error, float) else None
        rows.append(
            {"what": f"{what}: relative error", "ours": value, "peer": None, "ratio": None,
             "goal": f"< {tolerance:g}", "met": good}
        )  # fmt: skip
        shown = error if isinstance(error, str) else f"{error:.2e}"
        lines.append(f"  {'ok  ' if good else 'FAIL'} {what}: {shown} (allowed {tolerance:g})")

    requests: list[tuple[Any, ...]] = [("layer", *layer) for layer in LAYERS[setting]]
    device, *answers = _answers(setting, [("device",), *requests, ("network",)])
    if isinstance(device, str):
        raise RuntimeError(f"no device to check: {device}")
    for request, found in zip([*requests, ("network",)], answers, strict=True):
        cin, cout, edge, stride = request[1:] or (0, 0, 0, 0)
        name = f"{cin} to {cout} at {edge}^3 stride {stride}" if cin else ""
        if isinstance(found, str):
            note(name or "network", found, 0.0)
            continue
        for key, error in found.items():
            kind = f"convolution, {key}" if name else key
            note(f"{kind} {name}".strip(), error, TOLERANCES[kind])
    good = all(row["met"] for row in rows)
    facts = {"setting": f"{setting}: {device['kind']}, jax {device['jax']}", "rows": rows}
    path = harness.write_result(output, "numerics", [], facts)
    title = f"numerics on {device['platform']}, {device['kind']}: {'all good' if good else 'WRONG'}"
    return "\n".join([title, *lines, f"  {path}"]), good


def report(suites: Sequence[str], output: Path, setting: harness.Setting = "gpu") -> str:
    """Check the numbers, then run the suites that this setting has; everything to print.

    Raises:
        run.SuiteError: with the same text, if a number is wrong or a suite failed.
    """
    from benchmarks import run

    chosen = [name for name in SUITES if name in suites]
    text, good = check(output, setting)
    LOGGER.info("%s", text)
    found = run.report(chosen, output, setting, [text])
    if not good:
        raise run.SuiteError(f"{found}\n\nNUMBERS ARE WRONG: see numerics above")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = command.parser(
        "benchmarks.gpu",
        f"Check numbers, then benchmark on a GPU: {', '.join(SUITES)}.",
        "python -m benchmarks.gpu --output benchmarks/results/gpu",
    )
    parser.add_argument("--suite", nargs="*", metavar="NAME", default=SUITES, choices=SUITES)
    parser.add_argument("--output", type=Path, help="where JSON goes (default: results/gpu)")
    parser.add_argument("--setting", choices=("gpu", "toy"), default="gpu")
    arguments = parser.parse_args(command.normalized(sys.argv[1:] if argv is None else argv))

    def body() -> str:
        if arguments.setting == "toy" and arguments.output is None:
            with tempfile.TemporaryDirectory() as folder:
                return report(arguments.suite, Path(folder), "toy")
        output = arguments.output or Path(__file__).resolve().parent / "results" / "gpu"
        return report(arguments.suite, output, arguments.setting)

    return command.run(body, quiet=arguments.quiet, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
