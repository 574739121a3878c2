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
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels.compression.whiten import damped_cholesky
from hylora_kernels.weights import GROUP

# Share of G's mean diagonal. With 1e-3 the linears of a block of SmolLM2 lose 2 % more on the 4096
# tokens of their G at 3 and 4 bits, 4 % more on others like them and 6 % more on another kind of
# text. With 1e-1 they lose 4 to 6 % more on their own tokens, and 6 and 15 % less on the others.
DAMPING = 1e-2
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # Shares of a group's range that a grid may span,
MOST_CLIPPED_BITS = 5  # up to this width: a grid of 64 levels gains nothing by clipping.
LEAST_SCALE = 2.0**-24  # float16's smallest number above 0.


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


@dataclass(frozen=True)
class Grid:
    """The numbers that each group of 64 weights may become: scale * (code - zero).

    scales: float32 [n, G], rounded to float16.
    zeros:  float32 [n, G], integers.
    top:    the largest code.
    """

    scales: Tensor
    zeros: Tensor
    top: int

    @property
    def span(self) -> tuple[Tensor, Tensor, Tensor]:
        """scales, and the least and the largest of code - zero, [n, G]."""
        return self.scales, -self.zeros, self.top - self.zeros


def find_grid(W: Tensor, bits: int, weights: Tensor | None, clip: bool) -> Grid:
    """W float32 [n, k] -> the grid of each group that holds its range, or with `clip` the share of
    it that rounds with the least error, columns weighted by `weights` [k].

    Every grid has a 0. Raises ValueError for a range beyond float16 scales.
    """
    X = F.pad(W, (0, -W.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = X.amin(-1).clamp_max(0), X.amax(-1).clamp_min(0)
    if bits == 8:
        scales = _scales(torch.maximum(high, -low), 127, bits)
        return Grid(scales, torch.full_like(scales, 128), 255)
    best = _grid(low, high, 1.0, bits)
    if not clip or bits > MOST_CLIPPED_BITS:
        return best
    root = torch.ones_like(W[0]) if weights is None else weights.sqrt()
    root = F.pad(root, (0, -len(root) % GROUP)).reshape(-1, GROUP)
    least = _rounding_error(X, best, root)
    for share in CLIPS[1:]:
        tried = _grid(low, high, share, bits)
        errors = _rounding_error(X, tried, root)
        better = errors < least
        least = torch.where(better, errors, least)
        scales = torch.where(better, tried.scales, best.scales)
        best = Grid(scales, torch.where(better, tried.zeros, best.zeros), best.top)
    return best


def _grid(low: Tensor, high: Tensor, share: float, bits: int) -> Grid:
    top = 2**bits - 1
    scales = _scales((high - low) * share, top, bits)
    return Grid(scales, (-share * low / scales).round().clamp(0, top), top)


def _scales(span: Tensor, steps: int, bits: int) -> Tensor:
    scales = (span / steps).half().float()
    if not scales.isfinite().all():
        raise ValueError(
            f"W: a group spans {float(span.max()):.3g}, and scales of {bits} bits are float16:"
            f" at most {65504.0 * steps:.3g}"
        )
    return scales.clamp_min(LEAST_SCALE)


def _rounding_error(X: Tensor, grid: Grid, root: Tensor) -> Tensor:
    """X [n, G, 64], root of the columns' weights [G, 64] -> the squared error of each group."""
    scales, least, largest = (t[..., None] for t in grid.span)
    exact = X / scales
    error = exact.round().clamp_(least, largest).sub_(exact).mul_(root)
    return error.square_().sum(-1) * grid.scales.square()


def round_rows(W: Tensor, grids: Sequence[Grid], given: Feedback | None) -> list[Tensor]:
    """W float32 [n, k] -> its codes uint8 [n, k] on each of the grids, with feedback if given."""
    n, k = W.shape
    group = torch.arange(k, device=W.device) // GROUP
    if given is None:
        found = []
        for grid in grids:
            scales, least, largest = (t[:, group] for t in grid.span)
            codes = (W / scales).round_().clamp_(least, largest).sub_(least)
            found.append(codes.to(torch.uint8))
        return found
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
