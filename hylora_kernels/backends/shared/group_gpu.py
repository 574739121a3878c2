"""Packed layers on one x, such as q, k and v of an attention, computed as one on a GPU.

The members' P stand one below the other, so that one product shrinks x for all of them: h = x P^T.
Each member then expands its own columns of h into its own columns of y, side by side:

    P  [R, K]     the members' [SVh; A], each from a multiple of 8 rows on
    Q  1-D        their Q and aB (packed_gpu), rows and beginnings at multiples of 8 numbers

Zeros stand between them, which kernels multiply to keep to whole loads.
A group costs no memory: it moves its members' tensors into P and Q, where they go on living as
views. Few rows are one launch, many rows one torch product for h and one for each member. As with a
layer (packed_gpu), a plain call goes straight to the C++ launch, a CUDA graph gets the backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hylora_kernels.backends.shared import counters, packed_gpu, torch_products
from hylora_kernels.backends.shared.gpu import is_captured
from hylora_kernels.backends.shared.library import op_or_none
from hylora_kernels.backends.shared.packed_gpu import HALVES, PackedLayer

STEP = 8  # numbers: 16 bytes of bfloat16 and float16, which the kernels load at once
LAUNCHED_ROWS, LAUNCHED_MEMBERS = 16, 8  # the most of the C++ launch: csrc/cuda/call.h

_LAUNCH = op_or_none("cuda_packed_group")
_LIBRARY = torch.library.Library("hylora", "FRAGMENT")
_SCHEMA = (
    "(Tensor x, Tensor P, Tensor Q, Tensor columns, Tensor wide_columns, Tensor?[] biases,"
    " int[] places, SymInt width) -> Tensor"
)


class Member(NamedTuple):
    """The places of one member: rows of P, numbers of Q, columns of y.

    The first `rank` columns of its h are U's, the others the adapter's, which stands apart in the
    pivoted form alone (PackedLayer). A dense matrix is the pivoted form at rank N.
    """

    N: int
    rank: int
    lora_rank: int
    is_pivoted: int
    p: int
    q: int
    q_stride: int
    aB: int
    aB_stride: int
    y: int

    @property
    def others(self) -> int:
        """Outputs that are products; the rest are pivots."""
        return self.N - self.rank if self.is_pivoted else self.N

    @property
    def is_dense(self) -> bool:
        return not self.others


class Operands(NamedTuple):
    """A group as its kernels read it.

    columns: int32 [sum of N], for each member its others, then its pivots, both ascending; in the
             pair form 0 .. N - 1. wide_columns: the same in int64.
    """

    P: Tensor
    Q: Tensor
    columns: Tensor
    wide_columns: Tensor
    members: tuple[Member, ...]
    width: int

    def of(self, member: Member) -> tuple[Tensor, Tensor, Tensor | None]:
        """Its (P [r + ra, K], Q [others, r], aB [N, ra] or None), views."""
        m = member
        Q = self.Q.as_strided((m.others, m.rank), (m.q_stride, 1), m.q)
        aB = self.Q.as_strided((m.N, m.lora_rank), (m.aB_stride, 1), m.aB) if m.lora_rank else None
        return self.P[m.p : m.p + m.rank + m.lora_rank], Q, aB

    def columns_of(self, member: Member) -> tuple[Tensor, Tensor]:
        """int64 (its others, its pivots): its outputs begin in `columns` where they do in y."""
        mine = self.wide_columns[member.y : member.y + member.N]
        return mine[: member.others], mine[member.others :]

    def parts(self) -> list[Part]:
        """What the torch products need of each member: views, which cost the host to make."""
        return [Part.of(self, member) for member in self.members]

    @property
    def places(self) -> list[int]:
        """All members' places in one row."""
        return [place for member in self.members for place in member]

    @property
    def counters(self) -> int:
        """The counters of a C++ launch: of each member a ticket, a block of rows, blocks of h."""
        return sum(2 + -(-m.rank // 16) + -(-m.lora_rank // 16) for m in self.members)


class Part(NamedTuple):
    """A member's matrices, transposed for torch's products. others, pivots: its columns, None in
    the pair form."""

    P: Tensor  # [K, r + ra]
    Q: Tensor  # [r, others]
    aB: Tensor | None  # [ra, N]
    others: Tensor | None
    pivots: Tensor | None

    @classmethod
    def of(cls, operands: Operands, member: Member) -> Part:
        P, Q, aB = operands.of(member)
        columns = operands.columns_of(member) if member.is_pivoted else (None, None)
        return cls(P.T, Q.T, None if aB is None else aB.T, *columns)


# x [M, K], operands, biases -> y [M, width] in one launch; None where the torch products are faster
Launch = Callable[[Tensor, Operands, Sequence[Tensor | None]], Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class PackedGroup:
    """width: of the output, in which the members' outputs stand side by side; the columns behind
    them are undefined. It is never K.

    target: of the C++ launch, None where the kernels or this group's dtype or size don't allow it.
    parts:  operands.parts().
    seen:   as in a PackedLayer.
    """

    backend: str
    members: tuple[PackedLayer, ...]
    operands: Operands
    width: int
    counters: int
    places: list[int]
    target: tuple[int, int] | None
    parts: list[Part]
    seen: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, layers: Sequence[PackedLayer]) -> PackedGroup:
        members = _places(layers)
        last = members[-1]
        outputs, first = last.y + last.N, layers[0]
        width = outputs + 32 * (outputs == first.shape[0])
        rows = sum(_up(m.rank + m.lora_rank) for m in members)
        columns = torch.cat([_columns(layer) for layer in layers]).to(first.P.device)
        operands = Operands(
            P=first.P.new_zeros(rows, first.shape[0]),
            Q=first.Q.new_zeros(last.aB + last.N * last.aB_stride),
            columns=columns.int(),
            wide_columns=columns,
            members=members,
            width=width,
        )
        for layer, member in zip(layers, members, strict=True):
            for mine, place in zip((layer.P, layer.Q, layer.aB), operands.of(member), strict=True):
                if mine is not None:
                    place.copy_(mine)
                    mine.data = place
        sizes = operands.counters, operands.places, target_of(operands)
        return cls(first.backend, tuple(layers), operands, width, *sizes, operands.parts())

    def forward(self, x: Tensor, biases: Sequence[Tensor | None], launch: Launch) -> Tensor:
        """x [..., K], a bias [N] or None for each member, or no biases -> y [..., width]. A decoded
        token waits for it: keep it short."""
        o = self.operands
        if torch.compiler.is_compiling():
            op = getattr(torch.ops.hylora, f"{self.backend}_group").default
            return op(x, *o[:4], _as_many(biases, o.members), self.places, o.width)
        rows, device = x.numel() // o.P.shape[1], x.device
        if rows in self.seen and rows <= LAUNCHED_ROWS and self.target and not is_captured(device):
            zeros = counters.zeros_of_stream(device, self.counters)
            return _LAUNCH(x, *o[:4], biases, zeros, self.places, self.width, *self.target)
        y = _forward(launch, x, o, _as_many(biases, o.members), self.parts)
        if rows and not is_captured(device):
            self.seen.add(rows)
        return y


def target_of(operands: Operands) -> tuple[int, int] | None:
    """The (multiprocessors, architecture) of the C++ launch; None where it can't serve them."""
    fits = operands.P.dtype in HALVES and len(operands.members) <= LAUNCHED_MEMBERS
    return packed_gpu.kernels_target(operands.P.device) if fits and _LAUNCH else None


def one_launch(x: Tensor, operands: Operands, biases, target: tuple[int, int]) -> Tensor:
    """x [..., K] of up to 16 rows -> y [..., width] in one C++ launch, captured or not."""
    zeros = counters.zeros(x.device, operands.counters)
    return _LAUNCH(x, *operands[:4], biases, zeros, operands.places, operands.width, *target)


def why_no_group(members: Sequence[object]) -> str:
    """The reason why these packed layers on one x can't be computed as one, or ""."""
    for member in members:
        if not isinstance(member, PackedLayer):
            return f"no kernel of a group reads a {type(member).__name__}"
    if all(map(_is_dense, members)):
        return "all of them are dense, which torch's own products serve"
    return ""


def define(backend: str, launch: Launch) -> None:
    """Define the op of this backend that code under torch.compile calls, opaque to it."""

    def kernel(x, P, Q, columns, wide_columns, biases, places, width) -> Tensor:
        fields = len(Member._fields)
        members = [Member(*places[i : i + fields]) for i in range(0, len(places), fields)]
        operands = Operands(P, Q, columns, wide_columns, tuple(members), width)
        return _forward(launch, x, operands, biases, None)

    def fake(x, P, Q, columns, wide_columns, biases, places, width) -> Tensor:
        return x.new_empty(*x.shape[:-1], width)

    name = f"{backend}_group"
    _LIBRARY.define(name + _SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hylora::{name}", fake, lib=_LIBRARY)


def _as_many(biases: Sequence[Tensor | None], members: Sequence[Member]) -> list[Tensor | None]:
    """No biases as so many Nones."""
    return list(biases) or [None] * len(members)


def _forward(launch: Launch, x: Tensor, operands: Operands, biases, parts) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    y = launch(rows, operands, biases) if len(rows) else None
    if y is None:
        y = torch_products_of(rows, operands, biases, parts)
    shape = *x.shape[:-1], operands.width
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, shape)


# ------------------------------------------------------------------------------- the torch products


def torch_products_of(
    x: Tensor, operands: Operands, biases, parts: list[Part] | None = None
) -> Tensor:
    """x [M, K] -> y [M, width] by one product for all members' h and one for each member.

    A dense member is one product of x. It comes last in P, so that it is left out of the first.
    """
    members, y = operands.members, x.new_empty(len(x), operands.width)
    shrunk = sum(_up(m.rank + m.lora_rank) for m in members if not m.is_dense)
    h = x @ operands.P[:shrunk].T
    for m, part, bias in zip(members, parts or operands.parts(), biases, strict=True):
        to = y.narrow(1, m.y, m.N)
        if m.is_dense:
            _product(x, part.P.narrow(1, 0, m.rank), bias, to)
        else:
            _expand(h.narrow(1, m.p, m.rank), part, bias, to)
        if part.aB is not None:
            P_a = part.P.narrow(1, m.rank, m.lora_rank)
            h_a = x @ P_a if m.is_dense else h.narrow(1, m.p + m.rank, m.lora_rank)
            to.addmm_(h_a, part.aB)
    return y


def _expand(h: Tensor, part: Part, bias: Tensor | None, to: Tensor) -> None:
    others, pivots, Q = part.others, part.pivots, part.Q
    if others is None or pivots is None:
        return _product(h, Q, bias, to)
    if torch_products.building_U_outweighs_order(len(h), len(pivots), h.device):
        pair = Q.new_zeros(len(others) + len(pivots), len(Q))
        pair.index_copy_(0, others, Q.T)
        pair.index_copy_(0, pivots, torch.eye(len(pivots), dtype=Q.dtype, device=Q.device))
        return _product(h, pair.T, bias, to)
    to.index_copy_(1, others, h @ Q)
    to.index_copy_(1, pivots, h)
    if bias is not None:
        to += bias
    return None


def _product(left: Tensor, right: Tensor, bias: Tensor | None, to: Tensor) -> None:
    """to = left right + bias, into columns of y."""
    if bias is None:
        torch.mm(left, right, out=to)
    else:
        torch.addmm(bias, left, right, out=to)


# ------------------------------------------------------------------------------------------- places


def _places(layers: Sequence[PackedLayer]) -> tuple[Member, ...]:
    """Where each layer is to stand: in P the dense ones come last."""
    kernel_ranks = [_ranks(layer) for layer in layers]
    dense_last = sorted(range(len(layers)), key=lambda i: _is_dense(layers[i]))
    p, q, y, places = 0, 0, 0, {}
    for i in dense_last:
        places[i] = p
        p += _up(sum(kernel_ranks[i]))
    members = []
    for i, layer in enumerate(layers):
        (rank, lora_rank), N = kernel_ranks[i], layer.out_features
        is_pivoted = int(layer.pivots is not None)
        others = N - rank if is_pivoted else N
        aB = q + others * _up(rank)
        sides = (q, _up(rank), aB, _up(lora_rank))
        members.append(Member(N, rank, lora_rank, is_pivoted, places[i], *sides, y))
        q, y = aB + (N * _up(lora_rank)), y + N
    return tuple(members)


def _ranks(layer: PackedLayer) -> tuple[int, int]:
    """(rank, adapter rank) as the kernel sees them: in the pair form Q holds both."""
    if layer.pivots is None:
        return layer.rank + layer.lora_rank, 0
    return layer.rank, layer.lora_rank


def _is_dense(layer: Any) -> bool:
    return layer.pivots is not None and layer.rank == layer.out_features


def _columns(layer: PackedLayer) -> Tensor:
    if layer.pivots is None:
        return torch.arange(layer.out_features, device=layer.P.device)
    return torch.cat((layer.others, layer.pivots.long()))


def _up(size: int) -> int:
    return size + -size % STEP
