"""Tiny kernels for the tests of the guards, each right unless it is asked for a fault."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    X,  # [rows, columns], in steps of x_row
    Y,  # [rows, columns]
    x_row,
    rows,
    columns,
    SHIFT: tl.constexpr,  # added to every place that is read
    SIDES: tl.constexpr,  # the masked sides: "none", "columns"
    BLOCK: tl.constexpr,
):
    """Y = X, a row a program."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    mask = place < (columns if SIDES == "columns" else BLOCK)
    values = tl.load(X + row * x_row + place + SHIFT, mask=mask)
    tl.store(Y + row * columns + place, values, mask=place < columns)


@triton.jit
def store_at(Y, step, lane_step, BLOCK: tl.constexpr):
    """Program p stores its number to BLOCK places from p * step on, lane_step apart."""
    place = tl.program_id(0) * step + tl.arange(0, BLOCK) * lane_step
    tl.store(Y + place, tl.zeros((BLOCK,), tl.float32) + tl.program_id(0))


@triton.jit
def count(Counters, place):
    tl.atomic_add(Counters + place, 1)


@triton.jit
def multiply(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """C [M, N] = A [M, K] B [K, N]."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(A + m * K + k[None, :]), tl.load(B + k[:, None] * N + n)
    c = tl.dot(a, b, input_precision="ieee")
    tl.store(C + m * N + n, c.to(C.dtype.element_ty))


@triton.jit
def arithmetic(A, B, Whole, Out, BLOCK: tl.constexpr):
    """Every repaired operation on A and B [BLOCK], a row of Out [8, BLOCK] each."""
    lane = tl.arange(0, BLOCK)
    a, b = tl.load(A + lane), tl.load(B + lane)
    tl.store(Out + lane, a + b)
    tl.store(Out + BLOCK + lane, a * b)
    tl.store(Out + 2 * BLOCK + lane, a / b)
    tl.store(Out + 3 * BLOCK + lane, tl.where(a > b, a, -b))
    tl.store(Out + 4 * BLOCK + lane, tl.maximum(a, b))
    tl.store(Out + 5 * BLOCK + lane, (a.to(tl.float32) * 1.001).to(tl.bfloat16))
    tl.store(Out + 6 * BLOCK + lane, a.to(tl.float16).to(tl.bfloat16))
    tl.store(Out + 7 * BLOCK + lane, tl.load(Whole + lane).to(tl.bfloat16))


@triton.jit
def fused(A, Out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    a = tl.load(A + lane)
    tl.store(Out + lane, tl.fma(a, a, a))


@triton.jit
def relay(
    X,  # [BLOCK]
    W,  # [BLOCK] workspace
    Y,  # [programs, BLOCK]
    Flag,  # int32 zeros [2]: have stored, have left
    STORES: tl.constexpr,  # whether the first program has anything to say
    BARRIER: tl.constexpr,
    RELEASE: tl.constexpr,
    SAYS: tl.constexpr,
    WAITS: tl.constexpr,
    ACQUIRE: tl.constexpr,
    SCOPE: tl.constexpr,
    LEAVES: tl.constexpr,  # memory order of leaving
    BLOCK: tl.constexpr,
):
    """Program 0 copies X to W, the others copy it on to Y; the last one out clears Flag."""
    me = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if me == 0:
        if STORES:
            tl.store(W + lane, tl.load(X + lane))
        if BARRIER:
            tl.debug_barrier()
        if SAYS:
            tl.atomic_add(Flag, 1, sem=RELEASE, scope=SCOPE)
    else:
        if WAITS:
            while tl.atomic_add(Flag, 0, sem=ACQUIRE, scope=SCOPE) < 1:
                pass
        tl.store(Y + me * BLOCK + lane, tl.load(W + lane))
    if tl.atomic_add(Flag + 1, 1, sem=LEAVES) == tl.num_programs(0) - 1:
        tl.store(Flag, 0)
        tl.store(Flag + 1, 0)


@triton.jit
def fail_in(Flag, which):
    """All programs wait for ever, but one stores past Flag's only element."""
    if tl.program_id(0) == which:
        tl.atomic_add(Flag, 0)
        tl.store(Flag + 1, 0)
    while tl.atomic_add(Flag, 0) < 1:
        pass
