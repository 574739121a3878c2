"""A hollow model says of a config what the loaded model says, and takes no memory."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny, zoo
from helpers.zoo import ZOO
from transformers import LlamaConfig, MixtralConfig

from hylora_kernels.layers.experts import unstack
from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.hollow import (
    activations_of,
    filled,
    first_call,
    hollow_model,
    hollow_model_of,
    structure_of,
)
from hylora_kernels.model.structure import discover

MIXTRAL = MixtralConfig(
    **zoo.LIKE_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
)


def names(structure):
    return [group.paths for group in structure.groups], [block.path for block in structure.blocks]


@pytest.mark.parametrize("name", ZOO)
def test_the_structure_is_the_loaded_models(name):
    model = hollow_model_of(ZOO[name].config, torch.float32)
    loaded = zoo.zoo_model(name)
    assert names(structure_of(model)) == names(discover(loaded))
    sizes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (model, loaded)]
    assert sizes[0] == sizes[1]


def test_experts_are_linears():
    loaded = zoo.random_model(MIXTRAL)
    unstack(loaded)
    model = hollow_model_of(MIXTRAL, torch.float32)
    assert names(structure_of(model)) == names(discover(loaded))
    addresses = {t.matrix.data_ptr() for t in structure_of(model).targets}
    assert len(addresses) == len(structure_of(model).targets)


def test_a_model_of_any_size_takes_no_memory():
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=3)
    model = hollow_model_of(config, torch.bfloat16)
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    assert sum(held.values()) < 1000
    assert sum(p.numel() for p in model.parameters()) > 2e9


def test_a_forward_keeps_what_autograd_keeps_of_the_loaded_model():
    loaded, L = tiny.llama(num_hidden_layers=3), 16
    model = hollow_model_of(loaded.config, torch.float32)
    seen = activations_of(model, structure_of(model), L)
    kept: dict[int, torch.Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in loaded.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in loaded.buffers()}

    def keep(tensor):
        if (key := tensor.untyped_storage().data_ptr()) not in own:
            kept[key] = tensor
        return tensor

    loaded.requires_grad_(False)
    hidden = torch.randn(1, L, 32)
    args, kwargs = first_call(loaded, loaded.model.layers[1], L)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loaded.model.layers[1](hidden.requires_grad_().clone(), *args[1:], **kwargs)
    expected = sum(t.untyped_storage().nbytes() for t in kept.values()) / L
    assert seen.one_block == pytest.approx(expected, rel=0.1)
    assert seen.all_blocks == pytest.approx(3 * seen.one_block, rel=0.1)
    assert seen.attention == 3 * 32


def test_a_filled_block_computes_and_is_hollow_again():
    model = hollow_model_of(zoo.ZOO["llama"].config, torch.float32)
    block = structure_of(model).blocks[0].module
    args, kwargs = first_call(model, block, 6)
    before = block.self_attn.q_proj.weight
    with filled(block), torch.no_grad():
        y = block(torch.randn(1, 6, 32), *args[1:], **kwargs)
    assert y.isfinite().all() and y.std() > 0
    assert block.self_attn.q_proj.weight is before


def test_the_config_alone_is_read(tmp_path):
    tiny.llama().config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        assert hollow_model(source).config.hidden_size == 32
    with pytest.raises(ValueError, match="does not exist"):
        hollow_model(tmp_path / "nothing.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"without a config\.json"):
        hollow_model(tmp_path / "empty")


def test_a_compressed_model_and_a_strangers_config_are_refused(tmp_path):
    config = tiny.llama().config.to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "hylora"}}))
    with pytest.raises(CheckpointError, match="compressed already"):
        hollow_model(path)
    path.write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        hollow_model(path)
    path.write_text(json.dumps({"model_type": "nobody"}))
    with pytest.raises(CheckpointError):
        hollow_model(path)
