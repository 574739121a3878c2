"""docs/integrations.md: its Python snippets, and the folder that they run in."""

from __future__ import annotations

import re
from pathlib import Path

from helpers import tiny

from hylora_kernels import save_pretrained
from hylora_kernels.text.sources import python_docs_text

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/integrations.md"


def sections() -> dict[str, list[tuple[int, str]]]:
    """Heading of the second level -> its Python snippets, each with the number of its line."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found: dict[str, list[tuple[int, str]]] = {}
    for match in re.finditer(r"^## ([^\n]+)$|^```python\n(.*?)^```$", text, re.M | re.S):
        heading, code = match.groups()
        if heading:
            snippets = found.setdefault(heading, [])
        else:
            snippets.append((text.count("\n", 0, match.start()) + 1, code))
    return found


def write_models(folder: Path) -> Path:
    """Write `dense`, a model that transformers saved, `small`, the same compressed, both with their
    tokenizer, and `text.txt`; returns the folder."""
    text = python_docs_text()[:100_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = tiny.tokenizer(text)
    model = tiny.llama(
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True
    )
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    save_pretrained(tiny.adapted(model), folder / "small", tokenizer)
    return folder
