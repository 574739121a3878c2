"""A dense model is loaded whole or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import checkpoints
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, MixtralConfig

from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.load import load_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    checkpoints.build(rank=0).save_pretrained(folder)
    return folder


@pytest.fixture
def altered(whole, tmp_path):
    """A function that changes the tensors or the config of a copy and tries to load it."""

    def load(change=None, **config):
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder)
        tensors = load_file(folder / "model.safetensors")
        if change:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(saved | config))
        return load_model(folder, "cpu")[0]

    return load


HEAD, UP = "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), f"tensor {UP} is missing from the weights"),
        (lambda t: (t.pop(UP), t.pop(HEAD)), f"tensors {HEAD}, {UP} are missing from the weights"),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "and 16 more are missing from the weig"),
        (
            lambda t: t.update({HEAD: t[HEAD][:63].clone()}),
            rf"tensor {HEAD} \(it has \[63, 32\], the model \[64, 32\]\) is of another shape",
        ),
        (
            lambda t: t.update({UP[:-6] + "bias": torch.ones(48)}),
            "tensor model.layers.1.mlp.up_proj.bias is without a place in the LlamaForCausalLM",
        ),
        (
            lambda t: t.update({UP[:-6] + "weight_scale": torch.ones(1)}),
            "up_proj.weight_scale is without a place",
        ),
        (
            lambda t: t.update({UP[:-6] + "lora_A.weight": torch.ones(4, 32)}),
            "up_proj.lora_A.weight is without a place",
        ),
    ],
)
def test_what_the_weights_lack_is_named(altered, change, message):
    """transformers fills gaps with random numbers and leaves out what has no place."""
    with pytest.raises(CheckpointError, match=message):
        altered(change)


@pytest.mark.parametrize("layers", [0, 1])
def test_layers_are_not_left_out(altered, layers):
    with pytest.raises(CheckpointError, match=r"layers\.\d\..* without a place"):
        altered(num_hidden_layers=layers)


def test_tensors_of_other_parts_are_left_out(altered):
    others = ("vision_tower.patch.weight", "model.mtp.0.norm.weight", "score.weight")
    model = altered(lambda t: t.update({name: torch.ones(2) for name in others}))
    assert len(model.model.layers) == 2


def test_a_head_that_is_tied_need_not_be_there(altered):
    model = altered(lambda t: t.pop(HEAD), tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_with_another_head_is_refused(tmp_path):
    config = LlamaConfig(**checkpoints.SMALL, num_labels=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load_model(tmp_path, "cpu")


def test_one_expert_of_many_is_missed(tmp_path):
    """transformers 5 stacks the experts of a layer into one tensor."""
    from transformers import MixtralForCausalLM

    sizes = checkpoints.SMALL | {"num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = sorted(name for name in tensors if "experts" in name and "3" in name)[-1]
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="experts"):
        load_model(tmp_path, "cpu")
