"""The Triton kernels in triton's interpreter: the checks they run under, numbers, interleavings.

The interpreter alone proves little: it computes bfloat16 wrongly, lets every stray access pass and
runs one program after the other. triton_interpreter/ mends that; its own tests come first.
"""

from __future__ import annotations

import dataclasses
import os
import threading

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "interpreted and compiled kernels can't share a process: TRITON_INTERPRET=1 runs these",
        allow_module_level=True,
    )

from helpers.numerics import (
    FORMS,
    GRADS,
    Case,
    assert_as_exact_as_formula,
    by_op,
    by_reference,
    every_form,
    make_dy,
    make_inputs,
    pairwise,
)
from triton_interpreter import bf16, guards, resident, toys
from triton_interpreter.checked import checked
from triton_interpreter.forced import Tiles, forced
from triton_interpreter.guards import OutOfBounds, Race, SmallDot
from triton_interpreter.internals import Builder, replaced
from triton_interpreter.resident import Deadlock

from hylora_kernels import svd_lora_linear, use_backend
from hylora_kernels.backends.triton import launch
from hylora_kernels.backends.triton.config import AdapterGradientsConfig, Config

SEEDS = range(20)

# --------------------------------------------------------------------------------------- bfloat16


def _bf16(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def test_bf16_rounds_to_nearest_even():
    values = torch.randn(4000) * torch.logspace(-40, 38, 4000)
    halfway = _bf16(1.0, 1.0078125).float() + 2.0**-8  # the even neighbour is below, then above
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38, 1e-45])
    values = torch.cat([values, halfway, special])
    narrowed = torch.from_numpy(bf16.narrow(values.numpy()).view("int16"))
    assert torch.equal(narrowed, values.to(torch.bfloat16).view(torch.int16))
    assert torch.equal(
        torch.from_numpy(bf16.widen(narrowed.numpy().view("uint16"))),
        values.to(torch.bfloat16).float(),
    )
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    narrowed = torch.from_numpy(bf16.narrow(nan.numpy()).view("int16"))
    assert narrowed.view(torch.bfloat16).isnan().all()


def test_bf16_arithmetic():
    a, b = torch.randn(2, 64).to(torch.bfloat16)
    whole = torch.arange(-9000, 23000, 500, dtype=torch.int32)
    out = torch.empty(8, 64, dtype=torch.bfloat16)
    with bf16.repaired():
        toys.arithmetic[(1,)](a, b, whole, out, BLOCK=64)
    expected = [a + b, a * b, a / b, torch.where(a > b, a, -b), torch.maximum(a, b)]
    expected += [(a.float() * 1.001).bfloat16(), a.half().bfloat16(), whole.bfloat16()]
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot(dtype):
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    c = torch.empty(16, 32)
    with bf16.repaired():
        toys.multiply[(1,)](a, b, c, M=16, N=32, K=64)
    torch.testing.assert_close(c, a.float() @ b.float())


def test_bf16_is_refused_where_it_is_not_mended():
    a = torch.randn(16).to(torch.bfloat16)
    with bf16.repaired(), pytest.raises(Exception, match="create_fma of bfloat16 is not repaired"):
        toys.fused[(1,)](a, torch.empty_like(a), BLOCK=16)


# ----------------------------------------------------------------------------------------- guards


def _rows(columns=30, row=32, rows=3, **fault):
    x = torch.randn(rows, row)[:, :columns]
    y = torch.empty(rows, columns)
    constants = {"SHIFT": 0, "SIDES": "columns", "BLOCK": 32} | fault
    toys.copy_rows[(rows,)](x, y, row, rows, columns, **constants)
    return torch.equal(x, y)


def test_clean_kernels_pass_launch_after_launch():
    y, counters = torch.empty(32), torch.zeros(1, dtype=torch.int32)
    a = torch.randn(16, 16)
    with guards.watching():
        for _ in range(2):  # a second launch may store where the first one did
            assert _rows()
            toys.store_at[(2,)](y, 16, 1, BLOCK=16)
            toys.count[(3,)](counters, 0)
            toys.multiply[(1,)](a, a, torch.empty(16, 16), M=16, N=16, K=16)
    assert counters.item() == 6 and y.tolist() == [0.0] * 16 + [1.0] * 16


BOUNDS = {
    "before the first": {"SHIFT": -1},
    "past the last": {"SHIFT": 1, "row": 30},
    "in the gap between rows": {"SIDES": "none"},
    "in another tensor": {"SHIFT": 1 << 20},
}


@pytest.mark.parametrize("fault", BOUNDS.values(), ids=BOUNDS)
def test_reads_out_of_bounds(fault):
    with guards.watching(), pytest.raises(OutOfBounds, match="load of program"):
        _rows(**fault)


def test_stores_and_atomics_out_of_bounds():
    with guards.watching():
        with pytest.raises(OutOfBounds, match="store of program 1"):
            toys.store_at[(2,)](torch.empty(31), 16, 1, BLOCK=16)
        for place in (-1, 2):
            with pytest.raises(OutOfBounds, match="atomic of program 0"):
                toys.count[(1,)](torch.zeros(2, dtype=torch.int32), place)


def test_two_stores_to_one_element():
    with guards.watching():
        with pytest.raises(Race, match="two lanes of a store by program 0"):
            toys.store_at[(1,)](torch.empty(16), 0, 0, BLOCK=16)
        with pytest.raises(Race, match="program 1 stores to what program 0 stored"):
            toys.store_at[(2,)](torch.empty(64), 15, 1, BLOCK=16)


@pytest.mark.parametrize("sides", [(8, 16, 16), (16, 8, 16), (16, 16, 8)], ids=str)
def test_small_sides_of_dot(sides):
    M, N, K = sides
    operands = torch.randn(M, K), torch.randn(K, N), torch.empty(M, N)
    with guards.watching(), pytest.raises(SmallDot, match=r"each has to be 16 or more"):
        toys.multiply[(1,)](*operands, M=M, N=N, K=K)


def test_guards_are_gone_afterwards():
    stock = Builder.create_masked_store, Builder.create_dot, Builder.create_atomic_rmw
    with pytest.raises(ZeroDivisionError), checked():
        assert Builder.create_dot is not stock[1]
        raise ZeroDivisionError
    assert stock == (Builder.create_masked_store, Builder.create_dot, Builder.create_atomic_rmw)
    toys.store_at[(2,)](torch.empty(64), 15, 1, BLOCK=16)  # as careless as ever


def test_an_interpreter_that_has_moved_is_noticed():
    for functions in ({"create_dot": lambda self, a, b: None}, {"create_sausage": lambda self: 0}):
        refused = pytest.raises(RuntimeError, match="bring tests/triton_interpreter up to this")
        with refused, replaced(Builder, **functions):
            pass


# ------------------------------------------------------------------------------- hand-over, turns

CLEAN = {
    "STORES": True,
    "BARRIER": True,
    "RELEASE": "release",
    "SAYS": True,
    "WAITS": True,
    "ACQUIRE": "acquire",
    "SCOPE": "gpu",
    "LEAVES": "acq_rel",
}


def _relay(programs=4, **fault):
    """True if every program got it; raises what the checks raise."""
    x, y = torch.randn(16), torch.empty(programs, 16)
    flag = torch.zeros(2, dtype=torch.int32)
    toys.relay[(programs,)](x, torch.empty(16), y, flag, **(CLEAN | fault), BLOCK=16)
    assert not flag.any()
    return torch.equal(y[1:], x.expand(programs - 1, 16))


@pytest.mark.parametrize("programs", [1, 2, 4, 8])
def test_a_clean_relay_passes_in_any_order(programs):
    seen = set()
    for seed in SEEDS:
        with checked(seed) as orders:
            assert _relay(programs)
        seen.add(tuple(orders[0]))
    assert len(seen) >= (1 if programs == 1 else 15), "the seeds draw few orders"


RACES = {
    "release relaxed": {"RELEASE": "relaxed"},
    "acquire relaxed": {"ACQUIRE": "relaxed"},
    "scope of one block": {"SCOPE": "cta"},
    "no barrier before the release": {"BARRIER": False},
}


@pytest.mark.parametrize("fault", RACES.values(), ids=RACES)
def test_missing_memory_order_is_a_race_in_any_order(fault):
    for seed in SEEDS[:5]:
        with checked(seed), pytest.raises(Race, match="loads what program 0 stored"):
            _relay(**fault)
        with bf16.repaired(), resident.together(seed):
            assert _relay(**fault), "it shows in no number"


def test_a_reset_that_others_may_still_count_on_is_a_race():
    for seed in SEEDS[:5]:
        with checked(seed), pytest.raises(Race, match="stores where others' atomics go on"):
            _relay(LEAVES="relaxed")


def test_a_missing_wait_is_seen():
    for seed in SEEDS:
        with checked(seed), pytest.raises(Race, match=r"loads what|was loaded before"):
            _relay(WAITS=False)

    def shows(seed):
        with resident.together(seed):
            return not _relay(WAITS=False)

    assert any(map(shows, SEEDS)), "no order has brought a reader before the writer"


def test_deadlock():
    threads = threading.active_count()
    for seed in SEEDS:
        with checked(seed), pytest.raises(Deadlock, match=r"programs \[1, 2, 3\] wait"):
            _relay(SAYS=False)
    assert threading.active_count() == threads


def test_a_program_that_fails_ends_the_others():
    threads = threading.active_count()
    for which in range(4):
        with checked(which), pytest.raises(OutOfBounds, match=f"store of program {which}"):
            toys.fail_in[(4,)](torch.zeros(1, dtype=torch.int32), which)
        assert threading.active_count() == threads


# ------------------------------------------------------------------------------------ the backend

SMALL = Tiles(Config(16, 16, 32, 32, 16), AdapterGradientsConfig(16, 32, 16))
SPLIT = Tiles(
    Config(16, 32, 16, 16, 32, split=3), AdapterGradientsConfig(16, 16, 32, split=3), programs=5
)
SWAPPED = Tiles(
    Config(16, 16, 16, 16, 32, split=3, swap=True), AdapterGradientsConfig(16, 64, 16, split=2)
)
LARGE = Tiles(Config(32, 32, 64, 64, 64, swap=True), AdapterGradientsConfig(64, 64, 32), programs=1)
TILES = {"small": SMALL, "split": SPLIT, "swapped": SWAPPED, "large": LARGE}

# Little more than a tile of 16 or 32 each way, so that every side has a full and a ragged one.
GRID = {
    "M": (0, 1, 17, 33),
    "sizes": ((33, 21, 17), (40, 19, 5), (20, 35, 18), (48, 64, 32), (1, 3, 1)),
    "lora_rank": (0, 1, 8, 17),
    "bias": (True, False),
    "alpha": (0.37, -2.5),
    "layout": ("contiguous", "padded", "every_second", "transposed"),
    "form": FORMS,
    "tiles": tuple(TILES),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
}


def _points() -> list:
    points = []
    for point in pairwise(GRID):
        tiles, dtype = point.pop("tiles"), point.pop("dtype")
        case = Case(**point)
        points.append(pytest.param(case, TILES[tiles], dtype, id=f"{case}-{tiles}-{dtype}"))
    return points


@pytest.mark.parametrize(("case", "tiles", "dtype"), _points())
def test_numbers_with_guards_on(case, tiles, dtype):
    inputs = make_inputs(case, dtype)
    dy = make_dy(inputs)
    with checked() as launches, forced(tiles), use_backend("triton"):
        got = by_op(svd_lora_linear, inputs, dy)
    assert_as_exact_as_formula(got, inputs, dy)
    assert len(launches) == (0 if case.M == 0 else 3 if case.lora_rank else 2)


ROW = Tiles(
    Config(1, 8, 16, 16, 8, split=2, swap=True), AdapterGradientsConfig(16, 32, 16), programs=4
)


@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
@every_form
def test_row_by_row(form, dtype):
    M = 2 if form == "pair" else 1
    inputs = make_inputs(Case(M=M, sizes=(33, 21, 9), layout="every_second", form=form), dtype)
    dy = make_dy(inputs)
    with checked(), forced(ROW), use_backend("triton"):
        got = by_op(svd_lora_linear, inputs, dy)
    assert_as_exact_as_formula(got, inputs, dy)


CHOICES = [("A",), ("B",), ("x", "B"), ("A", "bias"), ("B", "bias"), ("A", "B")]


@pytest.mark.parametrize("names", CHOICES, ids="-".join)
def test_some_of_the_gradients(names):
    inputs = make_inputs(Case(M=17, sizes=(20, 35, 5)), torch.float32)
    dy = make_dy(inputs)
    leaves = inputs._replace(**{n: getattr(inputs, n).detach().requires_grad_() for n in names})
    with checked(), forced(SPLIT), use_backend("triton"):
        svd_lora_linear(*leaves).backward(dy)
    expected = by_reference(inputs, dy)
    for name, grad in zip(("x", "A", "B", "bias"), GRADS, strict=True):
        if name in names:
            torch.testing.assert_close(getattr(leaves, name).grad, expected[grad])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("dtype", GRID["dtype"], ids=str)
def test_merge_pivots(dtype, bias):
    h_s, t, offset = (torch.randn(shape).to(dtype) for shape in ((130, 45), (130, 255), (300,)))
    order = torch.randperm(300)
    with checked() as launches:
        y = launch.merge_pivots(h_s, t, offset if bias else None, order)
    merged = torch.cat((h_s, t), 1)[:, order]
    assert torch.equal(y, merged + offset if bias else merged)
    assert len(launches) == 1


PREFILL = Tiles(Config(16, 16, 32, 32, 32), AdapterGradientsConfig(16, 32, 16, split=2))
ORDERS = {
    "prefill": (PREFILL, Case(M=19, sizes=(24, 37, 20), lora_rank=3)),
    "decode": (SWAPPED, Case(M=3, sizes=(40, 24, 12), lora_rank=3)),
    "decode, pivoted": (SWAPPED, Case(M=3, sizes=(40, 60, 12), lora_rank=3, form="pivoted")),
    "row by row": (ROW, Case(M=2, sizes=(20, 12, 7), lora_rank=3)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_same_bits_in_any_order_with_any_number_of_programs(name):
    tiles, case = ORDERS[name]
    inputs = make_inputs(case, torch.float32)
    dy = make_dy(inputs)
    first, seen = None, set()
    for seed in SEEDS:
        tiles = dataclasses.replace(tiles, programs=1 + seed % 8)
        with checked(seed) as orders, forced(tiles), use_backend("triton"):
            got = by_op(svd_lora_linear, inputs, dy)
        seen.add(tuple(map(tuple, orders)))
        first = first or got
        assert got.keys() == first.keys()
        for tensor in got:
            assert torch.equal(got[tensor], first[tensor]), f"{tensor}, seed {seed}"
    assert_as_exact_as_formula(first, inputs, dy)
    assert len(seen) > 15, "the seeds draw few orders"
