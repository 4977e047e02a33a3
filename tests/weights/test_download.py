"""Getting weights from a server that answers like Zenodo, also when it does not."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import threading
import time
import zipfile

import numpy as np
import published_layout as layout
import pytest
from record_server import Zenodo, serve

from panther_jax.weights import __main__ as command
from panther_jax.weights import download, record, unpack
from panther_jax.weights.download import RefusedWeights, get
from panther_jax.weights.names import resolve_model
from panther_jax.weights.record import DownloadError, Service
from panther_jax.weights.unpack import ArchiveError

NOISE = np.random.default_rng(0).bytes(1_000_000)
PLAIN = {"notes.txt": NOISE}


@pytest.fixture(autouse=True)
def _straight(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def zenodo():
    with serve(Zenodo(dict(PLAIN))) as server:
        yield server


def service(server, tries=3):
    return Service(server.address, tries=tries, pause_seconds=0.01, timeout_seconds=10)


def take(server, folder, what="17212158", **options):
    return get(what, out=folder, service=service(server, **options))


def leftovers(folder):
    """What lies in a folder, hidden or not."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def archive(*members, compression=zipfile.ZIP_STORED):
    """A zip of (name or ZipInfo, content)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return buffer.getvalue()


# ------------------------------------------------------------------------------- what goes well


def test_a_file_is_there_as_a_whole_with_a_note(zenodo, tmp_path):
    got = take(zenodo, tmp_path / "out")
    assert got.fresh and (tmp_path / "out" / "notes.txt").read_bytes() == NOISE
    assert leftovers(tmp_path) == ["out/download.json", "out/notes.txt"]
    note = json.loads((tmp_path / "out" / "download.json").read_text())
    assert note["doi"] == "10.5281/zenodo.17212158" and note["license"] == "cc-by-4.0"
    assert note["files"]["notes.txt"]["md5"] == hashlib.md5(NOISE).hexdigest()
    assert note["content"]["notes.txt"] == [len(NOISE), hashlib.sha256(NOISE).hexdigest()]


def test_a_second_get_asks_nothing_and_verifies(zenodo, tmp_path):
    take(zenodo, tmp_path / "out")
    asked = list(zenodo.log)
    assert not take(zenodo, tmp_path / "out").fresh
    assert zenodo.log == asked and leftovers(tmp_path) == ["out/download.json", "out/notes.txt"]
    with (tmp_path / "out" / "notes.txt").open("r+b") as file:
        file.write(b"x" if NOISE[:1] != b"x" else b"y")
    with pytest.raises(DownloadError, match="(?s)not what was downloaded.*notes.txt is changed"):
        take(zenodo, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").unlink()
    with pytest.raises(DownloadError, match="(?s)notes.txt is missing.*Remove the folder"):
        take(zenodo, tmp_path / "out")


def test_files_of_other_models_are_left_out_by_name(zenodo, tmp_path):
    zenodo.files = {"Dataset901.txt": b"a", "Dataset902_PANTHER_HR.txt": b"b", "readme": b"c"}
    take(zenodo, tmp_path / "t2", what="winner-t2")
    assert leftovers(tmp_path / "t2") == ["Dataset902_PANTHER_HR.txt", "download.json", "readme"]
    take(zenodo, tmp_path / "all")
    assert len(leftovers(tmp_path / "all")) == 4


def test_progress_is_told(zenodo, tmp_path, capfd):
    assert command.main(["get", "nothing"]) == 1
    shared = ["--out", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PANTHER_JAX_ZENODO_API", zenodo.address + "/")
        assert command.main(["get", "17212158", *shared]) == 0
        told = capfd.readouterr()
        assert command.main(["get", "17212158", *shared, "--quiet"]) == 0
    assert "notes.txt: MB 1/1 (100 %)" in told.err and "left 0:00" in told.err
    assert "licence: cc-by-4.0" in told.err and "downloaded" in told.out
    assert "was there, and is unchanged" in capfd.readouterr().out


# --------------------------------------------------------------------------------- the network


def test_a_cut_connection_goes_on_with_the_rest(zenodo, tmp_path):
    zenodo.cuts = [300_000, 300_000]
    take(zenodo, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_bytes() == NOISE
    (_, first, _), (_, second, _), (_, third, sent) = zenodo.asked
    starts = [0 if r is None else int(r[len("bytes=") : -1]) for r in (first, second, third)]
    assert first is None and 0 < starts[1] <= 300_000 < starts[2] <= 600_000
    assert starts[1] >= 300_000 - record.CHUNK_BYTES and sent == len(NOISE) - starts[2]


def test_what_was_cut_is_kept_for_the_next_command(zenodo, tmp_path):
    zenodo.cuts = [400_000]
    with pytest.raises(DownloadError, match=r"(?s)\d+ bytes are kept.*run the same command again"):
        take(zenodo, tmp_path / "out", tries=1)
    kept = tmp_path / ".out.part" / (hashlib.md5(NOISE).hexdigest() + ".part")
    size = kept.stat().st_size
    assert not (tmp_path / "out").exists() and 400_000 - record.CHUNK_BYTES <= size <= 400_000
    take(zenodo, tmp_path / "out")
    assert zenodo.asked[1] == ("notes.txt", f"bytes={size}-", len(NOISE) - size)
    assert leftovers(tmp_path) == ["out/download.json", "out/notes.txt"]


def test_files_that_lie_elsewhere_are_followed_there(zenodo, tmp_path):
    zenodo.redirects, zenodo.cuts = True, [300_000]
    take(zenodo, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_bytes() == NOISE
    assert zenodo.asked[1][1] is not None and zenodo.asked[1][2] < len(NOISE)


def test_a_server_without_ranges_starts_again(zenodo, tmp_path):
    zenodo.ranges, zenodo.cuts = False, [500_000]
    take(zenodo, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_bytes() == NOISE
    assert [sent for _, _, sent in zenodo.asked] == [500_000, len(NOISE)]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_failures_are_tried_again(zenodo, tmp_path, status):
    zenodo.statuses = [status, 200, status, status]
    take(zenodo, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_bytes() == NOISE


def test_a_server_that_stays_broken(zenodo, tmp_path):
    zenodo.statuses = [500] * 3
    with pytest.raises(DownloadError, match="(?s)could not be downloaded.*: 500.*Check the conn"):
        take(zenodo, tmp_path / "out")
    assert len(zenodo.log) == 3 and not (tmp_path / "out").exists()


def test_no_server_at_all(zenodo, tmp_path):
    with pytest.raises(DownloadError, match="(?s)record 17212158 could not be downloaded"):
        get("17212158", out=tmp_path / "out", service=Service("http://127.0.0.1:9", 2, 0.01))


@pytest.mark.parametrize("what", ["record", "file"])
def test_not_there(zenodo, tmp_path, what):
    if what == "record":
        zenodo.record = "1"
    else:
        zenodo.statuses = [200, 404]
    with pytest.raises(DownloadError, match="(?s)is not there.* 404.*Check the number"):
        take(zenodo, tmp_path / "out")
    assert len(zenodo.log) <= 2 and not (tmp_path / "out").exists()


def test_restricted(zenodo, tmp_path):
    zenodo.statuses = [403]
    with pytest.raises(DownloadError, match="may not be downloaded"):
        take(zenodo, tmp_path / "out")


# ---------------------------------------------------------------------------------- the record


def test_a_wrong_checksum_leaves_nothing(zenodo, tmp_path):
    zenodo.md5 = {"notes.txt": "0" * 32}
    with pytest.raises(DownloadError, match="(?s)notes.txt was refused: its MD5 is .*removed"):
        take(zenodo, tmp_path / "out")
    assert leftovers(tmp_path) == [".out.part/lock"]


def test_more_than_was_promised(zenodo, tmp_path):
    zenodo.sizes = {"notes.txt": 1000}
    with pytest.raises(DownloadError, match="sends more than the 1000 bytes"):
        take(zenodo, tmp_path / "out")
    assert leftovers(tmp_path) == [".out.part/lock"]


@pytest.mark.parametrize("key", ["../evil", "a/b", "..", "/etc/x", "a\\b", ".hidden", "a\nb", ""])
def test_a_file_name_that_leads_out(zenodo, tmp_path, key):
    zenodo.files = {key: b"x"}
    with pytest.raises(DownloadError, match="cannot be used as a file name"):
        take(zenodo, tmp_path / "out")
    assert zenodo.asked == [] and leftovers(tmp_path) == [".out.part/lock"]


@pytest.mark.parametrize("names", [("a.txt", "A.TXT"), ("a", "a.zip")])
def test_two_files_of_one_name(zenodo, tmp_path, names):
    zenodo.files = dict.fromkeys(names, b"x")
    with pytest.raises(DownloadError, match="two of its files have one name"):
        take(zenodo, tmp_path / "out")


def test_a_record_without_files(zenodo, tmp_path):
    zenodo.files = {}
    with pytest.raises(DownloadError, match="(?s)has no files that everybody may.*doi.org/10.5281"):
        take(zenodo, tmp_path / "out")


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"[]",
        b"[" * 100_000,
        b'{"files": [{"key": "a"}]}',
        b'{"files": 3}',
        b'{"files": [{"key": "a", "size": 1, "checksum": "sha1:0", "links": {"self": "x"}}]}',
        b'{"files": [{"key": "a", "size": -1, "checksum": "md5:%s", "links": {"self": "x"}}]}'
        % (b"0" * 32),
        b'{"files": [{"key": "a", "size": 1, "checksum": "md5:%s", "links": {"self": "file:///x"}}'
        b"]}" % (b"0" * 32),
    ],
)
def test_an_answer_that_is_no_record(zenodo, tmp_path, answer):
    zenodo.answer = answer
    with pytest.raises(DownloadError, match="(?s)did not answer with a Zenodo record.*_ZENODO_API"):
        take(zenodo, tmp_path / "out")


# ------------------------------------------------------------------------------------ archives


def link(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info, target


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (archive(("ok", "x"), ("../../evil", "x")), "member '../../evil' leads out"),
        (archive(("/evil", "x")), "leads out"),
        (archive(("a\\..\\evil", "x")), "leads out"),
        (archive(("C:/evil", "x")), "leads out"),
        (archive(("a//b", "x")), "leads out"),
        (archive(link("a", "/etc")), "member 'a' is a link"),
        (archive(("a/b", "x"), ("A/B", "y")), "member 'A/B' is there twice"),
        (archive(("a", "x"), ("a/b", "y")), "is both a file and a folder"),
        (archive(("a/b", "y"), ("a", "x")), "is both a file and a folder"),
        (archive(("a", bytes(200_000_000)), compression=zipfile.ZIP_DEFLATED), "no weights do"),
        (b"no zip at all", "it is no zip archive, damaged"),
        (archive(("a", NOISE)).replace(NOISE[5000:5010], bytes(10)), "damaged"),
        (archive(("a", NOISE))[:-40], "it is no zip archive, damaged"),
    ],
    ids=lambda value: value[:30].replace("/", "_") if isinstance(value, str) else "zip",
)
def test_archives_that_are_refused(zenodo, tmp_path, content, said):
    zenodo.files = {"weights.zip": content}
    inner = tmp_path / "deep" / "in"
    with pytest.raises(ArchiveError, match=f"(?s)weights.zip was .*{said}"):
        take(zenodo, inner / "out")
    assert leftovers(tmp_path) == []


def test_what_macos_adds_is_left_out(zenodo, tmp_path):
    members = (("__MACOSX/._a.pth", "x"), ("a/", ""), ("a/b.txt", "y"))
    zenodo.files = {"w.zip": archive(*members)}
    take(zenodo, tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["download.json", "w/a/b.txt"]


def test_another_kind_of_archive_is_said(zenodo, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("panther_jax.weights.download.LOGGER.propagate", True)
    zenodo.files = {"w.tar.gz": b"x", "x.zip": archive(("a/b.txt", "y"))}
    take(zenodo, tmp_path / "out")
    assert "unpack it yourself" in caplog.text and "no model that is known" in caplog.text


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_holds_code_is_refused_by_name(zenodo, tmp_path, zipped):
    import torch

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    buffer = io.BytesIO()
    torch.save({"network_weights": {}, "x": Evil()}, buffer)
    good = layout.model_files("winner-ct")
    bad = "m/fold_0/checkpoint_best.pth"
    zenodo.files = (
        {"w.zip": layout.zipped({**good, bad: buffer.getvalue()})}
        if zipped
        else {"checkpoint_best.pth": buffer.getvalue()}
    )
    name = f"w/{bad}" if zipped else "checkpoint_best.pth"
    with pytest.raises(RefusedWeights, match=f"(?s)not safe:\n  {name} was refused.*mkdir"):
        take(zenodo, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    zenodo.files = {"a.pth": pickle.dumps(Evil())}
    with pytest.raises(RefusedWeights, match="a.pth is not a torch checkpoint"):
        take(zenodo, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_torch_it_is_said(zenodo, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("panther_jax.weights.download.LOGGER.propagate", True)
    find = download.importlib.util.find_spec
    monkeypatch.setattr(
        download.importlib.util, "find_spec", lambda n: None if n == "torch" else find(n)
    )
    zenodo.files = {"a.pth": b"anything"}
    take(zenodo, tmp_path / "out")
    assert "1 checkpoints were not looked into" in caplog.text
    note = json.loads((tmp_path / "out" / "download.json").read_text())
    assert note["checkpoints_checked"] is False


# ------------------------------------------------------------------------------------ the disk


def test_too_little_space_is_known_before(zenodo, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=len(NOISE) - 1)
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="(?s)too little space.*1.0 MB are needed.*another --out"):
        take(zenodo, tmp_path / "out")
    assert zenodo.asked == []


def test_a_disk_that_fills_up_keeps_what_came(zenodo, tmp_path, monkeypatch):
    write = record._Sink.write

    class Full:
        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, block):
            if self.file.tell() > 200_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(block)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def filling(sink, block):
        if hasattr(sink.file, "name") and not isinstance(sink.file, Full):
            sink.file = Full(sink.file)
        write(sink, block)

    monkeypatch.setattr(record._Sink, "write", filling)
    monkeypatch.setenv("PANTHER_JAX_ZENODO_API", zenodo.address)
    with pytest.raises(OSError) as failed:
        take(zenodo, tmp_path / "out")
    assert failed.value.errno == errno.ENOSPC and failed.value.filename.endswith(".part")
    monkeypatch.undo()
    take(zenodo, tmp_path / "out")
    _, wanted, sent = zenodo.asked[-1]
    assert wanted and sent < len(NOISE) - 200_000


def test_a_folder_with_foreign_files_is_left_alone(zenodo, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(DownloadError, match="(?s)not downloaded by this command: mine.txt"):
        take(zenodo, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").unlink()
    assert take(zenodo, tmp_path / "out").fresh  # an empty folder is fine
    with pytest.raises(DownloadError, match="holds record 17212158, not 42"):
        take(zenodo, tmp_path / "out", what="42")
    with pytest.raises(DownloadError, match="is a file"):
        take(zenodo, tmp_path / "out" / "notes.txt")


def test_a_link_to_a_larger_disk(zenodo, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    take(zenodo, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and not take(zenodo, tmp_path / "out").fresh
    assert leftovers(tmp_path / "disk") == ["download.json", "notes.txt"]


def test_two_at_once_do_not_disturb_each_other(zenodo, tmp_path):
    zenodo.wait = threading.Event()
    results = []
    first = threading.Thread(target=lambda: results.append(take(zenodo, tmp_path / "out")))
    first.start()
    while not zenodo.log:
        time.sleep(0.01)
    with pytest.raises(DownloadError, match="another process is getting"):
        take(zenodo, tmp_path / "out")
    zenodo.wait.set()
    first.join()
    assert results[0].fresh and not take(zenodo, tmp_path / "out").fresh
    assert leftovers(tmp_path) == ["out/download.json", "out/notes.txt"]


def test_an_interrupted_unpacking_is_done_again(zenodo, tmp_path, monkeypatch):
    zenodo.files = {"w.zip": archive(("a/b.txt", "y"), ("c.txt", NOISE))}
    write = unpack._write

    def stopped(opened, member, path):
        if member.filename == "c.txt":
            raise KeyboardInterrupt
        return write(opened, member, path)

    monkeypatch.setattr(unpack, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        take(zenodo, tmp_path / "out")
    monkeypatch.undo()
    take(zenodo, tmp_path / "out")
    assert leftovers(tmp_path / "out") == ["download.json", "w/a/b.txt", "w/c.txt"]
    assert len(zenodo.asked) == 1  # the archive was whole


# -------------------------------------------------------------------------- the published layout


@pytest.fixture(scope="module")
def published():
    pytest.importorskip("torch")
    return layout.winners_archive("winner-ct", "winner-t1", "winner-t2")


@pytest.mark.torch
def test_one_archive_of_three_models_is_downloaded_once(zenodo, tmp_path, published, monkeypatch,
                                                        capsys):  # fmt: skip
    monkeypatch.setenv("PANTHER_JAX_ZENODO_API", zenodo.address)
    zenodo.files = {"PANTHER_weights.zip": published}
    root = ["--root", str(tmp_path)]
    assert command.main(["get", "winner-t1", *root]) == 0
    told = capsys.readouterr().out
    assert "0 1 2 3 4 5 (best)" in told and "licence cc-by-4.0" in told
    assert command.main(["get", "winner-t2", *root]) == 0
    assert "winner-t1: was there, and is unchanged" in capsys.readouterr().out
    assert len(zenodo.asked) == 1
    base = tmp_path / "weights" / "winner-t1" / "PANTHER_weights" / "nnUNet_results"
    for name in layout.MODELS:
        assert resolve_model(name, tmp_path) == base / layout.model_folder(name)
    assert command.main(["show", "winner-ct", *root, "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["folds"] == {"all": ["best"]} and "Zenodo record 17212158" in shown["source"]
    note = json.loads((tmp_path / "weights" / "winner-t1" / "download.json").read_text())
    assert note["checkpoints_checked"] is True
