"""Statistics of embedding and head against a brute-force sum, and the matrices made from them."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.compressing import random_terms
from helpers.zoo import zoo_model

from hylora_kernels.compression import tokens
from hylora_kernels.compression.calibration import gather
from hylora_kernels.compression.tokens import (
    TOKEN_DAMPING,
    Term,
    TokenSums,
    row_solver,
    tied_matrix,
    token_statistics,
)
from hylora_kernels.model.structure import discover

IDS = tiny.tokens(3, 10)


def quadratic(terms, T, E, H):
    """The objective of tied_matrix, one token at a time."""
    total = 0.0
    for term, other in ((terms.embedding, E), (terms.head, H)):
        for v, row in enumerate((T - other).double()):
            total += float(term.weight[v] * (row @ term.metric @ row))
    return total


def test_statistics_are_the_sums_that_they_say():
    model = tiny.llama(torch.float64, seed=3)  # Gradients in float32 differ by processor.
    found = token_statistics(model, IDS, progress=False)
    words, d = model.lm_head.weight.shape
    n, c = torch.zeros(2, words, dtype=torch.float64)
    C, G = torch.zeros(2, d, d, dtype=torch.float64)
    for row in IDS.split(1):
        x = model.model.embed_tokens(row).detach().requires_grad_()
        hidden = model.model(inputs_embeds=x).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="sum")
        gx, gl = torch.autograd.grad(loss, (x, logits))
        C += gx[0].T @ gx[0]
        G += hidden[0].detach().T @ hidden[0].detach()
        c += gl[0].square().sum(0)
        n += torch.bincount(row[0], minlength=words)
    assert (found.tokens, found.predictions) == (30, 27)
    for got, wanted in (
        (found.embedding.weight, n),
        (found.embedding.metric, C),
        (found.head.weight, c),
        (found.head.metric, G),
    ):
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()  # Products are made in float32.


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_statistics_leave_the_model_as_it_was(name):
    """Also where the logits are capped, so that the model's own are used."""
    model = zoo_model(name)
    model.train()
    frozen = next(p for p in model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    found = token_statistics(model, IDS % model.config.vocab_size, progress=False)
    assert float(found.embedding.weight.sum()) == IDS.numel()
    assert float(found.head.weight.sum()) > 0 and float(found.head.metric.trace()) > 0
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert not frozen.requires_grad and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_one_pass_gives_both_kinds_of_statistics(name):
    model = zoo_model(name)
    groups, ids = discover(model).groups, tiny.tokens(5, 10) % model.config.vocab_size
    every, some = TokenSums(model), TokenSums(model, step=2)
    both = gather(model, ids, groups, True, progress=False, observers=[every, some])
    alone = gather(model, ids, groups, True, progress=False)
    for kind in ("inputs", "gradients"):
        found, wanted = getattr(both, kind), getattr(alone, kind)
        assert found and all(torch.equal(found[path], wanted[path]) for path in wanted)
    for sums, rows in ((every, ids), (some, ids[::2])):
        found, wanted = sums.finish(), token_statistics(model, rows, progress=False)
        assert (found.tokens, found.predictions) == (wanted.tokens, wanted.predictions)
        for place in ("embedding", "head"):
            a, b = getattr(found, place), getattr(wanted, place)
            assert torch.equal(a.weight, b.weight) and torch.equal(a.metric, b.metric)


def test_statistics_that_are_not_finite_are_an_error():
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="hidden states on the calibration text"):
        token_statistics(model, IDS, progress=False)


@pytest.mark.parametrize("count", [1, 2])
def test_row_solver_solves_every_row(count):
    terms = random_terms()
    used = [terms.embedding, terms.head][:count]
    wanted = [torch.randn(30, 6, dtype=torch.float64) for _ in used]
    X = row_solver([t.metric for t in used])([t.weight for t in used], wanted)
    for v in range(30):
        left = sum(t.weight[v] * t.metric for t in used)
        right = sum(t.weight[v] * B[v] for t, B in zip(used, wanted, strict=True))
        torch.testing.assert_close(X[v] @ left, right)


def test_no_matrix_beats_the_tied_one(monkeypatch):
    monkeypatch.setattr(tokens, "ROWS", 7)  # The rows come in several pieces.
    terms = random_terms()
    E, H = torch.randn(30, 6), torch.randn(30, 6)
    T = tied_matrix(E, H, terms)
    least = quadratic(terms, T, E, H)
    measured = terms.embedding.error(E, T) + terms.head.error(H, T)
    assert measured == pytest.approx(least, rel=1e-6)
    assert least < quadratic(terms, (E + H) / 2, E, H)
    for trial in range(20):
        step = 10.0 ** -(1 + trial % 3)
        assert quadratic(terms, T + step * torch.randn_like(T), E, H) > least


def test_equal_matrices_stay():
    terms = random_terms()
    E = torch.randn(30, 6)
    torch.testing.assert_close(tied_matrix(E, E, terms), E)
    assert terms.nats(4000.0) == 1.0  # 4000 / (2 * 50 * 40)


def test_damping_gives_every_token_and_direction_a_weight():
    term = Term(torch.tensor([0.0, 4.0]).double(), torch.diag(torch.tensor([1.0, 0.0])).double())
    damped = term.damped()
    assert damped.weight.tolist() == pytest.approx([2 * TOKEN_DAMPING, 4 + 2 * TOKEN_DAMPING])
    assert float(damped.metric[1, 1]) > 0
    dead = Term(torch.zeros(2).double(), torch.zeros(2, 2).double()).damped()
    assert dead.weight.tolist() == [1.0, 1.0]
    assert torch.equal(dead.metric, torch.eye(2).double())
