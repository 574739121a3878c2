"""Every check of a kernel in triton's interpreter at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from triton_interpreter import bf16, guards, resident
from triton_interpreter.internals import hurried


@contextlib.contextmanager
def checked(seed: int = 0) -> Iterator[list[list[int]]]:
    """bfloat16 repaired, faults raised, all programs of a launch together; see resident.together.

    The guards come first, within the switching: they are to see an atomic when it happens.
    """
    with hurried(), bf16.repaired(), guards.watching(), resident.together(seed) as orders:
        yield orders
