"""QuantizedLinear and QuantizedEmbedding: what they compute, and their codes bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.quantizing import FORMS, K, N, dequantized, random_matrix, random_weights

from hylora_kernels import backends, use_backend
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear
from hylora_kernels.reference import dequantize, forward


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_with_what_the_codes_stand_for(form):
    weights = random_weights(form)
    layer = QuantizedLinear.from_weights(weights)
    x = torch.randn(2, 3, K)
    exact, _ = forward(x.double().reshape(6, K), dequantized(weights))
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


def test_a_backend_without_kernels_for_codes_packs_nothing():
    weights = random_weights("pair")
    with use_backend("eager"):
        assert backends.pack(weights, torch.bfloat16) is None
        assert backends.why_not_packed(weights, torch.bfloat16) == {
            "eager": "has no kernels for these codes"
        }
