"""The factorizers against LAPACK in float64, and the pivot rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hylora_kernels.layers.factorize import (
    FACTORIZERS,
    STRIP,
    add_symmetric,
    fill_lower,
    pivot_rows,
    to_float64,
    truncated_svd,
)

general = pytest.mark.parametrize("factorizer", ["gram", "exact", "randomized"])
relaxed = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def with_spectrum(N, K, spectrum, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, len(spectrum)), (K, len(spectrum)))
    left, right = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return (torch.linalg.qr(left).Q * spectrum) @ torch.linalg.qr(right).Q.T


def symmetric(n, eigenvalues, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    W = (Q * eigenvalues) @ Q.T
    return 0.5 * (W + W.T)


def decaying(n, rate=0.7) -> Tensor:
    return rate ** torch.arange(n, dtype=torch.float64)


def error_and_optimum(W, rank, factorizer, **options) -> tuple[float, float]:
    U, S, Vh = truncated_svd(W, rank, factorizer, **options)
    optimum = torch.linalg.svdvals(W.double())[rank:].norm()
    return float((W.double() - (U * S) @ Vh).norm()), float(optimum)


# --------------------------------------------------------------------------------- singular values


@general
@pytest.mark.parametrize("N, K", [(30, 50), (50, 30), (40, 40), (1, 7), (7, 1), (1, 1)], ids=str)
def test_shapes_order_and_error(N, K, factorizer):
    full = min(N, K)
    W = with_spectrum(N, K, decaying(full))
    for rank in {None, 1, max(1, full // 3), full}:
        U, S, Vh = truncated_svd(W, rank, factorizer)
        k = full if rank is None else rank
        assert (U.shape, S.shape, Vh.shape) == ((N, k), (k,), (k, K))
        assert {U.dtype, S.dtype, Vh.dtype} == {torch.float64}
        assert (S >= 0).all() and (S.diff() <= 0).all()
        error, optimum = error_and_optimum(W, k, factorizer)
        assert error <= optimum * (1.05 if factorizer == "randomized" else 1 + 1e-6) + 1e-8
        torch.testing.assert_close(S, decaying(full)[:k], rtol=0.05, atol=1e-8)
        if factorizer == "exact" or k < 10:
            eye = torch.eye(k, dtype=torch.float64)
            torch.testing.assert_close(U.T @ U, eye)
            torch.testing.assert_close(Vh @ Vh.T, eye)


def test_exact_and_gram_agree_with_lapack_down_to_small_values():
    spectrum = 10.0 ** -torch.arange(0, 12, 0.5, dtype=torch.float64)
    W = with_spectrum(40, 25, spectrum)
    for factorizer, least in (("exact", 1e-15), ("gram", 1e-8)):
        for rank in range(1, 24):
            error, optimum = error_and_optimum(W, rank, factorizer)
            assert error <= optimum * 1.001 + least, (factorizer, rank)


def test_randomized_is_a_few_percent_off_on_a_flat_spectrum():
    W = torch.randn(120, 200, dtype=torch.float64)
    ratios = []
    for rank in (10, 40, 70):
        error, optimum = error_and_optimum(W, rank, "randomized")
        ratios.append(error / optimum)
    assert all(1 <= ratio < 1.06 for ratio in ratios) and max(ratios) > 1.001


@pytest.mark.parametrize("factorizer", ["randomized", "nystrom"])
def test_random_factorizers_depend_on_the_seed_alone(factorizer):
    W = symmetric(40, decaying(40, 0.95))
    torch.manual_seed(1)
    first = truncated_svd(W, 10, factorizer, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = truncated_svd(W, 10, factorizer, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], truncated_svd(W, 10, factorizer, seed=6)[1])


@general
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_factorized_in_float64(dtype, factorizer):
    W = with_spectrum(20, 30, decaying(20)).to(dtype).requires_grad_()
    error, optimum = error_and_optimum(W.detach(), 20, factorizer)
    assert error < 1e-7 and optimum == 0
    assert not any(t.requires_grad for t in truncated_svd(W, 5, factorizer))


@general
@relaxed
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.integers(0, 99), st.booleans()
)
def test_any_shape_and_rank(factorizer, N, K, inner, seed, integer):
    """Rank-deficient, zero and integer matrices included."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, inner, generator=generator).double() @ torch.randn(
        inner, K, generator=generator, dtype=torch.float64
    )
    W = W.round().clamp(-1, 1) if integer else W
    size = float(W.norm())
    for rank in range(1, min(N, K) + 1):
        U, S, Vh = truncated_svd(W, rank, factorizer)
        assert U.isfinite().all() and Vh.isfinite().all()
        assert (S >= 0).all() and (S.diff() <= 0).all()
        error, optimum = error_and_optimum(W, rank, factorizer)
        assert error <= optimum * 1.02 + 3e-8 * size


# -------------------------------------------------------------------------------------- nystrom


@pytest.mark.parametrize("rank", [1, 10, 55, 60])
def test_nystrom_on_a_decaying_spectrum(rank):
    W = symmetric(60, decaying(60))
    U, S, Vh = truncated_svd(W, rank, "nystrom")
    assert U.shape == (60, rank) and torch.equal(Vh, U.T)
    assert (S >= 0).all() and (S.diff() <= 0).all()
    error, optimum = error_and_optimum(W, rank, "nystrom")
    assert error <= 1.3 * optimum + 1e-9


def test_nystrom_is_exact_where_the_rank_suffices():
    eigenvalues = torch.cat([torch.arange(8, 0, -1).double(), torch.zeros(32).double()])
    W = symmetric(40, eigenvalues)
    for rank in (8, 20, 40):
        assert error_and_optimum(W, rank, "nystrom")[0] < 1e-9
    assert error_and_optimum(torch.zeros(5, 5), 2, "nystrom") == (0, 0)
    assert error_and_optimum(torch.tensor([[2.0]]), 1, "nystrom")[0] < 1e-9


def test_nystrom_accepts_rounding_errors_below_zero():
    x = torch.randn(50, 200)
    gram = x.T @ x
    assert torch.linalg.eigvalsh(gram.double())[0] < 0
    for rank in (20, 190, 200):
        error, optimum = error_and_optimum(gram, rank, "nystrom")
        assert error <= 1.3 * optimum + 1e-5 * float(gram.norm())


@pytest.mark.parametrize("rank", [1, 5, 50, 90, 100])
@pytest.mark.parametrize("negative", [-0.01, -5.0])
def test_nystrom_refuses_one_negative_eigenvalue(negative, rank):
    """Also where the sketch, of rank + 10 columns, would not see it."""
    eigenvalues = torch.ones(100, dtype=torch.float64)
    eigenvalues[3] = negative
    with pytest.raises(ValueError, match="needs a positive semi-definite matrix"):
        truncated_svd(symmetric(100, eigenvalues), rank, "nystrom")


def test_nystrom_refuses_an_asymmetric_matrix():
    W = symmetric(20, decaying(20))
    W[3, 7] += 1e-3
    for wrong in (W, torch.randn(3, 4)):
        with pytest.raises(ValueError, match="'nystrom' needs a symmetric matrix"):
            truncated_svd(wrong, 2, "nystrom")


# -------------------------------------------------------------------------------------- pivot rows


def check_pivots(U: Tensor, bound: float) -> None:
    pivots, coefficients = pivot_rows(U)
    N, rank = U.shape
    others = [n for n in range(N) if n not in set(pivots.tolist())]
    assert pivots.dtype == torch.int64 and coefficients.dtype == torch.float64
    assert pivots.shape == (rank,) and coefficients.shape == (N - rank, rank)
    assert (pivots.diff() > 0).all() and pivots[0] >= 0 and pivots[-1] < N
    wanted = U.double()[others]
    error = (coefficients @ U.double()[pivots] - wanted).abs()
    assert not error.numel() or error.max() <= 1e-10 * U.double().norm() + 1e-300
    assert not coefficients.numel() or coefficients.abs().max() < bound


@relaxed
@given(st.integers(1, 40), st.data())
def test_pivot_rows_give_all_rows(N, data):
    rank = data.draw(st.integers(1, N))
    inner = data.draw(st.integers(0, rank))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    U = torch.randn(N, rank, generator=generator, dtype=torch.float64)
    if data.draw(st.booleans()):  # of lower rank than it has columns
        U = U[:, :inner] @ torch.randn(inner, rank, generator=generator, dtype=torch.float64)
    check_pivots(U, bound=20)


def test_pivot_coefficients_stay_small():
    """Not so if pivots were taken in order: nearly dependent first rows would need huge ones."""
    U = torch.randn(200, 60, dtype=torch.float64)
    U[1:60] = U[0] + 1e-6 * U[1:60]
    check_pivots(U, bound=6)
    check_pivots(U.float(), bound=6)
    check_pivots(U * 10.0 ** -torch.arange(60, dtype=torch.float64).remainder(12), bound=6)


def test_pivot_rows_of_a_square_and_of_given_rows():
    pivots, coefficients = pivot_rows(torch.randn(5, 5))
    assert pivots.tolist() == [0, 1, 2, 3, 4] and coefficients.shape == (0, 5)
    U = torch.tensor([[1.0, 2.0], [10.0, 0.0], [5.0, 5.0], [0.0, 10.0]])
    pivots, coefficients = pivot_rows(U)
    assert pivots.tolist() == [1, 3]
    expected = torch.tensor([[0.1, 0.2], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(coefficients, expected)


def test_to_float64():
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(3).to(dtype)
        assert to_float64(x).dtype == torch.float64 and torch.equal(to_float64(x).to(dtype), x)


def test_list_of_factorizers():
    W = symmetric(6, decaying(6))
    for name in FACTORIZERS:
        assert error_and_optimum(W, 6, name)[0] < 1e-7


# ------------------------------------------------------------------------------ symmetric products


@pytest.mark.parametrize("n", [1, 7, STRIP, STRIP + 1, 2 * STRIP + 33])
def test_a_symmetric_product_in_strips(n):
    a, H = torch.randn(5, n, dtype=torch.float64), symmetric(5, decaying(5))
    want = a.T @ H @ a
    total = add_symmetric(None, H @ a, a)
    torch.testing.assert_close(total.triu(), want.triu())
    assert n <= STRIP or not total[-1, 0]
    assert add_symmetric(total, H @ a, a) is total
    assert fill_lower(total) is total
    torch.testing.assert_close(total, 2 * want)
