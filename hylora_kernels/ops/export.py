"""The ops as plain products, which exporters get in their place.

torch.export keeps the ops, so an exported program runs our kernels. Its run_decompositions(), with
any table, traces the formulas below instead: only aten operations are left, which ONNX, OpenVINO,
ExecuTorch and TensorRT know. Batch and length stay dynamic; nothing reads a tensor's values.

A layer packed for inference has no such form, since the layout of its panels is one processor's:
restore_from_inference(model) comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.nn.functional import linear

from hylora_kernels.weights import Weights


def register(op_name: str, formula: Callable[..., Any], library: torch.library.Library) -> None:
    """Have run_decompositions() trace `formula`, which takes the op's arguments, for the op."""

    def rule(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict[str, Any] | None) -> Any:
        # torch.export itself traces what comes before dispatch; torch.compile isn't exporting.
        if mode.pre_dispatch or not torch.compiler.is_exporting():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return formula(*args, **(kwargs or {}))

    name = f"hylora::{op_name}"
    torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=library)


def forward(x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (y [..., N], h_a [M, ra] before alpha).

    operands: Weights in its order; SVh or U may be a module with a shape that multiplies by it.
    """
    weights = Weights(*operands)
    SVh, U, A, B, bias, alpha, pivots = weights
    y = _product(x, SVh)
    if pivots is None:
        y = _product(y, U)
    elif not weights.is_dense:
        parts = torch.cat((y, _product(y, U)), -1)
        y = parts.index_select(-1, _places(pivots, weights.out_features))
    rows = math.prod(x.shape[:-1])
    h_a = x.new_empty(rows, 0)
    if A is not None and B is not None:
        h_a = linear(x, A)
        y = y + alpha * linear(h_a, B)
        h_a = h_a.reshape(rows, weights.lora_rank)
    return (y if bias is None else y + bias), h_a


def backward(
    dy: Tensor,
    x: Tensor | None,
    h_a: Tensor | None,
    SVh: Tensor,
    U: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    alpha: float,
    pivots: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """dy [..., N] -> (dx [..., K], dA [ra, K], dB [N, ra], db [N]), [0] where not needed."""
    weights = Weights(SVh, U, A, B, None, alpha, pivots)
    lead, rows, K = dy.shape[:-1], math.prod(dy.shape[:-1]), weights.in_features
    need_dx, need_dA, need_dB, need_db = needs
    dy = dy.reshape(rows, weights.out_features)
    dx, dA, dB, db = (dy.new_empty(0) for _ in needs)
    dh_a = None if B is None else alpha * (dy @ B)
    if need_dx:
        dx = _to_h(dy, weights) @ SVh
        dx = (dx if dh_a is None else dx + dh_a @ A).reshape(*lead, K)
    if need_dA:
        dA = dh_a.T @ x.reshape(rows, K)
    if need_dB:
        dB = alpha * (dy.T @ h_a)
    if need_db:
        db = dy.sum(0)
    return dx, dA, dB, db


def _product(x: Tensor, matrix: Any) -> Tensor:
    return linear(x, matrix) if isinstance(matrix, Tensor) else matrix(x)


def _to_h(dy: Tensor, weights: Weights) -> Tensor:
    """dy [M, N] -> the gradient of h = x SVh^T [M, r]."""
    U, pivots, rank = weights.U, weights.pivots, weights.rank
    if pivots is None:
        return dy @ U
    if weights.is_dense:
        return dy
    by_part = torch.zeros_like(dy).index_copy(1, _places(pivots, weights.out_features), dy)
    return by_part[:, :rank] + by_part[:, rank:] @ U


def _places(pivots: Tensor, out_features: int) -> Tensor:
    """int64 [N]: the place of each output in the concatenation (pivots, others).

    Sums instead of a sort, which not every exporter has.
    """
    is_pivot = torch.zeros(out_features, dtype=torch.int64, device=pivots.device)
    is_pivot = is_pivot.scatter(0, pivots.long(), 1)
    pivots_up_to = is_pivot.cumsum(0)
    outputs = torch.arange(out_features, device=pivots.device)
    others = pivots.shape[0] + outputs - pivots_up_to
    return torch.where(is_pivot > 0, pivots_up_to - 1, others)
