"""QuantizedLinear and QuantizedEmbedding: what they compute, and their codes bit for bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers.quantizing import FORMS, RA, K, N, R, dequantized, random_matrix, random_weights

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


@pytest.mark.parametrize("form", ["pair", "SVh", "U", "pivoted"])
def test_merge_rounds_again_and_says_what_that_cost(form):
    layer = QuantizedLinear.from_weights(random_weights(form))
    bits, wanted = layer.bits, layer.weight + 0
    assert layer.merge(requantize=False).lora_rank == RA and layer.merge_error is None
    merged = layer.merge()
    assert merged is layer and layer.lora_rank == 0 and layer.bits == bits and layer.rank == R + RA
    error = (layer.weight - wanted).norm() / wanted.norm()
    assert 0 < layer.merge_error < 0.1
    assert layer.merge_error == pytest.approx(error.item(), rel=0.01)
    torch.testing.assert_close(layer.to_linear().weight.detach(), layer.weight + 0)


def test_a_merge_keeps_the_codes_of_weights_that_stay():
    weights = random_weights("dense")
    A, B = torch.zeros(1, K), torch.zeros(N, 1)
    A[0, 3], B[5, 0] = 1.0, 0.4
    layer = QuantizedLinear.from_weights(replace(weights, A=A, B=B))
    before, wanted = layer.SVh.matrix, layer.weight + 0
    layer.merge()
    now = layer.SVh.matrix
    others = [row for row in range(N) if row != 5]
    for part in ("codes", "scales"):
        assert torch.equal(getattr(now, part)[others], getattr(before, part)[others])
    assert (layer.weight - wanted).norm() < 0.4


def test_to_linear_is_what_the_codes_stand_for():
    weights = random_weights("dense", bias=True)
    linear = QuantizedLinear.from_weights(weights).to_linear()
    assert torch.equal(linear.weight, dequantize(weights.SVh))
    assert torch.equal(linear.bias, weights.bias)


def test_bad_bits_are_named():
    for bits, message in (
        ({"SVh": 7}, r"bits of SVh must be one of \(2, 3, 4, 5, 6, 8\), got 7"),
        ({}, "bits must be a mapping from SVh or U, got {}"),
        ({"A": 4}, "bits must be a mapping from SVh or U"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedLinear(8, 8, 4, bits=bits)
    with pytest.raises(ValueError, match=r"matrix must be \[4, 100\] of 4 bits, got \[5, 100\]"):
        layer = QuantizedLinear(100, 8, 4, bits={"SVh": 4})
        layer.SVh.matrix = random_matrix(5, 100, 4)


@pytest.mark.parametrize("bits", [{"SVh": 4}, {"SVh": 3, "U": 8}])
def test_a_new_layer_has_nn_linears_variance_and_is_random_again(bits):
    layer = QuantizedLinear(64, 64, 32, lora_rank=2, bits=bits)
    spread = layer.weight.std().item()
    assert spread == pytest.approx((1 / 3 / 64) ** 0.5, rel=0.3)
    before = layer.SVh.codes.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.SVh.codes, before) and not layer.B.any()
