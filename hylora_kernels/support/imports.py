"""Modules of this package that are imported once another library is."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def import_after(modules: Mapping[str, str]) -> None:
    """Import modules of ours right after those of other libraries, which they extend.

    modules: full name of the other's module -> full name of ours. The other's is never imported
             here; if that has happened, ours is imported at once.

    Ours can fail in a version of the library that it doesn't know. Then the library works without
    it, and a warning says so: a program may need nothing of ours.
    """
    sys.meta_path.insert(0, _ImportAfter(modules))
    for name in modules:
        if name in sys.modules:
            _extend(name, modules[name])


def _extend(name: str, ours: str) -> None:
    try:
        import_module(ours)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{name} goes without {ours}: {reason}", RuntimeWarning, stacklevel=2)


class _ImportAfter(MetaPathFinder):
    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _extend(name, self.modules[name])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
