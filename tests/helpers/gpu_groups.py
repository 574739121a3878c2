"""Groups of packed layers as a GPU backend takes them, and their truth."""

from __future__ import annotations

import torch
from cuda_emulator.emulated import TYPES, Choice, Script
from helpers.numerics import Case, Inputs, distance, make_inputs
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.backends.shared import packed_gpu
from hylora_kernels.backends.shared.group_gpu import PackedGroup

# form, outputs, rank, rank of the adapter, has a bias
KINDS = {
    "pairs": [("pair", 50, 24, 0, False), ("pair", 33, 16, 8, False), ("pair", 70, 32, 3, False)],
    "odd": [
        ("pair", 50, 20, 0, False),
        ("pivoted", 97, 33, 5, True),
        ("dense", 33, 33, 0, True),
        ("pair", 40, 9, 8, True),
        ("dense", 31, 31, 4, False),
    ],
    "pivoted": [("pivoted", 64, 40, 0, False), ("pivoted", 48, 16, 8, True)],
    "one": [("pivoted", 37, 20, 3, True)],
}


class Layers:
    """Packed layers on one x, and the inputs that they were made of."""

    def __init__(self, kinds, dtype, K: int = 70, backend: str = "triton", grouped: bool = True):
        self.inputs: list[Inputs] = []
        for seed, (form, N, rank, lora_rank, has_bias) in enumerate(kinds):
            case = Case(sizes=(K, N, rank), lora_rank=lora_rank, bias=has_bias, form=form)
            self.inputs.append(make_inputs(case, dtype, seed=seed))
        self.packed = [packed_gpu.pack(i.weights, backend, for_group=True) for i in self.inputs]
        self.biases = [i.bias for i in self.inputs]
        if grouped:
            self.group = PackedGroup.of(self.packed)

    def assert_right(self, y: Tensor, x: Tensor, with_biases: bool = True) -> None:
        """Each member's columns are as near the truth as twice the plain formula's own."""
        assert y.shape == (len(x), self.group.width) and y.dtype == x.dtype
        begin = 0
        for inputs in self.inputs:
            given = inputs if with_biases else inputs._replace(bias=None)
            wide = given.map(torch.Tensor.double).weights
            exact, own = (
                reference.forward(x.double(), wide)[0],
                reference.forward(x, given.weights)[0],
            )
            end = begin + exact.shape[1]
            size = max(1.0, distance(exact, torch.zeros_like(exact)))
            bound = 2 * distance(own, exact) + 2 * torch.finfo(x.dtype).eps * size
            assert distance(y[:, begin:end], exact) <= bound
            begin = end


def add_group(script: Script, layers: Layers, x: Tensor, choice: Choice) -> int:
    """Put one launch of the emulated C++ kernel into the script; the place of y in its results."""
    operands, dtype, (M, K) = layers.group.operands, x.dtype, x.shape
    y = torch.full((M, operands.width), float("nan"), dtype=dtype)
    gx, gy = script.give(x), script.give(y)
    for member, bias in zip(operands.members, layers.biases, strict=True):
        P, Q, aB = operands.of(member)
        others, pivots = operands.columns_of(member)
        given = {"W1": P[: member.rank], "W2": Q if len(Q) else None, "bias": bias}
        if aB is not None:
            given |= {"W1a": P[member.rank :], "W2a": aB}
        if member.is_pivoted:
            given |= {"pivots": pivots.int(), "others": others if len(others) else None}
        strides = {"w1_stride": K, "w1a_stride": K, "x_stride": K, "y_stride": operands.width}
        strides |= {"w2_stride": member.q_stride, "w2a_stride": member.aB_stride}
        sizes = {"M": M, "K": K, "N": member.N, "rank": member.rank}
        sizes |= {"lora_rank": member.lora_rank, "others_count": member.others}
        named = {name: script.give(tensor) for name, tensor in given.items()}
        at = {"x": gx, "y": gy, "y_at": 2 * member.y}
        script.launch("member", type=TYPES[dtype], **at, **sizes, **strides, **named)
    how = {"split": choice.split, "programs": choice.programs, "seed": choice.seed}
    script.launch("group", M=M, alive=choice.alive, **how)
    return script.write(gy, dtype, M, operands.width)
