"""The factors of one matrix, W = U @ SVh: all components, from which every rank is cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Factors:
    """W [N, K] = U @ SVh, components by falling S, all float32.

    U:       [N, k], k = min(N, K). Not orthonormal where output gradients whitened the matrix.
    S:       [k], singular values in the whitened norm. Under method "two_sided" S^2 is the increase
             of the loss, in nats a token, that dropping the component is predicted to cost.
    SVh:     [k, K].
    damping: shares of the mean diagonal that were added to the Gram matrices of inputs and output
             gradients; 0 for a side without a Gram matrix or with one of zeros.
    """

    U: Tensor
    S: Tensor
    SVh: Tensor
    damping: tuple[float, float]

    def dropped(self, rank: int) -> float:
        """sum S^2 of the components from `rank` on."""
        return float((self.S[rank:].double() ** 2).sum())

    def lost_energy(self, rank: int) -> float:
        """The share of sum S^2 that the components from `rank` on carry; 0 of a matrix of zeros."""
        return self.dropped(rank) / max(self.dropped(0), 1e-300)


def factor_bytes(shape: tuple[int, int]) -> int:
    """Bytes of the Factors of a matrix [N, K]."""
    N, K = shape
    return 4 * min(N, K) * (N + K + 1)
