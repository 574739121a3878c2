"""Speed: tokens per second of prefill and of decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hylora_kernels.inference.decoder import Decoder
from hylora_kernels.inference.optimize import optimized_for_inference
from hylora_kernels.layers.packed import packed_states
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_context, context_length, vocabulary_size
from hylora_kernels.model.modules import eval_mode
from hylora_kernels.support.devices import floating_dtype, input_device
from hylora_kernels.support.report import Report


@dataclass
class Throughput(Report):
    """Tokens per second at batch 1.

    prefill_tok_s: from the median time of three prompts of prompt_tokens.
    decode_tok_s:  from the median time of new_tokens single tokens.
    threads:       of the CPU. optimized: the model was packed by optimize_for_inference.
    runtime:       what decoded (Decoder.runtime).
    """

    prefill_tok_s: float
    decode_tok_s: float
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    threads: int
    optimized: bool
    runtime: str


@torch.no_grad()
def throughput(
    model: nn.Module,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    seed: int = 0,
    optimize: bool = False,
) -> Throughput:
    """Time a causal language model on random tokens drawn by `seed`, on its device.

    Three whole prompts are timed, then `new_tokens` greedy tokens, one at a time with a cache; each
    kind is warmed up once. They are a Decoder's, with logits for the prompt's last token only.

    optimize: time the model as optimize_for_inference packs it. This is undone: the same Parameter
              objects have their bits again.

    Raises ValueError for a number of tokens below 1 or beyond the model's context.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_model(model, "generate")
    check_context(model, prompt_tokens + new_tokens + 1)
    device, vocabulary = input_device(model), vocabulary_size(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, prompt_tokens), generator=generator, device="cpu").to(
        device
    )
    with eval_mode(model), optimized_for_inference(model) if optimize else nullcontext():
        optimized = bool(packed_states(model))
        decoder = Decoder(model, length=prompt_tokens + new_tokens + 1)
        prefills = [_timed(device, decoder.prefill, ids) for _ in range(5)][1:4]
        steps = []
        for _ in range(new_tokens + 1):
            token = decoder.likeliest
            steps.append(_timed(device, decoder.step, token))
    return Throughput(
        prefill_tok_s=prompt_tokens / statistics.median(prefills),
        decode_tok_s=1 / statistics.median(steps[1:]),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=str(device),
        dtype=str(floating_dtype(model)).removeprefix("torch."),
        threads=torch.get_num_threads(),
        optimized=optimized,
        runtime=decoder.runtime,
    )


def prompt_that_fits(model: nn.Module, new_tokens: int = 32) -> int:
    """128, the tokens of a prompt to decode new ones after, or what a short context leaves."""
    context = context_length(model)
    return 128 if context is None else max(1, min(128, context - new_tokens - 1))


def _timed(device: torch.device, call: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Seconds of one call on tokens."""
    _synchronize(device)
    start = time.perf_counter()
    call(tokens)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
