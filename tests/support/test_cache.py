"""The cache folder: its place, its permissions, clearing it, files that prove themselves whole."""

from __future__ import annotations

import platformdirs
import pytest

from hylora_kernels.support import cache


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_dir_follows_the_environment(root):
    folder = cache.cache_dir("models", "tiny")
    assert folder == root / "models" / "tiny"
    assert folder.is_dir()
    assert cache.cache_dir() == root


def test_cache_dir_without_the_environment_is_the_systems(tmp_path, monkeypatch):
    monkeypatch.delenv("HYLORA_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    assert cache.cache_dir("data") == tmp_path / "hylora_kernels" / "data"


@pytest.mark.parametrize("part", ["..", ".", "", "a/b", "/etc"])
def test_cache_dir_refuses_parts_that_lead_out(root, part):
    with pytest.raises(ValueError, match="parts must be plain folder names"):
        cache.cache_dir("data", part)
    with pytest.raises(ValueError, match="parts must be plain folder names"):
        cache.cache_dir(part)


def test_cache_size_and_clear(root):
    assert cache.cache_size() == 0
    assert cache.clear_cache() == 0
    tag = len(cache.TAG_TEXT)
    (cache.cache_dir("data") / "a.txt").write_bytes(b"x" * 1000)
    (cache.cache_dir("models", "m") / "b.bin").write_bytes(b"x" * 500)
    assert cache.cache_size() == 1500 + 2 * tag
    assert cache.clear_cache() == 1500 + 2 * tag
    assert cache.cache_size() == 0
    assert list(root.iterdir()) == []


def test_clear_cache_leaves_what_is_not_ours(root):
    """HYLORA_CACHE may point at a folder with other things in it, even one named like ours."""
    (root / "data").mkdir(parents=True)
    (root / "data" / "theirs.txt").write_text("keep me")
    (root / "note.txt").write_text("keep me too")
    (cache.cache_dir("data") / "ours.txt").write_text("1")
    (cache.cache_dir("models") / "ours.txt").write_text("22")
    assert cache.clear_cache() == 2 + len(cache.TAG_TEXT)
    assert (root / "data" / "theirs.txt").read_text() == "keep me"
    assert (root / "note.txt").exists()
    assert not (root / "models").exists()


def test_clear_cache_follows_no_link(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs.txt").write_text("keep me")
    (cache.cache_dir("data") / "link").symlink_to(outside)
    cache.clear_cache()
    assert (outside / "theirs.txt").exists()
