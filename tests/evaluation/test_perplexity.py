"""Perplexity, against counting by hand and against transformers' own loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny

from hylora_kernels.evaluation.perplexity import perplexity

QUIET = {"progress": False}


def nll_by_hand(model, block) -> float:
    """The summed loss of one block, prediction by prediction, in float64."""
    logits = model(input_ids=block[None]).logits[0].double().log_softmax(-1)
    return -sum(float(logits[t, block[t + 1]]) for t in range(len(block) - 1))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 5, 8])
def test_perplexity_counts_every_token(batch):
    model, blocks = tiny.llama(), tiny.tokens(5, 13)
    found = perplexity(model, blocks, batch, **QUIET)
    total = sum(nll_by_hand(model, block) for block in blocks)
    assert (found.tokens, found.blocks, found.length) == (5 * 12, 5, 13)
    assert found.nll == pytest.approx(total / 60, rel=1e-6)
    assert found.ppl == math.exp(found.nll)


def test_perplexity_of_a_uniform_model_is_its_number_of_words():
    model = tiny.llama(torch.bfloat16)
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tiny.tokens(3, 16), **QUIET).ppl == pytest.approx(tiny.WORDS, rel=1e-6)


def test_perplexity_leaves_modes_and_gradients_alone():
    model = tiny.adapted(tiny.llama(), dropout=0.5).train()
    model.lm_head.eval()
    blocks = tiny.tokens(4, 9)
    first = perplexity(model, blocks, **QUIET)
    assert model.training and not model.lm_head.training
    assert all(p.grad is None for p in model.parameters())
    assert perplexity(model.eval(), blocks, **QUIET) == first  # no dropout acted


@pytest.mark.parametrize(("poisoned", "batch"), [(0, 4), (2, 4), (5, 4), (5, 1)])
def test_not_finite_names_the_block(poisoned, batch):
    model, blocks = tiny.llama(), tiny.tokens(6, 9)
    blocks[blocks == 95] = 0
    blocks[poisoned, 3] = 95
    model.model.embed_tokens.weight.data[95] = math.nan
    with pytest.raises(FloatingPointError, match=f"loss of block {poisoned} is nan"):
        perplexity(model, blocks, batch, **QUIET)


def test_perplexity_beyond_float64():
    model = tiny.llama()
    model.lm_head.weight.data *= 1e4
    with pytest.raises(FloatingPointError, match="beyond float64"):
        perplexity(model, tiny.tokens(2, 9), **QUIET)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[1, 2]], "blocks must be token ids .*got list"),
        (torch.zeros(3, dtype=torch.long), r"got \[3\]"),
        (torch.zeros(0, 8, dtype=torch.long), r"got \[0, 8\]"),
        (torch.zeros(2, 1, dtype=torch.long), r"at least 2 tokens long, got \[2, 1\]"),
        (torch.zeros(2, 65, dtype=torch.long), "at most 64, the model's context, got 65"),
        (torch.full((2, 8), 96), r"ids in \[0, 96\), got 96 to 96"),
        (torch.full((2, 8), -1), r"ids in \[0, 96\), got -1 to -1"),
    ],
)
def test_perplexity_refuses_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny.llama(), blocks, **QUIET)


def test_perplexity_refuses_a_batch_of_none():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        perplexity(tiny.llama(), tiny.tokens(2, 8), batch=0)


@torch.no_grad()
def test_perplexity_is_the_cross_entropy_of_transformers():
    """The same figure as the model's own loss, block by block."""
    model, blocks = tiny.llama(), tiny.tokens(4, 32)
    own = [float(model(input_ids=b[None], labels=b[None]).loss) for b in blocks]
    assert perplexity(model, blocks, **QUIET).nll == pytest.approx(sum(own) / 4, rel=1e-6)
    logits = model(input_ids=blocks).logits[:, :-1].flatten(0, 1)
    whole = F.cross_entropy(logits, blocks[:, 1:].flatten())
    assert perplexity(model, blocks, **QUIET).nll == pytest.approx(float(whole), rel=1e-6)
