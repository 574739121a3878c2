"""The algebra as it stands on paper, never optimised: the tests judge every backend against it.

    pair      y = x SVh^T U^T + bias + alpha x A^T B^T
    pivoted   y = s + bias + alpha x A^T B^T,  s[:, pivots] = x SVh^T,  s[:, others] = x SVh^T U^T

x [M, K]; the weights' shapes are those of Weights. Any floating dtype; the tests use float64. The
pivoted form is PIFA's (arXiv:2501.19090): a matrix of rank r has r rows of which all others are
combinations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hylora_kernels.weights import Saved, Weights


def full_U(U: Tensor, pivots: Tensor | None) -> Tensor:
    """U [N, r] of the equivalent pair: identity rows at `pivots`, the coefficients elsewhere."""
    if pivots is None:
        return U
    others_count, rank = U.shape
    is_pivot = torch.zeros(others_count + rank, dtype=torch.bool, device=U.device)
    is_pivot[pivots.long()] = True
    full = U.new_empty(others_count + rank, rank)
    full[is_pivot] = torch.eye(rank, dtype=U.dtype, device=U.device)
    full[~is_pivot] = U
    return full


def dense_weight(weights: Weights) -> Tensor:
    """W [N, K], the one matrix that the whole layer multiplies by."""
    SVh, U, A, B, _, alpha, pivots = weights
    weight = full_U(U, pivots) @ SVh
    return weight if A is None else weight + alpha * (B @ A)


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra] = x A^T, which a backward needs besides x)."""
    SVh, U, A, B, bias, alpha, pivots = weights
    y = x @ SVh.T @ full_U(U, pivots).T
    h_a = x.new_empty(x.shape[0], 0) if A is None else x @ A.T
    if A is not None:
        y = y + alpha * (h_a @ B.T)
    return (y if bias is None else y + bias), h_a


def backward(dy: Tensor, saved: Saved, weights: Weights) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]); SVh and U are frozen."""
    (x, h_a), (SVh, U, A, B, _, alpha, pivots) = saved, weights
    dx = dy @ full_U(U, pivots) @ SVh
    if A is None:
        return dx, None, None, dy.sum(0)
    dh_a = alpha * (dy @ B)
    return dx + dh_a @ A, dh_a.T @ x, alpha * (dy.T @ h_a), dy.sum(0)
