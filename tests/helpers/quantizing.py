"""Quantised matrices and layers with random codes."""

from __future__ import annotations

import torch
from torch import Tensor

from hylora_kernels.layers.quantized import dense_weights
from hylora_kernels.reference import dequantize, quantized
from hylora_kernels.weights import QuantizedMatrix, Weights

N, K, R, RA = 48, 100, 16, 4
FORMS = ("dense", "pair", "SVh", "U", "pivoted")


def random_matrix(n: int, k: int, bits: int, seed: int = 0) -> QuantizedMatrix:
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // 64)
    codes = torch.randint(0, 2**bits, (n, k), generator=g)
    zeros = None if bits == 8 else torch.randint(0, 2**bits, (n, groups), generator=g)
    scales = (1 + torch.rand(n, groups, generator=g)) / 2**bits
    return quantized(codes, scales, zeros, bits)


def random_weights(form: str, bias: bool = False) -> Weights:
    """form: "dense"; "pair", both of it quantised; "SVh" or "U", a pair with that one quantised;
    "pivoted"."""
    torch.manual_seed(0)
    b = torch.randn(N) if bias else None
    if form == "dense":
        return dense_weights(random_matrix(N, K, 4), b)
    others = N - R if form == "pivoted" else N
    SVh = torch.randn(R, K) if form == "U" else random_matrix(R, K, 8 if form == "pivoted" else 5)
    U = torch.randn(others, R) if form == "SVh" else random_matrix(others, R, 6)
    pivots = torch.arange(0, N, 3, dtype=torch.int32) if form == "pivoted" else None
    return Weights(SVh, U, torch.randn(RA, K), torch.randn(N, RA), b, 0.5, pivots)


def dequantized(
    weights: Weights, dtype: torch.dtype = torch.float64, factors: bool = True
) -> Weights:
    """The same in tensors of dtype; with factors=False the codes stay codes."""

    def of(value):
        if isinstance(value, QuantizedMatrix):
            return dequantize(value, dtype) if factors else value
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to(dtype) if floating else value

    return Weights(*map(of, weights))
