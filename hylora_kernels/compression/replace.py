"""Putting layers into a model and folding them: the only place that changes a model's modules."""

from __future__ import annotations

from torch import Tensor, nn

from hylora_kernels.compression.whiten import Factors
from hylora_kernels.layers.linear import SVDLoRALinear


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
