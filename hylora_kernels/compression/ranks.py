"""Which rank each layer keeps: a budget of parameters spent where the loss needs it most.

A layer's candidates are ranks R = r + ra in multiples of `multiple`, and staying dense; each has a
cost in parameters and an error, the sum of the squared singular values it drops. A rank that costs
as much as the dense layer is no candidate, so no layer ever grows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from hylora_kernels.compression.options import POLICIES
from hylora_kernels.layers.linear import factor_count
from hylora_kernels.model.structure import check_pattern

DENSE = 0  # the rank that stands for "left dense, no adapter"


@dataclass(frozen=True)
class Curve:
    """A layer's candidates, cheapest first; the last is always DENSE.

    total: the sum of all squared singular values. cost(rank): the parameters of any rank, candidate
           or not.
    """

    path: str
    dense_cost: int
    ranks: np.ndarray
    costs: np.ndarray
    errors: np.ndarray
    total: float
    cost: Callable[[int], int]

    def affordable(self, budget: float) -> int | None:
        """The index of the dearest candidate within `budget`, None where there is none."""
        within = np.flatnonzero(self.costs <= budget)
        return int(within[-1]) if len(within) else None


def curve(
    path: str,
    shape: tuple[int, int],
    singular_values,
    form: str = "pivoted",
    multiple: int = 16,
    lora_rank: int = 0,
    count: str = "merged",
) -> Curve:
    """shape (N, K), singular_values [min(N, K)] descending -> the layer's candidates.

    count: "merged" costs rank R in the form; "as_is" costs base rank R - ra in the form plus the
           separate adapter.
    """
    N, K = shape
    squares = np.asarray(singular_values, dtype=np.float64) ** 2
    tail = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    cost = partial(_cost, N=N, K=K, form=form, lora_rank=lora_rank, count=count)
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
    """What of a layer's rank R the adapter takes: lora_rank, leaving the base at least rank 1."""
    return min(lora_rank, total_rank - 1)


def _cost(rank: int, N: int, K: int, form: str, lora_rank: int, count: str) -> int:
    if count == "merged":
        return factor_count(rank, K, N, form)
    adapter = adapter_rank(rank, lora_rank)
    return factor_count(rank - adapter, K, N, form) + adapter * (N + K)


def allocate(curves: list[Curve], keep: float, policy: str | dict = "global") -> dict[str, int]:
    """path -> total rank R of each layer, DENSE (0) for those that stay dense.

    policy:
        "global"   one budget of keep * (all parameters), met from below, least total error
                   (`spend`)
        "uniform"  each layer the largest rank within keep * (its own parameters)
        "energy"   each layer the smallest rank that keeps one share of its energy, common to all:
                   the largest share whose ranks fit the budget
        dict       pattern (regular expression searched in the path; an exact path goes first) -> an
                   int, the rank; or a float, the keep of the layers it matches, spent over them as
                   "global" does. Layers that nothing matches are spent `keep` on together.
    Raises ValueError for a keep outside (0, 1], an unknown policy, a pattern that matches nothing,
    or a budget below the cheapest ranks, naming the smallest feasible keep.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if isinstance(policy, dict):
        return _by_pattern(curves, keep, policy)
    if policy not in POLICIES:
        raise ValueError(f"ranks must be one of {POLICIES} or a dict, got {policy!r}")
    if not curves:
        return {}
    if policy == "uniform":
        chosen = [c.affordable(keep * c.dense_cost) for c in curves]
        if None in chosen:
            _infeasible(keep, max(c.costs[0] / c.dense_cost for c in curves))
    else:
        budget = keep * sum(c.dense_cost for c in curves)
        cheapest = sum(int(c.costs[0]) for c in curves)
        if cheapest > budget:
            _infeasible(keep, cheapest / sum(c.dense_cost for c in curves))
        chosen = spend(curves, budget) if policy == "global" else _common_energy(curves, budget)
    return {c.path: int(c.ranks[i]) for c, i in zip(curves, chosen, strict=True)}


def spend(curves: list[Curve], budget: float) -> list[int]:
    """The candidate of each layer that minimises the summed error within `budget` parameters.

    Lagrangian: each layer minimises error + price * cost, and the price is bisected on the budget.
    That only reaches the lower convex hulls of the curves (the pivoted cost is concave: no greedy
    price per rank would do, and a layer may jump from a middle rank to dense). What is left then
    goes, step by step, to the step that gains most per parameter, until no layer's next step fits.
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
        # the first candidate that drops no more than 1 - share of the energy; errors fall along a
        # curve
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


def _by_pattern(curves: list[Curve], keep: float, policy: dict) -> dict[str, int]:
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


def _pattern_of(path: str, policy: dict) -> str | None:
    if path in policy:
        return path
    return next((pattern for pattern in policy if re.search(pattern, path)), None)


def _explicit(c: Curve, pattern: str, rank: int) -> int:
    if rank < 1:
        raise ValueError(f"ranks[{pattern!r}] must be at least 1, got {rank}")
    return rank if c.cost(rank) < c.dense_cost else DENSE


def _infeasible(keep: float, smallest: float) -> None:
    # Rounded up, and past a tie: there keep * parameters may come out a hair below what is needed.
    named = min(1.0, math.ceil(smallest * 1e4 * (1 + 1e-12)) / 1e4)
    raise ValueError(
        f"keep={keep:g} can't be met: the smallest feasible keep with this form and rank_multiple"
        f" is {named:.4f}"
        " (a smaller rank_multiple allows less)"
    )
