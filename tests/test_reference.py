"""reference.py against loops, einsum and autograd in float64, and the yardsticks of numerics.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import numerics
from helpers.numerics import AXES, CASES, Case, make_dy, make_inputs
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.weights import Saved

SMALL = [
    Case(M=5, form=form, lora_rank=ra, bias=bias, alpha=-1.5)
    for form in AXES["form"]
    for ra, bias in ((0, False), (3, True))
]


def spelled_out_weight(inputs) -> Tensor:
    """W [N, K] entry by entry, with nothing of reference.py in it."""
    _, SVh, U, A, B, _, alpha, pivots = inputs
    rows, others = [], iter(U)
    places = [] if pivots is None else pivots.tolist()
    for n in range(len(U) + len(places)):
        row = SVh[places.index(n)] if n in places else torch.einsum("r,rk->k", next(others), SVh)
        rows.append(row if A is None else row + alpha * torch.einsum("a,ak->k", B[n], A))
    return torch.stack(rows)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_is_the_dense_matrix(case):
    inputs = make_inputs(case)
    y, h_a = reference.forward(inputs.x, inputs.weights)
    expected = torch.einsum("mk,nk->mn", inputs.x, spelled_out_weight(inputs))
    expected = expected if inputs.bias is None else expected + inputs.bias
    torch.testing.assert_close(y, expected)
    A = inputs.x.new_empty(0, inputs.x.shape[1]) if inputs.A is None else inputs.A
    torch.testing.assert_close(h_a, torch.einsum("mk,ak->ma", inputs.x, A))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_dense_weight(case):
    inputs = make_inputs(case)
    weight = reference.dense_weight(inputs.weights)
    torch.testing.assert_close(weight, spelled_out_weight(inputs))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_backward_is_autograd_through_the_dense_matrix(case):
    inputs = make_inputs(case)
    leaves = inputs.with_grad()
    y = leaves.x @ spelled_out_weight(leaves).T
    y = y if leaves.bias is None else y + leaves.bias
    dy = make_dy(inputs)
    y.backward(dy)
    saved = Saved(inputs.x, reference.forward(inputs.x, inputs.weights)[1])
    dx, dA, dB, db = reference.backward(dy, saved, inputs.weights)
    torch.testing.assert_close(dx, leaves.x.grad)
    torch.testing.assert_close(db, dy.sum(0))
    if inputs.A is None:
        assert dA is None and dB is None
    else:
        torch.testing.assert_close(dA, leaves.A.grad)
        torch.testing.assert_close(dB, leaves.B.grad)


def test_full_U_puts_the_identity_at_the_pivots():
    U = torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    expected = torch.tensor([[2.0, 3.0], [1.0, 0.0], [4.0, 5.0], [0.0, 1.0]])
    assert torch.equal(reference.full_U(U, torch.tensor([1, 3], dtype=torch.int32)), expected)
    assert reference.full_U(U, None) is U


def test_grid_holds_every_pair_of_values():
    for one, two in itertools.combinations(AXES, 2):
        seen = {(getattr(case, one), getattr(case, two)) for case in CASES}
        assert set(itertools.product(AXES[one], AXES[two])) <= seen, (one, two)


def test_inputs_have_the_layout_and_dims_asked_for():
    for case in CASES:
        x = make_inputs(case).x
        assert x.shape == (*case.lead, case.sizes[0]) and case.lead.count(0) <= 1
        assert x.shape[:-1].numel() == case.M
        if case.M > 1 and case.sizes[0] > 1:
            assert x.is_contiguous() == (case.layout == "contiguous")


def test_tolerance_notices_a_slightly_wrong_result():
    for dtype, factor in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        inputs = make_inputs(Case(), dtype)
        dy = make_dy(inputs)
        right = numerics.by_reference(inputs, dy)
        numerics.assert_as_exact_as_formula(right, inputs, dy)
        for name in right:
            wrong = right[name].clone()
            wrong.view(-1)[wrong.abs().argmax()] *= 1 + factor
            with pytest.raises(AssertionError, match=f"^{name}: error"):
                numerics.assert_as_exact_as_formula({**right, name: wrong}, inputs, dy)
        unwritten = torch.full_like(right["dA"], torch.nan)
        with pytest.raises(AssertionError, match="dA: error inf"):
            numerics.assert_as_exact_as_formula({**right, "dA": unwritten}, inputs, dy)
