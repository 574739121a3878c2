"""Wall time by stage."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall seconds of the `with` block to seconds[stage]; a block that raises adds none."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def timed_steps(seconds: dict[str, float], stage: str, steps: Iterable[Item]) -> Iterator[Item]:
    """The items of `steps`; the wall seconds that each takes to come are added to
    seconds[stage]."""
    iterator = iter(steps)
    while True:
        with timed(seconds, stage):
            found = list(itertools.islice(iterator, 1))
        if not found:
            return
        yield found.pop()
