"""Layers whose matrices are codes, for the selftest: every form in every width, as a backend packs
them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hylora_kernels import backends
from hylora_kernels.machine.selftest.grid import FORMS, Call, Case
from hylora_kernels.reference import dequantize, quantized
from hylora_kernels.weights import GROUP, PLANES, QuantizedMatrix, Weights

FORM = "codes"  # in the report's column for a form
ROWS = (1, 8, 17, 70)
SIZES = (136, 72, 40, 5)  # K, N, r, ra: no group of 64 is full at the end of K or r.


class LayerOfCodes:
    """A packed layer with the functions that races.run asks of a backend. SVh and U have `bits`
    bits, the adapter and the bias are of dtype.

    packed: None where the backend packs no such layer; why_not is the reason, or "" where it serves
            no such tensors at all and for eager, which multiplies by dequantised matrices.
    """

    def __init__(
        self, name: str, case: Case, bits: int, dtype: torch.dtype, device: torch.device, seed: int
    ):
        self.backend, self.bits, self.case = backends.BACKENDS[name], bits, case
        self.calls = [case.call(dtype, device, seed + i) for i in range(2)]
        generator = torch.Generator(device).manual_seed(seed)
        plain = Weights(*self.calls[0][1:-1])
        SVh = _random_codes(plain.SVh.shape, bits, generator)
        U = _random_codes(plain.U.shape, bits, generator) if plain.U.numel() else plain.U
        self.weights = replace(plain, SVh=SVh, U=U)
        self.packed, self.why_not = None, ""
        if not self.backend.unsupported(self.calls[0].x, self.weights):
            self.packed = self.backend.pack(self.weights, dtype)
            if self.packed is None and name != "eager":
                self.why_not = "has no kernels for codes"

    def __str__(self) -> str:
        return f"{self.case} in {self.bits} bits"

    @property
    def two_calls(self) -> list[Call]:
        """Of this layer, with two x."""
        return [self.calls[0]._replace(x=call.x) for call in self.calls]

    def forward(self, x: Tensor, weights: Weights) -> tuple[Tensor, None]:
        return self.backend.forward_packed(x, self.packed, self.weights.bias), None

    def backward(self, *given: object) -> tuple[()]:
        return ()

    def parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Call, Call, Tensor]]:
        """(the call on dequantised matrices in x's dtype, in float64, y)."""
        found = [
            self.calls[0]._replace(x=x, SVh=self._matrix("SVh", dtype), U=self._matrix("U", dtype))
            for dtype in (x.dtype, torch.float64)
        ]
        yield found[0], found[1].in_float64(), y

    def _matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        matrix = getattr(self.weights, name)
        return dequantize(matrix, dtype) if isinstance(matrix, QuantizedMatrix) else matrix


def layers(
    name: str, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[LayerOfCodes]:
    """Those to test a backend by; none in Triton's interpreter, for which nothing is packed."""
    if name == "triton" and device.type == "cpu":
        return
    for bits, (i, M), form in itertools.product(PLANES, enumerate(ROWS), FORMS):
        yield LayerOfCodes(name, Case(M, SIZES, form, bias=i % 2 == 0), bits, dtype, device, seed)


def _random_codes(shape: torch.Size, bits: int, generator: torch.Generator) -> QuantizedMatrix:
    """A matrix [n, k] whose products with rows of order one are of order one."""
    (n, k), device = shape, generator.device
    groups = -(-k // GROUP)

    def some(*sizes: int) -> Tensor:
        return torch.randint(2**bits, sizes, generator=generator, device=device)

    # A difference of two uniform codes has a standard deviation of 2^bits / sqrt(6).
    scales = torch.rand(n, groups, generator=generator, device=device) + 0.5
    scales *= 6**0.5 / 2**bits / k**0.5
    return quantized(some(n, k), scales, None if bits == 8 else some(n, groups), bits)
