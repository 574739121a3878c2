"""The factors of a layer: made from a product of two matrices, pivoted, merged, counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.layers.factorize import pivot_rows, to_float64
from hylora_kernels.weights import Weights

FORMS = ("pair", "pivoted")


def factor_count(rank: int, in_features: int, out_features: int, form: str) -> int:
    """Parameters of a base of rank r: r (K + N) as a pair; pivoted r (K + N - r), N K at most."""
    if form == "pair":
        return rank * (in_features + out_features)
    if rank >= min(in_features, out_features):
        return in_features * out_features
    return rank * (in_features + out_features - rank)


def truncated(
    U: Tensor,
    SVh: Tensor,
    rank: int,
    lora_rank: int = 0,
    *,
    alpha: float = 1.0,
    form: str = "pair",
    init: str = "next",
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Weights:
    """U [N, R], SVh [R, K], components by falling weight -> the first `rank` as base, an adapter.

    The arguments are those of SVDLoRALinear.from_product, which has no more to do.
    """
    check_init(init)
    following = 0 if init == "classic" or alpha == 0 else max(SVh.shape[0] - rank, 0)
    taken = min(lora_rank, following)
    A, B = random_adapter(U.shape[0], SVh.shape[1], lora_rank - taken, seed)
    if taken:
        end = rank + taken
        first_A, first_B = balanced_adapter(SVh[rank:end], U[:, rank:end], alpha)
        A = first_A if A is None else torch.cat((first_A, A.to(SVh)))
        B = first_B if B is None else torch.cat((first_B, B.to(U)), 1)
    base_U, base_SVh, pivots = U[:, :rank], SVh[:rank], None
    if form == "pivoted":
        base_U, base_SVh, pivots = pivoted(base_U, base_SVh)
    else:
        base_U, base_SVh = ranged_pair(base_U, base_SVh)
    # Copies: a view of the first components would keep the memory of all of them.
    kind: dict[str, Any] = {"device": SVh.device, "dtype": dtype or SVh.dtype, "copy": True}
    kind["memory_format"] = torch.contiguous_format
    A, B = (None if t is None else t.to(**kind) for t in (A, B))
    return Weights(base_SVh.to(**kind), base_U.to(**kind), A, B, None, alpha, pivots)


def random_adapter(
    out_features: int, in_features: int, lora_rank: int, seed: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """A [ra, K] random with rows of norm about 1 and B [N, ra] zero, float64 on the CPU; None, None
    at lora_rank 0. Without a seed torch's own generator draws, so each layer gets another A."""
    if not lora_rank:
        return None, None
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    A = torch.randn(lora_rank, in_features, generator=generator, **kind)
    return A / in_features**0.5, torch.zeros(out_features, lora_rank, **kind)


def balanced_adapter(SVh: Tensor, U: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """A, B with alpha B A = U SVh and, for each component, |A row| = |alpha| |B column|."""
    rows, columns = SVh.norm(dim=1), U.norm(dim=0)
    scale = (columns / rows.clamp_min(1e-30)).sqrt()
    scale = torch.where((rows > 0) & (columns > 0), scale, torch.ones_like(scale))
    return SVh * scale[:, None], U / scale / alpha


def ranged_pair(U: Tensor, SVh: Tensor) -> tuple[Tensor, Tensor]:
    """U [N, R], SVh [R, K] -> the same product, columns of U with norms in sqrt(N) .. 2 sqrt(N).

    h = x SVh^T then has the size of y and fits float16 where y does: for orthogonal columns
    |h_i| = |u_i . y| / |u_i|^2 <= |y| / sqrt(N), the root mean square of y. With all singular
    values in SVh it is up to sqrt(N) times larger; split evenly, up to sqrt(N / S). A column and
    its row are scaled by a power of two, which is exact, so other dtypes give the same bits.

    The price: dh = dy U is up to sqrt(N) times larger than with orthonormal columns, so a
    GradScaler settles on a smaller scale for dx in float16.
    """
    size = U.norm(dim=0).float() / U.shape[0] ** 0.5
    mantissa, _ = torch.frexp(size)  # in [1/2, 1), so that size / mantissa is a power of two
    power = torch.where(size > 0, size / mantissa / 2, torch.ones_like(size))
    return U / power, SVh * power[:, None]


def pivoted(U: Tensor, SVh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, R], SVh [R, K] -> (coefficients, pivot rows of U SVh, pivots).

    At R = N or R > K there are no coefficients and the rows are the dense matrix.
    """
    if U.shape[1] > SVh.shape[1] or U.shape[1] >= U.shape[0]:
        return U.new_empty(0, U.shape[0]), U @ SVh, torch.arange(U.shape[0], device=U.device)
    pivots, coefficients = pivot_rows(U)
    return coefficients, to_float64(U)[pivots] @ to_float64(SVh), pivots


def components(weights: Weights) -> tuple[Tensor, Tensor]:
    """U [N, R], SVh [R, K] of the same matrix, float64: its components by falling singular value.

    R is r + ra, min(N, K) at most.
    """
    U, SVh = _stacked(in_float64(weights))
    Q, left = torch.linalg.qr(U)
    P, right = torch.linalg.qr(SVh.T)
    U, S, Vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    return Q @ U, S[:, None] * (Vh @ P.T)


def merged(weights: Weights) -> Weights:
    """The same matrix without an adapter, at rank r + ra, in float64.

    Where r + ra exceeds min(K, N), that is the rank of the pair, and the pivoted form becomes the
    dense matrix.
    """
    exact = in_float64(weights)
    if exact.A is None or exact.B is None:
        return exact
    U, SVh = _stacked(exact)
    if exact.pivots is not None:
        U, SVh, pivots = pivoted(U, SVh)
        return Weights(SVh, U, bias=weights.bias, pivots=pivots)
    if SVh.shape[0] > min(weights.in_features, weights.out_features):
        weight = U @ SVh
        eye = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
        U, SVh = (weight, eye) if weight.shape[0] >= weight.shape[1] else (eye, weight)
        return Weights(SVh, U, bias=weights.bias)
    U, SVh = ranged_pair(U, SVh)
    return Weights(SVh, U, bias=weights.bias)


def _stacked(weights: Weights) -> tuple[Tensor, Tensor]:
    """U [N, r + ra], SVh [r + ra, K] of the same matrix: the adapter beside the base."""
    SVh, U = weights.SVh, reference.full_U(weights.U, weights.pivots)
    if weights.A is None or weights.B is None:
        return U, SVh
    return torch.cat([U, weights.alpha * weights.B], 1), torch.cat([SVh, weights.A])


def in_float64(weights: Weights) -> Weights:
    """SVh, U, A and B in float64; the bias stays as it is."""
    A, B = (None if t is None else to_float64(t) for t in (weights.A, weights.B))
    SVh, U = to_float64(weights.SVh), to_float64(weights.U)
    return Weights(SVh, U, A, B, weights.bias, weights.alpha, weights.pivots)


def check_sizes(in_features: int, out_features: int, rank: int, lora_rank: int, form: str) -> None:
    """Raise TypeError or ValueError unless a layer can have these sizes in this form."""
    sizes = SimpleNamespace(
        in_features=in_features, out_features=out_features, rank=rank, lora_rank=lora_rank
    )
    for name, size in vars(sizes).items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        least = 0 if name == "lora_rank" else 1
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    most = min(in_features, out_features)
    if rank > most and not (form == "pivoted" and rank == out_features):
        also = f" or {out_features}" if form == "pivoted" and out_features > most else ""
        raise ValueError(
            f"rank must be in 1..{most}{also} for in_features={in_features},"
            f" out_features={out_features}, got {rank}"
        )


def check_init(init: str) -> None:
    if init not in ("next", "classic"):
        raise ValueError(f"init must be 'next' or 'classic', got {init!r}")
