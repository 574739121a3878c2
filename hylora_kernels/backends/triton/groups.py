"""A group of packed layers as one launch of group_kernels.group: the choice, the table of its
expand tiles, workspace and arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hylora_kernels.backends.shared import counters
from hylora_kernels.backends.shared.gpu import on_device
from hylora_kernels.backends.shared.group_gpu import STEP, Member, Operands
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.backends.triton.config import TORCH_PRODUCTS, Config, Problem, Target

Biases = Sequence[Tensor | None]


def forward(x: Tensor, operands: Operands, biases: Biases) -> Tensor | None:
    """x [M, K] -> y [M, width] in one launch; None where the torch products are faster."""
    problem = problem_of(x, operands)
    with on_device(x.device):
        config = dispatch.group_config_for(problem, x.device)
        if dispatch.is_first_call(("group", problem), x.device):
            captured = dispatch.group_config_for(problem, x.device, captured=True)
            # Nothing can be compiled, nor the table made, while a graph is captured.
            if captured not in (TORCH_PRODUCTS, config):
                launch(x, operands, biases, captured, dispatch.target_of(x.device))
        if config is TORCH_PRODUCTS:
            return None
        return launch(x, operands, biases, config, dispatch.target_of(x.device))


def problem_of(x: Tensor, operands: Operands) -> Problem:
    """The group as one pair: its config is chosen as that of a layer with these sizes."""
    N = sum(member.N for member in operands.members)
    return Problem(len(x), x.shape[1], N, len(operands.P), 0, x.dtype)


def launch(x: Tensor, operands: Operands, biases: Biases, config: Config, target: Target) -> Tensor:
    """x [M, K] -> y [M, width], the columns behind the members' undefined."""
    from hylora_kernels.backends.triton.launch import layer_constants, run

    problem = problem_of(x, operands)
    tiles, adapters = tile_table(operands.members, config.BN, x.device)
    M, m_blocks = len(x), -(-len(x) // config.BM)
    rank_blocks = config.rank_blocks(problem)
    y = x.new_empty(M, operands.width)
    h = x.new_empty(M, rank_blocks * config.BR)
    partial = None
    if config.split > 1:
        cells = m_blocks * rank_blocks * config.split * config.BM * config.BR
        partial = x.new_empty(cells, dtype=torch.float32)
    zeros = counters.zeros(x.device, 1 + m_blocks + m_blocks * rank_blocks)
    all_tiles = m_blocks * (rank_blocks * config.split + len(tiles))
    constants = layer_constants(config, problem)
    del constants["GATHER"], constants["SCATTER"], constants["SCALED"]
    run(
        _kernel(),
        min(all_tiles, config.blocks_per_sm * target.multiprocessors),
        zeros,
        X=x,
        P=operands.P,
        Q=operands.Q,
        Columns=operands.columns,
        Tiles=tiles,
        Biases=tuple(operands.columns if bias is None else bias for bias in biases),
        Y_=y,
        H=h,
        Partial=partial,
        **{"M": M, "K": x.shape[1], "rank": len(operands.P), "h_columns": h.shape[1]},
        **{"width": operands.width, "column_blocks": len(tiles)},
        **{"x_m": x.stride(0), "x_k": x.stride(1)},
        BIASED=sum(1 << i for i, bias in enumerate(biases) if bias is not None),
        ADAPTERS=adapters,
        **constants,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


@functools.lru_cache(maxsize=1024)
def tile_table(members: tuple[Member, ...], BN: int, device: torch.device) -> tuple[Tensor, int]:
    """(int64 [column blocks, FIELDS], the row of each expand tile of BN columns; ADAPTERS). The
    deepest tiles come first, so that the queue ends in short ones."""
    kernels = _module()
    fields = {name: getattr(kernels, name).value for name in kernels.ROW}
    apart = [(m.p + m.rank) | m.lora_rank for m in members if m.lora_rank]
    adapters = 0 if not apart else 1 if any(place % STEP for place in apart) else STEP
    rows = [row for index in range(len(members)) for row in _rows(members, index, BN, adapters)]
    rows.sort(key=lambda row: -row["DEPTH8"])
    table = torch.zeros(len(rows), kernels.FIELDS.value, dtype=torch.int64)
    for number, row in enumerate(rows):
        for name, value in row.items():
            table[number, fields[name]] = value
    return table.to(device), adapters


def _rows(members, index: int, BN: int, adapters: int) -> Iterator[dict[str, int]]:
    m = members[index]
    same = {"MEMBER": index, "Y": m.y, "H8": m.p // STEP, "Q_STRIDE8": m.q_stride // STEP}
    same |= {"AB8": m.aB // STEP, "AB_STRIDE8": m.aB_stride // STEP}
    if m.lora_rank:
        same |= {"LORA_RANK": m.lora_rank // adapters, "H_A": (m.p + m.rank) // adapters}
    for begin in range(0, m.others, BN):
        at = (m.q + begin * m.q_stride) // STEP
        sizes = {"COUNT": min(BN, m.others - begin), "DEPTH8": -(-m.rank // STEP), "PIVOTS": -1}
        yield same | sizes | {"FIRST": m.y + begin, "Q8": at}
    for begin in range(0, m.N - m.others, BN):
        sizes = {"COUNT": min(BN, m.rank - begin), "DEPTH8": 0, "PIVOTS": m.p + begin}
        yield same | sizes | {"FIRST": m.y + m.others + begin}


def _module():
    from hylora_kernels.backends.triton import group_kernels

    return group_kernels


def _kernel():
    return _module().group
