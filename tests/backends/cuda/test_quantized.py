"""Quantised matrices in CUDA C++ on the CPU emulator: numbers, sanitizers, refusals, and which
calls go there."""

from __future__ import annotations

import platform
from unittest import mock

import pytest
import torch
from cuda_emulator import emulated, on_cpu
from cuda_emulator.emulated import Script
from helpers.quantizing import assert_as_exact_as_eager, random_matrix

from hylora_kernels.backends.shared import packed_gpu, quantized_gpu
from hylora_kernels.backends.triton.quantized import launch
from hylora_kernels.backends.triton.quantized.launch import Words
from hylora_kernels.weights import PLANES

if emulated.COMPILER is None or platform.machine() != "x86_64":
    pytest.skip(
        "the emulator needs g++, and its fibers change stacks in x86-64's instructions",
        allow_module_level=True,
    )

HALVES = (torch.bfloat16, torch.float16)
# M, N, K, rank of the adapter, processors: with one the matrix is wide from 33 columns on.
SHAPES = {
    "one row": (1, 33, 576, 0, 4),
    "tail of a group": (3, 40, 72, 3, 4),
    "an odd number of groups": (8, 17, 1088, 0, 4),
    "rows off 16 bytes": (2, 20, 200, 35, 4),
    "16 rows": (16, 50, 1152, 16, 4),
    "wide, one row": (1, 70, 2048, 0, 1),
    "wide, 9 rows": (9, 130, 200, 20, 1),
}


def inputs(shape: str, bits: int, dtype: torch.dtype):
    """(x, matrix, bias, h_a, B, processors)."""
    M, N, K, ra, processors = SHAPES[shape]
    matrix, x = random_matrix(N, K, bits), torch.randn(M, K).to(dtype)
    bias = torch.randn(N).to(dtype) if M > 1 else None
    h_a, B = (torch.randn(M, ra).to(dtype), torch.randn(N, ra).to(dtype)) if ra else (None, None)
    return x, matrix, bias, h_a, B, processors


@pytest.mark.parametrize("sanitizer", ["plain", "address"])
@pytest.mark.parametrize("bits", PLANES)
def test_as_exact_as_eager(bits, sanitizer):
    if sanitizer != "plain" and (reason := emulated.why_no_sanitizer(sanitizer)):
        pytest.skip(reason)
    script, cases = Script(), []
    for shape in SHAPES:
        for dtype in HALVES:
            x, matrix, bias, h_a, B, processors = inputs(shape, bits, dtype)
            given = (x, Words.of(matrix), bias, h_a, B)
            shifts = {"shift": 2, "shift_groups": 2} if shape == "rows off 16 bytes" else {}
            place = emulated.quantized(script, *given, processors=processors, **shifts)
            cases.append((place, (x, matrix, bias, h_a, B)))
            script.lines.append("drop")
    results, _ = emulated.run(emulated.driver(sanitizer), script)
    for place, given in cases:
        assert_as_exact_as_eager(results[place], *given)


def test_no_thread_reads_what_another_has_not_written():
    if reason := emulated.why_no_sanitizer("thread"):
        pytest.skip(reason)
    script = Script()
    x, matrix, bias, h_a, B, _ = inputs("16 rows", 4, torch.float16)
    places = [
        emulated.quantized(script, x, Words.of(matrix), bias, h_a, B, seed=seed)
        for seed in range(4)
    ]
    results, launches = emulated.run(emulated.driver("thread"), script)
    assert len({launch.order for launch in launches}) > 1
    assert all(results[place].equal(results[places[0]]) for place in places)


# ------------------------------------------------------------------------------------------ the op


@pytest.fixture
def op():
    """The op, its launches emulated, and the backends' choice of it for a CPU."""
    if quantized_gpu.LAUNCH is None:
        pytest.skip("the op needs hylora_kernels/_csrc.so")
    torch.ops.load_library(on_cpu.build())
    with on_cpu.emulated():
        yield quantized_gpu.LAUNCH


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_of_few_rows_goes_there(op, shape, monkeypatch):
    calls = []
    monkeypatch.setattr(quantized_gpu, "LAUNCH", lambda *given: calls.append(1) or op(*given))
    x, matrix, bias, h_a, B, _ = inputs(shape, 4, torch.bfloat16)
    y = launch.linear(x[None], Words.of(matrix), bias, None if h_a is None else h_a[None], B)
    assert y.shape == (1, len(x), matrix.shape[0]) and calls == [1]
    assert_as_exact_as_eager(y[0], x, matrix, bias, h_a, B)


def test_other_calls_go_elsewhere(op):
    for x in (torch.randn(17, 64).half(), torch.randn(1, 64), torch.randn(0, 64).half()):
        assert quantized_gpu.target_for(x) is None
    x, bias = torch.randn(1, 64).half(), torch.randn(8, 2)
    assert quantized_gpu.target_for(x, None, bias[0].half()) == on_cpu.TARGET
    assert quantized_gpu.target_for(x, None, bias[0]) is None
    assert quantized_gpu.target_for(x, bias.half().T) is None
    with mock.patch.object(packed_gpu, "kernels_target", lambda device: None):
        assert quantized_gpu.target_for(torch.randn(1, 64).half()) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 7}, "bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        ({"x": torch.randn(17, 72).half()}, "x must have 1 to 16 rows"),
        ({"x": torch.randn(1, 72)}, "x must be bfloat16 or float16"),
        ({"x": torch.randn(1, 200).half()}, "codes must have 4 groups in a row, got 2"),
        ({"zeros": None}, "zeros must be given below 8 bits alone"),
        ({"scales": torch.ones(5, 2)}, "scales has the wrong dtype"),
        ({"scales": torch.ones(4, 2).half()}, "scales must have 10 numbers"),
        ({"h_a": torch.ones(1, 3).half()}, "h_a and B must come together"),
        ({"bias": torch.ones(4).half()}, "bias must have 5 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(op, change, words):
    W = Words.of(random_matrix(5, 72, 4))
    given = {"x": torch.randn(1, 72).half(), "words": W.words, "scales": W.scales}
    given |= {"zeros": W.zeros, "bits": 4, "h_a": None, "B": None, "bias": None}
    assert op(*given.values(), *on_cpu.TARGET).shape == (1, 5)
    with pytest.raises(RuntimeError, match=words):
        op(*(given | change).values(), *on_cpu.TARGET)
