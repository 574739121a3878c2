"""Wall time by stage."""

from __future__ import annotations

import time
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], stage: str):
    """Add the wall seconds of the `with` to seconds[stage]."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
