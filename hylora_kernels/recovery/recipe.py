"""All that a training run depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """All that the trained adapters depend on; a run is resumed by the same recipe only."""

    steps: int
    lr: float
    warmup: int
    length: int
    batch: int
    accumulate: int
    clip: float
    chunk: int
    distill: float
    gradient_checkpointing: bool
    seed: int
    processes: int
    data: str  # from here on hashes; the adapters' is of what they were before the first step
    teacher: str
    base: str
    adapters: str

    def learning_rate(self, step: int) -> float:
        """Of step 1..steps: linear up to lr in the warm-up, then a cosine down to a tenth of it."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        progress = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    @property
    def blocks_per_step(self) -> int:
        return self.batch * self.accumulate * self.processes
