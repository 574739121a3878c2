"""Atomic writes, disk space."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file

from hylora_kernels.support import storage


def test_atomic_path_replaces_on_success(tmp_path):
    target = tmp_path / "new" / "plot.png"
    with storage.atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        temporary.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    assert [p.name for p in target.parent.iterdir()] == ["plot.png"]


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), storage.atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError("halfway")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_written_files_have_the_permissions_of_the_umask(umask, tmp_path):
    """safetensors makes its files 0600."""
    before = os.umask(umask)
    try:
        with storage.atomic_path(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
        with storage.atomic_folder(tmp_path / "folder") as temporary:
            save_file({"x": torch.zeros(2)}, temporary / "b.safetensors")
        storage.write_text(tmp_path / "c.txt", "text")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "folder/b.safetensors", "c.txt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


def test_a_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: steps.append("replace") or replace(*paths))
    storage.write_text(tmp_path / "a.txt", "text")
    assert steps[:2] == ["fsync", "replace"]
    del steps[:]
    with storage.atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("1")
    assert steps == ["fsync", "fsync", "replace"]  # the file and its folder


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "report.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real/report.json")
    storage.write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real" / "report.json").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """Replacing /dev/null, which the administrator can, would take it from the whole system."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.write_text(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_the_temporary_file_of_a_killed_process_goes_at_a_later_write(tmp_path):
    dead, alive, other = (
        tmp_path / name
        for name in (f".{'0' * 12}.a[1].txt", f".{'1' * 12}.a[1].txt", ".b.a[1].txt")
    )
    for path in (dead, alive, other):
        path.write_text("half")
    os.utime(dead, (0, 0))
    os.utime(other, (0, 0))
    storage.write_text(tmp_path / "a[1].txt", "whole")
    assert not dead.exists() and alive.exists() and other.exists()


def test_atomic_folder(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError, match="halfway"), storage.atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):  # the second writer finds the folder made: it stays
        with storage.atomic_folder(target) as temporary:
            (temporary / "a").write_text(text)
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name == "nt", reason="permissions are others on Windows")
def test_atomic_folder_leaves_a_links_target_alone(tmp_path):
    program = tmp_path / "program"
    program.touch(0o755)
    with storage.atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "link").symlink_to(program)
    assert program.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "link").is_symlink()


def test_write_json_and_text(tmp_path):
    storage.write_json(tmp_path / "a.json", {"π": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"π": [1, 2.5, None]}
    storage.write_text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(tmp_path / "a.json", {"ppl": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"π": [1, 2.5, None]}


def test_require_disk(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(9e9, 7e9, 2_000_000_000))
    storage.require_disk(tmp_path / "not" / "there", 1_500_000_000, "compress")
    line = "compress: needs about 1.50 GB on disk, 2.00 GB free"
    assert capsys.readouterr().err.strip() == line
    storage.require_disk(tmp_path, 1000, "save")
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match=r"compress: needs about 3\.00 GB on disk, 2\.00 GB") as info:
        storage.require_disk(tmp_path, 3_000_000_000, "compress")
    assert info.value.errno == errno.ENOSPC
