"""A layer packed for inference: its factors as panels, laid out once, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels.backends.cpu.panels import (
    in_range_of,
    op,
    order_of,
    pack_matrix,
    products_for,
    six_products_stay_faster,
)
from hylora_kernels.backends.shared.tracing import assume_constant_result
from hylora_kernels.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The factors of one layer as forward_packed wants them. Shared by whoever holds it; immutable.

    call:     "packed_layer" or "linear", the op; "plain", two torch products on P = [SVh; A] and
              Q = [U, alpha B], or one on the dense matrix.
    args:     what follows x in the op's call, up to `products`. For "packed_layer" that is the
              whole layer as one tensor, the bias, and N: a call with two tensors costs 3.7 us, one
              with six 8.6. For "plain" P, Q, the bias, and B itself, all but P may be None.
    products: as the ops take it.
    float32:  it is, and limbs hold it: torch's settings at the call have a say in `products`.
    """

    backend: ClassVar[str] = "cpu"

    call: str
    args: tuple
    products: int
    float32: bool
    dtype: torch.dtype
    shape: tuple[int]  # what x.shape[-1:] must be
    out_features: int
    rank: int
    lora_rank: int
    alpha: float
    adapted: bool
    bias: Tensor | None
    pivots: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """What holds the weights: the joined layer, panels, or P and Q; the bias is not among
        them."""
        first, second, _, *more = self.args
        weights = (first, second, *more) if self.call == "plain" else (first,)
        return [t for t in weights if t is not None]


def pack(weights: Weights) -> Packed | None:
    """The panels of factors that this backend supports. Bias and pivots are shared, not copied."""
    SVh, U, A, B, bias, alpha, pivots = weights
    K, out_features = weights.in_features, weights.out_features
    rank, lora_rank = weights.rank, weights.lora_rank
    matrices = [t.detach() for t in (SVh, U, A, B) if t is not None and t.numel()]
    dense = weights.is_dense and not lora_rank
    call = _layout(weights)
    plain_bias = None if bias is None else bias.detach()
    if dense:
        order_of(pivots, out_features)
        if call == "plain":
            args = (SVh.detach().clone(), None, plain_bias, None)
        else:
            args = (pack_matrix(matrices[0]), plain_bias, out_features)
    elif call == "plain":
        P, Q, *adapter = matrices
        P = torch.cat((P, *adapter[:1]))
        Q = torch.cat((Q, *(alpha * B for B in adapter[1:])), 1)
        args = (P, Q, plain_bias, adapter[1].clone() if lora_rank else None)
    elif pivots is None:
        P, Q = matrices[0], matrices[1]
        if lora_rank:  # one matrix of rank r + ra has less padding than two
            P, Q = torch.cat((matrices[0], matrices[2])), torch.cat((matrices[1], matrices[3]), 1)
        panels = (pack_matrix(P), None, pack_matrix(Q), None)
        layer = op("pack_layer")(*panels, None, K, rank, lora_rank, out_features, alpha)
        args = (layer, plain_bias, out_features)
    else:
        table, stream = order_of(pivots, out_features)
        P, Q, of_pivots = SVh.detach(), U.detach(), None
        if lora_rank:  # one matrix here, too; of B's part in the pivots a panel of its own
            others = stream[rank + -rank % 32 :]
            P, Q = torch.cat((P, A.detach())), torch.cat((Q, B.detach()[others]), 1)
            of_pivots = pack_matrix(F.pad(B.detach()[pivots.long()], (rank % 32, 0)))
        panels = (pack_matrix(P), None, pack_matrix(Q), of_pivots)
        layer = op("pack_layer")(*panels, table, K, rank, lora_rank, out_features, alpha)
        args = (layer, plain_bias, out_features)
    in_range = in_range_of(SVh.dtype, *((matrix, 1) for matrix in matrices))
    float32 = SVh.dtype == torch.float32 and in_range
    products = 0 if float32 else products_for(SVh.dtype, in_range)
    if float32 and six_products_stay_faster():
        products = 6
    return Packed(
        call=call,
        args=args,
        products=products,
        float32=float32,
        dtype=SVh.dtype,
        shape=(K,),
        out_features=out_features,
        rank=rank,
        lora_rank=lora_rank,
        alpha=alpha,
        adapted=A is not None,
        bias=bias,
        pivots=None if dense else pivots,
    )


def _layout(weights: Weights) -> str:
    """How a layer is packed: "packed_layer" or "linear" for panels, or "plain" where torch products
    are faster (the pair form and dense matrices; the pivoted form has panels alone)."""
    dense = weights.is_dense and not weights.lora_rank
    has_plain_layout = dense or weights.pivots is None
    # Of a thin matrix most of a panel is padding. 29 random shapes of at most 32 ranks: 0.92 of two
    # plain products' speed at one or two rows, 1.17 up to 64, 0.90 above; bfloat16 2 to 5. More
    # ranks with an eighth of padding or more: 0.82 to 0.95 (K = 1156, N = 103, r = 84, M = 2).
    K, N = weights.in_features, weights.out_features
    middle = weights.rank + weights.lora_rank
    is_thin = middle <= 32
    is_padded = 8 * (_padded(middle) * K + _padded(N) * middle) > 9 * middle * (K + N)
    if weights.SVh.dtype == torch.float32 and has_plain_layout and (is_thin or is_padded):
        return "plain"
    return "linear" if dense else "packed_layer"


def _padded(size: int) -> int:
    return size + -size % 32


def forward_packed(x: Tensor, packed: Packed) -> Tensor:
    """x [..., K] of packed.dtype -> y [..., N]. What a decoded token waits for: keep it short."""
    if packed.call == "plain":
        P, Q, bias, _ = packed.args
        return F.linear(x, P, bias) if Q is None else F.linear(F.linear(x, P), Q, bias)
    products = packed.products
    if packed.float32:
        products = _float32_products(products)
    if packed.call == "packed_layer":
        return torch.ops.hylora.cpu_packed_layer.default(x, *packed.args, products)
    return torch.ops.hylora.cpu_linear.default(x, *packed.args, products)


@assume_constant_result  # compiled code is guarded by torch's settings as it is
def _float32_products(most: int) -> int:
    products = products_for(torch.float32, True)
    return products if products == 3 else min(products, most)


def rows_packed(ids: Tensor, packed: Packed) -> Tensor:
    """ids int64 [...] -> [..., K]: rows of a dense matrix, an embedding lookup."""
    if packed.call == "plain":
        return F.embedding(ids, packed.args[0])
    K, N = packed.shape[0], packed.out_features
    try:
        return torch.ops.hylora.cpu_rows.default(packed.args[0], N, K, ids)
    except RuntimeError as error:
        if "ids must be in" not in str(error):
            raise
        low, high = int(ids.min()), int(ids.max())
        raise IndexError(f"ids must be in [0, {N}), got {low} to {high}") from None


def unpack(packed: Packed) -> Weights:
    """The weights as they were packed, bit for bit: new memory, but for
    bias and pivots, which are what was given (at rank N in the pivoted form equal to it)."""
    K, N, rank, lora_rank = packed.shape[0], packed.out_features, packed.rank, packed.lora_rank
    pivots, A, B = packed.pivots, None, None
    if packed.call == "linear" or (packed.call == "plain" and packed.args[1] is None):
        panels = packed.args[0]
        SVh = panels.clone() if packed.call == "plain" else op("unpack")(panels, N, K)
        U, pivots = SVh.new_empty(0, N), torch.arange(N, dtype=torch.int32)
    elif pivots is None:
        if packed.call == "plain":
            P, Q = packed.args[0], packed.args[1]
        else:
            P, _, Q, _ = _parts(packed.args[0])
        SVh, A = (part.clone() for part in P.split((rank, lora_rank)))
        U, B = (part.contiguous().clone() for part in Q.split((rank, lora_rank), 1))
        if packed.call == "plain" and lora_rank:
            B = packed.args[3].clone()
    else:
        P, _, Q, of_pivots = _parts(packed.args[0])
        SVh, U = P[:rank].clone(), Q[:, :rank].contiguous().clone()
        if lora_rank:
            A, B = P[rank:].clone(), P.new_empty(N, lora_rank)
            B[pivots.long()] = of_pivots[:, rank % 32 :]
            B[order_of(pivots, N)[1][rank + -rank % 32 :]] = Q[:, rank:]
    if not packed.adapted:
        A = B = None
    elif A is None:
        A, B = SVh.new_empty(0, K), SVh.new_empty(N, 0)
    return Weights(SVh, U, A, B, packed.bias, packed.alpha, pivots)


def _parts(layer: Tensor) -> list[Tensor]:
    """The matrices that were packed, in pack_layer's order, empty where there were none."""
    return [op("unpack_part")(layer, part) for part in range(4)]
