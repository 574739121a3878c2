"""The cache folder, atomic writes, disk space."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple

import platformdirs
import pytest

from hylora_kernels.support import storage


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_dir_follows_the_environment(root):
    folder = storage.cache_dir("models", "tiny")
    assert folder == root / "models" / "tiny"
    assert folder.is_dir()
    assert storage.cache_dir() == root


def test_cache_dir_without_the_environment_is_the_systems(tmp_path, monkeypatch):
    monkeypatch.delenv("HYLORA_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert storage.cache_dir("data") == tmp_path / "hylora_kernels" / "data"


@pytest.mark.parametrize("part", ["..", ".", "", "a/b", "/etc"])
def test_cache_dir_refuses_parts_that_lead_out(root, part):
    with pytest.raises(ValueError, match="parts must be plain folder names"):
        storage.cache_dir("data", part)
    with pytest.raises(ValueError, match="parts must be plain folder names"):
        storage.cache_dir(part)


def test_cache_size_and_clear(root):
    assert storage.cache_size() == 0
    assert storage.clear_cache() == 0
    tag = len(storage.TAG_TEXT)
    (storage.cache_dir("data") / "a.txt").write_bytes(b"x" * 1000)
    (storage.cache_dir("models", "m") / "b.bin").write_bytes(b"x" * 500)
    assert storage.cache_size() == 1500 + 2 * tag
    assert storage.clear_cache() == 1500 + 2 * tag
    assert storage.cache_size() == 0
    assert list(root.iterdir()) == []


def test_clear_cache_leaves_what_is_not_ours(root):
    """HYLORA_CACHE may point at a folder with other things in it, even one named like ours."""
    (root / "data").mkdir(parents=True)
    (root / "data" / "theirs.txt").write_text("keep me")
    (root / "note.txt").write_text("keep me too")
    (storage.cache_dir("data") / "ours.txt").write_text("1")
    (storage.cache_dir("models") / "ours.txt").write_text("22")
    assert storage.clear_cache() == 2 + len(storage.TAG_TEXT)
    assert (root / "data" / "theirs.txt").read_text() == "keep me"
    assert (root / "note.txt").exists()
    assert not (root / "models").exists()


def test_clear_cache_follows_no_link(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs.txt").write_text("keep me")
    (storage.cache_dir("data") / "link").symlink_to(outside)
    storage.clear_cache()
    assert (outside / "theirs.txt").exists()


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
