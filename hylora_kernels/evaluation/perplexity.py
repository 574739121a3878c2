"""Perplexity over blocks of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.loss import token_loss
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.support.console import format_ppl
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.report import Report


@dataclass(frozen=True)
class Perplexity(Report):
    """ppl = exp(nll); nll is the mean loss in nats a token.

    tokens: predictions counted, length - 1 in each block.
    """

    ppl: float
    nll: float
    tokens: int
    blocks: int
    length: int


@torch.no_grad()
def perplexity(
    model: nn.Module, blocks: Tensor, batch: int = 4, progress: bool = True, text: str = ""
) -> Perplexity:
    """Perplexity of a causal language model on blocks, token ids int64 [n, L].

    Each block is a text of its own: its first token is given, the other L - 1 are predicted, and
    every prediction counts. batch: blocks in one forward. text: its name, for the bar and an error.

    Raises FloatingPointError naming the block whose loss is not finite, ValueError for batch < 1
    and for blocks that are no token ids or longer than the model's context.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    check_model(model, "evaluate")
    check_blocks(model, blocks)
    device = input_device(model)
    nll, tokens, label = 0.0, 0, f"perplexity, {text}" if text else "perplexity"
    bar = tqdm(total=len(blocks), desc=label, unit="block", disable=not progress)
    with eval_mode(model), bar:
        for start in range(0, len(blocks), batch):
            ids = blocks[start : start + batch].to(device)
            loss, count = token_loss(model, ids)
            if not math.isfinite(loss):
                raise FloatingPointError(f"{label}: {_not_finite(model, ids, start)}")
            nll, tokens = nll + float(loss), tokens + count
            bar.set_postfix(ppl=format_ppl(math.exp(min(nll / tokens, 700))), refresh=False)
            bar.update(len(ids))
    mean = nll / tokens
    if mean > 700:  # exp(709.8) is the largest float64
        raise FloatingPointError(f"{label}: exp of a loss of {mean:.1f} nats is beyond float64")
    return Perplexity(math.exp(mean), mean, tokens, *blocks.shape)


def _not_finite(model: nn.Module, ids: Tensor, start: int) -> str:
    """The first block of ids [n, L] whose loss is not finite, counted from `start`, in words."""
    for index, block in enumerate(ids, start):
        loss, _ = token_loss(model, block[None])
        if not math.isfinite(loss):
            return f"the loss of block {index} is {float(loss)}"
    last = start + len(ids) - 1
    return f"the loss of blocks {start} to {last} is not finite together, yet each alone is"
