"""Launch configurations: tile sizes that fit a device, or torch's own products instead.

All of it is plain arithmetic on sizes: no GPU, no Triton, the same answer for the same question.
tuned_config reads a table that `hylora tune` has measured on a device; default_config serves
without one.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from hylora_kernels.backends.shared.gpu import (
    adapter_gradients_launch_is_faster,
    one_launch_is_faster,
)
from hylora_kernels.support.cache import TUNED, cache_root, table_name

_log = logging.getLogger(__name__)
FORWARD, BACKWARD = "forward", "backward"
# Kind -> architecture -> KiB of shared memory a block may use.
SHARED = {"cuda": {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}, "hip": {}}
LDS = 64  # KiB of shared memory a block may use on AMD
MOST_ROWS = 2**31
# A multiply-add rounds once. That is Triton's default up to 3.9; 3.10 turns it.
FUSION = {"enable_fp_fusion": True}
GROUP_ROWS = 64  # the most of a group's launch
SHIPPED_TABLES = Path(__file__).parent / "tuned"
# Version of the tables' words. 1 said "vendor" and "residents": it is measured again.
TABLE_FORMAT = 2


@dataclass(frozen=True)
class Target:
    """A device as the kernels see it.

    kind: "cuda", "hip", or "interpreter" (Triton's, on a CPU). arch: 90 for sm_90, "gfx942" on AMD.
    """

    kind: str
    arch: int | str
    multiprocessors: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory a block may use; an unlisted architecture gets the least of its maker's."""
        table = SHARED.get(self.kind)
        return 1024 * (table.get(self.arch, 99) if table else LDS if table == {} else 1 << 20)


class Problem(NamedTuple):
    """One call. The sizes are the formula's in either direction; `others` is N - r in the pivoted
    form, N in the pair form.

    A named tuple, since one is made and looked up for every call: a frozen dataclass takes 6 us.
    """

    M: int
    K: int
    N: int
    rank: int
    lora_rank: int
    dtype: torch.dtype
    pivoted: bool = False
    direction: str = FORWARD

    @property
    def others(self) -> int:
        return self.N - self.rank if self.pivoted else self.N

    @property
    def depth(self) -> int:
        """The length of the shrink product's sums."""
        return self.K if self.direction == FORWARD else self.others

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors."""
        base = self.rank * (self.K + self.others)
        return self.dtype.itemsize * (base + self.lora_rank * (self.K + self.N))

    @property
    def width(self) -> int:
        """The columns of the result: N forward, K backward."""
        return self.N if self.direction == FORWARD else self.K


@dataclass(frozen=True)
class Config:
    """The tiles of kernels.layer: h in BM x BR blocks, BK deep; y in BM x BN blocks, BJ deep.

    split:         parts of the shrink product's sums that different programs add up.
    swap:          the weights are the tensor cores' first operand.
    stages:        tiles on their way from memory.
    blocks_per_sm: programs that share a multiprocessor.
    prefetch:      the forward's weights are brought into L2 ahead (NVIDIA).
    """

    BM: int
    BR: int
    BK: int
    BN: int
    BJ: int
    split: int = 1
    swap: bool = False
    warps: int = 4
    stages: int = 3
    blocks_per_sm: int = 1
    prefetch: bool = False

    def rank_blocks(self, problem: Problem) -> int:
        return _blocks(problem.rank, self.BR) + _blocks(problem.lora_rank, self.BR)

    def column_blocks(self, problem: Problem) -> int:
        if problem.pivoted and problem.direction == FORWARD:
            return _blocks(problem.others, self.BN) + _blocks(problem.rank, self.BN)
        return _blocks(problem.width, self.BN)

    def tiles(self, problem: Problem) -> int:
        per_rows = self.rank_blocks(problem) * self.split + self.column_blocks(problem)
        return _blocks(problem.M, self.BM) * per_rows


@dataclass(frozen=True)
class AdapterGradientsConfig:
    """The tiles of kernels.adapter_gradients: BA ranks by BC columns, BM rows at a time, the rows
    in `split` shares that different programs add up."""

    BM: int
    BC: int
    BA: int
    split: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class TorchProducts:
    """No launch of ours: torch's own products, two or as many as the form takes."""


TORCH_PRODUCTS = TorchProducts()
TORCH_PRODUCTS_WORD = "torch products"  # in tables


def why_illegal(
    config: Config | AdapterGradientsConfig, dtype: torch.dtype, target: Target
) -> str | None:
    """The reason why the kernel can't be compiled with this config for the target, in words; None
    if it can."""
    sizes, one_row = asdict(config), isinstance(config, Config) and config.BM == 1
    for name in ("BM", "BR", "BK", "BN", "BJ", "BC", "BA", "warps"):
        size, least = sizes.get(name, 16), 1 if name == "warps" or one_row else 16
        if size & (size - 1) or size < least:
            return f"{name} must be a power of two, at least {least}, got {size}"
    if one_row:
        return None if config.swap else "a single row is multiplied with swap alone"
    if isinstance(config, AdapterGradientsConfig):
        deep, per_thread = (config.BM, config.BM), config.BA * config.BC
        sides = (config.BA + config.BC, 0)
    else:
        deep, per_thread = (config.BK, config.BJ), config.BM * max(config.BR, config.BN)
        sides = (config.BM + config.BR, config.BM + config.BN)
    if per_thread > 128 * 32 * config.warps:
        return f"{config.warps} warps hold 128 sums a thread, asked for {per_thread} in all"
    shared = max(side * depth for side, depth in zip(sides, deep, strict=True))
    shared *= config.stages * dtype.itemsize
    if shared > target.shared_bytes:
        return f"{shared} bytes of shared memory, {target.arch} has {target.shared_bytes}"
    return None


# ----------------------------------------------------------------------------------------- defaults


def default_config(
    problem: Problem, target: Target, captured: bool = True
) -> Config | TorchProducts:
    """The config where nothing near was measured, by an H100's timings (benchmarks/gpu_layers.py).

    captured: the call is part of a CUDA graph. Called one by one, a Triton launch costs the host
    more than four of torch's products do: beside an H200 about 140 us against 100.
    """
    if target.kind == "interpreter":
        return _largest_tiles(problem)
    ieee = problem.dtype == torch.float32
    if not captured or problem.direction == BACKWARD or (ieee and problem.M > 1):
        return TORCH_PRODUCTS
    launches = one_launch_is_faster(problem.M, problem.factor_bytes, problem.lora_rank)
    return first_candidate(problem, target) if launches else TORCH_PRODUCTS


def first_candidate(problem: Problem, target: Target) -> Config:
    """The first candidate that is a launch."""
    found = candidate_configs(problem, target)
    return next(config for config in found if config is not TORCH_PRODUCTS)


def group_config(problem: Problem, target: Target, captured: bool) -> Config | TorchProducts:
    """The config of a group's launch, by the pair with all its members' ranks and outputs.

    captured: as for default_config. Tables know single layers alone. On an H200, TinyLlama's
    q, k, v (6.8 MB as one pair) take 8.4, 9.6 and 14.0 us as one launch for 1, 8 and 64 rows, and
    15.8, 15.2 and 15.3 by the torch products; gate, up (40 MB) 15.1, 18.5 and 36.5, and 18.0, 16.1
    and 16.7. Called one by one, a launch through Triton costs the host more than they do
    (default_config).
    """
    if target.kind == "interpreter":
        return _largest_tiles(problem)
    ieee = problem.dtype == torch.float32
    launches = problem.M == 1 or (problem.M <= GROUP_ROWS and problem.factor_bytes < 16e6)
    if not captured or not launches or (ieee and problem.M > 1):
        return TORCH_PRODUCTS
    return first_candidate(problem, target)


# Most rows -> the tiles that were fastest for some layer on an H100, the best first.
# candidate_configs leaves out the ones that a target can't hold and splits less where K is short.
_SHIPPED: dict[int, tuple[Config, ...]] = {
    1: (
        Config(1, 8, 1024, 32, 256, swap=True, blocks_per_sm=2),
        Config(1, 8, 1024, 16, 1024, swap=True, warps=8, blocks_per_sm=2),
        Config(1, 4, 1024, 16, 512, swap=True),
        Config(1, 16, 512, 32, 256, split=2, swap=True, warps=8, blocks_per_sm=2),
        Config(1, 8, 1024, 32, 256, swap=True, blocks_per_sm=2, prefetch=True),
        Config(16, 32, 128, 64, 128, split=4, swap=True, stages=4, prefetch=True),
    ),
    16: (
        Config(16, 32, 128, 64, 128, split=4, swap=True, stages=4, prefetch=True),
        Config(16, 32, 128, 64, 128, split=4, swap=True, stages=4, blocks_per_sm=2, prefetch=True),
        Config(16, 64, 128, 64, 64, split=8, swap=True, stages=3, prefetch=True),
        Config(16, 32, 128, 32, 64, split=4, swap=True, stages=3),
    ),
    64: (
        Config(64, 32, 64, 32, 64, split=4, stages=4),
        Config(64, 32, 64, 64, 64, split=4, stages=4, blocks_per_sm=2, prefetch=True),
    ),
    256: (
        Config(64, 64, 64, 64, 64, split=2, stages=4),
        Config(64, 64, 64, 128, 64, split=2, warps=8, stages=3),
    ),
    MOST_ROWS: (Config(128, 128, 64, 128, 64, warps=8),),
}


# Exact float32 has no tensor cores. Larger tiles spilled up to 541 registers on sm_80.
_SHIPPED_FLOAT32 = (
    Config(16, 16, 64, 16, 64, split=4, swap=True),
    Config(16, 32, 32, 32, 32, split=4, swap=True),
)


def candidate_configs(problem: Problem, target: Target) -> list[Config | TorchProducts]:
    """The configs that `hylora tune` measures for a problem: torch's products, then the shipped
    tiles, all legal on the target."""
    shipped = next(configs for most, configs in _SHIPPED.items() if most >= problem.M)
    if problem.dtype == torch.float32:
        shipped = (*(config for config in shipped if config.BM == 1), *_SHIPPED_FLOAT32)
    found: list[Config | TorchProducts] = [TORCH_PRODUCTS]
    gathers = problem.pivoted and problem.direction == BACKWARD
    is_blackwell = target.kind == "cuda" and target.arch >= 100
    for config in shipped:
        parts = max(1, min(config.split, _blocks(problem.depth, config.BK) // 2))
        config = replace(config, split=parts)
        # The index lists of pivots and others take registers: 36 to 148 were spilled on sm_80.
        if (gathers and config.BM == 64) or (problem.pivoted and config.BM == 128):
            config = replace(config, warps=8, BR=min(config.BR, 64), BN=min(config.BN, 64))
        # Rows that start anywhere take registers: 170 were spilled on sm_80, 12 on sm_90.
        if (problem.K % 8 or problem.rank % 8) and config.BM == 16 and config.BR == 64:
            config = replace(config, warps=8)
        # Blackwell's code takes more registers than older GPUs': 2 to 52 were spilled.
        if is_blackwell and config.BM == 16 and config.BN == 64:
            config = replace(config, warps=8, BR=32 if gathers else config.BR)
        if is_blackwell and config.BM == 1 and problem.direction == BACKWARD:
            config = replace(config, BK=min(config.BK, 512))
        if problem.direction == BACKWARD or target.kind != "cuda":
            config = replace(config, prefetch=False)
        if is_blackwell and target.arch < 120 and gathers and config.BM >= 64:
            continue  # sm_100 copies gathered columns synchronously, and 9 registers were spilled
        config = _fitting(config, problem, target)
        if config not in found and not why_illegal(config, problem.dtype, target):
            found.append(config)
    return found


def _fitting(config, problem: Problem, target: Target):
    """config with as many stages as the target holds, two at least."""
    while why_illegal(config, problem.dtype, target) and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


def adapter_gradients_config(
    problem: Problem, target: Target, captured: bool = True
) -> AdapterGradientsConfig | TorchProducts:
    """The tiles of the adapter's gradients, or TORCH_PRODUCTS where those are faster.

    captured: as for default_config.
    """
    is_faster = adapter_gradients_launch_is_faster(problem.M, problem.K, problem.N)
    if target.kind != "interpreter" and not (captured and is_faster):
        return TORCH_PRODUCTS
    most = 64 if problem.dtype.itemsize == 2 else 32  # float32's sums: 80 were spilled on sm_80
    BA = min(most, _power(problem.lora_rank))
    if target.kind == "interpreter":
        return AdapterGradientsConfig(128, 128, BA)
    BM = 128 if problem.dtype.itemsize == 2 else 32
    tiles = (_blocks(problem.K, 64) + _blocks(problem.N, 64)) * _blocks(problem.lora_rank, BA)
    wanted = max(1, 4 * target.multiprocessors // tiles)
    split = max(1, min(wanted, _blocks(problem.M, BM) // 4, 16))
    return _fitting(AdapterGradientsConfig(BM, 64, BA, split), problem, target)


def _largest_tiles(problem: Problem) -> Config:
    """Few tiles for the interpreter, whose time goes by operations, not by numbers."""
    BM, BR = min(128, _power(problem.M)), min(128, _power(problem.rank))
    return Config(BM, BR, 128, min(128, _power(problem.width)), 128, warps=8)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power(size: int) -> int:
    """The least power of two that is at least `size` and 16."""
    return max(16, 1 << max(size - 1, 0).bit_length())


# ------------------------------------------------------------------------------------- tuned tables


def table_path(device_name: str) -> Path:
    """The file of `hylora tune` for devices of this name."""
    return cache_root() / TUNED / table_name(device_name)


@functools.cache
def table(device_name: str) -> tuple[dict, ...]:
    """The measured rows for a device: the user's own, else those that come with the package."""
    for path in (table_path(device_name), SHIPPED_TABLES / table_name(device_name)):
        if path.is_file() and (rows := table_rows(path)):
            return tuple(rows)
    _log.info("no measured table for %s: defaults serve; hylora tune --device cuda", device_name)
    return ()


def table_rows(path: Path) -> list[dict]:
    """The rows of a table; none, and a warning, where it is damaged or of an older version."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole.get("format") == TABLE_FORMAT:
            for row in whole["rows"]:
                _check_row(row)
            return whole["rows"]
        reason = "of an older format"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"damaged ({error!r})"
    _log.warning("%s is %s and not read: hylora tune --device cuda", path, reason)
    return []


def _check_row(row: dict) -> None:
    """Raises KeyError, TypeError or ValueError unless it is a problem and two winners."""
    problem = {name: row[name] for name in Problem._fields}
    winners = [w for w in (row["graph"], row["eager"]) if w != TORCH_PRODUCTS_WORD]
    configs = [asdict(Config(**winner)) for winner in winners]
    numbers = [value for config in configs for value in config.values()]
    numbers += [problem[name] for name in ("M", "K", "N", "rank", "lora_rank")]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"numbers must be whole, got {row}")


def tuned_config(
    problem: Problem, target: Target, device_name: str, captured: bool
) -> Config | TorchProducts | None:
    """The winner of the nearest measured problem; None where none is near or it doesn't fit.

    captured: the call is part of a CUDA graph, where launches cost the host nothing.
    """
    row = _nearest(problem, device_name)
    if row is None:
        return None
    winner = row["graph" if captured else "eager"]
    if winner == TORCH_PRODUCTS_WORD:
        return TORCH_PRODUCTS
    config = Config(**winner)
    # Tiles for one row read the weights once for each row: 14 us instead of 10 at M = 4.
    for_fewer_rows = min(problem.M, 16) > config.BM
    return None if for_fewer_rows or why_illegal(config, problem.dtype, target) else config


def _nearest(problem: Problem, device_name: str) -> dict | None:
    """The measured row of the same kind whose sizes are nearest in log space; None if even that is
    a factor of six away."""
    kind = str(problem.dtype).removeprefix("torch."), problem.pivoted, problem.direction
    best, best_distance = None, math.log2(6)
    for row in table(device_name):
        if (row["dtype"], row["pivoted"], row["direction"]) != kind:
            continue
        if (row["lora_rank"] == 0) != (problem.lora_rank == 0):
            continue
        distance = math.hypot(
            *(
                math.log2(max(row[name], 1) / max(getattr(problem, name), 1))
                for name in ("M", "K", "N", "rank")
            )
        )
        if distance < best_distance:
            best, best_distance = row, distance
    return best
