"""Files and folders are whole or not there, whatever fails on the way; JSON is read once."""

import errno
import json
import os
import resource
import signal

import pytest

from panther_jax.base import files
from panther_jax.base.errors import FileError, MissingError, WriteError


def content(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def fail(number):
    def failing(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return failing


def test_a_file_appears_at_the_end_under_its_own_name(tmp_path):
    path = tmp_path / "deep" / "scan.nii.gz"
    with files.writing(path) as temporary:
        assert temporary.name == "scan.nii.gz"  # libraries tell the format by it
        temporary.write_bytes(b"half")
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and content(tmp_path) == {"deep", "deep/scan.nii.gz"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(error):
        with files.writing(path) as temporary:
            temporary.write_text("new")
            raise error
    assert path.read_text() == "old" and content(tmp_path) == {"a.txt"}


def test_files_that_belong_together_appear_together(tmp_path):
    with pytest.raises(WriteError, match="b.npy"):
        with files.writing_together() as written:
            written.beside(tmp_path / "a.npy").write_bytes(b"a")
            written.beside(tmp_path / "b.npy").open("xb").close()
            raise OSError(errno.EIO, "input/output error")
    assert not content(tmp_path)
    with files.writing_together() as written:
        for name in ("a.npy", "b.npy"):
            written.beside(tmp_path / name).write_bytes(name.encode())
        assert {p for p in content(tmp_path) if not p.startswith(".")} == set()
    assert content(tmp_path) == {"a.npy", "b.npy"}


@pytest.mark.parametrize(
    "number,says",
    [
        (errno.ENOSPC, r"b.json: the disk is full \(\d+ MiB free\).*free some space"),
        (errno.EACCES, "b.json: Permission denied.*right to write"),
    ],
)
def test_the_reason_the_space_and_the_remedy_are_named(tmp_path, monkeypatch, number, says):
    monkeypatch.setattr(files.os, "replace", fail(number))
    with pytest.raises(WriteError, match=says) as caught:
        files.write_json(tmp_path / "b.json", {})
    assert caught.value.errno == number and not content(tmp_path)


def test_a_disk_that_fills_while_it_is_written(tmp_path):
    """The limit on the size of files stands for a full disk: the system itself refuses to write."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(WriteError, match="cannot write .*big.bin"):
            files.write_bytes(tmp_path / "big.bin", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not content(tmp_path)


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path):
    out = tmp_path / "bundle"
    with files.writing_folder(out) as temporary:
        (temporary / "old.txt").write_text("old")
    with pytest.raises(RuntimeError):
        with files.writing_folder(out) as temporary:
            (temporary / "new.txt").write_text("new")
            raise RuntimeError
    assert content(tmp_path) == {"bundle", "bundle/old.txt"}
    (tmp_path / ".bundle.tmp").mkdir()
    (tmp_path / ".bundle.tmp" / "left.txt").write_text("of a killed run")
    with files.writing_folder(out) as temporary:
        (temporary / "new.txt").write_text("new")
    assert content(tmp_path) == {"bundle", "bundle/new.txt"}


def test_a_folder_that_cannot_be_renamed_comes_back(tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    with files.writing_folder(out) as temporary:
        (temporary / "old.txt").write_text("old")
    rename = files.Path.rename

    def refused(self, target):
        if self.name == ".bundle.tmp":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(files.Path, "rename", refused)
    with pytest.raises(WriteError, match="cannot write .*bundle"):
        with files.writing_folder(out) as temporary:
            (temporary / "new.txt").write_text("new")
    assert content(tmp_path) == {"bundle", "bundle/old.txt"}


def test_what_a_killed_run_left_is_removed_when_it_is_old(tmp_path):
    old, young = tmp_path / ".a.npy.0123.tmp", tmp_path / ".b.npy.4567.tmp"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
    (tmp_path / ".c.npy.89ab.tmp").write_bytes(b"of an older version")
    for path in (old, tmp_path / ".c.npy.89ab.tmp"):
        os.utime(path, (0, 0))
    files.remove_stale(tmp_path)
    assert content(tmp_path) == {".b.npy.4567.tmp", ".b.npy.4567.tmp/half"}


def test_json_with_a_byte_order_mark_is_no_damage(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "Tumor é"}, ensure_ascii=False).encode())
    assert files.read_object(path) == {"a": "Tumor é"}


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list"), ("\xff", "not valid")],
)
def test_json_that_cannot_be_used_is_named_with_its_remedy(tmp_path, text, says):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match=f"a.json.*{says}") as caught:
        files.read_object(path)
    assert "Copy it again" in caught.value.remedy
    with pytest.raises(MissingError, match="b.json does not exist"):
        files.read_json(tmp_path / "b.json")
