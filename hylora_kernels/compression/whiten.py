"""One matrix, whitened and factorized: plain SVD, SVD-LLM whitening, two-sided whitening.

With L_x L_x^T = G and L_g L_g^T = C, the best rank-k W_k in the norm |L_g^T (W - W_k) L_x| comes
from an SVD:

    M = L_g^T W L_x = Us S Vs^T        W_k = (L_g^-T Us_k) (Us_k^T L_g^T W)

so L_x is never inverted. If both sides are whitened, S^2 is the increase of the loss to second
order, up to one factor that all layers have in common.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hylora_kernels.compression.factors import Factors
from hylora_kernels.layers.factorize import to_float64, truncated_svd

INPUT_DAMPING, GRADIENT_DAMPING = 1e-3, 1e-2  # Shares of the mean diagonal.
DEAD = 1e-12  # Scales the singular values of a layer whose inputs or gradients are all zero.


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
    is not finite, ValueError for a G or C without a Cholesky factor even with its diagonal doubled.
    """
    W = to_float64(W)
    if not W.isfinite().all():
        raise FloatingPointError(f"layer {path}: its weight is not finite")
    damping = [0.0, 0.0]
    M = W
    if C is not None:
        L_g, damping[1] = damped_cholesky(path, C, GRADIENT_DAMPING)
        M = W = L_g.T @ W
    if G is not None:
        L_x, damping[0] = damped_cholesky(path, G, INPUT_DAMPING)
        M = W @ L_x
    U, S, _ = truncated_svd(M, None, factorizer, seed=seed)
    if (G is not None and damping[0] == 0) or (C is not None and damping[1] == 0):
        S = S * DEAD  # A dropped component costs no loss here: it must not outbid other layers.
    SVh = U.T @ W
    if C is not None:
        U = torch.linalg.solve_triangular(L_g.T, U, upper=True)
    return Factors(
        U.float().contiguous(), S.float().contiguous(), SVh.float().contiguous(), tuple(damping)
    )


def damped_cholesky(path: str, gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """gram [n, n] -> (L float64 with L L^T = gram + damping * mean diagonal * I, the damping used).

    The damping grows tenfold from the given one until the factorization succeeds. For a matrix of
    zeros L is the identity and the damping 0.
    """
    gram = to_float64(gram)
    mean = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not mean > 0:
        return eye, 0.0  # A dead layer: every direction has the same weight.
    while damping <= 1.0:
        L, info = torch.linalg.cholesky_ex(gram + damping * mean * eye)
        if int(info) == 0:
            return L, damping
        damping *= 10
    raise ValueError(
        f"layer {path}: its {len(gram)} x {len(gram)} Gram matrix is not positive definite, even"
        " with its diagonal doubled"
    )
