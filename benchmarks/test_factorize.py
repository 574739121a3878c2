"""Seconds and error of each factorizer at the rank a pair keeps at keep 0.6: on a matrix of a 7B
model's size with --full (minutes), else on one a sixteenth of that.

The matrix is random: a Gaussian bulk under a power law, as language-model weights have. "error" is
the Frobenius error of the truncation over the optimal one (from the eigenvalues of W W^T in
float64). "nystrom" takes the positive semi-definite Gram matrix W^T W of the larger side instead.
One run each, in float64, after a warm-up on a small matrix.
"""

from __future__ import annotations

import pytest
import torch

from hylora_kernels.layers.factorize import truncated_svd

KEEP = 0.6


def language_like(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(rows, columns, generator=generator) / columns**0.5
    left, right = (
        torch.randn(rows, 256, generator=generator),
        torch.randn(256, columns, generator=generator),
    )
    falling = 3 * torch.arange(1, 257) ** -0.7
    return (bulk + (left * falling) @ right / (rows * columns) ** 0.25 / 8).double()


@pytest.fixture(scope="module")
def case(request):
    """(W, rank, squared singular values)"""
    option = request.config.getoption
    rows, columns = (4096, 11008) if option("--full") else (1024, 2816)
    if option("--quick"):
        rows, columns = 256, 688
    W = language_like(rows, columns)
    rank = int(KEEP * rows * columns / (rows + columns))
    return W, rank, torch.linalg.eigvalsh(W @ W.T).flip(0).clamp_min(0)


@pytest.mark.parametrize("factorizer", ["gram", "exact", "randomized", "nystrom"])
def test_factorizer(benchmark, case, factorizer):
    W, rank, squares = case
    if factorizer == "nystrom":
        W, squares = W.T @ W, squares**2
    truncated_svd(W[:64, :64] @ W[:64, :64].T, 8, factorizer)
    U, S, Vh = benchmark.pedantic(truncated_svd, (W, rank, factorizer), rounds=1)
    error = float((W - (U * S) @ Vh).norm() / squares[rank:].sum().sqrt())
    benchmark.extra_info.update(
        shape=list(W.shape), rank=rank, error_over_optimum=error, threads=torch.get_num_threads()
    )
    print(f"\n{factorizer}: {list(W.shape)} at rank {rank}, error {error:.4f} x the optimum")
    # No deterministic method may beat the optimum, and none of these may be far off it.
    assert 1 - 1e-6 < error < 1.25
