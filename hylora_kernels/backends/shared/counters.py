"""Counters of a launch: int32 zeros that its kernels count in and reset to zero at their end."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from hylora_kernels.backends.shared.gpu import is_captured
from hylora_kernels.backends.shared.kept import outside_graph_pools

# (device index, stream), on a CPU (None, thread) -> counters. Launches of one stream follow one
# another and each resets them, so they are cleared only once, when they are made.
_kept: dict[tuple, Tensor] = {}
_LEAST = 1024

# device -> (zeros, how many are given out). A CUDA graph may be replayed at any time in any stream,
# so a captured launch has counters of its own.
_reserves: dict[torch.device, tuple[Tensor, int]] = {}
_RESERVE = 1 << 20
_lock = threading.Lock()


def zeros(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros that no other launch counts in at the same time."""
    return (_reserved if is_captured(device) else zeros_of_stream)(device, count)


def zeros_of_stream(device: torch.device, count: int) -> Tensor:
    """The same for a launch that is not captured."""
    index = device.index  # hashing a device takes longer
    if device.type == "cuda":
        # torch.cuda.current_stream makes an object of it, which takes longer.
        key = index, torch._C._cuda_getCurrentRawStream(index)
    else:
        key = None, threading.get_ident()
    kept = _kept.get(key)
    if kept is None or kept.numel() < count:
        if device.type == "cuda":
            _make_reserve(device)
        kept = _kept[key] = _lasting_zeros(max(count, _LEAST), device)
    return kept


def forget(zeros: Tensor) -> None:
    """Never give these out again: their launch broke off, and the next one would wait for ever."""
    for key in [key for key, kept in _kept.items() if kept is zeros]:
        _kept.pop(key, None)


def _make_reserve(device: torch.device) -> None:
    with _lock:
        if device not in _reserves:
            _reserves[device] = _lasting_zeros(_RESERVE, device), 0


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    def make() -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=device)

    return outside_graph_pools(make, device)


def _reserved(device: torch.device, count: int) -> Tensor:
    """A part of the reserve, or zeros that the graph itself clears where none is left or made."""
    with _lock:
        reserve, used = _reserves.get(device, (None, _RESERVE))
        end = used + -(-count // 32) * 32
        if end > _RESERVE:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _reserves[device] = reserve, end
        return reserve[used:end]
