"""Checkpoints: a saved model comes back bit for bit; some models are refused."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import weakref

import pytest
import torch
from helpers.checkpoints import (
    CONFIGS,
    LAYER,
    SMALL,
    assert_same,
    build,
    edit_config,
    logits,
)
from helpers.processes import run_together
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model import saving
from hylora_kernels.model.checkpoint import CheckpointError, load_pretrained
from hylora_kernels.model.saving import save_in_hylora_format, save_pretrained

# ---------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("form", ["pivoted", "pair"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_bit_equal(name, form, tmp_path):
    model = build(name, form)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(loaded, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_bit_equal_however_it_was_made(name, tmp_path):
    """model.to(bfloat16) rounds the rotary frequencies; a model loaded so has them in float32."""
    model = build(name).to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_merged_dense_and_full_rank_layers(tmp_path):
    model = build()
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, SVDLoRALinear)):
        if i % 2:
            layer.merge()
    attention = model.model.layers[1].self_attn
    attention.q_proj = attention.q_proj.to_linear()
    dense = nn.Linear(32, 16, bias=False)
    attention.k_proj = SVDLoRALinear.from_linear(dense, 16, 2, form="pivoted")
    assert attention.k_proj.U.shape == (0, 16)
    save_pretrained(model, tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_model_without_any_of_our_layers(tmp_path):
    model = build(rank=0)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["modules"] == {}
    assert_same(load_pretrained(tmp_path), model)


def test_the_format(saved):
    config = json.loads((saved / "config.json").read_text())
    ours = config["quantization_config"]
    assert (ours["quant_method"], ours["format"]) == ("hylora", 2)
    assert len(ours["modules"]) == 7
    assert ours["modules"][LAYER] == {
        "rank": 8,
        "lora_rank": 4,
        "alpha": 0.5,
        "form": "pivoted",
        "group": None,
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert ours["files"] == ["config.json", "generation_config.json", "model.safetensors"]
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert {n for n in names if n.startswith(LAYER)} == {
        f"{LAYER}.{part}" for part in ("SVh", "U", "A", "B", "pivots")
    }
    assert not any("rotary" in name for name in names)
    assert sorted(file.name for file in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_mixed_dtypes_dropout_and_trainability(tmp_path):
    model = build().to(torch.bfloat16)
    for layer in (m for m in model.modules() if isinstance(m, SVDLoRALinear)):
        layer.A, layer.B = nn.Parameter(layer.A.float()), nn.Parameter(layer.B.float())
    model.get_submodule(LAYER).lora_dropout = 0.25
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    assert [path for path in modules if "lora_dropout" in modules[path]] == [LAYER]
    loaded = load_pretrained(tmp_path)
    assert_same(loaded, model)
    layer = loaded.get_submodule(LAYER)
    assert layer.lora_dropout == 0.25
    grads = {name: p.requires_grad for name, p in layer.named_parameters()}
    assert grads == {"SVh": False, "U": False, "A": True, "B": True}
    assert isinstance(layer.pivots, torch.Tensor)
    assert "pivots" in dict(layer.named_buffers())


def test_dtype_casts_all_weights(copied):
    loaded = load_pretrained(copied, dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.dtype is torch.bfloat16
    # As in a model that transformers loads in bfloat16, the rotary frequencies stay in float32.
    assert loaded.model.rotary_emb.inv_freq.dtype is torch.float32
    whole = load_pretrained(copied).state_dict()
    for name, tensor in loaded.state_dict().items():
        wanted = torch.int32 if name.endswith("pivots") else torch.bfloat16
        assert tensor.dtype is wanted, name
        assert torch.equal(tensor, whole[name].to(wanted)), name
    assert logits(loaded).isfinite().all()


def test_buffers_that_a_model_makes_keep_what_they_were_set_to(tmp_path):
    model = build()
    model.model.rotary_emb.inv_freq *= 0.7
    save_pretrained(model, tmp_path)
    assert_same(load_pretrained(tmp_path), model)
    loaded = load_pretrained(tmp_path, dtype="bfloat16")
    assert loaded.model.rotary_emb.inv_freq.dtype is torch.float32
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_device(copied, device):
    loaded = load_pretrained(copied, device=device)
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {device}


def test_global_random_state_is_left_alone(copied):
    before = torch.get_rng_state()
    load_pretrained(copied)
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = build("llama, tied")
    save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # A state dict gathered from elsewhere has copies of them.
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_pretrained(model, tmp_path, state_dict=state)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_weights_untied_in_fact_come_back_untied(tmp_path):
    model = build("llama, tied")
    model.lm_head.weight = nn.Parameter(torch.randn(64, 32))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert_same(loaded, model)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_weights_shared_beyond_what_the_config_says(tmp_path):
    model = build()
    layers = [model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in range(2)]
    layers[1].SVh = layers[0].SVh
    both = nn.Parameter(torch.randn(2, 32), requires_grad=True)
    model.model.layers[0].input_layernorm.weight = nn.Parameter(both.data[0])
    model.model.layers[1].input_layernorm.weight = nn.Parameter(both.data[1])
    save_pretrained(model, tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_a_registered_class_is_found(tmp_path):
    class OwnConfig(LlamaConfig):
        model_type = "own"

    class OwnForCausalLM(LlamaForCausalLM):
        config_class = OwnConfig

    AutoConfig.register("own", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
    model = OwnForCausalLM(OwnConfig(**SMALL)).eval()
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded) is OwnForCausalLM
    assert_same(loaded, model)


def test_saved_from_a_compiled_model(tmp_path):
    model = build()
    save_pretrained(torch.compile(model), tmp_path)
    assert_same(load_pretrained(tmp_path), model)


def test_generation_config_and_tokenizer(tmp_path):
    model = build()
    model.generation_config.max_length = 77
    backend = Tokenizer(models.WordLevel({"?": 0, "a": 5}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_pretrained(model, tmp_path, tokenizer)
    assert load_pretrained(tmp_path).generation_config.max_length == 77
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again("a")["input_ids"] == [5]
    assert again.chat_template == tokenizer.chat_template


def test_saving_twice_writes_the_same_bytes(saved, tmp_path):
    model = load_pretrained(saved)
    for name in ("a", "b"):
        save_pretrained(model, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert weights == (saved / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_text() == (saved / "config.json").read_text()


# ------------------------------------------------------------------------------------------- files


def test_shards(tmp_path):
    model = build()
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    shards = sorted(file.name for file in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert_same(load_pretrained(tmp_path), model)
    edit_config(tmp_path, lambda ours: ours.pop("checksums"))
    assert_same(load_pretrained(tmp_path), model)


def test_a_folder_is_replaced_and_stale_shards_go(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(build(), tmp_path, max_shard_size="20KB")
    model = build(rank=4)
    save_pretrained(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert_same(load_pretrained(tmp_path), model)
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_pretrained(tmp_path), model)


def test_config_is_replaced_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(os.fspath(b)) or replace(a, b))
    save_pretrained(build(), tmp_path, max_shard_size="20KB")
    names = [os.path.basename(path) for path in order if os.path.dirname(path) == str(tmp_path)]
    assert names[-1] == "config.json"
    assert names.count("config.json") == 1


def test_a_save_that_was_cut_off_is_read_as_it_was_meant(copied, monkeypatch):
    torch.manual_seed(1)
    model, replace = build("llama, scaled rope"), os.replace

    def fail_at_config(a, b):
        if os.path.basename(b) == "config.json" and os.path.dirname(b) == str(copied):
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", fail_at_config)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, copied)
    assert not list(copied.glob(".saving-*"))
    assert_same(load_pretrained(copied), model)


def test_weights_of_another_save_are_noticed(copied, saved, tmp_path):
    """New weights of the same shapes beside the old config.json: only the checksums differ."""
    torch.manual_seed(1)
    save_pretrained(build("llama, scaled rope"), copied)
    (copied / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupted: tensor '"):
        load_pretrained(copied)


def test_a_save_that_fails_leaves_the_old_one(copied, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(build(), copied)
    monkeypatch.undo()
    assert not list(copied.glob(".saving-*"))
    load_pretrained(copied)


LOADS = """
import sys
from hylora_kernels import load_pretrained

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

load_pretrained(sys.argv[1])  # Imports what any load imports.
before = resident("VmRSS")
loaded = load_pretrained(sys.argv[2])
print(resident("VmHWM") - before, loaded.model.embed_tokens.weight.nbytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to measure by")
def test_loading_takes_the_model_and_one_tensor_more(tmp_path):
    """A process of its own measures: memory that other tests free would hide what a load takes."""
    config = copy.deepcopy(CONFIGS["gemma"])
    small, large = tmp_path / "small", tmp_path / "large"
    save_pretrained(AutoModelForCausalLM.from_config(config), small)
    config.hidden_size, config.intermediate_size, config.vocab_size = 256, 1024, 20000
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp.up_proj = SVDLoRALinear(256, 1024, 128, 16, bias=False)
    model.model.embed_tokens.weight.data.normal_()
    save_pretrained(model.to(torch.float64), large)
    largest = model.model.embed_tokens.weight.nbytes
    size = sum(tensor.nbytes for tensor in load_file(large / "model.safetensors").values())
    assert largest > 2**25  # glibc maps such a block anew, regardless of memory freed before.
    [(printed, _)] = run_together(LOADS, small, large, processes=1)
    grown, loaded = map(int, printed.split())
    # The embedding alone is as large as the allowed extra tensor; nothing is cast here.
    assert size / 2 < grown < size + 10e6
    assert loaded == largest


# ----------------------------------------------------------------------- models that can't be saved


def test_models_that_can_not_be_saved(tmp_path):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "x")
    wider = build()
    wider.model.layers[0].mlp.up_proj = nn.Linear(32, 50, bias=False)
    with pytest.raises(
        ValueError, match=rf"'{LAYER}\.weight' is floating \[50, 32\], but floating \[48, 32\]"
    ):
        save_pretrained(wider, tmp_path / "x")
    biased = build()
    biased.get_submodule(LAYER).bias = nn.Parameter(torch.zeros(48))
    with pytest.raises(
        ValueError, match=rf"'{LAYER}\.bias' is floating \[48\], but nothing in the Ll"
    ):
        save_pretrained(biased, tmp_path / "x")
    quantised = build(rank=0)
    weight = torch.zeros(48, 32, dtype=torch.int8)
    quantised.get_submodule(LAYER).weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"is torch\.int8 \[48, 32\], but floating \[48, 32\]"):
        save_pretrained(quantised, tmp_path / "x")
    bare = build(rank=0)
    bare.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match=rf"'{LAYER}\.weight' is missing from it"):
        save_pretrained(bare, tmp_path / "x")
    with pytest.raises(ValueError, match="is on the meta device: there is nothing to save"):
        save_pretrained(build().to("meta"), tmp_path / "x")

    class Mine(LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="transformers knows no model class 'Mine'"):
        save_pretrained(Mine(CONFIGS["llama"]), tmp_path / "x")
    Mine.__name__ = "LlamaForCausalLM"
    with pytest.raises(ValueError, match="its class is not the LlamaForCausalLM of transformers"):
        save_pretrained(Mine(CONFIGS["llama"]), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is a file, not a folder"):
        save_pretrained(build(), tmp_path / "file")


def test_too_little_space_is_said_first(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"saving to .*: needs about 0\.00 GB on disk"):
        save_pretrained(build(), tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- transformers' own save_pretrained


def test_save_pretrained_of_the_model_writes_this_format(saved, tmp_path):
    model = save_in_hylora_format(build())
    model.save_pretrained(tmp_path / "a")
    save_pretrained(model, tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes(), file.name
    loaded = load_pretrained(saved)
    loaded.save_pretrained(tmp_path / "c", is_main_process=True, max_shard_size="20KB")
    assert len(list((tmp_path / "c").glob("model-*.safetensors"))) == 2
    assert_same(load_pretrained(tmp_path / "c"), loaded)
    state = {name: tensor * 2 for name, tensor in loaded.state_dict().items() if "piv" not in name}
    state |= {name: t for name, t in loaded.state_dict().items() if "piv" in name}
    loaded.save_pretrained(tmp_path / "d", state_dict=state, safe_serialization=True)
    doubled = load_pretrained(tmp_path / "d").state_dict()
    assert torch.equal(doubled["lm_head.weight"], state["lm_head.weight"])
    loaded.save_pretrained(tmp_path / "e", is_main_process=False)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub=True is not supported"),
        ({"safe_serialization": False}, "safe_serialization=False would write a pickle"),
        ({"variant": "fp16"}, "variant is not supported when saving a compressed model"),
    ],
)
def test_save_pretrained_of_the_model_refuses_what_it_can_not_honour(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        save_in_hylora_format(build()).save_pretrained(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_copy_of_the_model_saves_itself(tmp_path):
    model = save_in_hylora_format(build())
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.lm_head.weight.add_(1)
        twin.save_pretrained(tmp_path / str(i))
        assert_same(load_pretrained(tmp_path / str(i)), twin)
    copy.deepcopy(model.config)


def test_the_model_is_freed_at_once():
    """No reference cycle, which would keep gigabytes until the next garbage collection."""
    model = save_in_hylora_format(build())
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------ the selection of linears


def test_the_selection_comes_back(tmp_path):
    model = build()
    model.hylora_linears = [LAYER]
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.hylora_linears == [LAYER]
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith((".A", ".B")) for name in trained)


@pytest.mark.parametrize("linears", ["q_proj", [3], ["model.layers.7.mlp.up_proj"]])
def test_a_selection_that_can_not_be(linears, tmp_path):
    save_pretrained(build(), tmp_path)
    edit_config(tmp_path, lambda ours: ours.update(linears=linears))
    with pytest.raises(CheckpointError, match=r"config\.json: linears (must be|names no module)"):
        load_pretrained(tmp_path)
