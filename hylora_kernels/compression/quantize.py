"""Matrices, layers and embeddings in few bits, and what that costs in the unit of the rank curves.

Rounding is one-sided: it looks at the inputs' Gram matrix G alone. The error is two-sided, so that
bits and ranks of all layers are comparable. Rounding with feedback from the gradients' side as well
lowers the two-sided error, but not the perplexity (SmolLM2-135M).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hylora_kernels.compression.gptq import DAMPING, feedback, round_rows
from hylora_kernels.compression.refit import ridge_solve
from hylora_kernels.compression.tokens import Term, row_slices
from hylora_kernels.compression.whiten import DEAD, GRADIENT_DAMPING, INPUT_DAMPING, damped, is_dead
from hylora_kernels.layers.factorize import check_matrix, to_float64
from hylora_kernels.layers.grids import Grid, find_grid
from hylora_kernels.layers.quantized import check_bits
from hylora_kernels.reference import dequantize, quantized
from hylora_kernels.weights import QuantizedMatrix, Weights

METHODS = ("gptq", "rtn")
ROWS = 8192  # Rows of all widths in one sweep: its column and what it is rounded to fit into L2.
LARGEST = 4.0  # Magnitude in each column of U: its root mean square is about 1, as in ranged_pair.
RIDGE = 1e-8  # Of the refit of U, times the mean diagonal.


def quantize(
    W: Tensor, bits: int, G: Tensor | None = None, *, method: str = "gptq"
) -> QuantizedMatrix:
    """W [n, k] -> W in `bits` bits, 2, 3, 4, 5, 6 or 8.

    G:      [k, k], the Gram matrix of the inputs (compression/calibration.py). Without it columns
            do not correlate, and "gptq" only chooses better grids than "rtn".
    method: "gptq" feeds the rounding error of each column to the later ones (compression/gptq.py)
            and searches the share of each group's range that is best to span up to 5 bits. "rtn"
            spans the range and rounds to nearest; G is not read.

    Raises TypeError or ValueError naming the argument, FloatingPointError for a W or G that is not
    finite.

        quantize(layer.weight, 4, statistics.inputs[path])
    """
    return quantize_each([W], [bits], G, method=method)[0][bits]


def quantize_each(
    matrices: Sequence[Tensor],
    widths: Sequence[int],
    G: Tensor | None = None,
    *,
    method: str = "gptq",
) -> list[dict[int, QuantizedMatrix]]:
    """Matrices [n_i, k] that read one input -> bits -> each of them as quantize() gives it, in one
    sweep over the columns."""
    widths = [*dict.fromkeys(widths)]
    for name, given in (("matrices", matrices), ("widths", widths)):
        if not given:
            raise ValueError(f"{name} must not be empty")
    for bits in widths:
        check_bits("bits", bits)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    matrices = [_checked("W", W) for W in matrices]
    k = matrices[0].shape[1]
    if any(W.shape[1] != k for W in matrices):
        raise ValueError(f"matrices must read one input, got {[list(W.shape) for W in matrices]}")
    by = None if G is None or method == "rtn" else feedback(_checked_gram(G, matrices[0]))
    weights = None if by is None else by.weights
    stacked = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    parts: dict[int, list[tuple[Tensor, Grid]]] = {bits: [] for bits in widths}
    for rows in stacked.split(max(ROWS // len(widths), 1)):
        grids = [find_grid(rows, bits, weights, clip=method == "gptq") for bits in widths]
        for bits, grid, codes in zip(widths, grids, round_rows(rows, grids, by), strict=True):
            parts[bits].append((codes, grid))
    sizes = [len(W) for W in matrices]
    by_width = {bits: _packed(bits, sizes, parts.pop(bits)) for bits in widths}
    return [
        dict(zip(widths, of_one, strict=True)) for of_one in zip(*by_width.values(), strict=True)
    ]


def _packed(bits: int, sizes: list[int], parts: list[tuple[Tensor, Grid]]) -> list[QuantizedMatrix]:
    codes, scales, zeros = (
        torch.cat(t).split(sizes)
        for t in zip(*((c, g.scales, g.zeros.to(torch.uint8)) for c, g in parts), strict=True)
    )
    return [
        quantized(c, s, None if bits == 8 else z, bits)
        for c, s, z in zip(codes, scales, zeros, strict=True)
    ]


def _checked_gram(G: Tensor, W: Tensor) -> Tensor:
    G, k = _checked("G", G), W.shape[1]
    if G.shape != (k, k):
        raise ValueError(f"G must be [{k}, {k}] for a W of {k} columns, got {list(G.shape)}")
    return G.to(W.device)


def _checked(name: str, matrix: Tensor) -> Tensor:
    """The matrix in float32."""
    check_matrix(name, matrix, "[n, k]" if name == "W" else "[k, k]")
    matrix = matrix.detach().float()
    if not matrix.isfinite().all():
        raise FloatingPointError(f"{name} is not finite")
    return matrix


def error(
    E: Tensor,
    G: Tensor | None,
    C: Tensor | None,
    damping: tuple[float, float] = (INPUT_DAMPING, GRADIENT_DAMPING),
) -> float:
    """E [N, K], G [K, K], C [N, N] -> tr(E^T C E G), what a weight that is off by E costs.

    The unit is that of Factors.S^2 of the same statistics (compression/whiten.py): for E, the
    components that a rank drops, it is the sum of their S^2. Statistics.nats makes nats a token of
    it: predicted increase of the loss = error / (2 N^2) for N calibration tokens.

    damping: shares of the mean diagonals that are added to G and C, as Factors.damping has them.

        error(W - dequantize(quantize(W, 4, G)), G, C) * statistics.nats(leader)
    """
    E = E.detach().float()
    products = _weighted(E, G, damping[0]) * _weighted(E.T, C, damping[1]).T
    lost = float(products.sum(dtype=torch.float64))
    dead = any(gram is not None and is_dead(gram) for gram in (G, C))
    return lost * DEAD**2 if dead else lost  # As whiten: it must not outbid other layers.


def _weighted(E: Tensor, gram: Tensor | None, damping: float) -> Tensor:
    """E [n, m] times the damped Gram matrix [m, m], or the identity if that is none or of zeros."""
    if gram is None or is_dead(gram):
        return E
    return torch.addmm(E, E, gram.to(E), beta=damping * float(gram.diagonal().mean()))


def quantize_weights(
    weights: Weights,
    bits: int,
    G: Tensor | None = None,
    *,
    W: Tensor | None = None,
    method: str = "gptq",
) -> Weights:
    """A layer with its frozen matrices in `bits` bits; adapter, bias and alpha stay as they are.

    dense    SVh as by quantize(); U stays empty.
    pair     SVh as by quantize(), then U, refitted to what SVh became, in the metric of its own
             inputs, h = x SVh^T. Columns of U are scaled to one largest magnitude first, rows of
             SVh the other way.
    pivoted  8 bits only, by rounding. Every other output is a combination of pivots, with the Gram
             matrix SVh G SVh^T, which is close to singular: 4 bits ruin the model.

    G: as in quantize(). W: [N, K], the matrix that a pair's U is refitted to; None: U SVh itself.

    Raises the errors of quantize(), and ValueError for a pivoted layer in other than 8 bits.
    """
    if weights.pivots is None:
        return _pair(weights, bits, G, W, method)
    if weights.is_dense:
        return replace(weights, SVh=quantize(weights.SVh, bits, G, method=method))
    if bits != 8:
        raise ValueError(f"bits must be 8 for a pivoted layer (or take form='pair'), got {bits}")
    SVh, U = (quantize(t, 8, method="rtn") for t in (weights.SVh, weights.U))
    return replace(weights, SVh=SVh, U=U)


def _pair(weights: Weights, bits: int, G: Tensor | None, W: Tensor | None, method: str) -> Weights:
    U, SVh = to_float64(weights.U), to_float64(weights.SVh)
    size = U.abs().amax(0) / LARGEST
    size = torch.where(size > 0, size, torch.ones_like(size))
    U, SVh = U / size, SVh * size[:, None]
    wanted = U @ SVh if W is None else to_float64(W)
    codes = quantize(SVh, bits, G, method=method)
    V = dequantize(codes, torch.float64).to(U.device)
    weighted = V if G is None else V @ damped(G, DAMPING)
    own = weighted @ V.T
    U = ridge_solve(wanted @ weighted.T, U, own, RIDGE * own.diagonal().mean())
    return replace(weights, SVh=codes, U=quantize(U, bits, own, method=method))


def embedding_metric(terms: Sequence[Term]) -> Tensor:
    """The metric [d, d] of an embedding's columns: that of all rows, each by its weight."""
    return torch.stack([t.metric * t.weight.sum() for t in terms]).sum(0)


def quantize_embedding(
    E: Tensor, widths: Sequence[int], terms: Sequence[Term], *, method: str = "gptq"
) -> dict[int, tuple[QuantizedMatrix, float]]:
    """E [V, d], the damped terms of its places (compression/tokens.py) -> bits -> E in that width
    and the error, in the unit that TokenStatistics.nats reads.

    All rows have one width. Rows of frequent tokens in more bits than those of rare ones lose on
    every text but the calibration's.
    """
    found = quantize_each([E], widths, embedding_metric(terms), method=method)[0]
    return {bits: (matrix, _embedding_error(E, matrix, terms)) for bits, matrix in found.items()}


def _embedding_error(E: Tensor, matrix: QuantizedMatrix, terms: Sequence[Term]) -> float:
    """Term.error of all terms, its products in float32: 1e-6 of the sum."""
    D, total = E.detach().float() - dequantize(matrix), 0.0
    for rows in row_slices(len(E)):
        for term in terms:
            squares = (D[rows] @ term.metric.float()).mul_(D[rows]).sum(1, dtype=torch.float64)
            total += float(term.weight[rows] @ squares)
    return total
