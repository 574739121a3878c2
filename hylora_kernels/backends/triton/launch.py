"""From tensors to launches: workspace, grid and arguments of the kernels in kernels.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hylora_kernels.backends.shared import counters, torch_products
from hylora_kernels.backends.shared.gpu import alpha_in_B_of_float16
from hylora_kernels.backends.triton import dispatch, kernels
from hylora_kernels.backends.triton.config import (
    BACKWARD,
    FORWARD,
    FUSION,
    AdapterGradientsConfig,
    Config,
    Problem,
    Target,
)
from hylora_kernels.weights import Weights

MOST = 2**31  # elements that 32-bit indices reach


def forward(x: Tensor, weights: Weights, problem: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]), h_a before alpha, in one launch."""
    SVh, U, A, B, bias, alpha, pivots = alpha_in_B_of_float16(weights)
    if not problem.lora_rank:
        A = B = None
    others, target = _others(pivots, problem), dispatch.target_of(x.device)
    y, h_a = layer(x, SVh, A, U, B, bias, alpha, pivots, others, problem, config, target)
    return y, x.new_empty(len(x), 0) if h_a is None else h_a


def backward_x(
    dy: Tensor, weights: Weights, problem: Problem, config: Config
) -> tuple[Tensor, Tensor | None]:
    """dy [M, N] -> (dx [M, K], dh_a [M, ra] = alpha dy B or None) in one launch."""
    SVh, U, A, B, _, alpha, pivots = weights
    A, B = (A.T, B.T) if problem.lora_rank else (None, None)
    others, target = _others(pivots, problem), dispatch.target_of(dy.device)
    return layer(dy, U.T, B, SVh.T, A, None, alpha, pivots, others, problem, config, target)


def _others(pivots: Tensor | None, problem: Problem) -> Tensor | None:
    """int64 [N - r]: the outputs that are no pivots, ascending; None in the pair form."""
    if pivots is None:
        return None
    return torch_products.part_order(pivots, problem.others)[problem.rank :]


def layer(
    x,
    W1,
    W1a,
    W2,
    W2a,
    bias,
    alpha,
    pivots,
    others,
    problem: Problem,
    config: Config,
    target: Target,
) -> tuple[Tensor, Tensor | None]:
    """Both products of a layer in one launch of kernels.layer, which has the weights' shapes.

    x [M, K] -> (y [M, N] = x [W1; W1a]^T [W2, W2a]^T + bias, h_a [M, lora_rank] = x W1a^T or None).
    """
    if x.stride(1) != 1 and x.numel() >= MOST:  # 32-bit indices would not reach its last columns
        x = x.contiguous()
    w1, w1a, w2a = W1.stride(), (0, 0), (0, 0)
    if W1a is not None:
        W1, W1a, w1, w1a = _with_unit_strides_alike(W1, W1a)
        w2a = W2a.stride()
    w2 = W2.stride()
    M, h_columns = len(x), config.rank_blocks(problem) * config.BR
    shrink_blocks = _cdiv(M, config.BM) * config.rank_blocks(problem)
    y, h = x.new_empty(M, problem.width), x.new_empty(M, h_columns)
    h_a = None if W1a is None else x.new_empty(M, problem.lora_rank)
    partial = None
    if config.split > 1:
        cells = shrink_blocks * config.split * config.BM * config.BR
        partial = x.new_empty(cells, dtype=torch.float32)
    zeros = counters.zeros(x.device, 1 + _cdiv(M, config.BM) + shrink_blocks)
    programs = min(config.tiles(problem), config.blocks_per_sm * target.multiprocessors)
    run(
        kernels.layer,
        programs,
        zeros,
        X=x,
        W1=W1,
        W1a=W1a,
        W2=W2,
        W2a=W2a,
        Bias=bias,
        Y=y,
        H=h,
        Ha=h_a,
        Partial=partial,
        Pivots=pivots,
        Others=others,
        **{"M": M, "K": x.shape[1], "N": problem.width, "h_columns": h_columns},
        **{"rank": problem.rank, "lora_rank": problem.lora_rank, "others": problem.others},
        **{"x_m": x.stride(0), "x_k": x.stride(1), "w1_r": w1[0], "w1_k": w1[1]},
        **{"w1a_r": w1a[0], "w1a_k": w1a[1], "w2_n": w2[0], "w2_r": w2[1]},
        **{"w2a_n": w2a[0], "w2a_r": w2a[1], "alpha": alpha},
        **layer_constants(config, problem),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y, h_a


def run(kernel: Any, programs: int, zeros: Tensor | None, **arguments) -> None:
    """Launch with `zeros` as counters, and give these up if the launch is broken off. Inside
    dispatch.forcing(compile_only=True) compile only.

    Ctrl-C breaks one off in the interpreter. The next launch with the same counters would wait for
    tiles that nothing computes.
    """
    launch = kernel[(programs,)]
    if dispatch.is_compile_only():
        launch = functools.partial(kernel.warmup, grid=(1,))
    try:
        launch(Counters=zeros, **arguments, **FUSION)
    except BaseException:
        if zeros is not None:
            counters.forget(zeros)
        raise


def _with_unit_strides_alike(
    base: Tensor, adapter: Tensor
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """(base, adapter, strides of base, strides of adapter) with stride 1 in the same dims.

    The kernel reads both in one loop, which is compiled for the strides that are 1. Tensors whose
    unit strides differ are copied, which is rare.
    """
    while True:
        strides = list(base.stride()), list(adapter.stride())
        for dim in (0, 1):  # the stride of a dim of size 1 is free
            if adapter.shape[dim] == 1:
                strides[1][dim] = strides[0][dim]
            elif base.shape[dim] == 1:
                strides[0][dim] = strides[1][dim]
        ones = [[stride == 1 for stride in of] for of in strides]
        if ones[0] == ones[1]:
            return base, adapter, *strides
        base, adapter = (t.clone(memory_format=torch.contiguous_format) for t in (base, adapter))


def layer_constants(config: Config, problem: Problem) -> dict:
    """The constants that kernels.layer is compiled for."""
    return {
        "GATHER": problem.pivoted and problem.direction == BACKWARD,
        "SCATTER": problem.pivoted and problem.direction == FORWARD,
        "SCALED": problem.direction == BACKWARD,
        "SPLIT": config.split,
        "SWAP": config.swap,
        "PREFETCH": config.prefetch and problem.direction == FORWARD,
        "PRECISION": precision(problem.dtype),
        "BM": config.BM,
        "BR": config.BR,
        "BK": config.BK,
        "BN": config.BN,
        "BJ": config.BJ,
    }


def adapter_gradients(
    dh_a, x, h_a, dy, alpha, needs_db: bool, config: AdapterGradientsConfig, lora_rank: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The adapter's gradients in one launch.

    (dA [ra, K] = dh_a^T x, dB [N, ra] = alpha dy^T h_a, db [N] = the sum of dy's rows). dA is None
    where dh_a is None, dB and db where h_a is None, db also unless needs_db.
    """
    one = x if x is not None else dy
    M, rank_blocks = len(one), _cdiv(lora_rank, config.BA)
    K = x.shape[1] if dh_a is not None else 0
    N = dy.shape[1] if h_a is not None else 0
    dA = one.new_empty(lora_rank, K) if dh_a is not None else None
    dB = one.new_empty(N, lora_rank) if h_a is not None else None
    db = one.new_empty(N) if needs_db else None
    tiles = (_cdiv(K, config.BC) + _cdiv(N, config.BC)) * rank_blocks
    partial = None
    if config.split > 1:
        cells = tiles * config.split * config.BC * (config.BA + 1)
        partial = one.new_empty(cells, dtype=torch.float32)
    x, (x_m, x_k) = (x, x.stride()) if dh_a is not None else (None, (0, 0))
    dy, (dy_m, dy_n) = (dy, dy.stride()) if h_a is not None else (None, (0, 0))
    zeros = counters.zeros(one.device, tiles)
    run(
        kernels.adapter_gradients,
        tiles * config.split,
        zeros,
        dHa=dh_a,
        X=x,
        dA=dA,
        Ha=h_a,
        dY=dy,
        dB=dB,
        dBias=db,
        Partial=partial,
        **{"M": M, "K": K, "N": N, "lora_rank": lora_rank},
        **{"x_m": x_m, "x_k": x_k, "dy_m": dy_m, "dy_n": dy_n},
        alpha=alpha,
        **adapter_gradients_constants(config, one.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return dA, dB, db


def adapter_gradients_constants(config: AdapterGradientsConfig, dtype: torch.dtype) -> dict:
    """The constants that kernels.adapter_gradients is compiled for."""
    return {
        "SPLIT": config.split,
        "PRECISION": precision(dtype),
        "BM": config.BM,
        "BC": config.BC,
        "BA": config.BA,
    }


def merge_pivots(h_s: Tensor, t: Tensor, bias: Tensor | None, order: Tensor) -> Tensor:
    """One launch: pivots h_s [M, r], others t [M, N - r], order int64 [N] -> y [M, N] in output
    order, plus bias."""
    (M, rank), N = h_s.shape, len(order)
    y = h_s.new_empty(M, N)
    BM, BN = (128, 256) if h_s.device.type == "cpu" else (16, 128)
    sizes = {"M": M, "N": N, "rank": rank, "others": N - rank, "BM": BM, "BN": BN}
    kernels.merge_pivots[(_cdiv(M, BM) * _cdiv(N, BN),)](
        Hs=h_s, T=t, Bias=bias, Order=order, Y=y, **sizes, **FUSION
    )
    return y


def precision(dtype: torch.dtype) -> str:
    """The precision of float32 products: exact ("ieee"), unless torch.set_float32_matmul_precision
    lets tensor cores round to tf32."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or dtype != torch.float32 else "tf32"


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)
