"""Adaptation of a dense model to a text, before it is made smaller."""

from __future__ import annotations

from typing import Any

from torch import nn

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.recovery.finetune import FinetuneReport, finetune
from hylora_kernels.text.sources import Mix, Source


def adapt_dense(
    model: nn.Module,
    data: Source | Mix,
    tokenizer: object = None,
    *,
    lora_rank: int = 32,
    seed: int = 0,
    **options: Any,
) -> FinetuneReport:
    """Train plain LoRA of rank `lora_rank` on all linears of a dense model and fold it in, in
    place: its linears are nn.Linear again.

    data, tokenizer, options: finetune()'s.

    To adapt first costs no bytes; adapters trained on the quantised model would stay beside it.

    Raises the errors of add_adapters() and finetune(), and FloatingPointError if training stopped
    early.

        adapt_dense(model, "my.txt", steps=60)
    """
    add_adapters(model, lora_rank, seed=seed)
    report = finetune(model, data, tokenizer, seed=seed, **options)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, SVDLoRALinear):
            model.set_submodule(path, _linear(layer))
    if report.stopped:
        raise FloatingPointError(f"adapting to {report.text}: {report.stopped}")
    return report


def _linear(layer: SVDLoRALinear) -> nn.Linear:
    """The linear of a merged layer of full rank, whose SVh is the dense matrix."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.SVh.detach())
    linear.bias = layer.bias
    return linear.train(layer.training)
