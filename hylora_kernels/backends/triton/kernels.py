"""The Triton kernels: one launch for both products of a layer, one for the adapter's gradients.

`dataflow` takes its tiles from one ordered queue: first all shrink tiles (h = x [W1; W1a]^T, into a
workspace that stays in L2), then all expand tiles (y = h [W2, W2a]^T + bias), which wait until the
h of their rows is complete. A tile waits only for tiles before it in the queue, and whoever took
those is running: no deadlock with any number of programs, other kernels on the device or not. The
weights are read once, and the second product starts where the first one's last wave leaves off.

The kernels know no direction: the backward's dx is the same launch with dy for x and the factors
transposed, by their strides. Base and adapter stay tensors of their own; alpha multiplies the
adapter's h in float32.

Everything a launch needs to be zero is zero again when it ends, so nothing is cleared between
launches and a CUDA graph can replay it. Sums have one order whoever comes first: same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

QUEUE, READY = tl.constexpr(0), tl.constexpr(1)  # places in Counters


# One compiled kernel for every number of rows: M bounds masks and blocks, nothing else.
# fmt: off
@triton.jit(do_not_specialize=["M"])
def dataflow(
    X,  # [M, K]
    W1,  # [rank, K], or with GATHER [rank, others]
    W1a,  # [lora_rank, K] or None
    W2,  # [N, rank], or with SCATTER [others, rank]
    W2a,  # [N, lora_rank] or None
    Bias,  # [N] or None
    Y,  # [M, N], contiguous
    H,  # [M, h_m], workspace: the base's columns, then the adapter's from the next multiple of BR
    Ha,  # [M, lora_rank] or None: x W1a^T for the caller, contiguous
    Partial,  # float32 workspace of split sums, or None
    Counters,  # int32, all zero: the queue, Ready [m_blocks], arrivals at each block of h
    Pivots,  # int32 [rank], ascending, or None
    Others,  # int64 [others]: the outputs that are no pivots, ascending, or None
    M, K, N, rank, lora_rank, others, h_m,
    x_m, x_k, w1_r, w1_k, w1a_r, w1a_k, w2_n, w2_r, w2a_n, w2a_r, alpha,
    GATHER: tl.constexpr,  # pivoted backward: h = x[:, Pivots] + x[:, Others] W1^T
    SCATTER: tl.constexpr,  # pivoted forward: y[:, Pivots] = h, y[:, Others] = h W2^T
    SCALED: tl.constexpr,  # Ha is alpha x W1a^T
    SPLIT: tl.constexpr, SWAP: tl.constexpr, PREFETCH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):
    # fmt: on
    m_blocks = tl.cdiv(M, BM)
    base_blocks = tl.cdiv(rank, BR)
    rank_blocks = base_blocks
    if W1a is not None:
        rank_blocks += tl.cdiv(lora_rank, BR)
    other_blocks = tl.cdiv(N, BN)
    column_blocks = other_blocks
    if SCATTER:
        other_blocks = tl.cdiv(others, BN)
        column_blocks = other_blocks + tl.cdiv(rank, BN)
    shrink_tiles = m_blocks * rank_blocks * SPLIT
    tiles = shrink_tiles + m_blocks * column_blocks
    Ready = Counters + READY

    tile = tl.atomic_add(Counters + QUEUE, 1, sem="relaxed")
    while tile < tiles:
        if tile < shrink_tiles:
            m_block = tile // SPLIT // rank_blocks
            complete = _shrink(
                *(X, W1, W1a, H, Ha, Partial, Ready + m_blocks, Pivots, Others, tile),
                *(M, K, rank, lora_rank, others, h_m, x_m, x_k, w1_r, w1_k, w1a_r, w1a_k, alpha),
                *(rank_blocks, base_blocks, GATHER, SCALED, SPLIT, SWAP, PREFETCH, PRECISION),
                *(BM, BR, BK),
            )
            if complete:
                tl.debug_barrier()  # every thread's part of h is written before one says so
                tl.atomic_add(Ready + m_block, 1, sem="release")
        else:
            m_block = (tile - shrink_tiles) // column_blocks
            column_block = (tile - shrink_tiles) % column_blocks
            if PREFETCH:  # while h is still being made
                if column_block < other_blocks:
                    columns = column_block * BN + tl.arange(0, BN)
                    limit = others if SCATTER else N
                    _prefetch(W2, w2_n, columns, limit, 0, rank)
            while tl.atomic_add(Ready + m_block, 0, sem="acquire") < rank_blocks:
                pass
            tl.debug_barrier()
            _expand(
                *(H, W2, W2a, Bias, Y, Pivots, Others, m_block, column_block),
                *(M, N, rank, lora_rank, others, h_m, w2_n, w2_r, w2a_n, w2a_r),
                *(base_blocks * BR, other_blocks, SCATTER, SWAP, PRECISION, BM, BN, BJ),
            )
        tile = tl.atomic_add(Counters + QUEUE, 1, sem="relaxed")

    # Each program ends on a ticket that is no tile's, drawn when its last tile was done. Who draws
    # the last of these leaves the counters as they were found; arrivals were reset on the way.
    if tile == tiles + tl.num_programs(0) - 1:
        # Added to, not exchanged: nobody waits for a result, which took 1.3 us of 9.
        tl.atomic_add(Counters + QUEUE, -tiles - tl.num_programs(0), sem="relaxed")
        for block in range(0, m_blocks):
            tl.atomic_add(Ready + block, -rank_blocks, sem="relaxed")


# fmt: off
@triton.jit
def _shrink(
    X, W1, W1a, H, Ha, Partial, Arrivals, Pivots, Others, tile, M, K, rank, lora_rank, others, h_m,
    x_m, x_k, w1_r, w1_k, w1a_r, w1a_k, alpha, rank_blocks, base_blocks,
    GATHER: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    PREFETCH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr,
):
    # fmt: on
    """One part of h [BM, BR]; True where that makes the block complete, and H has it."""
    part = tile % SPLIT
    place = tile // SPLIT
    rank_block = place % rank_blocks
    rows = place // rank_blocks * BM + tl.arange(0, BM)
    acc = _zeros(BM, BR, SWAP)
    if not GATHER:
        # One loop for base and adapter: with one on either side of a branch ptxas would wait for
        # every wgmma of the kernel before the next (sm_90), and each would have its own buffers.
        ranks = rank_block * BR + tl.arange(0, BR)
        W, w_r, w_k, limit = W1, w1_r, w1_k, rank
        if W1a is not None:
            if rank_block >= base_blocks:
                ranks -= base_blocks * BR
                W, w_r, w_k, limit = W1a, w1a_r, w1a_k, lora_rank
        begin, end = _share(K, part, SPLIT, BK)
        if PREFETCH:
            _prefetch(W, w_r, ranks, limit, begin, end)
        acc = _contract(
            *(acc, X, x_m, x_k, rows, M, None),
            *(W, w_r, w_k, ranks, ranks < limit),
            *(begin, end, K, SWAP, PRECISION, BK),
        )
    elif rank_block < base_blocks:
        ranks = rank_block * BR + tl.arange(0, BR)
        begin, end = _share(others, part, SPLIT, BK)
        acc = _contract(
            *(acc, X, x_m, x_k, rows, M, Others),
            *(W1, w1_r, w1_k, ranks, ranks < rank),
            *(begin, end, others, SWAP, PRECISION, BK),
        )
        if part == 0:
            columns = tl.load(Pivots + ranks, mask=ranks < rank, other=0)
            at = X + rows.to(tl.int64)[:, None] * x_m + columns[None, :] * x_k
            inside = (rows < M)[:, None] & (ranks < rank)[None, :]
            direct = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            acc += tl.trans(direct) if SWAP else direct
    elif W1a is not None:
        ranks_a = (rank_block - base_blocks) * BR + tl.arange(0, BR)
        begin_a, end_a = _share(K, part, SPLIT, BK)
        acc = _contract(
            *(acc, X, x_m, x_k, rows, M, None),
            *(W1a, w1a_r, w1a_k, ranks_a, ranks_a < lora_rank),
            *(begin_a, end_a, K, SWAP, PRECISION, BK),
        )
    complete = True
    if SPLIT > 1:
        acc, complete = _sum_of_parts(acc, Partial, Arrivals + place, place, part, SPLIT)
    if complete:
        h = tl.trans(acc) if SWAP else acc
        if W1a is not None:
            if rank_block >= base_blocks:
                scaled = h * alpha
                if Ha is not None:
                    columns_a = (rank_block - base_blocks) * BR + tl.arange(0, BR)
                    tl.store(
                        Ha + _offsets(rows, lora_rank, columns_a),
                        (scaled if SCALED else h).to(Ha.dtype.element_ty),
                        mask=(rows < M)[:, None] & (columns_a < lora_rank)[None, :],
                    )
                h = scaled
        columns_h = rank_block * BR + tl.arange(0, BR)
        at_h = H + _offsets(rows, h_m, columns_h)
        tl.store(at_h, h.to(H.dtype.element_ty), mask=(rows < M)[:, None])
    return complete


# fmt: off
@triton.jit
def _expand(
    H, W2, W2a, Bias, Y, Pivots, Others, m_block, column_block, M, N, rank, lora_rank, others, h_m,
    w2_n, w2_r, w2a_n, w2a_r, adapter_column, other_blocks,
    SCATTER: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr,
):
    # fmt: on
    """y [BM, BN] of one block of columns; with SCATTER the others' blocks, then the pivots'."""
    rows = m_block * BM + tl.arange(0, BM)
    columns = column_block * BN + tl.arange(0, BN)
    inside = columns < N
    depth = rank
    if SCATTER:
        inside = columns < others
        if column_block >= other_blocks:
            columns -= other_blocks * BN
            inside = columns < rank
            depth = 0  # a pivot is h itself; the loop stays outside of the branch, as in _shrink
    acc = _contract(
        *(_zeros(BM, BN, SWAP), H, h_m, 1, rows, M, None),
        *(W2, w2_n, w2_r, columns, inside),
        *(0, depth, rank, SWAP, PRECISION, BJ),
    )
    if SCATTER:
        if column_block >= other_blocks:
            mask = (rows < M)[:, None] & inside[None, :]
            h = tl.load(H + _offsets(rows, h_m, columns), mask=mask, other=0.0).to(tl.float32)
            acc += tl.trans(h) if SWAP else h
            columns = tl.load(Pivots + columns, mask=inside, other=0)
        else:
            columns = tl.load(Others + columns, mask=inside, other=0).to(tl.int32)
    if W2a is not None:
        acc = _contract(
            *(acc, H + adapter_column, h_m, 1, rows, M, None),
            *(W2a, w2a_n, w2a_r, columns, inside),
            *(0, lora_rank, lora_rank, SWAP, PRECISION, BJ),
        )
    y = tl.trans(acc) if SWAP else acc
    if Bias is not None:
        y += tl.load(Bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    mask_y = (rows < M)[:, None] & inside[None, :]
    tl.store(Y + _offsets(rows, N, columns), y.to(Y.dtype.element_ty), mask=mask_y)


@triton.jit
def _zeros(rows: tl.constexpr, columns: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((columns, rows), tl.float32)
    else:
        return tl.zeros((rows, columns), tl.float32)


@triton.jit
def _share(depth, part, SPLIT: tl.constexpr, BK: tl.constexpr):
    """The range of the contraction that part number `part` of SPLIT adds up."""
    if SPLIT == 1:
        return 0, depth
    else:
        blocks = tl.cdiv(depth, BK)
        return part * blocks // SPLIT * BK, (part + 1) * blocks // SPLIT * BK


@triton.jit
def _offsets(rows, stride, columns):
    """Where a matrix whose columns are contiguous has its elements [rows, columns]."""
    return rows.to(tl.int64)[:, None] * stride + columns[None, :]


# fmt: off
@triton.jit
def _contract(
    acc, Left, left_m, left_k, rows, M, Index, Right, right_n, right_k, columns, columns_inside,
    begin, end, depth,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    """acc [rows, columns] + Left[rows, k] Right[columns, k]^T for k in begin..end, below depth.

    With SWAP acc is [columns, rows]: the weights are the tensor cores' first operand. A single row
    is multiplied without them: nothing passes through shared memory, no warp waits for another,
    and tiles may be as small as it takes to give every program one. Index: where in Left the k-th
    column stands.
    """
    left_rows, rows_inside = rows.to(tl.int64) * left_m, rows < M
    right_columns = columns.to(tl.int64) * right_n
    if rows.shape[0] == 1:
        sums = tl.zeros((columns.shape[0], BLOCK), tl.float32)
    for start in range(begin, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < depth
        place = k
        if Index is not None:
            place = tl.load(Index + k, mask=inside, other=0).to(tl.int32)
        # Each operand is loaded the way round that the product takes it: transposed afterwards, a
        # weight whose rows are not contiguous would not be copied asynchronously on sm_80.
        if SWAP:
            a = tl.load(
                Left + left_rows[None, :] + place[:, None] * left_k,
                mask=inside[:, None] & rows_inside[None, :],
                other=0.0,
            )
            w = tl.load(
                Right + right_columns[:, None] + k[None, :] * right_k,
                mask=columns_inside[:, None] & inside[None, :],
                other=0.0,
            )
            if rows.shape[0] == 1:
                sums += w.to(tl.float32) * tl.trans(a).to(tl.float32)
            else:
                acc = tl.dot(w, a, acc, input_precision=PRECISION)
        else:
            a = tl.load(
                Left + left_rows[:, None] + place[None, :] * left_k,
                mask=rows_inside[:, None] & inside[None, :],
                other=0.0,
            )
            w = tl.load(
                Right + right_columns[None, :] + k[:, None] * right_k,
                mask=inside[:, None] & columns_inside[None, :],
                other=0.0,
            )
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if rows.shape[0] == 1:
        acc += tl.sum(sums, 1)[:, None]
    return acc


@triton.jit
def _prefetch(Weights, stride, rows, limit, begin, end):
    """Have Weights[rows, begin..end], rows contiguous, brought into L2 without waiting for it.

    The loads that follow have a few tiles on their way at a time, this all of them: with few rows
    of x that is the difference between two thirds of the memory's bandwidth and a third.
    """
    LINE: tl.constexpr = 1024 // Weights.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    row = tl.minimum(rows, limit - 1).to(tl.int64) * stride
    for start in range(begin, end, 8 * LINE):
        column = tl.minimum(start + tl.arange(0, 8) * LINE, end - 1)
        at = (Weights + row[:, None] + column[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, False, 1
        )


@triton.jit
def _sum_of_parts(acc, Partial, arrivals, place, part, SPLIT: tl.constexpr):
    """(the sum of all parts in their order, True) for the last part to arrive, else (acc, False).

    The last one leaves its counter at zero.
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


@triton.jit(do_not_specialize=["M"])
def thin(
    dHa,  # [M, lora_rank], contiguous, or None: no dA
    X,  # [M, K]
    dA,  # [lora_rank, K], contiguous
    Ha,  # [M, lora_rank], contiguous, or None: no dB
    dY,  # [M, N]
    dB,  # [N, lora_rank], contiguous
    dBias,  # [N] or None
    Partial,  # float32 workspace, or None
    Counters,  # int32, zero: arrivals
    M,
    K,
    N,
    lora_rank,
    x_m,
    x_k,
    dy_m,
    dy_n,
    alpha,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BA: tl.constexpr,
):
    """dA = dHa^T X, dB = alpha dY^T Ha and dBias = sum of dY's rows, one tile a program.

    A tile is BA ranks of the adapter by BC columns of X or dY, summed over one of SPLIT shares of
    the rows; the last share to arrive adds them all up, in their order.
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
                *(dHa, X, x_m, x_k, columns, K, ranks, lora_rank, begin, end, M),
                *(False, PRECISION, BM, BC, BA),
            )
            complete = True
            if SPLIT > 1:
                acc, complete = _sum_of_parts(acc, Partial, Counters + tile, tile, part, SPLIT)
            if complete:
                inside = (ranks < lora_rank)[:, None] & (columns < K)[None, :]
                at = dA + ranks.to(tl.int64)[:, None] * K + columns[None, :]
                tl.store(at, acc.to(dA.dtype.element_ty), mask=inside)
    if Ha is not None:
        if tile >= x_tiles:
            columns = (tile - x_tiles) // rank_blocks * BC + tl.arange(0, BC)
            acc, total = _outer(
                *(Ha, dY, dy_m, dy_n, columns, N, ranks, lora_rank, begin, end, M),
                *(dBias is not None, PRECISION, BM, BC, BA),
            )
            complete = True
            if SPLIT > 1:
                if dBias is not None:
                    totals = Partial + (tl.num_programs(0) * BA * BC).to(tl.int64)
                    totals += tile.to(tl.int64) * SPLIT * BC + tl.arange(0, BC)
                    tl.store(totals + part * BC, total)
                acc, complete = _sum_of_parts(acc, Partial, Counters + tile, tile, part, SPLIT)
                if dBias is not None:
                    if complete:
                        total = tl.load(totals)
                        for other in range(1, SPLIT):
                            total += tl.load(totals + other * BC)
            if complete:
                inside = (ranks < lora_rank)[:, None] & (columns < N)[None, :]
                at_b = dB + columns.to(tl.int64)[None, :] * lora_rank + ranks[:, None]
                tl.store(at_b, (acc * alpha).to(dB.dtype.element_ty), mask=inside)
                if dBias is not None:
                    if tile % rank_blocks == 0:
                        bias_sum = total.to(dBias.dtype.element_ty)
                        tl.store(dBias + columns, bias_sum, mask=columns < N)


# fmt: off
@triton.jit
def _outer(
    G, Z, z_m, z_c, columns, C, ranks, lora_rank, begin, end, M,
    SUM: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BA: tl.constexpr,
):
    # fmt: on
    """(G[m, ranks]^T Z[m, columns] [BA, BC], Z[m, columns] [BC]) summed over m in begin..end."""
    acc = tl.zeros((BA, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    for start in range(begin, end, BM):
        m = start + tl.arange(0, BM)
        at_m = m.to(tl.int64)[:, None]
        rows_inside = (m < M)[:, None]
        g = tl.load(
            G + at_m * lora_rank + ranks[None, :],
            mask=rows_inside & (ranks < lora_rank)[None, :],
            other=0.0,
        )
        z = tl.load(
            Z + at_m * z_m + columns[None, :] * z_c,
            mask=rows_inside & (columns < C)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(g), z, acc, input_precision=PRECISION)
        if SUM:
            total += tl.sum(z.to(tl.float32), 0)
    return acc, total


@triton.jit(do_not_specialize=["M"])
def weave(
    Hs,  # [M, rank], contiguous
    T,  # [M, others], contiguous
    Bias,  # [N] or None
    Order,  # int64 [N]: where each output stands in (Hs, T) side by side
    Y,  # [M, N], contiguous
    M,
    N,
    rank,
    others,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Y = (Hs, T) in the order of the outputs, + Bias, in one pass: what the pivoted form needs
    after two products of torch's, and would take a concatenation, a gather and a sum."""
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
