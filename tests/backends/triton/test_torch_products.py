"""The Triton backend's use of torch's own products: factors kept side by side in training, and the
pivoted form's one pass."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers.numerics import Case, assert_as_exact_as_formula, by_op, make_dy, make_inputs

from hylora_kernels import svd_lora_linear, use_backend
from hylora_kernels.backends import triton as backend
from hylora_kernels.backends.triton import torch_products
from hylora_kernels.backends.triton.config import TORCH_PRODUCTS

pytestmark = pytest.mark.skipif(
    not (backend.INSTALLED and backend._interpreted()), reason="runs in Triton's interpreter"
)
CASE = Case(M=70, sizes=(37, 53, 7), lora_rank=8)  # rows enough to be worth laying out


@pytest.fixture(autouse=True)
def _by_torch_products():
    with use_backend("triton"), backend.forcing(TORCH_PRODUCTS):
        yield


def kept_for(inputs):
    return torch_products._kept.get_unchecked(inputs.SVh)


def trained(inputs) -> None:
    """Forward and backward, judged."""
    dy = make_dy(inputs)
    assert_as_exact_as_formula(by_op(svd_lora_linear, inputs, dy), inputs, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_kept_side_by_side_from_the_first_backward(dtype):
    inputs = make_inputs(CASE, dtype)
    assert kept_for(inputs) is None
    svd_lora_linear(*inputs)
    assert kept_for(inputs) is None, "inference keeps nothing"
    trained(inputs)
    kept = kept_for(inputs)
    assert kept.P.shape == (15, 37) and kept.Q.shape == (53, 15)
    trained(inputs)
    assert kept_for(inputs) is kept


def test_the_adapter_is_written_anew_for_every_call():
    inputs = make_inputs(CASE, torch.float32)
    trained(inputs)
    trained(inputs._replace(A=inputs.A + 1, B=-2 * inputs.B, alpha=3.0))
    inputs.A.mul_(2)
    trained(inputs)


@pytest.mark.parametrize("changed", ["SVh", "U"])
def test_factors_that_were_written_to_are_laid_out_again(changed):
    inputs = make_inputs(CASE, torch.float32)
    trained(inputs)
    kept = kept_for(inputs)
    getattr(inputs, changed).add_(0.5)
    trained(inputs)
    assert kept_for(inputs) is not kept
    trained(inputs._replace(U=inputs.U + 0.25))


def test_another_stream_lays_out_its_own(monkeypatch):
    inputs = make_inputs(CASE, torch.float32)
    trained(inputs)
    kept = kept_for(inputs)
    kept.P.fill_(float("nan"))
    kept.refreshed = None
    monkeypatch.setattr(torch_products, "_stream", lambda tensor: 7)
    svd_lora_linear(*inputs)
    trained(inputs)
    assert kept_for(inputs) is not kept


def test_what_is_kept_goes_with_forget_and_with_the_factors():
    inputs = make_inputs(CASE, torch.float32)
    trained(inputs)
    backend.forget(inputs.SVh)
    assert kept_for(inputs) is None
    trained(inputs)
    gc.collect()  # what other tests have left
    before = len(torch_products._kept)
    del inputs
    assert len(torch_products._kept) == before - 1


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("form", ["pivoted", "dense"])
def test_other_forms_keep_nothing(form, lora_rank):
    inputs = make_inputs(Case(M=17, form=form, lora_rank=lora_rank), torch.float32)
    trained(inputs)
    trained(inputs)
    assert kept_for(inputs) is None


def test_pivots_at_rank_n_must_be_all_outputs():
    x, SVh, U, *_ = make_inputs(Case(form="dense", lora_rank=0), torch.float32)
    pivots = torch.zeros(len(SVh), dtype=torch.int32)
    with pytest.raises(ValueError, match="strictly ascending"):
        svd_lora_linear(x, SVh, U, pivots=pivots)
