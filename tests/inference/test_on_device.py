"""Inference on the device at hand: an optimised model says the same, and its decoder, too."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import tiny
from helpers.grouping import blocks_of

from hylora_kernels import Decoder, optimize_for_inference, restore_from_inference
from hylora_kernels.layers.packed import packed_states


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@torch.no_grad()
def test_an_optimised_model_says_the_same(form, device):
    model = tiny.adapted(tiny.llama(torch.bfloat16, max_position_embeddings=512), form=form)
    model = model.to(device)
    state = copy.deepcopy(model.state_dict())
    wide = copy.deepcopy(model).double()
    optimize_for_inference(model)
    groups = 2 * len(model.model.layers) if device == "cuda" else 0
    assert packed_states(model) and len(blocks_of(model)) == groups
    for shape in ((1, 1), (1, 1), (3, 20), (3, 20), (2, 300)):
        ids = tiny.tokens(*shape).to(device)
        exact, logits = wide(input_ids=ids).logits, model(input_ids=ids).logits.double()
        assert (logits - exact).norm() < 0.05 * exact.norm()
    restore_from_inference(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("optimised", [False, True], ids=["plain", "optimised"])
def test_a_decoder_makes_the_tokens_of_transformers(optimised, compiled, device):
    model = tiny.adapted(tiny.llama(max_position_embeddings=512)).to(device)
    if optimised:
        optimize_for_inference(model)
    model.generation_config.eos_token_id = None
    decoder = Decoder(model, 4, compiled=compiled)
    if device == "cuda":
        assert decoder.runtime == "cuda graph", decoder.reason
    for count, length, new in ((1, 5, 12), (3, 250, 12), (2, 9, 4), (1, 7, 4)):
        ids = tiny.tokens(count, length).to(device)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        options = {"max_new_tokens": new, "do_sample": False}
        whole = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        found = torch.stack([*decoder.stream(ids, mask, max_new_tokens=new)], 1)
        assert torch.equal(found, whole[:, length:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_keeps_its_workspace_when_others_are_cleared():
    model = tiny.llama(torch.bfloat16, max_position_embeddings=512, hidden_size=1024).to("cuda")
    decoder, ids = Decoder(model, 2), tiny.tokens(2, 9).to("cuda")
    expected = torch.stack([*decoder.stream(ids, max_new_tokens=8)], 1)
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile does
    torch.cuda.empty_cache()
    noise = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
    found = torch.stack([*decoder.stream(ids, max_new_tokens=8)], 1)
    assert torch.equal(found, expected) and all(bool(n.isnan().all()) for n in noise)
