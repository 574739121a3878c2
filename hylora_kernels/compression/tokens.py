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
from torch.utils.hooks import RemovableHandle

from hylora_kernels.compression.calibration import STAGE, gather, gram
from hylora_kernels.layers.factorize import to_float64
from hylora_kernels.support.processes import ALONE, Processes

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


def token_statistics(
    model: nn.Module, ids: Tensor, progress: bool = True, processes: Processes = ALONE
) -> TokenStatistics:
    """ids int64 [n, L] -> the statistics of the model's embedding and head over all n L tokens.

    The model runs in eval mode, one sequence at a time, and is left as it was. Raises
    FloatingPointError if hidden states or gradients are not finite.
    """
    sums = TokenSums(model)
    gather(model, ids, [], True, progress, "reading tokens", [sums], processes)
    return sums.finish()


class TokenSums:
    """The sums of TokenStatistics over every `step`-th sequence of one gather() with gradients.

    Memory: 16 (V + d^2) bytes.
    """

    def __init__(self, model: nn.Module, step: int = 1) -> None:
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        (words, d), (outputs, width) = self._embedding.weight.shape, self._head.weight.shape
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self._embedding.weight.device}
        self._n, self._C = torch.zeros(words, **kind), torch.zeros(d, d, **kind)
        self._c, self._G = torch.zeros(outputs, **kind), torch.zeros(width, width, **kind)
        self._step, self._reads = step, False
        self._tokens = self._predictions = 0

    def front_hooks(self) -> list[RemovableHandle]:
        return [self._embedding.register_forward_hook(self._embedded)]

    def tail_hooks(self) -> list[RemovableHandle]:
        return [self._head.register_forward_hook(self._predicted)]

    def begin(self, index: int, ids: Tensor) -> None:
        """Sequence `index`, int64 [1, L], is the next one."""
        self._reads = index % self._step == 0

    def add_others(self, processes: Processes) -> None:
        """Add the sums of the other processes, which have read other sequences."""
        processes.add((self._n, self._C, self._c, self._G), STAGE)
        counts = processes.total((self._tokens, self._predictions), STAGE)
        self._tokens, self._predictions = map(int, counts)

    def finish(self) -> TokenStatistics:
        """Raises FloatingPointError if hidden states or gradients were not finite."""
        named = {
            "hidden states": self._G,
            "logits' gradients": self._c,
            "embedding's gradients": self._C,
        }
        for name, sums in named.items():
            if not sums.isfinite().all():
                raise FloatingPointError(f"the {name} on the calibration text are not finite")
        terms = Term(self._n, self._C), Term(self._c, self._G)
        return TokenStatistics(*terms, self._tokens, self._predictions)

    def _embedded(self, _module, args, output):
        if self._reads:
            self._tokens += args[0].numel()
            self._predictions += args[0][..., 1:].numel()
            _add(self._n, torch.bincount(args[0].flatten(), minlength=len(self._n)))
            output.register_hook(lambda g: _add(self._C, gram(g, g)))

    def _predicted(self, _module, args, output):
        if self._reads:
            hidden = args[0].detach()
            _add(self._G, gram(hidden, hidden))
            output.register_hook(lambda g: _add(self._c, g.flatten(0, -2).double().square().sum(0)))


@dataclass(frozen=True)
class TokenWork:
    """Work on embedding and output head: every step-th block of the text is read for it, and `use`
    takes the statistics, None without text. stage: its name among a report's seconds."""

    step: int
    stage: str
    use: Callable[[TokenStatistics | None], None]


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
