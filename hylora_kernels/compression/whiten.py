"""One matrix, whitened and factorized: plain SVD, SVD-LLM whitening, two-sided whitening.

With L_x L_x^T = G and L_g L_g^T = C, the best rank-k W_k in the norm |L_g^T (W - W_k) L_x| comes
from an SVD, M = L_g^T W L_x = Us S Vs^T, and from one side of it alone:

    W_k = (L_g^-T Us_k) (Us_k^T L_g^T W)        Us: eigenvectors of M M^T = L_g^T W G W^T L_g
        = (W L_x Vs_k) (Vs_k^T L_x^-1)          Vs: eigenvectors of M^T M = L_x^T W^T C W L_x

A weight with more inputs than outputs takes the first form, another the second, which is the first
for W^T. So the larger of G and C, the expensive one, has no Cholesky factor and no inverse.
If both sides are whitened, S^2 is proportional to the increase of the loss to second order
(calibration.Statistics.nats).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hylora_kernels.compression.factors import Factors
from hylora_kernels.layers.factorize import add_symmetric, to_float64, truncated_svd

# Shares of the mean diagonal. SmolLM2-135M at keep 0.6, calibrated on a mix of texts: perplexity is
# 2.339 times the dense model's, and 2.342 with a tenth of them; calibrated on one narrow text, that
# of all others is 6 to 9 % lower than with a tenth. 1e-1 and 3e-1 lose: 2.487.
INPUT_DAMPING, GRADIENT_DAMPING = 1e-2, 1e-1
DEAD = 1e-12  # Scales the singular values of a layer whose inputs or gradients are all zero.
NOISE = 1e-8  # Singular values below this share of the largest are rounding errors,
ROUNDING = 1e-10  # and so are eigenvalues above minus this share.


def factorize_whitened(
    path: str,
    W: Tensor,
    G: Tensor | None,
    C: Tensor | None,
    factorizer: str = "gram",
    seed: int = 0,
) -> Factors:
    """W [N, K], G [K, K] or None, C [N, N] or None -> its Factors of full rank, by way of float64.

    Without G or C that side is not whitened. Raises FloatingPointError naming `path` for a W that
    is not finite, ValueError for a G or C that needs a Cholesky factor and has none even with its
    diagonal doubled.
    """
    W = to_float64(W)
    if not W.isfinite().all():
        raise FloatingPointError(f"layer {path}: its weight is not finite")
    of_inputs, of_gradients = (G, INPUT_DAMPING), (C, GRADIENT_DAMPING)
    if W.shape[0] <= W.shape[1]:
        near, S, far, used = _factorize(path, W, of_gradients, of_inputs, factorizer, seed)
        U, SVh, damping = near, far, (used[1], used[0])
    else:
        near, S, far, damping = _factorize(path, W.T, of_inputs, of_gradients, factorizer, seed)
        scale = S.clamp_min(1e-30)  # S is 0 of a matrix of zeros alone.
        U, SVh = far.T / scale, (near * scale).T
    if (G is not None and damping[0] == 0) or (C is not None and damping[1] == 0):
        S = S * DEAD  # A dropped component costs no loss here: it must not outbid other layers.
    U, S, SVh = (t.float().contiguous() for t in (U, S, SVh))
    return Factors(U, S, SVh, damping)


def _factorize(
    path: str,
    W: Tensor,
    outer: tuple[Tensor | None, float],
    inner: tuple[Tensor | None, float],
    factorizer: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, tuple[float, float]]:
    """W [n, m], n <= m, and (Gram matrix, damping) of its outputs [n, n] and inputs [m, m] ->
    L^-T Q [n, n], S [n], Q^T L^T W [n, m], the dampings used, where L L^T = outer and Q, S are left
    singular vectors and values in the norm of both."""
    L, outer_damping = damped_cholesky(path, *outer)
    A = W if L is None else L.T @ W
    if factorizer == "gram":
        Q, S, inner_damping = _left_vectors(path, A, *inner)
    else:
        L_inner, inner_damping = damped_cholesky(path, *inner)
        M = A if L_inner is None else A @ L_inner
        Q, S, _ = truncated_svd(M, None, factorizer, seed=seed)
    near = Q if L is None else torch.linalg.solve_triangular(L.T, Q, upper=True)
    return near, S.clamp_min(NOISE * S[0]), Q.T @ A, (outer_damping, inner_damping)


def damped_cholesky(path: str, gram: Tensor | None, damping: float) -> tuple[Tensor | None, float]:
    """gram [n, n] -> (L float64 with L L^T = gram + damping * mean diagonal * I, the damping used).

    The damping grows tenfold from the given one until the factorization succeeds. For a matrix of
    zeros, or none, L is None (the identity) and the damping 0.
    """
    if gram is None or is_dead(gram):
        return None, 0.0
    while damping <= 1.0:
        L, info = torch.linalg.cholesky_ex(damped(gram, damping))
        if int(info) == 0:
            return L, damping
        damping *= 10
    raise _not_definite(path, gram)


def _left_vectors(
    path: str, A: Tensor, gram: Tensor | None, damping: float
) -> tuple[Tensor, Tensor, float]:
    """A [n, m], gram [m, m] -> eigenvectors Q [n, n] of A gram A^T, roots of its eigenvalues [n],
    falling, and the damping used, which grows as in damped_cholesky."""
    if gram is None or is_dead(gram):
        squares, Q = torch.linalg.eigh(add_symmetric(None, A.T, A.T), UPLO="U")
        return Q.flip(1), squares.flip(0).clamp_min(0).sqrt(), 0.0
    while damping <= 1.0:
        weighted = A @ damped(gram, damping)
        squares, Q = torch.linalg.eigh(add_symmetric(None, weighted.T, A.T), UPLO="U")
        if squares[0] >= -ROUNDING * squares[-1]:
            return Q.flip(1), squares.flip(0).clamp_min(0).sqrt(), damping
        damping *= 10
    raise _not_definite(path, gram)


def is_dead(gram: Tensor) -> bool:
    """True for a matrix of zeros: every direction has the same weight then."""
    return not gram.diagonal().mean() > 0


def damped(gram: Tensor, damping: float) -> Tensor:
    damped = to_float64(gram)
    damped = damped.clone() if damped is gram else damped
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return damped


def _not_definite(path: str, gram: Tensor) -> ValueError:
    return ValueError(
        f"layer {path}: its {len(gram)} x {len(gram)} Gram matrix is not positive definite, even"
        " with its diagonal doubled"
    )
