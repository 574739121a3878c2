"""QuantizedLinear and QuantizedEmbedding: what they compute, and their codes bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear, dense_weights
from hylora_kernels.reference import dequantize, forward, quantized
from hylora_kernels.weights import QuantizedMatrix, Weights

N, K, R, RA = 48, 100, 16, 4


def random_matrix(n: int, k: int, bits: int, seed: int = 0) -> QuantizedMatrix:
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // 64)
    codes = torch.randint(0, 2**bits, (n, k), generator=g)
    zeros = None if bits == 8 else torch.randint(0, 2**bits, (n, groups), generator=g)
    scales = (1 + torch.rand(n, groups, generator=g)) / 2**bits
    return quantized(codes, scales, zeros, bits)


def random_weights(form: str) -> Weights:
    """`form`: dense, pair, pair with SVh or U alone quantised, pivoted."""
    torch.manual_seed(0)
    if form == "dense":
        return dense_weights(random_matrix(N, K, 4), torch.randn(N))
    others = N - R if form == "pivoted" else N
    SVh = torch.randn(R, K) if form == "U" else random_matrix(R, K, 8 if form == "pivoted" else 5)
    U = torch.randn(others, R) if form == "SVh" else random_matrix(others, R, 6)
    pivots = torch.arange(0, N, 3, dtype=torch.int32) if form == "pivoted" else None
    return Weights(SVh, U, torch.randn(RA, K), torch.randn(N, RA), None, 0.5, pivots)


FORMS = ("dense", "pair", "SVh", "U", "pivoted")


def plain(weights: Weights, dtype: torch.dtype = torch.float64) -> Weights:
    def of(value):
        if isinstance(value, QuantizedMatrix):
            return dequantize(value, dtype)
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return Weights(*map(of, weights))


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_with_what_the_codes_stand_for(form):
    weights = random_weights(form)
    layer = QuantizedLinear.from_weights(weights)
    x = torch.randn(2, 3, K)
    exact, _ = forward(x.double().reshape(6, K), plain(weights))
    torch.testing.assert_close(layer(x).double(), exact.view(2, 3, N), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_no_cast_changes_a_code_a_scale_or_a_zero_point(form):
    layer = QuantizedLinear.from_weights(random_weights(form))
    for cast in (layer.half(), copy.deepcopy(layer).to(torch.float64), layer.bfloat16().float()):
        for name in layer.bits:
            now, then = getattr(cast, name).matrix, getattr(random_weights(form), name)
            assert torch.equal(now.codes, then.codes) and torch.equal(now.scales, then.scales)
            assert then.zeros is None or torch.equal(now.zeros, then.zeros)
        dtype = next(m.dtype for m in (cast.SVh, cast.U))
        assert cast(torch.randn(1, K, dtype=dtype)).dtype == dtype == cast.weight.dtype


def test_a_tied_pair_shares_one_matrix():
    matrix = random_matrix(N, K, 3)
    embedding, head = QuantizedEmbedding.tied_pair(matrix, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 5, 0], [7, 47, 5]])
    assert torch.equal(embedding(ids), dequantize(matrix, torch.bfloat16)[ids])
    assert head.SVh is embedding.matrix
    assert torch.equal(head.weight + 0, embedding.weight + 0)
