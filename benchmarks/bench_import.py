"""Import of a full ResEnc-L checkpoint: time and peak memory, beside nnU-Net's own loading of it.

Ours reads, checks and writes a bundle; the peer builds nnU-Net's network and loads the
file into it. Both are whole processes but for the interpreter's start. The values are random.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness

ROUNDS = 3
MAX_SECONDS, MAX_MEMORY_RATIO = 20.0, 2.5
MAKE = """
import sys, json
sys.path.insert(0, "tests")
from pathlib import Path
import torch, weight_files as made
from weight_conversion import torch_files
folder = Path(sys.argv[1])
(folder / "fold_0").mkdir(parents=True)
torch_files.write_torch(folder / "fold_0" / "checkpoint_final.pth", made.checkpoint(made.RESENC_L))
(folder / "plans.json").write_text(json.dumps(made.make_plans(made.RESENC_L).to_nnunet()))
labels = {"labels": {"background": 0, "tumor": 1}}
(folder / "dataset.json").write_text(json.dumps({**made.DATASET, **labels}))
"""
OURS = """
from weight_conversion import import_nnunet
code = import_nnunet.main(["--model-folder", sys.argv[1], "--out", sys.argv[2], "--overwrite"])
assert code == 0
"""
PEER = """
from pathlib import Path
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
folder = Path(sys.argv[1])
file = folder / "fold_0" / "checkpoint_final.pth"
checkpoint = torch.load(file, map_location="cpu", weights_only=False)
plans = json.loads((folder / "plans.json").read_text())
block = next(iter(plans["configurations"].values()))["architecture"]
network = get_network_from_plans(
    block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"], 1, 2
)
network.load_state_dict(checkpoint["network_weights"])
"""


def run(output: Path) -> str:
    """Measure, write ``import.json``, return the lines to print."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, bundle = Path(temporary) / "model", Path(temporary) / "bundle"
        make = [sys.executable, "-c", MAKE, str(folder)]
        subprocess.run(make, cwd=harness.ROOT, check=True)
        size = (folder / "fold_0" / "checkpoint_final.pth").stat().st_size
        found = harness.interleaved(
            {
                "import to a bundle": lambda: harness.measure(OURS, str(folder), str(bundle)),
                "torch.load into nnU-Net": lambda: harness.measure(PEER, str(folder)),
            },
            ROUNDS,
            warm_up=False,  # the file was written just now
        )
    ours, peer = found.values()
    summaries = [harness.summarize(name, values) for name, values in found.items()]
    faster = harness.ratio(ours, peer)
    memory = summaries[0].peak_bytes / size
    facts = {
        "setting": "ResEnc-L, 1 channel, 2 classes, float32, one fold, no optimiser state",
        "file_bytes": size,
        "peak_memory_over_file_size": memory,
        "peer_peak_memory_over_file_size": summaries[1].peak_bytes / size,
        "peer_seconds_over_ours": dict(zip(("median", "min", "max"), faster, strict=True)),
        "bars": {"seconds": MAX_SECONDS, "peak_memory_over_file_size": MAX_MEMORY_RATIO},
        "met": summaries[0].max_seconds < MAX_SECONDS and memory < MAX_MEMORY_RATIO,
    }
    path = harness.write_result(output, "import", summaries, facts)
    machine = harness.machine()
    return "\n".join(
        [
            f"  {facts['setting']}; file {size / 2**20:.0f} MiB; {machine['cores']} cores of "
            f"{machine['cpu']}",
            *(f"  {summary.line()}" for summary in summaries),
            f"  peak memory over file size: {memory:.2f} (bar {MAX_MEMORY_RATIO}), peer "
            f"{facts['peer_peak_memory_over_file_size']:.2f}",
            f"  peer seconds over ours: {faster[0]:.2f} ({faster[1]:.2f} to {faster[2]:.2f})",
            f"  {path}",
        ]
    )
