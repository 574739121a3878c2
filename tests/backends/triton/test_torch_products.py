"""The Triton backend's use of torch's own products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.numerics import Case, assert_as_exact_as_formula, by_op, make_dy, make_inputs

from hylora_kernels import reference, svd_lora_linear, use_backend
from hylora_kernels.backends import triton as backend
from hylora_kernels.backends.shared import packed_gpu
from hylora_kernels.backends.triton.config import TORCH_PRODUCTS, Config
from hylora_kernels.weights import Weights

pytestmark = pytest.mark.skipif(
    not (backend.INSTALLED and backend._interpreted()), reason="runs in Triton's interpreter"
)
CASE = Case(M=70, sizes=(37, 53, 7), lora_rank=8)  # rows enough to be worth laying out


@pytest.fixture(autouse=True)
def _by_torch_products():
    with use_backend("triton"), backend.forcing(TORCH_PRODUCTS):
        yield


def trained(inputs) -> None:
    """Forward and backward, judged."""
    dy = make_dy(inputs)
    assert_as_exact_as_formula(by_op(svd_lora_linear, inputs, dy), inputs, dy)


@pytest.mark.parametrize("written", ["SVh", "U", "A", "B"])
@pytest.mark.parametrize("form", ["pair", "pivoted", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_write_that_no_version_tells_is_seen(dtype, form, written):
    inputs = make_inputs(replace(CASE, form=form), dtype)
    trained(inputs)
    getattr(inputs, written).data.mul_(-1)
    trained(inputs)


def test_pivots_at_rank_n_must_be_all_outputs():
    x, SVh, U, *_ = make_inputs(Case(form="dense", lora_rank=0), torch.float32)
    pivots = torch.zeros(len(SVh), dtype=torch.int32)
    with pytest.raises(ValueError, match="strictly ascending"):
        svd_lora_linear(x, SVh, U, pivots=pivots)


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("M", [3, 70])
def test_a_packed_layer_is_served_by_one_launch_or_by_products(M, form):
    inputs = make_inputs(replace(CASE, M=M, form=form), torch.float32)
    packed = packed_gpu.pack(inputs.weights, "triton")
    expected = reference.forward(inputs.x.double(), Weights(*map(_widened, inputs.weights)))[0]
    for choice in (TORCH_PRODUCTS, Config(16, 16, 32, 16, 32, swap=True)):
        with backend.forcing(choice):
            y = backend.forward_packed(inputs.x, packed, inputs.bias)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def _widened(value):
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_floating else value
