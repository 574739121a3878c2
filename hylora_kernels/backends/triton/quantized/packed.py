"""A layer with quantised matrices packed for inference: as it is stored, read by launch.py.

A dense matrix is one launch, with its adapter's second product and the bias in it; a pair is two,
one for each factor that is quantised; in the pivoted form torch puts the outputs in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels.backends.shared import torch_products
from hylora_kernels.backends.triton.quantized import launch
from hylora_kernels.backends.triton.quantized.launch import Words
from hylora_kernels.weights import QuantizedMatrix, Weights


@dataclass(frozen=True, slots=True, eq=False)
class PackedQuantizedLayer:
    """Immutable, so that modules can share one. The bias is no part of it.

    SVh, U: Words, or a Tensor of dtype where the layer's is none. U is None for a dense matrix.
    A:      [ra, K] of dtype, None without an adapter or at rank 0; aB: alpha B [N, ra].
    B:      [N, ra], as it was given.
    order:  int64 [N]: the place of each output in (pivots, others); None but in the pivoted form.
    """

    backend: str
    device_type: str
    dtype: torch.dtype
    shape: tuple[int]  # of x's last dim: (K,)
    bias_shape: tuple[int]  # (N,)
    SVh: Words | Tensor
    U: Words | Tensor | None
    A: Tensor | None
    B: Tensor | None
    aB: Tensor | None
    alpha: float
    pivots: Tensor | None
    order: Tensor | None

    @property
    def out_features(self) -> int:
        return self.bias_shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that hold the weights, without the bias."""
        found = []
        for matrix in (self.SVh, self.U, self.A, self.B, self.aB):
            found += matrix.tensors if isinstance(matrix, Words) else [matrix]
        return [t for t in found if t is not None]

    def forward(self, x: Tensor, bias: Tensor | None, by_backend: object = None) -> Tensor:
        """x [..., K] and bias [N] of dtype -> y [..., N]."""
        h_a = None if self.aB is None else F.linear(x, self.A)
        if self.U is None:
            return _product(x, self.SVh, bias, h_a, self.aB)
        h = _product(x, self.SVh)
        if self.order is None:
            return _product(h, self.U, bias, h_a, self.aB)
        y = torch.cat((h, _product(h, self.U)), -1).index_select(-1, self.order)
        return _plus_adapter(y if bias is None else y + bias, h_a, self.aB)

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., K]: rows of a dense matrix."""
        return launch.rows(ids, self.SVh, self.dtype)

    def unpack(self) -> Weights:
        """The weights as they were packed, bit for bit, without the bias; codes and scales are not
        copied."""
        SVh, U = (m.matrix if isinstance(m, Words) else m for m in (self.SVh, self.U))
        if U is None:
            U = torch.empty(0, SVh.shape[0], dtype=self.dtype, device=self.SVh.device)
        return Weights(SVh, U, self.A, self.B, None, self.alpha, self.pivots)


def pack(weights: Weights, dtype: torch.dtype) -> PackedQuantizedLayer:
    """The weights packed; SVh, U or both are a QuantizedMatrix. dtype: of x and y.

    Raises ValueError for pivots that aren't strictly ascending within [0, N).
    """
    _, _, A, B, _, alpha, pivots = weights
    N, order = weights.out_features, None
    if pivots is not None:
        order = torch_products.output_order(pivots, N - weights.rank).clone()
    SVh = _packed(weights.SVh, dtype)
    A, B = (None if t is None else t.detach().to(dtype).contiguous() for t in (A, B))
    return PackedQuantizedLayer(
        backend="triton",
        device_type=SVh.device.type,
        dtype=dtype,
        shape=(weights.in_features,),
        bias_shape=(N,),
        SVh=SVh,
        U=None if weights.is_dense else _packed(weights.U, dtype),
        A=A,
        B=B,
        aB=alpha * B if weights.lora_rank else None,
        alpha=alpha,
        pivots=pivots,
        order=None if weights.is_dense else order,
    )


def _packed(matrix: QuantizedMatrix | Tensor, dtype: torch.dtype) -> Words | Tensor:
    if isinstance(matrix, QuantizedMatrix):
        return Words.of(matrix)
    return matrix.detach().to(dtype)


def _product(
    x: Tensor,
    W: Words | Tensor,
    bias: Tensor | None = None,
    h_a: Tensor | None = None,
    B: Tensor | None = None,
) -> Tensor:
    """x W^T + h_a B^T + bias."""
    if isinstance(W, Words):
        return launch.linear(x, W, bias, h_a, B)
    return _plus_adapter(F.linear(x, W, bias), h_a, B)


def _plus_adapter(y: Tensor, h_a: Tensor | None, B: Tensor | None) -> Tensor:
    return y if h_a is None or B is None else y + F.linear(h_a, B)
