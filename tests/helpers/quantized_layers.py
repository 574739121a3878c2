"""Layers with quantised matrices, and the bound on a kernel's error.

An output may be no further from the float64 truth on the dequantised matrices than twice what
eager on these matrices, rounded to the dtype of x, is itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from helpers.numerics import Case, distance, make_inputs
from helpers.quantizing import rounded
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.weights import Weights

BITS = (2, 3, 4, 5, 6, 8)


class Quantised(NamedTuple):
    """x, a layer's weights, and the same weights dequantised exactly, in float64."""

    x: Tensor
    weights: Weights
    exact: Weights

    def rounded_to(self, dtype: torch.dtype) -> Weights:
        return Weights(*(t.to(dtype) if _is_float(t) else t for t in self.exact))

    def check(self, y: Tensor) -> None:
        """Assert the bound of this file for an output of `weights`."""
        rows = self.x.reshape(-1, self.x.shape[-1])
        truth = reference.forward(rows.double(), self.exact)[0]
        eager = reference.forward(rows, self.rounded_to(rows.dtype))[0]
        assert y.dtype == rows.dtype and y.shape[:-1] == self.x.shape[:-1]
        y = y.reshape(truth.shape)
        size = max(1.0, distance(truth, torch.zeros_like(truth)))
        slack = 2 * torch.finfo(y.dtype).eps * size  # eager's error is one throw of the dice
        error, own = distance(y, truth), distance(eager, truth)
        assert error <= 2 * own + slack, f"error {error:.3g}, eager's own {own:.3g}"


def quantised(case: Case, dtype: torch.dtype, SVh_bits: int, U_bits: int = 0) -> Quantised:
    """The layer of a case; 0 bits: the matrix is of dtype."""
    inputs = make_inputs(case, torch.float64)
    x, weights, exact = inputs.x.to(dtype), {}, {}
    for name, value in zip(inputs._fields[1:], inputs[1:], strict=True):
        bits = {"SVh": SVh_bits, "U": U_bits}.get(name, 0)
        if bits and value.shape[0]:
            weights[name] = rounded(value, bits)
            exact[name] = reference.dequantize(weights[name], torch.float64)
        else:
            weights[name] = value.to(dtype) if _is_float(value) else value
            exact[name] = weights[name].double() if _is_float(value) else value
    return Quantised(x, Weights(**weights), Weights(**exact))


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
