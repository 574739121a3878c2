"""A layer packed for inference, in one of three ways, and the way back to its weights.

    PackedLayer    shrink and expand in the fused kernels, all weights in one tensor of panels
    PackedMatrix   a dense matrix, or the pivoted form at rank N without an adapter, in panels
    TorchProducts  P = [SVh; A] and Q = [U, alpha B] for torch's products, where these are faster

Each has forward, rows, unpack and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels.backends.cpu.library import REFUSAL, op
from hylora_kernels.backends.cpu.limbs import (
    fit_limbs,
    limb_products_for,
    limb_products_of_packed,
    six_products_stay_faster,
)
from hylora_kernels.backends.cpu.panels import pack_matrix, pivot_table
from hylora_kernels.weights import Weights

# Looked up once: a decoded token waits for every layer's call.
_LINEAR, _PACKED_LAYER, _PACKED_GROUP = (
    (None, None, None) if REFUSAL else (op("linear"), op("packed_layer"), op("packed_group"))
)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The part that all packed layers have in common. Immutable, so that modules can share one.

    The bias is no part of it: a call brings its own, so that a bias that changes is followed.
    """

    backend: ClassVar[str] = "cpu"
    device_type: ClassVar[str] = "cpu"

    dtype: torch.dtype
    shape: tuple[int]  # of x's last dim: (K,)
    bias_shape: tuple[int]  # (N,)
    out_features: int
    rank: int
    lora_rank: int
    alpha: float
    has_adapter: bool  # A and B were given, maybe of rank 0
    pivots: Tensor | None

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] and bias [N] of dtype -> y [..., N]."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., K]: rows of a dense matrix, an embedding lookup."""
        raise NotImplementedError

    def unpack(self) -> Weights:
        """The weights as they were packed, bit for bit, in new memory, without the bias."""
        raise NotImplementedError

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that hold the weights, without the bias."""
        raise NotImplementedError

    def _weights(self, SVh: Tensor, U: Tensor, A=None, B=None, pivots=None) -> Weights:
        if self.has_adapter and not self.lora_rank:
            A, B = SVh.new_empty(0, self.shape[0]), SVh.new_empty(self.out_features, 0)
        return Weights(SVh, U, A, B, None, self.alpha, pivots)


@dataclass(frozen=True, slots=True, eq=False)
class _Panels(Packed):
    """follows_settings: float32 that fits bf16 limbs; torch's settings at a call then have a say in
    its number of limb products, of which limb_products is the most."""

    limb_products: int
    follows_settings: bool

    def products_now(self) -> int:
        """The number of limb products of a call."""
        if self.follows_settings:
            return limb_products_of_packed(self.limb_products)
        return self.limb_products


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayer(_Panels):
    """layer: cpu_pack_layer's result. An op on it takes 3.7 us, one on six tensors 8.6."""

    layer: Tensor

    @classmethod
    def of(cls, weights: Weights) -> PackedLayer:
        SVh, U, A, B, _, alpha, pivots = (_detached(t) for t in weights)
        rank, lora_rank, N = weights.rank, weights.lora_rank, weights.out_features
        table = None if pivots is None else pivot_table(weights.pivots, N)
        shrink, expand, adapter_expand = SVh, U, None
        if lora_rank:  # joined: one matrix of rank r + ra has less padding than two
            shrink = torch.cat((SVh, A))
            expand = torch.cat((U, B if table is None else B[table.others(rank)]), 1)
        if lora_rank and table is not None:
            # B's rows of the pivots; its columns stand for h's from the last multiple of 32 on.
            adapter_expand = pack_matrix(F.pad(B[pivots.long()], (rank % 32, 0)))
        layer = op("pack_layer")(
            SVh,
            shrink=pack_matrix(shrink),
            adapter_shrink=None,
            expand=pack_matrix(expand),
            adapter_expand=adapter_expand,
            pivot_table=None if table is None else table.table,
            k=weights.in_features,
            r=rank,
            ra=lora_rank,
            n=N,
            alpha=alpha,
        )
        return cls(**common(weights), **limbs(weights), layer=layer)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _PACKED_LAYER(x, self.layer, bias, self.out_features, self.products_now())

    def unpack(self) -> Weights:
        rank, lora_rank, N, pivots = self.rank, self.lora_rank, self.out_features, self.pivots
        P, _, Q, of_pivots = (op("unpack_part")(self.layer, part) for part in range(4))
        SVh, U = P[:rank].clone(), Q[:, :rank].contiguous().clone()
        if not lora_rank:
            return self._weights(SVh, U, pivots=pivots)
        A, B = P[rank:].clone(), Q[:, rank:]
        if pivots is not None:
            others, B = B, P.new_empty(N, lora_rank)
            B[pivots.long()] = of_pivots[:, rank % 32 :]
            B[pivot_table(pivots, N).others(rank)] = others
        return self._weights(SVh, U, A, B.contiguous().clone(), pivots)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.layer]


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix(_Panels):
    """panels: of the matrix [N, K]."""

    panels: Tensor

    @classmethod
    def of(cls, weights: Weights) -> PackedMatrix:
        panels = pack_matrix(weights.SVh.detach())
        return cls(**common(weights), **limbs(weights), panels=panels)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _LINEAR(x, self.panels, bias, self.out_features, self.products_now())

    def rows(self, ids: Tensor) -> Tensor:
        N, (K,) = self.out_features, self.shape
        return look_up(lambda: op("rows")(self.panels, N, K, ids), ids, N)

    def unpack(self) -> Weights:
        return _dense(self, op("unpack")(self.panels, self.out_features, self.shape[0]))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.panels]


@dataclass(frozen=True, slots=True, eq=False)
class TorchProducts(Packed):
    """P [r + ra, K] and Q [N, r + ra]; a dense matrix is P alone. B [N, ra] is what unpack gives,
    since Q holds alpha B."""

    P: Tensor
    Q: Tensor | None
    B: Tensor | None

    @classmethod
    def of(cls, weights: Weights) -> TorchProducts:
        SVh, U, A, B, _, alpha, _ = (_detached(t) for t in weights)
        if is_matrix(weights):
            return cls(**common(weights), P=SVh.clone(), Q=None, B=None)
        if not weights.lora_rank:
            return cls(**common(weights), P=SVh.clone(), Q=U.clone(), B=None)
        P, Q = torch.cat((SVh, A)), torch.cat((U, alpha * B), 1)
        return cls(**common(weights), P=P, Q=Q, B=B.clone())

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.Q is None:
            return F.linear(x, self.P, bias)
        return F.linear(F.linear(x, self.P), self.Q, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.P)

    def unpack(self) -> Weights:
        if self.Q is None:
            return _dense(self, self.P.clone())
        SVh, A = (part.clone() for part in self.P.split((self.rank, self.lora_rank)))
        U = self.Q[:, : self.rank].contiguous().clone()
        return self._weights(SVh, U, *((A, self.B.clone()) if self.lora_rank else ()))

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.P, self.Q, self.B) if t is not None]


@dataclass(frozen=True, slots=True, eq=False)
class PackedGroup:
    """Layers on one x, as the op on a group takes them.

    width: of the output [..., width], in which the members' outputs stand side by side; the columns
           behind them are undefined. It is never K.
    """

    backend: ClassVar[str] = "cpu"

    members: tuple[_Panels, ...]
    weights: list[Tensor]
    matrix_outputs: list[int]  # 0 for a PackedLayer
    limb_products: list[int] | None  # None: asked at each call
    width: int

    @classmethod
    def of(cls, members: Sequence[Packed]) -> PackedGroup:
        outputs = sum(member.out_features for member in members)
        products = [member.limb_products for member in members]
        return cls(
            tuple(members),
            [member.tensors[0] for member in members],
            [m.out_features if isinstance(m, PackedMatrix) else 0 for m in members],
            None if any(m.follows_settings for m in members) else products if any(products) else [],
            outputs + 32 * (outputs == members[0].shape[0]),
        )

    def forward(self, x: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
        products = self.limb_products
        if products is None:
            products = [member.products_now() for member in self.members]
        return _PACKED_GROUP(x, self.weights, self.matrix_outputs, biases, products, self.width)


def in_panels(packed: Packed) -> PackedLayer | PackedMatrix:
    """The same weights in panels: what torch's products read is packed once more."""
    if isinstance(packed, PackedLayer | PackedMatrix):
        return packed
    weights = packed.unpack()
    return (PackedMatrix if is_matrix(weights) else PackedLayer).of(weights)


# ----------------------------------------------------------------------- the backend's interface


def pack_plain(weights: Weights) -> Packed:
    """Weights of tensors that this backend supports, packed, without the bias."""
    if torch_products_are_faster(weights):
        return TorchProducts.of(weights)
    if not is_matrix(weights):
        return PackedLayer.of(weights)
    pivot_table(weights.pivots, weights.out_features)  # raises for pivots that can't be
    return PackedMatrix.of(weights)


def forward_packed(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., K] and bias [N] of packed.dtype -> y [..., N]. A decoded token waits for it: keep it
    short."""
    return packed.forward(x, bias)


def why_no_group(members: Sequence[Packed]) -> str:
    """The reason why these layers on one x can't be computed as one, or ""."""
    if not all(isinstance(member, _Panels) for member in members):
        return "torch's products are faster for one of them"
    return ""


def group(members: Sequence[Packed]) -> PackedGroup:
    """Layers for which why_no_group gives ""."""
    return PackedGroup.of(members)


def forward_group(x: Tensor, group: PackedGroup, biases: Sequence[Tensor | None]) -> Tensor:
    """x [..., K] -> y [..., group.width]; no biases are as many Nones."""
    return group.forward(x, biases)


def rows_packed(ids: Tensor, packed: Packed) -> Tensor:
    """ids int64 [...] -> [..., K]: rows of a dense matrix, an embedding lookup."""
    return packed.rows(ids)


def unpack(packed: Packed) -> Weights:
    """The weights as they were packed, bit for bit (Packed.unpack)."""
    return packed.unpack()


def torch_products_are_faster(weights: Weights) -> bool:
    """True if torch's products beat panels: float32 in the pair form or dense, of few ranks or with
    much padding. The pivoted form has panels alone.

    Measured, as speed relative to two torch products: 29 random shapes of at most 32 ranks 0.92 at
    one or two rows, 1.17 up to 64, 0.90 above (bfloat16 2 to 5). More ranks with an eighth of
    padding or more: 0.82 to 0.95 (K = 1156, N = 103, r = 84, M = 2).
    """
    if weights.SVh.dtype != torch.float32 or not (is_matrix(weights) or weights.pivots is None):
        return False
    K, N = weights.in_features, weights.out_features
    rank = weights.rank + weights.lora_rank
    numbers_in_panels = _padded(rank) * K + _padded(N) * rank
    is_padded = 8 * numbers_in_panels > 9 * rank * (K + N)
    return rank <= 32 or is_padded


def look_up(rows: Callable[[], Tensor], ids: Tensor, N: int) -> Tensor:
    """rows(); raises IndexError if ids are out of range."""
    try:
        return rows()
    except RuntimeError as error:
        if "ids must be in" not in str(error):
            raise
        low, high = int(ids.min()), int(ids.max())
        raise IndexError(f"ids must be in [0, {N}), got {low} to {high}") from None


def is_matrix(weights: Weights) -> bool:
    """A dense matrix alone."""
    return weights.is_dense and not weights.lora_rank


def _padded(size: int) -> int:
    return size + -size % 32


def _detached(value):
    return value.detach() if isinstance(value, Tensor) else value


def common(weights: Weights, dtype: torch.dtype | None = None) -> dict:
    """The fields of Packed; dtype: SVh's by default."""
    values = (
        dtype or weights.SVh.dtype,
        (weights.in_features,),
        (weights.out_features,),
        weights.out_features,
        weights.rank,
        weights.lora_rank,
        weights.alpha,
        weights.A is not None,
        None if weights.pivots is None or is_matrix(weights) else weights.pivots.clone(),
    )
    return dict(zip((field.name for field in fields(Packed)), values, strict=True))


def limbs(weights: Weights, dtype: torch.dtype | None = None) -> dict:
    """The fields of _Panels. Limbs hold every quantised matrix: scales are float16."""
    dtype = dtype or weights.SVh.dtype
    factors = (weights.SVh, weights.U, weights.A, weights.B)
    matrices = [factor.detach() for factor in factors if isinstance(factor, Tensor)]
    fit = fit_limbs(dtype, *((matrix, 1) for matrix in matrices))
    if dtype == torch.float32 and fit:
        most = 6 if six_products_stay_faster() else 0
        return {"limb_products": most, "follows_settings": True}
    return {"limb_products": limb_products_for(dtype, fit), "follows_settings": False}


def _dense(packed: Packed, SVh: Tensor) -> Weights:
    """The weights of a dense matrix: the pivoted form at rank N."""
    N = packed.out_features
    pivots = torch.arange(N, dtype=torch.int32, device=SVh.device)
    return packed._weights(SVh, SVh.new_empty(0, N), pivots=pivots)
