"""The checks of test_quantized.py catch bugs that are put into quantized/kernels.py, one at a time,
as test_mutants.py says. `pytest -s` prints the table."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "interpreted and compiled kernels can't share a process: TRITON_INTERPRET=1 runs these",
        allow_module_level=True,
    )

from helpers.quantizing import assert_as_exact_as_eager, random_matrix
from triton_interpreter.checked import checked
from triton_interpreter.forced import load_kernels
from triton_interpreter.guards import OutOfBounds, Race

from hylora_kernels import reference
from hylora_kernels.backends.triton.quantized import kernels, launch
from hylora_kernels.backends.triton.quantized.config import Problem, QuantizedConfig
from hylora_kernels.backends.triton.quantized.launch import Words

SOURCE = Path(kernels.__file__).read_text()
CHECKS = {OutOfBounds: "bounds", Race: "race"}


class Trial(NamedTuple):
    """One product and some dequantised rows of it."""

    bits: int = 4
    dtype: torch.dtype = torch.float16


def failed_check(trial: Trial, kernels: ModuleType) -> str:
    """The check that finds fault with `kernels` in this trial; "" where none does."""
    M, N, K, ra = 17, 18, 136, 3
    matrix, dtype = random_matrix(N, K, trial.bits), trial.dtype
    x, h_a, B, bias = (torch.randn(s).to(dtype) for s in ((M, 2 * K), (M, ra), (N, ra), (N,)))
    x, ids = x[:, :K], torch.tensor([17, 2, 18, -1])
    problem, config = Problem(M, K, N, trial.bits, ra, dtype), QuantizedConfig(16, 16, split=2)
    try:
        with checked(), mock.patch.object(launch, "_kernels", lambda: kernels):
            y = launch.product(x, Words.of(matrix), bias, h_a, B, problem, config)
            rows = launch.rows(ids, Words.of(matrix), dtype)
    except tuple(CHECKS) as fault:
        return next(name for kind, name in CHECKS.items() if isinstance(fault, kind))
    try:
        assert_as_exact_as_eager(y, x, matrix, bias, h_a, B)
    except AssertionError:
        return "numbers"
    right = torch.equal(rows[:2], reference.dequantize(matrix, dtype)[ids[:2]])
    return "" if right and rows[2:].isnan().all() else "rows"


class Mutant(NamedTuple):
    old: str
    new: str
    check: str  # that must catch it
    trial: Trial = Trial()


MUTANTS = {
    "K is not masked": Mutant("mask=(k < K)[:, None]", "mask=(k <= K)[:, None]", "bounds"),
    "rows past the last are read": Mutant("tl.minimum(rows, M - 1)", "rows", "bounds"),
    "columns past the last are read": Mutant(
        "tl.minimum(columns, N - 1) * G", "columns * G", "bounds"
    ),
    "N is not masked": Mutant("inside = columns < N", "inside = columns <= N", "bounds"),
    "M is not masked": Mutant(
        "(rows < M)[:, None] & inside", "(rows <= M)[:, None] & inside", "bounds"
    ),
    "parts overlap": Mutant("_share(G, part, SPLIT, 1)", "_share(G, 0, SPLIT, 1)", "numbers"),
    "every part is the last": Mutant(
        "    if is_complete:\n        if Ha", "    if part >= 0:\n        if Ha", "race"
    ),
    "the adapter is skipped": Mutant("0, lora_rank, lora_rank,", "0, 0, lora_rank,", "numbers"),
    "the bias is dropped": Mutant("y += tl.load(Bias", "y += 0 * tl.load(Bias", "numbers"),
    "x's rows are taken for neighbours": Mutant("* x_m", "* K", "bounds"),
    # ------------------------------------------------------------------------------------ the codes
    "the zero point is dropped": Mutant(
        "(tl.load(Zeros + place).to", "(0 * tl.load(Zeros + place).to", "numbers"
    ),
    "the zero point of 8 bits is 127": Mutant("1152.0", "1151.0", "numbers", Trial(8)),
    "the first group's scale for all": Mutant(
        "tl.load(Scales + place)", "tl.load(Scales + place * 0)", "numbers"
    ),
    "a neighbour's bit": Mutant(
        "pair = low >> shift & (BOTH << LOW_BITS)",
        "pair = low >> shift & (BOTH << LOW_BITS + 1)",
        "numbers",
    ),
    "odd bytes first": Mutant("(0, 3, 1, 4, 2)", "(0, 3, 1, 2, 4)", "numbers"),
    "a shift twice": Mutant("low, high, 2, ONES", "low, high, 6, ONES", "numbers", Trial(2)),
    "the high plane of the first word for all": Mutant(
        "word // (2 * HIGH_BITS) * HIGH_BITS", "0 * word", "numbers", Trial(5)
    ),
    "the high plane is dropped": Mutant(
        "- BOTH) << LOW_BITS\n", "- BOTH) * 0\n", "numbers", Trial(6)
    ),
    "a code of 8 bits in bfloat16": Mutant(
        "BITS < 8\n", "BITS <= 8\n", "numbers", Trial(8, torch.bfloat16)
    ),
    # --------------------------------------------------------------------------------- dequantising
    "rows that are not there are read": Mutant("tl.where(exists, row_w, 0)", "row_w", "bounds"),
    "they are the first row": Mutant('float("nan")', "scale", "rows"),
    "groups past the last are read": Mutant(
        "tl.minimum(begin + GROUPS, G)", "begin + GROUPS", "bounds"
    ),
    "K is not masked there": Mutant("(k < K)[None, :]", "(k <= K)[None, :]", "bounds"),
}


@pytest.mark.parametrize("trial", sorted({m.trial for m in MUTANTS.values()}, key=str), ids=str)
def test_the_kernels_as_they_are_pass(trial):
    assert failed_check(trial, kernels) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    mutant = MUTANTS[name]
    assert SOURCE.count(mutant.old) == 1, f"{SOURCE.count(mutant.old)} places: {mutant.old}"
    module = load_kernels(SOURCE.replace(mutant.old, mutant.new), tmp_path)
    check = failed_check(mutant.trial, module)
    print(f"\n{name:45} caught by: {check or 'NOTHING'}")
    assert check == mutant.check
