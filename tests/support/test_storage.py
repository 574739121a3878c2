"""Atomic writes, disk space."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple

import pytest

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
