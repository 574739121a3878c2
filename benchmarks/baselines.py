"""The baselines of one layer on a CPU: functions of x and of weights in the layout that suits each.

a      naive eager: four products, as the formula reads
b      two products: P = [SVh; A] and Q = [U, alpha B] laid side by side beforehand
d      the same two through oneDNN with prepacked weights, as torch.compile's freezing does
dense  the layer that was compressed
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from layers import Shape, copies
from torch import Tensor

from hylora_kernels.weights import Weights


def naive(x, SVh, U, A, B, bias, alpha):
    y = x @ SVh.T @ U.T + bias
    return y if A is None else y + alpha * (x @ A.T @ B.T)


def two_products(x, P, Q, bias):
    return F.linear(F.linear(x, P), Q, bias)


def onednn(x, P, Q, bias):
    linear = torch.ops.mkldnn._linear_pointwise.default
    return linear(linear(x, P, None, "none", [], ""), Q, bias, "none", [], "")


def side_by_side(factors: Weights) -> tuple[Tensor, Tensor]:
    """(P [r + ra, K], Q [N, r + ra]) of the pair form."""
    SVh, U, A, B, _, alpha, _ = factors
    if A is None:
        return SVh, U
    return torch.cat((SVh, A)), torch.cat((U, (alpha * B.float()).to(U.dtype)), 1)


def prepacked(weight: Tensor, M: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, M)


def rivals(x: Tensor, shape: Shape, factors: Weights, regime: str, names=("a", "b", "d", "dense")):
    """name -> calls, one for each copy of its weights."""
    SVh, U, A, B, bias, alpha, _ = factors
    P, Q = side_by_side(factors)

    def calls(function, tensors, prepare=lambda *ts: ts):
        return [functools.partial(function, x, *prepare(*copy)) for copy in copies(tensors, regime)]

    def packed(P, Q, bias):
        return prepacked(P, len(x)), prepacked(Q, len(x)), bias

    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names = [name for name in names if name != "d"]  # this processor prepacks no bf16
    makers = {
        "a": lambda: calls(functools.partial(naive, alpha=alpha), (SVh, U, A, B, bias)),
        "b": lambda: calls(two_products, (P, Q, bias)),
        "d": lambda: calls(onednn, (P, Q, bias), packed),
        "dense": lambda: calls(F.linear, (_dense(shape, x.dtype), bias)),
    }
    return {name: makers[name]() for name in names}


@functools.lru_cache(maxsize=1)
def _dense(shape: Shape, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape.N, shape.K) / shape.K**0.5).to(dtype)
