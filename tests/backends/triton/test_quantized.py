"""Quantised matrices in the Triton backend, in triton's interpreter: numbers under the guards of
triton_interpreter/, interleavings, seeded bugs, the packed layer, its ops and the choice of tiles.
"""

from __future__ import annotations

import dataclasses
import os
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "interpreted and compiled kernels can't share a process: TRITON_INTERPRET=1 runs these",
        allow_module_level=True,
    )

from helpers.grouping import blocks_of
from helpers.quantizing import (
    FORMS,
    K,
    N,
    assert_as_exact_as_eager,
    dequantized,
    quantized_model,
    random_matrix,
    random_weights,
)
from triton_interpreter.checked import checked

from hylora_kernels import (
    optimize_for_inference,
    reference,
    restore_from_inference,
    use_backend,
)
from hylora_kernels.backends import triton as backend
from hylora_kernels.backends.triton.config import Target
from hylora_kernels.backends.triton.quantized import groups, launch, packed
from hylora_kernels.backends.triton.quantized.config import (
    DEQUANTIZE,
    Problem,
    QuantizedConfig,
    candidate_configs,
    default_config,
    why_illegal,
)
from hylora_kernels.backends.triton.quantized.launch import Words
from hylora_kernels.layers.packed import packed_states
from hylora_kernels.layers.quantized import dense_weights
from hylora_kernels.weights import PLANES

BITS = tuple(PLANES)
HALVES = (torch.float16, torch.bfloat16)


# -------------------------------------------------------------------------------------- the product

SHAPES = {  # M, N, K, rank of the adapter
    "one row": (1, 21, 200, 0),
    "two blocks of rows": (17, 18, 72, 3),
    "one column": (3, 1, 64, 17),
}


def call(bits: int, shape: str, dtype: torch.dtype, split: int):
    """(y of one launch, what assert_as_exact_as_eager compares it with)."""
    M, N, K, ra = SHAPES[shape]
    matrix, x, bias = (
        random_matrix(N, K, bits),
        torch.randn(M, 2 * K).to(dtype)[:, :K],
        torch.randn(N),
    )
    bias = bias.to(dtype) if shape != "one row" else None
    h_a, B = (torch.randn(M, ra).to(dtype), torch.randn(N, ra).to(dtype)) if ra else (None, None)
    problem = Problem(M, K, N, bits, ra, dtype)
    config = QuantizedConfig(16, 16, min(split, problem.groups))
    y = launch.product(x, Words.of(matrix), bias, h_a, B, problem, config)
    return y, (x, matrix, bias, h_a, B)


CASES = [("two blocks of rows", bits) for bits in BITS]
CASES += [(shape, bits) for shape in SHAPES for bits in (4, 5, 8) if shape != CASES[0][0]]


@pytest.mark.parametrize(("shape", "bits"), CASES)
def test_numbers_with_guards_on(shape, bits):
    turn = BITS.index(bits) + [*SHAPES].index(shape)
    with checked() as launches:
        y, given = call(bits, shape, HALVES[turn % 2], split=1 + 2 * (turn // 2 % 2))
    assert len(launches) == 1
    assert_as_exact_as_eager(y, *given)


def test_same_bits_in_any_order():
    results, orders = [], set()
    for seed in range(6):
        torch.manual_seed(0)
        with checked(seed) as launches:
            y, given = call(4, "one row", torch.float16, 3)
        results.append(y)
        orders.add(tuple(launches[0]))
    assert_as_exact_as_eager(results[0], *given)
    assert all(torch.equal(y, results[0]) for y in results)
    assert len(orders) > 4, "the seeds draw few orders"


# ------------------------------------------------------------------------------------- dequantising


@pytest.mark.parametrize("bits", BITS)
def test_dequantised_rows_are_the_references_bits(bits):
    matrix = random_matrix(19, 130, bits)
    W, ids = Words.of(matrix), torch.tensor([[3, 0], [18, 3]])
    for dtype in (*HALVES, torch.float32):
        expected = reference.dequantize(matrix, dtype)
        with checked():
            assert torch.equal(launch.dequantize(W, dtype, 2, 17), expected[2:])
            assert torch.equal(launch.rows(ids, W, dtype), expected[ids])


def test_a_row_that_is_not_there_is_nan():
    W = Words.of(random_matrix(5, 64, 4))
    with checked():
        found = launch.rows(torch.tensor([4, 5, -1, 2**40]), W, torch.float16)
    assert found[0].isfinite().all() and found[1:].isnan().all()
    assert launch.rows(torch.empty(0, dtype=torch.int32), W, torch.float16).shape == (0, 64)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_many_rows_dequantise_a_bounded_part_at_a_time(bias):
    matrix, x = random_matrix(37, 70, 5), torch.randn(70, 70).half()
    offset = torch.randn(37).half() if bias else None
    with mock.patch.object(launch, "MOST_DEQUANTIZED", 16 * 70), checked() as launches:
        y = launch.linear(x, Words.of(matrix), offset)
    assert len(launches) == 3
    assert_as_exact_as_eager(y, x, matrix, offset)


# --------------------------------------------------------------------------------- the packed layer


@pytest.mark.parametrize(("form", "M"), [(form, 1) for form in FORMS] + [("pair", 70)])
def test_a_packed_layer(form, M):
    dtype = torch.float16
    weights = dequantized(random_weights(form), dtype, factors=False)
    x, bias = torch.randn(M, 1, K).to(dtype), torch.randn(N).to(dtype)
    layer = packed.pack(weights, dtype)
    y = backend.forward_packed(x, layer, bias)
    assert (y.shape, layer.shape, layer.bias_shape) == ((M, 1, N), (K,), (N,))
    truth, eager = (
        reference.forward(x[:, 0].to(d), dequantized(weights, d))[0] + bias.to(d)
        for d in (torch.float64, dtype)
    )
    error, allowed = ((t.double() - truth).abs().max() for t in (y[:, 0], eager))
    assert error <= 2 * allowed
    unpacked = dequantized(backend.unpack(layer), dtype)
    for got, given in zip(unpacked, dequantized(weights, dtype), strict=True):
        assert torch.equal(got, given) if isinstance(given, Tensor) else got == given


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "nobias"])
def test_dense_members_of_one_width_are_one_launch(has_bias):
    members, sizes = [], (20, 9, 5)
    for seed, n in enumerate(sizes):
        matrix = random_matrix(n, 70, 3, seed)
        members.append(packed.pack(dense_weights(matrix), torch.float16))
    alone = [backend.unpack(member).SVh for member in members]
    x, biases = torch.randn(4, 70).half(), []
    if has_bias:
        biases = [torch.randn(20).half(), None, torch.randn(5).half()]
    assert groups.why_no_group(members) == ""
    group = groups.PackedQuantizedGroup.of(members)
    with checked() as launches:
        y = group.forward(x, biases)
    assert len(launches) == 1 and group.width == 34
    for begin, matrix, bias, member in zip(
        (0, 20, 29), alone, biases or [None] * 3, members, strict=True
    ):
        assert_as_exact_as_eager(y[:, begin : begin + matrix.shape[0]], x, matrix, bias)
        assert torch.equal(backend.unpack(member).SVh.codes, matrix.codes)
        assert member.SVh.words.untyped_storage().data_ptr() == group.W.words.data_ptr()


def test_why_quantised_members_are_no_group():
    def made(n, bits=4, **others):
        weights = dense_weights(random_matrix(n, 64, bits), dtype=torch.float16)
        return packed.pack(dataclasses.replace(weights, **others), torch.float16)

    pair = packed.pack(random_weights("pair"), torch.float16)
    adapter = {"A": torch.randn(2, 64), "B": torch.randn(8, 2)}
    for members, words in (
        ([made(8), pair], "grouped with dense quantised matrices alone"),
        ([made(8), made(8, bits=5)], "their codes differ in width"),
        ([made(8), made(8, **adapter)], "with an adapter is computed by itself"),
        ([made(40), made(24)], "as many outputs as inputs"),
    ):
        assert words in groups.why_no_group(members)


def test_an_embedding_reads_its_heads_rows():
    weights, ids = random_weights("dense"), torch.tensor([[1, 19]])
    rows = backend.rows_packed(ids, packed.pack(weights, torch.bfloat16))
    assert torch.equal(rows, reference.dequantize(weights.SVh, torch.bfloat16)[ids])


def test_a_model_is_packed_and_restored_bit_for_bit(monkeypatch):
    """As on a GPU: in the interpreter the backend leaves packing to the CPU's."""

    def pack(weights, dtype, *others):
        return packed.pack(weights, dtype) if weights.is_quantized else None

    monkeypatch.setattr(backend, "pack", pack)
    model, ids = quantized_model(dtype=torch.float16), torch.arange(6)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), use_backend("triton"):
        expected = model(ids).logits
        optimize_for_inference(model, group=True)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-3)
    kinds = [
        type(group.packed) for block in blocks_of(model).values() for group in block.packed_groups
    ]
    assert kinds and set(kinds) == {groups.PackedQuantizedGroup}
    states = packed_states(model)
    assert states and all(isinstance(s.packed, packed.PackedQuantizedLayer) for s in states)
    restore_from_inference(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_codes_that_start_anywhere_are_copied_and_aligned_ones_are_not():
    matrix = random_matrix(4, 64, 4)
    assert Words.of(matrix).words.data_ptr() == matrix.codes.data_ptr()
    bytes_ = torch.zeros(1 + matrix.codes.numel(), dtype=torch.uint8)
    odd = bytes_[1:].view(matrix.codes.shape).copy_(matrix.codes)
    words = Words.of(dataclasses.replace(matrix, codes=odd))
    assert words.words.data_ptr() % 16 == 0 and torch.equal(words.matrix.codes, matrix.codes)


def test_ops():
    W, x = Words.of(random_matrix(5, 64, 3)), torch.randn(2, 64).half()
    parts = (W.words, W.scales, W.zeros, W.bits)
    ops = torch.ops.hylora
    h_a, B, bias = torch.randn(2, 2).half(), torch.randn(5, 2).half(), torch.randn(5).half()
    torch.library.opcheck(ops.triton_quantized_linear.default, (x, *parts, h_a, B, bias))
    ids = torch.tensor([0, 4])
    torch.library.opcheck(ops.triton_quantized_rows.default, (ids, *parts, 64, torch.float16))


@pytest.mark.parametrize("form", ["dense", "pair"])
def test_torch_compile_sees_one_op_a_matrix(form):
    layer = packed.pack(random_weights(form), torch.float16)
    x = torch.randn(2, K).half()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer.forward(x, None), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer.forward(x, None))


# ---------------------------------------------------------------------------------- choice of tiles

TARGETS = [Target("cuda", arch, 108) for arch in (80, 86, 89, 90, 100, 120)]
TARGETS += [Target("hip", "gfx942", 304), Target("interpreter", 0, 3)]
PLAIN = Problem(1, 2048, 2048, 4, 0, torch.bfloat16)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: str(t.arch))
def test_few_rows_have_tiles_and_many_are_dequantised(target):
    for bits in BITS:
        for k in (16, 576, 11008):
            for M in (1, 16, 17, 33, 64):
                problem = PLAIN._replace(M=M, K=k, bits=bits)
                config = default_config(problem, target)
                assert isinstance(config, QuantizedConfig)
                found = candidate_configs(problem, target)
                assert found[0] is DEQUANTIZE and config in found
                assert not any(why_illegal(c, problem, target) for c in found[1:])
                assert config.split == 1 or problem.groups >= 8 * config.split
            assert default_config(PLAIN._replace(M=65, K=k, bits=bits), target) is DEQUANTIZE
    assert default_config(PLAIN._replace(dtype=torch.float32), target) is DEQUANTIZE


def test_sums_are_split_where_the_outputs_are_few():
    splits = [default_config(PLAIN._replace(N=N), TARGETS[3]).split for N in (512, 2048, 65536)]
    assert splits == [4, 4, 1]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (QuantizedConfig(16, 48), "BN must be a power of two, at least 16, got 48"),
        (QuantizedConfig(8, 64), "BM must be a power of two, at least 16, got 8"),
        (QuantizedConfig(16, 64, split=33), "split must be from 1 to the 32 groups of K, got 33"),
        (
            QuantizedConfig(64, 256, warps=4),
            "4 warps hold 64 sums a thread, asked for 16384 in all",
        ),
        (QuantizedConfig(64, 64, stages=16), "bytes of shared memory, 86 has 101376"),
    ],
)
def test_why_illegal_names_what_is_wrong(config, words):
    assert words in why_illegal(config, PLAIN, TARGETS[1])
