"""One rule for alpha in every backend, dtype and number of rows."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.numerics import (
    Case,
    Inputs,
    by_op,
    by_reference,
    every_backend,
    every_form,
    make_dy,
    make_inputs,
    skip_if_refused,
)
from torch import nn

from hylora_kernels import SVDLoRALinear, optimize_for_inference, svd_lora_linear, use_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@every_backend
@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, value", [("B", torch.nan), ("B", torch.inf), ("A", torch.nan)])
def test_zero_times_what_is_not_finite_is_nan(name, value, dtype, form, backend):
    """As in the formula: BLAS alone would leave the product out."""
    for M, alpha in ((1, 0.0), (3, -0.0), (40, 1e-46), (300, 0)):
        inputs = make_inputs(Case(M=M, form=form, alpha=alpha), dtype)
        skip_if_refused(backend, inputs)
        getattr(inputs, name)[2, 3] = value
        dy = make_dy(inputs)
        with use_backend(backend):
            got = by_op(svd_lora_linear, inputs, dy)
        expected = by_reference(inputs._replace(alpha=0.0), dy)
        for key, exact in expected.items():
            assert torch.equal(got[key].isfinite(), exact.isfinite()), (key, M)


@every_backend
@every_form
@pytest.mark.parametrize("alpha", [3e38, 1e39, 1e300])
def test_what_float32_does_not_hold_is_refused(alpha, form, backend):
    for dtype in DTYPES:
        inputs = make_inputs(Case(M=2, form=form, alpha=alpha), dtype)
        skip_if_refused(backend, inputs)
        inputs.B.mul_(1e-38 if dtype != torch.float16 else 0)
        with use_backend(backend):
            if alpha < 3.4e38:
                assert svd_lora_linear(*inputs).shape == (2, inputs.weights.out_features)
                continue
            with pytest.raises(ValueError, match=r"^alpha must be finite in float32, got 1e"):
                svd_lora_linear(*inputs)


@pytest.mark.filterwarnings("error")
def test_any_real_number_is_taken():
    inputs = make_inputs(Case(M=2, alpha=0.5))
    y = svd_lora_linear(*inputs)
    for half in (np.float16(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert torch.equal(svd_lora_linear(*inputs._replace(alpha=half)), y)
        assert SVDLoRALinear(4, 4, 2, 2, alpha=half).alpha == 0.5
    two = svd_lora_linear(*inputs._replace(alpha=2))
    for number in (np.int8(2), np.int64(2), np.uint8(2)):
        assert torch.equal(svd_lora_linear(*inputs._replace(alpha=number)), two)
    for wrong in (np.bool_(True), np.array(0.5), torch.tensor(0.5), True, None, "1", 1j):
        with pytest.raises(TypeError, match=r"^alpha must be a real number"):
            svd_lora_linear(*inputs._replace(alpha=wrong))
    for wrong in (np.float64("nan"), np.float32("inf"), 10**400, Fraction(10**400)):
        with pytest.raises(ValueError, match=r"^alpha must be finite in float32"):
            svd_lora_linear(*inputs._replace(alpha=wrong))


@every_backend
@every_form
@pytest.mark.parametrize("M", [1, 3, 40, 300])
def test_a_large_alpha_does_not_overflow_float16(M, form, backend):
    """alpha x A^T is 204,800 here, beyond float16, and y 164."""
    N, K, r, ra = 48, 64, 48 if form == "dense" else 16, 8
    pivots = None if form == "pair" else torch.arange(r, dtype=torch.int32)
    U = torch.zeros(N if pivots is None else N - r, r).half()
    inputs = Inputs(
        torch.full((M, K), 50.0).half(),
        torch.zeros(r, K).half(),
        U,
        torch.ones(ra, K).half(),
        torch.full((N, ra), 1e-4).half(),
        None,
        64.0,
        pivots,
    )
    skip_if_refused(backend, inputs)
    with use_backend(backend):
        y = svd_lora_linear(*inputs)
    layer = SVDLoRALinear.from_factors(*inputs[1:])
    with torch.no_grad():
        packed = optimize_for_inference(nn.Sequential(layer).eval())(inputs.x)
    for found in (y, packed):
        torch.testing.assert_close(found, torch.full((M, N), 163.875).half(), rtol=2e-3, atol=0)
