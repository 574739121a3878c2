"""Quantised layers for an ONNX graph: their codes stay codes, read by ONNX Runtime's MatMulNBits.

The operator knows groups of 64 weights along the input, as QuantizedMatrix has them, in 4 or 8
bits. Codes of 2 and 3 bits are written as 4, of 5 and 6 as 8: larger files, the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels import ops_export, reference
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedFactor, QuantizedLinear
from hylora_kernels.weights import GROUP


class MatMulNBits(nn.Module):
    """x [..., k] -> x W^T [..., n] for the W [n, k] of a QuantizedFactor.

    codes:  uint8 [n, G, 8 bits]: of 4 bits two in a byte, the first in its lower half.
    scales: [n G], of the dtype of x. zeros: uint8 [n ceil(G / 2)] or [n G], as codes.
    """

    def __init__(self, factor: QuantizedFactor):
        super().__init__()
        matrix = factor.matrix
        self.shape, self.bits = factor.shape, 4 if matrix.bits <= 4 else 8
        zeros = reference.zero_points(matrix)
        packed = _in_bytes(reference.unpack_bits(matrix.codes, matrix.bits), self.bits)
        self.register_buffer("codes", packed)
        self.register_buffer("scales", matrix.scales.to(factor.dtype).flatten())
        self.register_buffer("zeros", _in_bytes(zeros, self.bits).flatten())

    def forward(self, x: Tensor) -> Tensor:
        n, k = self.shape
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales, self.zeros),
            {"K": k, "N": n, "bits": self.bits, "block_size": GROUP},
            dtype=x.dtype,
            shape=(*x.shape[:-1], n),
            version=1,
        )


class _Linear(nn.Module):
    """A QuantizedLinear by MatMulNBits."""

    def __init__(self, layer: QuantizedLinear, made: dict[int, MatMulNBits]):
        super().__init__()
        for name in ("SVh", "U"):
            matrix = getattr(layer, name)
            is_codes = isinstance(matrix, QuantizedFactor)
            setattr(self, name, _product(matrix, made) if is_codes else matrix)
        dtype = layer.SVh.dtype
        self.A, self.B = (
            None if t is None else nn.Parameter(t.to(dtype)) for t in (layer.A, layer.B)
        )
        self.bias, self.alpha = layer.bias, layer.alpha
        self.register_buffer("pivots", layer.pivots)

    def forward(self, x: Tensor) -> Tensor:
        A, B = (None if t is None else t.to(x.dtype) for t in (self.A, self.B))
        operands = (self.SVh, self.U, A, B, self.bias, self.alpha, self.pivots)
        return ops_export.forward(x, *operands)[0]


class _Embedding(nn.Module):
    """A QuantizedEmbedding on the bytes of MatMulNBits, which its tied head reads as well."""

    def __init__(self, factor: QuantizedFactor, head: MatMulNBits):
        super().__init__()
        self.head, self.k = head, factor.k
        self.register_buffer("scales", factor.matrix.scales.to(factor.dtype))
        self.register_buffer("zeros", reference.zero_points(factor.matrix))

    def forward(self, ids: Tensor) -> Tensor:
        flat, dtype = ids.flatten(), self.scales.dtype
        tables = (self.head.codes, self.scales, self.zeros)
        codes, scales, zeros = (t.index_select(0, flat).to(dtype) for t in tables)
        if self.head.bits == 4:  # divided, not shifted: some runtimes shift no bytes
            upper = (codes / 16).floor()
            codes = torch.stack((codes - 16 * upper, upper), -1).flatten(-2)
        values = (codes - zeros[..., None]) * scales[..., None]
        return values.flatten(-2)[:, : self.k].reshape(*ids.shape, self.k)


@contextmanager
def codes_for_onnx(model: nn.Module) -> Iterator[None]:
    """In the block the quantised layers of `model` are traced as MatMulNBits."""
    made: dict[int, MatMulNBits] = {}
    kinds = (QuantizedLinear, QuantizedEmbedding)
    named = model.named_modules(remove_duplicate=False)
    layers = {path: module for path, module in named if isinstance(module, kinds)}
    try:
        for path, layer in layers.items():
            if isinstance(layer, QuantizedEmbedding):
                traced = _Embedding(layer.matrix, _product(layer.matrix, made))
            else:
                traced = _Linear(layer, made)
            model.set_submodule(path, traced)
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def _product(factor: QuantizedFactor, made: dict[int, MatMulNBits]) -> MatMulNBits:
    """One MatMulNBits for all that hold the factor."""
    if id(factor) not in made:
        made[id(factor)] = MatMulNBits(factor)
    return made[id(factor)]


def _in_bytes(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., m] -> bytes [..., m], or of 4 bits [..., ceil(m / 2)]."""
    if bits == 8:
        return codes
    pairs = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4
