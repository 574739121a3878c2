"""Packing and back: the same Parameter objects, with all that hangs on them, from any root."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import tiny
from helpers.numerics import make_layer
from helpers.optimising import HINT, llama, logits, packs, same_state, state_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hylora_kernels import SVDLoRALinear, optimize_for_inference, restore_from_inference
from hylora_kernels.evaluation.evaluate import evaluate
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.evaluation.speed import throughput
from hylora_kernels.inference import optimize
from hylora_kernels.layers.packed import PackedEmbedding, PackedLinear, packed_states
from hylora_kernels.layers.packed_parameter import PackedParameter

pytestmark = packs
FLOAT32 = {"dtype": torch.float32}


def net() -> nn.Sequential:
    layers = nn.LayerNorm(14), make_layer("pair", 14, 14, **FLOAT32), nn.Linear(14, 14)
    return nn.Sequential(*layers, make_layer("pivoted", 14, 14, **FLOAT32)).eval()


def there_and_back(model: nn.Module) -> nn.Module:
    return restore_from_inference(optimize_for_inference(model.eval())).train()


def needs(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------- the same parameters


ROUND_TRIPS = {
    "optimize and restore": there_and_back,
    "evaluate": lambda model: evaluate(
        model.eval(), tiny.tokens(2, 16), progress=False, optimize=True
    ),
    "throughput": lambda model: throughput(model.eval(), 4, 2, optimize=True),
    "twice": lambda model: there_and_back(there_and_back(model)),
    "to the same dtype": lambda model: optimize_for_inference(model.eval()).float().to("cpu"),
    "to another dtype": lambda model: optimize_for_inference(model.eval()).double().float(),
    "from inference mode": torch.inference_mode()(there_and_back),
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_an_optimizer_goes_on(way):
    model, twin = llama(**FLOAT32), llama(**FLOAT32)
    twin.load_state_dict(model.state_dict())
    names, objects = list(needs(model)), list(map(id, model.parameters()))

    def train(model, optimizer):
        optimizer.zero_grad()
        ids = tiny.tokens(2, 8)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for step in range(3):
        for trained, optimizer in zip((model, twin), optimizers, strict=True):
            train(trained, optimizer)
        if step == 1:
            ROUND_TRIPS[way](model)
            restore_from_inference(model)
    assert list(needs(model)) == names and list(map(id, model.parameters())) == objects
    assert same_state(model.state_dict(), twin.state_dict())


def test_what_hangs_on_a_parameter_stays():
    layer, calls = make_layer("pair", 14, 14, **FLOAT32), []
    A, x = layer.A, torch.randn(3, 14)
    A.register_hook(lambda grad: calls.append("hook"))
    A.register_post_accumulate_grad_hook(lambda p: calls.append("post"))
    A.is_special = True
    layer(x).sum().backward()
    grad = A.grad
    optimize_for_inference(layer.eval())
    assert A.grad is grad and torch.equal(A, layer.A) and A.shape == (3, 14)
    assert isinstance(A, nn.Parameter) and A.is_special and not A.requires_grad
    restore_from_inference(layer).train()
    assert layer.A is A and type(A) is nn.Parameter and A.grad is grad and A.is_special
    assert vars(A) == {"is_special": True}
    layer(x).sum().backward()
    assert calls == ["hook", "post"] * 2 and torch.equal(A.grad, grad)


def test_a_graph_from_before_survives():
    model, x = net(), torch.randn(3, 14)
    grads = []
    for between in (lambda model: model, there_and_back):
        model.zero_grad()
        loss = model(x).sum()
        between(model)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 10
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_order_and_the_strides_stay():
    layer = nn.Linear(14, 9)
    layer._parameters = dict(reversed(layer._parameters.items()))
    layer.weight = nn.Parameter(torch.randn(14, 9).T)
    layer.extra = nn.Parameter(torch.ones(2))
    names, strides = list(needs(layer)), layer.weight.stride()
    there_and_back(layer)
    assert list(needs(layer)) == names == ["bias", "weight", "extra"]
    assert layer.weight.stride() == strides


def test_memory_that_others_hold_stays_shared():
    flat = torch.randn(2 * 14 * 14)
    model = nn.ModuleList([nn.Linear(14, 14), nn.Linear(14, 14)])
    for layer, part in zip(model, flat.split(14 * 14), strict=True):
        layer.weight.data = part.view(14, 14)
    twin = nn.Linear(14, 14)
    twin.weight.data = model[0].weight.data
    there_and_back(model)
    flat.fill_(7)
    for weight in (model[0].weight, model[1].weight, twin.weight):
        assert bool((weight == 7).all())


def test_memory_that_nobody_holds_is_freed():
    layer = optimize_for_inference(nn.Linear(64, 64).eval())
    with torch._C.DisableTorchFunctionSubclass():
        assert layer.weight.untyped_storage().nbytes() == 0
    assert layer.weight.packed.memory.expired()


# ------------------------------------------------------------------------ bookkeeping from any root


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


ROOTS = {
    "a wrapper": (lambda m: m, lambda m: Wrapper(m)),
    "the inside": (lambda m: Wrapper(m).eval(), lambda m: m),
    "another wrapper": (lambda m: Wrapper(m).eval(), lambda m: nn.ModuleDict({"x": m})),
    "each child": (lambda m: m, lambda m: nn.ModuleList(list(m))),
    "torch.compile": (lambda m: m, lambda m: torch.compile(m, backend="eager")),
    "inside out": (lambda m: optimize_for_inference(m[1]) and m, lambda m: m),
}


@pytest.mark.parametrize("name", ROOTS)
def test_any_root_restores(name):
    model = net()
    model[0].weight.requires_grad_(False)
    before, state = needs(model), state_of(model)
    wrapped, other = ROOTS[name]
    optimize_for_inference(wrapped(model))
    assert not any(needs(model).values()) and len(packed_states(model)) == 3
    restore_from_inference(other(model))
    assert needs(model) == before and not packed_states(model)
    assert same_state(model.state_dict(), state)
    assert not any("hylora_frozen" in vars(m) for m in model.modules())


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_a_copy_of_a_part_is_whole(part):
    model = net()
    before, state = needs(model[part]), state_of(model[part])
    twin = copy.deepcopy(optimize_for_inference(model)[part])
    assert not any(needs(twin).values())
    restore_from_inference(twin)
    assert needs(twin) == before and same_state(twin.state_dict(), state)
    assert len(packed_states(model)) == 3 and not any(needs(model).values())
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in twin.parameters()}


def test_restoring_a_part_leaves_the_rest():
    model = optimize_for_inference(net())
    restore_from_inference(model[2])
    assert len(packed_states(model)) == 2 and model[2].weight.requires_grad
    assert not model[0].weight.requires_grad
    restore_from_inference(model)
    assert needs(model) == needs(net())


def test_a_parameter_of_two_owners_needs_its_gradient_again():
    model = net()
    model.append(nn.LayerNorm(14).eval())
    model[4].weight = model[0].weight
    optimize_for_inference(model)
    restore_from_inference(model[4])
    assert model[0].weight.requires_grad
    restore_from_inference(model)
    assert all(needs(model[0]).values())


# ------------------------------------------------------------------------------- state held once


def written(layer, write) -> tuple[bool, bool]:
    """(the write raised, it changed the output), each on a packed layer."""
    optimize_for_inference(layer.eval())
    x = torch.randn(3, 14)
    y = layer(x)
    with torch.no_grad():
        try:
            write(layer)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):
            assert torch.equal(layer(x), y)
            return True, False
        return False, not torch.equal(layer(x), y)


REFUSED = {
    "alpha": lambda layer: setattr(layer, "alpha", 0.0),
    "pivots": lambda layer: setattr(layer, "pivots", layer.pivots.clone()),
    "pivots in place": lambda layer: layer.pivots.zero_(),
    "U": lambda layer: setattr(layer, "U", nn.Parameter(torch.zeros(5, 4))),
    "U.data in place": lambda layer: layer.U.data.mul_(3),
    "U in place": lambda layer: layer.U.mul_(3),
    "U[0]": lambda layer: layer.U.__setitem__(0, 1.0),
    "U.data[0]": lambda layer: layer.U.data.__setitem__(0, 1.0),
    "a row of U": lambda layer: layer.U[0].fill_(1.0),
    "U.T": lambda layer: layer.U.T.zero_(),
    "U.detach()": lambda layer: layer.U.detach().zero_(),
    "U.view(-1)": lambda layer: layer.U.view(-1).zero_(),
    "U.copy_": lambda layer: layer.U.copy_(torch.zeros(5, 4)),
    "init": lambda layer: nn.init.zeros_(layer.U),
    "out=": lambda layer: torch.add(torch.ones(5, 4), 1, out=layer.U),
    "foreach": lambda layer: torch._foreach_mul_([layer.A, layer.B], 2.0),
    "A": lambda layer: setattr(layer, "A", None),
    "del A": lambda layer: delattr(layer, "A"),
    "A.requires_grad": lambda layer: layer.A.requires_grad_(True),
    "requires_grad_": lambda layer: layer.requires_grad_(True),
    "A.grad": lambda layer: setattr(layer.A, "grad", torch.ones(3, 14)),
    "register A": lambda layer: layer.register_parameter("A", nn.Parameter(torch.ones(3, 14))),
    "prune": lambda layer: prune.l1_unstructured(layer, "A", 0.5),
    "prune.identity": lambda layer: prune.identity(layer, "U"),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "A", nn.ReLU()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "A"),
    "functional_call": lambda layer: torch.func.functional_call(
        layer, {"A": torch.zeros(3, 14)}, torch.ones(1, 14)
    ),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "assign": lambda layer: layer.load_state_dict(layer.state_dict(), assign=True),
}
FOLLOWED = {
    "bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(9))),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "bias in place": lambda layer: layer.bias.add_(9),
    "bias.data": lambda layer: layer.bias.data.add_(9),
    "bias from NumPy": lambda layer: layer.bias.detach().numpy().__iadd__(9),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 1.0),
    "U.data": lambda layer: setattr(layer.U, "data", torch.ones(5, 4)),
    "zeros": lambda layer: layer._apply(lambda t: t.zero_() if t.is_floating_point() else t),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_nothing_is_refused(name, mode):
    with mode():
        if mode is torch.inference_mode and name in (
            *("pivots in place", "a row of U", "U.T", "U.detach()", "U.view(-1)"),
        ):
            pytest.skip("torch allows writes to inference tensors there: documented")
        layer = make_layer("pivoted", **FLOAT32)
        state = state_of(layer)
        assert written(layer, REFUSED[name]) == (True, False)
        restore_from_inference(layer)
        assert same_state(layer.state_dict(), state)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "deepcopy"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_rest_is_followed(name, copied):
    layer = optimize_for_inference(make_layer("pivoted", **FLOAT32).eval())
    raised, changed = written(copy.deepcopy(layer) if copied else layer, FOLLOWED[name])
    assert changed and not raised


def test_a_bias_that_does_not_fit_is_named():
    layer = optimize_for_inference(make_layer("pivoted", **FLOAT32).eval())
    layer.bias = nn.Parameter(torch.ones(5), False)
    with pytest.raises(ValueError, match=r"bias must be \[N\] = \[9\].*, got \[5\]"):
        layer(torch.ones(1, 14))
    layer.bias = nn.Parameter(torch.ones(9).double(), False)
    with pytest.raises(TypeError, match=r"bias must have the packed layer's dtype torch\.float32"):
        layer(torch.ones(1, 14))


def test_a_gradient_that_would_be_missing_is_refused():
    model = optimize_for_inference(net())
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"requires grad, but a layer packed.*{HINT}"):
        model[2](torch.ones(1, 14))
    with pytest.raises(RuntimeError, match=f"requires grad, but a layer packed.*{HINT}"):
        model(torch.ones(1, 14))
    with torch.no_grad():
        model(torch.ones(1, 14))
    optimizer = torch.optim.SGD([model[1].A], lr=1.0)
    optimizer.step()
    there_and_back(model)(torch.ones(1, 14)).sum().backward()
    optimize_for_inference(model.eval())
    optimizer.param_groups[0]["params"] = [model[1].B]
    with pytest.raises(RuntimeError, match=HINT):
        optimizer.step()


def test_share_memory_shares():
    layer = optimize_for_inference(make_layer("pivoted", **FLOAT32).eval())
    assert layer.share_memory() is layer and len(packed_states(layer)) == 1
    (state,) = packed_states(layer)
    assert all(tensor.is_shared() for tensor in state.tensors) and layer.bias.is_shared()
    assert state.packed.tensors[0].is_shared()


def test_masters_are_cast_with_the_layer():
    layer = make_layer("pair", dtype=torch.bfloat16).eval()
    layer.A, layer.B = nn.Parameter(layer.A.float()), nn.Parameter(layer.B.float())
    for _ in range(2):
        assert optimize_for_inference(layer) is layer and layer.A.dtype == torch.float32
        layer.float()
        assert layer.A.dtype == layer.U.dtype == torch.float32
        layer.bfloat16()
        layer.A, layer.B = nn.Parameter(layer.A.float()), nn.Parameter(layer.B.float())
    optimize_for_inference(layer).bfloat16()
    assert layer.A.dtype == torch.bfloat16
    layer = optimize_for_inference(make_layer("pair", **FLOAT32).eval())
    layer.to_empty(device="cpu")
    assert type(layer) is SVDLoRALinear


# --------------------------------------------------------------------- layers that stay as they are


def pruned(layer):
    prune.l1_unstructured(layer, "A", 0.5)


def pruned_bias(layer):
    prune.l1_unstructured(layer, "bias", 0.5)


def parametrized(layer):
    parametrize.register_parametrization(layer, "A", nn.ReLU())


def normed(layer):
    parametrizations.weight_norm(layer, "U")


def spectral(layer):
    nn.utils.spectral_norm(layer, "U")


def old_norm(layer):
    nn.utils.weight_norm(layer, "U")


def subclassed(layer):
    layer.U = nn.Parameter(torch.Tensor._make_subclass(Odd, layer.U.data), requires_grad=False)


def on_meta(layer):
    layer.U = nn.Parameter(layer.U.detach().to("meta"), requires_grad=False)


def shared(layer):
    layer.share_memory()


def plain_tensor(layer):
    U = layer.U.detach().clone()
    del layer.U
    layer.U = U


def twice(layer):
    layer.U = layer.SVh


class Odd(torch.Tensor):
    pass


STAY = {
    "its A is no parameter": pruned,
    "its bias is no parameter": pruned_bias,
    "its class is ParametrizedSVDLoRALinear": parametrized,
    "its class is Parametrized": normed,
    "its U is no parameter": spectral,
    "its U is no par": old_norm,
    "its U is no plain parameter but a Odd": subclassed,
    "its U is on meta": on_meta,
    "its SVh is shared with other processes": shared,
    "its U is no p": plain_tensor,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reason", STAY)
def test_layers_without_plain_parameters_stay_with_the_reason(reason, caplog):
    model = nn.ModuleList([make_layer("pair", **FLOAT32), make_layer("pair", **FLOAT32)])
    STAY[reason](model[0])
    kind, attributes = type(model[0]), {*vars(model[0]), *model[0]._parameters}
    before = needs(model)
    with caplog.at_level(logging.INFO, "hylora_kernels"):
        optimize_for_inference(model.eval())
    assert type(model[0]) is kind and len(packed_states(model)) == 1
    assert f"left 1 as they are (0: {reason}" in caplog.text
    restore_from_inference(model)
    assert {*vars(model[0]), *model[0]._parameters} == attributes and needs(model) == before


def test_a_failure_changes_nothing(monkeypatch):
    model = net()
    before, state, kinds = needs(model), state_of(model), [type(m) for m in model]
    count = iter([False, False, True])
    convert = optimize.convert_layers

    def fails(modules, packed):
        if next(count):
            raise KeyboardInterrupt
        convert(modules, packed)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optimize, "convert_layers", fails)
        optimize_for_inference(model)
    assert [type(m) for m in model] == kinds and needs(model) == before
    assert same_state(model.state_dict(), state)
    optimize_for_inference(model)
    packed = packed_states(model)[1]

    def out_of_memory():
        raise MemoryError

    with pytest.raises(MemoryError):
        monkeypatch.setattr(packed, "plain", out_of_memory)
        restore_from_inference(model)
    assert type(model[2]) is PackedLinear and packed in packed_states(model)
    monkeypatch.undo()
    restore_from_inference(model)
    assert needs(model) == before and same_state(model.state_dict(), state)


# ------------------------------------------------------------------------------------- tied heads


def tied():
    model = llama(torch.float32)
    return model, model.lm_head, model.model.embed_tokens


def test_weights_are_tied_again_while_packed():
    model, head, embedding = tied()
    weight, want = head.weight, logits(model)
    optimize_for_inference(model)
    packed = logits(model)
    model.tie_weights()
    assert head.weight is embedding.weight is weight is model.get_parameter("lm_head.weight")
    assert torch.equal(logits(model), packed) and type(embedding) is PackedEmbedding
    restore_from_inference(model).tie_weights()
    assert head.weight is embedding.weight is weight and torch.equal(logits(model), want)


@pytest.mark.parametrize("restored", ["head", "embedding", "model"])
@pytest.mark.parametrize("optimized", ["head", "model"])
def test_one_of_tied_layers_alone(optimized, restored):
    model, head, embedding = tied()
    root = {"head": head, "embedding": embedding, "model": model}
    weight, state, before = head.weight, state_of(model), logits(model)
    optimize_for_inference(root[optimized])
    assert isinstance(head.weight, PackedParameter) and head.weight is embedding.weight
    torch.testing.assert_close(logits(model), before)
    assert same_state(model.state_dict(), state) and same_state(
        copy.deepcopy(model).state_dict(), state
    )
    assert model_size(model).parameters == model_size(tied()[0]).parameters
    restore_from_inference(root[restored])
    assert type(head) is nn.Linear and type(embedding) is nn.Embedding
    assert head.weight is embedding.weight is weight and type(weight) is nn.Parameter
    with torch.no_grad():
        weight.mul_(2)
    ids = torch.arange(4)
    assert torch.equal(embedding(ids), state["lm_head.weight"][:4] * 2)
    restore_from_inference(model)
    assert same_state(restore_from_inference(model).model.layers.state_dict(), tied_layers(state))


def tied_layers(state):
    prefix = "model.layers."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def test_an_embedding_alone_is_not_packed():
    _, head, embedding = tied()
    optimize_for_inference(embedding)
    assert type(embedding) is nn.Embedding and type(head.weight) is nn.Parameter


def test_new_tokens_for_a_packed_model():
    model, head, embedding = tied()
    weight = head.weight.detach().clone()
    optimize_for_inference(model)
    model.resize_token_embeddings(100, mean_resizing=False)
    assert head.weight is embedding.weight and head.weight.shape == (100, 64)
    assert torch.equal(head.weight[:96], weight)
    logits(model)
    restore_from_inference(model)
    assert logits(model).shape[-1] == 100


def test_a_packed_head_that_is_taken_out_leaves_the_embedding():
    model, _head, embedding = tied()
    weight = embedding.weight.detach().clone()
    optimize_for_inference(model.lm_head)
    model.lm_head = nn.Identity()
    assert torch.equal(embedding(torch.arange(96)), weight)
    restore_from_inference(model)
    assert torch.equal(embedding.weight, weight) and embedding.weight.requires_grad is False


# -------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_under_autocast_is_that_of_any_linear(dtype, autocast):
    shapes = ((256, 64), (256, 33), (33, 33), (14, 9), (64, 64))
    plain = nn.ModuleList(
        layer
        for K, N in shapes
        for layer in (
            nn.Linear(K, N),
            make_layer("pair", N, K, **FLOAT32),
            make_layer("pivoted", N, K, **FLOAT32),
            make_layer("pair", N, K, rank=9, lora_rank=0, **FLOAT32),
        )
    )
    plain = plain.to(dtype).eval()
    packed = optimize_for_inference(copy.deepcopy(plain))
    assert len(packed_states(packed)) == len(plain)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        for before, after in zip(plain, packed, strict=True):
            for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(2, before.in_features).to(x_dtype)
                y = after(x)
                assert y.dtype == before(x).dtype == autocast
                torch.testing.assert_close(y, before(x), atol=0.1, rtol=0.1)
            with pytest.raises(TypeError):
                after(torch.ones(2, before.in_features, dtype=torch.float64))
        with torch.autocast("cpu", enabled=False):
            assert packed[0](torch.ones(1, 256, dtype=dtype)).dtype == dtype


def test_compiled_code_follows_autocast():
    layer = optimize_for_inference(make_layer("pair", **FLOAT32).eval())
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(2, 14)
    for autocast in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
            assert torch.equal(compiled(x), layer(x)) and compiled(x).dtype == autocast
    torch.compiler.reset()
