"""SVDLoRALinear: an nn.Linear replaced by a frozen truncated SVD and a trainable LoRA adapter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels import backends, reference
from hylora_kernels.layers import factors
from hylora_kernels.layers.dense_weight import DenseWeight
from hylora_kernels.layers.factorize import truncated_svd
from hylora_kernels.ops.checks import FLOATS, check_alpha, check_shapes
from hylora_kernels.ops.linear import svd_lora_linear
from hylora_kernels.weights import Weights


class SVDLoRALinear(nn.Module):
    """x [..., K] -> y [..., N] = x SVh^T U^T + bias + alpha x A^T B^T.

    The pivoted form is described at svd_lora_linear.

    SVh:    [r, K] frozen parameter.
    U:      [N, r] frozen parameter; [N - r, r] in the pivoted form. Constructors that factorize
            scale the pair so that h = x SVh^T has the size of y (factors.ranged_pair).
    A, B:   [ra, K] and [N, ra] trainable parameters, None at lora_rank=0. Their dtype may be wider
            than the base's (float32 masters on a bfloat16 base): the op gets them cast to the
            base's dtype, a checkpoint as they are.
    bias:   [N] trainable parameter or None.
    pivots: int32 [r] buffer in the pivoted form, else None.

    The rank r is 1..min(K, N); in the pivoted form also N, where SVh is the dense matrix and U is
    empty. alpha is the LoRA scale. lora_dropout acts on the adapter's input in training and costs a
    second pass over x there.
    Raises ValueError or TypeError naming the argument. Sources: LoRA (arXiv:2106.09685), PIFA
    (arXiv:2501.19090).

    Example:
        layer = SVDLoRALinear.from_linear(nn.Linear(64, 96), rank=16, lora_rank=4)
        y = layer(torch.randn(2, 64))  # [2, 96]
        small = layer.merge()          # rank 20, no adapter
    """

    pivots: Tensor | None
    _op = staticmethod(svd_lora_linear)

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
        factors.check_sizes(in_features, out_features, rank, lora_rank, form)
        _check_dropout(lora_dropout)
        _check_dtype("dtype", dtype)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        others = out_features - rank if form == "pivoted" else out_features
        self.in_features, self.out_features = in_features, out_features
        self.form, self.alpha, self.lora_dropout = form, alpha, lora_dropout
        self.SVh = nn.Parameter(torch.empty(rank, in_features, **kind), requires_grad=False)
        self.U = nn.Parameter(torch.empty(others, rank, **kind), requires_grad=False)
        self.A = nn.Parameter(torch.empty(lora_rank, in_features, **kind)) if lora_rank else None
        self.B = nn.Parameter(torch.empty(out_features, lora_rank, **kind)) if lora_rank else None
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None
        pivots = torch.arange(rank, dtype=torch.int32, device=device) if form == "pivoted" else None
        self.register_buffer("pivots", pivots)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product has nn.Linear's variance; A random and B zero, so that the
        adapter adds nothing at first. Tensors on meta have none to be set."""
        if self.SVh.is_meta:  # torch takes 0.3 ms for each of them, a checkpoint has hundreds
            return
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.SVh, -bound, bound)
        if self.U.numel():
            nn.init.normal_(self.U, std=self.rank**-0.5)
        if self.A is not None and self.B is not None:
            nn.init.normal_(self.A, std=bound)
            nn.init.zeros_(self.B)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.pivots is not None:  # to_empty(), after building on meta, leaves it without values
            self.pivots.copy_(torch.arange(self.rank, device=self.pivots.device))

    @property
    def rank(self) -> int:
        return self.SVh.shape[0]

    @property
    def lora_rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def alpha(self) -> float:
        """The LoRA scale. Raises TypeError or ValueError when set to what no float32 holds."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        check_alpha(alpha)
        self._alpha = float(alpha)
        # Compiled code reads alpha here, from an input of its graph: it would be compiled anew for
        # each value of a float, and not at all from the ninth on.
        with torch.inference_mode(False):
            self._alpha_input = torch.tensor(self._alpha, dtype=torch.float64, device="cpu")

    @property
    def weight(self) -> Tensor:
        """W [N, K] = U SVh + alpha B A, computed from float64 products when an operation reads it
        (DenseWeight), in the base's dtype, with gradients for A and B. It is no parameter, and
        writing to it or setting it raises."""
        if torch.compiler.is_compiling():
            return self._dense_weight()
        trained = (t for t in (self.A, self.B) if t is not None)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in trained)
        kind: dict[str, Any] = {"dtype": self.SVh.dtype, "device": self.SVh.device}
        shape = (self.out_features, self.in_features)
        return DenseWeight(self._dense_weight, shape, requires_grad=needs_grad, **kind)

    def _dense_weight(self) -> Tensor:
        exact = reference.dense_weight(factors.in_float64(self._weights()))
        return exact.to(self.SVh.device, self.SVh.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "weight of an SVDLoRALinear is computed from SVh, U, A and B, so it can't be set: "
                "set these, or put an nn.Linear in its place"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        SVh, U = self.stored()
        A: Tensor | None = self.A
        B: Tensor | None = self.B
        if A is None or B is None:
            return self._op(x, SVh, U, bias=self.bias, pivots=self.pivots)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            B, alpha = B * self._alpha_input, 1.0
        else:
            alpha = self.alpha
        if A.dtype != self.SVh.dtype:
            A, B = A.to(self.SVh.dtype), B.to(self.SVh.dtype)
        if self.lora_dropout and self.training:
            y = self._op(x, SVh, U, bias=self.bias, pivots=self.pivots)
            return y + alpha * F.linear(F.linear(F.dropout(x, self.lora_dropout), A), B)
        return self._op(x, SVh, U, A, B, self.bias, alpha, self.pivots)

    def train(self, mode: bool = True) -> SVDLoRALinear:
        if not mode:  # in eval() a layer keeps its factors and nothing derived from them
            backends.forget(self.SVh)
        return super().train(mode)

    # ------------------------------------------------------------------------------- constructors

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
        seed: int | None = None,
    ) -> SVDLoRALinear:
        """linear [N, K] -> the layer with its best base of rank `rank`, its dtype and its bias.

        init: "next" makes the next lora_rank singular components the adapter, so that the layer is
        the best approximation of rank r + ra; "classic" makes A random and B zero, as does alpha=0.
        seed: of a random A; by default torch's generator draws it (torch.manual_seed).
        Raises TypeError if `linear` is no nn.Linear with a plain weight of float64, float32,
        bfloat16 or float16, ValueError naming any other wrong argument.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight
        _check_dense("linear.weight", weight)
        N, K = weight.shape
        factors.check_sizes(K, N, rank, lora_rank, form)
        factors.check_init(init)
        check_alpha(alpha)
        options: dict[str, Any] = {"bias": linear.bias, "alpha": alpha, "seed": seed}
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
        seed: int | None = None,
    ) -> SVDLoRALinear:
        """Plain LoRA: W [N, K] itself, shared, as a pivoted base of rank N; a classic adapter,
        drawn by `seed` or torch's generator."""
        A, B = factors.random_adapter(W.shape[0], W.shape[1], lora_rank, seed)
        kind: dict[str, Any] = {"device": W.device, "dtype": W.dtype}
        if lora_rank:
            A, B = A.to(**kind), B.to(**kind)
        U = torch.empty(0, len(W), **kind)
        pivots = torch.arange(len(W), device=W.device)
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
        seed: int | None = None,
    ) -> SVDLoRALinear:
        """U [N, R], SVh [R, K], components by falling weight -> the layer with the first `rank`
        of them as its base.

        init="next" makes the following components the adapter, each with |A row| = |alpha| |B
        column|; ranks beyond them get a random A, drawn by `seed` or torch's generator, and B zero.
        "classic" makes all of A and B so. dtype defaults to SVh's.
        """
        _check_dtype("dtype", dtype)
        options: dict[str, Any] = {"form": form, "init": init, "dtype": dtype, "seed": seed}
        weights = factors.truncated(U, SVh, rank, lora_rank, alpha=alpha, **options)
        return cls._from_weights(replace(weights, bias=bias), lora_dropout)

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
        return cls._from_weights(Weights(SVh, U, A, B, bias, alpha, pivots), lora_dropout)

    @classmethod
    def _from_weights(cls, weights: Weights, lora_dropout: float) -> SVDLoRALinear:
        check_shapes(weights.SVh.shape[-1], "K from SVh", weights)
        for name in ("SVh", "U", "A", "B"):
            tensor = getattr(weights, name)
            _check_dtype(name, None if tensor is None else tensor.dtype)
        if weights.U.dtype != weights.SVh.dtype:
            raise TypeError(f"U must have SVh's dtype {weights.SVh.dtype}, got {weights.U.dtype}")
        layer = cls(
            weights.in_features,
            weights.out_features,
            weights.rank,
            weights.lora_rank,
            bias=weights.bias is not None,
            alpha=weights.alpha,
            lora_dropout=lora_dropout,
            form="pair" if weights.pivots is None else "pivoted",
            device="meta",
        )
        layer._set_factors(weights)
        bias = weights.bias
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def _set_factors(self, weights: Weights) -> None:
        SVh, U, A, B, _, _, pivots = weights
        self.SVh = nn.Parameter(SVh, requires_grad=False)
        self.U = nn.Parameter(U, requires_grad=False)
        self.A = None if A is None else nn.Parameter(A)
        self.B = None if B is None else nn.Parameter(B)
        self.pivots = None if pivots is None else pivots.to(SVh.device, torch.int32)

    # ------------------------------------------------------------------ size, merging, the way back

    def parameter_count(self, merged: bool = True) -> int:
        """Parameters without bias: merged, as deployed at rank r + ra, or as they are now."""
        if merged:
            rank = self.rank + self.lora_rank
            rank = min(rank, self.in_features, self.out_features) if self.lora_rank else rank
            return factors.factor_count(rank, self.in_features, self.out_features, self.form)
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
        if self.A is not None:
            merged = factors.merged(self._weights())
            kind: dict[str, Any] = {"device": self.SVh.device, "dtype": self.SVh.dtype}
            merged.SVh = merged.SVh.to(**kind).contiguous()
            merged.U = merged.U.to(**kind).contiguous()
            self._set_factors(merged)
        return self

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear that computes the same, adapter included; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._dense_weight())
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def stored(self) -> tuple[Any, Any]:
        """SVh and U as the op takes them; a QuantizedMatrix where they are stored as codes."""
        return without_gradient(self.SVh), without_gradient(self.U)

    def _weights(self) -> Weights:
        return Weights(*self.stored(), self.A, self.B, self.bias, self.alpha, self.pivots)


SVD_LoRA_Linear = SVDLoRALinear


def without_gradient(factor: Tensor) -> Tensor:
    """SVh or U as the op wants it: a slice of a larger parameter, which requires grad as a whole,
    goes without. FSDP1 keeps all parameters of a model in one. All else that requires grad goes on
    to the op, which refuses it."""
    is_slice = not factor.is_leaf and factor._is_view() and isinstance(factor._base, nn.Parameter)
    return factor.detach() if is_slice else factor


def _check_dense(name: str, weight: Tensor) -> None:
    """Raise TypeError unless the weight is a plain tensor of floats."""
    if type(weight) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(weight).__name__}: a quantized or sharded"
            " weight has to be dequantized or gathered first"
        )
    if weight.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {weight.layout}")
    _check_dtype(name, weight.dtype)


def _check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype}")


def _check_dropout(lora_dropout: float) -> None:
    if not isinstance(lora_dropout, int | float) or isinstance(lora_dropout, bool):
        raise TypeError(f"lora_dropout must be a number, got {type(lora_dropout).__name__}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
