"""The compile gate's cases of quantised matrices (triton_gate.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from helpers.triton_code import Case, Machine

from hylora_kernels.backends.triton.config import Target
from hylora_kernels.backends.triton.quantized.config import (
    DEQUANTIZE,
    Dequantize,
    Problem,
    QuantizedConfig,
    candidate_configs,
    why_illegal,
)
from hylora_kernels.weights import PLANES

KERNELS = ("product", "dequantize")


@dataclass(frozen=True)
class QuantizedCase(Case):
    """A launch of quantized/kernels.py."""

    problem: Problem
    config: QuantizedConfig | Dequantize

    @property
    def kernel(self) -> str:
        return "dequantize" if self.config is DEQUANTIZE else "product"

    @property
    def tiled(self) -> bool:
        return self.kernel == "product"

    @property
    def aligned(self) -> bool:
        return self.problem.K % 8 == 0

    @property
    def sums(self) -> list[tuple[int, int]]:
        return [(self.config.BN, self.config.BM)]

    @property
    def waiting_allowed(self) -> int:
        return 0

    @property
    def orders_wanted(self) -> set[str]:
        return {"acq_rel"} if self.tiled and self.config.split > 1 else set()

    def why_illegal(self, target: Target) -> str | None:
        return why_illegal(self.config, self.problem, target) if self.tiled else None

    def __str__(self):
        p = self.problem
        words = [self.kernel, str(p.dtype).removeprefix("torch."), f"bits={p.bits}"]
        words += [*([] if self.aligned else ["odd"]), f"ra={p.lora_rank}", f"M={p.M}"]
        return " ".join(words + [f"{name}={size}" for name, size in asdict(self.config).items()])


def cases(target: Target, quick: bool) -> Iterator[QuantizedCase]:
    """All widths in all configurations; the other kinds of call in the first one. quick: the
    commonest product and one width dequantised."""
    plain = Problem(16, 2048, 2048, 4, 32, torch.bfloat16)
    if quick:
        yield QuantizedCase(plain, candidate_configs(plain, target)[1])
        yield QuantizedCase(plain._replace(bits=6), DEQUANTIZE)
        return
    for bits in PLANES:
        for M in (16, 32, 64):
            problem = plain._replace(M=M, bits=bits)
            for config in candidate_configs(problem, target)[1:]:
                yield QuantizedCase(problem, config)
        yield QuantizedCase(plain._replace(bits=bits), DEQUANTIZE)
        problem = plain._replace(bits=bits, dtype=torch.float16)
        yield QuantizedCase(problem, candidate_configs(problem, target)[1])
    for change in ({"K": 2049}, {"lora_rank": 0}, {"N": 128256}):
        problem = plain._replace(**change)
        yield QuantizedCase(problem, candidate_configs(problem, target)[1])


def launch(case: QuantizedCase, machine: Machine, compiling) -> None:
    """Make the launch that launch.py would make, its kernels replaced by compiling(kernel)."""
    from hylora_kernels.backends.triton.quantized import kernels
    from hylora_kernels.backends.triton.quantized import launch as launches

    p = case.problem
    tensor = functools.partial(torch.empty, dtype=p.dtype, device="meta")
    zeros = None if p.bits == 8 else tensor(p.N, p.groups, dtype=torch.uint8)
    words = tensor(p.N, p.groups, 2 * p.bits, dtype=torch.int32)
    W = launches.Words(words, tensor(p.N, p.groups, dtype=torch.float16), zeros, p.bits, p.K)
    stand_in = SimpleNamespace(**{name: compiling(getattr(kernels, name)) for name in KERNELS})
    with mock.patch.object(launches, "_kernels", lambda: stand_in):
        if case.config is DEQUANTIZE:
            launches.dequantize(W, p.dtype, 0, p.N)
            return
        h_a = B = None
        if p.lora_rank:
            h_a, B = tensor(p.M, p.lora_rank), tensor(p.N, p.lora_rank)
        launches.product(tensor(p.M, p.K), W, tensor(p.N), h_a, B, p, case.config)
