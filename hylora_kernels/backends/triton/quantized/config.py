"""Launch configurations of a quantised matrix's product: tiles, or dequantising before torch's.

Plain arithmetic on sizes, like the plain layers' config.py. The defaults take the tiles whose
machine code spends the fewest instructions on a code (kernels.py). Up to 16 rows they serve where
the C++ kernel doesn't (launch.py). On an H200, 4 bits, one row, 2048 to 2048, they take 7.3 us, six
other tiles and splits 6.4 to 7.7; 2048 to 8192 10.9, the others 13.4 to 15.9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hylora_kernels.backends.triton.config import Target
from hylora_kernels.weights import GROUP

# From more rows on W is dequantised once and multiplied by torch's own product.
MOST_ROWS = 64
LEAST_GROUPS = 8  # of a share of the sums: each stores BM BN float32 numbers for the last to add


class Problem(NamedTuple):
    """One product: x [M, K], W [N, K] of `bits` bits, an adapter of rank lora_rank or 0."""

    M: int
    K: int
    N: int
    bits: int
    lora_rank: int
    dtype: torch.dtype

    @property
    def groups(self) -> int:
        """Groups of 64 inputs."""
        return -(-self.K // GROUP)


@dataclass(frozen=True)
class QuantizedConfig:
    """The tiles of quantized.kernels.product: y in BM x BN blocks, 64 inputs deep.

    split:  parts of the sums that different programs add up.
    stages: groups on their way from memory.
    """

    BM: int
    BN: int
    split: int = 1
    warps: int = 4
    stages: int = 4

    def tiles(self, problem: Problem) -> int:
        return -(-problem.M // self.BM) * -(-problem.N // self.BN)


@dataclass(frozen=True)
class Dequantize:
    """No product of ours: torch's own, on W dequantised into a workspace."""


DEQUANTIZE = Dequantize()


def why_illegal(config: QuantizedConfig, problem: Problem, target: Target) -> str | None:
    """The reason why the kernel can't be compiled with this config for the target, in words; None
    if it can."""
    for name in ("BM", "BN", "warps"):
        size, least = getattr(config, name), 1 if name == "warps" else 16
        if size & (size - 1) or size < least:
            return f"{name} must be a power of two, at least {least}, got {size}"
    if problem.dtype == torch.float32:
        return "tensor cores don't multiply float32 exactly: W is dequantised for it"
    if not 1 <= config.split <= max(1, problem.groups):
        return f"split must be from 1 to the {problem.groups} groups of K, got {config.split}"
    sums = config.BM * config.BN
    if sums > 64 * 32 * config.warps:
        return f"{config.warps} warps hold 64 sums a thread, asked for {sums} in all"
    # A group's operands in half precision, which pass through shared memory, and the planes.
    group = GROUP * (2 * config.BM + problem.bits * config.BN // 8)
    shared = config.stages * group + 2 * GROUP * config.BN
    if shared > target.shared_bytes:
        return f"{shared} bytes of shared memory, {target.arch} has {target.shared_bytes}"
    return None


# Most rows -> tiles, the default first. Two warps for 64 rows of W take 4.6 instructions a code at
# 4 bits (sm_90), four take 5.7: the work that goes by groups is shared by more codes of a thread.
_SHIPPED: dict[int, tuple[QuantizedConfig, ...]] = {
    16: (QuantizedConfig(16, 64, warps=2), QuantizedConfig(16, 32, warps=1)),
    32: (QuantizedConfig(32, 64, warps=4), QuantizedConfig(32, 32, warps=2)),
    MOST_ROWS: (QuantizedConfig(64, 64, warps=4, stages=3),),
}


def candidate_configs(problem: Problem, target: Target) -> list[QuantizedConfig | Dequantize]:
    """The configs worth measuring for a problem: dequantising, then the shipped tiles with as many
    parts as fill the device, all legal on the target."""
    rows = min(problem.M, MOST_ROWS)
    shipped = next(configs for most, configs in _SHIPPED.items() if most >= rows)
    found: list[QuantizedConfig | Dequantize] = [DEQUANTIZE]
    for config in shipped:
        # Of 8 bits ptxas gives four warps 128 registers on these two, and spills two of them.
        if config.BM == MOST_ROWS and problem.bits == 8 and target.arch in (86, 89):
            config = replace(config, warps=8)
        config = replace(config, split=_split(config, problem, target))
        if not why_illegal(config, problem, target):
            found.append(config)
    return found


def default_config(problem: Problem, target: Target) -> QuantizedConfig | Dequantize:
    """The first tiles for few rows, dequantising for many.

    Up to 64 rows dequantising would read and write ten times the bytes at 4 bits: on an H200, 2048
    to 8192, the tiles take 15.3 us for 64 rows; dequantising alone takes about 14, and then torch's
    product 12. A call costs the host one launch either way.
    """
    found = candidate_configs(problem, target)
    return DEQUANTIZE if problem.M > MOST_ROWS or len(found) == 1 else found[1]


def _split(config: QuantizedConfig, problem: Problem, target: Target) -> int:
    """Parts that give every multiprocessor eight warps, where the sums are long enough."""
    wanted = 8 * target.multiprocessors // (config.warps * config.tiles(problem))
    return max(1, min(wanted, problem.groups // LEAST_GROUPS, 16))
