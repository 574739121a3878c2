"""Blocks run one by one: what each batch's calls hold, two streams apart, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.zoo import VOCAB, ZOO, random_model, tokens, zoo_model
from torch import nn
from transformers import Gemma3nTextConfig, Gemma4TextConfig

from hylora_kernels.compression.chain import BATCH, fingerprint, record
from hylora_kernels.compression.compress import compress
from hylora_kernels.model.structure import discover

IDS = tokens(BATCH + 2, 12)
GEMMA = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA4 = Gemma4TextConfig(**GEMMA, intermediate_size=48)
GEMMA3N = Gemma3nTextConfig(
    **GEMMA, intermediate_size=[48] * 4, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4
)


@pytest.fixture(params=["llama", "gpt2", "gemma4", "gemma3n"])
def model(request):
    """Gemma 4 has per-layer inputs, Gemma 3n four stacked hidden states too; in both the last two
    blocks read keys and values that the first two leave in a dict."""
    made = {"gemma4": GEMMA4, "gemma3n": GEMMA3N}
    return random_model(made.get(request.param) or ZOO[request.param].config, torch.float64)


def last_outputs(model, blocks):
    """By batch, what the last block gives in forwards of the whole model."""
    outputs = []

    def keep(_module, _args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hook = blocks[-1].module.register_forward_hook(keep)
    with torch.no_grad():
        for batch in IDS.split(BATCH):
            model(input_ids=batch, use_cache=False)
    hook.remove()
    return outputs


@torch.no_grad()
def test_two_streams_are_each_its_own_models(model):
    """The two are run in turn, as a refit does: no block of one may read what one of the other left
    behind."""
    other = copy.deepcopy(model)
    blocks, others = discover(model).blocks, discover(other).blocks
    for target in (target for block in others for target in block.targets):
        target.matrix.mul_(1.2)
    chain = record(model, blocks, IDS)
    apart = chain.apart()
    stream = stream_apart = chain.hidden
    for block, changed in zip(blocks, others, strict=True):
        stream_apart = apart.run(changed, stream_apart)
        stream = chain.run(block, stream)
        chain.check(block, stream)
    for found, want in zip(stream, last_outputs(model, blocks), strict=True):
        torch.testing.assert_close(found, want)
    assert (stream_apart[0] - stream[0]).norm() > 0.01 * stream[0].norm()
    for found, want in zip(stream_apart, last_outputs(other, others), strict=True):
        torch.testing.assert_close(found, want)


def test_a_refit_at_full_rank_changes_nothing(model):
    dense = copy.deepcopy(model)
    compress(model, 1.0, IDS, rank_multiple=1, lora_rank=0, cache=False, progress=False)
    with torch.no_grad():
        got, want = (m(input_ids=IDS, use_cache=False).logits for m in (model, dense))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_equal_arguments_are_held_once():
    model = zoo_model("llama")
    blocks = discover(model).blocks
    chain = record(model, blocks, tokens(2 * BATCH, 12))
    one, other = (calls[blocks[0].path] for calls in chain.calls)
    assert one.kwargs["position_embeddings"][0] is other.kwargs["position_embeddings"][0]
    assert not any(isinstance(arg, torch.Tensor) and arg.dim() == 3 for arg in one.args)


@torch.no_grad()
def test_a_stream_that_is_not_the_models_is_named():
    model = zoo_model("llama")
    blocks = discover(model).blocks
    chain = record(model, blocks, IDS)
    outputs = chain.run(blocks[0], chain.hidden)
    outputs[1] = 1.05 * outputs[1]
    with pytest.raises(ValueError, match=r"model\.layers\.0, run by itself on batch 1, is 0\.05 o"):
        chain.check(blocks[0], outputs)


# ------------------------------------------------------------------------------- what is no chain


class Wrapped(nn.Module):
    """A block that does more than its hidden states show."""

    def __init__(self, block, run):
        super().__init__()
        self.block, self.run = block, run

    def forward(self, hidden, *args, **kwargs):
        return self.run(self.block(hidden, *args, **kwargs))


def test_what_blocks_hand_on_beside_their_hidden_states_is_noticed():
    model, left = zoo_model("llama"), []

    layers = model.model.layers
    layers[0] = Wrapped(layers[0], lambda hidden: left.append(0.5 * hidden) or hidden)
    layers[1] = Wrapped(layers[1], lambda hidden: hidden + left[-1])
    with pytest.raises(ValueError, match=r"model\.layers\.1, run by itself .*sequence, .*refit=F"):
        record(model, discover(model).blocks, IDS)


def test_a_block_never_called_is_named():
    model = zoo_model("llama")
    blocks = discover(model).blocks
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"every block called, model\.layers\.1 wasn't"):
        record(model, blocks, IDS)


def test_a_block_called_twice_is_named():
    model = zoo_model("llama")
    blocks = discover(model).blocks
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match=r"called once, in order, model\.layers\.0 isn't"):
        record(model, blocks, IDS)


def test_a_chain_that_cannot_be_run_is_refused_before_the_calibration(monkeypatch):
    model, left = zoo_model("llama"), []
    layers = model.model.layers
    layers[0] = Wrapped(layers[0], lambda hidden: left.append(hidden) or hidden)
    layers[1] = Wrapped(layers[1], lambda hidden: hidden + left[-1])
    monkeypatch.setattr("hylora_kernels.compression.calibration.gather", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="refit needs blocks that can be run one by one"):
        compress(model, 0.7, IDS, rank_multiple=4, lora_rank=2, cache=False, progress=False)


def test_a_fingerprint_sees_every_row():
    hidden = torch.randn(2, 3, 5)
    assert fingerprint(hidden).shape == (6,)
    changed = hidden.clone()
    changed[1, 2] *= 1.5
    assert (fingerprint(hidden) != fingerprint(changed)).tolist() == [False] * 5 + [True]
