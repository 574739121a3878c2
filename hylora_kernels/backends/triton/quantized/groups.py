"""Dense quantised layers on one x, such as q, k and v, as one matrix: their rows one below another,
so that one launch multiplies all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hylora_kernels.backends.triton.quantized import launch
from hylora_kernels.backends.triton.quantized.launch import Words
from hylora_kernels.backends.triton.quantized.packed import PackedQuantizedLayer


@dataclass(frozen=True, slots=True, eq=False)
class PackedQuantizedGroup:
    """It costs no memory: its members' tensors are moved into W and go on living as views of it.

    W:     the members' matrices, one below another.
    width: of the output, the sum of the members' outputs.
    """

    backend: str
    members: tuple[PackedQuantizedLayer, ...]
    W: Words
    width: int

    @classmethod
    def of(cls, members: Sequence[PackedQuantizedLayer]) -> PackedQuantizedGroup:
        """Of members for which why_no_group gives ""."""
        parts = [member.SVh for member in members]
        W = Words(
            torch.cat([part.words for part in parts]),
            torch.cat([part.scales for part in parts]),
            None if parts[0].zeros is None else torch.cat([part.zeros for part in parts]),
            parts[0].bits,
            parts[0].k,
        )
        sizes = [len(part.words) for part in parts]
        for i, whole in enumerate(W.tensors):
            for part, place in zip(parts, whole.split(sizes), strict=True):
                part.tensors[i].data = place
        return cls(members[0].backend, tuple(members), W, sum(sizes))

    def forward(
        self, x: Tensor, biases: Sequence[Tensor | None], by_backend: object = None
    ) -> Tensor:
        """x [..., K], a bias [N] or None for each member, or no biases -> y [..., width]."""
        bias = None
        if any(b is not None for b in biases):
            parts = zip(biases, self.members, strict=True)
            bias = torch.cat([x.new_zeros(m.bias_shape) if b is None else b for b, m in parts])
        return launch.linear(x, self.W, bias)


def why_no_group(members: Sequence[object]) -> str:
    """The reason why these packed layers on one x can't be computed as one, or ""."""
    if not all(isinstance(m, PackedQuantizedLayer) and m.U is None for m in members):
        return "a quantised matrix is grouped with dense quantised matrices alone"
    if len({m.SVh.bits for m in members}) > 1:
        return "their codes differ in width"
    if any(m.aB is not None for m in members):
        return "a quantised matrix with an adapter is computed by itself"
    if sum(m.bias_shape[0] for m in members) == members[0].shape[0]:
        return "together they have as many outputs as inputs, which a block could not tell apart"
    return ""
