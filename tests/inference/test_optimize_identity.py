"""Packing and back: the same Parameter objects, with all that hangs on them, from any root."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import tiny
from helpers.numerics import make_layer
from helpers.optimising import (
    FLOAT32,
    assert_same_but_rounding,
    llama,
    logits,
    net,
    packs,
    same_state,
    state_of,
    there_and_back,
)
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


def test_a_default_device_is_not_asked():
    model, x = net(), torch.randn(3, 14)
    y, state = model(x), state_of(model)
    with torch.device("meta"):
        optimize_for_inference(model)
        twin = copy.deepcopy(model)
        assert same_state(model.state_dict(), state)
        assert model[1].A.sum().device.type == "cpu"
        restore_from_inference(twin)
        model.to("cpu")
        assert len(packed_states(model)) == 3
        model.to("meta")
        assert not packed_states(model) and model[1].A.device.type == "meta"
    assert torch.equal(twin(x), y)


def test_shallow_copies_go_together():
    layer, x = make_layer("pivoted", **FLOAT32).eval(), torch.randn(3, 14)
    y = layer(x)
    optimize_for_inference(layer)
    twin, replica = copy.copy(layer), layer._replicate_for_data_parallel()
    replica.bias = layer.bias.detach()
    assert torch.equal(twin(x), layer(x)) and torch.equal(replica(x), layer(x))
    restore_from_inference(twin)
    assert type(twin) is type(layer) is SVDLoRALinear
    assert torch.equal(layer(x), y) and torch.equal(twin(x), y)


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
    assert_same_but_rounding(logits(model), before, roundings=32)
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
