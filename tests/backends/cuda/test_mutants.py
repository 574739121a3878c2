"""The checks of test_emulator.py catch bugs that are put into the CUDA kernels, one at a time.

A mutant is a textual change of one file of csrc/cuda, compiled and run on the emulator. It names
the check that must catch it; the unchanged kernels must pass all checks. `pytest -s` prints the
table.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_emulator import emulated
from cuda_emulator.emulated import DECODE, KERNELS, TILE_64, Choice, Fault, Script
from helpers.gpu_groups import KINDS, Layers, add_group
from helpers.numerics import Case, assert_as_exact_as_formula, make_dy, make_inputs
from helpers.quantizing import assert_as_exact_as_eager, random_matrix

from hylora_kernels.backends.triton.quantized.launch import Words

if emulated.COMPILER is None or platform.machine() != "x86_64":
    pytest.skip(
        "the emulator needs g++, and its fibers change stacks in x86-64's instructions",
        allow_module_level=True,
    )

# The layers that every mutant computes, in several orders.
TRIALS = [
    (Case(M=70, sizes=(140, 40, 70), lora_rank=3, layout="padded"), Choice(TILE_64, 3, 2)),
    (Case(M=17, sizes=(70, 136, 40), lora_rank=35, form="pivoted"), Choice(TILE_64, 2, 1)),
    (Case(M=3, sizes=(130, 40, 20), lora_rank=18, form="pivoted"), Choice(DECODE, 3, 1)),
]
SEEDS = range(3)

# Words of a sanitizer or the emulator -> the check that they stand for.
WORDS = {
    "data race": "race",
    "AddressSanitizer": "bounds",
    "runtime error": "undefined",
    "deadlock": "deadlock",
    "ended before its copies": "copies",
    "counters left": "counters",
}


def failed_check(driver: Path) -> str:
    """The check that finds fault with a driver's kernels; "" where none does."""
    script, layers = Script(), []
    for case, choice in TRIALS:
        inputs = make_inputs(case, torch.float16)  # whose bits tell more than bfloat16's
        dy = make_dy(inputs)
        orders = [dataclasses.replace(choice, seed=seed, programs=2 + seed) for seed in SEEDS]
        layers.append((inputs, dy, [emulated.layer(script, inputs, dy, o) for o in orders]))
    group = Layers(KINDS["odd"], torch.float16, backend="cuda")
    grouped_x = torch.randn(3, 70).half()
    grouped = [
        add_group(script, group, grouped_x, Choice(split=2, programs=2 + seed, seed=seed))
        for seed in SEEDS
    ]
    products = []
    for M, N, K, bits in ((9, 40, 200, 5), (1, 33, 130, 4)):
        x, matrix = torch.randn(M, K).half(), random_matrix(N, K, bits)
        at = [emulated.quantized(script, x, Words.of(matrix), seed=seed) for seed in SEEDS]
        products.append((at, x, matrix))
    try:
        results, _ = emulated.run(driver, script)
    except Fault as fault:
        return next((check for words, check in WORDS.items() if words in str(fault)), str(fault))
    for inputs, dy, orders in layers:
        found = [{name: results[at] for name, at in places.items()} for places in orders]
        try:
            for got in found:
                assert_as_exact_as_formula(got, inputs, dy)
        except AssertionError:
            return "numbers"
        if any(not torch.equal(got[name], found[0][name]) for got in found for name in got):
            return "same bits"
    try:
        group.assert_right(results[grouped[0]], grouped_x)
        for at, x, matrix in products:
            assert_as_exact_as_eager(results[at[0]], x, matrix)
    except AssertionError:
        return "numbers"
    for places in (grouped, *(at for at, _, _ in products)):
        if any(not results[at].equal(results[places[0]]) for at in places):
            return "same bits"
    return ""


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    check: str  # that must catch it

    @property
    def sanitizer(self) -> str:
        return {"race": "thread", "bounds": "address"}.get(self.check, "plain")

    def build(self, folder: Path) -> Path:
        """A driver with `new` in the place of `old`, which has to be there exactly once."""
        kernels = folder / "cuda"
        shutil.copytree(KERNELS, kernels)
        path = kernels / self.file
        source = path.read_text()
        assert source.count(self.old) == 1, f"{source.count(self.old)} places: {self.old}"
        path.write_text(source.replace(self.old, self.new))
        frame = emulated.driver(self.sanitizer).parent
        return emulated.build(folder, self.sanitizer, kernels, frame, self.file)


MUTANTS = {
    # ------------------------------------------------------------------------ quantised matrices
    "a product scaled by the other row's scale": Mutant(
        "quantized.h", "scale[i][2 * tall + j / 2]", "scale[i][2 * tall + j % 2]", "numbers"
    ),
    "high bits left where another word's lie": Mutant(
        "quantized.h", "word >>= first / (2 * P::HIGH) * P::HIGH", "word >>= 0", "numbers"
    ),
    "one zero point for all groups of a run": Mutant(
        "quantized.h", "zeros >> 8 * i & 0xFF", "zeros & 0xFF", "numbers"
    ),
    "a number of x past the last": Mutant(
        "quantized.h", "if (at + j < depth) word", "if (at + j < depth + 1) word", "bounds"
    ),
    "a row past the matrix's last": Mutant(
        "quantized.h",
        "at_most(column0 + 8 * line + lane / 4, int(d.N) - 1)",
        "(column0 + 8 * line + lane / 4)",
        "bounds",
    ),
    "sums read before all warps have put them out": Mutant(
        "quantized.h", "  synchronize();\n", "", "race"
    ),
    # --------------------------------------------------------------------------------- barriers
    "no barrier between a stage's copies and its products": Mutant(
        "tile.h",
        "    synchronize();  // everyone's copies are there",
        "    // everyone's copies are there",
        "race",
    ),
    "results put out over a stage that others multiply": Mutant(
        "tile.h", "  synchronize();  // everyone is through with what lay there\n", "", "race"
    ),
    "a ticket drawn while others read the last": Mutant(
        "layer.h",
        "    synchronize();\n    if (thread_index() == 0) *ticket",
        "    if (thread_index() == 0) *ticket",
        "race",
    ),
    "h called ready before all threads have written it": Mutant(
        "layer.h",
        "    synchronize();\n    if (thread_index() == 0) add_release",
        "    if (thread_index() == 0) add_release",
        "race",
    ),
    # ----------------------------------------------------------------------- copies and predicates
    "a stage too few waited for": Mutant(
        "tile.h", "wait<AHEAD - 1>();", "wait<AHEAD>();", "copies"
    ),
    "rows past the last one loaded": Mutant(
        "tile.h",
        "row0 + row < row_limit ? column_limit - column : 0",
        "column_limit - column",
        "bounds",
    ),
    "16 bytes copied at the end of a row": Mutant(
        "tile.h", "count ? column : 0), 2 * count)", "count ? column : 0), 16)", "numbers"
    ),
    # -------------------------------------------------------------------------- flags and counters
    "h taken as ready one block early": Mutant(
        "layer.h", "< rank_blocks)", "< rank_blocks - 1)", "race"
    ),
    "h waited for one block too long": Mutant(
        "layer.h", "< rank_blocks)", "< rank_blocks + 1)", "deadlock"
    ),
    "ready said without release": Mutant(
        "layer.h",
        "add_release(ready(row_block), 1)",
        "add_relaxed(ready(row_block), 1)",
        "race",
    ),
    "ready read without acquire": Mutant(
        "layer.h", "load_acquire(ready(row_block))", "add_relaxed(ready(row_block), 0)", "race"
    ),
    "parts summed without acquire": Mutant(
        "tile.h",
        "add_acquire_release(arrival, 1)",
        "add_relaxed(arrival, 1)",
        "race",
    ),
    "arrivals not reset": Mutant("tile.h", "add_relaxed(arrival, -split);", "{}", "counters"),
    "the last part to come summed first": Mutant(
        "tile.h",
        "(n * COUNT + i) * THREADS);",
        "((part + n) % split * COUNT + i) * THREADS);",
        "same bits",
    ),
    # ------------------------------------------------------------------------------------- numbers
    "the two halves of a fragment swapped": Mutant(
        "tile.h", "chunk + (lane >> 4))", "chunk + 1 - (lane >> 4))", "numbers"
    ),
    "a pivot's bias given to another column": Mutant(
        "layer.h", "[columns ? columns[c] : e.begin + c]", "[e.begin + c]", "numbers"
    ),
    "h_a scaled as the backward's": Mutant(
        "layer.h", "    if (d.transposed) scale();\n", "    scale();\n", "numbers"
    ),
    "pivots added by every part": Mutant("layer.h", " && s.part == 0", "", "numbers"),
}
# Each takes as long to compile as all launches to catch: HYLORA_TEST_ALL=1 runs these.
OF_GROUPS = {
    "a member's tiles counted from the first member's": Mutant(
        "group.h", "ticket - (run ? g.ends[run - 1] : 0)", "ticket", "bounds"
    ),
    "ready counters of all but the first member kept": Mutant(
        "group.h", "if (thread_index() < g.count) {", "if (thread_index() < 1) {", "counters"
    ),
    "a member's rows of y as if it stood alone": Mutant(
        "decode.h", "row * d.y_stride + place(column)", "row * d.N + place(column)", "numbers"
    ),
}


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_mutant_of_groups_has_its_place(name):
    mutant = OF_GROUPS[name]
    assert (KERNELS / mutant.file).read_text().count(mutant.old) == 1


def test_the_kernels_as_they_are_pass():
    sanitizers = [s for s in emulated.FLAGS if s == "plain" or not emulated.why_no_sanitizer(s)]
    assert {s: failed_check(emulated.driver(s)) for s in sanitizers} == dict.fromkeys(
        sanitizers, ""
    )


takes_long = pytest.mark.skipif(os.environ.get("HYLORA_TEST_ALL") != "1", reason="takes minutes")


@pytest.mark.parametrize(
    "name", [*MUTANTS, *(pytest.param(n, marks=takes_long) for n in OF_GROUPS)]
)
def test_mutant_is_caught(name, tmp_path):
    mutant = (MUTANTS | OF_GROUPS)[name]
    if mutant.sanitizer != "plain" and (reason := emulated.why_no_sanitizer(mutant.sanitizer)):
        pytest.skip(reason)
    begin = time.perf_counter()
    driver = mutant.build(tmp_path)
    compiled = time.perf_counter()
    caught_by = failed_check(driver)
    took = time.perf_counter() - compiled
    print(f"{name:<56} {caught_by:<10} {compiled - begin:5.1f} s to build, {took:.1f} s to catch")
    assert caught_by == mutant.check
