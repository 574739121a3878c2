"""Tokens a second: prefill and decoding."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels.inference.optimize import optimize_for_inference, restore_from_inference
from hylora_kernels.layers.packed import packed_states
from hylora_kernels.model.context import check_context
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.report import Report


@dataclass
class Throughput(Report):
    """Tokens a second at batch 1: medians of three prefills and of the single new tokens."""

    prefill_tok_s: float
    decode_tok_s: float
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    threads: int
    optimized: bool


@torch.no_grad()
def throughput(
    model: nn.Module,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    seed: int = 0,
    optimize: bool = False,
) -> Throughput:
    """Time the model on random tokens: prompts at once, then greedily token by token with a cache.

    Both are warmed up first; then three prompts and exactly `new_tokens` tokens are timed. Logits
    are made for a prompt's last token only, as generate() does. With `optimize` the model is laid
    out by optimize_for_inference first and restored afterwards, the same bits in new Parameter
    objects. Raises ValueError for sizes that can't be.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_context(model, prompt_tokens + new_tokens + 1)
    device, words = input_device(model), model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (1, prompt_tokens), generator=generator).to(device)
    last = (
        {"logits_to_keep": 1}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )
    with eval_mode(model), _optimized(model) if optimize else nullcontext():
        optimized = bool(packed_states(model))
        _timed(model, ids, None, last)
        prefills = [_timed(model, ids, None, last)[0] for _ in range(3)]
        _, token, cache = _timed(model, ids, None, last)
        _, token, cache = _timed(model, token, cache, last)
        decodes = []
        for _ in range(new_tokens):
            seconds, token, cache = _timed(model, token, cache, last)
            decodes.append(seconds)
    return Throughput(
        prefill_tok_s=prompt_tokens / statistics.median(prefills),
        decode_tok_s=1 / statistics.median(decodes),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        optimized=optimized,
    )


@contextmanager
def _optimized(model: nn.Module) -> Iterator[None]:
    """Optimised inside; outside as it was."""
    already = bool(packed_states(model))
    try:
        if not already:
            optimize_for_inference(model)
        yield
    finally:
        if not already:
            restore_from_inference(model)


def _timed(
    model: nn.Module, ids: Tensor, cache: Any, options: dict[str, Any]
) -> tuple[float, Tensor, object]:
    """(seconds, the likeliest next token [1, 1], the cache) of one forward."""
    _synchronize(ids.device)
    start = time.perf_counter()
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
    token = output.logits[:, -1:].argmax(-1)
    _synchronize(ids.device)
    return time.perf_counter() - start, token, output.past_key_values


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
