"""An exported model beside the one that it was made from: logits, tokens, speed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hylora_kernels.inference.decoder import Decoder
from hylora_kernels.model.context import context_length, vocabulary_size
from hylora_kernels.support.report import Report

PROMPT, TOKENS = 16, 64


@dataclass
class Agreement(Report):
    """tokens:       greedy ones of the model after a prompt of 16 random tokens.
    equal:         how many of them are the exported model's, too, given those before.
    largest_error: of any logit at any of them, beside largest_logit.
    decode_tok_s:  tokens a second of the exported model at batch 1, by the median step.
    threads:       of both.
    """

    tokens: int
    equal: int
    largest_error: float
    largest_logit: float
    decode_tok_s: float
    threads: int


class Session(Protocol):
    """One sequence of an exported model."""

    def prefill(self, ids: Tensor) -> Tensor:
        """A new sequence with this prompt, int64 [1, L] -> logits [1, words] of the next token."""

    def step(self, tokens: Tensor) -> Tensor:
        """One token more, int64 [1] -> logits [1, words] of the token after it."""


@torch.no_grad()
def compare(model: nn.Module, session: Session) -> Agreement:
    """Run both side by side; the model's tokens are what both go on with."""
    context = context_length(model)
    count = TOKENS if context is None else max(1, min(TOKENS, context - PROMPT))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary_size(model), (1, PROMPT), generator=generator, device="cpu")
    decoder = Decoder(model)
    own, other = decoder.prefill(ids), session.prefill(ids)
    equal, error, size, seconds = 0, 0.0, 0.0, []
    for step in range(count):
        error = max(error, float((own.float() - other.float()).abs().max()))
        size = max(size, float(own.float().abs().max()))
        equal += int(torch.equal(own.argmax(-1), other.argmax(-1)))
        if step < count - 1:
            token = own.argmax(-1)
            own = decoder.step(token)
            start = time.perf_counter()
            other = session.step(token)
            seconds.append(time.perf_counter() - start)
    speed = 1 / statistics.median(seconds) if seconds else float("nan")
    return Agreement(count, equal, error, size, speed, torch.get_num_threads())
