"""Adapters on dense models, and folding them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny
from helpers.zoo import NAMES, ZOO, tokens, zoo_model

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import add_adapters, lora_sizes, merge_adapters
from hylora_kernels.model.structure import linears

IDS = tokens(3, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapters(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, SVDLoRALinear)}


@pytest.mark.parametrize("name", NAMES)
def test_adapters_start_as_nothing_and_merge_into_the_dense_weight(name):
    model = zoo_model(name)
    dense, targets = copy.deepcopy(model), list(linears(model))
    before = logits(model)
    assert add_adapters(model, lora_rank=6, alpha=0.5) is model
    layers = adapters(model)
    assert list(layers) == targets == list(linears(model))
    for path, layer in layers.items():
        N, K = layer.out_features, layer.in_features
        assert (layer.rank, layer.lora_rank, layer.form, layer.alpha) == (N, 6, "pivoted", 0.5)
        assert layer.A.shape == (6, K) and layer.B.shape == (N, 6)
        assert layer.A.requires_grad and layer.B.requires_grad and not layer.B.any()
        assert not (layer.SVh.requires_grad or layer.U.requires_grad)
        assert layer.bias is None or torch.equal(layer.bias, dense.get_submodule(path).bias)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embeddings.weight is head.weight) == ZOO[name].tied

    with torch.no_grad():
        for layer in layers.values():
            layer.B.normal_()
    changed = logits(model)
    assert (changed - before).norm() > 0.05 * before.norm()
    assert merge_adapters(model) is model
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4)
    for layer in adapters(model).values():
        assert layer.A is None and layer.rank == layer.out_features and layer.keep == 1


def test_each_adapter_is_its_own_draw_by_the_seed():
    def draws(seed):
        model = add_adapters(zoo_model("llama"), lora_rank=2, seed=seed)
        return [layer.A for layer in adapters(model).values()]

    same, again, other = draws(3), draws(3), draws(100)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    firsts = [A[0, 0].item() for A in same + other]
    assert len(set(firsts)) == len(firsts)


def test_the_dense_weight_is_shared_not_copied():
    model = zoo_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    add_adapters(model, lora_rank=2)
    assert model.model.layers[0].mlp.up_proj.SVh.data_ptr() == weight.data_ptr()


def test_include_and_dropout():
    model = add_adapters(zoo_model("llama"), 2, lora_dropout=0.25, include=["mlp"], exclude=["up"])
    assert set(adapters(model)) == {
        f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "down")
    }
    assert {layer.lora_dropout for layer in adapters(model).values()} == {0.25}


def test_refusals():
    with pytest.raises(ValueError, match="lora_rank must be at least 1, got 0"):
        add_adapters(zoo_model("llama"), lora_rank=0)
    model = add_adapters(zoo_model("llama"), lora_rank=2)
    with pytest.raises(
        ValueError, match="model must be dense to take adapters, but its layer model"
    ):
        add_adapters(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sizes_of_a_lora_are_those_of_its_adapters(name):
    model = zoo_model(name)
    total = sum(p.numel() for p in model.parameters())
    sizes = lora_sizes(model, ranks=[2, 6])
    assert sizes.model == total and [size.rank for size in sizes.ranks] == [2, 6]
    add_adapters(model, lora_rank=6)
    made = [p for layer in adapters(model).values() for p in (layer.A, layer.B)]
    assert sizes.linears == len(adapters(model))
    assert sizes.ranks[1].parameters == sum(p.numel() for p in made)
    assert sizes.ranks[1].share == sizes.ranks[1].parameters / total
    assert sizes.ranks[1].bytes == sum(p.nbytes for p in made)
    assert f"{sizes.ranks[1].parameters:,}" in str(sizes)
    with pytest.raises(ValueError, match="ranks must be one or more ints of at least 1, got"):
        lora_sizes(model, ranks=[4, 0])


def test_sizes_of_a_lora_are_the_same_on_low_rank_layers():
    dense = tiny.llama()
    small = tiny.adapted(copy.deepcopy(dense), lora_rank=0)
    one, other = lora_sizes(dense).ranks, lora_sizes(small).ranks
    assert [size.parameters for size in one] == [size.parameters for size in other]
    assert one[0].share < other[0].share
