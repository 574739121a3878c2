"""A model's token embedding, and the output head tied to it, as one low-rank pair: a layer of the
budget like any linear, whose matrix stands in two places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hylora_kernels.compression.factors import Factors
from hylora_kernels.compression.ranks import DENSE, Curve, curve
from hylora_kernels.compression.report import LayerReport
from hylora_kernels.compression.tokens import (
    Term,
    TokenStatistics,
    row_slices,
)
from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.layers.factorize import to_float64
from hylora_kernels.model.context import probe_ids
from hylora_kernels.model.structure import Target


@torch.no_grad()
def embedding_target(model: nn.Module, name: str = "embedding_rank") -> Target:
    """The input embedding as a Target of shape (V, d).

    Raises ValueError naming the argument `name` if it is none that factors or codes can replace.
    """
    embedding = model.get_input_embeddings()
    what = f"{name} needs an nn.Embedding as input embedding"
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"{what}, got a {type(embedding).__name__}")
    weight, ids = embedding.weight, probe_ids(model)
    if embedding.max_norm is not None or not torch.equal(embedding(ids), weight[ids]):
        raise ValueError(f"{what}, but a {type(embedding).__name__} changes the rows it gives")
    path, *others = holders(model, weight)
    if any(model.get_submodule(p) is not model.get_output_embeddings() for p in others):
        raise ValueError(f"{what} that is tied to the output head alone, but {others} hold it")
    return Target(path, embedding, (weight.shape[0], weight.shape[1]))


def holders(model: nn.Module, weight: object) -> list[str]:
    """The paths of the modules that hold this Parameter: the embedding, then a tied head."""
    named = model.named_modules()
    found = {path: m for path, m in named if any(p is weight for p in m._parameters.values())}
    return sorted(found, key=lambda path: not isinstance(found[path], nn.Embedding))


def embedding_curve(target: Target, S: Tensor, rank: int | str | None, multiple: int) -> Curve:
    """The candidates of an embedding: the pair's ranks and DENSE, or `rank` alone if it is an int.

    Raises ValueError for a rank at which the pair is no smaller than the matrix.
    """
    if rank == "auto":
        return curve(target.path, target.shape, S, "pair", multiple)
    found = curve(target.path, target.shape, S, "pair", 1)
    at = (found.ranks == rank) & (found.ranks != DENSE)
    if not at.any():
        raise ValueError(
            f"embedding_rank must be in 1..{len(found.ranks) - 1}, where a pair is smaller than the"
            f" {target.shape[0]} x {target.shape[1]} embedding, or 'auto', got {rank}"
        )
    only = (found.ranks[at], found.costs[at], found.errors[at])
    return Curve(found.path, found.dense_cost, *only, found.total, found.cost)


def factorize_embedding(
    model: nn.Module, target: Target, statistics: TokenStatistics | None, method: str
) -> Factors:
    """Factors U [V, d], SVh [d, d] of the embedding, in the norm of its place and of a tied head's.

    statistics: None for method "svd".
    method: "two_sided" weighs both sides of both places (compression/tokens.py), "whitened" the
            inputs of both, one-hot rows and hidden states, "svd" nothing.
    """
    factors = factorize_rows(target.matrix, place_terms(model, target, statistics, method))
    if method == "two_sided" and statistics is not None:
        factors.S.mul_(statistics.nats(1.0) ** 0.5)
    return factors


def place_terms(
    model: nn.Module, target: Target, statistics: TokenStatistics | None, method: str
) -> list[Term]:
    """The damped terms of each place of a matrix [V, d]: as input embedding, as output head.

    statistics, method: as in factorize_embedding(); None weighs nothing.
    """
    V, d = target.shape
    weight = target.module.weight
    places = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m]
    if statistics is None:
        ones = torch.ones(V, dtype=torch.float64, device=weight.device)
        eye = torch.eye(d, dtype=torch.float64, device=weight.device)
        return [Term(ones, eye) for place in places if place.weight is weight]
    embedding, head = statistics.embedding, statistics.head
    if method == "whitened":
        embedding = Term(embedding.weight, torch.eye(d).to(embedding.metric))
        head = Term(torch.ones_like(head.weight), head.metric)
    terms = (embedding, head)
    return [term.damped() for term, m in zip(terms, places, strict=False) if m.weight is weight]


@torch.no_grad()
def factorize_rows(E: Tensor, terms: list[Term]) -> Factors:
    """E [V, d], the terms that an error counts in, positive -> its Factors of full rank.

    The components come from one norm, which has the marginals of the sum of all terms: weights of
    rows times a metric of columns. S^2 is what dropping a component adds in the terms themselves.
    """
    rows = sum(t.weight * t.metric.trace() for t in terms)
    columns = sum(t.metric * t.weight.sum() for t in terms)
    L = torch.linalg.cholesky(columns / columns.diagonal().mean())
    rows = rows / rows.mean()
    moment = _weighted_gram(E, rows, L)
    _, vectors = torch.linalg.eigh(moment)
    vectors = vectors.flip(1)
    dual = L @ vectors
    SVh = torch.linalg.solve_triangular(L.T, vectors, upper=True).T
    errors = torch.zeros(len(L) + 1, dtype=torch.float64, device=E.device)
    for term in terms:
        # Dropping the components from r on costs the sum of X_ij Y_ij over i, j >= r.
        products = _weighted_gram(E, term.weight, dual) * (SVh @ term.metric @ SVh.T)
        errors[:-1] += products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    S = (errors[:-1] - errors[1:]).clamp_min(0).sqrt()
    U = torch.cat([(to_float64(E[part]) @ dual).float() for part in row_slices(len(E))])
    return Factors(U, S.float(), SVh.float().contiguous(), (0.0, 0.0))


def _weighted_gram(E: Tensor, weight: Tensor, side: Tensor) -> Tensor:
    """E [V, d], weight [V], side [d, k] -> (E side)^T diag(weight) (E side), float64 [k, k]."""
    total = torch.zeros(side.shape[1], side.shape[1], dtype=side.dtype, device=side.device)
    for part in row_slices(len(E)):
        X = to_float64(E[part]) @ side
        total += X.T @ (weight[part, None] * X)
    return total


@torch.no_grad()
def replace_embedding(
    model: nn.Module, target: Target, factors: Factors, rank: int, method: str
) -> LayerReport:
    """Put a LowRankEmbedding, and a head that shares its factors if it was tied, in the places of
    the embedding and the head, unless the rank is DENSE."""
    V, d = target.shape
    report = LayerReport(target.path, V, d, rank, 0, V * d, V * d, 0.0, 0.0, factors.damping)
    in_nats = method == "two_sided"
    if rank == DENSE:
        report.predicted_loss = 0.0 if in_nats else None
        return report
    weight, training = target.module.weight, target.module.training
    places = holders(model, weight)
    bias = getattr(model.get_submodule(places[-1]), "bias", None)  # An embedding has none.
    pair = LowRankEmbedding.tied_pair(
        factors.U[:, :rank].to(weight.device),
        factors.SVh[:rank].to(weight.device),
        bias=bias,
        dtype=weight.dtype,
    )
    for path, module in zip(places, pair, strict=False):  # Of an untied model the first alone.
        model.set_submodule(path, module.train(training))
    report.lost_energy = factors.lost_energy(rank)
    report.predicted_loss = factors.dropped(rank) if in_nats else None
    report.parameters = report.parameters_as_is = pair[0].parameter_count()
    return report
