"""A tiny random model of each architecture that compression is tested on.

Two or three blocks of width 32 to 48, 128 words. Weights are drawn by `seed`, with a spread that
makes logits vary; norms and biases are random too, so that nothing is an identity by chance.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from helpers import tiny
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 128
COMMON = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LIKE_LLAMA = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GATED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
GATED += [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


@dataclass(frozen=True)
class Architecture:
    """groups: paths of one block's linears, in call order. writers: those that write into the
    residual stream."""

    config: object
    groups: list[tuple[str, ...]]
    writers: tuple[str, ...]
    blocks: str = "model.layers"
    head: str = "lm_head"
    tied: bool = False


def _gated(config, writers=("self_attn.o_proj", "mlp.down_proj"), tied=False) -> Architecture:
    return Architecture(config, GATED, writers, tied=tied)


ZOO: dict[str, Architecture] = {
    "llama": _gated(LlamaConfig(**LIKE_LLAMA | {"tie_word_embeddings": True}), tied=True),
    "qwen2": _gated(Qwen2Config(**LIKE_LLAMA | {"num_hidden_layers": 3})),
    "qwen3": _gated(Qwen3Config(**LIKE_LLAMA | {"head_dim": 12, "intermediate_size": 64})),
    "mistral": _gated(MistralConfig(**LIKE_LLAMA | {"hidden_size": 48, "sliding_window": 8})),
    "gemma": _gated(GemmaConfig(**LIKE_LLAMA | {"head_dim": 8}), tied=True),
    "gemma2": _gated(
        Gemma2Config(
            **LIKE_LLAMA | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 4.0}
        ),
        writers=(),
        tied=True,
    ),
    "gemma3": _gated(
        Gemma3TextConfig(**LIKE_LLAMA | {"head_dim": 8, "sliding_window": 8}),
        writers=(),
        tied=True,
    ),
    "phi": Architecture(
        PhiConfig(**LIKE_LLAMA | {"num_key_value_heads": 4}),
        [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            ("self_attn.dense",),
            ("mlp.fc2",),
        ],
        ("self_attn.dense", "mlp.fc2"),
    ),
    "gpt_neox": Architecture(
        GPTNeoXConfig(
            **COMMON,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            use_parallel_residual=True,
        ),
        [
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
        ("attention.dense", "mlp.dense_4h_to_h"),
        blocks="gpt_neox.layers",
    ),
    "opt": Architecture(
        OPTConfig(
            **COMMON,
            hidden_size=32,
            ffn_dim=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        ),
        [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ],
        ("self_attn.out_proj", "fc2"),
        blocks="model.decoder.layers",
        tied=True,
    ),
    "gpt2": Architecture(
        GPT2Config(**{k: v for k, v in COMMON.items() if "position" not in k} | GPT2),
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
        ("attn.c_proj", "mlp.c_proj"),
        blocks="transformer.h",
        tied=True,
    ),
}
NAMES = tuple(ZOO)


def zoo_model(name: str, dtype=torch.float32, seed: int = 0):
    """The model `name` of the zoo, in eval()."""
    return random_model(ZOO[name].config, dtype, seed)


def random_model(config, dtype=torch.float32, seed: int = 0):
    """The model of a config, in eval(), with weights as the zoo's."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


@functools.cache
def _trained(name: str):
    model = zoo_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        ids = tokens(16, 16, seed=1000 + step)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def trained(name: str):
    """A model of the zoo after two seconds of training on tokens(), so that its weights matter."""
    return copy.deepcopy(_trained(name)).eval()


def paths_of(name: str) -> list[tuple[str, ...]]:
    """The groups of all blocks as full paths, in call order."""
    arch = ZOO[name]
    blocks = arch.config.num_hidden_layers
    return [
        tuple(f"{arch.blocks}.{i}.{path}" for path in group)
        for i in range(blocks)
        for group in arch.groups
    ]


def tokens(n: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    """tiny.tokens of the zoo's vocabulary."""
    return tiny.tokens(n, length, VOCAB, seed)
