"""Marks for torch.compile that cost no import of its tracer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def assume_constant_result(function: Function) -> Function:
    """torch.compiler.assume_constant_result without its import of torch._dynamo.

    That import takes longer than torch's own (1.6 s of CPU time against 1.5), and every process
    that imports this package would pay for it, compiling or not. A test compares the two marks.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
