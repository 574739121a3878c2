"""Weights: its order is the op's, its sizes are the layer's in every form."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from helpers.numerics import Case, make_inputs

from hylora_kernels import svd_lora_linear
from hylora_kernels.weights import Weights


def test_the_order_is_that_of_the_op():
    fields = [field.name for field in dataclasses.fields(Weights)]
    assert fields == list(inspect.signature(svd_lora_linear).parameters)[1:]
    values = [object() for _ in fields]
    assert list(Weights(*values)) == values


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("form", ["pair", "pivoted", "dense"])
def test_sizes(form, lora_rank):
    K, N, rank = 37, 53, 7
    inputs = make_inputs(Case(sizes=(K, N, rank), lora_rank=lora_rank, form=form), torch.float32)
    weights = inputs.weights
    assert (weights.in_features, weights.out_features) == (K, N)
    assert (weights.rank, weights.lora_rank) == (N if form == "dense" else rank, lora_rank)
    assert weights.is_dense == (form == "dense") and not weights.is_empty
    count = {"pair": rank * (K + N), "pivoted": rank * (K + N - rank), "dense": N * K}[form]
    assert weights.factor_bytes == 4 * (count + lora_rank * (K + N))


@pytest.mark.parametrize(
    ("SVh", "U", "pivoted"),
    [
        ((0, 5), (4, 0), False),
        ((3, 0), (4, 3), False),
        ((3, 5), (0, 3), False),
        ((0, 5), (4, 0), True),
    ],
)
def test_empty(SVh, U, pivoted):
    pivots = torch.arange(SVh[0], dtype=torch.int32) if pivoted else None
    assert Weights(torch.empty(SVh), torch.empty(U), pivots=pivots).is_empty
