"""One matrix, whitened and factorized: plain SVD, SVD-LLM whitening, two-sided whitening.

With L_x L_x^T = G and L_g L_g^T = C, the best rank-k W_k in the norm |L_g^T (W - W_k) L_x| comes
from the SVD of M = L_g^T W L_x = Us S Vs^T:   W_k = (L_g^-T Us_k) (Us_k^T L_g^T W),   so L_x is
never inverted. S^2 is the increase of the loss to second order, up to one factor common to all
layers, when both sides are whitened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hylora_kernels.layers.factorize import truncated_svd, wide

INPUT_DAMPING, GRADIENT_DAMPING = 1e-3, 1e-2  # of the mean diagonal
DEAD = 1e-12  # scales the singular values of a layer that nothing came through


@dataclass
class Factors:
    """W = U @ SVh, components by falling S. U float32 [N, k], S float32 [k] (in the whitened norm),
    SVh float32 [k, K].

    damping: the shares of the mean diagonal that had to be added to G and C (0 where there was none
             to add to).
    """

    U: Tensor
    S: Tensor
    SVh: Tensor
    damping: tuple[float, float]


def factorize_whitened(
    path: str,
    W: Tensor,
    G: Tensor | None,
    C: Tensor | None,
    factorizer: str = "gram",
    seed: int = 0,
) -> Factors:
    """W [N, K], G [K, K] or None, C [N, N] or None -> its full-rank Factors. All work in float64.

    Raises FloatingPointError naming `path` for a non-finite W, ValueError where G or C has no
    Cholesky factor even with its diagonal doubled.
    """
    W = wide(W)
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
        S = S * DEAD  # what is dropped here costs no loss: it must not outbid other layers
    SVh = U.T @ W
    if C is not None:
        U = torch.linalg.solve_triangular(L_g.T, U, upper=True)
    return Factors(
        U.float().contiguous(), S.float().contiguous(), SVh.float().contiguous(), tuple(damping)
    )


def damped_cholesky(path: str, gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """gram [n, n] -> (L float64 with L L^T = gram + damping * mean diagonal * I, the damping it
    took, tenfold each try)."""
    gram = wide(gram)
    mean = gram.diagonal().mean()
    if not mean > 0:
        # Nothing ever came through here (a dead layer): every direction weighs the same.
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device), 0.0
    while damping <= 1.0:
        L, info = torch.linalg.cholesky_ex(gram + damping * mean * torch.eye(len(gram)).to(gram))
        if int(info) == 0:
            return L, damping
        damping *= 10
    raise ValueError(
        f"layer {path}: its {len(gram)} x {len(gram)} Gram matrix is not positive definite, even"
        " with its diagonal doubled"
    )
