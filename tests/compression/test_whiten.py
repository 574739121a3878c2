"""Whitened factorization: the best there is in its norm, damping that adapts, dead layers."""

from __future__ import annotations

import pytest
import torch

from hylora_kernels.compression.ranks import allocate, curve
from hylora_kernels.compression.whiten import (
    GRADIENT_DAMPING,
    INPUT_DAMPING,
    damped_cholesky,
    factorize_whitened,
)
from hylora_kernels.layers.factorize import FACTORIZERS

SHAPES = [(24, 40), (40, 24), (32, 32)]
METHODS = ["svd", "whitened", "two_sided"]


def problem(N, K, method, samples=200, seed=0):
    """W, G, C: anisotropic Gram matrices; those that the method doesn't use are None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gram(size):
        rows = draw(samples, size) * torch.logspace(0, -1.5, size, dtype=torch.float64)
        rows = rows @ torch.linalg.qr(draw(size, size)).Q
        return (rows.T @ rows).float()

    G = gram(K) if method != "svd" else None
    C = gram(N) if method == "two_sided" else None
    return draw(N, K), G, C


def norm(G, C, N, K):
    """E -> |L_g^T E L_x|^2, the Frobenius norm that the method truncates in."""
    sides = []
    for matrix, size, damping in ((C, N, GRADIENT_DAMPING), (G, K, INPUT_DAMPING)):
        if matrix is None:
            sides.append(torch.eye(size, dtype=torch.float64))
        else:
            matrix = matrix.double()
            shift = damping * matrix.trace() / size * torch.eye(size)
            sides.append(torch.linalg.cholesky(matrix + shift))
    L_g, L_x = sides
    return lambda E: float((L_g.T @ E.double() @ L_x).square().sum()), L_g, L_x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_truncation_is_optimal_in_the_whitened_norm(N, K, method):
    W, G, C = problem(N, K, method)
    factors = factorize_whitened("path", W, G, C)
    size, L_g, L_x = norm(G, C, N, K)
    exact = torch.linalg.svdvals(L_g.T @ W @ L_x)
    torch.testing.assert_close(factors.S.double(), exact, rtol=1e-5, atol=1e-5 * float(exact[0]))
    for rank in (1, 5, 16, min(N, K) - 1):
        U, SVh = factors.U[:, :rank].double(), factors.SVh[:rank].double()
        error = size(W - U @ SVh)
        assert error == pytest.approx(float(exact[rank:].square().sum()), rel=1e-4)
        for trial in range(40):
            step = 10.0 ** -(trial % 4)
            other = U + step * U.std() * torch.randn_like(U)
            another = SVh + step * SVh.std() * torch.randn_like(SVh)
            assert size(W - other @ SVh) > error < size(W - U @ another)
            assert size(W - other @ another) > error


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_whitened_is_svd_llm(N, K):
    W, G, _ = problem(N, K, "whitened")
    _, _, L = norm(G, None, N, K)
    U, S, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    factors = factorize_whitened("path", W, G, None)
    for rank in (3, 20):
        expected = U[:, :rank] * S[:rank] @ Vh[:rank] @ torch.linalg.inv(L)
        got = factors.U[:, :rank].double() @ factors.SVh[:rank].double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factorizer", [f for f in FACTORIZERS if f != "nystrom"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("rank", [None, 5])
def test_all_components_give_the_matrix(N, K, method, factorizer, rank):
    W, G, C = problem(N, K, method)
    if rank:  # The other components are rounding errors, and must add nothing.
        W = W[:, :rank] @ W[:rank]
    factors = factorize_whitened("path", W, G, C, factorizer)
    assert factors.U.dtype == factors.S.dtype == factors.SVh.dtype == torch.float32
    assert factors.U.shape == (N, min(N, K)) and factors.SVh.shape == (min(N, K), K)
    assert (factors.S.diff() <= 0).all()
    for kept in (rank or min(N, K), min(N, K)):
        got = factors.U[:, :kept].double() @ factors.SVh[:kept].double()
        assert (got - W).norm() < 2e-6 * W.norm()


def test_a_weight_that_is_not_finite_is_named():
    W, G, C = problem(8, 6, "two_sided")
    W[2, 3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layer a\.b: its weight"):
        factorize_whitened("a.b", W, G, C)


# ------------------------------------------------------------------------------------------ damping


def with_lowest_eigenvalue(lowest, size=20):
    """A symmetric matrix of mean diagonal 1 with one eigenvalue of that size."""
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.linspace(1, 2, size, dtype=torch.float64)
    values[0] = 0
    values *= (size - lowest) / values.sum()
    values[0] = lowest
    return Q * values @ Q.T


@pytest.mark.parametrize(
    ("lowest", "taken"), [(0.5, 1e-3), (-5e-4, 1e-3), (-5e-3, 1e-2), (-0.05, 0.1), (-0.5, 1.0)]
)
def test_damping_grows_until_there_is_a_cholesky_factor(lowest, taken):
    gram = with_lowest_eigenvalue(lowest)
    L, damping = damped_cholesky("path", gram, 1e-3)
    assert damping == pytest.approx(taken)
    torch.testing.assert_close(L @ L.T, gram + taken * torch.eye(20).double())
    assert torch.equal(L, L.tril())


def test_no_damping_is_enough_for_a_matrix_that_is_no_gram_matrix():
    with pytest.raises(ValueError, match=r"layer a\.b: its 20 x 20 Gram matrix"):
        damped_cholesky("a.b", with_lowest_eigenvalue(-3.0), 1e-3)


def test_the_damping_taken_is_reported():
    W, G, C = problem(20, 20, "two_sided")
    assert factorize_whitened("path", W, None, None).damping == (0.0, 0.0)
    assert factorize_whitened("path", W, G, None).damping == (INPUT_DAMPING, 0.0)
    assert factorize_whitened("path", W, G, C).damping == (INPUT_DAMPING, GRADIENT_DAMPING)
    bad = with_lowest_eigenvalue(-0.05)
    damping = factorize_whitened("path", W, bad, with_lowest_eigenvalue(-0.5)).damping
    assert damping == pytest.approx((0.1, 1.0))


@pytest.mark.parametrize("samples", [1, 5])
def test_fewer_samples_than_features(samples):
    W, G, C = problem(24, 40, "two_sided", samples)
    factors = factorize_whitened("path", W, G, C)
    assert factors.damping == (INPUT_DAMPING, GRADIENT_DAMPING)
    assert (factors.U.double() @ factors.SVh.double() - W).norm() < 2e-6 * W.norm()


# -------------------------------------------------------------------------------------- dead layers


@pytest.mark.parametrize("dead", ["inputs", "gradients", "both"])
def test_a_dead_layer_is_factorized_and_outbid_by_any_other(dead):
    W, G, C = problem(40, 40, "two_sided")
    alive = factorize_whitened("alive", 1e-2 * W, G, C)
    G = torch.zeros_like(G) if dead != "gradients" else G
    C = torch.zeros_like(C) if dead != "inputs" else C
    factors = factorize_whitened("dead", W, G, C)
    assert 0.0 in factors.damping
    assert (factors.U.double() @ factors.SVh.double() - W).norm() < 2e-6 * W.norm()
    curves = [curve(n, (40, 40), f.S, multiple=8) for n, f in (("dead", factors), ("alive", alive))]
    assert allocate(curves, 0.7)["dead"] == 8


def test_a_weight_of_zeros():
    _, G, C = problem(24, 40, "two_sided")
    factors = factorize_whitened("path", torch.zeros(24, 40), G, C)
    assert not factors.S.any() and not (factors.U @ factors.SVh).any()
