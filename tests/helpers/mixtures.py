"""A tiny random mixture of experts of each kind: how its experts are stacked and called."""

from __future__ import annotations

import torch
from helpers.zoo import LIKE_LLAMA, random_model
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

E = 6  # Experts in a layer; two of them serve a token.
EIGHT = {"head_dim": 8}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": 2}
SMALL = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = SMALL | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
DEEPSEEK = LATENT_ATTENTION | {
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
JAMBA = MAMBA | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1}

CONFIGS = {
    "mixtral": MixtralConfig(**LIKE_LLAMA | LOCAL),
    "qwen2_moe": Qwen2MoeConfig(**LIKE_LLAMA | SHARED),  # a shared expert beside
    "qwen3_moe": Qwen3MoeConfig(**LIKE_LLAMA | SMALL | EIGHT),
    "qwen3_next": Qwen3NextConfig(**LIKE_LLAMA | SHARED | EIGHT | LINEAR_ATTENTION),
    # Transposed, with biases, gate and up interleaved and clamped.
    "gpt_oss": GptOssConfig(**LIKE_LLAMA | LOCAL | EIGHT | {"sliding_window": 8}),
    "deepseek_v3": DeepseekV3Config(**LIKE_LLAMA | DEEPSEEK),
    "olmoe": OlmoeConfig(**LIKE_LLAMA | {"num_experts": E, "num_experts_per_tok": 2}),
    "jamba": JambaConfig(**LIKE_LLAMA | SMALL | JAMBA | {"expert_layer_offset": 0}),
    # Transposed; all experts get all tokens, those of others scaled by zero.
    "llama4": Llama4TextConfig(
        **LIKE_LLAMA | LOCAL | EIGHT,
        intermediate_size_mlp=56,
        moe_layers=[0, 1],
        attention_chunk_size=8,
    ),
}
NAMES = tuple(CONFIGS)


def mixture(name: str, dtype=torch.float32, seed: int = 0):
    """The mixture `name`, in eval()."""
    return random_model(CONFIGS[name], dtype, seed)


def stacks(model):
    """path -> module of the stacks of experts of a dense model."""
    return {
        path: module
        for path, module in model.named_modules()
        if getattr(module, "down_proj", None) is not None
        and isinstance(module.down_proj, torch.nn.Parameter)
    }
