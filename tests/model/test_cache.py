"""Keys and values in memory that is reserved ahead of the tokens."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from transformers import DynamicCache

from hylora_kernels.inference.modules import Modules
from hylora_kernels.model import cache as reserving


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@torch.no_grad()
def test_keys_and_values_are_written_in_place(model, monkeypatch):
    pointers, update = set(), reserving.ReservedLayer.update

    def seen(layer, *args, **kwargs):
        keys, values = update(layer, *args, **kwargs)
        pointers.update((keys.data_ptr(), values.data_ptr()))
        return keys, values

    monkeypatch.setattr(reserving.ReservedLayer, "update", seen)
    ids = tiny.tokens(2, 12)
    runtime = Modules(model)
    runtime.prefill(ids[:, :4], torch.ones_like(ids[:, :4]))
    for tokens in ids[:, 4:].unbind(1):
        runtime.step(tokens)
    assert len(pointers) == 2 * model.config.num_hidden_layers


@torch.no_grad()
def test_a_cache_that_gets_its_layers_in_a_call_keeps_what_it_holds(model):
    ids = tiny.tokens(2, 12)
    want = model(input_ids=ids).logits
    cache, found = DynamicCache(), []
    for part in ids.split(5, 1):
        reserving.reserve(cache, 12)
        found.append(model(input_ids=part, past_key_values=cache).logits)
    assert {type(layer) for layer in cache.layers} == {reserving.ReservedLayer}
    torch.testing.assert_close(torch.cat(found, 1), want)
