"""Every architecture of transformers made tiny, by the names of the sizes in its config."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

KINDS = tuple(
    dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES])
)
WORDS, WIDTH, INNER, LAYERS, HEADS, PLACES = 128, 32, 64, 2, 4, 96
NAMES = {
    WORDS: "vocab_size vocab_size_per_layer_input",
    WIDTH: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size lru_width "
    "attention_hidden_size out_hidden_size projection_dim moe_intermediate_size "
    "shared_expert_intermediate_size expert_ffn_hidden_size",
    INNER: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size intermediate_size_mlp "
    "shared_intermediate_size block_ff_dim mamba_d_ssm",
    LAYERS: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers depth "
    "num_key_value_heads num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k "
    "linear_num_key_heads linear_num_value_heads n_mamba_heads",
    HEADS: "num_attention_heads num_heads n_head n_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts mamba_dt_rank time_step_rank rotary_dim laurel_rank",
    8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_channels attention_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_n_heads mamba_d_head mamba_d_state state_size "
    "chunk_size mamba_chunk_size ssm_state_size sliding_window hidden_size_per_layer_input "
    "patch_size attention_window_size",
    16: "qk_head_dim kv_lora_rank q_lora_rank image_size",
    PLACES: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions seq_length "
    "context_length",
    1: "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_groups "
    "spatial_merge_size eos_token_id",
    0: "bos_token_id pad_token_id num_kv_shared_layers",
    120: "image_token_id image_token_index",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
ALL_HEADS = {"num_key_value_heads": HEADS}  # Multi-head latent attention has a key for each head.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash"), ALL_HEADS),
    **dict.fromkeys(("minicpm3", "youtu", "axk1", "kimi_k25", "glm_moe_dsa"), ALL_HEADS),
    "deepseek_v2": ALL_HEADS | {"num_experts_per_tok": 2},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "llama4": {"pad_token_id": 0},
    "qwen2_vl": {"text_config.rope_parameters": ROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": ROPE},
}


def _shrink(config: PretrainedConfig) -> None:
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if isinstance(inner, PretrainedConfig):
            _shrink(inner)
        elif name in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, SIZES[name])
        elif name == "rope_parameters" and value and "mrope_section" in value:
            inner["mrope_section"] = [1, 1, 2]
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and kinds:
            with contextlib.suppress(AttributeError):  # Some follow from other fields.
                setattr(config, name, (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS])


def tiny(kind: str) -> torch.nn.Module:
    """The random model of an architecture, in eval(): two layers of width 32, 128 words."""
    config = CONFIG_MAPPING[kind]()
    _shrink(config)
    for path, value in CHANGES.get(kind, {}).items():
        owner, _, name = path.rpartition(".")
        setattr(getattr(config, owner) if owner else config, name, value)
    with_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto._model_mapping[type(config)]._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()
