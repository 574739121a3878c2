"""The cpu backend: the fused kernels of csrc/cpu, one set for each instruction set.

They read weights in panels (one weight matrix as one 1-D tensor). Packing is a pass over the
weights, so it is done once where possible:

    training    The frozen factors' panels, for both directions, are kept from the first backward on
                while the factors live unchanged. The adapters change with every step, so they are
                packed at every call, as matrices of their own. layer.eval() drops what is kept.
    inference   pack() makes the panels once, and the factors themselves can be freed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hylora_kernels.backends.cpu.decoder import DecoderPlan as decoder_plan
from hylora_kernels.backends.cpu.library import LEVEL, LEVELS, REFUSAL, op
from hylora_kernels.backends.cpu.limbs import fit_limbs, limb_products_for
from hylora_kernels.backends.cpu.packed import (
    forward_group,
    forward_packed,
    group,
    rows_packed,
    unpack,
    why_no_group,
)
from hylora_kernels.backends.cpu.panels import (
    FactorPanels,
    forget,
    kept_panels,
    pack_matrix,
    panels_backward,
    panels_forward,
    pivot_table,
)
from hylora_kernels.backends.cpu.quantized import pack
from hylora_kernels.backends.shared.backward import backward as shared_backward
from hylora_kernels.weights import Needs, Saved, Weights

__all__ = [
    "decoder_plan",
    "forget",
    "forward_group",
    "forward_packed",
    "group",
    "pack",
    "rows_packed",
    "unpack",
    "why_no_group",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# From this many rows on, a call wins back the time to pack all its weights: bf16, K=576 N=1536
# r=224, 0.77 of two torch products' speed at M=512, 1.02 at M=2048. Not for level "scalar", which
# is there to be right on any processor, nor for float32, where torch's products are faster with
# many rows.
ROWS_WORTH_PACKING = 2048
ROWS_WORTH_TRAINING = 256  # with a backward, which finds or makes panels that are kept


def is_available() -> bool:
    return not REFUSAL


def why_not() -> str:
    """The reason why this backend can't be used here, or ""."""
    return REFUSAL


def levels() -> tuple[str, dict[str, str]]:
    """(the instruction set in use or "", each of them -> why this machine can't use it, or "")."""
    if not hasattr(torch.ops.hylora, "cpu_isa_reason"):
        return "", dict.fromkeys(LEVELS, REFUSAL)
    return LEVEL, {level: torch.ops.hylora.cpu_isa_reason.default(level) for level in LEVELS}


def unsupported(x: Tensor, weights: Weights) -> str | None:
    """The reason why this backend can't serve these tensors, in words; None where it can."""
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
    """True if a call that this backend can serve is faster here than in the next backend."""
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
    SVh, U, A, B, bias, _, pivots = weights
    panels, N = panels_forward(SVh, U), weights.out_features
    table = None if pivots is None else pivot_table(pivots, N)
    if weights.is_dense and not weights.lora_rank:
        limb_products = limb_products_for(x.dtype, panels.fit_limbs)
        y = op("linear")(x, panels.shrink, bias, N, limb_products)
        return y, x.new_empty(len(x), 0)
    adapter = None
    if weights.lora_rank:
        sorted_B = B if table is None else table.sort_rows(B)
        fit = panels.fit_limbs and fit_limbs(x.dtype, (A, 1), (B, 1))
        adapter = FactorPanels(pack_matrix(A), pack_matrix(sorted_B), fit)
    y, h_a = _layer(x, weights, panels, adapter, bias, table, N, backward=False)
    return y, h_a if adapter else x.new_empty(len(x), 0)


def _layer(x, weights, base, adapter, bias, table, outputs, backward) -> tuple[Tensor, Tensor]:
    """The op on a layer whose adapter, if it has one, is stored separately."""
    fit = base.fit_limbs and (adapter is None or adapter.fit_limbs)
    return op("layer")(
        x,
        shrink=base.shrink,
        adapter_shrink=adapter.shrink if adapter else None,
        expand=base.expand,
        adapter_expand=adapter.expand if adapter else None,
        bias=bias,
        pivot_table=None if table is None else table.table,
        r=weights.rank,
        ra=weights.lora_rank,
        n=outputs,
        alpha=weights.alpha,
        emit_h_a=adapter is not None,
        backward=backward,
        limb_products=limb_products_for(x.dtype, fit),
    )


def backward(dy: Tensor, saved: Saved, weights: Weights, needs: Needs) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    return shared_backward(dy, saved, weights, needs, _backward_x, _adapter_gradients)


def _adapter_gradients(dh_a, x, h_a, dy, alpha, need_db) -> tuple[Tensor | None, ...]:
    """(dA [ra, K], dB [N, ra], db [N] if needed); dA None without dh_a, the others without h_a."""
    dA = None if dh_a is None else op("adapter_gradients")(dh_a, x, 1.0, False)
    if h_a is None:
        return dA, None, None
    rows = op("adapter_gradients")(h_a, dy, alpha, need_db)  # one pass over dy for both
    lora_rank = h_a.shape[1]
    dB = rows[:lora_rank].T.clone(memory_format=torch.contiguous_format)
    return dA, dB, rows[lora_rank].clone() if need_db else None


def _backward_x(dy: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """(dx [M, K], dh_a [M, ra] = alpha dy B): the forward's kernel on the transposed factors."""
    SVh, U, A, B, _, _, pivots = weights
    panels, K = panels_backward(SVh, U), weights.in_features
    if weights.is_dense and not weights.lora_rank:
        limb_products = limb_products_for(dy.dtype, panels.fit_limbs)
        return op("linear")(dy, panels.expand, None, K, limb_products), None
    table = None if pivots is None else pivot_table(pivots, weights.out_features)
    adapter = None
    if weights.lora_rank:
        sorted_B = B if table is None else table.sort_rows(B)
        fit = panels.fit_limbs and fit_limbs(dy.dtype, (B, 0), (A, 0))
        adapter = FactorPanels(pack_matrix(sorted_B.T), pack_matrix(A.T), fit)
    return _layer(dy, weights, panels, adapter, None, table, K, backward=True)
