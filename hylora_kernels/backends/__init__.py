"""The chooser: which room serves a call, and why a room can't.

Rooms never import each other; all have the same door (eager.py shows it). `auto` takes the first
room of ROOMS that can serve; a room the user forces either serves or raises its own reason. The
choice is read once per call and is a constant while torch.compile traces.
"""

from __future__ import annotations

import contextlib
import os
from types import ModuleType

from hylora_kernels.backends import eager

# Fastest first; eager is last, since it serves everything.
ROOMS: dict[str, ModuleType] = {"eager": eager}

# A plain global, so process-wide: torch.compile guards on it and retraces when it changes, which it
# can do neither for a ContextVar nor for a threading.local.
_forced: str | None = None


def available_backends() -> dict[str, str]:
    """Every backend's name -> "" where it can be used here, or the reason why not."""
    return {
        name: "" if room.is_available() else "not available here" for name, room in ROOMS.items()
    }


@contextlib.contextmanager
def use_backend(name: str):
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


def choose(x, SVh, U, A, B, bias, pivots) -> str:
    """The name of the room that serves these tensors. Raises ValueError with the room's own reason
    where forced."""
    name = _forced or _known(os.environ.get("HYLORA_BACKEND", "auto"), "HYLORA_BACKEND")
    if name != "auto":
        reason = ROOMS[name].unsupported(x, SVh, U, A, B, bias, pivots)
        if reason:
            raise ValueError(f"backend {name!r} can't serve this call: {reason}")
        return name
    for name, room in ROOMS.items():
        if room.unsupported(x, SVh, U, A, B, bias, pivots) is None:
            return name
    raise AssertionError("eager serves every call")


def _known(name: str, argument: str) -> str:
    if name not in ("auto", *ROOMS):
        raise ValueError(f"{argument} must be one of {('auto', *ROOMS)}, got {name!r}")
    return name
