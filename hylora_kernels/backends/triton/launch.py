"""From tensors to launches: workspace, grid, arguments."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hylora_kernels.backends.shared import counters
from hylora_kernels.backends.triton import kernels
from hylora_kernels.backends.triton.config import (
    BACKWARD,
    FORWARD,
    Config,
    Problem,
    Target,
    ThinConfig,
)

MOST = 2**31
# Products and sums in one rounding: the default so far, which Triton 3.10 will turn.
FUSION = {"enable_fp_fusion": True}
INTERPRETED_PROGRAMS = 3  # the interpreter runs one after the other; more than one shows more


def dataflow(
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
    compile_only: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One launch: x [M, K] -> (x [W1; W1a]^T [W2, W2a]^T + bias, x W1a^T); kernels.py has the
    shapes. pivots, others: as the kernel takes them, None in the pair form."""
    if x.stride(1) != 1 and x.numel() >= MOST:  # its columns would be out of 32-bit indices' reach
        x = x.contiguous()
    w1, w1a, w2a = W1.stride(), (0, 0), (0, 0)
    if W1a is not None:
        W1, W1a, w1, w1a = _alike(W1, W1a)
        w2a = W2a.stride()
    M, depth, width = len(x), x.shape[1], problem.width
    h_columns = config.rank_blocks(problem) * config.BR
    rank_tiles = _cdiv(M, config.BM) * config.rank_blocks(problem)
    y, h = x.new_empty(M, width), x.new_empty(M, h_columns)
    h_a = None if W1a is None else x.new_empty(M, problem.lora_rank)
    partial = None
    if config.split > 1:
        cells = rank_tiles * config.split * config.BM * config.BR
        partial = x.new_empty(cells, dtype=torch.float32)
    zeros = counters.zeros(x.device, 1 + _cdiv(M, config.BM) + rank_tiles)
    programs = min(config.tiles(problem), config.residents * target.multiprocessors)
    run = functools.partial(kernels.dataflow.warmup, grid=(1,))
    if not compile_only:
        run = kernels.dataflow[(programs,)]
    try:
        run(
            *(x, W1, W1a, W2, W2a, bias, y, h, h_a, partial, zeros, pivots, others),
            *(M, depth, width, problem.rank, problem.lora_rank, problem.others, h_columns),
            *(*x.stride(), *w1, *w1a, *W2.stride(), *w2a, alpha),
            **constants(config, problem),
            num_warps=config.warps,
            num_stages=config.stages,
            **FUSION,
        )
    except BaseException:  # an interpreter that was interrupted, too
        counters.forget(zeros)
        raise
    return y, h_a


def _alike(base: Tensor, adapter: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """(base, adapter, the strides of both), 1 in the same places: the kernel reads both in one
    loop, compiled for the strides that are 1. Copied where they are not, which is rare."""
    while True:
        strides = list(base.stride()), list(adapter.stride())
        for dim in (0, 1):  # that of a dim of size 1 may be anything
            if adapter.shape[dim] == 1:
                strides[1][dim] = strides[0][dim]
            elif base.shape[dim] == 1:
                strides[0][dim] = strides[1][dim]
        ones = [[stride == 1 for stride in of] for of in strides]
        if ones[0] == ones[1]:
            return base, adapter, *strides
        base, adapter = (t.clone(memory_format=torch.contiguous_format) for t in (base, adapter))


def constants(config: Config, problem: Problem) -> dict:
    """What `dataflow` is compiled for."""
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


def thin(dh_a, x, h_a, dy, alpha, needs_db: bool, config: ThinConfig, lora_rank: int):
    """One launch: (dA [ra, K] = dh_a^T x, dB [N, ra] = alpha dy^T h_a, db [N] = sum of dy); dA is
    None where dh_a is, dB and db where h_a is."""
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
    x, x_strides = (x, x.stride()) if dh_a is not None else (None, (0, 0))
    dy, dy_strides = (dy, dy.stride()) if h_a is not None else (None, (0, 0))
    zeros = counters.zeros(one.device, tiles)
    try:
        kernels.thin[(tiles * config.split,)](
            *(dh_a, x, dA, h_a, dy, dB, db, partial, zeros, M, K, N, lora_rank),
            *(*x_strides, *dy_strides, alpha),
            **thin_constants(config, one.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
            **FUSION,
        )
    except BaseException:
        counters.forget(zeros)
        raise
    return dA, dB, db


def weave(h_s: Tensor, t: Tensor, bias: Tensor | None, order: Tensor) -> Tensor:
    """One launch: h_s [M, r], t [M, N - r], order int64 [N] -> y [M, N] in order, plus bias."""
    (M, rank), N = h_s.shape, len(order)
    y = h_s.new_empty(M, N)
    BM, BN = (128, 256) if h_s.device.type == "cpu" else (16, 128)
    kernels.weave[(_cdiv(M, BM) * _cdiv(N, BN),)](
        *(h_s, t, bias, order, y, M, N, rank, N - rank), BM=BM, BN=BN, **FUSION
    )
    return y


def thin_constants(config: ThinConfig, dtype: torch.dtype) -> dict:
    """What `thin` is compiled for."""
    return {
        "SPLIT": config.split,
        "PRECISION": precision(dtype),
        "BM": config.BM,
        "BC": config.BC,
        "BA": config.BA,
    }


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: exactly, unless torch.set_float32_matmul_precision says that
    tensor cores may round it to tf32."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact or dtype != torch.float32 else "tf32"


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target that a device is; a CPU is the interpreter."""
    if device.type != "cuda":
        return Target("interpreter", 0, INTERPRETED_PROGRAMS)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    arch = 10 * properties.major + properties.minor
    return Target("cuda", arch, properties.multi_processor_count)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)
