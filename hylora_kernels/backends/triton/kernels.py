"""The Triton kernels: both products of a layer in one launch, the adapter's gradients in another,
and the pivoted form's output order after two of torch's products.

The method of `layer`. Programs draw tiles from one ordered queue. The shrink tiles come first; each
writes a block of h = x [W1; W1a]^T to a workspace that stays in L2. The expand tiles follow; each
waits until the h of its rows is complete and writes a block of y = h [W2, W2a]^T + bias. The
weights are read once, and expand tiles fill the processors that the last shrink tiles leave idle.

A tile waits only for tiles before it in the queue, and running programs have drawn all of those. So
nothing deadlocks, with any number of programs and with other kernels on the device.

The kernels know no direction. The backward's dx is the same launch with dy for x and the factors
transposed, by their strides. Base and adapter stay separate tensors; alpha multiplies the adapter
part of h in float32.

Every launch leaves its counters at zero, so nothing is cleared between launches and a CUDA graph
can replay one. Parts of a sum are added in one order, whichever program comes last: the bits
repeat.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Argument lists are filled by hand: a kernel has up to 40, and the formatter puts one on a line.
# fmt: off

QUEUE, READY = tl.constexpr(0), tl.constexpr(1)  # places in Counters


class Matrix(NamedTuple):
    """A matrix in memory: element (i, j) stands at `at + i * row_stride + j * column_stride`.

    `at` is None where the launch has no such matrix. Kernels build these tuples from their
    arguments; nothing of them is left in the machine code.
    """

    at: tl.tensor
    rows: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


class Sizes(NamedTuple):
    """The sizes of a `layer` launch, named by the kernel's own shapes."""

    M: tl.tensor
    K: tl.tensor
    N: tl.tensor
    rank: tl.tensor
    lora_rank: tl.tensor
    others: tl.tensor
    h_columns: tl.tensor


# ------------------------------------------------------------------------- both products of a layer


# One compiled kernel for every number of rows: M bounds masks and blocks, nothing else.
@triton.jit(do_not_specialize=["M"])
def layer(
    X,  # [M, K]
    W1,  # [rank, K], or with GATHER [rank, others]
    W1a,  # [lora_rank, K] or None
    W2,  # [N, rank], or with SCATTER [others, rank]
    W2a,  # [N, lora_rank] or None
    Bias,  # [N] or None
    Y,  # [M, N], contiguous
    H,  # [M, h_columns], workspace: the base's columns, the adapter's from the next multiple of BR
    Ha,  # [M, lora_rank] or None: x W1a^T for the caller, contiguous
    Partial,  # float32 workspace of split sums, or None
    Counters,  # int32, all zero: the queue, Ready [m_blocks], arrivals at each block of h
    Pivots,  # int32 [rank], ascending, or None
    Others,  # int64 [others]: the outputs that are no pivots, ascending, or None
    M, K, N, rank, lora_rank, others, h_columns,
    x_m, x_k, w1_r, w1_k, w1a_r, w1a_k, w2_n, w2_r, w2a_n, w2a_r, alpha,
    GATHER: tl.constexpr,  # pivoted backward: h = x[:, Pivots] + x[:, Others] W1^T
    SCATTER: tl.constexpr,  # pivoted forward: y[:, Pivots] = h, y[:, Others] = h W2^T
    SCALED: tl.constexpr,  # Ha is alpha x W1a^T
    SPLIT: tl.constexpr, SWAP: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):
    sizes = Sizes(M, K, N, rank, lora_rank, others, h_columns)
    x = Matrix(X, M, x_m, x_k)
    w1 = Matrix(W1, rank, w1_r, w1_k)
    w1a = Matrix(W1a, lora_rank, w1a_r, w1a_k)
    w2 = Matrix(W2, others if SCATTER else N, w2_n, w2_r)
    w2a = Matrix(W2a, N, w2a_n, w2a_r)

    m_blocks = tl.cdiv(M, BM)
    base_blocks = tl.cdiv(rank, BR)
    rank_blocks = base_blocks
    if W1a is not None:
        rank_blocks += tl.cdiv(lora_rank, BR)
    other_blocks = tl.cdiv(w2.rows, BN)
    column_blocks = other_blocks
    if SCATTER:
        column_blocks += tl.cdiv(rank, BN)
    shrink_tiles = m_blocks * rank_blocks * SPLIT
    tiles = shrink_tiles + m_blocks * column_blocks
    Ready = Counters + READY

    tile = tl.atomic_add(Counters + QUEUE, 1, sem="relaxed")
    while tile < tiles:
        if tile < shrink_tiles:
            m_block = tile // SPLIT // rank_blocks
            is_complete = _shrink(
                tile, x, w1, w1a, H, Ha, Partial, Ready + m_blocks, Pivots, Others, sizes, alpha,
                rank_blocks, base_blocks, GATHER=GATHER, SCALED=SCALED, SPLIT=SPLIT, SWAP=SWAP,
                PREFETCH=PREFETCH, PRECISION=PRECISION, BM=BM, BR=BR, BK=BK)
            if is_complete:
                tl.debug_barrier()  # the release covers what every thread has written of h
                tl.atomic_add(Ready + m_block, 1, sem="release")
        else:
            m_block = (tile - shrink_tiles) // column_blocks
            column_block = (tile - shrink_tiles) % column_blocks
            if PREFETCH:  # while h is still being made
                if column_block < other_blocks:
                    columns = column_block * BN + tl.arange(0, BN)
                    _prefetch(w2, columns, begin=0, end=rank)
            while tl.atomic_add(Ready + m_block, 0, sem="acquire") < rank_blocks:
                pass
            tl.debug_barrier()
            _expand(
                m_block, column_block, H, w2, w2a, Bias, Y, Pivots, Others, sizes,
                adapter_column=base_blocks * BR, other_blocks=other_blocks, SCATTER=SCATTER,
                SWAP=SWAP, PRECISION=PRECISION, BM=BM, BN=BN, BJ=BJ)
        tile = tl.atomic_add(Counters + QUEUE, 1, sem="relaxed")

    # Each program ends on a ticket past the last tile, drawn after its own last tile was done. The
    # program with the last ticket resets the queue and Ready; arrivals were reset on the way.
    if tile == tiles + tl.num_programs(0) - 1:
        # Adding needs no result, where an exchange waited for one: 1.3 us of 9.
        tl.atomic_add(Counters + QUEUE, -tiles - tl.num_programs(0), sem="relaxed")
        for block in range(0, m_blocks):
            tl.atomic_add(Ready + block, -rank_blocks, sem="relaxed")


@triton.jit
def _shrink(
    tile, x, w1, w1a, H, Ha, Partial, Arrivals, Pivots, Others, sizes, alpha,
    rank_blocks, base_blocks, GATHER: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):
    """Compute one part of a block of h [BM, BR].

    The last part to arrive stores the block to H and returns True, the others return False.
    """
    part = tile % SPLIT
    place = tile // SPLIT
    rank_block = place % rank_blocks
    rows = place // rank_blocks * BM + tl.arange(0, BM)
    if GATHER:
        acc = _shrink_gathered(
            x, w1, w1a, Pivots, Others, sizes, rows, rank_block, base_blocks, part,
            SPLIT=SPLIT, SWAP=SWAP, PRECISION=PRECISION, BM=BM, BR=BR, BK=BK)
    else:
        # One loop serves base and adapter. With a loop on either side of a branch ptxas waits for
        # every wgmma of the kernel before the next (sm_90), and each loop has its own buffers.
        ranks = rank_block * BR + tl.arange(0, BR)
        w = w1
        if w1a.at is not None:
            if rank_block >= base_blocks:
                ranks -= base_blocks * BR
                w = w1a
        begin, end = _share(sizes.K, part, SPLIT, BK)
        if PREFETCH:
            _prefetch(w, ranks, begin, end)
        acc = _contract(
            _zeros(BM, BR, SWAP), x, rows, None, w, ranks, ranks < w.rows,
            begin, end, sizes.K, SWAP=SWAP, PRECISION=PRECISION, BLOCK=BK)
    is_complete = True
    if SPLIT > 1:
        acc, is_complete = _sum_of_parts(acc, Partial, Arrivals + place, place, part, SPLIT)
    if is_complete:
        h = tl.trans(acc) if SWAP else acc
        if w1a.at is not None:
            if rank_block >= base_blocks:
                scaled = h * alpha
                if Ha is not None:
                    columns_a = (rank_block - base_blocks) * BR + tl.arange(0, BR)
                    mask_a = (rows < sizes.M)[:, None] & (columns_a < sizes.lora_rank)[None, :]
                    tl.store(Ha + _offsets(rows, sizes.lora_rank, columns_a),
                             (scaled if SCALED else h).to(Ha.dtype.element_ty), mask=mask_a)
                h = scaled
        columns_h = rank_block * BR + tl.arange(0, BR)
        at_h = H + _offsets(rows, sizes.h_columns, columns_h)
        tl.store(at_h, h.to(H.dtype.element_ty), mask=(rows < sizes.M)[:, None])
    return is_complete


@triton.jit
def _shrink_gathered(
    x, w1, w1a, Pivots, Others, sizes, rows, rank_block, base_blocks, part, SPLIT: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):
    """One part of a block of h = x[:, Pivots] + x[:, Others] W1^T, or of the adapter part."""
    acc = _zeros(BM, BR, SWAP)
    if rank_block < base_blocks:
        ranks = rank_block * BR + tl.arange(0, BR)
        begin, end = _share(sizes.others, part, SPLIT, BK)
        acc = _contract(
            acc, x, rows, Others, w1, ranks, ranks < w1.rows,
            begin, end, sizes.others, SWAP=SWAP, PRECISION=PRECISION, BLOCK=BK)
        if part == 0:
            columns = tl.load(Pivots + ranks, mask=ranks < w1.rows, other=0)
            at = x.at + rows.to(tl.int64)[:, None] * x.row_stride
            at += columns[None, :] * x.column_stride
            inside = (rows < x.rows)[:, None] & (ranks < w1.rows)[None, :]
            direct = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            acc += tl.trans(direct) if SWAP else direct
    elif w1a.at is not None:
        ranks_a = (rank_block - base_blocks) * BR + tl.arange(0, BR)
        begin_a, end_a = _share(sizes.K, part, SPLIT, BK)
        acc = _contract(
            acc, x, rows, None, w1a, ranks_a, ranks_a < w1a.rows,
            begin_a, end_a, sizes.K, SWAP=SWAP, PRECISION=PRECISION, BLOCK=BK)
    return acc


@triton.jit
def _expand(
    m_block, column_block, H, w2, w2a, Bias, Y, Pivots, Others, sizes, adapter_column,
    other_blocks, SCATTER: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):
    """Compute and store a block of y [BM, BN]; with SCATTER the others' blocks come first, then
    the pivots'."""
    rows = m_block * BM + tl.arange(0, BM)
    columns = column_block * BN + tl.arange(0, BN)
    inside = columns < w2.rows
    depth = sizes.rank
    if SCATTER:
        if column_block >= other_blocks:
            columns -= other_blocks * BN
            inside = columns < sizes.rank
            depth = 0  # a pivot is h itself; the loop stays outside of the branch, as in _shrink
    h = Matrix(H, sizes.M, sizes.h_columns, 1)
    acc = _contract(
        _zeros(BM, BN, SWAP), h, rows, None, w2, columns, inside,
        0, depth, sizes.rank, SWAP=SWAP, PRECISION=PRECISION, BLOCK=BJ)
    if SCATTER:
        if column_block >= other_blocks:
            mask = (rows < sizes.M)[:, None] & inside[None, :]
            at_h = H + _offsets(rows, sizes.h_columns, columns)
            pivot = tl.load(at_h, mask=mask, other=0.0).to(tl.float32)
            acc += tl.trans(pivot) if SWAP else pivot
            columns = tl.load(Pivots + columns, mask=inside, other=0)
        else:
            columns = tl.load(Others + columns, mask=inside, other=0).to(tl.int32)
    if w2a.at is not None:
        h_a = Matrix(H + adapter_column, sizes.M, sizes.h_columns, 1)
        acc = _contract(
            acc, h_a, rows, None, w2a, columns, inside,
            0, sizes.lora_rank, sizes.lora_rank, SWAP=SWAP, PRECISION=PRECISION, BLOCK=BJ)
    y = tl.trans(acc) if SWAP else acc
    if Bias is not None:
        y += tl.load(Bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    mask_y = (rows < sizes.M)[:, None] & inside[None, :]
    tl.store(Y + _offsets(rows, sizes.N, columns), y.to(Y.dtype.element_ty), mask=mask_y)


@triton.jit
def _contract(
    acc, left, rows, index, right, columns, columns_inside, begin, end, depth,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):
    """acc [rows, columns] + left[rows, k] right[columns, k]^T for k in begin..end, below depth.

    left and right are Matrix tuples. index, or None: the column of left where the k-th stands.

    With SWAP acc is [columns, rows] and the weights are the tensor cores' first operand. A single
    row is multiplied without tensor cores: nothing passes through shared memory, no warp waits for
    another, and tiles may be small enough to give every program one.
    """
    left_rows, rows_inside = rows.to(tl.int64) * left.row_stride, rows < left.rows
    right_columns = columns.to(tl.int64) * right.row_stride
    if rows.shape[0] == 1:
        sums = tl.zeros((columns.shape[0], BLOCK), tl.float32)
    for start in range(begin, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < depth
        place = k
        if index is not None:
            place = tl.load(index + k, mask=inside, other=0).to(tl.int32)
        # Each operand is loaded in the orientation that the product takes. A transpose after the
        # load would keep a weight whose rows aren't contiguous from async copies (sm_80).
        if SWAP:
            a = tl.load(left.at + left_rows[None, :] + place[:, None] * left.column_stride,
                        mask=inside[:, None] & rows_inside[None, :], other=0.0)
            w = tl.load(right.at + right_columns[:, None] + k[None, :] * right.column_stride,
                        mask=columns_inside[:, None] & inside[None, :], other=0.0)
            if rows.shape[0] == 1:
                sums += w.to(tl.float32) * tl.trans(a).to(tl.float32)
            else:
                acc = tl.dot(w, a, acc, input_precision=PRECISION)
        else:
            a = tl.load(left.at + left_rows[:, None] + place[None, :] * left.column_stride,
                        mask=rows_inside[:, None] & inside[None, :], other=0.0)
            w = tl.load(right.at + right_columns[None, :] + k[:, None] * right.column_stride,
                        mask=inside[:, None] & columns_inside[None, :], other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if rows.shape[0] == 1:
        acc += tl.sum(sums, 1)[:, None]
    return acc


@triton.jit
def _prefetch(weight, rows, begin, end):
    """Start bringing weight[rows, begin..end], contiguous along its rows, into L2.

    The loads that follow have a few tiles in flight, this all of them. With few rows of x that
    makes two thirds of the memory's bandwidth out of one third.
    """
    LINE: tl.constexpr = 1024 // weight.at.dtype.element_ty.primitive_bitwidth  # in 128 bytes
    row = tl.minimum(rows, weight.rows - 1).to(tl.int64) * weight.row_stride
    for start in range(begin, end, 8 * LINE):
        column = tl.minimum(start + tl.arange(0, 8) * LINE, end - 1)
        at = (weight.at + row[:, None] + column[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, False, 1
        )


@triton.jit
def _sum_of_parts(acc, Partial, arrivals, place, part, SPLIT: tl.constexpr):
    """(the sum of all parts in their order, True) for the last part to arrive, else (acc, False).

    The last part resets the block's arrivals to zero.
    """
    rows: tl.constexpr = acc.shape[0]
    columns: tl.constexpr = acc.shape[1]
    cell = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
    tile = Partial + place.to(tl.int64) * SPLIT * rows * columns + cell
    tl.store(tile + part * rows * columns, acc)
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.debug_barrier()
        acc = tl.load(tile)
        for other in range(1, SPLIT):
            acc += tl.load(tile + other * rows * columns)
        tl.store(arrivals, 0)
    return acc, last


@triton.jit
def _share(depth, part, SPLIT: tl.constexpr, BK: tl.constexpr):
    """(begin, end): the range of the contraction that part number `part` of SPLIT adds up."""
    if SPLIT == 1:
        return 0, depth
    else:
        blocks = tl.cdiv(depth, BK)
        return part * blocks // SPLIT * BK, (part + 1) * blocks // SPLIT * BK


@triton.jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((columns, rows), tl.float32)
    else:
        return tl.zeros((rows, columns), tl.float32)


@triton.jit
def _offsets(rows, stride, columns):
    """Offsets [rows, columns] into a matrix whose columns are contiguous."""
    return rows.to(tl.int64)[:, None] * stride + columns[None, :]


# ---------------------------------------------------------------------------- adapter's gradients


@triton.jit(do_not_specialize=["M"])
def adapter_gradients(
    dHa,  # [M, lora_rank], contiguous, or None: no dA
    X,  # [M, K]
    dA,  # [lora_rank, K], contiguous
    Ha,  # [M, lora_rank], contiguous, or None: no dB
    dY,  # [M, N]
    dB,  # [N, lora_rank], contiguous
    dBias,  # [N] or None
    Partial,  # float32 workspace, or None
    Counters,  # int32, zero: arrivals
    M, K, N, lora_rank, x_m, x_k, dy_m, dy_n, alpha,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BA: tl.constexpr,
):
    """dA = dHa^T X, dB = alpha dY^T Ha and dBias = the sum of dY's rows, one tile a program.

    A tile is BA ranks of the adapter by BC columns of X or dY, summed over one of SPLIT shares of
    the rows. The last share to arrive adds up all shares in their order.
    """
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    rank_blocks = tl.cdiv(lora_rank, BA)
    x_tiles = 0
    if dHa is not None:
        x_tiles = tl.cdiv(K, BC) * rank_blocks
    ranks = tile % rank_blocks * BA + tl.arange(0, BA)
    begin, end = _share(M, part, SPLIT, BM)
    if dHa is not None:
        if tile < x_tiles:
            columns = tile // rank_blocks * BC + tl.arange(0, BC)
            acc, _ = _outer(
                dHa, X, x_m, x_k, columns, K, ranks, lora_rank, begin, end, M,
                SUM=False, PRECISION=PRECISION, BM=BM, BC=BC, BA=BA)
            is_complete = True
            if SPLIT > 1:
                acc, is_complete = _sum_of_parts(acc, Partial, Counters + tile, tile, part, SPLIT)
            if is_complete:
                inside = (ranks < lora_rank)[:, None] & (columns < K)[None, :]
                at = dA + ranks.to(tl.int64)[:, None] * K + columns[None, :]
                tl.store(at, acc.to(dA.dtype.element_ty), mask=inside)
    if Ha is not None:
        if tile >= x_tiles:
            columns = (tile - x_tiles) // rank_blocks * BC + tl.arange(0, BC)
            acc, total = _outer(
                Ha, dY, dy_m, dy_n, columns, N, ranks, lora_rank, begin, end, M,
                SUM=dBias is not None, PRECISION=PRECISION, BM=BM, BC=BC, BA=BA)
            is_complete = True
            if SPLIT > 1:
                if dBias is not None:
                    totals = Partial + (tl.num_programs(0) * BA * BC).to(tl.int64)
                    totals += tile.to(tl.int64) * SPLIT * BC + tl.arange(0, BC)
                    tl.store(totals + part * BC, total)
                acc, is_complete = _sum_of_parts(acc, Partial, Counters + tile, tile, part, SPLIT)
                if dBias is not None:
                    if is_complete:
                        total = tl.load(totals)
                        for other in range(1, SPLIT):
                            total += tl.load(totals + other * BC)
            if is_complete:
                inside = (ranks < lora_rank)[:, None] & (columns < N)[None, :]
                at_b = dB + columns.to(tl.int64)[None, :] * lora_rank + ranks[:, None]
                tl.store(at_b, (acc * alpha).to(dB.dtype.element_ty), mask=inside)
                if dBias is not None:
                    if tile % rank_blocks == 0:
                        bias_sum = total.to(dBias.dtype.element_ty)
                        tl.store(dBias + columns, bias_sum, mask=columns < N)


@triton.jit
def _outer(
    G, Z, z_m, z_c, columns, C, ranks, lora_rank, begin, end, M,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BA: tl.constexpr,
):
    """(G[m, ranks]^T Z[m, columns] [BA, BC], Z[m, columns] [BC]) summed over m in begin..end."""
    acc = tl.zeros((BA, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    for start in range(begin, end, BM):
        m = start + tl.arange(0, BM)
        at_m = m.to(tl.int64)[:, None]
        rows_inside = (m < M)[:, None]
        g = tl.load(G + at_m * lora_rank + ranks[None, :],
                    mask=rows_inside & (ranks < lora_rank)[None, :], other=0.0)
        z = tl.load(Z + at_m * z_m + columns[None, :] * z_c,
                    mask=rows_inside & (columns < C)[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), z, acc, input_precision=PRECISION)
        if SUM:
            total += tl.sum(z.to(tl.float32), 0)
    return acc, total


# ------------------------------------------------------------------- output order of torch products


@triton.jit(do_not_specialize=["M"])
def merge_pivots(
    Hs,  # [M, rank], contiguous
    T,  # [M, others], contiguous
    Bias,  # [N] or None
    Order,  # int64 [N]: where each output stands in (Hs, T) side by side
    Y,  # [M, N], contiguous
    M, N, rank, others, BM: tl.constexpr, BN: tl.constexpr,
):
    """Y = (Hs, T) in the order of the outputs, + Bias.

    One pass does what a concatenation, a gather and a sum would do after two of torch's products.
    """
    column_blocks = tl.cdiv(N, BN)
    rows = tl.program_id(0) // column_blocks * BM + tl.arange(0, BM)
    columns = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = tl.load(Order + columns, mask=columns < N, other=0)
    is_pivot = (place < rank)[None, :]
    at_h = Hs + _offsets(rows, rank, place)
    at_t = T + _offsets(rows, others, place - rank)
    h = tl.load(at_h, mask=inside & is_pivot, other=0.0)
    t = tl.load(at_t, mask=inside & (place >= rank)[None, :], other=0.0)
    y = tl.where(is_pivot, h, t).to(tl.float32)
    if Bias is not None:
        y += tl.load(Bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + _offsets(rows, N, columns), y.to(Y.dtype.element_ty), mask=inside)
