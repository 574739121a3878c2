"""Matrices into factors: truncated SVD by four methods, and the row pivoting of the pivoted form.

Pure linear algebra, no model and no layer. Everything is computed in float64 on the matrix's own
device (on the CPU where the device has no float64) and handed back so; callers cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTORIZERS = ("gram", "exact", "randomized", "nystrom")

# Columns of a symmetric product that are made at a time on a CPU. Strips leave out the lower half:
# 512 rows of 1536 columns take 19.6 ms instead of 38, one thread, and 13.0 instead of 19.2 on two
# (AVX2, float32); 128 and 512 columns are no quicker. numpy's syrk takes 23.5 and 24.8: its threads
# are others than torch's. A GPU makes the whole product in one launch.
STRIP = 256


def truncated_svd(
    W: Tensor, rank: int | None = None, factorizer: str = "gram", *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """W [N, K] -> U [N, k], S [k] descending, Vh [k, K], float64, with W ~ (U * S) @ Vh.

    k is rank, or min(N, K) where that is None.

    factorizer (errors: over the optimum, on a 4096 x 11008 matrix with a language model's kind of
    spectrum at keep 0.6; benchmarks/test_factorize.py measures them and the seconds):
        "gram"        eigenvectors of the smaller Gram matrix, optimal down to singular values of
                      about 1e-8 of the largest (1.000)
        "exact"       LAPACK's divide and conquer, optimal everywhere
        "randomized"  Halko-Martinsson-Tropp (arXiv:0909.4061) range finder, two power iterations,
                      re-orthonormalised by QR at each half step, oversampled by 10 (1.045); only
                      quicker below about a tenth of the full rank
        "nystrom"     Tropp et al. (arXiv:1706.05736, algorithm 3) for symmetric positive
                      semi-definite W only, e.g. a Gram matrix (1.121 on that of the larger side),
                      with two subspace iterations

    Raises TypeError or ValueError for a W that is no finite real matrix, an unknown factorizer, a
    rank out of range, or "nystrom" on a matrix that is not symmetric positive semi-definite.
    """
    check_matrix("W", W, "[N, K]")
    full = min(W.shape)
    rank = full if rank is None else rank
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be an int or None, got {type(rank).__name__}")
    if not 1 <= rank <= full:
        raise ValueError(
            f"rank must be in 1..{full} for a {W.shape[0]} x {W.shape[1]} matrix, got {rank}"
        )
    if factorizer not in FACTORIZERS:
        raise ValueError(f"factorizer must be one of {FACTORIZERS}, got {factorizer!r}")
    W = to_float64(W.detach())
    if not W.isfinite().all():
        raise ValueError("W must be finite, got NaN or Inf in it")
    if factorizer == "exact":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    if factorizer == "gram":
        return _gram(W, rank)
    generator = torch.Generator(W.device).manual_seed(seed)
    return (_randomized if factorizer == "randomized" else _nystrom)(W, rank, generator)


def check_matrix(name: str, matrix: Tensor, letters: str) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(matrix).__name__}")
    if matrix.is_complex():
        raise TypeError(f"{name} must be real, got {matrix.dtype}")
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be a non-empty matrix {letters}, got {list(matrix.shape)}")
    if matrix.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")


def to_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, moved to the CPU where its device has no float64 (Apple's mps)."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def add_symmetric(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a, b [rows, n] with a symmetric product a^T b -> total [n, n] + a^T b, total itself where one
    is given, in its dtype. Only the upper triangle counts; fill_lower() makes the other one."""
    n = a.shape[1]
    if total is None:
        total = a.new_zeros(n, n)
    width = STRIP if a.device.type == "cpu" else n
    for start in range(0, n, width):
        stop = start + width
        total[start:stop, start:].addmm_(a[:, start:stop].T, b[:, start:])
    return total


def fill_lower(total: Tensor) -> Tensor:
    """total [n, n] with its upper triangle mirrored, in place, a strip at a time."""
    for start in range(0, len(total), STRIP):
        stop = start + STRIP
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _gram(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if W.shape[0] > W.shape[1]:
        V, S, Uh = _gram(W.T, rank)
        return Uh.T, S, V.T
    U = torch.linalg.eigh(add_symmetric(None, W.T, W.T), UPLO="U").eigenvectors[:, -rank:]
    Vh = U.T @ W
    # Norms of the rows are the singular values, more exact than the root of an eigenvalue where
    # that is tiny; there the order of the eigenvalues is noise too.
    S, order = Vh.norm(dim=1).sort(descending=True)
    Vh = Vh[order] / S.clamp_min(torch.finfo(W.dtype).tiny)[:, None]
    if S[-1] < 1e-6 * S[0]:
        # A row that small is rounding errors that point along the large ones: Vh^T Vh, a
        # projection that callers rely on, was off by five times its size for a rank 5 of 32.
        Q, R = torch.linalg.qr(Vh.T)
        Vh = torch.where(R.diagonal() < 0, -Q, Q).T
    return U[:, order], S, Vh


def _randomized(
    W: Tensor, rank: int, generator: torch.Generator, oversample: int = 10, iterations: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    columns = min(rank + oversample, *W.shape)
    sketch = torch.randn(W.shape[1], columns, dtype=W.dtype, device=W.device, generator=generator)
    Q = torch.linalg.qr(W @ sketch).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vh[:rank]


def _nystrom(
    W: Tensor, rank: int, generator: torch.Generator, oversample: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    symmetric = W.shape[0] == W.shape[1] and torch.allclose(
        W, W.T, rtol=1e-5, atol=1e-6 * float(W.abs().max())
    )
    if not symmetric:
        raise ValueError(
            f"factorizer 'nystrom' needs a symmetric matrix, got one of {list(W.shape)} that is not"
        )
    # A sketch can miss a negative eigenvalue, Cholesky of the whole can't, at a tenth of the
    # sketch's cost or so. One as small as float32 sums leave in a singular Gram matrix passes for
    # zero.
    rounding = 1e-6 * float(W.norm()) + torch.finfo(W.dtype).tiny
    shifted = W.clone()
    shifted.diagonal().add_(rounding)
    if int(torch.linalg.cholesky_ex(shifted).info):
        raise ValueError(
            "factorizer 'nystrom' needs a positive semi-definite matrix, got one with negative"
            " eigenvalues"
        )
    n, columns = W.shape[0], min(rank + oversample, W.shape[0])
    test = torch.linalg.qr(
        torch.randn(n, columns, dtype=W.dtype, device=W.device, generator=generator)
    ).Q
    # On the flat spectra of language models each subspace iteration pays: at rank 223 of 1376 the
    # error falls from 1.67 times the optimum to 1.22 and 1.10.
    for _ in range(2):
        test = torch.linalg.qr(W @ test).Q
    sketch = W @ test
    # The shift keeps the Cholesky factor of test^T W test real; it is taken off the eigenvalues at
    # the end.
    shift = torch.finfo(W.dtype).eps * n**0.5 * float(sketch.norm())
    core, info = _shifted_core(test, sketch, shift)
    if int(info):
        shift = rounding
        core, _ = _shifted_core(test, sketch, shift)
    sketch += shift * test
    U, S, _ = torch.linalg.svd(
        torch.linalg.solve_triangular(core.T, sketch, upper=True, left=False), full_matrices=False
    )
    U, eigenvalues = U[:, :rank], (S[:rank] ** 2 - shift).clamp_min(0)
    return U, eigenvalues, U.T


def _shifted_core(test: Tensor, sketch: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    core = test.T @ sketch
    core = 0.5 * (core + core.T)
    core.diagonal().add_(shift)
    return torch.linalg.cholesky_ex(core)


def pivot_rows(U: Tensor) -> tuple[Tensor, Tensor]:
    """U [N, r], r <= N -> pivots int64 [r] and coefficients float64 [N - r, r], with U[others] =
    coefficients @ U[pivots].

    pivots and others are both ascending. LU with partial pivoting on an orthonormal basis of U's
    columns, which keeps the coefficients small (SmolLM2-135M at keep 0.8: largest 2.0 on average
    over the layers, 7.1 at worst) so that they survive rounding to bfloat16. Also exact where U
    lacks full column rank. Source: PIFA, arXiv:2501.19090.
    """
    check_matrix("U", U, "[N, r]")
    rows, rank = U.shape
    if rank > rows:
        raise ValueError(f"U must be [N, r] with r at most N, got {list(U.shape)}")
    packed, swaps = torch.linalg.lu_factor(torch.linalg.qr(to_float64(U)).Q)
    permutation = list(range(rows))
    for row, other in enumerate(swaps.tolist()):
        permutation[row], permutation[other - 1] = permutation[other - 1], permutation[row]
    order = torch.tensor(permutation, device=packed.device)
    lower = packed.tril(-1)
    coefficients = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    pivots, columns = order[:rank].sort()
    _, others = order[rank:].sort()
    return pivots, coefficients[others][:, columns]
