"""The torch products: the formula by torch's own matrix products, in any floating dtype anywhere.

The pair form needs four products, or two of P = [SVh; A] and Q = [U, alpha B], base and adapter
side by side. Laying them side by side copies (r + ra) (K + N) numbers a call and saves a pass over
y, M N numbers. On one core in bfloat16, K = 576, N = 1536, r = 208, ra = 16, M = 2048 takes 4.1 ms
instead of 8.2, but M = 16 0.48 ms instead of 0.40. The sizes decide.

The pivoted form multiplies less and then has to put its outputs in order. A CPU gathers columns
slowly: with r = 400 there, M = 2048 takes 28 ms gathered and 11 ms as the equivalent pair, whose U
is built for each call; M = 16 takes 0.54 and 1.00 ms. On an H100, 2048 x 5632, r = 800, M = 2048
takes 77.8 us and the pair 50.9; the pair with its U built for the call is predicted to take 62.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from hylora_kernels.backends.shared import backward as steps
from hylora_kernels.backends.shared.gpu import is_captured
from hylora_kernels.backends.shared.kept import KeptWhileUnwritten, outside_graph_pools
from hylora_kernels.weights import Needs, Saved, Weights

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _side_by_side(SVh, U, A, B, alpha) -> tuple[Tensor, Tensor]:
    """P = [SVh; A] and Q = [U, alpha B]."""
    return torch.cat((SVh, A)), torch.cat((U, B if alpha == 1.0 else alpha * B), 1)


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra] before alpha)."""
    SVh, U, A, B, bias, alpha, pivots = weights
    if weights.is_dense:
        part_order(pivots, 0)  # raises if pivots are not all of the outputs
        return add_adapter(linear(x, SVh, bias), x, A, B, alpha)
    U, pivots = _pair_where_quicker(x, U, pivots)
    if pivots is not None:
        h_s = x @ SVh.T
        y = torch.cat((h_s, h_s @ U.T), -1).index_select(-1, output_order(pivots, U.shape[0]))
        if bias is not None:
            y += bias
        return add_adapter(y, x, A, B, alpha)
    if A is not None and _saved_pass_outweighs_copy(x.shape[0], SVh, U, A):
        P, Q = _side_by_side(SVh, U, A, B, alpha)
        h = x @ P.T
        return linear(h, Q, bias), h[:, weights.rank :].clone()
    return add_adapter(linear(linear(x, SVh), U, bias), x, A, B, alpha)


def backward(dy: Tensor, saved: Saved, weights: Weights, needs: Needs) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    return steps.backward(dy, saved, weights, needs, backward_x, adapter_gradients)


def adapter_gradients(dh_a, x, h_a, dy, alpha, need_db) -> tuple[Tensor | None, ...]:
    """(dA [ra, K] = dh_a^T x, dB [N, ra] = alpha dy^T h_a, None), None without dh_a or h_a."""
    dA = None if dh_a is None else dh_a.T @ x
    return dA, None if h_a is None else alpha * (dy.T @ h_a), None


def backward_x(dy: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """dy [M, N] -> (dx [M, K], dh_a [M, ra] = alpha dy B, None without an adapter)."""
    SVh, U, A, B, _, alpha, pivots = weights
    U, pivots = _pair_where_quicker(dy, U, pivots)
    if A is not None and pivots is None and _saved_pass_outweighs_copy(len(dy), SVh, U, A):
        P, Q = _side_by_side(SVh, U, A, B, alpha)
        g = dy @ Q
        return g @ P, g[:, SVh.shape[0] :]
    if pivots is None:
        dh_s = dy @ U
    else:
        by_part = dy.index_select(-1, part_order(pivots, U.shape[0]))
        rank = pivots.shape[0]
        dh_s = torch.addmm(by_part[:, :rank], by_part[:, rank:], U)
    dx = dh_s @ SVh
    if A is None:
        return dx, None
    dh_a = alpha * (dy @ B)
    return dx.addmm_(dh_a, A), dh_a


def _saved_pass_outweighs_copy(M, SVh, U, A) -> bool:
    """True where laying base and adapter side by side copies less than the saved pass over y."""
    (rank, K), N = SVh.shape, U.shape[0]
    return (rank + A.shape[0]) * (K + N) < M * N


def _pair_where_quicker(rows, U, pivots):
    """(U [N, r], None) of the equivalent pair for many rows, else (U, pivots)."""
    if pivots is None or not building_U_outweighs_order(len(rows), len(pivots), rows.device):
        return U, pivots
    return pair_U(U, pivots), None


def building_U_outweighs_order(rows: int, rank: int, device: torch.device) -> bool:
    """True where a pivoted call is faster as the equivalent pair, whose U [N, r] is built for it.

    That passes over N r numbers and saves passes over M N. On a CPU, gathering a column of y costs
    about three times as much a number as gathering a row of U. On a GPU building passes over three
    numbers where putting in order passes over two, and takes two launches more. Predicted from an
    H100's times at M = 2048: 2048 to 2048, r = 544 saves 11 us of 34 and costs 7; 2048 to 5632,
    r = 800 saves 27 of 78 and costs 11; 4096 to 11008, r = 1568 saves 29 and would cost 35.
    """
    return 3 * rows > rank if device.type == "cpu" else rows >= max(256, 2 * rank)


def pair_U(U: Tensor, pivots: Tensor) -> Tensor:
    """U [N - r, r] of the pivoted form -> [N, r] of the equivalent pair: h itself for a pivot."""
    others_count, rank = U.shape
    orders = _orders_of(pivots, others_count)
    pair = U.new_zeros(others_count + rank, rank)
    pair.index_copy_(0, orders.part[rank:], U)
    pair.view(-1).index_fill_(0, orders.ones, 1)
    return pair


def add_adapter(y, x, A, B, alpha) -> tuple[Tensor, Tensor]:
    """y += alpha (x A^T) B^T in place; returns (y, h_a)."""
    if A is None:
        return y, x.new_empty(x.shape[0], 0)
    h_a = x @ A.T
    if abs(alpha) < SMALLEST_NORMAL:  # BLAS skips a product times 0, but 0 NaN is NaN
        return y.addmm_(h_a * alpha, B.T), h_a
    return y.addmm_(h_a, B.T, alpha=alpha), h_a


class Orders(NamedTuple):
    """What the pivoted form's outputs are put in order by.

    part:   int64 [N]: the pivot outputs, then the others, both ascending.
    output: int64 [N]: the place of each output in the concatenation (pivots, others).
    ones:   int64 [r]: where the ones stand in the equivalent pair's U [N, r], counted row by row.
    """

    part: Tensor
    output: Tensor
    ones: Tensor


# Making them takes about 30 us, as much as the products of a small decode step.
_orders: KeptWhileUnwritten[Orders] = KeptWhileUnwritten(compares_copies=True)


def part_order(pivots: Tensor, others_count: int) -> Tensor:
    """Orders.part, kept while pivots live."""
    return _orders_of(pivots, others_count).part


def output_order(pivots: Tensor, others_count: int) -> Tensor:
    """Orders.output, kept likewise."""
    return _orders_of(pivots, others_count).output


def _orders_of(pivots: Tensor, others_count: int) -> Orders:
    # Inside a CUDA graph nothing may wait for the device, and memory belongs to the graph.
    capturing = is_captured(pivots.device)
    out_features = others_count + pivots.shape[0]
    kept = _orders.get_unchecked(pivots) if capturing else _orders.get(pivots)
    if kept is not None and len(kept.part) == out_features:
        return kept
    if capturing:
        return _make_orders(pivots, out_features)
    check_pivots(pivots, out_features)
    orders = outside_graph_pools(lambda: _make_orders(pivots, out_features), pivots.device)
    _orders.keep(orders, pivots)
    return orders


def _make_orders(pivots: Tensor, out_features: int) -> Orders:
    is_other = torch.ones(out_features, dtype=torch.uint8, device=pivots.device)
    is_other.index_fill_(0, pivots.long(), 0)  # is_other[...] = 0 would copy a 0 to the GPU
    part, rank = torch.argsort(is_other, stable=True), len(pivots)
    ones = part[:rank] * rank + torch.arange(rank, device=pivots.device)
    return Orders(part, torch.argsort(part), ones)


def check_pivots(pivots: Tensor, out_features: int) -> None:
    """Raise ValueError unless pivots [r] are strictly ascending within [0, N). Reads the values:
    waits for a GPU."""
    low, high = (int(pivots[0]), int(pivots[-1])) if len(pivots) else (0, 0)
    if low < 0 or high >= out_features or bool((pivots[1:] <= pivots[:-1]).any()):
        raise ValueError(
            f"pivots must be strictly ascending within [0, {out_features}), got {pivots.tolist()}"
            if len(pivots) <= 32
            else f"pivots must be strictly ascending within [0, {out_features}), got {len(pivots)}"
            f" values from {low} to {high} that are not"
        )
