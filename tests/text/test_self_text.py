"""Text that a model writes itself: its parts, its conversations, its cache."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny

from hylora_kernels.text.self_text import self_blocks

TEMPLATE = "{% for m in messages %}<|{{m.role}}|>{{m.content}}<end>\n{% endfor %}"
WORDS = 352


@pytest.fixture(scope="module")
def model():
    return tiny.llama(vocab_size=WORDS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer("hello world, this is a text", TEMPLATE)


def test_block_i_is_the_same_for_every_count(model, tokenizer):
    few = self_blocks(model, tokenizer, 3, length=24, progress=False)
    assert few.dtype == torch.int64 and few.shape == (3, 24) and few.device.type == "cpu"
    many = self_blocks(model, tokenizer, 40, length=24, progress=False)
    assert torch.equal(many[:3], few)
    assert len({tuple(row) for row in many.tolist()}) == 40
