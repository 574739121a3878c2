"""Rounding a matrix to few bits with error feedback, so that its outputs change least.

With the inputs' Gram matrix G, the error E = W - Q of a row costs e G e^T. Let G = R D R^T with R
unit upper triangular and D diagonal. Then

    e G e^T = sum_j D_j (e_j + sum_{i < j} e_i R_ij)^2

so the columns are rounded from left to right, each after the feedback of the errors before it:
q_j = round(w_j + sum_{i < j} e_i R_ij). That is GPTQ (arXiv:2210.17323) without an inverse, in the
form of LDLQ (arXiv:2307.13304). Columns go by falling diagonal of G ("act order"), but scales
belong to groups of neighbours in the matrix's own order ("static groups").

Rows do not depend on each other, so all matrices on one input and all widths of each are rows of
one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hylora_kernels.compression.whiten import damped_cholesky
from hylora_kernels.layers.grids import Grid
from hylora_kernels.weights import GROUP

# Share of G's mean diagonal. With 1e-3 the linears of a block of SmolLM2 lose 2 % more on the 4096
# tokens of their G at 3 and 4 bits, 4 % more on others like them and 6 % more on another kind of
# text. With 1e-1 they lose 4 to 6 % more on their own tokens, and 6 and 15 % less on the others.
DAMPING = 1e-2


@dataclass(frozen=True)
class Feedback:
    """The feedback of rounding errors among k inputs.

    weights: float32 [k], the damped diagonal of G.
    order:   int64 [k], the columns as they are rounded, by falling weight.
    factor:  float32 [k, k], R of G in this order.
    """

    weights: Tensor
    order: Tensor
    factor: Tensor


def feedback(G: Tensor) -> Feedback | None:
    """G [k, k] -> its Feedback, by way of float64; None for a G of zeros, which says nothing.

    Raises ValueError for a G that is not positive semi-definite.
    """
    order = G.diagonal().argsort(descending=True, stable=True)
    flipped = order.flip(0)
    # Of the matrix from its last row and column to its first, a lower factor is an upper one.
    try:
        L, damping = damped_cholesky("", G[flipped][:, flipped], DAMPING)
    except ValueError:
        raise ValueError(
            "G must be positive semi-definite, got a Gram matrix that is not"
        ) from None
    if L is None:
        return None
    factor = L.flip(0, 1)
    weights = G.diagonal() + damping * G.diagonal().mean()
    factor = (factor / factor.diagonal()).to(G.device, torch.float32)
    return Feedback(weights.float(), order, factor)


def round_rows(W: Tensor, grids: Sequence[Grid], given: Feedback | None) -> list[Tensor]:
    """W float32 [n, k] -> its codes uint8 [n, k] on each of the grids, with feedback if given."""
    if given is None:
        return [grid.nearest(W) for grid in grids]
    n, k = W.shape
    group = torch.arange(k, device=W.device) // GROUP
    by_grid = zip(*(grid.span for grid in grids), strict=True)
    spans = [torch.cat(parts).T.contiguous() for parts in by_grid]
    group = group[given.order]
    columns = W.T[given.order].repeat(1, len(grids))
    _sweep(columns, given.factor, spans, group.tolist())
    columns -= spans[1][group]
    codes = torch.empty_like(columns, dtype=torch.uint8)
    codes[given.order] = columns.to(torch.uint8)
    return list(codes.T.split(n))


def _sweep(columns: Tensor, factor: Tensor, spans: list[Tensor], group: list[int]) -> None:
    """columns [k, n], in the order of the factor -> code - zero, in place.

    By halves: the errors of the first one are fed to the second in one product.
    """
    errors = columns.clone()
    column, error = columns.unbind(), errors.unbind()
    scale, least, largest = (t.unbind() for t in spans)

    def run(start: int, stop: int) -> None:
        if stop - start == 1:
            g, w = group[start], column[start]
            w.div_(scale[g]).round_()
            torch.clamp(w, least[g], largest[g], out=w)
            error[start].addcmul_(w, scale[g], value=-1)
            return
        middle = (start + stop) // 2
        run(start, middle)
        columns[middle:stop].addmm_(factor[start:middle, middle:stop].T, errors[start:middle])
        run(middle, stop)

    run(0, len(columns))
