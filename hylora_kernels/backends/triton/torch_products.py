"""Torch's own products, where they are the fastest, helped in two places.

The pivoted form's outputs are put in order by one pass of a kernel. In training the pair form's
factors are kept side by side, P = [SVh; A] and Q = [U, B], from the first backward on, and only the
adapter's slices are written anew, where laying all of them side by side would read and write every
factor once a call. The products are the same ones either way, and so are the bits.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from hylora_kernels.backends.shared import torch_products as products
from hylora_kernels.backends.triton.config import Problem
from hylora_kernels.weights import Weights


def forward(x: Tensor, weights: Weights, problem: Problem) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha."""
    SVh, U, A, B, bias, alpha, pivots = weights
    if pivots is not None and problem.others and problem.M:
        from hylora_kernels.backends.triton import launch

        h_s = x @ SVh.T
        order = products.output_order(pivots, problem.others)
        y = launch.merge_pivots(h_s, h_s @ U.T, bias, order)
        return products.add_adapter(y, x, A, B, alpha)
    with _one_at_a_time:
        return products.forward(x, weights, _side_by_side)


def backward_x(dy: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """dy [M, N] -> (dx [M, K], dh_a [M, ra] = alpha dy B, None without an adapter)."""

    def kept_from_now_on(weights):
        SVh, U = weights.SVh, weights.U
        if not _capturing(SVh) and not _serves(_kept.get(SVh), SVh, U):
            _kept[SVh] = _SideBySide(SVh, U, weights.lora_rank)
        return _side_by_side(weights)

    with _one_at_a_time:
        return products.backward_x(dy, weights, kept_from_now_on)


def _side_by_side(weights: Weights) -> tuple[Tensor, Tensor]:
    kept = _kept.get(weights.SVh)
    if not _serves(kept, weights.SVh, weights.U):
        return products.side_by_side(weights)
    return kept.refreshed(weights.A, weights.B)


def _serves(kept: _SideBySide | None, SVh: Tensor, U: Tensor) -> bool:
    """Whether what is kept is of these very factors, as they are now, and may be used: another
    stream could be multiplying by another adapter, and a CUDA graph would go on using its memory
    after forget()."""
    if kept is None or _capturing(SVh):
        return False
    return kept.U() is U and kept.stamp == _stamp(SVh, U) and kept.stream == _stream(SVh)


def forget(SVh: Tensor) -> None:
    """Drop what is kept for a layer with this SVh."""
    _kept.pop(SVh, None)


class _SideBySide:
    """P [r + ra, K] and Q [N, r + ra] of one layer."""

    def __init__(self, SVh: Tensor, U: Tensor, lora_rank: int):
        rank, K = SVh.shape
        self.P = SVh.new_empty(rank + lora_rank, K)
        self.Q = U.new_empty(U.shape[0], rank + lora_rank)
        self.P[:rank] = SVh
        self.Q[:, :rank] = U
        self.U, self.stamp, self.stream = TensorWeakRef(U), _stamp(SVh, U), _stream(SVh)

    def refreshed(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """P and Q with this adapter."""
        rank = self.P.shape[0] - A.shape[0]
        self.P[rank:] = A
        self.Q[:, rank:] = B
        return self.P, self.Q


# SVh -> its _SideBySide
_kept = WeakTensorKeyDictionary()
# From writing an adapter's slices to queueing the products that read them: two threads may call one
# layer with two adapters.
_one_at_a_time = threading.Lock()


def _stamp(SVh: Tensor, U: Tensor) -> tuple:
    """What changes when the factors are written to; never the same for inference tensors, which
    don't say."""
    if SVh.is_inference() or U.is_inference():
        return (object(),)
    return SVh._version, U._version


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
