"""Torch's random state: seeded for one run, restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """Restore the CPU's random state at the end of the block; on a CUDA device, every GPU's too."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(list(devices)):
        yield


def seed_rng(device: torch.device, seed: int) -> None:
    """Seed the CPU's random state and that of every device of `device`'s type.

    Raises ValueError for a seed beyond 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an int of 64 bits, got {seed}")
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
