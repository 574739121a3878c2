"""The Triton kernels for a quantised matrix: its product with few rows, and its dequantised rows.

Both read the bit planes as QuantizedMatrix lays them out, in words of four bytes. A word of a plane
of w bits holds 32 / w codes of one group; _codes cuts two of them at a time into the low bits of
two half-precision numbers and puts all 64 in their order by joins and a transpose, which cost the
compiled loop a permute for two codes. At 4 bits sm_90's loop has 4.6 instructions a code, against
9.8 where each code is converted by itself; an H100 issues 4.4 while its memory delivers one.

`product` multiplies code - zero, which is exact in every dtype, and applies the scale to the
float32 sum of a group: one multiply-add for 64 codes, and no rounded weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hylora_kernels.backends.triton.kernels import (
    Matrix,
    _contract,
    _offsets,
    _share,
    _sum_of_parts,
)

# Argument lists are filled by hand, as in kernels.py.
# fmt: off

GROUP = tl.constexpr(64)


# One compiled kernel for every number of rows: M bounds masks and blocks, nothing else.
@triton.jit(do_not_specialize=["M"])
def product(
    X,  # [M, K], its columns contiguous
    Words,  # int32 [N, G, 2 BITS], contiguous: the planes
    Scales,  # float16 [N, G], contiguous
    Zeros,  # uint8 [N, G], contiguous; None: every zero point is 128
    Bias,  # [N] or None
    Ha,  # [M, lora_rank] = x A^T, contiguous, or None
    B,  # [N, lora_rank], contiguous, alpha in it, or None
    Y,  # [M, N], contiguous
    Partial,  # float32 workspace of split sums, or None
    Counters,  # int32, all zero: arrivals at each block of Y; None where sums aren't split
    M, K, N, G, lora_rank, x_m,
    BITS: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):
    """Y = X W^T + Ha B^T + Bias: a block [BM, BN] of it and one of SPLIT shares of K a program.

    The last share to arrive adds up all shares in their order and resets the block's arrivals.
    """
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    m_blocks = tl.cdiv(M, BM)
    rows = tile % m_blocks * BM + tl.arange(0, BM)
    columns = tile // m_blocks * BN + tl.arange(0, BN)
    inside = columns < N
    begin, end = _share(G, part, SPLIT, 1)
    # Rows and columns past the last repeat it: the loop needs a mask for K alone.
    row_x = X + tl.minimum(rows, M - 1).to(tl.int64)[None, :] * x_m
    first = tl.minimum(columns, N - 1) * G
    acc = tl.zeros((BN, BM), tl.float32)
    for group in range(begin, end):
        k = group * GROUP + tl.arange(0, GROUP)
        x = tl.load(row_x + k[:, None], mask=(k < K)[:, None], other=0.0)
        w, scale = _group(Words, Scales, Zeros, first + group, x.dtype, BITS)
        acc += tl.dot(w, x) * scale[:, None]
    is_complete = True
    if SPLIT > 1:
        acc, is_complete = _sum_of_parts(acc, Partial, Counters + tile, tile, part, SPLIT)
    if is_complete:
        if Ha is not None:
            h_a = Matrix(Ha, M, lora_rank, 1)
            b = Matrix(B, N, lora_rank, 1)
            acc = _contract(
                acc, h_a, rows, None, b, columns, inside, 0, lora_rank, lora_rank,
                SWAP=True, PRECISION="ieee", BLOCK=BJ)
        y = tl.trans(acc)
        if Bias is not None:
            y += tl.load(Bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        mask = (rows < M)[:, None] & inside[None, :]
        tl.store(Y + _offsets(rows, N, columns), y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first", "count"])
def dequantize(
    Words, Scales, Zeros,  # as for product
    Ids,  # int64 [count]: rows of W; None: those from `first` on
    Out,  # [count, K], contiguous
    first, count, N, K, G,
    BITS: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr,
):
    """Out = rows of W, each number rounded once: BN rows and GROUPS groups a program. A row that W
    doesn't have is NaN."""
    steps = tl.cdiv(G, GROUPS)
    rows = tl.program_id(0) // steps * BN + tl.arange(0, BN)
    begin = tl.program_id(0) % steps * GROUPS
    row_w = first + tl.minimum(rows, count - 1)
    if Ids is not None:
        row_w = tl.load(Ids + tl.minimum(rows, count - 1))
    exists = (row_w >= 0) & (row_w < N)
    place = tl.where(exists, row_w, 0).to(tl.int32) * G
    for group in range(begin, tl.minimum(begin + GROUPS, G)):
        w, scale = _group(Words, Scales, Zeros, place + group, tl.float32, BITS)
        k = group * GROUP + tl.arange(0, GROUP)
        values = w * tl.where(exists, scale, float("nan"))[:, None]
        mask = (rows < count)[:, None] & (k < K)[None, :]
        tl.store(Out + _offsets(rows, K, k), values.to(Out.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------- codes of words


@triton.jit
def _group(Words, Scales, Zeros, place, dtype: tl.constexpr, BITS: tl.constexpr):
    """(code - zero in dtype [BN, 64], scales in float32 [BN]) of the groups at `place` [BN]."""
    # Numbers of `half` whose last bits are the code: bfloat16 has room for 7 bits, float16 for 10.
    IN_BF16: tl.constexpr = dtype == tl.bfloat16 and BITS < 8
    half: tl.constexpr = tl.bfloat16 if IN_BF16 else tl.float16
    ONES: tl.constexpr = 0x4300 if IN_BF16 else 0x6400  # the bits of 128 and of 1024
    scale = tl.load(Scales + place).to(tl.float32)
    codes = _codes(Words, place, half, ONES, BITS)
    if Zeros is None:
        w = codes - 1152.0  # 1024 + 128
    else:
        zero = (tl.load(Zeros + place).to(tl.int16) | ONES).to(half, bitcast=True)
        w = codes - zero[:, None]
    return w.to(dtype), scale


@triton.jit
def _codes(Words, place, half: tl.constexpr, ONES: tl.constexpr, BITS: tl.constexpr):
    """ONES as a number + the codes of the groups at `place` [BN], in `half` [BN, 64]."""
    LOW_BITS: tl.constexpr = 8 if BITS == 8 else 4 if BITS >= 4 else 2
    HIGH_BITS: tl.constexpr = BITS - LOW_BITS
    BN: tl.constexpr = place.shape[0]
    at = Words + place.to(tl.int64)[:, None] * (2 * BITS)
    word = tl.arange(0, 2 * LOW_BITS)[None, :]
    low = tl.load(at + word)
    high = low
    if HIGH_BITS > 0:
        # A word of the high plane has the codes of several words of the low one.
        high = tl.load(at + (2 * LOW_BITS + word % (2 * HIGH_BITS)))
        high = high >> word // (2 * HIGH_BITS) * HIGH_BITS
    if LOW_BITS == 8:
        pairs = _of_bytes(low, high, 0, ONES, BITS, LOW_BITS)
    elif LOW_BITS == 4:
        pairs = tl.join(
            _of_bytes(low, high, 0, ONES, BITS, LOW_BITS),
            _of_bytes(low, high, 4, ONES, BITS, LOW_BITS))
    else:  # the last two dims count the shifts: 0, 2 and 4, 6
        pairs = tl.join(
            tl.join(
                _of_bytes(low, high, 0, ONES, BITS, LOW_BITS),
                _of_bytes(low, high, 4, ONES, BITS, LOW_BITS)),
            tl.join(
                _of_bytes(low, high, 2, ONES, BITS, LOW_BITS),
                _of_bytes(low, high, 6, ONES, BITS, LOW_BITS)))
    pairs = tl.reshape(pairs, (BN, 2 * LOW_BITS, 2, 8 // LOW_BITS))
    first = pairs.to(tl.int16).to(half, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(half, bitcast=True)
    # [BN, word, odd byte, shift, half of the word] -> by shift, word, half, odd byte: in order
    codes = tl.permute(tl.join(first, second), (0, 3, 1, 4, 2))
    return tl.reshape(codes, (BN, GROUP))


@triton.jit
def _of_bytes(
    low, high, shift: tl.constexpr, ONES: tl.constexpr, BITS: tl.constexpr, LOW_BITS: tl.constexpr,
):
    """The codes `shift` bits from the right in each byte, in pairs: [BN, words, odd byte]."""
    return tl.join(
        _pair(low, high, shift, ONES, BITS, LOW_BITS),
        _pair(low, high, shift + 8, ONES, BITS, LOW_BITS))


@triton.jit
def _pair(
    low, high, shift: tl.constexpr, ONES: tl.constexpr, BITS: tl.constexpr, LOW_BITS: tl.constexpr,
):
    """ONES | the code `shift` bits from the right in both halves of each word, int32."""
    BOTH: tl.constexpr = 0x00010001
    pair = low >> shift & (BOTH << LOW_BITS) - BOTH
    if BITS > LOW_BITS:
        pair |= (high >> shift & (BOTH << BITS - LOW_BITS) - BOTH) << LOW_BITS
    return pair | ONES * BOTH
