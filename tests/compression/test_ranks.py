"""Budgets: never exceeded, never wasted, never met by a layer that grows; every policy.

`pytest tests/test_ranks.py -s` prints a line for every random allocation.
"""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from hylora_kernels.compression.options import POLICIES
from hylora_kernels.compression.ranks import (
    DENSE,
    adapter_rank,
    allocate,
    curve,
    spend,
)
from hylora_kernels.layers.linear import SVDLoRALinear

# name -> the linears of one block, N x K
ARCHITECTURES = {
    "SmolLM2-135M": [(576, 576), (192, 576), (192, 576), (576, 576)]
    + [(1536, 576), (1536, 576), (576, 1536)],
    "TinyLlama-1.1B": [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048)]
    + [(5632, 2048), (5632, 2048), (2048, 5632)],
    "GPT-2": [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    "Pythia-70M": [(1536, 512), (512, 512), (2048, 512), (512, 2048)],
    "Gemma-270M": [(1024, 640), (256, 640), (256, 640), (640, 1024)]
    + [(2048, 640), (2048, 640), (640, 2048)],
    "odd": [(37, 129), (101, 53), (53, 101), (8, 90), (200, 200)],
    "tiny": [(32, 32), (16, 32), (16, 32), (32, 32), (56, 32), (56, 32), (32, 56)],
}


def layers_of(architecture, blocks, generator):
    """(path, (N, K), singular values) of all layers, with spectra from flat to steep."""
    for block, (index, (N, K)) in itertools.product(
        range(blocks), enumerate(ARCHITECTURES[architecture])
    ):
        values = generator.exponential(size=min(N, K)) * np.exp(
            -generator.uniform(0, 6) * np.linspace(0, 1, min(N, K))
        )
        scale = 10 ** generator.uniform(-1, 1)
        yield f"layers.{block}.linear_{index}", (N, K), scale * np.sort(values)[::-1]


def parameters(rank, shape, form, lora_rank, count):
    """Parameters of a layer of total rank `rank`, from the shapes of its tensors."""
    N, K = shape
    if rank == DENSE:
        return N * K
    if count == "as_is":
        adapter = min(lora_rank, rank - 1)
        return parameters(rank - adapter, shape, form, 0, "merged") + adapter * (N + K)
    return rank * K + (N if form == "pair" else N - rank) * rank


def candidates(shape, form, multiple, lora_rank, count):
    """rank -> parameters of everything a layer may become, cheapest first, dense last."""
    N, K = shape
    costs = {r: parameters(r, shape, form, lora_rank, count) for r in range(1, min(N, K))}
    costs = {r: cost for r, cost in costs.items() if r % multiple == 0 and cost < N * K}
    return costs | {DENSE: N * K}


class Triple:
    """One random (architecture, policy, budget) with a random form, multiple and adapter."""

    def __init__(self, seed):
        draw, generator = random.Random(seed), np.random.default_rng(seed)
        self.architecture = draw.choice(list(ARCHITECTURES))
        self.policy = draw.choice(POLICIES)
        self.keep = draw.choice([1.0, 0.8, 0.5, *(draw.uniform(0.02, 1) for _ in range(5))])
        self.form, self.count = draw.choice(["pair", "pivoted"]), draw.choice(["merged", "as_is"])
        self.multiple = draw.choice([1, 4, 8, 16, 32, 128])
        self.lora_rank = draw.choice([0, 1, 8, 16, 64, 128])
        self.layers = list(layers_of(self.architecture, draw.randint(1, 3), generator))
        self.shapes = {path: shape for path, shape, _ in self.layers}
        kind = (self.form, self.multiple, self.lora_rank, self.count)
        self.curves = [curve(path, shape, values, *kind) for path, shape, values in self.layers]
        self.candidates = {path: candidates(shape, *kind) for path, shape, _ in self.layers}
        self.dense = sum(N * K for N, K in self.shapes.values())

    def costs(self, chosen):
        """path -> parameters; a rank that is no candidate is a KeyError."""
        return {path: self.candidates[path][rank] for path, rank in chosen.items()}

    def shares(self, chosen):
        """path -> the share of the squared singular values that stays."""
        squares = {path: values**2 for path, _, values in self.layers}
        return {
            path: 1.0 if rank == DENSE else squares[path][:rank].sum() / squares[path].sum()
            for path, rank in chosen.items()
        }


def allocate_or_least(triple):
    """The allocation at triple.keep, or, where that can't be met, at the least that can."""
    try:
        return triple.keep, allocate(triple.curves, triple.keep, triple.policy)
    except ValueError as error:
        least = float(re.search(r"smallest feasible keep .* is (\d\.\d{4})", str(error)).group(1))
        assert triple.keep < least
        with pytest.raises(ValueError, match=f"keep={least - 1e-3:g} can't be met"):
            allocate(triple.curves, least - 1e-3, triple.policy)
        return least, allocate(triple.curves, least, triple.policy)


@pytest.mark.parametrize("seed", range(100))
def test_budget(seed):
    triple = Triple(seed)
    keep, chosen = allocate_or_least(triple)
    costs = triple.costs(chosen)
    kept, budget = sum(costs.values()), keep * triple.dense
    asked = "" if keep == triple.keep else f" (least feasible; asked {triple.keep:.4f})"
    print(
        f"\n{triple.architecture:15}{triple.policy:8} {triple.form:8} ra {triple.lora_rank:<4}"
        f"multiple {triple.multiple:<4}{triple.count:7} keep {keep:.4f}{asked}: "
        f"budget {budget:,.0f}, kept {kept:,} = {kept / triple.dense:.4f}",
        end="",
    )
    assert list(chosen) == [path for path, _, _ in triple.layers]
    assert kept <= budget and kept <= triple.dense
    for path, (N, K) in triple.shapes.items():
        assert costs[path] <= N * K
        if triple.form == "pair" and chosen[path] and triple.count == "merged":
            assert chosen[path] < N * K / (N + K)
    check = {"global": check_global, "uniform": check_uniform, "energy": check_energy}
    check[triple.policy](triple, keep, chosen, costs)


def next_step(triple, path, cost):
    """The extra cost of the next dearer candidate; infinite for a dense layer."""
    dearer = [c for c in triple.candidates[path].values() if c > cost]
    return min(dearer) - cost if dearer else float("inf")


def check_global(triple, keep, chosen, costs):
    left = keep * triple.dense - sum(costs.values())
    assert all(left < next_step(triple, path, cost) for path, cost in costs.items())


def check_uniform(triple, keep, chosen, costs):
    for path, (N, K) in triple.shapes.items():
        assert costs[path] <= keep * N * K < costs[path] + next_step(triple, path, costs[path])


def check_energy(triple, keep, chosen, costs):
    def by_share(share):
        """The smallest candidate of each layer that keeps the share."""
        ranks = {}
        for path, of_layer in triple.candidates.items():
            kept = {rank: triple.shares({path: rank})[path] for rank in of_layer}
            ranks[path] = next(rank for rank in of_layer if kept[rank] >= share - 1e-9)
        return ranks

    common = min(triple.shares(chosen).values())
    assert chosen == by_share(common)
    if common < 1 - 1e-9:  # Otherwise all layers keep everything, and no more could be bought.
        assert sum(triple.costs(by_share(common + 1e-7)).values()) > keep * triple.dense


# -------------------------------------------------------------------------------- what a rank costs


@pytest.mark.parametrize("count", ["merged", "as_is"])
@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("lora_rank", [0, 1, 8, 20])
@pytest.mark.parametrize(("N", "K"), [(24, 40), (40, 24), (31, 31)])
def test_costs_are_those_of_the_layers_made(N, K, lora_rank, form, count):
    c = curve("path", (N, K), np.ones(min(N, K)), form, 3, lora_rank, count)
    for rank, cost in zip(c.ranks[:-1].tolist(), c.costs[:-1].tolist(), strict=True):
        adapter = adapter_rank(rank, lora_rank)
        linear = nn.Linear(K, N, bias=False, dtype=torch.float64)
        layer = SVDLoRALinear.from_linear(linear, rank - adapter, adapter, form=form)
        layer = layer.merge() if count == "merged" else layer
        assert sum(p.numel() for p in layer.parameters()) == cost == c.cost(rank) < N * K
        assert layer.rank + layer.lora_rank == rank
    assert (c.ranks[-1], c.costs[-1], c.errors[-1]) == (DENSE, N * K, 0.0)
    assert (np.diff(c.costs) > 0).all()


def test_errors_are_the_squares_dropped():
    c = curve("path", (6, 7), [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], multiple=2)
    assert c.ranks.tolist() == [2, 4, DENSE]
    assert c.errors.tolist() == [14.25, 1.25, 0.0] and c.total == 55.25


def test_an_adapter_leaves_the_base_a_rank():
    assert [adapter_rank(16, ra) for ra in (0, 8, 15, 16, 64)] == [0, 8, 15, 15, 15]


# --------------------------------------------------------------------------------- against the best


def small_problem(seed, layers):
    generator = np.random.default_rng(seed)
    curves = []
    for index in range(layers):
        N, K = (int(size) for size in generator.integers(8, 30, 2))
        values = np.sort(generator.exponential(size=min(N, K)))[::-1] * generator.uniform(0.3, 3)
        values = values * np.exp(-generator.uniform(0, 0.3) * np.arange(min(N, K)))
        form = generator.choice(["pair", "pivoted"])
        curves.append(curve(f"layer{index}", (N, K), values, form, int(generator.integers(2, 7))))
    low, high = (sum(int(c.costs[end]) for c in curves) for end in (0, -1))
    return curves, generator.uniform(low, high)


def total(curves, chosen, what):
    return sum(float(getattr(c, what)[i]) for c, i in zip(curves, chosen, strict=True))


def hull(c):
    """The indices of a curve's lower convex hull, cheapest first."""
    corners = [0]
    while corners[-1] != len(c.ranks) - 1:
        i = corners[-1]
        slopes = (c.errors[i] - c.errors[i + 1 :]) / (c.costs[i + 1 :] - c.costs[i])
        corners.append(i + 1 + int(np.argmax(slopes)))
    return corners


def one_step(curves, budget):
    """The error that the first edge of the hulls beyond the budget would save."""
    edges = sorted(
        ((c.errors[a] - c.errors[b]) / (c.costs[b] - c.costs[a]), c.costs[b] - c.costs[a])
        for c in curves
        for a, b in itertools.pairwise(hull(c))
    )
    left = budget - sum(c.costs[0] for c in curves)
    for gain, cost in reversed(edges):
        left -= cost
        if left < 0:
            return gain * cost
    return 0.0


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_error_is_within_one_step_of_the_best(seed, layers):
    curves, budget = small_problem(seed, layers)
    chosen = spend(curves, budget)
    fitting = (
        pick
        for pick in itertools.product(*(range(len(c.ranks)) for c in curves))
        if total(curves, pick, "costs") <= budget
    )
    best = min(total(curves, pick, "errors") for pick in fitting)
    assert total(curves, chosen, "costs") <= budget
    error = total(curves, chosen, "errors")
    assert best - 1e-9 <= error <= best + one_step(curves, budget) + 1e-9


def test_most_small_problems_are_solved_exactly():
    solved = 0
    for seed in range(100):
        curves, budget = small_problem(seed, 2)
        picks = itertools.product(*(range(len(c.ranks)) for c in curves))
        fitting = (pick for pick in picks if total(curves, pick, "costs") <= budget)
        best = min(total(curves, pick, "errors") for pick in fitting)
        solved += total(curves, spend(curves, budget), "errors") <= best + 1e-9
    assert solved > 80


def test_a_layer_may_jump_from_a_middle_rank_to_dense():
    flat = curve("flat", (64, 64), np.ones(64))
    steep = curve("steep", (64, 64), 10.0 ** -np.arange(64))
    assert allocate([flat, steep], 0.75) == {"flat": DENSE, "steep": 16}


def test_layers_without_any_error_stay_small():
    zero = curve("zero", (64, 64), np.zeros(64))
    other = curve("other", (64, 64), np.ones(64))
    assert allocate([zero, other], 0.8)["other"] == DENSE


# ------------------------------------------------------------------------------ least feasible keep


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("multiple", [1, 16, 100])
def test_a_budget_that_cannot_be_met_names_the_least_that_can(policy, form, multiple):
    curves = [
        curve(str(i), shape, np.ones(min(shape)), form, multiple)
        for i, shape in enumerate([(64, 64), (40, 200), (500, 30)])
    ]
    with pytest.raises(ValueError, match=r"keep=1e-05 can't be met") as caught:
        allocate(curves, 1e-5, policy)
    least = float(re.search(r"is (\d\.\d{4}) ", str(caught.value)).group(1))
    chosen = allocate(curves, least, policy)
    assert set(chosen.values()) <= {multiple, DENSE} or policy == "uniform"
    with pytest.raises(ValueError, match="can't be met"):
        allocate(curves, least - 2e-4, policy)


@pytest.mark.parametrize("numerator", range(1, 100))
def test_the_least_feasible_keep_survives_rounding(numerator):
    # keep * parameters in floating point may come out below the whole number that is meant.
    c = curve("path", (100, 100), np.ones(100), "pair", multiple=200)
    c = type(c)(**{**vars(c), "costs": np.array([100 * numerator]), "dense_cost": 10_000})
    for policy in POLICIES:
        with pytest.raises(ValueError, match="smallest feasible keep") as caught:
            allocate([c], numerator / 100 - 1e-3, policy)
        least = float(re.search(r"is (\d\.\d{4}) ", str(caught.value)).group(1))
        assert allocate([c], least, policy)
        assert least - numerator / 100 < 2e-4


@pytest.mark.parametrize("policy", POLICIES)
def test_everything_can_be_kept(policy):
    curves = [curve(str(i), (20 + i, 30), np.arange(20.0 + i, 0, -1)) for i in range(4)]
    assert set(allocate(curves, 1.0, policy).values()) == {DENSE}


def test_a_layer_smaller_than_a_rank_multiple_stays_dense():
    curves = [curve("small", (12, 64), np.ones(12)), curve("large", (64, 64), np.ones(64))]
    assert allocate(curves, 0.8)["small"] == DENSE


# ----------------------------------------------------------------------------------------- patterns


@pytest.fixture
def block():
    """Curves of two blocks of a small Llama."""
    shapes = dict(zip(("q_proj", "o_proj", "up_proj", "down_proj"), [(64, 64)] * 4, strict=True))
    generator = np.random.default_rng(0)
    return [
        curve(
            f"layers.{i}.{name}", shape, np.sort(generator.exponential(size=64))[::-1], multiple=8
        )
        for i in range(2)
        for name, shape in shapes.items()
    ]


def kept(curves, chosen, pattern):
    mine = [c for c in curves if re.search(pattern, c.path)]
    cost = sum(c.dense_cost if chosen[c.path] == DENSE else c.cost(chosen[c.path]) for c in mine)
    return cost / sum(c.dense_cost for c in mine)


def test_keeps_by_type(block):
    chosen = allocate(block, 0.9, {"q_proj|o_proj": 0.8, "up|down": 0.5})
    assert list(chosen) and set(chosen) == {c.path for c in block}
    assert 0.7 < kept(block, chosen, "q_proj|o_proj") <= 0.8
    assert 0.4 < kept(block, chosen, "up|down") <= 0.5


def test_the_rest_is_spent_keep_on(block):
    chosen = allocate(block, 0.6, {"q_proj": 24})
    assert {chosen[path] for path in chosen if "q_proj" in path} == {24}
    assert 0.55 < kept(block, chosen, "o_proj|up_proj|down_proj") <= 0.6


def test_explicit_ranks_by_path_and_pattern(block):
    paths = [c.path for c in block]
    assert allocate(block, 0.1, {path: 17 for path in paths}) == dict.fromkeys(paths, 17)
    # An exact path has precedence over a pattern, an earlier pattern over a later one.
    policy = {r"\.1\.": 5, "proj": 20, "layers.1.up_proj": 9, "layers.0.up_proj": 7}
    assert allocate(block, 0.1, policy) == {
        "layers.0.q_proj": 20,
        "layers.0.o_proj": 20,
        "layers.0.up_proj": 7,
        "layers.0.down_proj": 20,
        "layers.1.q_proj": 5,
        "layers.1.o_proj": 5,
        "layers.1.up_proj": 9,
        "layers.1.down_proj": 5,
    }


@pytest.mark.parametrize("rank", [63, 64, 65, 10**9])
def test_a_rank_that_saves_nothing_means_dense(rank):
    pivoted, pair = (curve(form, (64, 64), np.ones(64), form) for form in ("pivoted", "pair"))
    chosen = allocate([pivoted, pair], 0.5, {"p": rank})
    assert chosen == {"pivoted": rank if rank == 63 else DENSE, "pair": DENSE}


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("globl", ValueError, r"ranks must be one of \('global', 'uniform', 'energy'\) or a dict"),
        ({"mpl": 0.5}, ValueError, "ranks: pattern 'mpl' matches none that"),
        (
            {"proj": 0.5, "up": 0.5},
            ValueError,
            "ranks: pattern 'up' matches none that earlier ones",
        ),
        ({"(": 0.5}, ValueError, r"ranks: '\(' is no regular expression"),
        ({3: 0.5}, TypeError, r"ranks must hold patterns \(str\), got int"),
        ({"up": "half"}, TypeError, r"ranks\['up'\] must be an int \(rank\) or a float \(keep\)"),
        ({"up": True}, TypeError, r"ranks\['up'\] must be an int"),
        ({"up": 0}, ValueError, r"ranks\['up'\] must be at least 1, got 0"),
        ({"up": 1.5}, ValueError, r"ranks\['up'\]: keep must be in \(0, 1\], got 1.5"),
        ({"up": 0.01}, ValueError, r"ranks\['up'\]: keep=0.01 can't be met: the smallest"),
    ],
)
def test_bad_policies(block, policy, error, message):
    with pytest.raises(error, match=message):
        allocate(block, 0.8, policy)


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan")])
@pytest.mark.parametrize("policy", [*POLICIES, {"up": 0.5}])
def test_bad_keeps(block, keep, policy):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got"):
        allocate(block, keep, policy)


def test_no_layers():
    assert [allocate([], 0.5, policy) for policy in (*POLICIES, {})] == [{}] * 4
