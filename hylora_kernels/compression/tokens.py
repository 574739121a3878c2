"""What a text says of a model's token embedding and output head, and the matrices that follow.

The embedding reads one-hot rows and the head has one output a token, so their Gram matrices on the
tokens' side have V x V entries. They are never formed: that of one-hot inputs is diagonal, the
tokens' counts, and of the gradients at the logits the diagonal alone is kept. With D_v, one row a
token, added to the matrix [V, d], the loss grows to second order by a sum over v of

    n_v D_v C D_v^T  in the embedding    c_v D_v G D_v^T  in the head

in the unit of S^2 of the linears (compression/whiten.py): n counts, C [d, d] the Gram matrix of the
gradients at the embedding's output, c squared gradients at the logits, G [d, d] the Gram matrix of
the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.calibration import gram
from hylora_kernels.layers.factorize import to_float64
from hylora_kernels.model.loss import body_of, token_loss
from hylora_kernels.model.modules import eval_mode

TOKEN_DAMPING = 1e-1  # Share of the mean weight, added to each: most tokens are in no sample.
METRIC_DAMPING = 1e-2  # Share of the mean diagonal, as of a linear's Gram matrices.
ROWS = 8192  # Tokens whose rows are in float64 at a time.


@dataclass
class Term:
    """The sum over tokens of weight_v D_v metric D_v^T. weight [V], metric [d, d], float64."""

    weight: Tensor
    metric: Tensor

    def damped(self) -> Term:
        """The same, with a least weight of every token and of every direction. One that is all zero
        becomes one of ones, as a dead linear's."""
        weight, eye = self.weight, torch.eye(len(self.metric)).to(self.metric)
        mean, size = weight.mean(), self.metric.diagonal().mean()
        weight = weight + TOKEN_DAMPING * mean if mean > 0 else torch.ones_like(weight)
        metric = self.metric + METRIC_DAMPING * size * eye if size > 0 else eye
        return Term(weight, metric)

    def error(self, E: Tensor, other: Tensor) -> float:
        """The sum for D = E - other, both [V, d]."""
        total = 0.0
        for rows in row_slices(len(E)):
            D = to_float64(E[rows]) - to_float64(other[rows])
            total += float((self.weight[rows] * (D @ self.metric * D).sum(1)).sum())
        return total


@dataclass
class TokenStatistics:
    """The embedding's term (n, C) and the head's (c, G), over `tokens` tokens of text with
    `predictions` next-token losses."""

    embedding: Term
    head: Term
    tokens: int
    predictions: int

    def damped(self) -> TokenStatistics:
        embedding, head = self.embedding.damped(), self.head.damped()
        return TokenStatistics(embedding, head, self.tokens, self.predictions)

    def nats(self, squares: float) -> float:
        """Sums over the text as predicted increase of the loss in nats a token."""
        return 0.5 * squares / (self.tokens * self.predictions)


def token_statistics(model: nn.Module, ids: Tensor, progress: bool = True) -> TokenStatistics:
    """ids int64 [n, L] -> the statistics of the model's embedding and head over all n L tokens.

    The model runs in eval mode, one sequence at a time, and is left as it was. Raises
    FloatingPointError if hidden states or gradients are not finite.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    device = embedding.weight.device
    kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
    (words, d), (outputs, width) = embedding.weight.shape, head.weight.shape
    n, C = torch.zeros(words, **kind), torch.zeros(d, d, **kind)
    c, G = torch.zeros(outputs, **kind), torch.zeros(width, width, **kind)
    body_of(model, ids[:1].to(device))  # Its probe must not count below.

    def embedded(_module, args, output):
        _add(n, torch.bincount(args[0].flatten(), minlength=words))
        leaf = output.detach().requires_grad_()
        leaf.register_hook(lambda g: _add(C, gram(g, g)))
        return leaf.clone()  # No leaf, so that a model may scale it in place (CTRL).

    def predicted(_module, args, output):
        _add(G, gram(args[0].detach(), args[0].detach()))
        output.register_hook(lambda g: _add(c, g.flatten(0, -2).double().square().sum(0)))

    wanted = [p for p in model.parameters() if p.requires_grad]
    hooks = [embedding.register_forward_hook(embedded), head.register_forward_hook(predicted)]
    model.requires_grad_(False)
    rows = tqdm(ids.split(1), "reading tokens", unit="seq", disable=not progress, leave=False)
    try:
        with eval_mode(model), torch.enable_grad():
            for row in rows:
                token_loss(model, row.to(device))[0].backward()
    finally:
        for hook in hooks:
            hook.remove()
        for p in wanted:
            p.requires_grad_(True)
    named = {"hidden states": G, "logits' gradients": c, "embedding's gradients": C}
    for name, sums in named.items():
        if not sums.isfinite().all():
            raise FloatingPointError(f"the {name} on the calibration text are not finite")
    return TokenStatistics(Term(n, C), Term(c, G), ids.numel(), ids[:, 1:].numel())


@torch.no_grad()
def tied_matrix(E: Tensor, H: Tensor, terms: TokenStatistics) -> Tensor:
    """E, H [V, d], damped terms -> T float32 [V, d] for both places: the least
    n_v |T_v - E_v|_C^2 + c_v |T_v - H_v|_G^2 in every row v."""
    e, h = terms.embedding, terms.head
    solve = row_solver((e.metric, h.metric))
    T = torch.empty(E.shape, dtype=torch.float32, device=E.device)
    for rows in row_slices(len(E)):
        wanted = to_float64(E[rows]) @ e.metric, to_float64(H[rows]) @ h.metric
        T[rows] = solve((e.weight[rows], h.weight[rows]), wanted).float()
    return T


def row_solver(
    metrics: Sequence[Tensor],
) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """metrics M_i [r, r], one or two, positive definite -> a function of weights w_i [n] and
    B_i [n, r] that returns the rows X_v [n, r] with X_v sum_i w_iv M_i = sum_i w_iv B_iv.

    One basis makes both metrics diagonal, so a row costs two products instead of a factorization.
    """
    L = torch.linalg.cholesky(metrics[0])
    half = torch.linalg.solve_triangular(L, metrics[-1], upper=False)
    # Of a single metric this is the identity.
    values, Q = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.T, upper=False))
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    basis = Q.T @ torch.linalg.solve_triangular(L, eye, upper=False)
    scales = (torch.ones_like(values), values)[: len(metrics)]

    def solve(weights: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        right = sum(w[:, None] * B for w, B in zip(weights, wanted, strict=True)) @ basis.T
        left = sum(w[:, None] * s for w, s in zip(weights, scales, strict=True))
        return (right / left) @ basis

    return solve


def row_slices(rows: int) -> Iterator[slice]:
    """All rows, ROWS at a time."""
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))


def _add(total: Tensor, term: Tensor) -> None:
    total += term
