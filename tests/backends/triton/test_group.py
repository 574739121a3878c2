"""A group of packed layers as one Triton launch, in the checked interpreter: numbers, guards,
interleavings, and seeded bugs that these checks must catch."""

from __future__ import annotations

import functools
import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "interpreted and compiled kernels can't share a process: TRITON_INTERPRET=1 runs these",
        allow_module_level=True,
    )

from pathlib import Path
from unittest import mock

from helpers.gpu_groups import KINDS, Layers
from helpers.quantizing import random_weights
from triton_interpreter.checked import checked
from triton_interpreter.forced import load_kernels
from triton_interpreter.guards import OutOfBounds, Race
from triton_interpreter.resident import Deadlock

from hylora_kernels.backends import triton
from hylora_kernels.backends.shared import counters
from hylora_kernels.backends.triton import group_kernels, groups
from hylora_kernels.backends.triton.config import GROUP_ROWS, TORCH_PRODUCTS, Config, Target
from hylora_kernels.backends.triton.config import group_config as config_of
from hylora_kernels.backends.triton.quantized import packed as quantised
from hylora_kernels.backends.triton.quantized.groups import PackedQuantizedGroup

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROW = Config(1, 16, 32, 32, 32, split=2, swap=True)
SWAPPED = Config(16, 32, 16, 32, 32, split=3, swap=True)
TILES = {
    "row": (ROW, 4),
    "swapped": (SWAPPED, 3),
    "small": (Config(16, 16, 32, 32, 16), 5),
    "large": (Config(32, 32, 64, 64, 64, swap=True), 1),
}


def launched(layers: Layers, x, config: Config, programs: int, biases) -> torch.Tensor:
    """y of one launch, which must leave its counters at zero."""
    kept: dict = {}
    target = Target("interpreter", 0, programs)
    with mock.patch.object(counters, "_kept", kept):
        y = groups.launch(x, layers.group.operands, biases, config, target)
    assert not any(zeros.any() for zeros in kept.values()), "counters left"
    return y


POINTS = [
    ("pairs", "row", 1, torch.bfloat16),
    ("pairs", "swapped", 3, torch.float16),
    ("pairs", "small", 33, torch.float32),
    ("odd", "row", 2, torch.float32),
    ("odd", "swapped", 17, torch.bfloat16),
    ("pivoted", "large", 40, torch.float16),
    ("pivoted", "small", 17, torch.bfloat16),
    ("one", "swapped", 5, torch.float32),
]


@pytest.mark.parametrize(("kinds", "tiles", "M", "dtype"), POINTS)
def test_numbers_with_guards_on(kinds, tiles, M, dtype):
    layers = Layers(KINDS[kinds], dtype)
    padded = torch.randn(M, 75).to(dtype)
    for x, has_biases in ((padded[:, :70], True), (padded[:, 5:].contiguous(), False)):
        biases = layers.biases if has_biases else [None] * len(layers.packed)
        with checked() as launches:
            y = launched(layers, x, *TILES[tiles], biases)
        layers.assert_right(y, x, has_biases)
        assert len(launches) == 1


@pytest.mark.parametrize("kinds", ["one", "odd"])
def test_same_bits_in_any_order_with_any_number_of_programs(kinds):
    layers = Layers(KINDS[kinds], torch.float32)
    x, first, seen = torch.randn(2, 70), None, set()
    for seed in range(8):
        with checked(seed) as orders:
            y = launched(layers, x, SWAPPED, 1 + seed % 8, layers.biases)
        seen.add(tuple(map(tuple, orders)))
        first = y if first is None else first
        assert torch.equal(y, first), f"seed {seed}"
    layers.assert_right(first, x)
    assert len(seen) > 6, "the seeds draw few orders"


def test_no_output_is_as_wide_as_x():
    layers = Layers(KINDS["pivoted"], torch.float32, K=112)
    assert layers.group.width == 112 + 32
    x = torch.randn(2, 3, 112)
    y = triton.forward_group(x, layers.group, layers.biases)
    assert y.shape == (2, 3, 144)
    layers.assert_right(y.reshape(6, 144), x.reshape(6, 112))


# ------------------------------------------------------------------------------------- the choice


def test_few_rows_of_a_graph_are_one_launch():
    layers = Layers(KINDS["pairs"], torch.bfloat16)
    problem = groups.problem_of(torch.empty(1, 70, dtype=torch.bfloat16), layers.group.operands)
    assert problem[:5] == (1, 70, 153, 24 + 24 + 40, 0)
    gpu = Target("cuda", 90, 132)
    choose = functools.partial(config_of, target=gpu)
    for M in (1, 8, GROUP_ROWS, GROUP_ROWS + 1):
        here = problem._replace(M=M)
        config = choose(here, captured=True)
        assert (config is TORCH_PRODUCTS) == (M > GROUP_ROWS)
        assert config is TORCH_PRODUCTS or (1 if M == 1 else 16 if M == 8 else 64) == config.BM
        assert choose(here, captured=False) is TORCH_PRODUCTS, "the host waits for a launch"
    exact = problem._replace(dtype=torch.float32)
    assert choose(exact, captured=True).BM == 1
    assert choose(exact._replace(M=2), captured=True) is TORCH_PRODUCTS


# -------------------------------------------------------------------------------------- seeded bugs

SOURCE = Path(group_kernels.__file__).read_text()
CHECKS = {OutOfBounds: "bounds", Race: "race", Deadlock: "deadlock"}
# name -> (old, new, the check that must catch it)
MUTANTS = {
    "another member's columns of h": ("Matrix(H + tl.load(tile + H8) * 8", "Matrix(H", "numbers"),
    "another member's columns of y": ("tl.load(tile + Y).to(tl.int32) +", "0 +", "race"),
    "places of another member": ("tl.load(tile + FIRST) + lanes", "lanes", "race"),
    "every tile as wide as a tile": ("inside = lanes < q.rows", "inside = lanes < BN", "bounds"),
    "another tile's weights": ("Q + tl.load(tile + Q8) * 8", "Q", "numbers"),
    "pivots without h": ("if pivots >= 0:", "if pivots >= 1 << 20:", "numbers"),
    "the first pivots for all": ("pivots + lanes", "lanes", "numbers"),
    "an adapter by rows of the tile": ("None, aB, columns", "None, aB, lanes", "numbers"),
    "the adapter's h from the base": ("H + tl.load(tile + H_A) * ADAPTERS", "H", "numbers"),
    "another member's bias": ("if member == i:", "if member == i + 1:", "bounds"),
    "doesn't wait": ("< rank_blocks:", "< 0:", "race"),
    "waits for one block too many": ("< rank_blocks:", "<= rank_blocks:", "deadlock"),
    "ready without release": ('1, sem="release")', '1, sem="relaxed")', "race"),
    "waits without acquire": ('0, sem="acquire")', '0, sem="relaxed")', "race"),
    "one counter is not reset": ("range(0, m_blocks)", "range(1, m_blocks)", "counters"),
    "the last but one resets": ("num_programs(0) - 1:", "num_programs(0) - 2:", "bounds"),
}


def failed_check(module) -> str:
    layers = Layers(KINDS["odd"], torch.float32)
    x = torch.randn(17, 70)
    for seed in range(2):
        try:
            with checked(seed), mock.patch.object(groups, "_module", lambda: module):
                y = launched(layers, x, SWAPPED, 4, layers.biases)
        except tuple(CHECKS) as fault:
            return next(name for kind, name in CHECKS.items() if isinstance(fault, kind))
        except AssertionError:
            return "counters"
        try:
            layers.assert_right(y, x)
        except AssertionError:
            return "numbers"
    return ""


def test_the_kernel_as_it_is_passes(tmp_path):
    assert failed_check(load_kernels(SOURCE, tmp_path)) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    old, new, check = MUTANTS[name]
    assert SOURCE.count(old) == 1, f"{SOURCE.count(old)} places, not one: {old}"
    assert failed_check(load_kernels(SOURCE.replace(old, new), tmp_path)) == check


# -------------------------------------------------------------------------------- quantised members


def test_quantised_layers_are_grouped_with_their_like_alone():
    codes = [quantised.pack(random_weights("dense"), torch.float16) for _ in range(2)]
    assert triton.why_no_group(codes) == ""
    group, x = triton.group(codes), torch.randn(2, codes[0].shape[0]).half()
    assert isinstance(group, PackedQuantizedGroup)
    y = triton.forward_group(x, group, ())
    assert torch.equal(y[:, : codes[0].bias_shape[0]], codes[0].forward(x, None))
    layers = Layers(KINDS["pairs"], torch.float16)
    assert "a quantised matrix" in triton.why_no_group([codes[0], layers.packed[0]])
    dense = Layers([("dense", 33, 33, 0, True)] * 2, torch.float16, grouped=False)
    assert triton.why_no_group(dense.packed).startswith("all of them are dense")
