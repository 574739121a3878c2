"""The rank of each layer: a budget of parameters, spent to lose as little as possible.

The candidates of a layer are the total ranks R = r + ra in multiples of `multiple`, and DENSE. Each
has a cost in parameters and an error, the sum of the squared singular values that it drops. Under
method "two_sided" that is the predicted increase of the loss in nats a token, one unit for all
layers. A rank that costs as much as the dense layer is no candidate, so no layer ever grows.

A budget of bytes, bits or time is spent in the same way on candidates that differ in bits, too
(compression/bits.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hylora_kernels.compression.options import AS_IS, POLICIES
from hylora_kernels.layers.factors import factor_count
from hylora_kernels.model.structure import check_pattern

DENSE = 0  # The rank of a layer that is left dense, without an adapter.


class Choice(NamedTuple):
    """A candidate of a layer: its total rank R, and the bits of its frozen matrices."""

    rank: int = DENSE
    bits: int = AS_IS


class Infeasible(ValueError):
    """A keep below `smallest`, the least that the cheapest ranks of all layers need."""

    def __init__(self, message: str, smallest: float):
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class Curve:
    """The candidates of a layer, cheapest first; the last is always the layer as it is, DENSE.

    dense_cost: what its share of a budget is counted from.
    ranks, costs, errors, bits: of each candidate; bits None: all AS_IS.
    total: the sum of all squared singular values.
    cost:  rank -> its parameters, for any rank, candidate or not.
    """

    path: str
    dense_cost: int
    ranks: np.ndarray
    costs: np.ndarray
    errors: np.ndarray
    total: float
    cost: Callable[[int], int]
    bits: np.ndarray | None = None

    def choice(self, index: int) -> Choice:
        """A candidate by its place."""
        return Choice(int(self.ranks[index]), AS_IS if self.bits is None else int(self.bits[index]))

    def error(self, rank: int) -> float:
        """The error of a candidate."""
        return float(self.errors[self.ranks == rank][0])

    def affordable(self, budget: float) -> int | None:
        """The index of the dearest candidate within `budget`, or None."""
        within = np.flatnonzero(self.costs <= budget)
        return int(within[-1]) if len(within) else None


def curve(
    path: str,
    shape: tuple[int, int],
    singular_values: Tensor | np.ndarray | list[float],
    form: str = "pivoted",
    multiple: int = 16,
    lora_rank: int = 0,
    count: str = "merged",
) -> Curve:
    """shape (N, K), singular_values [min(N, K)] descending -> the candidates of a layer.

    count: "merged" is the cost of rank R in the form; "as_is" that of the base rank R - ra in the
           form and of the separate adapter.
    """
    N, K = shape
    squares = np.asarray(singular_values, dtype=np.float64) ** 2
    tail = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    cost = partial(rank_cost, N=N, K=K, form=form, lora_rank=lora_rank, count=count)
    ranks = [rank for rank in range(multiple, min(N, K), multiple) if cost(rank) < N * K]
    return Curve(
        path,
        N * K,
        np.array([*ranks, DENSE]),
        np.array([*map(cost, ranks), N * K]),
        np.array([*(tail[rank] for rank in ranks), 0.0]),
        float(tail[0]),
        cost,
    )


def adapter_rank(total_rank: int, lora_rank: int) -> int:
    """The adapter's part ra of a layer's total rank R: lora_rank, but the base keeps rank 1."""
    return min(lora_rank, total_rank - 1)


def rank_cost(rank: int, N: int, K: int, form: str, lora_rank: int, count: str) -> int:
    """Parameters of a layer of total rank R, as curve() counts them."""
    if count == "merged":
        return factor_count(rank, K, N, form)
    adapter = adapter_rank(rank, lora_rank)
    return factor_count(rank - adapter, K, N, form) + adapter * (N + K)


def allocate(
    curves: list[Curve], keep: float, policy: str | dict[str, int | float] = "global"
) -> dict[str, int]:
    """path -> total rank R of each layer, DENSE (0) for one left dense.

    keep:   the budget as a share of all parameters; it is met from below.
    policy:
        "global"   the least total error within the budget (`spend`).
        "uniform"  each layer gets the largest rank within keep * its own parameters.
        "energy"   each layer gets the smallest rank that keeps a share of its energy, which is the
                   same for all layers and the largest that the budget allows.
        dict       pattern -> int, a rank, or float, the keep of the layers that match, on which it
                   is spent as by "global". A pattern is a path, which has precedence, or a regular
                   expression searched in paths; a layer belongs to the first one that matches. The
                   layers that nothing matches share a budget of `keep`.

    Raises ValueError for a keep outside (0, 1], an unknown policy, a pattern that matches nothing,
    and Infeasible for a budget below the cheapest ranks, naming the smallest feasible keep.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if isinstance(policy, dict):
        return _by_pattern(curves, keep, policy)
    chosen = choose(curves, keep, policy)
    return {c.path: int(c.ranks[i]) for c, i in zip(curves, chosen, strict=True)}


def choose(curves: list[Curve], keep: float, policy: str) -> list[int]:
    """The index of the candidate of each layer by a policy that is no dict, as allocate() says."""
    if policy not in POLICIES:
        raise ValueError(f"ranks must be one of {POLICIES} or a dict, got {policy!r}")
    if not curves:
        return []
    if policy == "uniform":
        chosen = [c.affordable(keep * c.dense_cost) for c in curves]
        if None in chosen:
            _infeasible(keep, least_keep(curves, policy))
    else:
        budget = keep * sum(c.dense_cost for c in curves)
        if sum(int(c.costs[0]) for c in curves) > budget:
            _infeasible(keep, least_keep(curves, policy))
        chosen = spend(curves, budget) if policy == "global" else _common_energy(curves, budget)
    return chosen


def least_keep(curves: list[Curve], policy: str) -> float:
    """The smallest keep that a policy can meet."""
    if policy == "uniform":
        return max(float(c.costs[0] / c.dense_cost) for c in curves)
    return sum(int(c.costs[0]) for c in curves) / sum(c.dense_cost for c in curves)


def spend(curves: list[Curve], budget: float) -> list[int]:
    """The index of the candidate of each layer that minimises the total error within `budget`.

    Lagrangian: each layer minimises error + price * cost, and the price is bisected on the budget.
    This reaches the lower convex hulls of the curves. The pivoted cost is concave, so a greedy
    choice of ranks would not: a layer may jump from a middle rank to dense. The rest of the budget
    is spent step by step on the layer whose next candidate saves the most error per parameter,
    until none fits.
    """

    def at(price: float) -> tuple[list[int], int]:
        chosen = [int(np.argmin(c.errors + price * c.costs)) for c in curves]
        return chosen, sum(int(c.costs[i]) for c, i in zip(curves, chosen, strict=True))

    chosen, cost = at(0.0)
    if cost > budget:
        low, high = 1e-300, 1.0
        while at(high)[1] > budget:
            high *= 1e3
        for _ in range(200):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if at(middle)[1] > budget else (low, middle)
        chosen, cost = at(high)
    while True:
        left, best, gain = budget - cost, None, -1.0
        for index, (c, i) in enumerate(zip(curves, chosen, strict=True)):
            if i + 1 < len(c.ranks) and (step := int(c.costs[i + 1] - c.costs[i])) <= left:
                per_parameter = (c.errors[i] - c.errors[i + 1]) / step
                if per_parameter > gain:
                    best, gain = index, per_parameter
        if best is None:
            return chosen
        cost += int(curves[best].costs[chosen[best] + 1] - curves[best].costs[chosen[best]])
        chosen[best] += 1


def _common_energy(curves: list[Curve], budget: float) -> list[int]:
    def at(share: float) -> list[int]:
        # The first candidate that drops at most 1 - share of the energy; errors fall along a curve.
        return [int(np.argmax(c.errors <= (1 - share) * c.total)) for c in curves]

    def fits(chosen: list[int]) -> bool:
        return sum(int(c.costs[i]) for c, i in zip(curves, chosen, strict=True)) <= budget

    low, high = 0.0, 1.0
    if fits(at(high)):
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


def _by_pattern(curves: list[Curve], keep: float, policy: dict[str, int | float]) -> dict[str, int]:
    for pattern in policy:
        check_pattern("ranks", pattern)
    owner = {c.path: _pattern_of(c.path, policy) for c in curves}
    ranks: dict[str, int] = {}
    for pattern, wanted in policy.items():
        mine = [c for c in curves if owner[c.path] == pattern]
        if not mine:
            raise ValueError(
                f"ranks: pattern {pattern!r} matches none that earlier ones leave of"
                f" {[c.path for c in curves][:8]} ..."
            )
        if isinstance(wanted, bool) or not isinstance(wanted, int | float):
            raise TypeError(
                f"ranks[{pattern!r}] must be an int (rank) or a float (keep),"
                f" got {type(wanted).__name__}"
            )
        if isinstance(wanted, float):
            try:
                ranks |= allocate(mine, wanted, "global")
            except ValueError as error:
                raise ValueError(f"ranks[{pattern!r}]: {error}") from None
        else:
            ranks |= {c.path: _explicit(c, pattern, wanted) for c in mine}
    rest = [c for c in curves if owner[c.path] is None]
    return ranks | allocate(rest, keep, "global")


def _pattern_of(path: str, policy: dict[str, int | float]) -> str | None:
    if path in policy:
        return path
    return next((pattern for pattern in policy if re.search(pattern, path)), None)


def _explicit(c: Curve, pattern: str, rank: int) -> int:
    if rank < 1:
        raise ValueError(f"ranks[{pattern!r}] must be at least 1, got {rank}")
    return rank if c.cost(rank) < c.dense_cost else DENSE


def _infeasible(keep: float, smallest: float) -> None:
    # Rounded up, and past a tie, where keep * parameters may come out slightly below the need.
    named = min(1.0, math.ceil(smallest * 1e4 * (1 + 1e-12)) / 1e4)
    raise Infeasible(
        f"keep={keep:g} can't be met: the smallest feasible keep with this form and rank_multiple"
        f" is {named:.4f}"
        " (a smaller rank_multiple allows less)",
        smallest,
    )
