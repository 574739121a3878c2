"""The structure of a model: linears, shared inputs, blocks; the linears it skips, with reasons."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.zoo import NAMES, ZOO, paths_of, zoo_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.structure import as_matrix, computes_linear, discover, linears, select


class Toy(nn.Module):
    """The least that discover() asks of a model; `run` gets the embedded tokens."""

    def __init__(self, run, **modules):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        return self.run(self, self.embedding(input_ids))


@pytest.mark.parametrize("name", NAMES)
def test_groups_and_blocks_of(name):
    model = zoo_model(name)
    found, arch = discover(model), ZOO[name]
    assert [group.paths for group in found.groups] == paths_of(name)
    paths = [f"{arch.blocks}.{i}" for i in range(arch.config.num_hidden_layers)]
    assert [block.path for block in found.blocks] == paths
    assert [group for block in found.blocks for group in block.groups] == found.groups
    for block in found.blocks:
        assert block.module is model.get_submodule(block.path)
        assert all(target.path.startswith(f"{block.path}.") for target in block.targets)
    for target in found.targets:
        assert target.module is model.get_submodule(target.path)
        assert target.shape == target.matrix.shape == as_matrix(target.module).shape
    (head,) = (p for p, m in model.named_modules() if m is model.get_output_embeddings())
    assert found.skipped == {head: "output head"}
    assert list(linears(model)) and set(linears(model)) == set(found.paths)


@pytest.mark.parametrize("name", [name for name in NAMES if ZOO[name].tied])
def test_a_tied_head_is_left_alone_even_if_asked_for(name):
    targets, skipped = select(zoo_model(name), include=["lm_head"])
    assert not targets and skipped == {"lm_head": "weight tied to another module's"}


def test_an_untied_head_is_taken_if_asked_for():
    model = zoo_model("qwen2")
    assert list(linears(model, include=["lm_head", r"layers\.0\.mlp\.up"])) == [
        "model.layers.0.mlp.up_proj",
        "lm_head",
    ]
    found = discover(model, include=["lm_head", r"layers\.0\.mlp\.up"])
    assert [block.groups for block in found.blocks] == [(found.groups[0],), (), ()]
    assert found.groups[1].paths == ("lm_head",)


def test_weights_held_twice_and_modules_used_twice_are_skipped():
    model = zoo_model("llama")
    first, second = model.model.layers
    second.self_attn.o_proj.weight = first.self_attn.o_proj.weight
    second.mlp.up_proj = first.mlp.up_proj
    _, skipped = select(model)
    assert skipped.pop("lm_head") == "output head"
    assert skipped == {
        "model.layers.0.self_attn.o_proj": "weight tied to another module's",
        "model.layers.1.self_attn.o_proj": "weight tied to another module's",
        "model.layers.0.mlp.up_proj": "used in several places",
    }


def test_include_and_exclude_are_searched_in_the_path():
    model = zoo_model("llama")
    targets, skipped = select(model, include=[r"\.0\.", "down"], exclude=["attn"])
    assert list(targets) == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert skipped == dict.fromkeys(attention, "excluded")
    everything = select(model, exclude=["lm_head"])
    assert len(everything[0]) == 14 and everything[1] == {"lm_head": "excluded"}
    assert select(model, include=[]) == ({}, {})


@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        (["mpl"], ValueError, "pattern 'mpl' matches no linear"),
        (["("], ValueError, r"'\(' is no regular expression"),
        ("mlp", TypeError, "must be a list of patterns or None, got str"),
        ([3], TypeError, r"must hold patterns \(str\), got int"),
    ],
)
def test_bad_patterns(name, patterns, error, message):
    with pytest.raises(error, match=f"{name}.*{message}"):
        select(zoo_model("llama"), **{name: patterns})


# -------------------------------------------------------------------------- what counts as a linear


class Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Plain(nn.Linear):
    """Inherits its forward."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Unhappy(nn.Linear):
    def forward(self, x):
        raise RuntimeError("not on this device")


@pytest.mark.parametrize("kind", [Same, Plain])
def test_a_subclass_that_computes_the_same_is_taken(kind):
    model = zoo_model("llama")
    model.model.layers[0].mlp.up_proj = kind(32, 56)
    assert "model.layers.0.mlp.up_proj" in linears(model)


@pytest.mark.parametrize("kind", [Doubled, Unhappy])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_a_subclass_that_does_not_is_skipped(kind, scale):
    model, linear = zoo_model("llama"), kind(32, 56)
    linear.requires_grad_(False).weight.mul_(scale)
    linear.bias.mul_(scale)
    model.model.layers[0].mlp.up_proj = linear
    targets, skipped = select(model)
    assert "model.layers.0.mlp.up_proj" not in targets
    assert skipped["model.layers.0.mlp.up_proj"] == f"{kind.__name__} doesn't compute x W^T + b"


def test_a_forward_put_on_the_instance_counts():
    linear = nn.Linear(4, 3)
    assert computes_linear(linear)
    linear.forward = lambda x: nn.Linear.forward(linear, x) + 1
    assert not computes_linear(linear)


def test_conv1d_is_read_the_other_way_round():
    conv, x = Conv1D(7, 4), torch.randn(3, 4)
    assert computes_linear(conv) and as_matrix(conv).shape == (7, 4)
    torch.testing.assert_close(conv(x) - conv.bias, x @ as_matrix(conv).T)


def test_a_linear_that_is_never_called_is_named():
    model = zoo_model("llama")
    model.model.layers[1].spare = nn.Linear(32, 32)
    found = discover(model)
    assert found.skipped["model.layers.1.spare"] == "never called in a forward"
    assert "model.layers.1.spare" not in found.paths


# -------------------------------------------------------------------------------- groups and blocks


def test_groups_come_in_the_order_of_the_calls():
    def run(model, x):
        return model.last(model.first(x)) + model.also(x)

    toy = Toy(run, last=nn.Linear(6, 6), first=nn.Linear(6, 6), also=nn.Linear(6, 6))
    assert [g.paths for g in discover(toy).groups] == [("first", "also"), ("last",)]


def test_equal_but_different_tensors_are_different_inputs():
    def run(model, x):
        return model.a(x.clone()) + model.b(x.clone())

    toy = Toy(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    assert [g.paths for g in discover(toy).groups] == [("a",), ("b",)]


def test_an_input_changed_in_place_is_another_one():
    def run(model, x):
        return model.a(x) + model.b(x.mul_(2))

    toy = Toy(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    assert [g.paths for g in discover(toy).groups] == [("a",), ("b",)]


def test_blocks_are_the_outermost_list_that_holds_most():
    def run(model, x):
        for block in model.blocks:
            for expert in block.experts:
                x = expert(x)
        return model.before[0](x)

    def block(experts):
        made = nn.Module()
        made.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))
        return made

    toy = Toy(run, before=nn.ModuleList([nn.Linear(6, 6)]), blocks=nn.ModuleList([block(2)]))
    found = discover(toy)
    assert [block.path for block in found.blocks] == ["blocks.0"]
    assert found.blocks[0].groups == tuple(found.groups[:2]) and len(found.groups) == 3


def test_a_copied_block_has_its_own_linears():
    block = discover(zoo_model("gpt2")).blocks[1]
    copied = copy.deepcopy(block)
    inside = set(copied.module.modules())
    for target, original in zip(copied.targets, block.targets, strict=True):
        assert target.path == original.path and target.module in inside
        before = original.matrix.clone()
        target.matrix.fill_(7)
        assert (target.module.weight == 7).all() and torch.equal(original.matrix, before)


def test_a_compressed_layer_is_named():
    model = zoo_model("llama")
    model.model.layers[1].mlp.up_proj = SVDLoRALinear(32, 56, 8)
    with pytest.raises(
        ValueError, match=r"dense, but its layer model\.layers\.1\.mlp\.up_proj has"
    ):
        discover(model)


def test_a_compressed_model_remembers_its_selection():
    model = zoo_model("llama")
    path = "model.layers.0.mlp.up_proj"
    model.model.layers[0].mlp.up_proj = SVDLoRALinear.from_linear(linears(model)[path], 8, 2)
    assert isinstance(linears(model)[path], SVDLoRALinear) and len(linears(model)) == 14
    model.hylora_linears = [path]
    assert list(linears(model)) == [path]
    assert list(linears(model, include=["layers.1.mlp.up"])) == ["model.layers.1.mlp.up_proj"]
