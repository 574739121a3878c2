"""Zeros that the kernels of a launch count with, and leave zero."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# (device, stream, thread) -> int32 zeros. A launch leaves them as it found them, and launches of
# one stream follow one another, so they are cleared once, when they are made.
_kept: dict[tuple, Tensor] = {}
_LEAST = 1024

# device -> (zeros, how many are given out). A graph may be replayed at any time, in any stream:
# what a captured launch counts with belongs to it alone.
_reserves: dict[torch.device, tuple[Tensor, int]] = {}
_RESERVE = 1 << 20
_lock = threading.Lock()


def zeros(device: torch.device, count: int) -> Tensor:
    """int32 zeros, at least `count`, that no other launch counts with at the same time."""
    if device.type != "cuda":
        key = device, 0, threading.get_ident()
    elif torch.cuda.is_current_stream_capturing():
        return _reserved(device, count)
    else:
        key = device, torch.cuda.current_stream(device).cuda_stream, 0
        if device not in _reserves:
            _make_reserve(device)
    kept = _kept.get(key)
    if kept is None or len(kept) < count:
        kept = torch.zeros(max(count, _LEAST), dtype=torch.int32, device=device)
        _kept[key] = kept
    return kept


def forget(zeros: Tensor) -> None:
    """Don't give these out again: their launch didn't come to its end, and the next would wait for
    tiles that nobody makes."""
    for key in [key for key, kept in _kept.items() if kept is zeros]:
        _kept.pop(key, None)


def _make_reserve(device: torch.device) -> None:
    with _lock:
        if device not in _reserves:
            _reserves[device] = torch.zeros(_RESERVE, dtype=torch.int32, device=device), 0


def _reserved(device: torch.device, count: int) -> Tensor:
    """A part of the reserve; where there is none left, or none yet, zeros that the graph clears."""
    with _lock:
        reserve, used = _reserves.get(device, (None, _RESERVE))
        end = used + -(-count // 32) * 32
        if end > _RESERVE:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _reserves[device] = reserve, end
        return reserve[used:end]
