"""The choice for a problem on a device: a launch with one config, or torch's own products.

A forced config comes first, then a measured one, then the default. The choice is made below the op,
so that code compiled for many M chooses for each M. A CUDA graph may get another choice than a call
from Python, since a launch costs the host nothing there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from hylora_kernels.backends.triton.config import (
    TORCH_PRODUCTS,
    Config,
    Problem,
    Target,
    TorchProducts,
    default_config,
    table,
    tuned_config,
)

# The interpreter runs one program after the other; more than one shows more faults.
INTERPRETED_PROGRAMS = 3


def config_for(problem: Problem, device: torch.device) -> Config | TorchProducts:
    """The config that serves a call on a device now: called from Python, or captured in a graph."""
    if problem.M == 0:
        return TORCH_PRODUCTS
    if _forced is not None:
        return _forced
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return _cached(problem, target_of(device), _name(device), captured)


def config_to_warm_up(problem: Problem, device: torch.device) -> Config | None:
    """The launch that a CUDA graph of this problem would need and a call from Python does not
    compile; None where there is none, or where it was given out before.

    Nothing can be compiled while a graph is captured, and the warm-up before is calls from Python.
    """
    is_done = problem.M == 0 or problem in _warm
    if is_done or _forced is not None or torch.cuda.is_current_stream_capturing():
        return None
    _warm.add(problem)
    from_python, captured = (
        _cached(problem, target_of(device), _name(device), captured) for captured in (False, True)
    )
    return None if captured in (TORCH_PRODUCTS, from_python) else captured


_warm: set[Problem] = set()


def tuned_or_default(
    problem: Problem, target: Target, device_name: str, captured: bool
) -> Config | TorchProducts:
    """The measured config of the nearest problem, or the default where none is near."""
    tuned = tuned_config(problem, target, device_name, captured)
    return default_config(problem, target, captured) if tuned is None else tuned


_cached = functools.lru_cache(maxsize=4096)(tuned_or_default)


def read_tables_again() -> None:
    """Have the next call read the tables anew: one has been written."""
    table.cache_clear()
    _cached.cache_clear()


@functools.cache
def target_of(device: torch.device) -> Target:
    """The Target of a torch device; a CPU is the interpreter."""
    if device.type != "cuda":
        return Target("interpreter", 0, INTERPRETED_PROGRAMS)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    arch = 10 * properties.major + properties.minor
    return Target("cuda", arch, properties.multi_processor_count)


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


# ------------------------------------------------------------------- for measuring and for testing

_forced: Config | TorchProducts | None = None
_compile_only = False


@contextlib.contextmanager
def forcing(config: Config | TorchProducts, compile_only: bool = False) -> Iterator[None]:
    """Serve every call inside the `with` by `config`.

    compile_only: kernels are compiled, not launched, and the results are uninitialised memory.
    """
    global _forced, _compile_only
    before = _forced, _compile_only
    _forced, _compile_only = config, compile_only
    try:
        yield
    finally:
        _forced, _compile_only = before


def is_compile_only() -> bool:
    return _compile_only
