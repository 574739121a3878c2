"""Adapters on a whole model: added to dense linears, folded into compressed ones."""

from __future__ import annotations

from torch import nn

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.model.checkpoint import save_in_hylora_format
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.model.structure import as_matrix, linears


def add_adapters(
    model: nn.Module,
    lora_rank: int = 64,
    alpha: float = 1.0,
    lora_dropout: float = 0.0,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give every target linear a trainable adapter (A random, B zero) on its dense weight; in
    place, the same model.

    The dense weight becomes a pivoted base of rank N, the matrix itself, so plain LoRA runs through
    the same op. All else is frozen. Raises ValueError where the model has been compressed already
    or lora_rank is below 1.
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
    refuse_packed(model)
    targets = linears(model, include, exclude)
    for path, linear in targets.items():
        if isinstance(linear, SVDLoRALinear):
            raise ValueError(
                f"model must be dense to take adapters, but its layer {path} is an SVDLoRALinear"
            )
    for index, (path, linear) in enumerate(targets.items()):
        layer = SVDLoRALinear.from_dense(
            as_matrix(linear),
            lora_rank,
            bias=linear.bias,
            alpha=alpha,
            lora_dropout=lora_dropout,
            seed=seed + index,
        )
        model.set_submodule(path, layer.train(linear.training))
    return save_in_hylora_format(freeze_all_but_adapters(model))


def merge_adapters(model: nn.Module) -> nn.Module:
    """SVDLoRALinear.merge() on every layer; in place, the same model."""
    for module in model.modules():
        if isinstance(module, SVDLoRALinear):
            module.merge()
    return model
