"""The algebra as it stands on paper, never optimised: the tests judge every backend against it.

    pair      y = x SVh^T U^T + bias + alpha x A^T B^T
    pivoted   y = s + bias + alpha x A^T B^T,  s[:, pivots] = x SVh^T,  s[:, others] = x SVh^T U^T

x [M, K]; the weights' shapes are those of Weights. Any floating dtype; the tests use float64. The
pivoted form is PIFA's (arXiv:2501.19090): a matrix of rank r has r rows of which all others are
combinations.

A quantised matrix stands for the matrix that dequantize makes of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels.weights import GROUP, PLANES, QuantizedMatrix, Saved, Weights


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


def quantized(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> QuantizedMatrix:
    """codes [n, k] and zeros [n, G] of any integer dtype, in 0 .. 2^bits - 1, scales [n, G] -> the
    matrix in its planes, scales rounded to float16. At 8 bits zeros is None."""
    rows, k = codes.shape
    by_zero = torch.full_like(scales, 128) if zeros is None else zeros
    padding = by_zero[:, -1:].to(codes.dtype).expand(rows, -k % GROUP)
    codes = torch.cat((codes, padding), 1).reshape(rows, -1, GROUP)
    zeros = None if zeros is None else pack_zero_points(zeros, bits)
    return QuantizedMatrix(pack_bits(codes, bits), scales.half(), zeros, bits, k)


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [n, k]. Exact in float32: a scale has 11 bits, code - zero 9. Else rounded once."""
    rows, groups = matrix.scales.shape
    codes, zeros = unpack_bits(matrix.codes, matrix.bits), zero_points(matrix)[..., None]
    exact = torch.promote_types(dtype, torch.float32)
    values = matrix.scales.to(exact)[..., None] * (codes.short() - zeros.short())
    return values.reshape(rows, groups * GROUP)[:, : matrix.k].to(dtype)


def zero_points(matrix: QuantizedMatrix) -> Tensor:
    """The zero points uint8 [n, G]."""
    if matrix.zeros is None:
        return torch.full_like(matrix.scales, 128, dtype=torch.uint8)
    flat = unpack_bits(matrix.zeros, matrix.bits).reshape(-1)
    return flat[: matrix.scales.numel()].reshape(matrix.scales.shape)


def pack_zero_points(zeros: Tensor, bits: int) -> Tensor:
    """zeros [n, G] of any integer dtype -> uint8 [ceil(n G / 64), 8 bits]."""
    flat = F.pad(zeros.reshape(-1), (0, -zeros.numel() % GROUP))
    return pack_bits(flat.reshape(-1, GROUP), bits)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """codes [..., 64] in 0 .. 2^bits - 1 -> uint8 [..., 8 bits], laid out as in QuantizedMatrix."""
    planes, done = [], 0
    for width in PLANES[bits]:
        parts = (codes >> done & (1 << width) - 1).unflatten(-1, (8 // width, 8 * width))
        shifts = torch.arange(0, 8, width, device=codes.device)[:, None]
        planes.append((parts.long() << shifts).sum(-2).to(torch.uint8))
        done += width
    return torch.cat(planes, -1)


def unpack_bits(planes: Tensor, bits: int) -> Tensor:
    """uint8 [..., 8 bits] -> codes uint8 [..., 64]."""
    codes, done = torch.zeros((), dtype=torch.uint8, device=planes.device), 0
    sizes = [8 * width for width in PLANES[bits]]
    for width, plane in zip(PLANES[bits], planes.split(sizes, -1), strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=planes.device)[:, None]
        parts = plane[..., None, :] >> shifts & (1 << width) - 1
        codes = codes | parts.flatten(-2) << done
        done += width
    return codes
