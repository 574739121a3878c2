"""LowRankEmbedding and the output head that shares its factors, alone and in a model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file

from hylora_kernels import (
    SVDLoRALinear,
    finetune,
    generate,
    load_pretrained,
    optimize_for_inference,
    restore_from_inference,
    save_pretrained,
)
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.model.adapters import merge_adapters, renew_adapters
from hylora_kernels.model.checkpoint import layer_shapes
from hylora_kernels.model.files import CheckpointError
from hylora_kernels.model.format import CONFIG
from hylora_kernels.model.loss import body_of

IDS = tiny.tokens(3, 10)
RANK = 12


def low_rank(tied=True, dtype=torch.float32, seed=0):
    """A tiny Llama whose embedding, and head if tied, are a pair of rank 12."""
    model = tiny.llama(dtype, seed=seed, tie_word_embeddings=tied)
    U, S, Vh = torch.linalg.svd(model.model.embed_tokens.weight.detach().float())
    pair = LowRankEmbedding.tied_pair(U[:, :RANK], S[:RANK, None] * Vh[:RANK], dtype=dtype)
    model.model.embed_tokens = pair[0]
    if tied:
        model.lm_head = pair[1]
    return model.eval()


def is_one(model):
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embedding.U is head.U and embedding.SVh is head.SVh


def test_rows_and_logits_are_those_of_the_product():
    embedding, head = LowRankEmbedding.tied_pair(torch.randn(40, 5), torch.randn(5, 8))
    E = embedding.weight.clone()
    assert E.shape == (40, 8) and torch.linalg.matrix_rank(E) == 5
    ids = torch.randint(40, (2, 7))
    torch.testing.assert_close(embedding(ids), E[ids])
    x = torch.randn(3, 8)
    torch.testing.assert_close(head(x), x @ E.T)
    assert embedding.parameter_count() == 5 * 48 == head.parameter_count()
    assert "rank=5" in repr(embedding) and not any(p.requires_grad for p in embedding.parameters())


@pytest.mark.parametrize("rank", [0, 9, 2.0])
def test_ranks_that_it_can_not_have(rank):
    with pytest.raises((ValueError, TypeError), match="rank must be"):
        LowRankEmbedding(40, 8, rank)


def test_a_new_one_has_rows_of_variance_one():
    torch.manual_seed(0)
    assert float(LowRankEmbedding(2000, 16, 8).weight.var()) == pytest.approx(1, rel=0.2)


def test_the_weight_is_not_written_to():
    embedding = LowRankEmbedding(40, 8, 4)
    with pytest.raises(RuntimeError, match="can't be written to"):
        embedding.weight.zero_()


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tied, tmp_path):
    model = low_rank(tied)
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith(".U") for name in stored) == 1
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded.model.embed_tokens, LowRankEmbedding)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    if tied:
        assert is_one(loaded)
        assert layer_shapes(tmp_path)[0] == [(32, tiny.WORDS, RANK, 0)]
        save_pretrained(loaded, tmp_path)  # As loaded it is what was saved.
        assert load_file(tmp_path / "model.safetensors").keys() == stored.keys()


def test_state_dict_copies_and_moves_keep_the_tie():
    model = low_rank()
    other = low_rank(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    for moved in (copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        assert is_one(moved)
        torch.testing.assert_close(moved(IDS).logits.float(), model(IDS).logits)


def test_the_size_counts_a_tied_pair_once():
    dense, small = (model_size(m) for m in (tiny.llama(tie_word_embeddings=True), low_rank()))
    gone = tiny.WORDS * 32 - RANK * (tiny.WORDS + 32)
    assert dense.parameters - small.parameters == gone
    assert small.model.dense == dense.parameters and small.model.as_is == small.parameters
    assert small.linears == dense.linears


def test_it_runs_where_a_dense_one_does():
    model = low_rank()
    assert body_of(model, IDS) is model.model  # The chunked loss is used.
    tokens = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 14)
    before = model(IDS).logits
    optimize_for_inference(model)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)
    restore_from_inference(model)
    assert is_one(model) and torch.equal(model(IDS).logits, before)


def test_finetune_trains_the_adapters_around_it():
    model = tiny.adapted(low_rank())
    embedding = model.model.embed_tokens
    before = embedding.U.clone()
    report = finetune(model, IDS, steps=2, progress=False)
    assert len(report.losses) == 2 and torch.equal(embedding.U, before) and is_one(model)
    renew_adapters(merge_adapters(model), lora_rank=2)
    assert is_one(model) and model.lm_head.A is None
    assert model.model.layers[0].mlp.up_proj.lora_rank == 2


def test_layers_that_share_a_basis_are_stored_and_counted_once(tmp_path):
    model = tiny.adapted(tiny.llama(), rank=8, lora_rank=0, form="pair", names=("up_proj",))
    layers = [model.model.layers[i].mlp.up_proj for i in range(2)]
    apart = model_size(model)
    layers[1].SVh = layers[0].SVh
    size = model_size(model)
    assert apart.parameters - size.parameters == 8 * 32
    assert apart.linears.as_is - size.linears.as_is == 8 * 32
    assert size.model.dense == apart.model.dense
    save_pretrained(model, tmp_path)
    assert sum(n.endswith("up_proj.SVh") for n in load_file(tmp_path / "model.safetensors")) == 1
    loaded = load_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.up_proj.SVh is loaded.model.layers[1].mlp.up_proj.SVh
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    renew_adapters(loaded, lora_rank=2)
    assert loaded.model.layers[0].mlp.up_proj.lora_rank == 0
    assert isinstance(loaded.model.layers[0].mlp.up_proj, SVDLoRALinear)


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ([], "tied must be an object of names"),
        ({"lm_head.U": 3}, "tied must be an object of names"),
        ({"lm_head.U": "nothing.U"}, r"tied\['lm_head.U'\]"),
        ({"lm_head.U": "lm_head.SVh"}, r"tied\['lm_head.U'\].*can't be \[12, 32\]"),
    ],
)
def test_a_config_that_ties_what_can_not_be(tied, message, tmp_path):
    save_pretrained(low_rank(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["quantization_config"]["tied"] = tied
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_generate_writes_text():
    tokenizer = tiny.tokenizer("some words to be learnt by a tokenizer of bytes")
    model = tiny.llama(vocab_size=len(tokenizer), tie_word_embeddings=True)
    U, S, Vh = torch.linalg.svd(model.lm_head.weight.detach())
    model.model.embed_tokens, model.lm_head = LowRankEmbedding.tied_pair(
        U[:, :8], S[:8, None] * Vh[:8]
    )
    assert isinstance(generate(model.eval(), tokenizer, "some", max_new_tokens=3), str)
