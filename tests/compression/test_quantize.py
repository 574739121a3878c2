"""Quantising against a slow GPTQ in float64, on grids, at every width; errors in their unit."""

from __future__ import annotations

import pytest
import torch

from hylora_kernels.compression.quantize import error, quantize, quantize_each
from hylora_kernels.compression.whiten import factorize_whitened
from hylora_kernels.reference import dequantize
from hylora_kernels.weights import PLANES


def problem(n=24, k=130, seed=0):
    """W [n, k], and G [k, k] and C [n, n] of correlated inputs and gradients."""
    g = torch.Generator().manual_seed(seed)

    def gram(size):
        rows = torch.randn(4 * size, size, generator=g) * torch.logspace(0, -1.5, size)
        rows = rows @ torch.linalg.qr(torch.randn(size, size, generator=g)).Q
        return rows.T @ rows

    return torch.randn(n, k, generator=g), gram(k), gram(n)


@pytest.mark.parametrize("bits", PLANES)
def test_feedback_lowers_the_error_at_every_width(bits):
    W, G, C = problem()
    found = {m: quantize(W, bits, G, method=m) for m in ("gptq", "rtn")}
    for damping in ((0.0, 0.0), (1e-2, 1e-1)):
        gptq, rtn = (error(W - dequantize(q), G, C, damping) for q in found.values())
        assert gptq < rtn / 2


def test_error_of_dropped_components_is_the_sum_of_their_squares():
    W, G, C = problem(24, 40)
    factors = factorize_whitened("path", W, G, C)
    for rank in (3, 12, 20):
        E = W - factors.U[:, :rank] @ factors.SVh[:rank]
        assert error(E, G, C) == pytest.approx(factors.dropped(rank), rel=1e-3)


def test_one_sweep_gives_what_single_calls_give():
    W, G, _ = problem()
    found = quantize_each([W[:10], W[10:]], [3, 8], G)
    for part, by_width in zip((W[:10], W[10:]), found, strict=True):
        for bits, matrix in by_width.items():
            assert torch.equal(dequantize(matrix), dequantize(quantize(part, bits, G)))
