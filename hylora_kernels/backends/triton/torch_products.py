"""Torch's own products, where they are the fastest. One launch puts the pivoted form's outputs in
order; the products, and so the bits, are those of the shared torch products."""

from __future__ import annotations

from torch import Tensor

from hylora_kernels.backends.shared import torch_products as shared_products
from hylora_kernels.backends.shared.gpu import is_captured
from hylora_kernels.backends.triton.config import Problem
from hylora_kernels.weights import Weights


def forward(
    x: Tensor, weights: Weights, problem: Problem, is_first: bool = False
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha. is_first: as for dispatch."""
    SVh, U, A, B, bias, alpha, pivots = weights
    has_two_parts = pivots is not None and problem.others > 0 and problem.M > 0
    as_pair = x.is_cuda and shared_products.building_U_outweighs_order(
        problem.M, problem.rank, x.device
    )
    if not has_two_parts or as_pair or not (is_first or _merging_outweighs_launch(x, problem)):
        return shared_products.forward(x, weights)
    from hylora_kernels.backends.triton import launch

    h_s = x @ SVh.T
    order = shared_products.output_order(pivots, problem.others)
    y = launch.merge_pivots(h_s, h_s @ U.T, bias, order)
    return shared_products.add_adapter(y, x, A, B, alpha)


def _merging_outweighs_launch(x: Tensor, problem: Problem) -> bool:
    """True where one launch that puts y in order is faster than torch's passes over it.

    Called from Python, a launch through Triton costs the host some 40 us more than they do. They
    pass over y four times more: at 4 TB/s that takes as long from 2^24 numbers on.
    """
    is_from_python = x.is_cuda and not is_captured(x.device)
    return not is_from_python or problem.M * problem.N >= 2**24
