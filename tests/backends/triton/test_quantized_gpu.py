"""Quantised matrices where a GPU is: compiled, captured, by Triton's kernel and by the C++ one that
serves up to 16 rows. On a CPU one small case, interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers.quantizing import (
    FORMS,
    K,
    assert_as_exact_as_eager,
    dequantized,
    moved,
    random_matrix,
    random_weights,
)

from hylora_kernels import reference
from hylora_kernels.backends import triton as backend
from hylora_kernels.backends.shared import quantized_gpu
from hylora_kernels.backends.triton.quantized import launch, packed
from hylora_kernels.backends.triton.quantized.launch import Words
from hylora_kernels.reference import dequantize
from hylora_kernels.weights import PLANES, QuantizedMatrix

pytestmark = pytest.mark.skipif(not backend.is_available(), reason=backend.why_not())


def on(device: str, matrix: QuantizedMatrix) -> Words:
    parts = (matrix.codes, matrix.scales, matrix.zeros)
    moved = (None if t is None else t.to(device) for t in parts)
    return Words.of(QuantizedMatrix(*moved, matrix.bits, matrix.k))


@pytest.fixture(params=["Triton", "C++"])
def few_rows(request, device, monkeypatch):
    """Whose kernel serves up to 16 rows."""
    if request.param == "Triton":
        monkeypatch.setattr(quantized_gpu, "LAUNCH", None)
    elif device == "cpu":
        pytest.skip("the C++ kernel needs a GPU; test_quantized.py of the cuda backend emulates it")
    return request.param


def test_rows_and_products(device, few_rows):
    on_gpu = device == "cuda"
    few = [(1, 130, 72), (7, 96, 576), (16, 3000, 2048), (11, 65, 2000)]
    many = [(17, 65, 2048), (64, 96, 576), (70, 96, 576)]
    sizes = [(1, 5, 72)] if not on_gpu else few + many if few_rows == "Triton" else few
    for bits in PLANES if on_gpu else (4,):
        for M, n, k in sizes:
            matrix, ids = random_matrix(n, k, bits), torch.tensor([0, n - 1], device=device)
            W = on(device, matrix)
            for dtype in (torch.float16, torch.bfloat16):
                x = torch.randn(M, k, device=device).to(dtype)
                y = launch.linear(x, W)
                assert_as_exact_as_eager(y.cpu(), x.cpu(), matrix)
                expected = dequantize(matrix, dtype)[ids.cpu()]
                assert torch.equal(launch.rows(ids, W, dtype).cpu(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_packed_layers(device, few_rows, form):
    weights = random_weights(form, bias=True)
    exact = dequantized(weights)
    for dtype in (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float16,):
        codes = dequantized(moved(weights, device), dtype, factors=False)
        layer, own = packed.pack(codes, dtype), dequantized(weights, dtype)
        for M in (1, 9, 16) if device == "cuda" else (1,):
            x = torch.randn(M, K).to(dtype)
            truth = reference.forward(x.double(), exact)[0]
            error = (reference.forward(x, own)[0].double() - truth).norm()
            y = layer.forward(x.to(device), codes.bias).cpu().double()
            assert (y - truth).norm() <= 2 * error + torch.finfo(dtype).eps * truth.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("M", [1, 17, 70])
def test_a_captured_call_computes_the_same(M):
    matrix = random_matrix(512, 2048, 4)
    W, x = on("cuda", matrix), torch.randn(M, 2048, device="cuda").half()
    expected = launch.linear(x, W)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch.linear(x, W)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
