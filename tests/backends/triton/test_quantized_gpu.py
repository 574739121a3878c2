"""Quantised matrices where a GPU is: compiled, captured. On a CPU one small case, interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers.quantizing import assert_as_exact_as_eager, random_matrix

from hylora_kernels.backends import triton as backend
from hylora_kernels.backends.triton.quantized import launch
from hylora_kernels.backends.triton.quantized.launch import Words
from hylora_kernels.reference import dequantize
from hylora_kernels.weights import PLANES, QuantizedMatrix

pytestmark = pytest.mark.skipif(not backend.is_available(), reason=backend.why_not())


def on(device: str, matrix: QuantizedMatrix) -> Words:
    parts = (matrix.codes, matrix.scales, matrix.zeros)
    moved = (None if t is None else t.to(device) for t in parts)
    return Words.of(QuantizedMatrix(*moved, matrix.bits, matrix.k))


def test_rows_and_products(device):
    on_gpu = device == "cuda"
    sizes = [(1, 130, 72), (17, 65, 2048), (64, 96, 576), (70, 96, 576)] if on_gpu else [(1, 5, 72)]
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("M", [1, 70])
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
