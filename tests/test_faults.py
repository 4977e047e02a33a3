"""Nothing that happens to a run loses more than its last interval or leaves an unreadable file."""

import os
import shutil
import signal
import subprocess
import sys
import time

import fault_harness as harness
import numpy as np
import pytest
from fault_harness import Kill, Limits
from tiny import make_raw, write_scan
from weight_files import write_bundle

from panther_jax import bundle, datasets, evaluate, planning, postprocess, predict, preprocess
from panther_jax.weights.bundle import load_bundle
from panther_jax.weights.checkpoint import Checkpoints

MIB = 1 << 20
SECONDS_TO_LIVE = 30.0


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    with harness.compilation_cache(tmp_path_factory.mktemp("xla")):
        yield


def mount(folder, options):
    """A file system of its own, where this process may make one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return not subprocess.run(command, capture_output=True, timeout=20, check=False).returncode
    except OSError:
        return False


@pytest.fixture
def disk(tmp_path):
    """A folder on a small file system if that can be had, and whether it is one."""
    folder = tmp_path / "disk"
    mounted = sys.platform == "linux" and mount(folder, f"size={24 * MIB}")
    folder.mkdir(exist_ok=True)
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return harness.make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A training that nobody disturbed: its folder, and how many changes of files it made."""
    work = tmp_path_factory.mktemp("whole") / "work"
    outcome = harness.run("panther_jax.train", harness.training(work, data[1]), watched=work)
    assert outcome.code == 0, outcome.err
    return work, outcome.events


def one_message(outcome):
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.err.count("error: ") == 1, outcome.err
    return outcome.err[outcome.err.index("error: ") :]


def fill(disk, free_bytes):
    status = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        file.write(b"\0" * (status.f_bavail * status.f_frsize - free_bytes))


# ------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_a_training_survives_all_that_can_happen_and_ends_as_if_nothing_had(whole, data, disk):
    """Killed twice, terminated, disk full, checkpoint damaged, clock jumping: the same bits."""
    folder, on_its_own_disk = disk
    work, latest = folder / "work", folder / "work" / "fold_0" / "checkpoints" / "latest"
    train = "panther_jax.train", harness.training(work, data[1])
    outcomes = []

    def attempt(**options):
        outcomes.append(harness.run(*train, watched=work, **options))
        assert not harness.unreadable(work)
        return outcomes[-1]

    # inside the write of the first checkpoint, and of a later one
    for event in (25, whole[1] // 3):
        assert attempt(kill=Kill(event=event)).code == -signal.SIGKILL

    start = time.monotonic()
    stopped = attempt(stop_after=("epoch ", signal.SIGTERM))
    assert stopped.code == 1 and "stopped by SIGTERM after step" in one_message(stopped)
    assert time.monotonic() - start < SECONDS_TO_LIVE

    if on_its_own_disk:
        fill(folder, MIB // 4)
        full = attempt()
        (folder / "filler").unlink()
        assert "disk is full" in one_message(full) or "No space left" in one_message(full)
    else:
        full = attempt(limits=Limits(file_bytes=20_000))
        one_message(full)
    assert full.code == 1 and "ree some space" in full.err or not on_its_own_disk

    newest = max(Checkpoints(latest.parent).steps("latest"))
    damaged = max((latest / str(newest) / "params").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    before = Checkpoints(latest.parent).steps("latest")
    last = attempt(limits=Limits(clock="jumps"))
    assert last.code == 0, last.err
    assert f"checkpoint {latest} of step {newest} cannot be read" in last.err
    assert "trying the one before" in last.err
    assert f"resuming after step {min(before)} of 8" in last.err

    assert harness.differences(whole[0] / "fold_0", work / "fold_0") == []
    lost = harness.lost_steps(outcomes[:-1])  # the last one was made to lose two
    assert lost and max(lost) <= harness.STEPS_PER_EPOCH


def test_the_harness_sees_a_difference(whole, tmp_path):
    other = tmp_path / "fold_0"
    shutil.copytree(whole[0] / "fold_0", other)
    assert harness.differences(whole[0] / "fold_0", other) == []
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))  # an epoch twice
    state = next((other / "checkpoints" / "final").glob("*"))
    for name in ("params", "crc32.json"):
        source = next((other / "checkpoints" / "best").glob("*")) / name
        target = state / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.copytree(source, target) if source.is_dir() else None
    (other / "validation_final" / "case_9.npz").write_bytes(b"PK")
    assert harness.differences(whole[0] / "fold_0", other) in (
        ["final checkpoint", "metrics.jsonl"],
        ["metrics.jsonl"],  # the best checkpoint was the final one
    )
    assert len(harness.unreadable(other)) == 1


@pytest.mark.slow
def test_threads_a_signal_in_the_validation_and_a_clock_that_stands_change_nothing(
    whole, data, tmp_path
):
    """The same seed, seven threads instead of two."""
    work = tmp_path / "work"
    train = "panther_jax.train", [*harness.training(work, data[1]), "--data.num-threads", 7]
    text = f"epoch {harness.EPOCHS}/{harness.EPOCHS}"
    stopped = harness.run(*train, watched=work, stop_after=(text, signal.SIGTERM))
    assert stopped.code in (0, 1) and "Traceback" not in stopped.err, stopped.err
    done = harness.run(*train, watched=work, limits=Limits(clock="stands"))
    assert done.code == 0, done.err
    assert harness.differences(whole[0] / "fold_0", work / "fold_0") == []


def test_every_changed_bit_of_a_checkpoint_is_noticed(whole, tmp_path, capfd):
    """Orbax itself reads many of them without a word."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole[0] / "fold_0" / "checkpoints" / "latest", folder / "latest")
    checkpoints = Checkpoints(folder)
    older, newer = checkpoints.steps("latest")
    files = [p for p in (folder / "latest" / str(newer)).rglob("*") if p.stat().st_size]
    files = [p for p in files if p.is_file() and p.name != "crc32.json"]
    random = np.random.default_rng(0)
    for path in random.choice(np.array(files, object), 6):
        content = path.read_bytes()
        broken = bytearray(content)
        broken[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        assert checkpoints.read("latest")[2].step == older, path
        path.write_bytes(content[:-1])
        assert checkpoints.read("latest")[2].step == older, path
        path.write_bytes(content)
    assert checkpoints.read("latest")[2].step == newer
    assert "Traceback" not in capfd.readouterr().err


# --------------------------------------------------------------------------------- other commands


def test_preprocessing_killed_anywhere_makes_the_same_store(data, tmp_path):
    raw, _ = data
    argv = ["--raw", raw, "--config", "smoke", "--out"]
    command, whole = "panther_jax.preprocess", tmp_path / "whole"
    undisturbed = harness.run(command, [*argv, whole], watched=whole)
    assert undisturbed.code == 0, undisturbed.err
    killed = tmp_path / "killed"
    kills = [Kill(event=n) for n in (3, 9, 14, 6)]  # of what is left to do, each
    outcomes = harness.survive(command, [*argv, killed], kills, watched=killed)
    assert [o.code for o in outcomes] == [-signal.SIGKILL] * 4 + [0]
    left = [n for n in harness.same_files(whole, killed) if ".tmp" not in n]
    assert left == []

    # a file cut behind its JSON: only that case is done again
    cut = killed / "case_3.image.npy"
    times = {p.name: p.stat().st_mtime_ns for p in killed.glob("case_*.json")}
    cut.write_bytes(cut.read_bytes()[:-8])
    assert preprocess.main([str(a) for a in [*argv, killed]]) == 0
    again = {p.name: p.stat().st_mtime_ns for p in killed.glob("case_*.json")}
    assert [n for n in times if times[n] != again[n]] == ["case_3.json"]
    assert [n for n in harness.same_files(whole, killed) if ".tmp" not in n] == []


def test_a_full_disk_stops_preprocessing_with_one_message(data, disk):
    folder, mounted = disk
    out = folder / "store"
    argv = ["--raw", data[0], "--config", "smoke", "--out", out]
    if mounted:
        fill(folder, 100_000)
        limits = None
    else:
        limits = Limits(file_bytes=20_000)
    full = harness.run("panther_jax.preprocess", argv, watched=out, limits=limits)
    assert full.code == 1 and str(out) in one_message(full), full.err
    assert "run the same command again" in full.err
    assert not list(folder.rglob("*.tmp")) and not harness.unreadable(folder)
    (folder / "filler").unlink(missing_ok=True)
    done = harness.run("panther_jax.preprocess", argv, watched=out)
    assert done.code == 0, done.err
    assert harness.same_files(out, data[1]) == ["dataset.json", "plans.json"] or not [
        n for n in harness.same_files(out, data[1]) if n.startswith("case_")
    ]


@pytest.mark.slow
def test_exports_are_whole_or_not_there(whole, tmp_path):
    out = tmp_path / "out"
    commands = {
        "panther_jax.bundle": ["--run", whole[0], "--out", out, "--overwrite"],
        "weight_conversion.export_nnunet": ["--model", whole[0], "--out", out, "--overwrite"],
    }
    for command, argv in commands.items():
        if command.startswith("weight"):
            pytest.importorskip("torch")
        for event in (2, 5):
            killed = harness.run(command, argv, watched=tmp_path, kill=Kill(event=event))
            assert killed.code == -signal.SIGKILL, killed.err
            assert not out.exists()  # it was killed before the end
        done = harness.run(command, argv, watched=tmp_path)
        assert done.code == 0, done.err
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        if command == "panther_jax.bundle":
            load_bundle(out)
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_killed_prediction_goes_on(tmp_path):
    model = write_bundle(tmp_path / "bundle", folds=("0",))
    for seed in range(3):
        write_scan(tmp_path / "in" / f"case_{seed}_0000.nii.gz", shape=(16, 16, 16), seed=seed)
    folders = [tmp_path / "whole", tmp_path / "killed"]
    argv = ["--model", model, "--input", tmp_path / "in", "--output"]
    done = harness.run("panther_jax.predict", [*argv, folders[0]], watched=folders[0])
    assert done.code == 0, done.err
    kills = [Kill(event=done.events - 3)]
    outcomes = harness.survive(
        "panther_jax.predict", [*argv, folders[1]], kills, watched=folders[1]
    )
    assert outcomes[0].code == -signal.SIGKILL and "are there already" in outcomes[1].err
    assert [n for n in harness.same_files(*folders) if n.endswith(".nii.gz") and n[0] != "."] == []


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nothing can be written, by root neither."""
    folder = tmp_path / "locked"
    if sys.platform == "linux" and mount(folder, "ro"):
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)
        return
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere, and may not mount")
    yield folder
    folder.chmod(0o755)


def test_folders_that_cannot_be_written_are_named(read_only, whole, data, tmp_path, capsys):
    raw, store = data
    make_raw(tmp_path / "small", num_cases=2)
    model = write_bundle(tmp_path / "bundle", folds=("0",))
    scan = write_scan(tmp_path / "in" / "case_0_0000.nii.gz")
    out, labels = read_only / "out", raw / "labelsTr"
    commands = (
        (datasets.main, "phantom", "--out", out, "--cases", 1),
        (datasets.main, "check", raw, "--output", f"{out}.json"),
        (datasets.main, "merge", "--inputs", tmp_path / "small", "--out", out),
        (planning.main, "--raw", raw, "--out", out),
        (preprocess.main, "--raw", raw, "--config", "smoke", "--out", out),
        (predict.main, "--model", model, "--input", scan, "--output", out),
        (evaluate.main, "--predictions", labels, "--references", labels, "--output", f"{out}.json"),
        (bundle.main, "--run", whole[0], "--out", out),
        (
            postprocess.main,
            *("determine", "--predictions", labels, "--references", labels, "--output", out),
        ),
    )
    for main, *argv in commands:
        assert main([str(a) for a in argv]) == 1, argv
        err = capsys.readouterr().err
        assert err.count("error: ") == 1 and "Traceback" not in err, err
        message = err[err.index("error: ") :]
        assert str(read_only) in message and "ead-only" in message or "denied" in message, message
    assert list(read_only.iterdir()) == []


def test_a_read_only_work_directory(read_only, data):
    work = read_only / "work"
    outcome = harness.run("panther_jax.train", harness.training(work, data[1]), watched=work)
    assert outcome.code == 1 and str(read_only) in one_message(outcome)


def test_lost_steps_are_counted():
    told = [
        "epoch 1/4: training loss 1\nepoch 2/4: training loss 1\n",
        "resuming after step 2 of 8\nepoch 2/4: training loss 1\n",
        "resuming after step 4 of 8\n",
    ]
    outcomes = [harness.Outcome(0, "", err, 0) for err in told]
    assert harness.lost_steps(outcomes) == [2, 0]
