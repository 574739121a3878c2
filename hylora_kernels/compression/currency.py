"""The currency of a budget over rank and bits: bytes of the file, mean bits, or time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hylora_kernels.compression.budget import MB, format_size
from hylora_kernels.compression.costs import Costs, as_is
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.ranks import Choice, Curve
from hylora_kernels.compression.times import Times
from hylora_kernels.model.structure import Target


@dataclass(frozen=True)
class Currency:
    """A budget, and what candidates cost in it.

    argument, wanted: the option that gives the budget, and its value.
    price: (matrix, candidate) -> its cost. whole: matrix -> what its share is counted from.
    rest:  the cost of what has no candidates.
    unit:  (the sum of whole) -> the cost that 1 of `wanted` stands for.
    show:  a value of the option in words. dense: (curves) -> that of the model as it is.
    """

    argument: str
    wanted: float
    price: Callable[[Target, Choice], int]
    whole: Callable[[Target], int]
    rest: int
    unit: Callable[[float], float]
    show: Callable[[float], str]
    dense: Callable[[Sequence[Curve]], str]

    def share(self, curves: Sequence[Curve]) -> float:
        """The budget of these curves over the sum of their dense costs."""
        whole = _whole(curves)
        return (self.wanted * self.unit(whole) - self.rest) / whole

    def given(self, share: float, curves: Sequence[Curve]) -> float:
        """The value of the option that leaves the curves a share of their dense costs."""
        whole = _whole(curves)
        return (share * whole + self.rest) / self.unit(whole)


def in_bytes(costs: Costs, options: CompressOptions) -> Currency:
    """target_mb, of the whole file."""
    mb = Currency(
        argument="target_mb",
        wanted=options.target_mb or 0.0,
        price=costs.bytes,
        whole=lambda target: costs.bytes(target, as_is(target)),
        rest=costs.rest,
        unit=lambda whole: MB,
        show=format_size,
        dense=lambda curves: f"{format_size(mb.given(1.0, curves))} MB",
    )
    return mb


def in_bits(costs: Costs, options: CompressOptions) -> Currency:
    """A mean over the numbers that the linears have."""
    return Currency(
        argument="bits",
        wanted=float(options.bits or 0),
        price=costs.bits,
        whole=lambda target: costs.numbers(target, as_is(target)),
        rest=0,
        unit=lambda whole: whole,
        show=format_size,
        dense=lambda curves: "16",
    )


def in_time(times: Times, options: CompressOptions) -> Currency:
    """A share of the time of all linears."""
    workload = options.workload
    return Currency(
        argument="target_time",
        wanted=workload.share,
        price=times.nanoseconds,
        whole=lambda target: times.nanoseconds(target, as_is(target)),
        rest=times.rest,
        unit=lambda whole: whole + times.rest,
        show=lambda share: str(workload._replace(share=share)),
        dense=lambda curves: "1",
    )


def _whole(curves: Sequence[Curve]) -> float:
    return sum(c.dense_cost for c in curves)
