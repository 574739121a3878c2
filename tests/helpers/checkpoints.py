"""Shared by the tests of checkpoints: tiny models of several architectures, altered files."""

from __future__ import annotations

import copy
import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from hylora_kernels.layers.linear import SVDLoRALinear

IDS = torch.arange(3, 43).view(2, 20)
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48}
CONFIGS = {
    "llama": LlamaConfig(**SMALL | {"num_hidden_layers": 2}, num_key_value_heads=2),
    "llama, tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "llama, scaled rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "gpt2": GPT2Config(**TOKENS, n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "opt": OPTConfig(**TOKENS, **OPT, max_position_embeddings=64, word_embed_proj_dim=32),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**SMALL),
}


def build(name="llama", form="pivoted", rank=8, lora_rank=4, alpha=0.5):
    """A tiny random model whose linears, but for the head, are SVDLoRALinear; rank=0: dense."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.T.clone()), module.bias
            module = linear
        if rank and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            layer = SVDLoRALinear.from_linear(module, rank, lora_rank, alpha, form=form)
            model.set_submodule(path, layer)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same(loaded, model):
    assert torch.equal(logits(loaded), logits(model))
    wanted, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    """Rewrite the weights as another tool would, without checksums."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, lambda ours: ours.pop("checksums"))


LAYER = "model.layers.0.mlp.up_proj"
