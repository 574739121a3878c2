"""Each public name's docstring ends with an example, and each example runs as it stands.

It runs in a folder with my-org/my-model, a small dense model, my-folder, the same compressed, and
my.txt, which stands for stdlib, too. `model` and `tokenizer` are the dense one's.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import tiny
from torch import nn

import hylora_kernels
from hylora_kernels.text.sources import SPLIT_TEXTS, python_docs_text


def example_of(name: str) -> str:
    """The code after "Example:", "" if there is none."""
    text = inspect.getdoc(getattr(hylora_kernels, name)) or ""
    found = re.search(r"^Example:\n((?: {4}.*\n?|\n)+)", text, re.M)
    return textwrap.dedent(found[1]) if found else ""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    text = python_docs_text()[:30_000]
    (folder / "my.txt").write_text(text, encoding="utf-8")
    tokenizer = tiny.tokenizer(text)
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "my-org/my-model")
    hylora_kernels.save_pretrained(tiny.adapted(model), folder / "my-folder", tokenizer)
    return folder


@pytest.mark.parametrize("name", hylora_kernels.__all__)
def test_the_example_of_a_public_name_runs(name, home, monkeypatch):
    code = example_of(name)
    assert name in code or name == "SVD_LoRA_Linear", f"{name}'s docstring has no example"
    monkeypatch.chdir(home)
    # The standard library's own is nearly a million characters to gather and to cut up.
    text = (home / "my.txt").read_text(encoding="utf-8")
    monkeypatch.setitem(SPLIT_TEXTS, "stdlib", lambda split: text)
    public = {name: getattr(hylora_kernels, name) for name in hylora_kernels.__all__}
    model, tokenizer = hylora_kernels.load_model("my-org/my-model")
    exec(code, {"torch": torch, "nn": nn, "model": model, "tokenizer": tokenizer, **public})
