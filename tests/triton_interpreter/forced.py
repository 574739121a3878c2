"""The Triton room with tiles of the test's choosing, and with other kernels where asked."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

from hylora_kernels.backends.shared import counters
from hylora_kernels.backends.triton import launch
from hylora_kernels.backends.triton.config import Config, Target, ThinConfig


class NotAllZero(AssertionError):
    """A launch has left counters behind that the next one would go on counting from."""


@dataclass(frozen=True)
class Tiles:
    """What every launch of the room is made with."""

    flow: Config
    thin: ThinConfig
    programs: int = 3  # of the dataflow kernel


@contextlib.contextmanager
def forced(tiles: Tiles, kernels: ModuleType | None = None) -> Iterator[None]:
    """Launch with `tiles` whatever the room has chosen, `kernels` in the place of its own.

    Raises NotAllZero after a launch that leaves a counter other than zero.
    """
    target = Target("interpreter", 0, tiles.programs)
    kept: dict = {}  # fresh counters: a launch that failed leaves any number in its own

    def launching(function, **choice):
        signature = inspect.signature(function)

        def run(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.arguments.update(choice)
            result = function(*bound.args, **bound.kwargs)
            for name, zeros in kept.items():
                if zeros.any():
                    raise NotAllZero(f"{name}: {zeros.nonzero().flatten().tolist()}")
            return result

        return run

    flow = launching(launch.dataflow, config=tiles.flow, target=target)
    thin = launching(launch.thin, config=tiles.thin)
    made = {"dataflow": flow, "thin": thin, "kernels": kernels or launch.kernels}
    with mock.patch.multiple(launch, **made), mock.patch.object(counters, "_kept", kept):
        yield
