"""A layer packed for inference on a GPU, the C++ kernels emulated on the CPU: results, which call
goes where, the way back."""

from __future__ import annotations

import copy
import io
from unittest import mock

import pytest
import torch
from cuda_emulator import on_cpu
from helpers.numerics import Inputs, by_reference, distance, make_layer
from torch import nn

from hylora_kernels import (
    SVDLoRALinear,
    optimize_for_inference,
    restore_from_inference,
    use_backend,
)
from hylora_kernels.backends.shared import counters, packed_gpu
from hylora_kernels.layers.packed import PackedSVDLoRALinear

N, K, RANK = 60, 56, 20
FORMS = ("pair", "pivoted")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated():
    """The backend serves the CPU by its emulated kernels."""
    if on_cpu.COMPILER is None or not hasattr(torch.ops.hylora, "cuda_packed_layer"):
        pytest.skip("the emulated kernels need g++ and hylora_kernels/_csrc.so")
    torch.ops.load_library(on_cpu.build())
    with on_cpu.emulated(), use_backend("cuda"):
        yield
    torch.compiler.reset()


@pytest.fixture
def calls(monkeypatch):
    """The ways that packed calls went: "launch", "backend"."""
    found, op, forward = [], packed_gpu._LAUNCH, packed_gpu._forward

    def by_launch(*given):
        found.append("launch")
        return op(*given)

    def by_backend(*given):
        found.append("backend")
        return forward(*given)

    monkeypatch.setattr(packed_gpu, "_LAUNCH", by_launch)
    monkeypatch.setattr(packed_gpu, "_forward", by_backend)
    return found


def packed_layer(form="pair", lora_rank=3, dtype=torch.bfloat16, alpha=0.37, bias=True):
    """(the layer, packed, a plain copy of it)."""
    layer = make_layer(form, N, K, RANK, lora_rank, dtype=dtype, alpha=alpha).eval()
    if not bias:
        layer.bias = None
    plain = copy.deepcopy(layer)
    assert type(optimize_for_inference(layer)) is PackedSVDLoRALinear
    return layer, plain


def assert_right(y, x, plain):
    factors = (plain.SVh, plain.U, plain.A, plain.B, plain.bias)
    inputs = Inputs(x, *factors, plain.alpha, plain.pivots).map(torch.Tensor.detach)
    dy = torch.zeros(len(x), N, dtype=x.dtype)
    exact = by_reference(inputs.map(torch.Tensor.double), dy.double())["y"]
    own = distance(by_reference(inputs, dy)["y"], exact)
    size = max(1.0, distance(exact, torch.zeros_like(exact)))
    assert distance(y, exact) <= 2 * own + 2 * torch.finfo(x.dtype).eps * size


# -------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_layers_compute_the_formula(lora_rank, form, dtype):
    layer, plain = packed_layer(form, lora_rank, dtype)
    for M in (0, 1, 3, 16, 17, 64, 70, 300):
        x = torch.randn(M, K, dtype=dtype)
        for rows in (x, x, x.reshape(1, M, 1, K), torch.stack((x, x), -1)[..., 0]):
            y = layer(rows)
            assert y.shape == (*rows.shape[:-1], N) and y.dtype == dtype
            assert_right(y.reshape(M, N), x, plain)
    assert layer(x[0]).shape == (N,)
    for kept in counters._kept.values():
        assert not kept.any(), "a launch leaves its counters zero"


def test_a_bias_that_changes_is_followed_and_none_is_needed():
    layer, plain = packed_layer(bias=False)
    x = torch.randn(2, K, dtype=torch.bfloat16)
    for _ in range(2):
        assert_right(layer(x), x, plain)
    plain.bias = layer.bias = nn.Parameter(torch.ones(N, dtype=torch.bfloat16), False)
    assert_right(layer(x), x, plain)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_costs_no_product_of_its_own(form):
    layer, _ = packed_layer(form, 3)
    packed = layer.packed_state.packed
    assert packed.P.shape == (RANK + 3, K)
    if form == "pair":
        assert packed.Q.shape == (N, RANK + 3) and packed.aB is None
        assert packed.sizes[1:3] == (RANK + 3, 0)
    assert all(t.stride(0) % 8 == 0 for t in (packed.Q, packed.aB) if t is not None)


# ------------------------------------------------------------------------------- which way it takes


def test_few_rows_are_one_launch_after_the_first_call(calls):
    layer, _ = packed_layer()
    for M in (1, 1, 64, 64, 65, 65, 1):
        layer(torch.randn(M, K, dtype=torch.bfloat16))
    assert calls == ["backend", "launch", "backend", "launch", "backend", "launch"]


def test_a_captured_call_goes_by_the_backend_always(calls, monkeypatch):
    layer, _ = packed_layer()
    x = torch.randn(1, K, dtype=torch.bfloat16)
    monkeypatch.setattr(packed_gpu, "is_captured", lambda device: True)
    layer(x), layer(x)
    monkeypatch.setattr(packed_gpu, "is_captured", lambda device: False)
    layer(x), layer(x)
    assert calls == ["backend", "backend", "backend", "launch"], "a capture warms nothing up"


def test_without_kernels_or_in_float32_torch_multiplies(calls):
    layer, _ = packed_layer(dtype=torch.float32)
    layer(torch.randn(1, K)), layer(torch.randn(1, K))
    with mock.patch.object(packed_gpu, "kernels_target", lambda device: None):
        layer, plain = packed_layer()
    x = torch.randn(1, K, dtype=torch.bfloat16)
    assert_right(layer(x), x, plain), assert_right(layer(x), x, plain)
    assert calls == ["backend", "backend"], "then two products, straight"


@pytest.mark.parametrize("M", [255, 300])
def test_many_rows_of_the_pivoted_form_are_a_pair(M, monkeypatch):
    asked, is_cheap = [], packed_gpu.torch_products.building_U_outweighs_order
    on_gpu = torch.device("cuda", 0)

    def as_on_a_gpu(rows, rank, device):
        asked.append(is_cheap(rows, rank, on_gpu))
        return asked[-1]

    monkeypatch.setattr(packed_gpu.torch_products, "building_U_outweighs_order", as_on_a_gpu)
    layer, plain = packed_layer("pivoted")
    x = torch.randn(M, K, dtype=torch.bfloat16)
    assert_right(layer(x), x, plain)
    assert asked[0] == (M >= 256) and not is_cheap(300, 151, on_gpu)


def test_a_dense_layer_stays(caplog):
    model = nn.Sequential(nn.Linear(K, N), make_layer("dense", N, K, N, 2)).to(torch.bfloat16)
    optimize_for_inference(model.eval())
    assert [type(m) for m in model] == [nn.Linear, SVDLoRALinear]
    assert "cuda: gains nothing by packing" in caplog.text


def test_the_op_names_what_is_wrong():
    layer, _ = packed_layer("pivoted")
    packed, x = layer.packed_state.packed, torch.randn(2, K, dtype=torch.bfloat16)
    zeros = torch.zeros(1024, dtype=torch.int32)

    def call(x=x, P=packed.P, aB=packed.aB, bias=None, zeros=zeros):
        weights = (P, packed.Q, aB, bias, packed.pivots, packed.others)
        return torch.ops.hylora.cuda_packed_layer.default(x, *weights, zeros, *packed.sizes)

    assert call().shape == (2, N)
    for words, given in {
        "x must be bfloat16 or float16": {"x": x.float()},
        "no dimension may be empty, got x": {"x": x[:0]},
        r"P must be \[23, 56\]": {"P": packed.P[1:]},
        "aB must come with lora_rank 3": {"aB": None},
        "bias must have 60 numbers": {"bias": x[0]},
        "counters must have at least": {"zeros": zeros[:1]},
    }.items():
        with pytest.raises(RuntimeError, match=words):
            call(**given)


# ------------------------------------------------------------------------------------ compiled code


@pytest.mark.parametrize("form", FORMS)
def test_compile_whole_graph(form):
    layer, plain = packed_layer(form)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for M in (2, 5):
        x = torch.randn(M, K, dtype=torch.bfloat16)
        with torch.no_grad():
            assert_right(compiled(x), x, plain)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    layer, _ = packed_layer(form)
    p, x = layer.packed_state.packed, torch.randn(3, K, dtype=torch.bfloat16)
    weights = (p.P, p.Q, p.aB, layer.bias.detach(), p.pivots, N)
    torch.library.opcheck(torch.ops.hylora.cuda_packed.default, (x, *weights))


# ------------------------------------------------------------------------------------ the way back


@pytest.mark.parametrize("alpha", [2.0, 0.37, 0.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_everything_comes_back_bit_for_bit(lora_rank, form, alpha):
    layer, plain = packed_layer(form, lora_rank, alpha=alpha)
    packed, state = layer.packed_state.packed, plain.state_dict()
    assert (packed.B is None) == (lora_rank == 0 or alpha == 2.0), "alpha is divided out again"
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    for found in (layer.state_dict(), torch.load(buffer), copy.deepcopy(layer).state_dict()):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    copied = copy.deepcopy(layer)
    assert restore_from_inference(layer) is layer and type(layer) is SVDLoRALinear
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    x = torch.randn(2, K, dtype=torch.bfloat16)
    assert_right(copied(x), x, plain), assert_right(copied(x), x, plain)


def test_another_dtype_restores_first():
    layer, plain = packed_layer()
    assert layer.to(torch.bfloat16) is layer and type(layer) is PackedSVDLoRALinear
    assert type(layer.to(torch.float32)) is SVDLoRALinear
    assert torch.equal(layer.U, plain.U.float())


def test_autocast_computes_in_the_packed_dtype():
    layer, plain = packed_layer()
    x = torch.randn(2, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_right(y, x.bfloat16(), plain)


def test_another_backend_refuses():
    layer, _ = packed_layer()
    with use_backend("cpu"), pytest.raises(ValueError, match="packed for backend 'cuda'"):
        layer(torch.randn(1, K, dtype=torch.bfloat16))
