"""The CPU's own room: the fused kernels of csrc/, one for each instruction set, chosen at run time.

They read weights packed into panels ("panels": one weight matrix as one 1-D tensor). Packing is a
pass over the weights, so it is done once where it can be:

    training    The frozen factors' panels are kept from the first backward on, both ways round, for
                as long as the factors live unchanged; the adapters, which every step changes, are
                packed each call and ride along as tail panels. layer.eval() drops what is kept.
    inference   pack() makes the panels once and for all, and the factors themselves can go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hylora_kernels.backends.cpu.packed import (
    Packed,
    forward_packed,
    pack,
    rows_packed,
    unpack,
)
from hylora_kernels.backends.cpu.panels import (
    LEVEL,
    LEVELS,
    REFUSAL,
    forget,
    in_range_of,
    in_stream,
    kept_panels,
    op,
    order_of,
    pack_matrix,
    panels_backward,
    panels_forward,
    products_for,
)
from hylora_kernels.weights import Needs, Saved, Weights

__all__ = ["Packed", "forget", "forward_packed", "pack", "rows_packed", "unpack"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# From how many rows on packing all weights for one call is won back by the call: bf16, K=576 N=1536
# r=224, M=512 0.77 of two plain products' speed, M=2048 1.02. `scalar` is there to be right on any
# processor; torch's own products are faster, and as yet they are in float32 with many rows.
ROWS_WORTH_PACKING = 2048
ROWS_WORTH_TRAINING = 256  # the backward then finds panels that are kept


def is_available() -> bool:
    return not REFUSAL


def why_not() -> str:
    """Why this room can't be used here; "" where it can."""
    return REFUSAL


def levels() -> tuple[str, dict[str, str]]:
    """(the level in use or "", level -> "" where this machine has it or the reason why not)."""
    if not hasattr(torch.ops.hylora, "cpu_isa_reason"):
        return "", dict.fromkeys(LEVELS, REFUSAL)
    return LEVEL, {level: torch.ops.hylora.cpu_isa_reason.default(level) for level in LEVELS}


def unsupported(x: Tensor, weights: Weights) -> str | None:
    """The reason why this room can't serve these tensors, in words; None where it can."""
    if REFUSAL:
        return REFUSAL
    if x.device.type != "cpu":
        return f"serves tensors on the CPU, got {x.device}"
    if x.dtype not in DTYPES:
        return f"serves float32, bfloat16 and float16, got {x.dtype}"
    if weights.is_empty:
        SVh, U = weights.SVh, weights.U
        return f"serves no empty factors, got SVh {list(SVh.shape)} and U {list(U.shape)}"
    return None


def is_faster_than_next(x: Tensor, weights: Weights) -> bool:
    """Whether a call that this room can serve is faster here than in the next room."""
    if LEVEL == "scalar" or x.dtype == torch.float32:
        return False
    if torch.compiler.is_exporting():  # an exported program is for any M
        return False
    rows = math.prod(x.shape[:-1])
    trainable = (x, weights.A, weights.B, weights.bias)
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in trainable
    )
    panels_will_be_kept = needs_gradient and rows >= ROWS_WORTH_TRAINING
    rows_outweigh_packing = rows >= ROWS_WORTH_PACKING
    if panels_will_be_kept or rows_outweigh_packing:
        return True
    panels_are_kept = not torch.compiler.is_compiling() and weights.SVh in kept_panels
    return panels_are_kept


# ----------------------------------------------------------------------------- forward and backward


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]), in one pass; h_a before alpha."""
    SVh, U, A, B, bias, alpha, pivots = weights
    rank, lora_rank, out_features = weights.rank, weights.lora_rank, weights.out_features
    first, second, in_range = panels_forward(SVh, U)
    if weights.is_dense and not lora_rank:
        order_of(pivots, out_features)
        y = op("linear")(x, first, bias, out_features, products_for(x.dtype, in_range))
        return y, x.new_empty(len(x), 0)
    first_tail = second_tail = table = None
    if pivots is not None:
        table, stream = order_of(pivots, out_features)
    if lora_rank:
        in_range = in_range and in_range_of(x.dtype, (A, 1), (B, 1))
        first_tail = pack_matrix(A)
        second_tail = pack_matrix(B if pivots is None else in_stream(B, stream))
    y, h_a = op("layer")(
        x,
        *(first, first_tail, second, second_tail, bias, table),
        *(rank, lora_rank, out_features, alpha),
        emit_h_a=lora_rank > 0,
        backward=False,
        limb_products=products_for(x.dtype, in_range),
    )
    return y, h_a if lora_rank else x.new_empty(len(x), 0)


def backward(dy: Tensor, saved: Saved, weights: Weights, needs: Needs) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    (x, h_a), (_, _, A, B, _, alpha, _) = saved, weights
    need_dx, need_dA, need_dB, need_db = needs
    dx = dA = dB = db = dh_a = None
    lora_rank = weights.lora_rank
    if need_dx:
        dx, dh_a = _backward_x(dy, weights)
    elif need_dA and lora_rank:
        dh_a = alpha * (dy @ B)
    if need_dA:
        dA = op("adapter_gradients")(dh_a, x, 1.0, False) if lora_rank else torch.empty_like(A)
    if need_dB and lora_rank:
        rows = op("adapter_gradients")(h_a, dy, alpha, need_db)  # one pass over dy for both
        dB = rows[:lora_rank].T.clone(memory_format=torch.contiguous_format)
        db = rows[lora_rank].clone() if need_db else None
    elif need_dB:
        dB = torch.empty_like(B)
    if need_db and db is None:
        db = dy.sum(0)
    return dx, dA, dB, db


def _backward_x(dy: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """(dx [M, K], dh_a [M, ra] = alpha dy B): the forward's kernel on the transposed factors."""
    SVh, U, A, B, _, alpha, pivots = weights
    K, out_features = weights.in_features, weights.out_features
    rank, lora_rank = weights.rank, weights.lora_rank
    first, second, in_range = panels_backward(SVh, U)
    if weights.is_dense and not lora_rank:
        return op("linear")(dy, second, None, K, products_for(dy.dtype, in_range)), None
    first_tail = second_tail = table = None
    if pivots is not None:
        table, stream = order_of(pivots, out_features)
    if lora_rank:
        in_range = in_range and in_range_of(dy.dtype, (B, 0), (A, 0))
        first_tail = pack_matrix((B if pivots is None else in_stream(B, stream)).T)
        second_tail = pack_matrix(A.T)
    dx, dh_a = op("layer")(
        dy,
        *(first, first_tail, second, second_tail, None, table),
        *(rank, lora_rank, K, alpha),
        emit_h_a=lora_rank > 0,
        backward=True,
        limb_products=products_for(dy.dtype, in_range),
    )
    return dx, dh_a
