"""Random state: seeded for one run, put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """At the end, put back the random state of the CPU, and of CUDA if `device` is of it."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(list(devices)):
        yield


def seed_rng(device: torch.device, seed: int) -> None:
    """Seed the CPU's random state, and that of `device`'s kind."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
