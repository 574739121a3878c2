"""The choice for a problem on a device: a launch with one config, or torch's own products.

A forced config comes first, then a measured one, then the default. The choice is made below the op,
so that code compiled for many M chooses for each M. A CUDA graph may get another choice than a call
from Python, since a launch costs the host nothing there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator

import torch

from hylora_kernels.backends.shared.gpu import is_captured
from hylora_kernels.backends.triton.config import (
    TORCH_PRODUCTS,
    AdapterGradientsConfig,
    Config,
    Problem,
    Target,
    TorchProducts,
    adapter_gradients_config,
    default_config,
    group_config,
    table,
    tuned_config,
)

# The interpreter runs one program after the other; more than one shows more faults.
INTERPRETED_PROGRAMS = 3


def config_for(
    problem: Problem, device: torch.device, captured: bool | None = None
) -> Config | TorchProducts:
    """The config that serves a call on a device: called from Python, or captured in a CUDA graph;
    None asks which of the two it is now."""
    if problem.M == 0:
        return TORCH_PRODUCTS
    if _forced is not None:
        return _forced
    captured = is_captured(device) if captured is None else captured
    return _cached(problem, target_of(device), _name(device), captured)


def adapter_gradients_config_for(
    problem: Problem, device: torch.device, captured: bool | None = None
) -> AdapterGradientsConfig | TorchProducts:
    """The same for the adapter's gradients of a backward."""
    captured = is_captured(device) if captured is None else captured
    return _cached_gradients(problem, target_of(device), captured)


def group_config_for(
    problem: Problem, device: torch.device, captured: bool | None = None
) -> Config | TorchProducts:
    """The same for a group, whose problem is the pair with all its members' ranks and outputs."""
    if _forced is not None:
        return _forced
    captured = is_captured(device) if captured is None else captured
    return _cached_group(problem, target_of(device), captured)


def is_first_call(problem: Hashable, device: torch.device) -> bool:
    """True once for each problem on a GPU, outside of CUDA graphs."""
    if problem in _warm or device.type != "cuda" or _forced is not None or is_captured(device):
        return False
    _warm.add(problem)
    return True


_warm: set[Hashable] = set()


def tuned_or_default(
    problem: Problem, target: Target, device_name: str, captured: bool
) -> Config | TorchProducts:
    """The measured config of the nearest problem, or the default where none is near."""
    tuned = tuned_config(problem, target, device_name, captured)
    return default_config(problem, target, captured) if tuned is None else tuned


_cached = functools.lru_cache(maxsize=4096)(tuned_or_default)
_cached_group = functools.lru_cache(maxsize=4096)(group_config)
_cached_gradients = functools.lru_cache(maxsize=4096)(adapter_gradients_config)


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
