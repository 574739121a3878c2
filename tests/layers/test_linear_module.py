"""SVDLoRALinear as an nn.Module: state, dtype, device, copies, memory, compile, FSDP."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.numerics import dense_weight, every_form, make_layer
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrize

from hylora_kernels import SVDLoRALinear


def names_of(layer) -> set[str]:
    return {"SVh", "U", "A", "B", "bias"} | ({"pivots"} if layer.form == "pivoted" else set())


@every_form
def test_frozen_factors_are_parameters_and_need_no_gradient(form):
    layer = make_layer(form)
    needs = {name: p.requires_grad for name, p in layer.named_parameters()}
    assert needs == {"SVh": False, "U": False, "A": True, "B": True, "bias": True}
    assert [name for name, _ in layer.named_buffers()] == (["pivots"] if form != "pair" else [])
    layer(torch.ones(1, 14, dtype=torch.float64)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"A", "B", "bias"}
    for name in ("SVh", "U"):
        wrong = copy.deepcopy(layer)
        getattr(wrong, name).requires_grad_(True)
        with pytest.raises(ValueError, match=f"^{name} must not require grad: it is frozen"):
            wrong(torch.ones(1, 14, dtype=torch.float64))
        with torch.no_grad():
            wrong(torch.ones(1, 14, dtype=torch.float64))


@every_form
def test_state_dict_round_trip(form):
    layer, other = make_layer(form), make_layer(form)
    x = torch.randn(3, 14, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == names_of(layer)
    assert other.load_state_dict(state) == ([], [])
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert torch.equal(layer(x), other(x))
    third = make_layer(form, device="meta")
    third.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), third(x)) and not third.SVh.requires_grad
    with pytest.raises(RuntimeError, match="size mismatch for SVh"):
        make_layer(form, N=8 if form == "dense" else 9, rank=3).load_state_dict(state)


@every_form
def test_deepcopy_is_a_layer_of_its_own(form):
    layer = make_layer(form, lora_dropout=0.1).eval()
    x = torch.randn(3, 14, dtype=torch.float64)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y) and not twin.training
    needs = [p.requires_grad for p in layer.parameters()]
    assert [p.requires_grad for p in twin.parameters()] == needs
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.copy_(tensor.flip(0) if tensor.dtype.is_floating_point else tensor)
    assert torch.equal(layer(x), y) and not torch.equal(twin(x), y)


@every_form
def test_to_another_dtype(form):
    layer = make_layer(form)
    weight = dense_weight(layer)
    for cast, dtype in (
        (layer.float, torch.float32),
        (layer.bfloat16, torch.bfloat16),
        (lambda: layer.to(torch.float16), torch.float16),
    ):
        cast()
        floats = {n: t.dtype for n, t in layer.state_dict().items() if n != "pivots"}
        assert set(floats.values()) == {dtype}
        assert layer.pivots is None or layer.pivots.dtype == torch.int32
        x = torch.randn(3, 14, dtype=dtype)
        expected = x.double() @ weight.T + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, atol=0.2, rtol=0.05)


@every_form
def test_to_another_device(form, device):
    layer = make_layer(form, dtype=torch.float32)
    x = torch.randn(3, 14)
    y = layer(x)
    torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), y, atol=1e-5, rtol=1e-5)
    layer.to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer(x.to("meta")).shape == y.shape


@every_form
def test_made_on_meta_it_takes_no_memory(form):
    N, K = 2**20, 2**21  # 4 TB as a dense float16 matrix
    kind, rank = ("pivoted", N) if form == "dense" else (form, 2**18)
    layer = SVDLoRALinear(K, N, rank, 64, form=kind, device="meta", dtype=torch.float16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.parameter_count(merged=False) > 2**37
    assert layer(torch.empty(5, K, device="meta", dtype=torch.float16)).shape == (5, N)
    with torch.device("meta"):
        layer = SVDLoRALinear(K, N, rank, form=kind)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}


@every_form
def test_from_meta_to_real_by_reset_parameters(form):
    layer = make_layer(form, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert all(t.isfinite().all() for t in layer.state_dict().values())
    assert layer.pivots is None or layer.pivots.tolist() == list(range(layer.rank))
    assert layer(torch.randn(2, 14, dtype=torch.float64)).isfinite().all()


def live_tensors(at_least: int) -> int:
    """The number of tensors alive with at least that many elements."""
    gc.collect()
    return sum(
        type(t) in (Tensor, nn.Parameter) and t.numel() >= at_least for t in gc.get_objects()
    )


@every_form
def test_no_hidden_copies(form):
    layer = make_layer(form, 60, 50, 20, 8, dtype=torch.bfloat16).eval()
    x = torch.randn(2, 50, dtype=torch.bfloat16)
    smallest = min(p.numel() for p in layer.parameters() if p.dim() == 2 and p.numel())
    assert smallest > 2 * layer.out_features, "kept orders of the pivots must not count"
    attributes, tensors = set(vars(layer)), live_tensors(smallest)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            layer(x)
    assert set(vars(layer)) == attributes and live_tensors(smallest) == tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_factors_own_no_more_memory_than_they_need(form, dtype):
    layer = SVDLoRALinear.from_linear(nn.Linear(14, 9, dtype=dtype), 4, 3, form=form)
    for made in (layer, copy.deepcopy(layer).merge()):
        for name, tensor in made.state_dict().items():
            assert tensor.is_contiguous(), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("form, lora_dropout", [("pair", 0.4), ("pivoted", 0.0)])
def test_compile(lora_dropout, form):
    layer = make_layer(form, lora_dropout=lora_dropout, dtype=torch.bfloat16)
    layer.A, layer.B = nn.Parameter(layer.A.float()), nn.Parameter(layer.B.float())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 14, dtype=torch.bfloat16)
    compiled(x).sum().backward()
    layer.zero_grad()
    layer.eval()
    compiled(x).sum().backward()
    grads = [layer.A.grad.clone(), layer.B.grad.clone(), layer.bias.grad.clone()]
    layer.zero_grad()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(compiled(x), y)
    assert all(map(torch.equal, grads, (layer.A.grad, layer.B.grad, layer.bias.grad)))
    torch.compiler.reset()


@pytest.fixture
def world_of_one():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fully_sharded(world_of_one):
    """Frozen factors are sharded like trained ones; a step gives what it gives without sharding."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for form in ("pair", "pivoted", "dense"):
        model = nn.Sequential(make_layer(form, 14, 14), make_layer(form))
        alone = copy.deepcopy(model)
        for layer in model:
            fully_shard(layer, mesh=world_of_one)
        fully_shard(model, mesh=world_of_one)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        x = torch.randn(3, 14, dtype=torch.float64)
        for each in (model, alone):
            trained = [p for p in each.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.1)
            each(x).square().sum().backward()
            optimizer.step()
        assert torch.equal(model(x), alone(x))
        frozen = model[0].SVh.full_tensor()
        assert torch.equal(frozen, alone[0].SVh) and model[0].SVh.grad is None


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1).double())

    def forward(self, factor):
        return self.scale * factor


@every_form
def test_a_gradient_through_frozen_factors_is_refused_not_dropped(form):
    x = torch.randn(2, 14, dtype=torch.float64)
    for name in ("SVh", "U"):
        layer = make_layer(form)
        state = {name: getattr(layer, name) * torch.ones(1).double().requires_grad_()}
        with pytest.raises(ValueError, match=rf"^{name} must not require grad"):
            torch.func.functional_call(layer, state, (x,))
        parametrize.register_parametrization(layer, name, Scaled())
        with pytest.raises(ValueError, match=rf"^{name} must not require grad"):
            layer(x)
    layer = make_layer(form)
    parametrize.register_parametrization(layer, "B", Scaled())
    layer(x).sum().backward()
    assert layer.parametrizations.B[0].scale.grad.any()


@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
def test_fully_sharded_as_one_flat_parameter(world_of_one, lora_dropout):
    """FSDP1 hands a layer views of one parameter that requires grad, the frozen factors' too."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for form in ("pair", "pivoted", "dense"):
        model = nn.Sequential(
            make_layer(form, 14, 14, lora_dropout=lora_dropout),
            make_layer(form, lora_dropout=lora_dropout),
        )
        alone = copy.deepcopy(model)
        frozen = {name: p.clone() for name, p in alone.named_parameters() if not p.requires_grad}
        sharded = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
        x = torch.randn(3, 14, dtype=torch.float64)
        losses = {}
        for name, each in (("sharded", sharded), ("alone", alone)):
            torch.manual_seed(0)
            optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss = each(x).square().sum()
                loss.backward()
                optimizer.step()
                losses.setdefault(name, []).append(loss.item())
        assert losses["sharded"] == losses["alone"]
        with FullyShardedDataParallel.summon_full_params(sharded):
            held = {
                n.replace("_fsdp_wrapped_module.", ""): p for n, p in sharded.named_parameters()
            }
            assert all(torch.equal(held[name], frozen[name]) for name in frozen)
            assert all(map(torch.equal, held.values(), alone.parameters()))


@pytest.mark.parametrize(
    "form, lora_dropout, dynamic, backend",
    [
        ("pair", 0.0, None, "aot_eager"),
        ("pair", 0.0, True, "eager"),
        ("pivoted", 0.0, True, "eager"),
        ("pair", 0.3, None, "eager"),
    ],
)
def test_one_compiled_graph_serves_every_alpha(form, lora_dropout, dynamic, backend):
    torch.compiler.reset()
    counters.clear()
    layer = make_layer(form, lora_dropout=lora_dropout, dtype=torch.float32)
    layer.A, layer.B = nn.Parameter(layer.A.double()), nn.Parameter(layer.B.double())  # masters
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    x = torch.randn(3, 14)
    for alpha in [1.0, 0, -2, *(1 + i / 7 for i in range(17))]:
        layer.alpha = alpha
        results = []
        for each in (compiled, layer):
            layer.zero_grad()
            torch.manual_seed(1)
            y = each(x)
            y.square().sum().backward()
            results.append((y, layer.A.grad, layer.B.grad, layer.bias.grad))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_alpha_is_checked_when_it_is_set():
    layer = make_layer(alpha=2)
    assert layer.alpha == 2.0 and type(layer.alpha) is float
    for wrong, kind in ((1e39, ValueError), (float("nan"), ValueError), (True, TypeError)):
        with pytest.raises(kind, match=r"^alpha must be"):
            layer.alpha = wrong
    layer.alpha = np.float32(0.5)
    twin = copy.deepcopy(layer)
    layer.alpha = 3
    assert type(layer.alpha) is float and (layer.alpha, twin.alpha) == (3.0, 0.5)
    assert set(layer.state_dict()) == names_of(layer)
    with torch.inference_mode():
        layer.alpha = 4
    x = torch.randn(2, 14, dtype=torch.float64)
    torch.compile(layer, backend="eager")(x).sum().backward()
    torch.compiler.reset()


def test_a_default_device_changes_nothing():
    """ "meta" stands for the GPU of a user who has called set_default_device("cuda")."""
    linear = nn.Linear(14, 9)
    symmetric = nn.Linear(8, 8)
    with torch.no_grad():
        symmetric.weight.copy_(symmetric.weight @ symmetric.weight.T)
    pair, pivoted = (SVDLoRALinear(14, 9, 4, 3, form=form) for form in ("pair", "pivoted"))
    wide = SVDLoRALinear(14, 9, 8, 3)

    def made():
        for form in ("pair", "pivoted"):
            for init in ("next", "classic"):
                yield SVDLoRALinear.from_linear(linear, 4, 3, form=form, init=init)
            yield SVDLoRALinear.from_linear(linear, 4, factorizer="randomized", form=form)
            yield SVDLoRALinear.from_linear(symmetric, 4, 2, factorizer="nystrom", form=form)
        yield SVDLoRALinear.from_linear(linear, 9, 2, form="pivoted")
        yield SVDLoRALinear.from_dense(linear.weight, 3)
        for layer in (pair, pivoted, wide):
            yield copy.deepcopy(layer)
            yield layer.to_linear()
            yield copy.deepcopy(layer).merge()

    with torch.device("meta"):
        layers = list(made())
        outputs = [layer(torch.ones(2, layer.in_features, device="cpu")) for layer in layers]
        compiled = torch.compile(pivoted, backend="eager")(torch.ones(2, 14, device="cpu"))
        for layer in (pair, pivoted):
            layer.reset_parameters()
    for layer, y in zip(layers, outputs, strict=True):
        assert y.device.type == "cpu" and all(
            t.device.type == "cpu" for t in layer.state_dict().values()
        )
    assert compiled.device.type == "cpu"
    assert SVDLoRALinear(4, 4, 2, device="cpu").SVh.device.type == "cpu"
    torch.compiler.reset()
