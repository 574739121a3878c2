"""Layers on one x as one call, for the selftest: three forms side by side, as a backend groups
them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hylora_kernels import backends
from hylora_kernels.machine.selftest.grid import Call, Case
from hylora_kernels.weights import Weights

ROWS = (1, 8, 17, 70)
FORM = "group"  # in the report's column for a form
K = 136
MEMBERS = (("pair", 200, 48, 16), ("pivoted", 72, 33, 5), ("dense", 64, 64, 0))


class GroupOfLayers:
    """A group with the functions that races.run asks of a backend.

    packed: None where the backend packs no such layers, or where why_not says why they are none.
    """

    def __init__(self, name: str, M: int, dtype: torch.dtype, device: torch.device, seed: int):
        self.backend, self.packed, self.why_not = backends.BACKENDS[name], None, ""
        self.calls = [
            Case(M, (K, N, rank, lora_rank), form).call(dtype, device, seed + i)
            for i, (form, N, rank, lora_rank) in enumerate(MEMBERS)
        ]
        weights = [Weights(*call[1:-1]) for call in self.calls]
        if not any(self.backend.unsupported(self.calls[0].x, one) for one in weights):
            packed = [self.backend.pack(one, for_group=True) for one in weights]
            if None not in packed:
                self.why_not = self.backend.why_no_group(packed)
                self.packed = None if self.why_not else self.backend.group(packed)

    def __str__(self) -> str:
        return f"{FORM} M={len(self.calls[0].x)}"

    @property
    def two_calls(self) -> list[Call]:
        """Of the group, with two x."""
        return [self.calls[0]._replace(x=call.x) for call in self.calls[:2]]

    def forward(self, x: Tensor, weights: Weights) -> tuple[Tensor, None]:
        y = self.backend.forward_group(x, self.packed, [call.bias for call in self.calls])
        return y[:, : sum(N for _, N, _, _ in MEMBERS)], None

    def backward(self, *given) -> tuple[()]:
        return ()

    def parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Call, Call, Tensor]]:
        """Each member's call on the group's x, as it is and in float64, and its columns of y."""
        columns = y.split([N for _, N, _, _ in MEMBERS], 1)
        for call, part in zip(self.calls, columns, strict=True):
            on_x = call._replace(x=x)
            yield on_x, on_x.in_float64(), part


def layers(
    name: str, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[GroupOfLayers]:
    """Those to test a backend by."""
    return (GroupOfLayers(name, M, dtype, device, seed) for M in ROWS)
