"""PEFT on our layers: the formula, adapters by name, merging, and what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import tiny
from helpers.quantizing import quantized_model, random_weights
from torch import nn

from hylora_kernels import (
    QuantizedLinear,
    SVDLoRALinear,
    load_pretrained,
    optimize_for_inference,
    save_pretrained,
)
from hylora_kernels.layers.embedding import LowRankEmbedding

peft = pytest.importorskip("peft")

LAYERS = ("q_proj", "gate_proj")
IDS = tiny.tokens(3, 8)
KINDS = ("pair", "pivoted", "own adapter", "quantised")


class Holder(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def compressed(form="pair", lora_rank=0, **changes) -> nn.Module:
    """A tiny Llama with q and gate compressed, the other linears dense."""
    return tiny.adapted(tiny.llama(**changes), 12, lora_rank, form, names=LAYERS)


def base_layer(kind: str) -> SVDLoRALinear:
    """A layer [14, 20] or, quantised, [48, 100] in float64, with a bias."""
    torch.manual_seed(1)
    if kind == "quantised":
        return QuantizedLinear.from_weights(random_weights("pair", bias=True)).double()
    form, lora_rank = (kind, 0) if kind in ("pair", "pivoted") else ("pair", 3)
    return SVDLoRALinear.from_linear(nn.Linear(20, 14).double(), 6, lora_rank, 0.5, form=form)


def config(**changes) -> peft.LoraConfig:
    """Random A and B, of scaling 2."""
    words = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM"} | words | changes))


def with_adapter(model: nn.Module, name: str = "default", seed: int = 0, **changes):
    torch.manual_seed(seed)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config(**changes))
        return model
    return peft.get_peft_model(model, config(**changes), name).eval()


def wrapped(base: SVDLoRALinear, **changes):
    """PEFT's layer on `base`, with a random adapter."""
    changes = {"target_modules": ["layer"], "task_type": None} | changes
    return with_adapter(Holder(base), **changes).base_model.model.layer


@torch.no_grad()
def logits(model, ids=IDS, **words):
    return model(input_ids=ids, use_cache=False, **words).logits


# --------------------------------------------------------------------------- the formula, training


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_formulas(kind):
    layer = wrapped(base_layer(kind))
    W, bias = layer.base_layer.to_linear().weight.detach(), layer.base_layer.bias
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, layer.out_features, dtype=torch.float64)
    formula = x @ W.T + bias + 2.0 * (x @ A.T @ B.T)
    for y in (layer(x), layer.train()(x)):
        torch.testing.assert_close(y, formula, rtol=1e-10, atol=1e-10)
        got, wanted = (torch.autograd.grad(z, (x, A, B), dy, True) for z in (y, formula))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert not any(p.requires_grad for p in layer.base_layer.parameters())


def test_one_adapter_is_a_call_of_the_op_and_all_else_is_pefts(monkeypatch):
    def refuse(*_):
        raise RuntimeError("PEFT's forward")

    x = torch.randn(2, 20)
    layer = wrapped(base_layer("pair").bfloat16(), lora_dropout=0.1).eval()
    assert layer.lora_A["default"].weight.dtype == torch.float32
    exact = layer.float()(x)
    layer.base_layer.bfloat16()
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", refuse)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    for other in (layer.train(), wrapped(base_layer("own adapter")).float()):
        with pytest.raises(RuntimeError, match="PEFT's forward"):
            other(x)
    layer.eval().lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="PEFT's forward"):
        layer(x)


def test_all_linear_is_ours_and_the_dense_ones_but_no_head():
    model = with_adapter(compressed(), "one")
    found = {p for p, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {path.rpartition(".")[2] for path in found} == set(tiny.LAYERS)
    assert len(found) == 2 * len(tiny.LAYERS)
    with_adapter(model, "two")
    again = {p for p, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert again == found
    assert all("two" in model.get_submodule(path).lora_A for path in found)


@pytest.mark.parametrize("kind", ["pair", "quantised"])
def test_training_changes_the_adapters_alone(kind):
    model = quantized_model("llama") if kind == "quantised" else compressed(lora_rank=2)
    ids = IDS % model.config.vocab_size
    model = with_adapter(model, init_lora_weights=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(".lora_" in name for name in changed)


# -------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("kind", ["pair", "quantised"])
def test_saved_adapters_are_read_back_by_name(kind, tmp_path):
    def base():
        return quantized_model("llama") if kind == "quantised" else compressed(lora_rank=2)

    ids = IDS % base().config.vocab_size
    model = with_adapter(with_adapter(base(), "one"), "two", r=2, seed=1).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "one", "one")
    loaded.load_adapter(tmp_path / "two", "two")
    outputs = []
    for name in ("one", "two"):
        for one in (model, loaded.eval()):
            one.set_adapter(name)
        outputs.append(logits(model, ids))
        assert torch.equal(logits(loaded, ids), outputs[-1])
    assert not torch.equal(*outputs)
    for one in (model, loaded):
        one.base_model.set_adapter(["one", "two"])
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base(), ids))


def test_transformers_own_add_adapter_finds_our_layers():
    model = compressed()
    torch.manual_seed(0)
    model.add_adapter(config())
    assert torch.equal(logits(model), logits(with_adapter(compressed())))


def test_a_batch_of_mixed_adapters_is_each_alone():
    model = compressed(lora_rank=2, dtype=torch.float64)
    model = with_adapter(with_adapter(model, "one"), "two", r=2, seed=1).eval()
    names = ["one", "two", "__base__"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, IDS[row : row + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", KINDS[:3])
def test_merging_folds_the_adapters_and_keeps_the_layers_own(kind):
    layer = wrapped(base_layer(kind), r=2)
    base, x = layer.base_layer, torch.randn(5, 20, dtype=torch.float64)
    before, y = copy.deepcopy(base.state_dict()), layer(x).detach()
    layer.merge()
    made = layer.base_layer
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-10)
    assert (made.rank, made.form, made.lora_rank) == (8, base.form, base.lora_rank)
    assert made.A is base.A and made.B is base.B and made.bias is base.bias
    layer.unmerge()
    assert layer.base_layer is base and not layer.merged
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


def test_merging_one_after_another_and_biases():
    layer = wrapped(base_layer("pair"), r=2, lora_bias=True)
    layer.update_layer("two", 1, lora_alpha=3, config=config(lora_bias=True))
    layer.set_adapter(["default", "two"])
    x = torch.randn(5, 20, dtype=torch.float64)
    y = layer(x).detach()
    layer.merge(adapter_names=["two"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        layer.merge()
    assert layer.base_layer.rank == 9
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-10)
    layer.unmerge()
    assert layer.base_layer.rank == 6
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


def test_a_merged_model_is_saved_and_loaded(tmp_path):
    model = with_adapter(compressed("pivoted", lora_rank=2))
    y = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y, rtol=1e-4, atol=1e-4)
    assert type(merged.model.layers[0].self_attn.q_proj) is SVDLoRALinear
    save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(logits(load_pretrained(tmp_path / "merged")), logits(merged))


def test_a_quantised_model_is_rounded_again_and_says_so(caplog):
    model = quantized_model("llama, tied")
    q, k = (getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj"))
    ids = IDS % model.config.vocab_size
    adapted = with_adapter(model)
    y = logits(adapted, ids)
    with caplog.at_level(logging.WARNING):
        adapted.merge_adapter()
    assert "rounded 7 layers to their bits again, relative error 0." in caplog.text
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted, ids), y)
    merged = adapted.merge_and_unload()
    attention = merged.model.layers[0].self_attn
    assert attention.q_proj.bits == q.bits and attention.k_proj.bits == k.bits
    assert 0 < attention.k_proj.merge_error < 0.2 and attention.q_proj.lora_rank == q.lora_rank
    assert 0 < (logits(merged, ids) - y).norm() < 0.5 * y.norm()


@pytest.mark.parametrize("kind", ["quantised", "low rank"])
def test_a_tied_head_stays_tied(kind, tmp_path):
    if kind == "quantised":
        model = quantized_model("llama, tied")
    else:
        model = compressed(tie_word_embeddings=True)
        embedding, head = LowRankEmbedding.tied_pair(torch.randn(tiny.WORDS, 8), torch.randn(8, 32))
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
    merged = with_adapter(model).merge_and_unload()
    assert merged.config.tie_word_embeddings
    save_pretrained(merged, tmp_path)
    ids = IDS % model.config.vocab_size
    assert torch.equal(logits(load_pretrained(tmp_path), ids), logits(merged, ids))


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must be left out where a target is a compressed layer"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of .* got 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights must be one of .* got 'olora'"),
    ],
)
def test_what_needs_a_dense_weight_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_adapter(compressed(), **changes)
    model = with_adapter(compressed())
    with pytest.raises(ValueError, match=message):
        with_adapter(model, "other", **changes)


def test_numbers_that_are_not_finite_are_not_merged_safely():
    layer = wrapped(base_layer("pair"))
    base = layer.base_layer
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"\['default'\] must be finite"):
        layer.merge(safe_merge=True)
    assert layer.base_layer is base and not layer.merged


def test_a_bias_is_not_merged_into_a_layer_without_one():
    base = base_layer("pair")
    base.bias = None
    with pytest.warns(UserWarning, match="has no bias"):
        layer = wrapped(base, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True can't be merged"):
        layer.merge()
    assert layer.base_layer is base and not layer.merged


def test_a_packed_model_is_refused():
    model = optimize_for_inference(compressed())
    with pytest.raises(ValueError, match="must not be packed for inference"):
        with_adapter(model)
