"""The forwards that are timed, and the tokens that are decoded."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from transformers import GPT2Config, OPTConfig

from hylora_kernels.evaluation.speed import throughput

CONFIGS = {
    "llama": None,
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_throughput_times_what_it_says(name, device, monkeypatch):
    """With a clock that counts forwards: 3 prefills of one tick each, then single tokens of one."""
    model = tiny.llama() if name == "llama" else tiny.causal_lm(CONFIGS[name])
    model, forwards = model.to(device), []

    def watch(_module, args, kwargs):
        forwards.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(watch, with_kwargs=True)
    clock = SimpleNamespace(perf_counter=lambda: float(sum(forwards)))
    monkeypatch.setattr(sys.modules["hylora_kernels.evaluation.speed"], "time", clock)
    found = throughput(model, prompt_tokens=20, new_tokens=7)
    assert forwards == [20] * 5 + [1] * 8  # a warm-up of each, and the prompt that is gone on from
    assert (found.prefill_tok_s, found.decode_tok_s) == (1.0, 1.0)
    assert (found.prompt_tokens, found.new_tokens) == (20, 7)
    assert found.device.startswith(device) and found.dtype == "float32"


@torch.no_grad()
def test_throughput_decodes_as_without_a_cache(monkeypatch):
    """The tokens fed one by one are those that the whole sequence would give."""
    model, fed = tiny.llama(), []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    throughput(model, prompt_tokens=10, new_tokens=5)
    hook.remove()
    sequence = torch.cat(fed[4:], 1)
    want = model(input_ids=sequence).logits.argmax(-1)[:, 9:-1]
    assert torch.equal(sequence[:, 10:], want)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"prompt_tokens": 60, "new_tokens": 10}, "at most 64, the model's context, got 71"),
    ],
)
def test_throughput_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        throughput(tiny.llama(), **sizes)
