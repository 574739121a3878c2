"""The chooser: which room serves a call, and why a room can't.

Rooms never import each other; all have the same door (eager.py shows it). `auto` takes the first
room of ROOMS that can serve the call and gains by it; a room the user forces either serves or
raises its own reason. The choice is read once per call and is a constant while torch.compile
traces. What a room has packed for inference stays with it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor

from hylora_kernels.backends import cpu, cuda, eager, triton
from hylora_kernels.weights import Weights

# Fastest first; eager is last, since it serves everything.
ROOMS: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "cpu": cpu, "eager": eager}

# A plain global, so process-wide: torch.compile guards on it and retraces when it changes, which it
# can do neither for a ContextVar nor for a threading.local.
_forced: str | None = None


def available_backends() -> dict[str, str]:
    """Every backend's name -> "" where it can be used here, or the reason why not."""
    return {name: room.why_not() for name, room in ROOMS.items()}


def cpu_levels() -> tuple[str, dict[str, str]]:
    """(the instruction set that the "cpu" backend uses, or ""; every one it has kernels for -> ""
    where this machine has it, or the reason why not)."""
    return cpu.levels()


def cuda_code() -> str:
    """The GPUs that the "cuda" backend has machine code for, or why it has none, in words."""
    return cuda.code()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the `with` by backend `name` ("auto" or a key of
    available_backends()).

    A forward's backward runs in the same room, also after the `with` has ended. Overrides
    HYLORA_BACKEND and holds for all threads. Raises ValueError for an unknown name.
    """
    global _forced
    before, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def choose(x: Tensor, weights: Weights) -> str:
    """The name of the room that serves these tensors. Raises ValueError with the room's own reason
    where forced."""
    name = _wanted()
    if name != "auto":
        _require(name, x, weights)
        return name
    for name, room in ROOMS.items():
        if room.unsupported(x, weights) is None and room.is_faster_than_next(x, weights):
            return name
    raise AssertionError("eager serves every call")


def forget(SVh: Tensor) -> None:
    """Drop whatever any room keeps from call to call for the factors of this SVh."""
    for room in ROOMS.values():
        room.forget(SVh)


# ----------------------------------------------------------------------------- packed for inference


def pack(weights: Weights) -> Any:
    """The weights as the room that serves them wants them for inference, or None where it gains
    nothing by packing. Raises ValueError with the room's own reason where forced."""
    name = _wanted()
    if name != "auto":
        _require(name, weights.SVh, weights)  # SVh [r, K] has the shape of an x
        return ROOMS[name].pack(weights)
    for room in ROOMS.values():
        if room.unsupported(weights.SVh, weights) is None:
            packed = room.pack(weights)
            if packed is not None:
                return packed
    return None


def why_not_packed(weights: Weights) -> dict[str, str]:
    """Every room that pack asks -> why it packs nothing."""
    names = ROOMS if _wanted() == "auto" else (_wanted(),)
    return {
        name: ROOMS[name].unsupported(weights.SVh, weights) or "gains nothing by packing"
        for name in names
    }


def forward_packed(x: Tensor, packed: Any) -> Tensor:
    """x [..., K] -> y [..., N], in the room that packed it. Raises ValueError where another one is
    forced."""
    if _forced is not None and _forced not in ("auto", packed.room):
        raise ValueError(
            f"backend {_forced!r} can't serve this call: the layer is packed for backend "
            f"{packed.room!r}: restore_from_inference(model) first"
        )
    return ROOMS[packed.room].forward_packed(x, packed)


def rows_packed(ids: Tensor, packed: Any) -> Tensor:
    """ids [...] -> [..., K], rows of a dense matrix that is packed."""
    return ROOMS[packed.room].rows_packed(ids, packed)


def unpack(packed: Any) -> Weights:
    """The weights as they went into pack, bit for bit."""
    return ROOMS[packed.room].unpack(packed)


def _wanted() -> str:
    return _forced or _known(os.environ.get("HYLORA_BACKEND", "auto"), "HYLORA_BACKEND")


def _require(name: str, x: Tensor, weights: Weights) -> None:
    if reason := ROOMS[name].unsupported(x, weights):
        raise ValueError(f"backend {name!r} can't serve this call: {reason}")


def _known(name: str, argument: str) -> str:
    if name not in ("auto", *ROOMS):
        raise ValueError(f"{argument} must be one of {('auto', *ROOMS)}, got {name!r}")
    return name
