"""The checks of test_interpreter.py catch bugs that are put into the Triton kernels, one at a time.

A mutant is a textual change of kernels.py, loaded as a module of its own. It names the check that
must catch it; the unchanged source must pass all checks. `pytest -s` prints the table.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "interpreted and compiled kernels can't share a process: TRITON_INTERPRET=1 runs these",
        allow_module_level=True,
    )

from helpers.numerics import Case, assert_as_exact_as_formula, by_op, make_dy, make_inputs
from triton_interpreter import resident
from triton_interpreter.checked import checked
from triton_interpreter.forced import NotAllZero, Tiles, forced, load_kernels
from triton_interpreter.guards import OutOfBounds, Race
from triton_interpreter.resident import Deadlock

from hylora_kernels import svd_lora_linear, use_backend
from hylora_kernels.backends.triton import kernels
from hylora_kernels.backends.triton.config import AdapterGradientsConfig, Config

SOURCE = Path(kernels.__file__).read_text()


class Trial(NamedTuple):
    """A call and its gradients, in the orders that `seeds` draw."""

    case: Case
    tiles: Tiles
    seeds: range = range(8)


TRIALS = {
    "pair": Trial(
        Case(M=19, sizes=(40, 37, 20), lora_rank=3, layout="padded"),
        Tiles(Config(16, 16, 32, 32, 32), AdapterGradientsConfig(16, 32, 16, split=2), programs=4),
    ),
    "decode": Trial(
        Case(M=3, sizes=(40, 24, 12), lora_rank=18, layout="every_second"),
        Tiles(
            Config(16, 16, 16, 16, 16, split=3, swap=True),
            AdapterGradientsConfig(16, 32, 16),
            programs=4,
        ),
    ),
    "pivoted": Trial(
        Case(M=17, sizes=(20, 40, 12), lora_rank=3, form="pivoted"),
        Tiles(
            Config(16, 16, 16, 32, 16, split=2),
            AdapterGradientsConfig(16, 32, 16, split=3),
            programs=3,
        ),
        seeds=range(2),
    ),
    "row": Trial(
        Case(M=1, sizes=(33, 21, 9), lora_rank=3, layout="every_second"),
        Tiles(
            Config(1, 8, 16, 16, 8, split=2, swap=True),
            AdapterGradientsConfig(16, 32, 16),
            programs=4,
        ),
        seeds=range(2),
    ),
}

CHECKS = {OutOfBounds: "bounds", Race: "race", Deadlock: "deadlock", NotAllZero: "counters"}


def failed_check(trial: Trial, kernels: ModuleType) -> str:
    """The check that finds fault with `kernels` in this trial; "" where none does."""
    inputs = make_inputs(trial.case, torch.float32)
    dy = make_dy(inputs)
    results = []
    for seed in trial.seeds:
        try:
            with checked(seed), forced(trial.tiles, kernels), use_backend("triton"):
                results.append(by_op(svd_lora_linear, inputs, dy))
        except tuple(CHECKS) as fault:
            return next(name for kind, name in CHECKS.items() if isinstance(fault, kind))
        try:
            assert_as_exact_as_formula(results[-1], inputs, dy)
        except AssertionError:
            return "numbers"
        if any(not torch.equal(results[0][name], results[-1][name]) for name in results[0]):
            return "same bits"
    return ""


class Mutant(NamedTuple):
    old: str
    new: str
    check: str  # that must catch it
    trial: str = "pair"

    def module(self, folder: Path) -> ModuleType:
        """kernels.py with `new` in the place of `old`, which has to be there exactly once."""
        assert SOURCE.count(self.old) == 1, f"{SOURCE.count(self.old)} places, not one: {self.old}"
        return load_kernels(SOURCE.replace(self.old, self.new), folder)


MUTANTS = {
    # ------------------------------------------------------------------------------------- masks
    "K is not masked": Mutant("inside = k < depth", "inside = k < depth + 1", "bounds"),
    "M is not masked": Mutant(
        "mask_y = (rows < sizes.M)", "mask_y = (rows < sizes.M + 1)", "bounds"
    ),
    "N is not masked": Mutant(
        "inside = columns < w2.rows\n", "inside = columns < w2.rows + 1\n", "bounds"
    ),
    "r is not masked": Mutant(
        "w, ranks, ranks < w.rows,",
        "w, ranks, ranks <= w.rows,",
        "bounds",
    ),
    "ra is not masked": Mutant(
        "(columns_a < sizes.lora_rank)[None, :]", "(columns_a <= sizes.lora_rank)[None, :]", "race"
    ),
    "ra is not masked in the expand": Mutant(
        "0, sizes.lora_rank, sizes.lora_rank, SWAP",
        "0, sizes.lora_rank + 1, sizes.lora_rank + 1, SWAP",
        "bounds",
    ),
    # ----------------------------------------------------------------------------------- strides
    "x is taken for contiguous": Mutant("Matrix(X, M, x_m, x_k)", "Matrix(X, M, K, x_k)", "bounds"),
    "x's columns are taken for neighbours": Mutant(
        "Matrix(X, M, x_m, x_k)", "Matrix(X, M, x_m, 1)", "bounds", "decode"
    ),
    "B's strides are swapped": Mutant(
        "Matrix(W2a, N, w2a_n, w2a_r)", "Matrix(W2a, N, w2a_r, w2a_n)", "bounds"
    ),
    # -------------------------------------------------------------------------------------- terms
    "the bias is dropped": Mutant(
        "tl.load(Bias + columns, mask=inside", "0 * tl.load(Bias + columns, mask=inside", "numbers"
    ),
    "alpha is dropped": Mutant(
        "                h = scaled\n", "                h += 0\n", "numbers"
    ),
    "alpha in h_a the wrong way round": Mutant(
        "(scaled if SCALED else h)", "(h if SCALED else scaled)", "numbers"
    ),
    "alpha in dB dropped": Mutant("(acc * alpha).to(dB", "acc.to(dB", "numbers"),
    "the adapter is skipped": Mutant(
        "0, sizes.lora_rank, sizes.lora_rank, SWAP",
        "sizes.lora_rank, sizes.lora_rank, sizes.lora_rank, SWAP",
        "numbers",
    ),
    "a row's last columns alone": Mutant("sums += w.to", "sums = w.to", "numbers", "row"),
    # ------------------------------------------------------------------------------------- pivots
    "pivots are taken for the first rows": Mutant(
        "columns = tl.load(Pivots + columns, mask=inside, other=0)",
        "columns += 0",
        "race",
        "pivoted",
    ),
    "the others are taken for the last rows": Mutant(
        "columns = tl.load(Others + columns, mask=inside, other=0).to(tl.int32)",
        "columns += sizes.rank",
        "race",
        "pivoted",
    ),
    "every part adds dy's pivots": Mutant("if part == 0:", "if part >= 0:", "numbers", "pivoted"),
    # --------------------------------------------------------------------------------------- waits
    "waits for one block too few": Mutant("< rank_blocks:", "< rank_blocks - 1:", "race"),
    "doesn't wait": Mutant("< rank_blocks:", "< 0:", "race", "decode"),
    "waits for one block too many": Mutant("< rank_blocks:", "<= rank_blocks:", "deadlock"),
    "doesn't say that h is ready": Mutant(
        'tl.atomic_add(Ready + m_block, 1, sem="release")', "pass", "deadlock"
    ),
    "says so before it is": Mutant(
        "tl.debug_barrier()  # the release covers what every thread has written of h",
        "pass",
        "race",
    ),
    "ready without release": Mutant(
        'tl.atomic_add(Ready + m_block, 1, sem="release")',
        'tl.atomic_add(Ready + m_block, 1, sem="relaxed")',
        "race",
    ),
    "waits without acquire": Mutant(
        'tl.atomic_add(Ready + m_block, 0, sem="acquire")',
        'tl.atomic_add(Ready + m_block, 0, sem="relaxed")',
        "race",
    ),
    "the queue gives a tile twice": Mutant(
        'tile = tl.atomic_add(Counters + QUEUE, 1, sem="relaxed")\n    while',
        "tile = tl.program_id(0)\n    while",
        "race",
    ),
    # ------------------------------------------------------------------------------------- resets
    "one counter is not reset": Mutant("range(0, m_blocks)", "range(1, m_blocks)", "counters"),
    "arrivals are not reset": Mutant("tl.store(arrivals, 0)", "pass", "counters", "decode"),
    "the last but one resets": Mutant(
        "== tiles + tl.num_programs(0) - 1", "== tiles + tl.num_programs(0) - 2", "bounds"
    ),
    # --------------------------------------------------------------------------------------- parts
    "adds the parts from its own on": Mutant(
        """        acc = tl.load(tile)
        for other in range(1, SPLIT):
            acc += tl.load(tile + other * rows * columns)
""",
        """        for other in range(0, SPLIT):
            if other != part:
                acc += tl.load(tile + other * rows * columns)
""",
        "same bits",
        "decode",
    ),
    "the last but one adds up": Mutant("== SPLIT - 1", "== SPLIT - 2", "race", "decode"),
    "parts overlap": Mutant("(part + 1) * blocks", "(part + 2) * blocks", "numbers", "decode"),
    "arrives without telling": Mutant(
        'tl.atomic_add(arrivals, 1, sem="acq_rel")',
        'tl.atomic_add(arrivals, 1, sem="relaxed")',
        "race",
        "decode",
    ),
    "parts are never complete": Mutant(
        "tl.atomic_add(arrivals, 1, ", "tl.atomic_add(arrivals, 0, ", "deadlock", "decode"
    ),
    # --------------------------------------------------------------------- the adapter's gradients
    "M is not masked there": Mutant("rows_inside = (m < M)", "rows_inside = (m <= M)", "bounds"),
    "every part of the rows is the first": Mutant(
        "_share(M, part, SPLIT, BM)", "_share(M, 0, SPLIT, BM)", "numbers", "pivoted"
    ),
    "db by every block of ranks": Mutant(
        "if tile % rank_blocks == 0:", "if tile % rank_blocks >= 0:", "race", "decode"
    ),
    "db of one part": Mutant(
        "total += tl.load(totals + other * BC)", "total += 0", "numbers", "pivoted"
    ),
}


@pytest.mark.parametrize("name", TRIALS)
def test_the_kernels_as_they_are_pass(name, tmp_path):
    assert failed_check(TRIALS[name], load_kernels(SOURCE, tmp_path)) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    mutant = MUTANTS[name]
    check = failed_check(TRIALS[mutant.trial], mutant.module(tmp_path))
    print(f"\n{name:40} {mutant.trial:8} caught by: {check or 'NOTHING'}")
    assert check == mutant.check


@pytest.mark.parametrize("name", ["waits for one block too few", "doesn't wait"])
def test_early_reads_show_without_guards(name, tmp_path):
    """Some order of the twenty brings a reader before the writer, and NaN into the result."""
    mutant = MUTANTS[name]
    trial, module = TRIALS[mutant.trial], mutant.module(tmp_path)
    inputs = make_inputs(trial.case, torch.float32)
    for seed in range(20):
        with resident.together(seed), forced(trial.tiles, module), use_backend("triton"):
            y = svd_lora_linear(*inputs)
        if y.isnan().any():
            return
    raise AssertionError("the reader never came first")
