"""Packed layers on one x, computed as one: each member's output bit for bit as it is alone."""

from __future__ import annotations

import pytest
import torch
from helpers.numerics import Case, make_inputs
from helpers.optimising import every_dtype

from hylora_kernels.backends import cpu
from hylora_kernels.backends.cpu import packed as packed_module
from hylora_kernels.backends.cpu.packed import PackedLayer, PackedMatrix

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
K = 70
# form, outputs, rank, rank of the adapter, has a bias
MEMBERS = [
    ("pair", 50, 20, 0, False),
    ("pivoted", 97, 33, 5, True),
    ("dense", 33, 33, 0, True),
    ("pair", 200, 40, 8, True),
    ("pivoted", 64, 40, 0, False),
    ("dense", 31, 31, 4, False),
    ("pivoted", 64, 64, 7, True),  # at rank N there are no others
]


@pytest.fixture(autouse=True)
def _panels(monkeypatch):
    monkeypatch.setattr(packed_module, "torch_products_are_faster", lambda weights: False)


def members(dtype, kinds=MEMBERS):
    """(packed layers, their biases)."""
    packed, biases = [], []
    for form, N, rank, lora_rank, has_bias in kinds:
        case = Case(sizes=(K, N, rank), lora_rank=lora_rank, form=form)
        inputs = make_inputs(case, dtype)
        packed.append(cpu.pack(inputs.weights))
        biases.append(inputs.bias if has_bias else None)
    return packed, biases


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("M", [0, 1, 3, 7, 16, 17, 64, 65, 200])
def test_every_member_gives_the_bits_that_it_gives_alone(M, threads, dtype):
    packed, biases = members(dtype)
    assert {type(p) for p in packed} == {PackedLayer, PackedMatrix}
    total = sum(p.out_features for p in packed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (torch.randn(M, K).to(dtype), torch.randn(M, K + 5).to(dtype)[:, :K]):
            for given in (biases, ()):
                y = cpu.forward_group(x, cpu.group(packed), given)
                assert y.shape == (M, total) and y.dtype == dtype
                begin = 0
                for one, bias in zip(packed, given or [None] * len(packed), strict=True):
                    alone = cpu.forward_packed(x, one, bias)
                    assert torch.equal(y[:, begin : begin + one.out_features], alone)
                    begin += one.out_features
    finally:
        torch.set_num_threads(before)


def test_many_threads_share_wide_members():
    """More panels than threads, with weights enough for all of them."""
    kinds = [("pair", 1500, 300, 0, True), ("pivoted", 900, 500, 16, True)]
    kinds += [("dense", 1000, 1000, 0, False)]
    packed, biases = members(torch.bfloat16, kinds)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for M in (1, 5, 40):
                x = torch.randn(M, K).bfloat16()
                y = cpu.forward_group(x, cpu.group(packed), biases)
                alone = [
                    cpu.forward_packed(x, p, bias) for p, bias in zip(packed, biases, strict=True)
                ]
                assert torch.equal(y, torch.cat(alone, 1))
    finally:
        torch.set_num_threads(before)


def test_leading_dims_are_kept_and_no_output_is_as_wide_as_x():
    packed, biases = members(torch.float32, [("pair", 37, 20, 0, True), ("dense", 33, 33, 0, True)])
    group, x = cpu.group(packed), torch.randn(2, 3, K)
    assert K == 37 + 33 and group.width == K + 32
    y, flat = (cpu.forward_group(rows, group, biases) for rows in (x, x.reshape(6, K)))
    assert y.shape == (2, 3, group.width)
    assert torch.equal(y.reshape(6, -1)[:, :K], flat[:, :K])


def test_float32_of_many_rows_goes_through_torch_for_members_that_are_faster_so(monkeypatch):
    monkeypatch.setattr(packed_module, "six_products_stay_faster", lambda: False)
    packed, biases = members(torch.float32)
    x = torch.randn(1030, K)
    y = cpu.forward_group(x, cpu.group(packed), biases)
    alone = [cpu.forward_packed(x, p, bias) for p, bias in zip(packed, biases, strict=True)]
    assert torch.equal(y, torch.cat(alone, 1))


def test_layers_for_torch_products_are_no_members(monkeypatch):
    packed, _ = members(torch.float32)
    assert cpu.why_no_group(packed) == ""
    monkeypatch.setattr(packed_module, "torch_products_are_faster", lambda weights: True)
    torch_products, _ = members(torch.float32, MEMBERS[:1])
    assert "torch's products" in cpu.why_no_group(packed + torch_products)


def test_wrong_arguments_are_named():
    packed, _ = members(torch.float32, MEMBERS[:2])
    weights, x = [p.layer for p in packed], torch.randn(3, K)
    op = torch.ops.hylora.cpu_packed_group
    op(x, weights, [0, 0], [], [], 147)
    with pytest.raises(RuntimeError, match="width must be at least the members' 147 outputs"):
        op(x, weights, [0, 0], [], [], 146)
    with pytest.raises(RuntimeError, match=r"x must be \[..., 70\] of the layer's dtype"):
        op(torch.randn(3, K + 1), weights, [0, 0], [], [], 147)
    for lists in (([0], [], []), ([0, 0], [None], []), ([0, 0], [], [0, 0, 0])):
        with pytest.raises(RuntimeError, match="one value for each of the 2 weights"):
            op(x, weights, *lists, 147)
    with pytest.raises(RuntimeError, match="bias must be"):
        op(x, weights, [0, 0], [torch.ones(49), None], [], 147)
    with pytest.raises(RuntimeError, match="layer must be cpu_pack_layer's result"):
        op(x, [torch.randn(4096)] * 2, [0, 0], [], [], 147)
    with pytest.raises(RuntimeError, match="panels must be the panels of"):
        op(x, weights, [50, 0], [], [], 147)


@every_dtype
def test_opcheck(dtype):
    packed, biases = members(dtype)
    group, x = cpu.group(packed), torch.randn(2, 3, K).to(dtype)
    args = (x, group.weights, group.matrix_outputs, biases, [0] * len(packed), group.width)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hylora.cpu_packed_group.default, args, test_utils=tests)
