"""SVDLoRALinear: a frozen truncated-SVD pair plus a trainable LoRA pair in the place of an
nn.Linear."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels import backends, reference
from hylora_kernels.layers.factorize import pivot_rows, truncated_svd, wide
from hylora_kernels.ops import FLOATS, check_alpha, check_shapes, svd_lora_linear
from hylora_kernels.weights import Weights

FORMS = ("pair", "pivoted")


def factor_count(rank: int, in_features: int, out_features: int, form: str) -> int:
    """Parameters of a rank-`rank` base: r (K + N) as a pair, r (K + N - r) pivoted; at most N K in
    the latter."""
    if form == "pair":
        return rank * (in_features + out_features)
    if rank >= min(in_features, out_features):
        return in_features * out_features
    return rank * (in_features + out_features - rank)


class SVDLoRALinear(nn.Module):
    """x [..., K] -> y [..., N] = x SVh^T U^T + bias + alpha x A^T B^T (the pivoted form: see
    ops.svd_lora_linear).

    SVh:    [r, K] frozen parameter; the singular values are folded into it.
    U:      [N, r] frozen parameter; [N - r, r] in the pivoted form.
    A, B:   [ra, K] and [N, ra] trainable parameters, None at lora_rank=0. They may be wider
            (float32 masters on a bfloat16 base): they are cast to the base's dtype for the op,
            saved and counted as they are.
    bias:   [N] trainable parameter or None.
    pivots: int32 [r] buffer in the pivoted form, else None.

    rank r is 1..min(K, N); in the pivoted form also N, where SVh is the dense matrix itself and U
    is empty. alpha is the LoRA scale. lora_dropout acts on the adapter's input in training, and
    costs a second pass over x there.
    Raises ValueError or TypeError naming the argument. Source: the formula of the package; LoRA
    (arXiv:2106.09685), PIFA (arXiv:2501.19090).
    """

    pivots: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        lora_rank: int = 0,
        bias: bool = True,
        alpha: float = 1.0,
        lora_dropout: float = 0.0,
        form: str = "pair",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, rank, lora_rank, form)
        check_alpha(alpha)
        _check_dropout(lora_dropout)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        others = out_features - rank if form == "pivoted" else out_features
        self.in_features, self.out_features = in_features, out_features
        self.form, self.alpha, self.lora_dropout = form, float(alpha), lora_dropout
        self.SVh = nn.Parameter(torch.empty(rank, in_features, **kind), requires_grad=False)
        self.U = nn.Parameter(torch.empty(others, rank, **kind), requires_grad=False)
        self.A = nn.Parameter(torch.empty(lora_rank, in_features, **kind)) if lora_rank else None
        self.B = nn.Parameter(torch.empty(out_features, lora_rank, **kind)) if lora_rank else None
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None
        pivots = torch.arange(rank, dtype=torch.int32, device=device) if form == "pivoted" else None
        self.register_buffer("pivots", pivots)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product has nn.Linear's variance; A random, B zero: the adapter
        starts as nothing."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.SVh, -bound, bound)
        if self.U.numel():
            nn.init.normal_(self.U, std=self.rank**-0.5)
        if self.A is not None and self.B is not None:
            nn.init.normal_(self.A, std=bound)
            nn.init.zeros_(self.B)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.pivots is not None:  # to_empty() has left no values in it, after building on meta
            self.pivots.copy_(torch.arange(self.rank))

    @property
    def rank(self) -> int:
        return self.SVh.shape[0]

    @property
    def lora_rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        A: Tensor | None = self.A
        B: Tensor | None = self.B
        if A is not None and B is not None:
            if A.dtype != self.SVh.dtype:
                A, B = A.to(self.SVh.dtype), B.to(self.SVh.dtype)
            if self.lora_dropout and self.training:
                y = svd_lora_linear(x, self.SVh, self.U, bias=self.bias, pivots=self.pivots)
                return y + self.alpha * F.linear(F.linear(F.dropout(x, self.lora_dropout), A), B)
        return svd_lora_linear(x, self.SVh, self.U, A, B, self.bias, self.alpha, self.pivots)

    def train(self, mode: bool = True) -> SVDLoRALinear:
        if not mode:  # a layer in eval() holds its factors and nothing else
            backends.forget(self.SVh)
        return super().train(mode)

    # ---------------------------------------------------------------------------------- making one

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        lora_rank: int = 0,
        alpha: float = 1.0,
        factorizer: str = "gram",
        form: str = "pair",
        init: str = "next",
        lora_dropout: float = 0.0,
    ) -> SVDLoRALinear:
        """linear [N, K] -> the layer with its best rank-`rank` base, in its dtype, with its bias.

        init: what the adapter starts as: "next", the next lora_rank singular components (the layer
        then computes the best rank r + ra approximation), or "classic", A random and B zero. With
        alpha=0 nothing but "classic" can be. Raises TypeError if `linear` is no nn.Linear,
        ValueError naming any other argument that can't be.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        weight, (N, K) = linear.weight, linear.weight.shape
        _check_sizes(K, N, rank, lora_rank, form)
        _check_init(init)
        check_alpha(alpha)
        options: dict[str, Any] = {"bias": linear.bias, "alpha": alpha}
        options["lora_dropout"] = lora_dropout
        if form == "pivoted" and rank == N:
            layer = cls.from_dense(weight, lora_rank, **options)
        else:
            U, S, Vh = truncated_svd(weight, min(rank + lora_rank, N, K), factorizer)
            SVh = S[:, None] * Vh
            layer = cls.from_product(
                U, SVh, rank, lora_rank, form=form, init=init, dtype=weight.dtype, **options
            )
        return layer.to(weight.device).train(linear.training)

    @classmethod
    def from_dense(
        cls,
        W: Tensor,
        lora_rank: int = 0,
        *,
        bias: Tensor | None = None,
        alpha: float = 1.0,
        lora_dropout: float = 0.0,
        seed: int = 0,
    ) -> SVDLoRALinear:
        """Plain LoRA: W [N, K] itself, shared, as a pivoted base of rank N; a classic adapter."""
        A, B = _classic_adapter(W.shape[0], W.shape[1], lora_rank, seed)
        kind: dict[str, Any] = {"device": W.device, "dtype": W.dtype}
        if lora_rank:
            A, B = A.to(**kind), B.to(**kind)
        U, pivots = torch.empty(0, len(W), **kind), torch.arange(len(W))
        return cls.from_factors(W.detach(), U, A, B, bias, alpha, pivots, lora_dropout)

    @classmethod
    def from_product(
        cls,
        U: Tensor,
        SVh: Tensor,
        rank: int,
        lora_rank: int = 0,
        *,
        bias: Tensor | None = None,
        alpha: float = 1.0,
        lora_dropout: float = 0.0,
        form: str = "pair",
        init: str = "next",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> SVDLoRALinear:
        """U [N, R], SVh [R, K], components by falling weight -> the layer with the first `rank`
        of them as its base.

        With init="next" the components after them become the adapter (norm-balanced; missing ones
        are random with B zero);
        with "classic" A is random (seeded by `seed`), B zero. dtype defaults to SVh's.
        """
        _check_init(init)
        dtype = dtype or SVh.dtype
        taken = 0 if init == "classic" or alpha == 0 else min(lora_rank, SVh.shape[0] - rank)
        A, B = _classic_adapter(U.shape[0], SVh.shape[1], lora_rank, seed)
        if taken:
            A, B = A.to(SVh), B.to(U)
            A[:taken], B[:, :taken] = _balanced(
                SVh[rank : rank + taken], U[:, rank : rank + taken], alpha
            )
        base_U, base_SVh, pivots = U[:, :rank], SVh[:rank], None
        if form == "pivoted":
            base_U, base_SVh, pivots = _pivoted(base_U, base_SVh)
        # Copies: a view of the first components would keep the memory of all of them.
        kind: dict[str, Any] = {"device": SVh.device, "dtype": dtype, "copy": True}
        kind["memory_format"] = torch.contiguous_format
        SVh, U = base_SVh.to(**kind), base_U.to(**kind)
        A, B = (None if t is None else t.to(**kind) for t in (A, B))
        return cls.from_factors(SVh, U, A, B, bias, alpha, pivots, lora_dropout)

    @classmethod
    def from_factors(
        cls,
        SVh: Tensor,
        U: Tensor,
        A: Tensor | None = None,
        B: Tensor | None = None,
        bias: Tensor | None = None,
        alpha: float = 1.0,
        pivots: Tensor | None = None,
        lora_dropout: float = 0.0,
    ) -> SVDLoRALinear:
        """The layer that holds these very tensors (shapes as in the class)."""
        weights = Weights(SVh, U, A, B, bias, alpha, pivots)
        check_shapes(SVh.shape[-1], "K from SVh", weights)
        layer = cls(
            weights.in_features,
            weights.out_features,
            weights.rank,
            weights.lora_rank,
            bias=bias is not None,
            alpha=alpha,
            lora_dropout=lora_dropout,
            form="pair" if pivots is None else "pivoted",
            device="meta",
        )
        layer._hold(SVh, U, A, B, pivots)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def _hold(
        self, SVh: Tensor, U: Tensor, A: Tensor | None, B: Tensor | None, pivots: Tensor | None
    ) -> None:
        self.SVh = nn.Parameter(SVh, requires_grad=False)
        self.U = nn.Parameter(U, requires_grad=False)
        self.A = None if A is None else nn.Parameter(A)
        self.B = None if B is None else nn.Parameter(B)
        self.pivots = None if pivots is None else pivots.to(SVh.device, torch.int32)

    # -------------------------------------------------------------------------- what it amounts to

    def parameter_count(self, merged: bool = True) -> int:
        """Parameters without bias: merged, as deployed at rank r + ra, or as held now."""
        if merged:
            rank = self.rank + self.lora_rank
            rank = min(rank, self.in_features, self.out_features) if self.lora_rank else rank
            return factor_count(rank, self.in_features, self.out_features, self.form)
        return sum(p.numel() for p in (self.SVh, self.U, self.A, self.B) if p is not None)

    @property
    def keep(self) -> float:
        """The fraction of the dense layer's N K parameters that stays, adapter merged."""
        return self.parameter_count() / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"lora_rank={self.lora_rank}, alpha={self.alpha:g}, form={self.form!r}, "
            f"bias={self.bias is not None}, keep={self.keep:.3f} (removed {1 - self.keep:.3f})"
        )

    @torch.no_grad()
    def merge(self) -> SVDLoRALinear:
        """Fold the adapter into the base at rank r + ra, exact up to rounding; the same layer.

        Where r + ra exceeds min(K, N), that is the rank of the pair; the pivoted form becomes the
        dense matrix (rank N).
        """
        if self.A is None or self.B is None:
            return self
        SVh = torch.cat([wide(self.SVh), wide(self.A)])
        U = torch.cat([reference.full_U(wide(self.U), self.pivots), self.alpha * wide(self.B)], 1)
        pivots = None
        if self.form == "pivoted":
            U, SVh, pivots = _pivoted(U, SVh)
        elif SVh.shape[0] > min(self.in_features, self.out_features):
            weight = U @ SVh
            eye = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
            U, SVh = (weight, eye) if weight.shape[0] >= weight.shape[1] else (eye, weight)
        kind: dict[str, Any] = {"device": self.SVh.device, "dtype": self.SVh.dtype}
        self._hold(SVh.to(**kind).contiguous(), U.to(**kind).contiguous(), None, None, pivots)
        return self

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear that computes the same, adapter included; the bias is shared."""
        A, B = (None if t is None else wide(t) for t in (self.A, self.B))
        factors = Weights(wide(self.SVh), wide(self.U), A, B, None, self.alpha, self.pivots)
        weight = reference.dense_weight(factors)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(self.SVh.device, self.SVh.dtype))
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)


SVD_LoRA_Linear = SVDLoRALinear


def _classic_adapter(
    out_features: int, in_features: int, lora_rank: int, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """A [ra, K] random with rows of norm about 1, B [N, ra] zero; None, None at lora_rank 0."""
    if not lora_rank:
        return None, None
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(lora_rank, in_features, generator=generator, dtype=torch.float64)
    return A / in_features**0.5, torch.zeros(out_features, lora_rank, dtype=torch.float64)


def _pivoted(U: Tensor, SVh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, R], SVh [R, K] -> (coefficients, pivot rows of U SVh, pivots).

    At R = N or R > K that is no coefficients and the dense matrix itself.
    """
    if U.shape[1] > SVh.shape[1] or U.shape[1] >= U.shape[0]:
        return U.new_empty(0, U.shape[0]), U @ SVh, torch.arange(U.shape[0])
    pivots, coefficients = pivot_rows(U)
    return coefficients, wide(U)[pivots] @ wide(SVh), pivots


def _balanced(SVh: Tensor, U: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """A, B with alpha B A = U SVh and, per component, |A row| = |alpha| |B column|."""
    rows, columns = SVh.norm(dim=1), U.norm(dim=0)
    scale = (columns / rows.clamp_min(1e-30)).sqrt()
    scale = torch.where((rows > 0) & (columns > 0), scale, torch.ones_like(scale))
    return SVh * scale[:, None], U / scale / alpha


def _check_sizes(in_features: int, out_features: int, rank: int, lora_rank: int, form: str) -> None:
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


def _check_dropout(lora_dropout: float) -> None:
    if not isinstance(lora_dropout, int | float) or isinstance(lora_dropout, bool):
        raise TypeError(f"lora_dropout must be a number, got {type(lora_dropout).__name__}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")


def _check_init(init: str) -> None:
    if init not in ("next", "classic"):
        raise ValueError(f"init must be 'next' or 'classic', got {init!r}")
