"""Shared bases: the error that they claim, the best U for each matrix, and when they pay."""

from __future__ import annotations

import pytest
import torch

from hylora_kernels.compression.ranks import curve
from hylora_kernels.compression.share import paying_ranks, shared_basis, shared_cost
from hylora_kernels.compression.whiten import (
    GRADIENT_DAMPING,
    INPUT_DAMPING,
    damped_cholesky,
    factorize_whitened,
)

SIZES = [(24, 40), (40, 24)]


def problem(N, K, seed=0):
    """W, G, C of one matrix, whose inputs and gradients have directions of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gram(size):
        rows = draw(4 * size, size) * torch.logspace(0, -1.5, size, dtype=torch.float64)
        rows = rows @ torch.linalg.qr(draw(size, size)).Q
        return rows.T @ rows

    return draw(N, K), gram(K), gram(N)


def error(W, other, G, C):
    L_g, _ = damped_cholesky("W", C, GRADIENT_DAMPING)
    L_x, _ = damped_cholesky("W", G, INPUT_DAMPING)
    return float((L_g.T @ (W - other) @ L_x).square().sum())


def curves(problems, multiple=1):
    found = []
    for index, (W, G, C) in enumerate(problems):
        S = factorize_whitened("W", W, G, C).S
        found.append(curve(str(index), tuple(W.shape), S, multiple=multiple))
    return found


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_the_errors_are_those_of_the_factors(N, K, count):
    problems = [problem(N, K, seed) for seed in range(count)]
    weights, inputs, gradients = zip(*problems, strict=True)
    basis = shared_basis(weights, inputs, gradients)
    assert basis.SVh.shape == (min(count * N, K), K)
    for rank in (1, 7, min(N, K) - 1):
        SVh, us = basis.factors(rank)
        assert SVh.shape == (rank, K) and all(U.shape == (N, rank) for U in us)
        total = sum(error(W, U @ SVh, G, C) for (W, G, C), U in zip(problems, us, strict=True))
        assert total == pytest.approx(float(basis.errors[rank]), rel=1e-6)
        for trial in range(10):
            other = us[0] + 10.0 ** -(trial % 4) * us[0].std() * torch.randn_like(us[0])
            assert error(weights[0], other @ SVh, *problems[0][1:]) > error(
                weights[0], us[0] @ SVh, *problems[0][1:]
            )
    assert (basis.errors.diff() <= 1e-9 * basis.errors[0]).all()
    assert float(basis.errors[-1]) < 1e-9 * float(basis.errors[0])


def test_with_the_same_inputs_it_is_the_svd_of_the_stack():
    """Then nothing is lost by adding the Gram matrices: no basis is better."""
    (W1, G, C1), (W2, _, C2) = problem(24, 40, 0), problem(24, 40, 1)
    basis = shared_basis([W1, W2], [G, G], [C1, C2])
    L_1, L_2 = (damped_cholesky("W", C, GRADIENT_DAMPING)[0] for C in (C1, C2))
    L_x = damped_cholesky("W", G, INPUT_DAMPING)[0]
    S = torch.linalg.svdvals(torch.cat([L_1.T @ W1, L_2.T @ W2]) @ L_x)
    for rank in (0, 5, 20):
        tail = float(S[rank:].square().sum())
        assert float(basis.errors[rank]) == pytest.approx(tail, rel=1e-6)


def test_it_pays_for_equal_matrices_and_not_for_strangers():
    twin = problem(24, 40)
    basis = shared_basis(*zip(twin, twin, strict=True))
    paying = paying_ranks(basis, [twin[0]] * 2, curves([twin, twin]), multiple=1)
    assert paying.size and set(paying) <= set(range(1, 24))
    strangers = [problem(24, 40, 0), problem(24, 40, 1)]
    strangers[0][0][:, 20:] = 0  # They read different inputs: a row of the basis serves one.
    strangers[1][0][:, :20] = 0
    strangers = [(W, torch.eye(40).double(), C) for W, _, C in strangers]
    basis = shared_basis(*zip(*strangers, strict=True))
    weights = [W for W, _, _ in strangers]
    assert not paying_ranks(basis, weights, curves(strangers), multiple=1).size


def test_a_basis_counts_once():
    weights = [torch.zeros(24, 40)] * 3
    assert shared_cost(5, weights) == 5 * 40 + 3 * 24 * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda W, G, C: (W[:1], G[:1], C[:1]), "weights must be at least 2 matrices, got 1"),
        (lambda W, G, C: (W, G[:1], C), "inputs must be 2 matrices, got 1"),
        (
            lambda W, G, C: (W, G, [C[0], G[0]]),
            r"gradients\[1\] must be \[24, 24\], got \[40, 40\]",
        ),
    ],
)
def test_matrices_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        shared_basis(*change(*zip(problem(24, 40), problem(24, 40, 1), strict=True)))


@pytest.mark.parametrize("rank", [0, 41, True, 2.0])
def test_ranks_that_a_basis_has_not(rank):
    basis = shared_basis(*zip(problem(24, 40), problem(24, 40, 1), strict=True))
    with pytest.raises(ValueError, match=r"rank must be an int in 1\.\.40, got"):
        basis.factors(rank)
