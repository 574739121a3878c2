"""Layers packed for inference: packed_linear, packed_group and packed_embedding, without gradients.

They call what backends.pack made. The ops beneath, `hylora::cpu_*` and `hylora::<gpu>_packed`, have
their fake kernels in backends/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hylora_kernels import backends
from hylora_kernels.ops.checks import CASTABLE, refuse_forward_mode


def packed_linear(x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
    """x [..., K] -> y [..., N]: svd_lora_linear without gradients, by what backends.pack made.

    bias: [N] of the packed dtype, or None.

    A decoded token waits for this call, so the checks are few. Under torch.autocast the products
    are the packed dtype's, x is cast to it and y to the autocast dtype, which is that of any linear
    there. Raises TypeError or ValueError naming x or bias, RuntimeError if one needs a gradient.
    """
    if bias is not None:
        _check_packed_bias(bias, packed)
    kind = packed.device_type  # asking for x.device.type takes three times as long
    if torch.is_autocast_enabled(kind) and x.dtype in CASTABLE:
        with torch.autocast(kind, enabled=False):
            y = packed_linear(x.to(packed.dtype), packed, bias)
        return y.to(torch.get_autocast_dtype(kind))
    if x.dtype != packed.dtype or x.requires_grad or x.shape[-1:] != packed.shape:
        x = _as_packed(x, packed)
    if forward_ad._current_level >= 0:
        refuse_forward_mode({"x": x})
    return backends.forward_packed(x, packed, bias)


def packed_group(x: Tensor, group: Any, biases: Sequence[Tensor | None] = ()) -> Tensor:
    """x [..., K] -> y [..., group.width]: packed_linear of layers on one x, side by side.

    group: made by backends.group. biases: [N] of the packed dtype or None each; empty for none.
    """
    first = group.members[0]
    for packed, bias in zip(group.members, biases, strict=False):
        if bias is not None:
            _check_packed_bias(bias, packed)
    kind = first.device_type
    if torch.is_autocast_enabled(kind) and x.dtype in CASTABLE:
        with torch.autocast(kind, enabled=False):
            y = packed_group(x.to(first.dtype), group, biases)
        return y.to(torch.get_autocast_dtype(kind))
    if x.dtype != first.dtype or x.requires_grad or x.shape[-1:] != first.shape:
        x = _as_packed(x, first)
    if forward_ad._current_level >= 0:
        refuse_forward_mode({"x": x})
    return backends.forward_group(x, group, biases)


def packed_embedding(ids: Tensor, packed: Any) -> Tensor:
    """ids int32 or int64 [...] -> [..., K]: rows of a dense matrix that backends.pack packed.

    Raises TypeError for ids of another dtype, IndexError for ids out of range.
    """
    if ids.dtype != torch.int64:
        if ids.dtype != torch.int32:
            raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
        ids = ids.long()
    return backends.rows_packed(ids, packed)


def _refuse_gradient(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, but a layer packed for inference has no backward: "
            "restore_from_inference(model) first, or run it under torch.no_grad()"
        )


def _check_packed_bias(bias: Tensor, packed: Any) -> None:
    if bias.requires_grad:
        _refuse_gradient("bias")
    if bias.dtype != packed.dtype:
        raise TypeError(f"bias must have the packed layer's dtype {packed.dtype}, got {bias.dtype}")
    if bias.shape != packed.bias_shape:
        N = packed.out_features
        raise ValueError(f"bias must be [N] = [{N}] (N from U), got {list(bias.shape)}")


def _as_packed(x: Tensor, packed: Any) -> Tensor:
    if x.requires_grad:
        _refuse_gradient("x")
    if x.shape[-1:] != packed.shape:
        K = packed.shape[0]
        raise ValueError(f"x must be [..., K] = [..., {K}] (K from SVh), got {list(x.shape)}")
    if x.dtype == packed.dtype:
        return x
    raise TypeError(f"x must have the packed layer's dtype {packed.dtype}, got {x.dtype}")
