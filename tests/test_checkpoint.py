"""Checkpoints: what is saved comes back bit for bit, and whatever is wrong with one is said."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from hylora_kernels import checkpoint
from hylora_kernels.checkpoint import CheckpointError, adopt, load_pretrained, save_pretrained
from hylora_kernels.linear import SVDLoRALinear

IDS = torch.arange(3, 43).view(2, 20)
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = TOKENS | {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48}
CONFIGS = {
    "llama": LlamaConfig(**SMALL | {"num_hidden_layers": 2}, num_key_value_heads=2),
    "llama, tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "llama, scaled rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "gpt2": GPT2Config(**TOKENS, n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "opt": OPTConfig(**TOKENS, **OPT, max_position_embeddings=64, word_embed_proj_dim=32),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**SMALL),
}


def build(name="llama", form="pivoted", rank=8, lora_rank=4, alpha=0.5):
    """A tiny random model whose linears, the head aside, are SVDLoRALinear (all if rank is set)."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.T.clone()), module.bias
            module = linear
        if rank and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            layer = SVDLoRALinear.from_linear(module, rank, lora_rank, alpha, form=form)
            model.set_submodule(path, layer)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same(loaded, model):
    assert torch.equal(logits(loaded), logits(model))
    wanted, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint; tests that alter one copy it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    save_pretrained(build("llama, scaled rope"), folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    """Rewrite the weights as another tool would, without checksums."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, lambda ours: ours.pop("checksums"))


LAYER = "model.layers.0.mlp.up_proj"


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
    assert (ours["quant_method"], ours["format"]) == ("hylora", 1)
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
    backend = Tokenizer(tokenizer_models.WordLevel({"?": 0, "a": 5}, unk_token="?"))
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


def test_a_save_that_was_cut_off_is_noticed(copied, monkeypatch):
    """New weights of the same shapes beside the old config.json: only the checksums can tell."""
    torch.manual_seed(1)
    replace = os.replace

    def fail_at_config(a, b):
        if os.path.basename(b) == "config.json" and os.path.dirname(b) == str(copied):
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", fail_at_config)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(build("llama, scaled rope"), copied)
    assert not list(copied.glob(".saving-*"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupted: tensor '"):
        load_pretrained(copied)


def test_a_save_that_fails_leaves_the_old_one(copied, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(build(), copied)
    monkeypatch.undo()
    assert not list(copied.glob(".saving-*"))
    load_pretrained(copied)


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to measure by"
)
def test_loading_takes_the_model_and_one_tensor_more(tmp_path):
    config = copy.deepcopy(CONFIGS["gemma"])
    config.hidden_size, config.intermediate_size, config.vocab_size = 256, 1024, 16384
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp.up_proj = SVDLoRALinear(256, 1024, 128, 16, bias=False)
    model.model.embed_tokens.weight.data.normal_()
    save_pretrained(model.to(torch.float64), tmp_path)
    largest = model.model.embed_tokens.weight.nbytes
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert largest > 30e6
    del model
    load_pretrained(tmp_path)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = resident("VmRSS")
    loaded = load_pretrained(tmp_path)
    # One tensor more would be room for the embedding, if it were cast; here nothing is.
    assert size / 2 < resident("VmHWM") - before < size + 10e6
    assert loaded.model.embed_tokens.weight.nbytes == largest


# ------------------------------------------------------------------------------- broken checkpoints


def test_not_a_checkpoint(tmp_path, copied):
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: not found"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a file; .* reads a folder"):
        load_pretrained(copied / "model.safetensors")
    (tmp_path / "m.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"m\.pt: is a pickle; load_pretrained reads"):
        load_pretrained(tmp_path / "m.pt")
    build(rank=0).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"config\.json: quant_method is None, not 'hylora'"):
        load_pretrained(tmp_path / "plain")


def test_pickled_weights_are_refused(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickles are not read"):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), r"config\.json: format is 2, supported is 1"),
        (lambda c: c.pop("format"), r"config\.json: format is None, supported is 1"),
        (lambda c: c.update(quant_method="gptq"), r"config\.json: quant_method is 'gptq', not 'hy"),
        (lambda c: c.update(modules=[1]), r"modules must be an object of objects, got \[1\]"),
        (lambda c: c.update(checksums={"a": 1}), "checksums must be an object of objects"),
        (
            lambda c: c["modules"][LAYER].update(rank=99),
            rf"config\.json: modules\['{LAYER}'\]: rank must be in 1\.\.32.*got 99",
        ),
        (lambda c: c["modules"][LAYER].update(rank="8"), r"up_proj'\]: rank must be an int"),
        (lambda c: c["modules"][LAYER].update(form="lu"), r"up_proj'\]: form must be one of"),
        (lambda c: c["modules"][LAYER].update(group="g"), r"up_proj'\]: group must be null"),
        (lambda c: c["modules"][LAYER].update(extra=1), r"up_proj'\]: .*'extra'"),
        (lambda c: c["modules"][LAYER].pop("alpha"), r"up_proj'\]: .*'alpha'"),
        (
            lambda c: c["modules"].update({"model.nothing": c["modules"][LAYER]}),
            r"modules\['model\.nothing'\]: .*nothing",
        ),
        (
            lambda c: c["modules"].update({"model.norm": c["modules"][LAYER]}),
            r"modules\['model\.norm'\]: LlamaRMSNorm is no linear layer",
        ),
        (
            lambda c: c["modules"][LAYER].update(rank=7),
            rf"model\.safetensors: tensor '{LAYER}\.\w+' must have shape \[\d+(, \d+)?\], has",
        ),
        (
            lambda c: c["modules"][LAYER].update(form="pair"),
            rf"tensor '{LAYER}\.U' must have shape \[48, 8\], has \[40, 8\]",
        ),
        (
            lambda c: c["modules"].pop(LAYER),
            rf"model\.safetensors: unexpected tensor '{LAYER}\.\w+': the model has none",
        ),
        (
            lambda c: c["checksums"].update({"model-2.safetensors": {}}),
            r"model-2\.safetensors: can't be read: No such file",
        ),
        (
            lambda c: c["checksums"]["model.safetensors"].update({f"{LAYER}.U": "00000000"}),
            rf"model\.safetensors: corrupted: tensor '{LAYER}\.U' doesn't have its checksum",
        ),
    ],
)
def test_altered_config(copied, change, message):
    edit_config(copied, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json: corrupted: Expecting property name"),
        ("[]", r"config\.json: corrupted: list instead of an object"),
        ("\x00\x01", r"config\.json: corrupted"),
    ],
)
def test_config_that_is_no_json(copied, content, message):
    (copied / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NoSuchModel"], "model_type": "x"}, "no model class 'NoSuchModel'"),
        ({"architectures": ["AutoConfig"]}, "no model class 'AutoConfig'"),
        ({"hidden_size": "wide"}, "no LlamaForCausalLM comes of it"),
        ({"hidden_size": 64}, r"must have shape \[.*\], has"),
    ],
)
def test_config_that_describes_another_model(copied, change, message):
    config = json.loads((copied / "config.json").read_text()) | change
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"(?s)(config.json|model.safetensors): .*{message}"):
        load_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.U"), rf"tensor '{LAYER}\.U' is missing \(1 in all\)"),
        (lambda t: t.update(more=torch.ones(2)), "unexpected tensor 'more': the model has none"),
        (
            lambda t: t.update({f"{LAYER}.SVh": torch.ones(8, 31)}),
            rf"tensor '{LAYER}\.SVh' must have shape \[8, 32\], has \[8, 31\]",
        ),
        (
            lambda t: t.update({f"{LAYER}.pivots": t[f"{LAYER}.pivots"].long()}),
            rf"tensor '{LAYER}\.pivots' must have torch\.int32, has torch\.int64",
        ),
        (
            lambda t: t.update({f"{LAYER}.pivots": t[f"{LAYER}.pivots"].flip(0).contiguous()}),
            rf"tensor '{LAYER}\.pivots' must be strictly ascending within \[0, 48\)",
        ),
        (
            lambda t: t[f"{LAYER}.pivots"].__setitem__(-1, 48),
            rf"tensor '{LAYER}\.pivots' must be strictly ascending within \[0, 48\)",
        ),
        (
            lambda t: t[f"{LAYER}.pivots"].__setitem__(0, -1),
            rf"tensor '{LAYER}\.pivots' must be strictly ascending within \[0, 48\)",
        ),
        (
            lambda t: t.update({f"{LAYER}.A": t[f"{LAYER}.A"].int()}),
            rf"tensor '{LAYER}\.A' must have a floating dtype, has torch\.int32",
        ),
    ],
)
def test_altered_weights(copied, change, message):
    edit_weights(copied, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
        load_pretrained(copied)


def test_one_tensor_in_two_shards(tmp_path):
    save_pretrained(build(), tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    a, b = load_file(first), load_file(second)
    name = next(iter(a))
    save_file(b | {name: a[name]}, second)
    with pytest.raises(CheckpointError, match=rf"{second.name}: tensor '{name}' is also in"):
        load_pretrained(tmp_path)


def test_truncated_at_any_length(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    layout = json.loads(whole[8:header])
    for length in (0, 4, 8, 100, header - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: \d+ bytes"):
            load_pretrained(copied)
    for length in (header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        cut = min(
            (entry["data_offsets"], name)
            for name, entry in layout.items()
            if name != "__metadata__" and header + entry["data_offsets"][1] > length
        )[1]
        message = rf"model\.safetensors: truncated at byte {length}, in tensor '{cut}'"
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(copied)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(CheckpointError, match="2 bytes after the last tensor"):
        load_pretrained(copied)


def test_any_flipped_byte_is_noticed(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(start, len(whole), (6,), generator=generator).tolist()
    layout = json.loads(whole[8:start])
    for place in (start, len(whole) - 1, *places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        hit = next(
            name
            for name, entry in layout.items()
            if name != "__metadata__"
            and entry["data_offsets"][0] <= place - start < entry["data_offsets"][1]
        )
        with pytest.raises(CheckpointError, match=f"corrupted: tensor '{hit}' doesn't have its"):
            load_pretrained(copied)
    load_pretrained(copied, verify=False)


def test_any_flipped_byte_of_the_header_is_noticed(copied):
    """Some are harmless, as in the spaces that pad it; the model is the same then."""
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    state = load_pretrained(copied).state_dict()
    refused = 0
    for place in range(1, 200, 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            found = load_pretrained(copied).state_dict()
        except CheckpointError as error:
            assert "model.safetensors" in str(error)
            refused += 1
        else:
            assert all(torch.equal(found[name], state[name]) for name in state), place
    assert start > 200
    assert refused > 16


def test_header_that_lies(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    data = whole[start:]

    def rewrite(change):
        header = json.loads(whole[8:start])
        change(header)
        encoded = json.dumps(header).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)

    name = f"{LAYER}.SVh"
    cases = [
        (lambda h: h[name].update(dtype="F8"), "corrupted header: 'F8'"),
        (lambda h: h[name].update(shape=[8, -32]), r"corrupted header: shape \[8, -32\]"),
        (lambda h: h[name].update(shape=[8, 33]), f"corrupted header: tensor '{name}' takes 1056"),
        (lambda h: h[name].pop("shape"), "corrupted header: .*'shape'"),
        (lambda h: h[name].update(data_offsets=[0]), "corrupted header: not enough values"),
        (lambda h: h[name].update(data_offsets=[0, 1024]), "corrupted header: tensor"),
        (lambda h: h.update({name: 5}), "corrupted header"),
    ]
    for change, message in cases:
        rewrite(change)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
            load_pretrained(copied)


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


def test_too_little_room_is_said_first(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"saving to .*: needs about 0\.00 GB on disk"):
        save_pretrained(build(), tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- transformers' own save_pretrained


def test_adopted_model_writes_this_format(saved, tmp_path):
    model = adopt(build())
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
def test_adopted_model_refuses_what_it_can_not_honour(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        adopt(build()).save_pretrained(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_adopted_models_copy_saves_itself(tmp_path):
    model = adopt(build())
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.lm_head.weight.add_(1)
        twin.save_pretrained(tmp_path / str(i))
        assert_same(load_pretrained(tmp_path / str(i)), twin)
    copy.deepcopy(model.config)


def test_an_adopted_model_is_freed_at_once():
    """No reference cycle, which would keep gigabytes until the next garbage collection."""
    model = adopt(build())
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
