"""A layer with quantised matrices, packed for inference: codes as the kernels read them.

Up to 64 rows of x are multiplied as 16-bit fixed point, a scale for every 64 numbers, by the codes
themselves: integers, so that sums are exact (csrc/cpu/kernels/fixed_point.h). What that loses is
below 2^-16 of the largest of 64 numbers, less than bfloat16's own rounding and than what rounding
the weights to bfloat16 or float16 would lose. Activations of 8 bits would be faster and lose 256
times as much, so there is no such path. For more rows the codes are widened into cache, panel by
panel: to 16-bit integers for bfloat16 and float16 without AVX512-BF16 or AMX, which multiply twice
as many of them as of floats; else to numbers of x's dtype, and from 1024 rows of float32 on for
torch's products, as plain layers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hylora_kernels.backends.cpu.library import op
from hylora_kernels.backends.cpu.packed import (
    Packed,
    PackedLayer,
    common,
    is_matrix,
    limbs,
    look_up,
    pack_plain,
)
from hylora_kernels.backends.cpu.panels import pack_matrix, pivot_table
from hylora_kernels.reference import pack_zero_points
from hylora_kernels.weights import GROUP, QuantizedMatrix, Weights


@dataclass(frozen=True, slots=True, eq=False)
class PackedQuantized(PackedLayer):
    """A layer of which SVh, U or both are quantised; its adapter stays apart from them.

    bits:      of SVh and of U, 0 for one that isn't quantised.
    is_matrix: it is a dense matrix alone.
    """

    bits: tuple[int, int]
    is_matrix: bool

    @classmethod
    def of(cls, weights: Weights, dtype: torch.dtype) -> PackedQuantized:
        """dtype: of x and y."""
        SVh, U, A, B, _, alpha, pivots = weights
        N, like = weights.out_features, torch.empty(0, dtype=dtype, device="cpu")
        table = None if pivots is None else pivot_table(pivots, N)  # raises for bad pivots
        dense = is_matrix(weights)
        adapter = {"adapter_shrink": None, "adapter_expand": None}
        if weights.lora_rank:
            sorted_B = B.detach() if table is None else table.sort_rows(B.detach())
            adapter = {
                "adapter_shrink": pack_matrix(A.detach().to(dtype)),
                "adapter_expand": pack_matrix(sorted_B.to(dtype)),
            }
        layer = op("pack_layer")(
            like,
            shrink=like if dense else _panels(SVh, dtype),
            expand=_panels(SVh if dense else U, dtype),
            pivot_table=None if table is None or dense else table.table,
            k=weights.in_features,
            r=0 if dense else weights.rank,
            ra=weights.lora_rank,
            n=N,
            alpha=alpha,
            **adapter,
        )
        own = {"layer": layer, "bits": (_bits(SVh), _bits(U)), "is_matrix": dense}
        return cls(**common(weights, dtype), **limbs(weights, dtype), **own)

    def rows(self, ids: Tensor) -> Tensor:
        (K,) = self.shape
        return look_up(lambda: op("packed_rows")(self.layer, K, ids), ids, self.out_features)

    def unpack(self) -> Weights:
        """SVh and U as they were packed, code for code."""
        rank, lora_rank, N, (K,) = self.rank, self.lora_rank, self.out_features, self.shape
        if self.is_matrix:
            pivots = torch.arange(N, dtype=torch.int32, device="cpu")
            return self._weights(self._factor(2, N, K), self.layer.new_empty(0, N), pivots=pivots)
        pivots = self.pivots
        SVh, U = (
            self._factor(0, rank, K),
            self._factor(2, N - (0 if pivots is None else rank), rank),
        )
        if not lora_rank:
            return self._weights(SVh, U, pivots=pivots)
        A, B = (op("unpack_part")(self.layer, part) for part in (1, 3))
        if pivots is not None:
            outputs = pivot_table(pivots, N).outputs
            sorted_B, B = B, B.new_empty(N, lora_rank)
            B[outputs[outputs < N]] = sorted_B[outputs < N]
        return self._weights(SVh, U, A, B, pivots)

    def _factor(self, part: int, n: int, k: int) -> Any:
        """SVh or U: part 0 or 2 of the layer."""
        bits = self.bits[0 if self.is_matrix else part // 2]
        if not bits:
            return op("unpack_part")(self.layer, part)
        groups = -(-k // GROUP)
        codes = torch.empty(n, groups, 8 * bits, dtype=torch.uint8, device="cpu")
        scales = torch.empty(n, groups, dtype=torch.float16, device="cpu")
        zeros = None if bits == 8 else torch.empty(n, groups, dtype=torch.uint8, device="cpu")
        op("unpack_quantized")(self.layer, part, bits, codes, scales, zeros)
        planes = None if zeros is None else pack_zero_points(zeros, bits)
        return QuantizedMatrix(codes, scales, planes, bits, k)


def pack(
    weights: Weights, dtype: torch.dtype | None = None, for_group: bool = False
) -> Packed | None:
    """Weights that this backend supports, packed, without the bias; dtype: of x."""
    if weights.is_quantized:
        return PackedQuantized.of(weights, dtype)
    return pack_plain(weights)


def _bits(matrix: Any) -> int:
    return matrix.bits if isinstance(matrix, QuantizedMatrix) else 0


def _panels(matrix: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(matrix, QuantizedMatrix):
        codes, scales, zeros = matrix.codes, matrix.scales, matrix.zeros
        tensors = (None if t is None else t.detach().contiguous() for t in (codes, scales, zeros))
        return op("pack_quantized")(*tensors, matrix.bits, matrix.k)
    return pack_matrix(matrix.detach().to(dtype))
