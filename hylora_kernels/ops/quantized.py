"""quantized_linear: svd_lora_linear where SVh, U or both are codes; one op for all backends.

A forward and a backward each make the matrices from their codes, hand them to a backend and drop
them. What is saved between the two is the codes, which the layer holds anyway. With dequantize and
svd_lora_linear as two ops, every layer's matrices would stay in memory until the backward.

The ops' arguments are svd_lora_linear's, with a quantised matrix's scales (the bits of float16 as
int16, which autocast leaves alone) and zero points behind its codes; both are None for a Tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hylora_kernels import backends, flops, reference
from hylora_kernels.ops import export, linear
from hylora_kernels.ops.checks import check
from hylora_kernels.ops.define import define
from hylora_kernels.weights import QuantizedMatrix, Weights

_FROZEN = (
    "Tensor SVh, Tensor? SVh_scales, Tensor? SVh_zeros, Tensor U, Tensor? U_scales, Tensor? U_zeros"
)
_PARTS = 6  # tensors of _FROZEN
_FORWARD = (
    f"(Tensor x, {_FROZEN}, Tensor? A, Tensor? B, Tensor? bias, float alpha, Tensor? pivots,"
    " SymInt K, str backend) -> (Tensor y, Tensor h_a)"
)
_BACKWARD = (
    f"(Tensor dy, Tensor? x, Tensor? h_a, {_FROZEN}, Tensor? A, Tensor? B, float alpha,"
    " Tensor? pivots, bool[4] needs, SymInt K, str backend)"
    " -> (Tensor dx, Tensor dA, Tensor dB, Tensor db)"
)


def quantized_linear(
    x: Tensor,
    SVh: Tensor | QuantizedMatrix,
    U: Tensor | QuantizedMatrix,
    A: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    pivots: Tensor | None = None,
) -> Tensor:
    """x [..., K] -> y [..., N], as svd_lora_linear, of matrices that reference.dequantize makes in
    x's dtype, in autocast's under torch.autocast.

    Gradients, checks and errors are svd_lora_linear's. Raises ValueError too for a QuantizedMatrix
    whose tensors don't fit one another.
    """
    stands_in = _stand_in("SVh", SVh, x), _stand_in("U", U, x)
    weights = Weights(*stands_in, A, B, bias, alpha, pivots)
    check(x, weights)
    with torch.no_grad():  # matrices made for a call: no backend has or keeps panels of them
        backend = backends.choose(x, weights)
    frozen = (*_parts(SVh), *_parts(U))
    K = weights.in_features
    return _forward_op(x, *frozen, A, B, bias, float(alpha), pivots, K, backend)[0]


def _stand_in(name: str, matrix: Tensor | QuantizedMatrix, x: Tensor) -> Tensor:
    """A tensor with the properties of the matrix that stands for the codes, for who only asks."""
    if not isinstance(matrix, QuantizedMatrix):
        return matrix
    n, groups = matrix.scales.shape
    wanted = {
        "codes": (n, -(-matrix.k // 64), 8 * matrix.bits),
        "zeros": None if matrix.bits == 8 else (-(-n * groups // 64), 8 * matrix.bits),
    }
    for part, shape in wanted.items():
        tensor = getattr(matrix, part)
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise ValueError(f"{part} of {name} must have shape {shape}, got {found}")
    return torch.empty(matrix.shape, dtype=x.dtype, device=matrix.device)


def _parts(matrix: Tensor | QuantizedMatrix) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(matrix, QuantizedMatrix):
        return matrix.codes, matrix.scales.view(torch.int16), matrix.zeros
    return matrix, None, None


def _matrices(parts: tuple[Any, ...], K: int, like: Tensor, make: Callable[..., Tensor]) -> list:
    """SVh and U by make(codes, scales, zeros, k, like), where they aren't tensors already."""
    matrices, k = [], K
    for values, scales, zeros in (parts[:3], parts[3:]):
        # An alias of a Tensor, since backends keep what they derive by a tensor's identity.
        made = values.detach() if scales is None else make(values, scales, zeros, k, like)
        matrices.append(made)
        k = len(made)
    return matrices


def _dequantized(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, like: Tensor
) -> Tensor:
    bits = codes.shape[-1] // 8
    matrix = QuantizedMatrix(codes, scales.view(torch.float16), zeros, bits, k)
    return reference.dequantize(matrix, like.dtype)


def _shape_of(
    codes: Tensor, _scales: Tensor, _zeros: Tensor | None, k: int, like: Tensor
) -> Tensor:
    return like.new_empty(len(codes), k)


def _forward(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    parts, (*others, K, backend) = inputs[:_PARTS], inputs[_PARTS:]
    matrices = _matrices(parts, K, x, _dequantized)
    return linear.kernel_forward(backends.BACKENDS[backend], x, *matrices, *others)


def _fake_forward(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    parts, (*others, K, _) = inputs[:_PARTS], inputs[_PARTS:]
    return linear.fake_forward(x, *_matrices(parts, K, x, _shape_of), *others)


def _backward(dy: Tensor, x: Tensor | None, h_a: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    parts, (*others, K, backend) = inputs[:_PARTS], inputs[_PARTS:]
    matrices = _matrices(parts, K, dy, _dequantized)
    return linear.kernel_backward(backends.BACKENDS[backend], dy, x, h_a, *matrices, *others)


def _fake_backward(dy: Tensor, x: Tensor | None, h_a: Tensor | None, *inputs: Any) -> tuple:
    parts, (*others, K, _) = inputs[:_PARTS], inputs[_PARTS:]
    return linear.fake_backward(dy, x, h_a, *_matrices(parts, K, dy, _shape_of), *others)


def _formula_forward(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    parts, (*others, K, _) = inputs[:_PARTS], inputs[_PARTS:]
    return export.forward(x, *_matrices(parts, K, x, _dequantized), *others)


def _formula_backward(dy: Tensor, x: Tensor | None, h_a: Tensor | None, *inputs: Any) -> tuple:
    parts, (*others, K, _) = inputs[:_PARTS], inputs[_PARTS:]
    return export.backward(dy, x, h_a, *_matrices(parts, K, dy, _dequantized), *others)


_forward_op = define(
    "quantized",
    (_FORWARD, _BACKWARD),
    (_forward, _backward),
    (_fake_forward, _fake_backward),
    (_formula_forward, _formula_backward),
    _PARTS,
)
flops.register_quantized()
