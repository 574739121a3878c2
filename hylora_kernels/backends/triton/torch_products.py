"""Torch's own products, where they are the fastest, helped in two places.

One pass of a kernel puts the pivoted form's outputs in order. In training the pair form's factors
are kept side by side, P = [SVh; A] and Q = [U, B], from the first backward on: each call then
writes the adapter's slices only, instead of copying every factor. The products, and so the bits,
are the same either way.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from hylora_kernels.backends.shared import torch_products as shared_products
from hylora_kernels.backends.shared.kept import KeptWhileUnwritten, outside_graph_pools
from hylora_kernels.backends.triton.config import Problem
from hylora_kernels.weights import Weights


def forward(
    x: Tensor, weights: Weights, problem: Problem, is_first: bool = False
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha. is_first: as for dispatch."""
    SVh, U, A, B, bias, alpha, pivots = weights
    has_two_parts = pivots is not None and problem.others > 0 and problem.M > 0
    if has_two_parts and (is_first or _merging_outweighs_launch(x, problem)):
        from hylora_kernels.backends.triton import launch

        h_s = x @ SVh.T
        order = shared_products.output_order(pivots, problem.others)
        y = launch.merge_pivots(h_s, h_s @ U.T, bias, order)
        return shared_products.add_adapter(y, x, A, B, alpha)
    with _one_at_a_time:
        return shared_products.forward(x, weights, _side_by_side)


def _merging_outweighs_launch(x: Tensor, problem: Problem) -> bool:
    """True where one launch that puts y in order is faster than torch's passes over it.

    Called from Python, a launch through Triton costs the host some 40 us more than they do. They
    pass over y four times more: at 4 TB/s that takes as long from 2^24 numbers on.
    """
    is_from_python = x.is_cuda and not _capturing(x)
    return not is_from_python or problem.M * problem.N >= 2**24


def backward_x(dy: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """dy [M, N] -> (dx [M, K], dh_a [M, ra] = alpha dy B, None without an adapter)."""

    def kept_from_now_on(weights: Weights) -> tuple[Tensor, Tensor]:
        if not _capturing(weights.SVh) and _kept_for(weights) is None:
            made = outside_graph_pools(lambda: _SideBySide(weights), weights.SVh.device)
            _kept.keep(made, weights.SVh, weights.U)
        return _side_by_side(weights)

    with _one_at_a_time:
        return shared_products.backward_x(dy, weights, kept_from_now_on)


def forget(SVh: Tensor) -> None:
    """Drop what is kept for a layer with this SVh."""
    _kept.forget(SVh)


class _SideBySide:
    """P [r + ra, K] and Q [N, r + ra] of one layer."""

    def __init__(self, weights: Weights):
        SVh, U, rank = weights.SVh, weights.U, weights.rank
        self.P = SVh.new_empty(rank + weights.lora_rank, weights.in_features)
        self.Q = U.new_empty(len(U), rank + weights.lora_rank)
        self.P[:rank] = SVh
        self.Q[:, :rank] = U
        self.stream = _stream(SVh)

    def refreshed(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """P and Q with this adapter."""
        rank = self.P.shape[0] - A.shape[0]
        self.P[rank:] = A
        self.Q[:, rank:] = B
        return self.P, self.Q


_kept: KeptWhileUnwritten[_SideBySide] = KeptWhileUnwritten()
# Held from writing an adapter's slices until the products that read them are queued: two threads
# may call one layer with two adapters.
_one_at_a_time = threading.Lock()


def _side_by_side(weights: Weights) -> tuple[Tensor, Tensor]:
    kept = _kept_for(weights)
    if kept is None:
        return shared_products.side_by_side(weights)
    return kept.refreshed(weights.A, weights.B)


def _kept_for(weights: Weights) -> _SideBySide | None:
    """The P and Q kept for these factors; None if there are none or they must not be used.

    Another stream could still multiply by another adapter, and a CUDA graph would go on using the
    memory after forget().
    """
    kept = None if _capturing(weights.SVh) else _kept.get(weights.SVh, weights.U)
    return kept if kept is not None and kept.stream == _stream(weights.SVh) else None


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
