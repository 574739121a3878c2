"""Measured limits of this machine, which "% of the limit" refers to.

limits.cpp is compiled and run once per number of threads. Without g++, torch's own products and
sums take their place, and every result says so: a kernel may be faster than they are.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limits.cpp")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Of `threads` threads. compute: FLOP/s by "bf16", "fp16" and "fp32". read: bytes/s by "L2",
    "L3" and "DRAM". None without AMX: bf16_from_l1, FLOP/s with both operands loaded from L1;
    bf16_median, the same of one thread at the median moment of a second, and throttled, the share
    of moments at less than half of the best rate."""

    threads: int
    source: str
    compute: dict[str, float]
    bf16_from_l1: float | None
    bf16_median: float | None
    throttled: float | None
    read: dict[str, float]

    def roof_seconds(self, flops: float, bytes_moved: float, dtype: str, regime: str) -> float:
        """The least time for so much work, by the lower of the two limits."""
        return max(flops / self.compute[dtype], bytes_moved / self.read[regime])

    def line(self) -> str:
        read = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in self.read.items())
        l1 = "" if self.bf16_from_l1 is None else self._tiles()
        return (
            f"limits {self.threads}T ({self.source}): bf16 {self.compute['bf16'] / 1e12:.2f}"
            f" TFLOP/s{l1}, fp32 {self.compute['fp32'] / 1e9:.0f} GFLOP/s, read {read} GB/s"
        )

    def _tiles(self) -> str:
        return (
            f" ({self.bf16_from_l1 / 1e12:.2f} from L1; one thread at the median moment"
            f" {self.bf16_median / 1e12:.2f}, throttled in {100 * self.throttled:.0f} % of them)"
        )


@functools.cache
def cache_bytes() -> dict[str, int]:
    """Size of "L2" (of one core) and "L3" (of all), with common sizes where Linux doesn't say."""
    sizes = {"L2": 2 * MB, "L3": 32 * MB}
    for index in CACHES.glob("index*"):
        level, size = ((index / name).read_text().strip() for name in ("level", "size"))
        if f"L{level}" in sizes and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def cycled_bytes(regime: str) -> int:
    """Bytes of weights to cycle through, so that each call reads its own from `regime`.

    L3: four times a core's L2, so that no L2 keeps them, and at most 16 MB, since a virtual machine
    may have only a part of the L3 (20 of 105 MB, on one). DRAM: four times the L3.
    """
    caches = cache_bytes()
    return {
        "L2": caches["L2"] // 2,
        "L3": min(4 * caches["L2"], 16 * MB, caches["L3"] // 2),
        "DRAM": 4 * caches["L3"],
    }[regime]


@functools.cache
def measure(threads: int, quick: bool = False) -> Limits:
    sizes = {name: cycled_bytes(name) for name in ("L2", "L3", "DRAM")}
    sizes["L2"] *= threads
    program = _program()
    if program is None:
        return _by_torch(threads, sizes)
    words = [str(program), str(threads), "0.005" if quick else "0.02", *map(str, sizes.values())]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    fma = found["fma"]
    return Limits(
        threads=threads,
        source="limits.cpp",
        compute={"bf16": found.get("amx_registers", fma), "fp16": fma, "fp32": fma},
        bf16_from_l1=found.get("amx_l1"),
        bf16_median=found.get("amx_l1_median"),
        throttled=found.get("amx_slow_share"),
        read={name: found["read"][str(size)] for name, size in sizes.items()},
    )


@functools.cache
def _program() -> Path | None:
    """limits.cpp, compiled for this session; None without g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    program = Path(tempfile.mkdtemp(prefix="hylora-limits-")) / "limits"
    options = ("-O2", "-std=c++17", "-pthread")
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(program)], check=True)
    return program


def _by_torch(threads: int, sizes: dict[str, int]) -> Limits:
    read = {}
    for name, size in sizes.items():
        data = torch.randn(size // 4)
        read[name] = size / _best(data.sum, threads)
    return Limits(threads, "torch, no g++", torch_products(threads), None, None, None, read)


def torch_products(threads: int) -> dict[str, float]:
    """FLOP/s of torch.mm on square matrices of 1024, by dtype."""
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        a, b = torch.randn(2, 1024, 1024, dtype=dtype)
        rates[name] = 2 * 1024**3 / _best(functools.partial(torch.mm, a, b), threads)
    return rates


def _best(call, threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return min(seconds)
