"""Training a merged model again: its new adapters, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny
from helpers.finetuning import BLOCKS, model_of, state, train
from helpers.numerics import dense_weight

from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters, renew_adapters
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.saving import save_pretrained

pytestmark = pytest.mark.usefixtures("plain_plot")


def layers_of(model) -> dict[str, SVDLoRALinear]:
    return {p: layer for p, layer in model.named_modules() if isinstance(layer, SVDLoRALinear)}


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_gets_adapters_of_its_last_components(form, dtype):
    model = merge_adapters(model_of(dtype, form=form, rank=8))
    before = copy.deepcopy(model)
    assert renew_adapters(model, 4) is model
    for path, layer in layers_of(model).items():
        old = before.get_submodule(path)
        assert (layer.rank, layer.lora_rank, layer.form) == (old.rank - 4, 4, form)
        assert layer.parameter_count() == old.parameter_count()
        assert layer.SVh.dtype == layer.A.dtype == dtype and layer.A.requires_grad
        W = dense_weight(old)
        S = torch.linalg.svdvals(W)
        base = W - layer.alpha * layer.B.double() @ layer.A.double()
        rounding = 0.02 if dtype == torch.bfloat16 else 1e-5
        assert torch.linalg.svdvals(base)[layer.rank] <= S[layer.rank] + rounding * S[0]
        assert (dense_weight(layer) - W).norm() <= rounding * W.norm()
        others = (layer.B.norm(dim=0), layer.A.norm(dim=1))
        assert torch.allclose(*(t.float() for t in others), rtol=0.02)  # balanced


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_a_merged_model_learns_again(form):
    model = model_of(form=form, rank=8)
    train(model, BLOCKS, steps=10, lr=1e-2)
    sizes = {path: layer.rank for path, layer in layers_of(model).items()}
    ppl = perplexity(model, BLOCKS, progress=False).ppl
    report = train(model, BLOCKS, steps=30, lr=1e-2, lora_rank=4)
    assert perplexity(model, BLOCKS, progress=False).ppl < 0.95 * ppl
    assert {path: layer.rank for path, layer in layers_of(model).items()} == sizes
    assert report.first_loss == pytest.approx(torch.tensor(ppl).log().item(), rel=0.2)


def test_saved_merged_loaded_and_trained(tmp_path):
    model = model_of()
    train(model, BLOCKS, steps=2)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    report = train(loaded, BLOCKS, steps=3, lora_rank=2, merge=False)
    layers = layers_of(loaded).values()
    assert {layer.lora_rank for layer in layers} == {2}
    assert report.trainable == sum(t.numel() for layer in layers for t in (layer.A, layer.B))


def test_a_compressed_model_without_adapters_is_as_good_as_a_merged_one():
    model = model_of(lora_rank=0)
    train(model, BLOCKS, steps=2, lora_rank=3, merge=False)
    assert {layer.lora_rank for layer in layers_of(model).values()} == {3}


def test_a_dense_matrix_gets_an_adapter_that_starts_at_zero():
    model = merge_adapters(model_of(rank=14, lora_rank=4))  # more than the 16 outputs of k and v
    before = copy.deepcopy(model)
    renew_adapters(model, 4)
    layer, old = (m.model.layers[0].self_attn.k_proj for m in (model, before))
    assert old.rank == layer.rank == 16 and torch.equal(old.SVh, layer.SVh)
    assert layer.lora_rank == 4 and not layer.B.any() and layer.A.any()


def test_a_pivoted_layer_of_full_rank_that_is_no_dense_matrix_gets_one_too():
    layer = SVDLoRALinear.from_linear(torch.nn.Linear(8, 16), 8, form="pivoted")
    model = model_of(lora_rank=0)
    model.model.layers[0].extra, W = layer, dense_weight(layer)
    renew_adapters(model, 2)
    renewed = model.model.layers[0].extra
    assert (renewed.rank, renewed.lora_rank) == (6, 2)
    torch.testing.assert_close(dense_weight(renewed), W, rtol=0, atol=1e-6)


def test_a_base_keeps_rank_1():
    model = model_of(rank=2, lora_rank=0)
    renew_adapters(model, 64)
    assert {(layer.rank, layer.lora_rank) for layer in layers_of(model).values()} == {(1, 1)}


def test_a_shared_layer_stays_shared():
    model = model_of(rank=4, lora_rank=0)
    first, second = (block.self_attn for block in model.model.layers)
    second.q_proj = first.q_proj
    renew_adapters(model, 2)
    assert second.q_proj is first.q_proj and first.q_proj.lora_rank == 2


def test_what_is_refused_leaves_the_model_as_it_is():
    model = merge_adapters(model_of())
    before = state(model)
    with pytest.raises(ValueError, match="at most 64, the model's context"):
        train(model, tiny.tokens(2, 65))
    with pytest.raises(ValueError, match="lora_rank must be an int of at least 1, got 0"):
        train(model, BLOCKS, lora_rank=0)
    assert state(model).keys() == before.keys()
    with pytest.raises(ValueError, match=r"lora_rank=8 is for a merged .*adapters of rank 4"):
        train(model_of(), BLOCKS, lora_rank=8)
    with pytest.raises(ValueError, match=r"must be merged to get new adapters, but .* has one"):
        renew_adapters(model_of())
