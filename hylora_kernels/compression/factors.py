"""The factors of one matrix, W = U @ SVh: all components, from which every rank is cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Factors:
    """W [N, K] = U @ SVh, components by falling S, all float32.

    U:       [N, k], k = min(N, K). Not orthonormal where output gradients whitened the matrix.
    S:       [k], singular values in the whitened norm.
    SVh:     [k, K].
    damping: shares of the mean diagonal that were added to the Gram matrices of inputs and output
             gradients; 0 for a side without a Gram matrix or with one of zeros.
    """

    U: Tensor
    S: Tensor
    SVh: Tensor
    damping: tuple[float, float]

    def lost_energy(self, rank: int) -> float:
        """The share of sum S^2 that the components from `rank` on carry; 0 of a matrix of zeros."""
        squares = self.S.double() ** 2
        return float(squares[rank:].sum() / squares.sum().clamp_min(1e-300))


def factor_bytes(shape: tuple[int, int]) -> int:
    """Bytes of the Factors of a matrix [N, K]."""
    N, K = shape
    return 4 * min(N, K) * (N + K + 1)
