"""From tensors to launches: workspace and arguments of the ops in csrc/cuda/bindings.cpp."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hylora_kernels.backends.shared import counters, torch_products
from hylora_kernels.backends.shared.gpu import alpha_in_B_of_float16, on_device, target_of
from hylora_kernels.weights import Weights

_ops = torch.ops.hylora


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]), h_a before alpha, in one launch."""
    SVh, U, A, B, bias, alpha, pivots = alpha_in_B_of_float16(weights)
    y, h_a = layer(x, SVh, A, U, B, bias, alpha, pivots, weights.out_features, transposed=False)
    return y, x.new_empty(len(x), 0) if h_a is None else h_a


def backward_x(dy: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """dy [M, N] -> (dx [M, K], dh_a [M, ra] = alpha dy B or None) in one launch."""
    SVh, U, A, B, _, alpha, pivots = weights
    return layer(dy, U, B, SVh, A, None, alpha, pivots, weights.in_features, transposed=True)


def layer(
    x, W1, W1a, W2, W2a, bias, alpha, pivots, width: int, transposed: bool
) -> tuple[Tensor, Tensor | None]:
    """Both products of a layer in one launch; csrc/cuda/call.h has the weights' shapes.

    x [M, K] -> (y [M, width] = x [W1; W1a]^T [W2, W2a]^T + bias, h_a [M, ra] = x W1a^T or None).
    """
    (M, K), rank, others = x.shape, W1.shape[transposed], None
    lora_rank = 0 if W1a is None else W1a.shape[transposed]
    if pivots is not None:
        rank = len(pivots)
        outputs = K if transposed else width
        others = torch_products.part_order(pivots, outputs - rank)[rank:]
        pivots = pivots.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    x, W1, W1a, W2, W2a = map(_with_contiguous_rows, (x, W1, W1a, W2, W2a))
    target = target_of(x.device)
    sizes = transposed, pivots is not None, M, K, width, rank, lora_rank
    h_columns, cells, count, *_ = _layer_sizes(*sizes, *target)
    y, h = x.new_empty(M, width), x.new_empty(M, h_columns)
    h_a = x.new_empty(M, lora_rank) if lora_rank else None
    partial = x.new_empty(cells, dtype=torch.float32) if cells else None
    with on_device(x.device):
        zeros = counters.zeros(x.device, count)
        _ops.cuda_layer.default(
            *(x, W1, W1a, W2, W2a, bias, pivots, others, alpha, transposed, *target),
            *(y, h, h_a, partial, zeros),
        )
    return y, h_a


def adapter_gradients(
    dh_a, x, h_a, dy, alpha, needs_db: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The adapter's gradients in one launch.

    (dA [ra, K] = dh_a^T x, dB [N, ra] = alpha dy^T h_a, db [N] = the sum of dy's rows). dA is None
    where dh_a is None, dB and db where h_a is None, db also unless needs_db.
    """
    one = h_a if dh_a is None else dh_a
    (M, lora_rank), target = one.shape, target_of(one.device)
    K = 0 if dh_a is None else x.shape[1]
    N = 0 if h_a is None else dy.shape[1]
    _, cells, count, *_ = _adapter_gradients_sizes(M, K, N, lora_rank, *target)
    dA = one.new_empty(lora_rank, K) if K else None
    dB = one.new_empty(N, lora_rank) if N else None
    db = one.new_empty(N) if needs_db else None
    partial = one.new_empty(cells, dtype=torch.float32) if cells else None
    x, dy = _with_contiguous_rows(x if K else None), _with_contiguous_rows(dy if N else None)
    dh_a, h_a = (t if t is None else t.contiguous() for t in (dh_a, h_a))
    with on_device(one.device):
        zeros = counters.zeros(one.device, count)
        _ops.cuda_adapter_gradients.default(
            *(dh_a, x, h_a, dy, alpha, *target, dA, dB, db, partial, zeros)
        )
    return dA, dB, db


def _with_contiguous_rows(matrix: Tensor | None) -> Tensor | None:
    """The matrix, or a copy of it, with each row contiguous as the kernels read it."""
    fits = matrix is None or matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix if fits else matrix.contiguous()


@functools.lru_cache(maxsize=4096)
def _layer_sizes(*problem) -> tuple[int, ...]:
    """(columns of h, float32 numbers of split sums, counters, threads of a block, bytes of its
    shared memory) of a launch."""
    return _ops.cuda_layer_sizes.default(*problem)


@functools.lru_cache(maxsize=4096)
def _adapter_gradients_sizes(*problem) -> tuple[int, ...]:
    """The same five of a launch for the adapter's gradients; h has no columns."""
    return _ops.cuda_adapter_gradients_sizes.default(*problem)
