"""The format of saved models: who may read it, its older kind, values that JSON lacks."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import mixtures
from helpers.checkpoints import (
    CONFIGS,
    TOKENS,
    assert_same,
    build,
    edit_config,
    edit_weights,
)
from transformers import AutoModelForCausalLM, Mamba2Config
from transformers.quantizers import auto

from hylora_kernels.compression.compress import compress
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.checkpoint import CheckpointError, load_pretrained
from hylora_kernels.model.format import METHOD
from hylora_kernels.model.saving import save_pretrained

FIRST = "model.layers.0.self_attn.q_proj"  # the first compressed linear


@pytest.fixture
def unaware(monkeypatch):
    """transformers as it is where nobody has imported this package."""
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, METHOD)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loader_that_does_not_know_the_format_fails(name, tmp_path, unaware):
    """Without the tensor of shape [0] it would make up the weights of the compressed linears."""
    save_pretrained(build(name), tmp_path, max_shard_size="20KB")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_nor_does_it_make_up_experts(tmp_path, unaware):
    """Their weights are parts of a stack's, which has no tensor of an expert's name."""
    config = mixtures.CONFIGS["mixtral"]
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(64).view(4, 16)
    compress(model, 0.7, ids, include=["experts"], lora_rank=2, refit=False, cache=False)
    save_pretrained(model, tmp_path)
    assert_same(load_pretrained(tmp_path), model)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_without_low_rank_layers_is_loaded_by_transformers(tmp_path, unaware):
    model = build(rank=0)
    save_pretrained(model, tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_format_1(tmp_path):
    """It had no tensor of shape [0] and no list of files."""
    model = build()
    save_pretrained(model, tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop(f"{FIRST}.weight"))

    def older(ours):
        ours.update(format=1)
        del ours["files"]

    edit_config(tmp_path, older)
    assert_same(load_pretrained(tmp_path), model)
    (tmp_path / "tokenizer.json").write_text("of the same save")
    save_pretrained(model, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_tensor_of_shape_0_has_that_shape_only(copied):
    name = f"{FIRST}.weight"
    edit_weights(copied, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"unexpected tensor '{name}'"):
        load_pretrained(copied)


def test_infinity_in_the_config(tmp_path):
    """As in Mamba 2, whose time_step_limit ends there; JSON has no infinity."""
    model = build()
    model.config.time_step_limit = (0.0, float("inf"))
    model.config.nested = {"deep": [float("-inf")]}
    save_pretrained(model, tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=pytest.fail)
    loaded = load_pretrained(tmp_path)
    assert_same(loaded, model)
    assert list(loaded.config.time_step_limit) == [0.0, float("inf")]
    assert loaded.config.nested == {"deep": [float("-inf")]}
    save_pretrained(loaded, tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_mamba2(tmp_path):
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    config = Mamba2Config(**TOKENS, hidden_size=32, num_hidden_layers=1, expand=2, **sizes)
    assert config.time_step_limit[1] == float("inf")
    model = AutoModelForCausalLM.from_config(config).eval()
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj = SVDLoRALinear.from_linear(mixer.in_proj, 8, 4)
    save_pretrained(model, tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_a_generation_config_that_transformers_would_not_save(tmp_path):
    """transformers refuses a temperature without sampling, after all the work."""
    model = build()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = False
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path).generation_config.temperature == 0.5
