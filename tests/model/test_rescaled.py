"""RWKV divides weights in its first forward in eval(): compressed, saved and loaded it computes the
same, whether it has run before or not."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.compressing import close, compressed, logits
from helpers.zoo import tokens
from transformers import AutoModelForCausalLM, RwkvConfig

from hylora_kernels import (
    SVDLoRALinear,
    add_adapters,
    load_pretrained,
    optimize_for_inference,
    save_pretrained,
)

IDS = tokens(2, 12)


@pytest.fixture(scope="module")
def rwkv():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
    config = RwkvConfig(
        vocab_size=128, context_length=64, num_hidden_layers=3, rescale_every=1, **sizes
    )
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_a_compressed_one_is_saved_and_loaded(rwkv, form, has_run, tmp_path):
    model = copy.deepcopy(rwkv).eval()
    dense = logits(copy.deepcopy(model), IDS)
    if has_run:
        logits(model, IDS)
    model, report = compressed(model, keep=0.9, form=form, refit=form == "pivoted")
    assert any(isinstance(m, SVDLoRALinear) for m in model.modules()) and report.keep <= 0.9
    y = logits(model, IDS)
    assert close(y, dense, 0.5)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(logits(loaded, IDS), y)
    optimize_for_inference(loaded)
    assert close(logits(loaded, IDS), y, 1e-4)
    assert close(logits(load_pretrained(tmp_path).train().eval(), IDS), y, 1e-6)


@pytest.mark.parametrize("has_run", [False, True])
def test_adapters(rwkv, has_run, tmp_path):
    model = copy.deepcopy(rwkv).eval()
    dense = logits(copy.deepcopy(model), IDS)
    if has_run:
        logits(model, IDS)
    add_adapters(model, 4)
    assert close(logits(model, IDS), dense, 1e-3)
    save_pretrained(model, tmp_path)
    assert close(logits(load_pretrained(tmp_path), IDS), dense, 1e-3)
