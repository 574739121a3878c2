"""optimize_for_inference on quantised models, by a backend that packs codes as they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from helpers.checkpoints import IDS, assert_same, logits
from helpers.quantizing import quantized_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hylora_kernels import use_backend
from hylora_kernels.backends import eager
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.inference.optimize import optimize_for_inference, restore_from_inference
from hylora_kernels.layers.packed import (
    PackedFactor,
    PackedQuantizedEmbedding,
    PackedQuantizedLinear,
)
from hylora_kernels.layers.quantized import rows_of
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.saving import save_pretrained
from hylora_kernels.ops.quantized import quantized_linear
from hylora_kernels.reference import dequantize
from hylora_kernels.weights import QuantizedMatrix, Weights


@dataclass(frozen=True, eq=False)
class Stored:
    """The codes in memory of their own, each byte inverted."""

    weights: Weights
    dtype: torch.dtype
    backend: str = "eager"
    device_type: str = "cpu"

    def __post_init__(self):
        N, K = self.weights.out_features, self.weights.in_features
        vars(self).update(shape=(K,), bias_shape=(N,), out_features=N)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for m in self.weights for t in _tensors(m)]


def _tensors(value) -> list[Tensor]:
    if isinstance(value, QuantizedMatrix):
        return [t for t in (value.codes, value.scales, value.zeros) if t is not None]
    return [value] if isinstance(value, Tensor) else []


def _inverted(weights: Weights) -> Weights:
    def of(value):
        if isinstance(value, QuantizedMatrix):
            zeros = None if value.zeros is None else ~value.zeros
            return replace(value, codes=~value.codes, scales=value.scales.clone(), zeros=zeros)
        return value.detach().clone() if isinstance(value, Tensor) else value

    return Weights(*map(of, weights))


@pytest.fixture(autouse=True)
def packing(monkeypatch):
    """The eager backend, packing quantised layers only."""

    def pack(weights, dtype, for_group=False):
        if not weights.is_quantized:
            return None
        return Stored(_inverted(replace(weights, bias=None)), dtype)

    def forward_packed(x, packed, bias):
        return quantized_linear(x, *replace(_inverted(packed.weights), bias=bias))

    def rows_packed(ids, packed):
        rows = rows_of(_inverted(packed.weights).SVh, ids)
        return dequantize(rows, packed.dtype).unflatten(0, ids.shape)

    for name, function in (("pack", pack), ("forward_packed", forward_packed)):
        monkeypatch.setattr(eager, name, function)
    monkeypatch.setattr(eager, "rows_packed", rows_packed)
    monkeypatch.setattr(eager, "unpack", lambda packed: _inverted(packed.weights))
    with use_backend("eager"):
        yield


def bits_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama, tied", "llama"])
def test_packed_and_restored_bit_for_bit(name):
    model = quantized_model(name)
    before, wanted, objects = bits_of(model), logits(model), dict(model.named_parameters())
    size = model_size(model)
    optimize_for_inference(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(PackedQuantizedEmbedding) == int(name == "llama, tied")
    assert PackedFactor in kinds and PackedQuantizedLinear in kinds
    assert torch.equal(logits(model), wanted)
    now = bits_of(model)
    assert list(now) == list(before) and all(torch.equal(now[n], t) for n, t in before.items())
    packed = model_size(model)
    assert (packed.parameters, packed.model, packed.linears) == (
        *(size.parameters, size.model, size.linears),
    )
    layer = model.get_submodule("model.layers.0.self_attn.k_proj")
    with pytest.raises(RuntimeError, match="codes is packed for inference and can't be set"):
        layer.SVh.codes = torch.zeros(1)
    assert torch.equal(layer.SVh.dequantize(), layer.weight + 0)
    restore_from_inference(model)
    after = bits_of(model)
    assert list(after) == list(before) and all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(logits(model), wanted)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in objects.items()}


def test_the_plain_codes_are_freed():
    model = quantized_model()
    codes = model.get_submodule("model.layers.0.self_attn.k_proj").SVh.codes
    memory = StorageWeakRef(codes.untyped_storage())
    optimize_for_inference(model)
    assert memory.expired()
    assert codes.shape == (16, 1, 32) and codes.dtype == torch.uint8


def test_another_dtype_restores_the_codes_first():
    model, other = quantized_model(), quantized_model()
    optimize_for_inference(model).to(torch.bfloat16)
    assert not any(isinstance(m, PackedFactor) for m in model.modules())
    assert_same(model, other.to(torch.bfloat16))


def test_a_packed_model_is_copied_and_saved(tmp_path):
    model = quantized_model()
    wanted = logits(model)
    optimize_for_inference(model)
    twin = copy.deepcopy(model)
    save_pretrained(twin, tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path)), wanted)
    restore_from_inference(twin)
    assert torch.equal(twin(IDS).logits, wanted) and torch.equal(logits(model), wanted)
