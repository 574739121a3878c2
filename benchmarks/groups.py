"""Packed layers on one input computed as one, over the same layers one after another: SmolLM2's
q, k, v and gate, up at keep 0.6 (pivoted) and dense, through their modules. One line for each.

    OMP_NUM_THREADS=1 python benchmarks/groups.py [bfloat16|float16|float32]
"""

from __future__ import annotations

import sys

import torch
from layers import Shape, kept_rank, random_factors
from smollm import KEEP
from timing import interleave
from torch import nn

from hylora_kernels import SVDLoRALinear, optimize_for_inference
from hylora_kernels.layers.grouped import Argument, Group, group

K, OUTPUTS = 576, {"q, k, v": (576, 192, 192), "gate, up": (1536, 1536)}
BLOCKS = 30  # as many as the model has, so that few rows find their weights where a model does


class Reads(nn.Module):
    """A block that does nothing but call its linears."""

    def __init__(self, linears: list[nn.Module]):
        super().__init__()
        self.names = [f"linear_{i}" for i in range(len(linears))]
        for name, linear in zip(self.names, linears, strict=True):
            self.add_module(name, linear)

    def forward(self, x):
        return [self._modules[name](x) for name in self.names]


def linear(N: int, form: str, dtype: torch.dtype, seed: int) -> nn.Module:
    if form == "dense":
        return nn.Linear(K, N, bias=False, dtype=dtype)
    shape = Shape(K, N, kept_rank(K, N, KEEP, form), 0)
    SVh, U, A, B, _, alpha, pivots = random_factors(shape, dtype, form, seed)
    return SVDLoRALinear.from_factors(SVh, U, A, B, None, alpha, pivots)


def block_of(outputs: tuple[int, ...], form: str, dtype: torch.dtype) -> Reads:
    linears = [linear(N, form, dtype, seed) for seed, N in enumerate(outputs)]
    return optimize_for_inference(Reads(linears).eval())


@torch.inference_mode()
def main() -> None:
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "bfloat16")
    print(f"{dtype}, {torch.get_num_threads()} threads; microseconds one by one, as one, ratio")
    for name, outputs in OUTPUTS.items():
        for form in ("pivoted", "dense"):
            with torch.inference_mode(False):
                apart = [block_of(outputs, form, dtype) for _ in range(BLOCKS)]
                together = [block_of(outputs, form, dtype) for _ in range(BLOCKS)]
                for block in together:
                    names, arguments = tuple(block.names), (Argument(0, "x"),)
                    group(block, (Group.of(block, names, arguments),))
            for M in (1, 7, 200):
                x = torch.randn(M, K, dtype=dtype)
                rivals = {
                    kind: [lambda b=b, x=x: b(x) for b in blocks]
                    for kind, blocks in (("apart", apart), ("together", together))
                }
                times = interleave(rivals, budget=1.5)
                micros = [1e6 * times.median(kind) for kind in rivals]
                ratio = times.ratio("apart", "together")
                print(f"{name:9} {form:8} M = {M:3}: {micros[0]:8.1f} {micros[1]:8.1f} {ratio:.2f}")


if __name__ == "__main__":
    main()
