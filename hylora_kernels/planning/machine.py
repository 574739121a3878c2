"""A machine as a plan sees it: its memory, and the rates at which it does what a compression does.

The rates are measured by the package's own functions (planning/probe.py), read from a report that
was made elsewhere, or those of a data sheet (planning/devices.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hylora_kernels.support.console import format_bytes, table
from hylora_kernels.support.report import Report

EIGH = 9.0  # Products that an eigendecomposition of [n, n] is counted as, times n^3.

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Machine(Report):
    """A machine, one process of a compression on it, and the source of the numbers.

    memory:   bytes in which the model is compressed: the machine's, or a GPU's.
    base:     resident bytes of a process that has imported the package and loaded nothing.
    forward:  FLOP/s of a decoder block without gradients; training: with those of its inputs.
    head:     FLOP/s of the output head with the loss and its gradient.
    gram:     (n, FLOP/s) of Gram matrices [n, n], counted as whole products.
    matmul:   (n, FLOP/s) of float64 products of [n, n]; eigh: of eigendecompositions, 9 n^3.
    cut:      (n, FLOP/s) of making a layer's factors from those of all ranks.
    rounding: weights a second that are quantised by feedback, in one width.
    write, read: bytes a second of the workspace's files, checksums included.
    load:     bytes a second of weights, from the file to a model that has been checked.
    bandwidth: bytes a second that a decoded token's weights are read at; latency: seconds that each
              block adds to a token.
    shared:   processes share its cores and memory, as on a CPU; else each has a device of its own.
    """

    name: str
    dtype: str
    memory: int
    base: int
    forward: float
    training: float
    head: float
    gram: Points
    matmul: Points
    eigh: Points
    cut: Points
    rounding: float
    write: float
    read: float
    load: float
    bandwidth: float
    latency: float = 0.0
    shared: bool = True
    source: str = "measured"

    def products(self, flops: float, n: float) -> float:
        """Seconds of float64 products whose smaller side is n."""
        return flops / rate_at(self.matmul, n)

    def eigenvectors(self, n: int) -> float:
        """Seconds of an eigendecomposition in float64."""
        return EIGH * n**3 / rate_at(self.eigh, n)

    def render(self) -> Any:
        """A line a rate."""

        def of(points: Points) -> str:
            return ", ".join(f"{rate / 1e9:,.4g} at {n}" for n, rate in points)

        rows: list[tuple[str, str]] = [
            ("memory", format_bytes(self.memory)),
            ("a process before it loads anything", format_bytes(self.base)),
            ("a block's forward, GFLOP/s", f"{self.forward / 1e9:,.4g}"),
            ("and backward", f"{self.training / 1e9:,.4g}"),
            ("output head and loss", f"{self.head / 1e9:,.4g}"),
            ("Gram matrices", of(self.gram)),
            ("float64 products", of(self.matmul)),
            ("eigenvectors (9 n^3)", of(self.eigh)),
            ("cut to a rank", of(self.cut)),
            ("rounding, M weights/s", f"{self.rounding / 1e6:,.4g}"),
            ("workspace, MB/s written", f"{self.write / 1e6:,.4g}"),
            ("workspace, MB/s read", f"{self.read / 1e6:,.4g}"),
            ("weights loaded, MB/s", f"{self.load / 1e6:,.4g}"),
            ("weights read by a token, GB/s", f"{self.bandwidth / 1e9:,.4g}"),
        ]
        return table(f"{self.name}, {self.dtype}: {self.source}", ("rate", "value"), rows)


def rate_at(points: Points, n: float) -> float:
    """The rate at a size between those of `points`, by a straight line of the logarithms; that of
    the nearest one outside of them."""
    points = sorted(points)
    if n <= points[0][0]:
        return points[0][1]
    for (low, a), (high, b) in itertools.pairwise(points):
        if n <= high:
            share = math.log(n / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(a) + share * math.log(b))
    return points[-1][1]


def read(path: str | Path) -> Machine:
    """The machine in a report of plan(), or of Machine.save(); ValueError naming the file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        found = found.get("machine", found)
        return Machine(**found)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(Machine))
        raise ValueError(f"machine: {path} has no rates ({error}); they are {names}") from None


def without_rates(memory: int) -> Machine:
    """A machine of so many bytes that takes no time, for sizes alone."""
    at_once, base = 1e30, psutil.Process().memory_info().rss
    points = [(1, at_once)]
    rates: dict[str, Any] = dict.fromkeys(
        ("forward", "training", "head", "rounding", "write", "read", "load", "bandwidth"), at_once
    )
    rates |= dict.fromkeys(("gram", "matmul", "eigh", "cut"), points)
    return Machine(name="none", dtype="none", memory=memory, base=base, **rates)
