"""A layer packed for inference on a GPU: P = [SVh; A] and Q = [U, alpha B] side by side, so that an
adapter costs no product of its own, and a call that goes straight to one C++ op.

A plain call of few rows is one launch of the C++ kernels, which costs the host the least. A CUDA
graph gets what the backend's table says, since a launch costs the host nothing there. In the
pivoted form the adapter's columns of Q stay apart (alpha B [N, ra]): a pivot is h itself, and only
they are multiplied for it.

    P   [r + ra, K]
    Q   [N, r + ra]; in the pivoted form U [N - r, r]
    aB  alpha B [N, ra] in the pivoted form with an adapter, else None

Both GPU backends pack so. Each brings its own forward, which chooses for calls that are captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels.backends.shared import counters, torch_products
from hylora_kernels.backends.shared.gpu import is_captured, rows_of_one_launch, target_of
from hylora_kernels.backends.shared.library import op_or_none
from hylora_kernels.weights import Weights

HALVES = (torch.bfloat16, torch.float16)  # what the C++ kernels take
# x [M, K], weights -> (y [M, N], h_a): a backend's forward
Forward = Callable[[Tensor, Weights], tuple[Tensor, Tensor]]

_LAUNCH = op_or_none("cuda_packed_layer")
_LIBRARY = torch.library.Library("hylora", "FRAGMENT")
_SCHEMA = (
    "(Tensor x, Tensor P, Tensor Q, Tensor? aB, Tensor? bias, Tensor? pivots, SymInt N) -> Tensor"
)


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayer:
    """Immutable but for `seen`, so that modules can share one. The bias is no part of it.

    B:      what unpack gives, None where alpha B divided by alpha is B again.
    others: int64 [N - r], the outputs that are no pivots.
    launched_rows: the most rows that the C++ launch serves; 0 without kernels for the device.
    sizes:  N, the kernel's rank and adapter rank, the device's multiprocessors and architecture.
    seen:   numbers of rows that the backend's forward has served once. It compiles what a CUDA
            graph of that many rows launches, since nothing can be compiled during a capture.
    """

    backend: str
    device_type: str
    dtype: torch.dtype
    shape: tuple[int]  # of x's last dim: (K,)
    bias_shape: tuple[int]  # (N,)
    out_features: int
    rank: int
    lora_rank: int
    alpha: float
    has_adapter: bool  # A and B were given, maybe of rank 0
    P: Tensor
    Q: Tensor
    aB: Tensor | None
    B: Tensor | None
    pivots: Tensor | None
    others: Tensor | None
    launched_rows: int
    counters: int
    sizes: tuple[int, int, int, int, int]
    seen: set[int] = field(default_factory=set)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that hold the weights, without the bias."""
        return [t for t in (self.P, self.Q, self.aB, self.B) if t is not None]

    def forward(self, x: Tensor, bias: Tensor | None, by_backend: Forward) -> Tensor:
        """x [..., K] and bias [N] of dtype -> y [..., N]. A decoded token waits for it: keep it
        short."""
        if torch.compiler.is_compiling():
            op = getattr(torch.ops.hylora, f"{self.backend}_packed").default
            return op(x, self.P, self.Q, self.aB, bias, self.pivots, self.out_features)
        rows, device = x.numel() // self.shape[0], x.device
        if rows in self.seen and not is_captured(device):
            if rows <= self.launched_rows:
                zeros = counters.zeros_of_stream(device, self.counters)
                return _LAUNCH(
                    *(x, self.P, self.Q, self.aB, bias, self.pivots, self.others, zeros),
                    *self.sizes,
                )
            if self.pivots is None:
                return F.linear(F.linear(x, self.P), self.Q, bias)
        weights = (self.P, self.Q, self.aB, bias, self.pivots)
        y = _forward(by_backend, x, *weights, self.out_features)
        if rows and not is_captured(device):
            self.seen.add(rows)
        return y

    def unpack(self) -> Weights:
        """The weights as they were packed, bit for bit, in new memory, without the bias."""
        N, rank, lora_rank = self.out_features, self.rank, self.lora_rank
        SVh, A = (part.clone() for part in self.P.split((rank, lora_rank)))
        U = self.Q[:, :rank].contiguous().clone()
        if not self.has_adapter:
            return Weights(SVh, U, alpha=self.alpha, pivots=self.pivots)
        if self.B is not None:
            return Weights(SVh, U, A, self.B.clone(), None, self.alpha, self.pivots)
        aB = self.Q[:, rank:] if self.aB is None else self.aB
        B = (aB / self.alpha).contiguous() if lora_rank else A.new_empty(N, 0)
        return Weights(SVh, U, A, B, None, self.alpha, self.pivots)


def pack(weights: Weights, backend: str, for_group: bool = False) -> PackedLayer | None:
    """The weights packed for a GPU; None for a dense matrix, which torch's own product serves,
    unless it may be a member of a group, and for quantised ones.

    Raises ValueError for pivots that aren't strictly ascending within [0, N).
    """
    if weights.is_quantized or (weights.is_dense and not for_group):
        return None
    SVh, U, A, B, _, alpha, pivots = (t.detach() if isinstance(t, Tensor) else t for t in weights)
    rank, lora_rank, N = weights.rank, weights.lora_rank, weights.out_features
    P = torch.cat((SVh, A)) if lora_rank else SVh.clone(memory_format=torch.contiguous_format)
    aB = others = kept_B = None
    if lora_rank:
        aB = alpha * B
        # An alpha of 1, 2 or 0.5 is divided out again without a rounding.
        kept_B = None if torch.equal(aB / alpha, B) else B.clone()
    if pivots is not None:
        others = torch_products.part_order(pivots, N - rank)[rank:].clone()
        pivots, aB = pivots.clone(), None if aB is None else _with_aligned_rows(aB)
        Q, in_kernel = U, (rank, lora_rank)
    else:
        Q, aB, in_kernel = U if aB is None else torch.cat((U, aB), 1), None, (rank + lora_rank, 0)
    launches = _LAUNCH is not None and SVh.dtype in HALVES and not weights.is_dense
    target = kernels_target(SVh.device) if launches else None
    return PackedLayer(
        backend=backend,
        device_type=SVh.device.type,
        dtype=SVh.dtype,
        shape=(weights.in_features,),
        bias_shape=(N,),
        out_features=N,
        rank=rank,
        lora_rank=lora_rank,
        alpha=alpha,
        has_adapter=A is not None,
        P=P,
        Q=_with_aligned_rows(Q),
        aB=aB,
        B=kept_B,
        pivots=pivots,
        others=others,
        launched_rows=rows_of_one_launch(weights.factor_bytes) if target else 0,
        counters=4 + (rank + lora_rank) // 16 + 2,  # a ticket, a block of rows, blocks of h
        sizes=(N, *in_kernel, *(target or (0, 0))),
    )


@functools.cache
def kernels_target(device: torch.device) -> tuple[int, int] | None:
    """(multiprocessors, architecture) of a device that the C++ kernels serve, else None."""
    if device.type != "cuda" or torch.version.hip:
        return None
    ops, target = torch.ops.hylora, target_of(device)
    lacks = ops.cuda_driver_lacks.default() or ops.cuda_lacks.default(target[1])
    return None if lacks or not ops.cuda_archs.default() else target


def define(backend: str, by_backend: Forward) -> None:
    """Define the op of this backend that code under torch.compile calls, opaque to it."""

    def kernel(x, P, Q, aB, bias, pivots, N) -> Tensor:
        return _forward(by_backend, x, P, Q, aB, bias, pivots, N)

    def fake(x, P, Q, aB, bias, pivots, N) -> Tensor:
        return x.new_empty(*x.shape[:-1], N)

    name = f"{backend}_packed"
    _LIBRARY.define(name + _SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hylora::{name}", fake, lib=_LIBRARY)


def _forward(by_backend: Forward, x, P, Q, aB, bias, pivots, N: int) -> Tensor:
    """As the backend says, but by two products for many rows in the pivoted form, and by one for a
    dense matrix."""
    rows = x.numel() // P.shape[1]
    if pivots is None:
        weights = Weights(P, Q, bias=bias)
    elif torch_products.building_U_outweighs_order(rows, len(pivots), x.device):
        Q = torch_products.pair_U(Q, pivots)
        return F.linear(F.linear(x, P), Q if aB is None else torch.cat((Q, aB), 1), bias)
    else:
        rank = len(pivots)
        A = None if aB is None else P[rank:]
        weights = Weights(P[:rank], Q, A, aB, bias, 1.0, pivots)
        by_backend = by_backend if len(Q) else torch_products.forward
    y, _ = by_backend(x.reshape(rows, P.shape[1]), weights)
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], N))


def _with_aligned_rows(matrix: Tensor) -> Tensor:
    """A copy whose rows start at multiples of 16 bytes, which the kernels load at once."""
    step = 16 // matrix.dtype.itemsize
    columns = matrix.shape[1]
    rows = matrix.new_empty(len(matrix), columns + -columns % step)[:, :columns]
    return rows.copy_(matrix)
