"""Packed layers on one x as one launch of the C++ kernels, emulated on the CPU: results, orders,
sanitizers, which call goes where, grouped models."""

from __future__ import annotations

import copy
import io
import logging
import platform

import pytest
import torch
from cuda_emulator import emulated, on_cpu
from cuda_emulator.emulated import Choice, Script
from helpers import tiny
from helpers.gpu_groups import KINDS, Layers, add_group
from helpers.grouping import blocks_of, optimise, ungrouped
from helpers.numerics import make_layer
from helpers.optimising import llama, logits, same_state, state_of
from torch import nn

from hylora_kernels import optimize_for_inference, restore_from_inference, use_backend
from hylora_kernels.backends import cuda
from hylora_kernels.backends.shared import counters, group_gpu
from hylora_kernels.backends.shared.group_gpu import LAUNCHED_ROWS
from hylora_kernels.inference.cuda_graph import CudaGraphs
from hylora_kernels.inference.modules import Modules

K = 70
HALVES = (torch.bfloat16, torch.float16)

if emulated.COMPILER is None or platform.machine() != "x86_64":
    pytest.skip("the emulated kernels need g++ and x86-64", allow_module_level=True)


@pytest.fixture
def on_emulator():
    """The backend serves the CPU by its emulated kernels."""
    if group_gpu._LAUNCH is None:
        pytest.skip("the emulated ops need hylora_kernels/_csrc.so")
    torch.ops.load_library(on_cpu.build())
    with on_cpu.emulated(), use_backend("cuda"):
        yield
    torch.compiler.reset()


@pytest.fixture
def calls(on_emulator, monkeypatch):
    """The ways that calls of groups went: "launch", "products"."""
    found = []

    def noting(name, function):
        return lambda *given: found.append(name) or function(*given)

    monkeypatch.setattr(group_gpu, "_LAUNCH", noting("launch", group_gpu._LAUNCH))
    products = noting("products", group_gpu.torch_products_of)
    monkeypatch.setattr(group_gpu, "torch_products_of", products)
    return found


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("kinds", KINDS)
def test_groups_compute_the_formula(kinds, dtype, on_emulator):
    layers = Layers(KINDS[kinds], dtype, backend="cuda")
    for M in (0, 1, 3, 16, 17, 300):
        x = torch.randn(M, K).to(dtype)
        for biases in (layers.biases, ()):
            for rows in (x, torch.randn(M, 2 * K).to(dtype)[:, ::2].copy_(x), x[None, :, None]):
                y = cuda.forward_group(rows, layers.group, biases)
                assert y.shape == (*rows.shape[:-1], layers.group.width)
                layers.assert_right(y.reshape(M, layers.group.width), x, bool(biases))
    for kept in counters._kept.values():
        assert not kept.any(), "a launch leaves its counters zero"


def test_members_live_on_in_the_groups_memory(on_emulator):
    alone = Layers(KINDS["odd"], torch.bfloat16, backend="cuda", grouped=False)
    layers = Layers(KINDS["odd"], torch.bfloat16, backend="cuda")
    x = torch.randn(2, K).bfloat16()
    stacked = layers.group.operands
    of_group = {stacked.P.untyped_storage().data_ptr(), stacked.Q.untyped_storage().data_ptr()}
    for packed, twin, bias in zip(layers.packed, alone.packed, layers.biases, strict=True):
        moved = [t for t in (packed.P, packed.Q, packed.aB) if t is not None]
        assert {t.untyped_storage().data_ptr() for t in moved} <= of_group
        for _ in range(2):
            assert torch.equal(
                cuda.forward_packed(x, packed, bias), cuda.forward_packed(x, twin, bias)
            )
        for one, other in zip(cuda.unpack(packed), cuda.unpack(twin), strict=True):
            assert one is other or torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_few_rows_are_one_launch_many_are_products(calls, monkeypatch):
    layers = Layers(KINDS["pairs"], torch.bfloat16, backend="cuda")

    def call(M):
        cuda.forward_group(torch.randn(M, K).bfloat16(), layers.group, ())

    for M in (1, 1, LAUNCHED_ROWS, LAUNCHED_ROWS + 1, LAUNCHED_ROWS + 1):
        call(M)
    assert calls == ["launch"] * 3 + ["products"] * 2
    monkeypatch.setattr(group_gpu, "is_captured", lambda device: True)
    with cuda.forcing(cuda.TORCH_PRODUCTS):
        call(1)
    assert calls[-1] == "products", "a graph's call goes by the backend"
    nine = Layers(KINDS["pairs"] * 3, torch.bfloat16, backend="cuda")
    assert nine.group.target is None, "a launch's arguments hold eight members"


def test_the_op_names_what_is_wrong(on_emulator):
    layers = Layers(KINDS["pivoted"], torch.bfloat16, backend="cuda")
    group, x = layers.group, torch.randn(2, K).bfloat16()
    zeros = torch.zeros(1024, dtype=torch.int32)

    def call(x=x, P=group.operands.P, biases=(), zeros=zeros, places=group.places, width=112):
        _, *rest = group.operands[:4]
        return group_gpu._LAUNCH(x, P, *rest, biases, zeros, places, width, *group.target)

    assert call().shape == (2, 112)
    for words, given in {
        "x must be bfloat16 or float16": {"x": x.float()},
        "x must have 1 to 16 rows": {"x": x.repeat(9, 1)},
        r"P must be \[\d+, 71\]": {"x": torch.randn(2, 71).bfloat16()},
        "places of member 1 must lie in P": {"P": group.operands.P[:-8]},
        "places must be 10 numbers for each of 1 to 8 members": {"places": group.places[1:]},
        "biases must be 2 or none": {"biases": [None]},
        "bias must have 48 numbers": {"biases": [None, x[0]]},
        "width must be at least the members' 112": {"width": 111},
        "counters must have at least": {"zeros": zeros[:1]},
    }.items():
        with pytest.raises(RuntimeError, match=words):
            call(**given)


def test_opcheck(on_emulator):
    layers = Layers(KINDS["odd"], torch.bfloat16, backend="cuda")
    g, x = layers.group, torch.randn(2, 3, K).bfloat16()
    for backend in ("cuda", "triton"):
        op = getattr(torch.ops.hylora, f"{backend}_group").default
        args = (x, *g.operands[:4], layers.biases, g.places, g.width)
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------------------- orders and sanitizers


def drawn(layers: Layers, script: Script, seeds, split: int = 2):
    x = torch.randn(3, K).to(layers.packed[0].dtype)
    choices = [Choice(split=split, programs=1 + 3 * seed % 8, seed=seed) for seed in seeds]
    return x, [add_group(script, layers, x, choice) for choice in choices]


@pytest.mark.parametrize("sanitizer", emulated.FLAGS)
def test_same_bits_in_any_order_and_no_fault(sanitizer):
    if sanitizer != "plain" and (reason := emulated.why_no_sanitizer(sanitizer)):
        pytest.skip(reason)
    layers = Layers(KINDS["odd"], torch.float16, backend="cuda")
    script, seeds = Script(), range(8 if sanitizer == "plain" else 3)
    x, places = drawn(layers, script, seeds)
    results, launches = emulated.run(emulated.driver(sanitizer), script)
    layers.assert_right(results[places[0]], x)
    assert all(torch.equal(results[place], results[places[0]]) for place in places)
    assert len({launch.order for launch in launches}) >= len(seeds) - 2


# ------------------------------------------------------------------------------------------- models


def mixed_llama(dtype=torch.bfloat16):
    """One layer's v is dense, its k pivoted without an adapter; the other has pairs alone."""
    model = llama(dtype, form="pair")
    attention = model.model.layers[0].self_attn
    attention.k_proj = make_layer("pivoted", 64, 64, 40, 0, dtype=dtype)
    attention.v_proj = attention.v_proj.to_linear()
    return model


@torch.no_grad()
def test_a_model_gives_the_same_numbers_and_comes_back(on_emulator, caplog):
    model = mixed_llama()
    state, kinds = state_of(model), [type(m) for m in model.modules()]
    with caplog.at_level(logging.INFO, "hylora_kernels"):
        optimise(model.eval())
    assert "; 4 groups computed as one" in caplog.text
    twin = ungrouped(model)
    for length in (1, 3, 17):
        ids = tiny.tokens(2, length) % 96
        got, want = (m(input_ids=ids, use_cache=False).logits for m in (model, twin))
        assert (got - want).norm() <= 4 * torch.finfo(torch.bfloat16).eps * want.norm()
    assert same_state(model.state_dict(), state)
    want, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert len(blocks_of(again)) == 4 and torch.equal(logits(again), want)
    restore_from_inference(model)
    assert [type(m) for m in model.modules()] == kinds and same_state(model.state_dict(), state)


def test_a_dense_linear_is_packed_for_a_group_alone(on_emulator, caplog):
    model = mixed_llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[1].mlp.down_proj.to_linear()
    mlp = model.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.gate_proj.to_linear(), mlp.up_proj.to_linear()
    with caplog.at_level(logging.INFO, "hylora_kernels"):
        optimise(model.eval())
    first, second = model.model.layers
    assert first.self_attn.v_proj.columns is not None
    for plain in (second.mlp.down_proj, first.mlp.gate_proj, model.lm_head):
        assert type(plain) is nn.Linear
    assert "; 3 groups computed as one" in caplog.text
    assert "all of them are dense, which torch's own products serve" in caplog.text


def test_groups_are_the_default_on_a_gpu_alone(on_emulator, monkeypatch):
    model = mixed_llama().eval()
    optimize_for_inference(model)
    assert not blocks_of(model)
    restore_from_inference(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.dim() == 1))
    assert any(p.is_cuda for p in model.parameters()), "the norms alone, for this test"
    assert len(blocks_of(optimize_for_inference(model))) == 4


@torch.no_grad()
def test_the_steps_of_a_cuda_graph_go_through_groups(calls):
    model = optimise(mixed_llama().eval())
    ids = tiny.tokens(2, 5) % 96
    mask, tokens = torch.ones_like(ids), ids[:, 0]

    def captured(run, put_back, device):
        put_back()
        return run

    graphs = CudaGraphs(model, captured, lambda model: "")
    graphs.prefill(ids, mask)
    del calls[:]
    got = graphs.step(tokens)
    assert calls == ["launch"] * 4, "q, k, v and gate, up of two layers"
    twin = Modules(ungrouped(model))
    twin.prefill(ids, mask)
    want = twin.step(tokens)
    assert (got - want).norm() <= 4 * torch.finfo(torch.bfloat16).eps * want.norm()


@torch.no_grad()
def test_compile_whole_graph(on_emulator):
    model = optimise(mixed_llama().eval())
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for M in (2, 5):
        x = torch.randn(M, 64).bfloat16()
        torch.testing.assert_close(compiled(x), block(x))


@torch.no_grad()
def test_autocast_is_that_of_the_members_device(on_emulator, monkeypatch):
    layers = Layers(KINDS["pairs"], torch.bfloat16, backend="cuda")
    from hylora_kernels.ops.packed import packed_group

    with torch.autocast("cpu", torch.float16):
        y = packed_group(torch.randn(2, K), layers.group)
    assert y.dtype == torch.float16
