"""The models that gpu_models.py times: a dense one from a configuration, compressed ones beside it.

All weights are random and made on the device. A compressed model is a dense one whose linears (all
but the output head) are SVDLoRALinears with random factors; everything else is shared with it.
"""

from __future__ import annotations

import copy

import torch
from layers import kept_rank
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hylora_kernels import reference
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.backends.triton.config import BACKWARD, FORWARD, Problem
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.machine import tune
from hylora_kernels.model.structure import linears
from hylora_kernels.weights import Weights

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
# vocab_size, tie_word_embeddings
SHAPES = {
    "tinyllama": (2048, 5632, 22, 32, 4, 32000, False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "7b": (4096, 11008, 32, 32, 32, 32000, False),
    "tiny": (128, 192, 1, 4, 2, 96, False),
}
FORMS = ("pivoted", "pair")
DTYPE = torch.bfloat16


def build(name: str, device: torch.device) -> nn.Module:
    """A dense model with random weights, in eval()."""
    hidden, inner, depth, heads, kv_heads, words, tied = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        pad_token_id=None,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return model.requires_grad_(False).eval()


def sharing_copy(model: nn.Module) -> nn.Module:
    """Modules of its own that hold the model's very tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def compressed(dense: nn.Module, keep: float, form: str, lora_rank: int) -> nn.Module:
    """The dense model with random factors in the place of its linears; all else is shared."""
    model = sharing_copy(dense)
    for path, linear in linears(model).items():
        K, N = linear.in_features, linear.out_features
        rank = kept_rank(K, N, keep, form) - lora_rank
        kind = {"device": linear.weight.device, "dtype": DTYPE}
        layer = SVDLoRALinear(K, N, rank, lora_rank, bias=False, form=form, **kind)
        if layer.pivots is not None:
            drawn = torch.randperm(N, device=linear.weight.device)[:rank]
            layer.pivots.copy_(drawn.sort().values)
        if lora_rank:
            nn.init.normal_(layer.B, std=lora_rank**-0.5)
        model.set_submodule(path, layer.eval())
    return model.requires_grad_(False)


def check_layer(model: nn.Module, name: str) -> float:
    """Relative error of a linear against float64, on 16 rows; FloatingPointError from 2 % on."""
    layer = next(iter(linears(model).values()))
    if not isinstance(layer, SVDLoRALinear):
        return 0.0
    x = torch.randn(16, layer.in_features, device=layer.SVh.device).to(DTYPE)
    wide = [None if t is None else t.double() for t in (layer.SVh, layer.U, layer.A, layer.B)]
    weights = Weights(*wide, alpha=layer.alpha, pivots=layer.pivots)
    expected = reference.forward(x.double(), weights)[0]
    error = float((layer(x).double() - expected).norm() / expected.norm())
    if not error < 2e-2:
        raise FloatingPointError(f"a layer of {name} is wrong: relative error {error:.1e}")
    return error


def has_adapter(model: nn.Module) -> bool:
    layers = (layer for layer in model.modules() if isinstance(layer, SVDLoRALinear))
    return any(layer.lora_rank for layer in layers)


def weight_bytes(model: nn.Module) -> int:
    return sum(
        t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )


def compile_ahead(
    models: list[nn.Module], rows: list[int], training_rows: list[int], device: torch.device
) -> None:
    """Compile the launches of these models' layers on all cores: one by one each takes seconds.

    rows, training_rows: rows of x that a forward and a backward will see.
    """
    name = torch.cuda.get_device_name(device)
    problems = {}
    for layer in (layer for model in models for layer in linears(model).values()):
        if not isinstance(layer, SVDLoRALinear):
            continue
        sizes = (layer.in_features, layer.out_features, layer.rank, layer.lora_rank)
        for direction, counts in ((FORWARD, rows), (BACKWARD, training_rows)):
            for M in counts:
                problems[Problem(M, *sizes, DTYPE, layer.pivots is not None, direction)] = None

    def configs(problem: Problem, target) -> list:
        return [
            dispatch.tuned_or_default(problem, target, name, captured) for captured in (True, False)
        ]

    tune.compile_all(list(problems), device, dispatch.target_of(device), configs)
