"""The Triton kernel for a group: several packed layers on one x in one launch.

The method is that of kernels.layer, and so is the shrink phase: the members' factors of x stand one
below the other in P, and h = x P^T has a block of columns for each. The expand phase differs in
that a tile belongs to one member. A table has a row for each expand tile: its weights, its columns
of h and its columns of y. A single layer would be a group of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hylora_kernels.backends.triton.kernels import (
    QUEUE,
    READY,
    Matrix,
    Sizes,
    _contract,
    _offsets,
    _prefetch,
    _shrink,
    _zeros,
)

# fmt: off

# A row of Tiles. Names with an 8 count in eights: the compiler sees that the place is a multiple of
# 16 bytes, and that a mask holds for eight numbers or none. Else it would load number by number.
FIRST = tl.constexpr(0)  # the tile's first column, in Columns and in y's member
COUNT = tl.constexpr(1)  # of columns
MEMBER = tl.constexpr(2)
Y = tl.constexpr(3)  # the member's first column of y
DEPTH8 = tl.constexpr(4)  # of the product, whose last numbers may be padding; 0 for pivots
H8 = tl.constexpr(5)  # the member's first column of h
Q8, Q_STRIDE8 = tl.constexpr(6), tl.constexpr(7)  # the tile's first row in Q
PIVOTS = tl.constexpr(8)  # the column of h that the tile's first pivot is, or -1
LORA_RANK, H_A = tl.constexpr(9), tl.constexpr(10)  # the adapter's columns of h, in ADAPTERS
AB8, AB_STRIDE8 = tl.constexpr(11), tl.constexpr(12)  # the member's aB in Q
FIELDS = tl.constexpr(16)
ROW = ("FIRST", "COUNT", "MEMBER", "Y", "DEPTH8", "H8", "Q8", "Q_STRIDE8", "PIVOTS", "LORA_RANK")
ROW += ("H_A", "AB8", "AB_STRIDE8")


# One compiled kernel for every number of rows: M bounds masks and blocks, nothing else.
@triton.jit(do_not_specialize=["M", "column_blocks"])
def group(
    X,  # [M, K]
    P,  # [rank, K], contiguous
    Q,  # 1-D: the members' Q and aB
    Columns,  # int32: the place of each column in its member's y
    Tiles,  # int64 [column_blocks, FIELDS]
    Biases,  # a tuple with [N] for each member, anything for those without one
    Y_,  # [M, width], contiguous
    H,  # [M, h_columns], workspace
    Partial,  # float32 workspace of split sums, or None
    Counters,  # int32, all zero: the queue, Ready [m_blocks], arrivals at each block of h
    M, K, rank, h_columns, width, column_blocks, x_m, x_k,
    BIASED: tl.constexpr,  # bit i: member i has a bias. Triton 3.6 takes no None in a tuple
    ADAPTERS: tl.constexpr,  # 0: no member has one apart; else their places count in this, 8 or 1
    SPLIT: tl.constexpr, SWAP: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):
    sizes = Sizes(M, K, width, rank, 0, 0, h_columns)
    x = Matrix(X, M, x_m, x_k)
    p = Matrix(P, rank, K, 1)
    m_blocks = tl.cdiv(M, BM)
    rank_blocks = tl.cdiv(rank, BR)
    shrink_tiles = m_blocks * rank_blocks * SPLIT
    tiles = shrink_tiles + m_blocks * column_blocks
    Ready = Counters + READY

    ticket = tl.atomic_add(Counters + QUEUE, 1, sem="relaxed")
    while ticket < tiles:
        if ticket < shrink_tiles:
            m_block = ticket // SPLIT // rank_blocks
            is_complete = _shrink(
                ticket, x, p, Matrix(None, 0, 0, 0), H, None, Partial, Ready + m_blocks, None, None,
                sizes, 1.0, rank_blocks, rank_blocks, GATHER=False, SCALED=False, SPLIT=SPLIT,
                SWAP=SWAP, PREFETCH=PREFETCH, PRECISION=PRECISION, BM=BM, BR=BR, BK=BK)
            if is_complete:
                tl.debug_barrier()  # the release covers what every thread has written of h
                tl.atomic_add(Ready + m_block, 1, sem="release")
        else:
            m_block = (ticket - shrink_tiles) // column_blocks
            tile = Tiles + (ticket - shrink_tiles) % column_blocks * FIELDS
            depth = tl.load(tile + DEPTH8).to(tl.int32) * 8
            q = Matrix(
                Q + tl.load(tile + Q8) * 8, tl.load(tile + COUNT).to(tl.int32),
                tl.load(tile + Q_STRIDE8) * 8, 1)
            if PREFETCH:  # while h is still being made
                if depth > 0:
                    _prefetch(q, tl.arange(0, BN), begin=0, end=depth)
            while tl.atomic_add(Ready + m_block, 0, sem="acquire") < rank_blocks:
                pass
            tl.debug_barrier()
            _expand(
                m_block, tile, depth, H, q, Q, Columns, Biases, Y_, sizes, BIASED=BIASED,
                ADAPTERS=ADAPTERS, SWAP=SWAP, PRECISION=PRECISION, BM=BM, BN=BN, BJ=BJ)
        ticket = tl.atomic_add(Counters + QUEUE, 1, sem="relaxed")

    # As in kernels.layer: the program with the last ticket resets the queue and Ready.
    if ticket == tiles + tl.num_programs(0) - 1:
        tl.atomic_add(Counters + QUEUE, -tiles - tl.num_programs(0), sem="relaxed")
        for block in range(0, m_blocks):
            tl.atomic_add(Ready + block, -rank_blocks, sem="relaxed")


@triton.jit
def _expand(
    m_block, tile, depth, H, q, Q, Columns, Biases, Y_, sizes, BIASED: tl.constexpr,
    ADAPTERS: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr,
):
    """Compute and store a block of y [BM, BN], of one member: h Q^T, or h itself at its pivots,
    plus its adapter part and bias."""
    rows = m_block * BM + tl.arange(0, BM)
    lanes = tl.arange(0, BN)
    inside = lanes < q.rows
    columns = tl.load(Columns + tl.load(tile + FIRST) + lanes, mask=inside, other=0)
    h = Matrix(H + tl.load(tile + H8) * 8, sizes.M, sizes.h_columns, 1)
    acc = _contract(
        _zeros(BM, BN, SWAP), h, rows, None, q, lanes, inside,
        0, depth, depth, SWAP=SWAP, PRECISION=PRECISION, BLOCK=BJ)
    pivots = tl.load(tile + PIVOTS).to(tl.int32)
    if pivots >= 0:
        mask = (rows < sizes.M)[:, None] & inside[None, :]
        at_h = H + _offsets(rows, sizes.h_columns, pivots + lanes)
        pivot = tl.load(at_h, mask=mask, other=0.0).to(tl.float32)
        acc += tl.trans(pivot) if SWAP else pivot
    if ADAPTERS:
        lora_rank = tl.load(tile + LORA_RANK).to(tl.int32) * ADAPTERS
        h_a = Matrix(H + tl.load(tile + H_A) * ADAPTERS, sizes.M, sizes.h_columns, 1)
        aB = Matrix(Q + tl.load(tile + AB8) * 8, sizes.N, tl.load(tile + AB_STRIDE8) * 8, 1)
        acc = _contract(
            acc, h_a, rows, None, aB, columns, inside,
            0, lora_rank, lora_rank, SWAP=SWAP, PRECISION=PRECISION, BLOCK=BJ)
    y = tl.trans(acc) if SWAP else acc
    member = tl.load(tile + MEMBER)
    for i in tl.static_range(len(Biases)):
        if BIASED >> i & 1:
            if member == i:
                y += tl.load(Biases[i] + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    mask_y = (rows < sizes.M)[:, None] & inside[None, :]
    at_y = Y_ + _offsets(rows, sizes.N, tl.load(tile + Y).to(tl.int32) + columns)
    tl.store(at_y, y.to(Y_.dtype.element_ty), mask=mask_y)
