"""LowRankEmbedding: a token embedding as two factors, which a tied output head shares."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels.layers.dense_weight import DenseWeight
from hylora_kernels.layers.factorize import to_float64
from hylora_kernels.layers.factors import check_sizes
from hylora_kernels.layers.linear import SVDLoRALinear


class LowRankEmbedding(nn.Module):
    """ids int64 [...] -> rows [..., d] of E = U SVh.

    U:   [V, r] frozen parameter, one row a token.
    SVh: [r, d] frozen parameter.

    An output head tied to it is an SVDLoRALinear that holds the same two parameters: x SVh^T U^T.
    U and SVh have its letters and shapes, N = V outputs and K = d inputs. Raises ValueError or
    TypeError naming the argument.

        embedding, head = LowRankEmbedding.tied_pair(U, SVh)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embedding_dim, num_embeddings, rank, 0, "pair")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.SVh = nn.Parameter(torch.empty(rank, embedding_dim, **kind), requires_grad=False)
        self.U = nn.Parameter(torch.empty(num_embeddings, rank, **kind), requires_grad=False)
        self.reset_parameters()

    @classmethod
    def tied_pair(
        cls,
        U: Tensor,
        SVh: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[LowRankEmbedding, SVDLoRALinear]:
        """U [V, r], SVh [r, d], the head's bias [V] -> (embedding, output head) with one U and one
        SVh. dtype: of both, by default SVh's. The pair is scaled as SVDLoRALinear scales it."""
        head = SVDLoRALinear.from_product(U, SVh, SVh.shape[0], bias=bias, dtype=dtype)
        embedding = cls(*U.shape[:1], SVh.shape[1], SVh.shape[0], device="meta")
        embedding.SVh, embedding.U = head.SVh, head.U
        return embedding, head

    def reset_parameters(self) -> None:
        """Random factors whose rows have nn.Embedding's variance, 1."""
        nn.init.normal_(self.U)
        nn.init.normal_(self.SVh, std=self.rank**-0.5)

    @property
    def rank(self) -> int:
        return self.SVh.shape[0]

    @property
    def weight(self) -> Tensor:
        """E [V, d], computed when an operation reads it (DenseWeight); it is no parameter."""
        kind: dict[str, Any] = {"dtype": self.SVh.dtype, "device": self.SVh.device}
        return DenseWeight(self._dense_weight, (self.num_embeddings, self.embedding_dim), **kind)

    def _dense_weight(self) -> Tensor:
        return (to_float64(self.U) @ to_float64(self.SVh)).to(self.SVh.device, self.SVh.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.U) @ self.SVh

    def parameter_count(self) -> int:
        """r (V + d), which a tied head adds nothing to."""
        return self.U.numel() + self.SVh.numel()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
