"""Quantised layers as graphs of other runtimes hold them: bytes, a scale and a zero point for 64.

ONNX Runtime multiplies by them with its operator MatMulNBits, which knows groups of 64 weights
along the input, as QuantizedMatrix has them, in 4 or 8 bits. Codes of 2 and 3 bits are written as
4, of 5 and 6 as 8: larger files, the same numbers. In other graphs arithmetic makes the matrix of
its codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels import reference
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedFactor, QuantizedLinear
from hylora_kernels.ops import export
from hylora_kernels.weights import GROUP


class Codes(nn.Module):
    """The W [n, k] of a QuantizedFactor; called with x [..., k] it gives x W^T [..., n].

    codes:  uint8 [n, G, 8 bits]; of 4 bits two in a byte, the first in its lower half.
    scales: [n, G], of the dtype of x. zeros: uint8 [n, G].
    packed_zeros: for MatMulNBits, zeros as codes [n, ceil(G / 2)] or [n, G]; None without it.
    """

    packed_zeros: Tensor | None

    def __init__(self, factor: QuantizedFactor, for_onnx: bool):
        super().__init__()
        matrix = factor.matrix
        self.shape, self.bits = factor.shape, 4 if matrix.bits <= 4 else 8
        zeros = reference.zero_points(matrix)
        packed = _in_bytes(reference.unpack_bits(matrix.codes, matrix.bits), self.bits)
        self.register_buffer("codes", packed)
        self.register_buffer("scales", matrix.scales.to(factor.dtype))
        self.register_buffer("zeros", zeros)
        packed_zeros = _in_bytes(zeros, self.bits) if for_onnx else None
        self.register_buffer("packed_zeros", packed_zeros)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed_zeros is None:
            return F.linear(x, _values(self.codes, self.scales, self.zeros)[:, : self.shape[1]])
        n, k = self.shape
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales, self.packed_zeros),
            {"K": k, "N": n, "bits": self.bits, "block_size": GROUP},
            dtype=x.dtype,
            shape=(*x.shape[:-1], n),
            version=1,
        )

    def rows(self, ids: Tensor) -> Tensor:
        """W[ids], int64 [...] -> [..., k]."""
        tables, k = (self.codes, self.scales, self.zeros), self.shape[1]
        values = _values(*(table.index_select(0, ids.flatten()) for table in tables))
        return values[:, :k].reshape(*ids.shape, k)


class _Linear(nn.Module):
    """A QuantizedLinear on Codes."""

    def __init__(self, layer: QuantizedLinear, SVh: Tensor | Codes, U: Tensor | Codes):
        super().__init__()
        self.SVh, self.U = SVh, U
        self.A, self.B, self.bias, self.alpha = layer.A, layer.B, layer.bias, layer.alpha
        self.register_buffer("pivots", layer.pivots)

    def forward(self, x: Tensor) -> Tensor:
        A, B = (None if t is None else t.to(x.dtype) for t in (self.A, self.B))
        operands = (self.SVh, self.U, A, B, self.bias, self.alpha, self.pivots)
        return export.forward(x, *operands)[0]


class _Embedding(nn.Module):
    """A QuantizedEmbedding on Codes, which its tied head reads as well."""

    def __init__(self, matrix: Codes):
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids)


@contextmanager
def codes_as_bytes(model: nn.Module, for_onnx: bool) -> Iterator[None]:
    """In the block the quantised layers of `model` are ones on Codes, to be traced."""
    made: dict[int, Codes] = {}

    def of(matrix: Tensor | QuantizedFactor) -> Tensor | Codes:
        if not isinstance(matrix, QuantizedFactor):
            return matrix
        if id(matrix) not in made:
            made[id(matrix)] = Codes(matrix, for_onnx)
        return made[id(matrix)]

    kinds = (QuantizedLinear, QuantizedEmbedding)
    named = model.named_modules(remove_duplicate=False)
    layers = {path: module for path, module in named if isinstance(module, kinds)}
    try:
        for path, layer in layers.items():
            if isinstance(layer, QuantizedEmbedding):
                model.set_submodule(path, _Embedding(of(layer.matrix)))
            else:
                model.set_submodule(path, _Linear(layer, of(layer.SVh), of(layer.U)))
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def _values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """codes uint8 [n, G, 64] or [n, G, 32], two in a byte; scales and zeros [n, G] -> [n, 64 G]."""
    codes = codes.to(scales.dtype)
    if codes.shape[-1] < GROUP:  # divided, not shifted: few runtimes shift bytes
        upper = (codes / 16).floor()
        codes = torch.stack((codes - 16 * upper, upper), -1).flatten(-2)
    return ((codes - zeros.to(scales.dtype)[..., None]) * scales[..., None]).flatten(1)


def _in_bytes(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., m] -> bytes [..., m], or of 4 bits [..., ceil(m / 2)]."""
    if bits == 8:
        return codes
    pairs = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4
