"""Putting layers into a model and folding them: the only place that changes a model's modules."""

from __future__ import annotations

from torch import Tensor, nn

from hylora_kernels.compression.whiten import Factors
from hylora_kernels.inference.optimize import refuse_packed
from hylora_kernels.layers.linear import SVDLoRALinear, freeze_all_but_adapters
from hylora_kernels.model.checkpoint import adopt
from hylora_kernels.model.structure import as_matrix, linears


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def build_layer(
    linear: nn.Module,
    factors: Factors,
    rank: int,
    lora_rank: int,
    *,
    U: Tensor | None = None,
    **options,
) -> SVDLoRALinear:
    """The layer for `linear`: the factors' first `rank` components as its base, the next
    `lora_rank` as its adapter.

    U float32 [N, rank + lora_rank] ([N, rank] under init="classic") takes the place of the factors'
    own where it was refitted.
    options: form, init and seed of SVDLoRALinear.from_product.
    """
    total, weight = rank + lora_rank, linear.weight
    U = factors.U[:, :total] if U is None else U
    layer = SVDLoRALinear.from_product(
        U, factors.SVh[:total], rank, lora_rank, bias=linear.bias, dtype=weight.dtype, **options
    )
    return layer.to(weight.device).train(linear.training)


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
        put(model, path, layer.train(linear.training))
    return adopt(freeze_all_but_adapters(model))


def merge_adapters(model: nn.Module) -> nn.Module:
    """SVDLoRALinear.merge() on every layer; in place, the same model."""
    for module in model.modules():
        if isinstance(module, SVDLoRALinear):
            module.merge()
    return model
