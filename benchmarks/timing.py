"""Times of rivals in one process, taken in turns: a b d ours, b d ours a, ...

On a shared machine a time changes by half within minutes, while the ratio of two times taken
milliseconds apart is steady. So every round times each rival once, a ratio is the median over the
rounds of that round's ratio, and the first place rotates.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEAST_SAMPLE = 200e-6  # seconds; in a shorter sample the clock and the loop itself show


@dataclass(frozen=True)
class Times:
    """samples: rival -> seconds of one call, an entry for each round."""

    samples: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, slower: str, faster: str) -> float:
        """How many times as fast as `slower` `faster` is."""
        pairs = zip(self.samples[slower], self.samples[faster], strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.samples.values())))


def interleave(
    rivals: dict[str, Sequence[Callable[[], object]]],
    budget: float = 1.0,
    least_rounds: int = 3,
    most_rounds: int = 100,
    lead_in: bool = True,
) -> Times:
    """Times of each rival: at least `least_rounds`, then until `budget` seconds are over.

    rivals:  name -> its calls, the same on a copy of the weights each; one sample goes through all.
    lead_in: go through them untimed before each sample, so that the weights come from the cache
             level that they fit, not from the one where the previous rival left them.
    """
    passes = {name: _Pass(calls, lead_in and len(calls) > 1) for name, calls in rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for round_ in range(most_rounds):
            if round_ >= least_rounds and time.perf_counter() - start > budget:
                break
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(passes[name].sample())
    finally:
        if collecting:
            gc.enable()
    return Times(samples)


class _Pass:
    """One rival, warmed up: as many repeats a sample as its clock needs."""

    def __init__(self, calls: Sequence[Callable[[], object]], lead_in: bool):
        self.calls, self.lead_in, self.repeats = calls, lead_in, 1
        self.sample()
        seconds = self.sample() * len(calls)
        self.repeats = max(1, round(LEAST_SAMPLE / seconds))

    def sample(self) -> float:
        """Seconds of one call, the mean over all calls."""
        if self.lead_in:
            for call in self.calls * 2:  # one pass does not fill a cache
                call()
        start = time.perf_counter()
        for _ in range(self.repeats):
            for call in self.calls:
                call()
        return (time.perf_counter() - start) / (self.repeats * len(self.calls))


def keep_freed_memory() -> None:
    """Have glibc give freed memory to the next call, not back to the system.

    By default a new output of more than 128 KB costs a page fault every 4 KB: at bf16 M=2048,
    N=5632 a tenth of the product's time, charged to the rival that allocates most.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
