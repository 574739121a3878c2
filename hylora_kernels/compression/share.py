"""One basis for several matrices, as the same projection of neighbouring blocks:

    W_i ~ U_i SVh      SVh [r, K] common, U_i [N_i, r] each one's own      r (K + sum N_i) numbers

The source is Basis Sharing (arXiv:2410.03765): the matrices are stacked and whitened by the sum of
their inputs' Gram matrices. Here the stack is whitened by the output gradients as well, so that the
error has the unit of a matrix's own singular values (compression/whiten.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hylora_kernels.compression.ranks import Curve, spend
from hylora_kernels.compression.whiten import (
    GRADIENT_DAMPING,
    INPUT_DAMPING,
    damped_cholesky,
)
from hylora_kernels.layers.factorize import to_float64


@dataclass
class SharedBasis:
    """The common rows of several matrices W_i, all components, from which every rank is cut.

    SVh:    [k, K] float64, k = min(sum N_i, K), by falling weight in the stack.
    errors: [k + 1] float64: entry r is sum_i |L_gi^T (W_i - U_i SVh[:r]) L_xi|^2 with the best U_i.
    """

    SVh: Tensor
    errors: Tensor
    _solved: list[tuple[Tensor, Tensor]]  # (W_i L_xi Q_i, R_i), where L_xi^T SVh^T = Q_i R_i

    def factors(self, rank: int) -> tuple[Tensor, list[Tensor]]:
        """(SVh [rank, K], U_i [N_i, rank] of each matrix): W_i ~ U_i SVh, the best in the norm of
        its own inputs."""
        _check_rank(rank, len(self.SVh))
        us = []
        for product, R in self._solved:
            wanted = product[:, :rank].T  # (W - U SVh) L_x is least where U R^T = W L_x Q.
            us.append(torch.linalg.solve_triangular(R[:rank, :rank], wanted, upper=True).T)
        return self.SVh[:rank], us


def shared_basis(
    weights: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> SharedBasis:
    """weights W_i [N_i, K], inputs G_i [K, K], gradients C_i [N_i, N_i] -> their SharedBasis.

    The rows of SVh are the leading ones of the stack of all L_gi^T W_i in the norm of sum G_i. They
    come from a matrix [K, K], so the stack is never formed. Each U_i is the least-squares solution
    under its own G_i, which its C_i has no part in.

    Raises ValueError for fewer than two matrices, or ones that don't fit together.
    """
    _check(weights, inputs, gradients)
    K = weights[0].shape[1]
    total = sum(to_float64(G) for G in inputs)
    L = _cholesky("the sum of the inputs", total, INPUT_DAMPING)
    whitened, moment = [], torch.zeros_like(L)
    for index, (W, C) in enumerate(zip(weights, gradients, strict=True)):
        L_g = _cholesky(f"matrix {index}", C, GRADIENT_DAMPING)
        whitened.append(L_g.T @ to_float64(W))
        moment += whitened[-1].T @ whitened[-1]
    _, vectors = torch.linalg.eigh(L.T @ moment @ L)
    k = min(sum(len(W) for W in weights), K)
    SVh = torch.linalg.solve_triangular(L.T, vectors.flip(1)[:, :k], upper=True).T
    errors = torch.zeros(k + 1, dtype=torch.float64, device=L.device)
    solved = []
    for index, (W, G) in enumerate(zip(weights, inputs, strict=True)):
        L_x = _cholesky(f"matrix {index}", G, INPUT_DAMPING)
        Q, R = torch.linalg.qr(L_x.T @ SVh.T)
        kept = (whitened[index] @ L_x @ Q).square().sum(0)
        whole = (whitened[index] @ L_x).square().sum()
        errors += (whole - torch.cat([kept.new_zeros(1), kept.cumsum(0)])).clamp_min(0)
        solved.append((to_float64(W) @ L_x @ Q, R))
    return SharedBasis(SVh, errors, solved)


def shared_cost(rank: int, weights: Sequence[Tensor]) -> int:
    """The parameters of a basis of `rank` rows and of each matrix's own U, the basis once."""
    return rank * (weights[0].shape[1] + sum(len(W) for W in weights))


def paying_ranks(
    basis: SharedBasis, weights: Sequence[Tensor], separate: list[Curve], multiple: int = 16
) -> np.ndarray:
    """The ranks, multiples of `multiple`, at which the shared basis has a lower error than the best
    separate factors of as many parameters. `separate`: the curves of the same matrices."""
    paying = []
    dense = sum(c.dense_cost for c in separate)
    for rank in range(multiple, len(basis.SVh), multiple):
        cost = shared_cost(rank, weights)
        if cost >= dense:
            break
        if cost < sum(int(c.costs[0]) for c in separate):  # Nothing separate is as small.
            continue
        chosen = spend(separate, cost)
        apart = sum(float(c.errors[i]) for c, i in zip(separate, chosen, strict=True))
        if float(basis.errors[rank]) < apart * (1 - 1e-6):  # S is float32 there.
            paying.append(rank)
    return np.array(paying, dtype=int)


def _cholesky(path: str, gram: Tensor, damping: float) -> Tensor:
    """The damped Cholesky factor, float64; of a matrix of zeros the identity."""
    L, _ = damped_cholesky(path, gram, damping)
    return torch.eye(len(gram), dtype=torch.float64, device=gram.device) if L is None else L


def _check_rank(rank: int, most: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(f"rank must be an int in 1..{most}, got {rank!r}")


def _check(
    weights: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> None:
    if len(weights) < 2:
        raise ValueError(f"weights must be at least 2 matrices, got {len(weights)}")
    for name, given in (("inputs", inputs), ("gradients", gradients)):
        if len(given) != len(weights):
            raise ValueError(f"{name} must be {len(weights)} matrices, got {len(given)}")
    K = weights[0].shape[1]
    for index, (W, G, C) in enumerate(zip(weights, inputs, gradients, strict=True)):
        wanted = ((len(W), K), (K, K), (len(W), len(W)))
        named = zip(("weights", "inputs", "gradients"), (W, G, C), wanted, strict=True)
        for name, matrix, shape in named:
            if matrix.shape != shape:
                raise ValueError(f"{name}[{index}] must be {list(shape)}, got {list(matrix.shape)}")
