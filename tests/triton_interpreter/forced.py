"""The Triton backend with tiles and kernels of the test's choosing."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

from hylora_kernels.backends.shared import counters
from hylora_kernels.backends.triton import launch
from hylora_kernels.backends.triton.config import AdapterGradientsConfig, Config, Target


class NotAllZero(AssertionError):
    """A launch has left counters other than zero, from which the next one would count on."""


@dataclass(frozen=True)
class Tiles:
    """The configs of every launch."""

    layer: Config
    adapter_gradients: AdapterGradientsConfig
    programs: int = 3  # of the layer kernel


@contextlib.contextmanager
def forced(tiles: Tiles, kernels: ModuleType | None = None) -> Iterator[None]:
    """Launch with `tiles` whatever the backend has chosen, `kernels` in the place of its own.

    Raises NotAllZero after a launch that leaves a counter other than zero.
    """
    target = Target("interpreter", 0, tiles.programs)
    kept: dict = {}  # fresh counters: a failed launch leaves any number in its own

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

    made = {
        "layer": launching(launch.layer, config=tiles.layer, target=target),
        "adapter_gradients": launching(launch.adapter_gradients, config=tiles.adapter_gradients),
        "kernels": kernels or launch.kernels,
    }
    with mock.patch.multiple(launch, **made), mock.patch.object(counters, "_kept", kept):
        yield


def load_kernels(source: str, folder: Path) -> ModuleType:
    """Kernels from their text, which has to lie in a file: triton reads it there."""
    path = folder / "mutant_kernels.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutant_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module
