"""The cpu backend's packed layers, and its ops under torch's tools."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.numerics import (
    CASES,
    Case,
    assert_as_exact_as_formula,
    by_reference,
    every_form,
    make_dy,
    make_inputs,
)
from torch import Tensor

from hylora_kernels.backends import cpu
from hylora_kernels.backends.cpu import packed as packed_module
from hylora_kernels.backends.cpu import panels
from hylora_kernels.weights import Weights

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def packed_of(inputs):
    return cpu.pack(inputs.weights)


def force_torch_products(monkeypatch, wanted: bool) -> None:
    """Pack every layer that allows it for torch's products, or none."""

    def asked(weights):
        dense = weights.is_dense and not weights.lora_rank
        allowed = weights.SVh.dtype == torch.float32 and (dense or weights.pivots is None)
        return wanted and allowed

    monkeypatch.setattr(packed_module, "torch_products_are_faster", asked)


@pytest.fixture(params=["panels", "torch products"])
def layout(request, monkeypatch):
    force_torch_products(monkeypatch, request.param == "torch products")


@pytest.fixture
def _panels(monkeypatch):
    force_torch_products(monkeypatch, False)


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_computes_the_formula_and_unpacks_bit_for_bit(case, dtype, layout):
    inputs = make_inputs(case, dtype)
    packed = packed_of(inputs)
    dy = make_dy(inputs)
    got = by_reference(inputs, dy) | {"y": cpu.forward_packed(inputs.x, packed, inputs.bias)}
    assert_as_exact_as_formula(got, inputs, dy)
    for name, plain in zip(inputs._fields[1:], cpu.unpack(packed), strict=True):
        given = getattr(inputs, name)
        if name == "bias":
            assert plain is None, "a call brings its own"
        elif isinstance(given, Tensor):
            assert plain.dtype == given.dtype and torch.equal(plain, given), name
            assert plain.is_contiguous() and plain.untyped_storage().nbytes() == plain.nbytes
        else:
            assert plain == given, name


@pytest.mark.parametrize("form", ["pair", "dense"])
def test_packed_special_numbers_keep_their_bits(form):
    inputs = make_inputs(Case(form=form, lora_rank=0), torch.float32)
    inputs.SVh.view(-1)[:4] = torch.tensor([torch.nan, -torch.inf, -0.0, 1e-45])
    plain = cpu.unpack(packed_of(inputs)).SVh
    assert torch.equal(plain.view(torch.int32), inputs.SVh.view(torch.int32))


def test_packed_needs_no_more_than_factors_and_table():
    inputs = make_inputs(Case(sizes=(64, 96, 32), lora_rank=32, form="pivoted"), torch.bfloat16)
    packed = packed_of(inputs)
    pivots = inputs.pivots.clone()
    inputs.pivots.zero_()
    assert torch.equal(cpu.unpack(packed).pivots, pivots), "its own"
    inputs.pivots.copy_(pivots)
    factors = sum(t.nbytes for t in (inputs.SVh, inputs.U, inputs.A, inputs.B))
    table = torch.ops.hylora.cpu_pivot_table(inputs.pivots, 96).nbytes
    header_and_gaps = 1024
    beyond = sum(t.nbytes for t in packed.tensors) - factors - table
    assert 0 < beyond <= header_and_gaps, "all sizes are multiples of 32: no padding"
    with pytest.raises(AttributeError):
        packed.alpha = 2.0


@every_dtype
@pytest.mark.parametrize("M", [1, 40, 100])
def test_an_infinite_pivot_stays_alone_beside_an_adapter(M, dtype):
    inputs = make_inputs(Case(M=M, sizes=(64, 96, 40), lora_rank=8, form="pivoted"), dtype)
    inputs.x[:, 0] = 1
    inputs.SVh[7] = 0
    inputs.SVh[7, 0] = torch.inf
    pivots = cpu.forward_packed(inputs.x, packed_of(inputs), inputs.bias)[:, inputs.pivots.long()]
    assert pivots[:, 7].isinf().all()
    assert torch.cat((pivots[:, :7], pivots[:, 8:]), 1).isfinite().all()


@every_dtype
def test_packed_rows(dtype, layout):
    W = torch.randn(53, 37, dtype=dtype)
    pivots = torch.arange(53, dtype=torch.int32)
    packed = cpu.pack(Weights(W, W.new_empty(0, 53), pivots=pivots))
    some = torch.tensor([[0, 52, 3], [7, 7, 1]])
    for ids in (torch.tensor(3), some, some.T, some[:, ::2], torch.empty(0, 2).long()):
        assert torch.equal(cpu.rows_packed(ids, packed), F.embedding(ids, W))
    for wrong in (-1, 53):
        with pytest.raises((RuntimeError, IndexError)):
            cpu.rows_packed(torch.tensor([wrong]), packed)


# ---------------------------------------------------------------------------- under torch's tools


@every_dtype
@every_form
@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.usefixtures("_panels")
def test_opcheck(lora_rank, form, dtype):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for M, lead_dims in ((17, 2), (1, 0), (0, 2)):
        inputs = make_inputs(Case(M=M, lead_dims=lead_dims, lora_rank=lora_rank, form=form), dtype)
        packed = packed_of(inputs)
        is_matrix = isinstance(packed, packed_module.PackedMatrix)
        assert is_matrix == (form == "dense" and lora_rank == 0)
        op = torch.ops.hylora.cpu_linear if is_matrix else torch.ops.hylora.cpu_packed_layer
        weights = packed.panels if is_matrix else packed.layer
        args = (inputs.x, weights, inputs.bias, packed.out_features, packed.limb_products)
        torch.library.opcheck(op.default, args, test_utils=tests if M == 17 else tests[:2])


@every_dtype
def test_opcheck_of_the_op_on_separate_panels(dtype):
    inputs = make_inputs(Case(M=17, lead_dims=2, lora_rank=8), dtype)
    weights = [panels.pack_matrix(t) for t in (inputs.SVh, inputs.A, inputs.U, inputs.B)]
    sizes = (inputs.SVh.shape[0], 8, inputs.U.shape[0], 0.37)
    for emit_h_a in (False, True):
        args = (inputs.x, *weights, inputs.bias, None, *sizes, emit_h_a, False, 0)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.hylora.cpu_layer.default, args, test_utils=tests)


def test_opcheck_rows():
    W = torch.randn(53, 37).bfloat16()
    args = (torch.ops.hylora.cpu_pack(W), 53, 37, torch.tensor([[0, 52, 3]]))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hylora.cpu_rows.default, args, test_utils=tests)


@pytest.mark.usefixtures("_panels")
def test_vmap_of_a_packed_layer_is_refused():
    inputs = make_inputs(Case(), torch.float32)
    packed = packed_of(inputs)
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.vmap(lambda x: cpu.forward_packed(x, packed, inputs.bias))(inputs.x)


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("form", ["pair", "dense"])
@pytest.mark.parametrize("rows", [1024, 4097])  # at most 4096 at a time
def test_many_rows_of_float32_go_through_torch(rows, lora_rank, form, monkeypatch):
    """Without limbs: weights unpacked a part at a time, the bias and alpha where they
    belong."""
    monkeypatch.setattr(packed_module, "six_products_stay_faster", lambda: False)
    N = 31000 if rows == 1024 else 200  # more than 8 MB of weights
    sizes = (70, N, 67) if form == "pair" else (70, N, N)
    inputs = make_inputs(Case(M=rows, sizes=sizes, lora_rank=lora_rank, form=form), torch.float32)
    for bias in (inputs.bias, None):
        few = inputs._replace(x=inputs.x[:1000], bias=bias)
        packed = packed_of(few)
        y = cpu.forward_packed(inputs.x, packed, bias)
        one = cpu.forward_packed(few.x, packed, bias)
        torch.testing.assert_close(y[:1000], one, rtol=1e-5, atol=1e-5)
        assert torch.equal(cpu.forward_packed(inputs.x, packed, bias), y)
        wide = torch.cat((inputs.x, inputs.x), 1)[:, : inputs.x.shape[1]]
        assert torch.equal(cpu.forward_packed(wide, packed, bias), y), (
            "rows need not be side by side"
        )


def test_few_ranks_or_padded_float32_takes_torch_products():
    PackedLayer, TorchProducts = packed_module.PackedLayer, packed_module.TorchProducts
    for rank, lora_rank, wanted in (
        (16, 16, TorchProducts),
        (16, 17, TorchProducts),  # 33 are padded to 64
        (33, 0, TorchProducts),
        (47, 13, PackedLayer),
        (64, 0, PackedLayer),
    ):
        inputs = make_inputs(Case(sizes=(64, 96, rank), lora_rank=lora_rank), torch.float32)
        assert type(packed_of(inputs)) is wanted
        assert type(packed_of(inputs.map(Tensor.bfloat16))) is PackedLayer
    inputs = make_inputs(Case(sizes=(64, 96, 16), form="pivoted"), torch.float32)
    assert type(packed_of(inputs)) is PackedLayer, "the pivoted form has panels alone"


def test_a_tensor_that_is_no_packed_layer_is_refused():
    x = torch.randn(3, 64)
    for wrong in (torch.randn(4096), torch.empty(3)):
        with pytest.raises(RuntimeError, match="layer must be cpu_pack_layer's result"):
            torch.ops.hylora.cpu_packed_layer(x, wrong, None, 96, 0)
