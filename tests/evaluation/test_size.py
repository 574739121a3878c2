"""Numbers of parameters and bytes, against counting by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from hylora_kernels.backends import cpu
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.inference.optimize import optimize_for_inference
from hylora_kernels.layers.packed import packed_states
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.saving import save_pretrained


def test_size_of_a_dense_model():
    model = tiny.llama(torch.bfloat16)
    size = model_size(model)
    linears = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    total = linears + 2 * 96 * 32 + 5 * 32
    assert (size.parameters, size.trainable) == (total, total)
    assert size.parameter_bytes == 2 * total and size.trainable_bytes == 2 * total
    assert size.linears.dense == size.linears.as_is == size.linears.merged == linears
    assert size.model.dense == size.model.as_is == size.model.merged == total
    assert size.linears.keep_merged == 1 and size.linears.removed_merged == 0
    assert size.resident_bytes == size.parameter_bytes + size.buffer_bytes
    assert size.file_bytes is None


def test_tied_weights_count_once():
    size, untied = model_size(tiny.llama(tie_word_embeddings=True)), model_size(tiny.llama())
    assert untied.parameters - size.parameters == 96 * 32
    assert untied.resident_bytes - size.resident_bytes == 4 * 96 * 32
    assert untied.linears == size.linears


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_size_of_a_compressed_model(form):
    rank, lora_rank = 8, 4
    dense = model_size(tiny.llama())
    model = tiny.adapted(
        tiny.llama(), rank, lora_rank, form, names=("mlp.up_proj", "mlp.gate_proj")
    )
    model.requires_grad_(False)
    N, K, replaced = 48, 32, 4
    base = rank * (K + N - (rank if form == "pivoted" else 0))
    total = rank + lora_rank
    merged = total * (K + N - (total if form == "pivoted" else 0))
    others = dense.linears.dense - replaced * N * K  # left dense, and counted

    size = model_size(model)
    assert size.linears.dense == dense.linears.dense
    assert size.linears.as_is == others + replaced * (base + lora_rank * (K + N))
    assert size.linears.merged == others + replaced * merged
    assert size.linears.keep_merged == pytest.approx(size.linears.merged / dense.linears.dense)
    assert size.linears.removed_as_is == pytest.approx(1 - size.linears.keep_as_is)
    assert size.model.dense == dense.parameters
    assert size.model.as_is == size.parameters == sum(p.numel() for p in model.parameters())
    assert size.trainable == 0
    pivots = replaced * rank if form == "pivoted" else 0
    assert size.buffers == dense.buffers + pivots
    assert size.buffer_bytes == dense.buffer_bytes + 4 * pivots

    after = model_size(merge_adapters(model))
    assert after.linears.as_is == after.linears.merged == size.linears.merged
    assert after.model.as_is == after.model.merged == size.model.merged == after.parameters


def test_resident_bytes_are_whole_storages():
    """A slice of a larger tensor keeps all of it in memory."""
    model = tiny.llama()
    before = model_size(model)
    wide = torch.zeros(96, 64)
    model.lm_head.weight.data = wide[:, :32]
    after = model_size(model)
    assert after.resident_bytes == before.resident_bytes + 4 * 96 * 32
    assert after.parameter_bytes == before.parameter_bytes


@pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
def test_resident_bytes_are_those_of_the_parts_of_a_quantized_tensor():
    """torchao's weights are tensors of codes and scales, without a storage of their own."""
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(TwoTensor(torch.zeros(3, 4), torch.zeros(3, 4)))
    assert model_size(layer).resident_bytes == 2 * 3 * 4 * 4


def test_resident_bytes_count_the_panels_of_packed_layers():
    model = tiny.llama(torch.bfloat16).eval()
    before = model_size(model)
    optimize_for_inference(model)
    after = model_size(model)
    panels = {id(t): t.nbytes for state in packed_states(model) for t in state.tensors}
    assert sum(panels.values()) > 0.5 * before.resident_bytes
    left = sum(p.nbytes for p in model.parameters()) + after.buffer_bytes
    assert after.resident_bytes >= left + sum(panels.values())


def test_file_bytes(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a folder with \.safetensors files, got"):
        model_size(tiny.llama(), tmp_path)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"weight": torch.zeros(100)}, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "training").mkdir()
    save_file({"weight": torch.zeros(100)}, tmp_path / "training" / "other.safetensors")
    files = sum(file.stat().st_size for file in tmp_path.glob("model-*"))
    assert model_size(tiny.llama(), tmp_path).file_bytes == files > 800


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("ours", [True, False])
def test_file_bytes_count_each_weight_once(ours, shard, tmp_path):
    """Mistral's repositories hold consolidated.safetensors beside the shards."""
    model = tiny.adapted(tiny.llama()) if ours else tiny.llama()
    save = save_pretrained if ours else PreTrainedModel.save_pretrained
    save(model, tmp_path, max_shard_size=shard)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "10KB")
    wanted = sum(file.stat().st_size for file in files)
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        save_file({"weight": torch.zeros(100)}, tmp_path / name)
    assert model_size(model, tmp_path).file_bytes == wanted
