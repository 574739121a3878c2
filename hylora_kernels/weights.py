"""The weights of one layer as one value, the form in which every backend takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUP = 64  # Weights along the input that share a scale and a zero point.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # bits -> widths, low first


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix [n, k] of integer codes, in groups of 64 along the input:

        W[row, i] = scales[row, i // 64] * (code[row, i] - zero[row, i // 64])

    codes:  uint8 [n, G, 8 bits], G = ceil(k / 64): each group's codes as bit planes, low bits first
            (PLANES). A plane of w bits takes 8 w bytes; byte b holds the codes b, b + 8 w,
            b + 16 w ... of the group, the first in its lowest bits. Codes behind k stand for 0.
    scales: float16 [n, G], finite and at least 0.
    zeros:  uint8 [ceil(n G / 64), 8 bits]: the zero points [n, G] in one row, as planes like codes;
            None at 8 bits, where every zero point is 128.
    bits:   a key of PLANES.
    k:      the number of inputs.

    reference.dequantize and reference.quantized give its meaning.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    k: int

    @property
    def shape(self) -> torch.Size:
        """[n, k]."""
        return torch.Size((self.codes.shape[0], self.k))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)


@dataclass(slots=True, eq=False)
class Weights:
    """The terms of y = x SVh^T U^T + bias + alpha x A^T B^T besides x, in svd_lora_linear's order.

    SVh:    [r, K], a Tensor; a QuantizedMatrix in a layer's own weights and where they are packed.
    U:      [N, r]; [N - r, r] in the pivoted form; as SVh.
    A, B:   [ra, K] and [N, ra], or both None.
    bias:   [N] or None.
    alpha:  the LoRA scale.
    pivots: int32 [r], ascending, in the pivoted form; else None.

    Nobody writes to its fields; it is not frozen, since that would take four times as long to make
    and one is made for every call. Iterating gives the op's flat arguments:
    `svd_lora_linear(x, *weights)`. A named tuple would be shorter, but torch 2.10 cannot trace a
    property of one.
    """

    SVh: Any
    U: Any
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    alpha: float = 1.0
    pivots: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.SVh, self.U, self.A, self.B, self.bias, self.alpha, self.pivots))

    @property
    def rank(self) -> int:
        """r."""
        return self.SVh.shape[0]

    @property
    def lora_rank(self) -> int:
        """ra, 0 without an adapter."""
        return 0 if self.A is None else self.A.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.SVh.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.U.shape[0] + (0 if self.pivots is None else self.SVh.shape[0])

    @property
    def is_dense(self) -> bool:
        """The pivoted form at rank N: SVh is the whole base matrix [N, K] and U is empty."""
        return self.pivots is not None and self.U.shape[0] == 0

    @property
    def is_empty(self) -> bool:
        """The base has no rank, no inputs or no outputs, so that its products have no terms."""
        return 0 in self.SVh.shape or (self.pivots is None and self.U.shape[0] == 0)

    @property
    def is_quantized(self) -> bool:
        """SVh, U or both are a QuantizedMatrix."""
        return isinstance(self.SVh, QuantizedMatrix) or isinstance(self.U, QuantizedMatrix)

    @property
    def factor_bytes(self) -> int:
        """Bytes of SVh, U, A and B."""
        return sum(t.nbytes for t in (self.SVh, self.U, self.A, self.B) if t is not None)


class Saved(NamedTuple):
    """The tensors that a forward keeps for its backward.

    x:   [M, K], read for dA only; None where that is not needed.
    h_a: [M, ra] = x A^T, before alpha, read for dB only; None where that is not needed.
    """

    x: Tensor | None
    h_a: Tensor | None


class Needs(NamedTuple):
    """The gradients that a backward is asked for."""

    dx: bool
    dA: bool
    dB: bool
    db: bool
