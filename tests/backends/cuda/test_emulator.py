"""The CUDA kernels on the CPU emulator: the emulator itself, numbers, orders, sanitizers.

Nothing here needs a GPU or nvcc. The emulator can't see the PTX behind the primitives, a GPU's
weak memory, bank conflicts or time.
"""

from __future__ import annotations

import dataclasses
import os
import platform

import pytest
import torch
from cuda_emulator import emulated
from cuda_emulator.emulated import DECODE, TILE_64, TILE_128, Choice, Fault, Script
from helpers.numerics import (
    AXES,
    FORMS,
    Case,
    assert_as_exact_as_formula,
    by_op,
    by_reference,
    distance,
    make_dy,
    make_inputs,
    pairwise,
)

from hylora_kernels import svd_lora_linear, use_backend
from hylora_kernels.backends import triton

if emulated.COMPILER is None or platform.machine() != "x86_64":
    pytest.skip(
        "the emulator needs g++, and its fibers change stacks in x86-64's instructions",
        allow_module_level=True,
    )

DTYPES = (torch.bfloat16, torch.float16)
every_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _need(sanitizer: str) -> None:
    if reason := emulated.why_no_sanitizer(sanitizer):
        pytest.skip(reason)


# ------------------------------------------------------------------------- the emulator by itself


def _toy(which, given=None, dtype=torch.int32, shape=(32, 4), sanitizer="plain", **values):
    script = Script()
    out = script.empty(dtype, *shape)
    script.launch("toy", which=which, out=out, **({"in": script.give(given)}), **values)
    place = script.write(out, dtype, *shape)
    return emulated.run(emulated.driver(sanitizer), script)[0][place]


@every_type
def test_rounds_to_nearest_even(dtype):
    values = torch.randn(4000) * torch.logspace(-40, 38, 4000)
    exact = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = exact[~exact.isnan()]
    halfway = (exact[:-1] + exact[1:]) / 2
    values = torch.cat([values, exact, halfway[halfway.isfinite()]])
    script = Script()
    out = script.empty(dtype, len(values))
    script.launch("round", type=emulated.TYPES[dtype], **{"in": script.give(values)}, out=out)
    place = script.write(out, dtype, len(values))
    rounded = emulated.run(emulated.driver(), script)[0][place]
    assert torch.equal(rounded.view(torch.int16), values.to(dtype).view(torch.int16))


@every_type
def test_mma_takes_its_operands_as_the_isa_says(dtype):
    """The tables of PTX ISA, "Matrix Fragments for mma.m16n8k16", element by element."""
    A, B = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    words = torch.empty(32, 6, 2, dtype=dtype)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
            words[lane, i // 2, i % 2] = A[row, column]
        for i in range(4):
            row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
            words[lane, 4 + i // 2, i % 2] = B[row, group]
    found = _toy(f"mma_{'bf16' if dtype == torch.bfloat16 else 'fp16'}", words, torch.float32)
    exact = A.float() @ B.float()
    for lane in range(32):
        for i in range(4):
            row = (lane >> 2) + (0 if i < 2 else 8)
            expected = exact[row, (lane % 4) * 2 + (i & 1)]
            torch.testing.assert_close(found[lane, i], expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["as it lies", "transposed"])
def test_ldmatrix_gives_what_the_isa_says(transposed):
    matrices = torch.arange(4 * 64, dtype=torch.int16).reshape(4, 8, 8)
    name = "ldmatrix_transposed" if transposed else "ldmatrix"
    found = _toy(name, matrices, torch.int16, (32, 4, 2))
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for i in range(4):
            matrix = matrices[i].T if transposed else matrices[i]
            assert found[lane, i].tolist() == matrix[row, column : column + 2].tolist()


def test_copies_come_late_and_end_in_zeros():
    given = torch.arange(32 * 8, dtype=torch.int16).reshape(32, 8)
    expected = given.clone()
    expected[:, 5:] = 0
    assert torch.equal(_toy("copies", given, torch.int16, (32, 8)), expected)
    assert (_toy("copies_unwaited", given, torch.int16, (32, 8)) == -1).all()


FAULTS = {
    "ends_before_barrier": "a thread ended while others wait at a barrier|a barrier after a thread",
    "waits_for_lane": "deadlock",
    "diverges": "divergence",
    "polls_for_ever": "deadlock: threads poll",
    "misaligned": "not 16-byte aligned",
    "leaves_copies": "ended before its copies",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("which", FAULTS)
def test_faults_are_seen(which, seed):
    with pytest.raises(Fault, match=FAULTS[which]):
        _toy(which, torch.zeros(512, dtype=torch.int32), seed=seed)


@pytest.mark.parametrize("which", ["hands_over_relaxed", "passes_on_at_once"])
def test_races_are_seen(which):
    _need("thread")
    clean = {"hands_over_relaxed": "hands_over", "passes_on_at_once": "passes_on"}[which]
    _toy(clean, blocks=2 if "hands" in which else 1, sanitizer="thread")
    with pytest.raises(Fault, match="data race"):
        _toy(which, blocks=2 if "hands" in which else 1, sanitizer="thread")


# ------------------------------------------------------------------------------------------ numbers

CHOICES = {
    "planned": Choice(),
    "64": Choice(TILE_64, programs=3, seed=1),
    "64 split": Choice(TILE_64, split=3, adapter_split=2, programs=7, seed=2),
    "128": Choice(TILE_128, programs=2, alive=1, seed=3),
    "128 split": Choice(TILE_128, split=2, adapter_split=3, programs=5, alive=3, seed=4),
    "decode": Choice(DECODE, programs=4, seed=5),
    "decode split": Choice(DECODE, split=4, programs=8, seed=6),
}
GRID = AXES | {
    "M": (1, 3, 16, 17, 70, 140),  # M = 0 never comes to a kernel
    "sizes": (*AXES["sizes"], (300, 136, 71)),  # more steps than stages, more blocks than one
    "dtype": DTYPES,
    "choice": tuple(CHOICES),
    "shift": (0, 2),
}


def _points():
    for point in pairwise(GRID):
        dtype, name, shift = (point.pop(axis) for axis in ("dtype", "choice", "shift"))
        if name.startswith("decode") and point["M"] > 16:
            point["M"] = 16
        if point["form"] == "dense":  # whose rank is N
            point["sizes"] = (*point["sizes"][:2], min(point["sizes"][1:]))
        case = Case(**point)
        choice = dataclasses.replace(CHOICES[name], shift=shift)
        yield pytest.param(case, choice, dtype, id=f"{case}-{name}+{shift}-{str(dtype)[6:]}")


def _layer(script: Script, case: Case, dtype, choice: Choice):
    """Put a layer's launches into the script; return a function that picks its results."""
    inputs = make_inputs(case, dtype)
    dy = make_dy(inputs)
    places = emulated.layer(script, inputs, dy, choice)

    def got(results):
        tensors = {name: None if at is None else results[at] for name, at in places.items()}
        tensors["y"] = tensors["y"].reshape(dy.shape)
        tensors["dx"] = tensors["dx"].reshape(inputs.x.shape)
        return tensors

    return inputs, dy, got


@pytest.fixture(scope="module")
def seconds():
    """The seconds of each launch of test_numbers."""
    taken = []
    yield taken
    print(
        f"\n{len(taken)} launches, {sum(taken):.1f} s of emulation, the longest {max(taken):.2f} s"
    )


@pytest.mark.parametrize(("case", "choice", "dtype"), list(_points()))
def test_numbers(case, choice, dtype, seconds):
    script = Script()
    inputs, dy, got = _layer(script, case, dtype, choice)
    results, launches = emulated.run(emulated.driver(), script)
    found = got(results)
    if case.bias and not case.lora_rank:
        found["db"] = dy.reshape(case.M, -1).sum(0)  # no launch of ours: the backend's, by torch
    assert_as_exact_as_formula(found, inputs, dy)
    seconds.extend(launch.seconds for launch in launches)


SOME = {
    "dA": ("dh_a", "x", "dA"),
    "dB": ("h_a", "dy", "dB"),
    "dB and db": ("h_a", "dy", "dB", "db"),
}


@pytest.mark.parametrize("name", SOME)
def test_some_of_the_adapters_gradients(name):
    M, K, N, lora_rank, dtype = 100, 140, 37, 35, torch.bfloat16
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    dh_a, h_a = (torch.randn(M, lora_rank).to(dtype) for _ in range(2))
    shapes = {"dA": (lora_rank, K), "dB": (N, lora_rank), "db": (N,)}
    exact = {"dA": dh_a.T.double() @ x.double(), "dB": 0.37 * dy.T.double() @ h_a.double()}
    exact["db"] = dy.double().sum(0)
    script = Script()
    given = {"dh_a": dh_a, "x": x, "h_a": h_a, "dy": dy}
    named = {n: script.give(t) for n, t in given.items() if n in SOME[name]}
    made = {n: script.empty(dtype, *shape) for n, shape in shapes.items() if n in SOME[name]}
    sizes = {"M": M, "K": K, "N": N, "lora_rank": lora_rank, "x_stride": K, "dy_stride": N}
    script.launch("adapter_gradients", type=0, alpha=0.37, split=2, **sizes, **named, **made)
    places = {n: script.write(at, dtype, *shapes[n]) for n, at in made.items()}
    results, _ = emulated.run(emulated.driver(), script)
    for n, place in places.items():
        torch.testing.assert_close(results[place].double(), exact[n], rtol=2**-8, atol=1e-3)


TRITON = [Case(M=3, sizes=(129, 65, 31)), Case(M=70, sizes=(64, 96, 32), form="pivoted")]


@every_type
@pytest.mark.parametrize("case", TRITON, ids=str)
def test_agrees_with_the_triton_kernel(case, dtype):
    if not triton.INSTALLED or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton's interpreter is not there: TRITON_INTERPRET=1, and triton installed")
    script = Script()
    inputs, dy, got = _layer(script, case, dtype, Choice())
    found = got(emulated.run(emulated.driver(), script)[0])
    with use_backend("triton"):
        other = by_op(svd_lora_linear, inputs, dy)
    truth = by_reference(inputs.map(torch.Tensor.double), dy.double())
    for name, tensor in other.items():
        slack = 4 * torch.finfo(dtype).eps * max(1.0, float(truth[name].abs().max()))
        assert distance(found[name], tensor) <= 2 * distance(tensor, truth[name]) + slack, name


# ------------------------------------------------------------------------------------------- orders

ORDERS = {
    "64": (Case(M=70, sizes=(200, 130, 71), lora_rank=8), Choice(TILE_64, 3, 2)),
    "64 pivoted": (
        Case(M=70, sizes=(130, 200, 40), lora_rank=33, form="pivoted"),
        Choice(TILE_64, 2, 3),
    ),
    "128": (Case(M=130, sizes=(140, 96, 32), lora_rank=3), Choice(TILE_128, 2, 1)),
    "decode": (Case(M=3, sizes=(300, 70, 40), lora_rank=17), Choice(DECODE, 3, 2)),
    "decode pivoted": (
        Case(M=16, sizes=(300, 130, 71), lora_rank=8, form="pivoted"),
        Choice(DECODE, 4, 1),
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_same_bits_in_any_order_with_any_number_of_programs(name):
    case, choice = ORDERS[name]
    script, seeds, gots = Script(), range(14), []
    for seed in seeds:
        programs = 1 + seed * 5 % 8
        alive = programs - seed // 4 if programs > 3 else None
        drawn = dataclasses.replace(choice, seed=seed, programs=programs, alive=alive)
        inputs, dy, got = _layer(script, case, torch.float16, drawn)
        gots.append(got)
    results, launches = emulated.run(emulated.driver(), script)
    first = gots[0](results)
    assert_as_exact_as_formula(first, inputs, dy)
    for seed, got in zip(seeds, gots, strict=True):
        for tensor, value in got(results).items():
            assert torch.equal(value, first[tensor]), f"{tensor}, seed {seed}"
    assert {launch.programs for launch in launches[::3]} >= {1, 3, 8}
    assert len({launch.order for launch in launches[::3]}) >= 12, "the seeds draw few orders"


# --------------------------------------------------------------------------------------- sanitizers

WATCHED = [
    Case(M=17, sizes=(129, 65, 31), layout="padded"),
    Case(M=70, sizes=(64, 96, 32), lora_rank=33),
    Case(M=16, sizes=(37, 53, 7), lora_rank=0, bias=False),
    Case(M=3, sizes=(72, 136, 40)),
]
THREADS = ("64 split", "128 split", "decode split")


def _watch(sanitizer: str, points) -> float:
    """Runs every point's layer in one process with a sanitizer: seconds in the kernels."""
    _need(sanitizer)
    script, checks = Script(), []
    for case, dtype, choice in points:
        checks.append(_layer(script, case, dtype, choice))
    results, launches = emulated.run(emulated.driver(sanitizer), script)
    for (case, *_), (inputs, dy, got) in zip(points, checks, strict=True):
        found = got(results)
        if case.bias and not case.lora_rank:
            found["db"] = None
        assert_as_exact_as_formula(found, inputs, dy)
    return sum(launch.seconds for launch in launches)


def test_no_stray_access_and_nothing_undefined():
    """Buffers have their exact size on the heap, and so has each block's shared memory."""
    points = [
        (dataclasses.replace(case, form=form), DTYPES[i % 2], choice)
        for i, case in enumerate(WATCHED)
        for j, form in enumerate(FORMS)
        for k, (name, choice) in enumerate(CHOICES.items())
        if (i + j + k) % 2 and (case.M <= 16 or not name.startswith("decode"))
    ]
    print(f"{len(points)} layers, {_watch('address', points):.1f} s in ASan and UBSan")


def test_no_race():
    points = [
        (dataclasses.replace(case, form=FORMS[(i + k) % 3]), DTYPES[k % 2], CHOICES[name])
        for i, case in enumerate(WATCHED)
        for k, name in enumerate(THREADS)
        if case.M <= 16 or not name.startswith("decode")
    ]
    print(f"{len(points)} layers, {_watch('thread', points):.1f} s in TSan")
