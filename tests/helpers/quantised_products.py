"""Random quantised matrices, and the bound on the error of their products."""

from __future__ import annotations

import torch
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.weights import GROUP, QuantizedMatrix


def drawn(n: int, k: int, bits: int) -> QuantizedMatrix:
    """Random codes, scales and zero points; outputs of about 1."""
    groups = -(-k // GROUP)
    codes = torch.randint(2**bits, (n, k))
    zeros = None if bits == 8 else torch.randint(2**bits, (n, groups))
    scales = (0.5 + torch.rand(n, groups)) * 2 / 2**bits / k**0.5
    return reference.quantized(codes, scales, zeros, bits)


def assert_as_exact_as_eager(y: Tensor, x, matrix, bias=None, h_a=None, B=None) -> None:
    """y is no further from float64 than twice what eager is on the dequantised matrix."""

    def formula(dtype):
        W = reference.dequantize(matrix, dtype)
        given = [None if t is None else t.to(dtype) for t in (x, bias, h_a, B)]
        out = given[0] @ W.T
        out = out if bias is None else out + given[1]
        return out if h_a is None else out + given[2] @ given[3].T

    truth = formula(torch.float64)
    error = (y.double() - truth).abs().max()
    allowed = 2 * (formula(x.dtype).double() - truth).abs().max()
    # One rounding of the result, where the few numbers of eager happen to be exact.
    allowed = max(allowed, torch.finfo(x.dtype).eps / 2 * truth.abs().max())
    assert error <= allowed, f"{error:.2e}, {allowed:.2e} allowed"
