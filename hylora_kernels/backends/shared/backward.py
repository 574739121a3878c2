"""The steps of a backward pass, the same in every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hylora_kernels.weights import Needs, Saved, Weights

# (dy [M, N], weights) -> (dx [M, K], dh_a [M, ra] = alpha dy B, or None without an adapter)
InputGradient = Callable[[Tensor, Weights], tuple[Tensor, Tensor | None]]
# (dh_a [M, ra] or None, x, h_a [M, ra] or None, dy, alpha, whether db is needed)
#   -> (dA [ra, K] = dh_a^T x, dB [N, ra] = alpha dy^T h_a, db [N] where it came along),
# dA None without dh_a, dB None without h_a
AdapterGradients = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def backward(
    dy: Tensor,
    saved: Saved,
    weights: Weights,
    needs: Needs,
    input_gradient: InputGradient,
    adapter_gradients: AdapterGradients,
) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    dx = dA = dB = db = dh_a = None
    if needs.dx:
        dx, dh_a = input_gradient(dy, weights)
    if weights.A is not None and not weights.lora_rank:
        dA, dB = torch.empty_like(weights.A), torch.empty_like(weights.B)
    elif needs.dA or needs.dB:
        if needs.dA and dh_a is None:
            dh_a = weights.alpha * (dy @ weights.B)
        left = (dh_a, saved.x) if needs.dA else (None, None)
        h_a = saved.h_a if needs.dB else None
        dA, dB, db = adapter_gradients(*left, h_a, dy, weights.alpha, needs.db and needs.dB)
    if needs.db and db is None:
        db = dy.sum(0)
    return dx, dA if needs.dA else None, dB if needs.dB else None, db
