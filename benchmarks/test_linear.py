"""Forward of one layer: ours, packed and not, over every baseline.

Up to 16 rows the weights come from the cache level named (L3 or DRAM), since a model's other layers
displace them before a layer is called again. With more rows there is one copy, which the other
rivals displace from L2 to L3 between two samples.
"""

from __future__ import annotations

import baselines
import ours
import pytest
from conftest import thread_counts
from layers import FEW_ROWS, MODELS, TUNED, UNTUNED, Case, Shape, check, random_factors
from record import record
from timing import interleave

from hylora_kernels import use_backend

ROWS = (1, 4, 16, 128, 512, 2048)
DTYPES = ("bf16", "fp32")
MOST_FLOPS = 30e9  # of a case without --full: above, one round in fp32 takes seconds


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        make = model_cases if metafunc.function is test_layers_of_models else cases
        metafunc.parametrize("case", make(metafunc.config), ids=str)


def cases(config) -> list[Case]:
    """Ordered so that neighbours share their weights."""
    quick, full = config.getoption("--quick"), config.getoption("--full")
    threads = thread_counts(config)
    if quick:
        grid = [(shape, "bf16", M, "L3") for shape in (TUNED[0], TUNED[3]) for M in (1, 128)]
        grid += [(TUNED[3], "fp32", 16, "L3")]
    else:
        grid = [(s, kind, M, "L3") for s in TUNED for kind in ("bf16", "fp32") for M in ROWS]
        kinds, rows = (("bf16", "fp16", "fp32"), ROWS) if full else (("bf16", "fp32"), (1, 16, 512))
        grid += [(s, kind, M, "L3") for s in UNTUNED for kind in kinds for M in rows]
        grid += [(TUNED[3], "fp16", M, "L3") for M in (1, 16, 512)]
        grid += [(s, "bf16", 1, "DRAM") for s in TUNED if s.K >= 2048]
    found = [Case(*place, count) for place in grid for count in threads]
    return found if full else [c for c in found if _affordable(c)]


def model_cases(config) -> list[Case]:
    """Few rows with weights from DRAM ("cold") and from L3 ("warm"), many rows as they come."""
    shapes, kinds = (MODELS[-1:], ("bf16",)) if config.getoption("--quick") else (MODELS, DTYPES)
    grid = [("DRAM", M) for M in (1, 7)] + [("L3", M) for M in (1, 7, 200, 1024)]
    return [
        Case(shape, kind, M, regime, threads)
        for threads in thread_counts(config)
        for shape in shapes
        for kind in kinds
        for regime, M in grid
    ]


def _affordable(case: Case) -> bool:
    cost = case.shape.flops(case.M) * (1 if case.dtype == "bf16" else 3)
    return cost < MOST_FLOPS and (case.shape.K < 4096 or case.shape in TUNED or case.M < 512)


@pytest.fixture(scope="module")
def rivals():
    """case -> name -> calls; kept for the next number of threads."""
    made = {}

    def make(case: Case):
        key = case.shape, case.dtype, case.M, case.regime
        if key not in made:
            made.clear()
            made[key] = _rivals(case)
        return made[key]

    yield make
    made.clear()


def _rivals(case: Case):
    x, shape, regime = case.x(), case.shape, case.regime if case.M <= FEW_ROWS else "one copy"
    factors = random_factors(shape, case.torch_dtype)
    found = {"packed": ours.packed(x, factors, regime)}
    found |= baselines.rivals(x, shape, factors, regime)
    if case.M > FEW_ROWS:
        found["op"] = ours.op(x, factors)
    for name, calls in found.items():
        if name != "dense":
            check(calls[0](), x, factors, name)
            check(calls[-1](), x, factors, name)
    if regime != "DRAM":  # as the pipeline deploys it: adapter merged, at the pair's rank r + ra
        merged = Shape(shape.K, shape.N, shape.r + shape.ra, 0)
        factors = random_factors(merged, case.torch_dtype, "pivoted")
        found["pivoted"] = ours.packed(x, factors, regime)
        check(found["pivoted"][0](), x, factors, "pivoted")
    return found


def test_forward(benchmark, case, rivals, backend, limits, with_threads, quick):
    with_threads(case.threads)
    with use_backend(backend):
        contest = rivals(case)
        times = interleave(contest, 0.2 if quick else 0.3, lead_in=case.regime != "DRAM")
        record(benchmark, "linear", case, times, limits(case.threads), "packed")
        benchmark.pedantic(contest["packed"][0], rounds=5)


def test_layers_of_models(benchmark, case, backend, limits, with_threads, quick):
    """Beside two products, through torch and through oneDNN with prepacked weights."""
    with_threads(case.threads)
    x, regime = case.x(), case.regime if case.M <= FEW_ROWS else "one copy"
    factors = random_factors(case.shape, case.torch_dtype)
    with use_backend(backend):
        contest = {"packed": ours.packed(x, factors, regime)}
        contest |= baselines.rivals(x, case.shape, factors, regime, ("b", "d"))
        for name, calls in contest.items():
            check(calls[-1](), x, factors, name)
        budget = 0.2 if quick else 0.3
        times = interleave(contest, budget, lead_in=case.regime != "DRAM")
        record(benchmark, "models", case, times, limits(case.threads), "packed")
        benchmark.pedantic(contest["packed"][0], rounds=1)
