"""The embedding as a low-rank pair: its error in both places, its candidates, compress()."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from helpers import tiny
from helpers.compressing import SMALL, assert_same, compressed, logits, random_terms
from torch import nn

from hylora_kernels import SVDLoRALinear, load_pretrained, save_pretrained
from hylora_kernels.compression.compress import Compression
from hylora_kernels.compression.embedding import (
    embedding_curve,
    embedding_target,
    factorize_embedding,
    factorize_rows,
    replace_embedding,
)
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.tokens import token_statistics
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.model.structure import linears

candidates = sys.modules["hylora_kernels.compression.rank_candidates"]

IDS = tiny.tokens(3, 12)


def tied(**changes):
    return tiny.llama(tie_word_embeddings=True, **changes)


def error(terms, E, other):
    return sum(t.error(E, other) for t in terms)


@pytest.mark.parametrize("count", [1, 2])
def test_the_error_is_that_of_the_factors(count):
    statistics = random_terms().damped()
    terms = [statistics.embedding, statistics.head][:count]
    E = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    factors = factorize_rows(E, terms)
    torch.testing.assert_close(factors.U @ factors.SVh, E)
    for rank in (1, 3, 5):
        other = factors.U[:, :rank] @ factors.SVh[:rank]
        tail = float((factors.S[rank:].double() ** 2).sum())
        assert tail == pytest.approx(error(terms, E, other), rel=1e-3)
        plain = torch.linalg.svd(E)
        cut = plain.U[:, :rank] * plain.S[:rank] @ plain.Vh[:rank]
        assert error(terms, E, other) < error(terms, E, cut)


def test_with_one_term_no_matrix_of_the_rank_is_better():
    term = random_terms().damped().embedding
    E = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    L = torch.linalg.cholesky(term.metric)
    exact = torch.linalg.svdvals(term.weight.sqrt()[:, None] * E.double() @ L)
    torch.testing.assert_close(factorize_rows(E, [term]).S.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["two_sided", "whitened", "svd"])
def test_methods(method):
    model = tied()
    target = embedding_target(model)
    statistics = None if method == "svd" else token_statistics(model, IDS, progress=False)
    factors = factorize_embedding(model, target, statistics, method)
    torch.testing.assert_close(factors.U @ factors.SVh, target.matrix, rtol=1e-3, atol=1e-4)
    if method == "svd":
        S = torch.linalg.svdvals(target.matrix) * 2**0.5  # Both places count.
        torch.testing.assert_close(factors.S, S, rtol=1e-3, atol=1e-3)


def test_candidates():
    target, S = embedding_target(tied()), torch.arange(32, 0, -1).float()
    every = embedding_curve(target, S, "auto", 8)
    assert every.ranks.tolist() == [8, 16, 0] and every.costs.tolist() == [1024, 2048, 96 * 32]
    one = embedding_curve(target, S, 5, 8)
    assert one.ranks.tolist() == [5] and one.costs.tolist() == [5 * 128]
    assert float(one.errors[0]) == float((S[5:] ** 2).sum())
    for rank in (24, 0):  # 24 (96 + 32) = 96 x 32
        with pytest.raises(ValueError, match=r"embedding_rank must be in 1\.\.23, where a pair is"):
            embedding_curve(target, S, rank, 8)


def places(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("rank", [12, "auto"])
def test_compress_counts_the_embedding_in_its_budget(is_tied, rank, tmp_path):
    model = tiny.llama(tie_word_embeddings=is_tied, vocab_size=300)
    dense = sum(p.numel() for p in model.parameters())
    model, report = compressed(model, 0.5, IDS, embedding_rank=rank)
    embedding, head = places(model)
    assert isinstance(embedding, LowRankEmbedding)
    assert rank == "auto" or embedding.rank == rank
    assert (head.U is embedding.U) if is_tied else isinstance(head, nn.Linear)
    (line,) = [layer for layer in report.layers if layer.path == "model.embed_tokens"]
    assert line.rank == embedding.rank and line.parameters == embedding.parameter_count()
    assert 0 < line.lost_energy < 1
    assert report.dense_parameters == 300 * 32 + sum(t.numel() for t in dense_linears())
    assert "embed_tokens" in str(report)
    report.plot(tmp_path / "report.png")
    assert report.keep <= 0.5 and report.model_dense_parameters == dense
    assert report.model_parameters_as_is == sum(p.numel() for p in model.parameters())
    assert "model.embed_tokens" not in report.skipped
    size = model_size(model)
    assert size.model.dense == dense and size.parameters == report.model_parameters_as_is
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    loaded.tie_weights()  # As other libraries do after loading.
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def dense_linears():
    model = tiny.llama(vocab_size=300)
    return [module.weight for module in linears(model).values()]


def test_auto_leaves_an_embedding_dense_that_is_worth_its_parameters():
    """An embedding whose components all count the same, beside linears of a low rank."""
    model = tied()
    with torch.no_grad():
        model.lm_head.weight.copy_(10 * torch.linalg.qr(torch.randn(96, 32)).Q)
        for module in linears(model).values():
            N, K = module.weight.shape
            module.weight.copy_(torch.randn(N, 4) @ torch.randn(4, K) / 16)
    model, report = compressed(model, 0.9, IDS, embedding_rank="auto", method="svd")
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.layers[-1].rank == 0 and report.layers[-1].parameters == 96 * 32


def test_a_target_counts_the_embedding():
    model = tied(vocab_size=300)
    dense = sum(p.numel() for p in model.parameters())
    target = 0.35 * dense  # The embedding alone is 38 % of the model.
    with pytest.raises(ValueError, match="can't be met"):
        compressed(copy.deepcopy(model), None, IDS, target_params=target)
    model, report = compressed(model, None, IDS, target_params=target, embedding_rank="auto")
    assert report.model_parameters <= target


def test_the_factors_are_found_again(tmp_path, monkeypatch):
    first = compressed(tied(), 0.7, IDS, embedding_rank=12, cache=tmp_path)[0]
    monkeypatch.setattr(candidates, "factorize_embedding", None)
    second = compressed(tied(), 0.7, IDS, embedding_rank=12, cache=tmp_path)[0]
    assert_same(first, second)


def test_a_trial_is_taken_out_again():
    model = tied()
    before, (embedding, head) = logits(model, IDS), places(model)
    options = CompressOptions(0.7, IDS, **SMALL | {"cache": False, "embedding_rank": 12})
    with Compression(model, options) as run:
        for statistics in run.calibrate():
            run.factorize(statistics)
        with run.trial(run.allocate(), {}) as small:
            assert isinstance(small.lm_head, SVDLoRALinear)
    assert places(model) == (embedding, head) and torch.equal(logits(model, IDS), before)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def scaled(model):
    model.model.embed_tokens = Scaled(96, 32)


def held_by_another(model):
    model.model.layers[0].other = nn.Linear(32, 96)
    model.model.layers[0].other.weight = model.lm_head.weight


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scaled, "but a Scaled changes the rows it gives"),
        (held_by_another, "tied to the output head alone, but .*other.* hold it"),
        (lambda model: compressed(model, 0.5, IDS, embedding_rank=12), "got a LowRankEmbedding"),
    ],
)
def test_embeddings_that_are_refused(spoil, message):
    model = tied()
    spoil(model)
    with pytest.raises(ValueError, match=f"embedding_rank needs an nn.Embedding .*{message}"):
        embedding_target(model)


@pytest.mark.parametrize("rank", [0, True, 2.5, "all"])
def test_ranks_that_are_none(rank):
    with pytest.raises(ValueError, match="embedding_rank must be an int of at least 1, 'auto' or"):
        CompressOptions(embedding_rank=rank)


def test_the_error_has_the_unit_of_the_linears():
    """Nats a token: the divergence from the dense model, where the last components are dropped."""
    model = tied(seed=4)
    torch.manual_seed(0)
    start = torch.arange(96)[:, None]
    mask = torch.ones_like(start)
    with torch.no_grad():
        ids = model.generate(start, attention_mask=mask, do_sample=True, max_new_tokens=31, top_k=0)
        dense = model(ids).logits[:, :-1].log_softmax(-1)
        target = embedding_target(model)
        statistics = token_statistics(model, ids, progress=False)
        factors = factorize_embedding(model, target, statistics, "two_sided")
        report = replace_embedding(model, target, factors, 30, "two_sided")
        small = model(ids).logits[:, :-1].log_softmax(-1)
    divergence = float((dense.exp() * (dense - small)).sum(-1).mean())
    assert 0.4 < divergence / report.predicted_loss < 2.5
