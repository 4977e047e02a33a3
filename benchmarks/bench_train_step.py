"""Forward pass, gradient and training step beside nnU-Net's network, loss and optimiser in PyTorch.

The same random weights and the same batch on both sides; their first losses are compared. Each side
has a process of its own on the same device; they take turns. On a CPU the peer runs in both memory
formats: contiguous, as nnU-Net does it, and channels-last, which nnU-Net does not use but PyTorch
is mostly faster with. On a GPU it tries precisions, formats, eager and compiled, and goes on with
the one that is fastest at each work. Our step makes the targets too; neither side augments.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness, networks

WORKS = ("forward", "gradient", "step")
NAMES = {"forward": "forward", "gradient": "forward + backward", "step": "train step"}
CPU_GOALS = {"forward": 0.8, "gradient": None, "step": 0.6}
GPU_GOALS = {"forward": None, "gradient": None, "step": 1.3}
BF16_PEAK = {"H200": 790e12, "H100": 790e12, "A100": 250e12}
"""Dense bfloat16 FLOP/s that matrix products reach (spec 08 §8.3.1)."""
ROOFLINE_GOAL = 0.45
MEMORY_FACTOR = 2.5
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}

Ask = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A size, which of its works are measured, and for how long."""

    size: networks.Size
    works: tuple[str, ...]
    rounds: int
    block_seconds: float = 1.0


CASES: Mapping[str, tuple[Case, ...]] = {
    "cpu": (
        Case(networks.DEMO, WORKS, 7, 0.4),
        Case(networks.MIDDLE, WORKS, 3, 0.8),
        Case(networks.LARGE, ("forward", "gradient"), 2),
    ),
    "gpu": (Case(networks.FULL, WORKS, 7, 2.0),),
    "toy": (Case(networks.TINY, WORKS, 2, 0.05),),
}
GPU_SIZES = (
    networks.FULL,
    dataclasses.replace(networks.FULL, patch=(128, 128, 128)),
    dataclasses.replace(networks.FULL, patch=(96, 96, 96)),
)
BYTES_A_VOXEL = 1800  # of a ResEnc-L step in half precision, about what nnU-Net reports at 192^3


def largest_that_fits(free_bytes: int, sizes: Sequence[networks.Size]) -> networks.Size:
    """The first size of which both sides' steps fit beside each other; the last if none does."""
    for size in sizes:
        voxels = size.batch * size.patch[0] * size.patch[1] * size.patch[2]
        if MEMORY_FACTOR * voxels * BYTES_A_VOXEL <= free_bytes:
            return size
    return sizes[-1]


def peak_flops(device: str, setting: str) -> float | None:
    """bfloat16 FLOP/s that are possible; None if not known, or on a CPU."""
    if setting != "gpu":
        return None
    return next((peak for name, peak in BF16_PEAK.items() if name in device), None)


def fastest(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """For each work the variant with the fewest seconds; ``seconds`` is by variant, then work."""
    works = next(iter(seconds.values()))
    return {work: min(seconds, key=lambda name: seconds[name][work]) for work in works}


def measure(case: Case, setting: str) -> dict[str, Any]:
    """One size: all its works, ours and the peer's best."""
    dtype = "float32" if setting != "gpu" else "bfloat16"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ours_open, ExitStack() as open_:
        weights = str(Path(folder) / "weights.npz")
        ours = ours_open.enter_context(
            harness.serving("benchmarks.ours:serve_works", case.size.to_json(), dtype)
        )
        ours("save", weights)
        peers, tried, first, failed = _open_peers(open_, case, setting, weights)
        single = {work: _warm(ours, work) for work in case.works}
        best = fastest(tried)
        comparisons = []
        for work in case.works:
            names = [best[work]] if setting == "gpu" else list(peers)
            asks = {"ours": (ours, single[work])}
            asks |= {name: (peers[name], tried[name][work]) for name in names}
            comparisons += _compare(case, work, asks)
        losses = {"ours": ours("loss"), "peer": first[best["gradient"]]}
        facts, peer_facts = ours("facts"), {n: ask("facts") for n, ask in peers.items()}
    flops = networks.forward_flops(case.size)
    peak = peak_flops(facts["device"], setting)
    for found in comparisons:
        work = found["work"]
        total = flops * (1 if work == "forward" else 3)
        found |= {
            "peer_is_its_best": found["peer_variant"] == best[work],
            "goal": (GPU_GOALS if setting == "gpu" else CPU_GOALS)[work],
            "gflop": total / 1e9,
            "gflop_per_second": total / 1e9 / found["ours_seconds"],
            "peer_gflop_per_second": total / 1e9 / found["peer_seconds"],
            "share_of_roofline": total / found["ours_seconds"] / peak if peak else None,
        }
    return {
        "size": case.size.label,
        "comparisons": comparisons,
        "losses": losses,
        "losses_agree": abs(losses["ours"] - losses["peer"]) <= LOSS_TOLERANCE[facts["dtype"]],
        "device": facts["device"],
        "dtype": facts["dtype"],
        "compile_seconds": facts["compile_seconds"],
        "peak_bytes": facts["peak_bytes"],
        "peer_peak_bytes": {n: f["peak_bytes"] for n, f in peer_facts.items()},
        "peer_tried_seconds": tried,
        "peer_failed": failed,
        "peer_is_nnunet": all(f["from_nnunet"] for f in peer_facts.values()),
    }


def _open_peers(
    stack: ExitStack, case: Case, setting: str, weights: str
) -> tuple[dict[str, Ask], dict[str, dict[str, float]], dict[str, float], dict[str, str]]:
    """Start the variants; keep open those that are fastest at something."""
    from benchmarks import peer

    asks: dict[str, Ask] = {}
    stacks: dict[str, ExitStack] = {}
    tried: dict[str, dict[str, float]] = {}
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    for variant in peer.gpu_variants() if setting == "gpu" else peer.cpu_variants():
        own = stack.enter_context(ExitStack())
        try:
            ask = own.enter_context(
                harness.serving(
                    "benchmarks.peer:serve_works",
                    case.size.to_json(),
                    dataclasses.asdict(variant),
                    weights,
                )
            )
            losses[variant.name] = ask("loss")
            tried[variant.name] = {work: _warm(ask, work) for work in case.works}
        except RuntimeError as error:
            own.close()
            failed[variant.name] = str(error).splitlines()[0]
            continue
        asks[variant.name], stacks[variant.name] = ask, own
        if setting != "gpu":
            continue
        for name in set(stacks) - set(fastest(tried).values()):
            stacks.pop(name).close()
            del asks[name]
    if not asks:
        raise RuntimeError(f"the peer failed in every variant: {failed}")
    return asks, tried, losses, failed


def _warm(ask: Ask, work: str) -> float:
    """Compile and warm up; seconds of a call."""
    ask("time", work, 1)
    seconds = ask("time", work, 1)
    if seconds < 0.5:
        seconds = ask("time", work, harness.calls_for(seconds, block_seconds=0.5, most=10))
    return seconds


def _compare(case: Case, work: str, asks: Mapping[str, tuple[Ask, float]]) -> list[dict[str, Any]]:
    """Ours beside each of the peer's variants; ``asks`` come with the seconds of a call."""

    def block(ask: Ask, calls: int) -> harness.Measurement:
        return harness.Measurement(ask("time", work, calls))

    candidates = {
        name: partial(block, ask, harness.calls_for(single, block_seconds=case.block_seconds))
        for name, (ask, single) in asks.items()
    }
    found = harness.interleaved(candidates, case.rounds, warm_up=False)
    ours = found.pop("ours")
    return [
        {
            "work": work,
            "peer_variant": name,
            "ours_seconds": statistics.median(m.seconds for m in ours),
            "peer_seconds": statistics.median(m.seconds for m in runs),
            "faster": harness.spread(harness.ratio(ours, runs)),
            "seconds": {"ours": [m.seconds for m in ours], "peer": [m.seconds for m in runs]},
        }
        for name, runs in found.items()
    ]


def _summaries(measured: dict[str, Any]) -> list[harness.Summary]:
    found = []
    for comparison in measured["comparisons"]:
        name = f"{measured['size']}: {NAMES[comparison['work']]}"
        for side, more in (("ours", ""), ("peer", f", PyTorch {comparison['peer_variant']}")):
            runs = [harness.Measurement(s) for s in comparison["seconds"][side]]
            found.append(harness.summarize(f"{name}{more}", runs))
    return list({summary.name: summary for summary in found}.values())


def run(output: Path, setting: harness.Setting = "cpu") -> str:
    """Measure, write ``train_step.json``, return the lines to print."""
    harness.require("torch", "flax", "optax")
    cases = CASES[setting]
    if setting == "gpu":
        size = largest_that_fits(_free_gpu_bytes(), GPU_SIZES)
        cases = tuple(dataclasses.replace(case, size=size) for case in cases)
    measured = [measure(case, setting) for case in cases]
    text = f"{setting}: the same weights and batch on both sides"
    rows = [_row(m, c) for m in measured for c in m["comparisons"]]
    facts = {"setting": text, "sizes": measured, "rows": rows}
    path = harness.write_result(
        output, "train_step", [s for m in measured for s in _summaries(m)], facts
    )
    lines = [f"  {text}; {harness.cores()} cores of {harness.machine()['cpu']}"]
    for found in measured:
        lines += _lines(found)
    return "\n".join([*lines, f"  {path}"])


def _row(measured: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    goal = comparison["goal"]
    return {
        "what": f"{NAMES[comparison['work']]}, {measured['size']}, {measured['dtype']}; peer "
        f"{comparison['peer_variant']}",
        "ours": comparison["ours_seconds"],
        "peer": comparison["peer_seconds"],
        "ratio": comparison["faster"],
        "goal": goal,
        "met": None if goal is None else comparison["faster"]["median"] >= goal,
    }


def _lines(measured: dict[str, Any]) -> list[str]:
    losses = measured["losses"]
    peer = "nnU-Net" if measured["peer_is_nnunet"] else "the same network in plain PyTorch"
    lines = [
        f"  {measured['size']}, {measured['dtype']} on {measured['device']}, peer {peer}; first "
        f"loss {losses['ours']:.5f}, peer {losses['peer']:.5f}"
        f"{'' if measured['losses_agree'] else ' (THEY DISAGREE)'}; peak memory "
        f"{measured['peak_bytes'] / 2**20:.0f} MiB, peer "
        f"{', '.join(f'{b / 2**20:.0f}' for b in measured['peer_peak_bytes'].values())} MiB"
    ]
    for found in measured["comparisons"]:
        ratio, share = found["faster"], found["share_of_roofline"]
        lines.append(
            f"    {NAMES[found['work']]}: {1e3 * found['ours_seconds']:.1f} ms, peer "
            f"{1e3 * found['peer_seconds']:.1f} ms ({found['peer_variant']}): "
            f"{ratio['median']:.2f} times ({ratio['min']:.2f} to {ratio['max']:.2f})"
            + (f", goal {found['goal']:g}" if found["goal"] else "")
            + f"; {found['gflop_per_second']:.0f} GFLOP/s, peer "
            f"{found['peer_gflop_per_second']:.0f}"
            + (f"; {100 * share:.0f} % of the bf16 roofline" if share else "")
        )
    lines += [f"    {name} failed: {why}" for name, why in measured["peer_failed"].items()]
    return lines


def _free_gpu_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]
