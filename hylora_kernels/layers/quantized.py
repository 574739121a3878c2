"""Layers whose frozen matrices are integer codes: QuantizedLinear and QuantizedEmbedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels import reference
from hylora_kernels.layers import factors
from hylora_kernels.layers.dense_weight import DenseWeight
from hylora_kernels.layers.grids import requantized
from hylora_kernels.layers.linear import SVDLoRALinear, without_gradient
from hylora_kernels.ops.checks import check_shapes
from hylora_kernels.ops.quantized import quantized_linear
from hylora_kernels.weights import GROUP, PLANES, QuantizedMatrix, Weights

QUANTIZABLE = ("SVh", "U")


class QuantizedFactor(nn.Module):
    """A QuantizedMatrix [n, k] as frozen parameters.

    codes:  uint8 [n, G, 8 bits] and zeros, uint8 [ceil(n G / 64), 8 bits] or None, as in it.
    scales: uint8 [n, G, 2], the bytes of its float16 scales.
    empty:  [0], of the dtype that the matrix is read in (`dtype`); .to(), .half() and mixed
            precision change this one.

    All numbers are bytes, so nothing that casts a model's floats rounds them, and NCCL, which has
    no 16-bit integers, sends them. They are parameters, since DistributedDataParallel broadcasts
    buffers in every forward but a frozen parameter only once, and since fully_shard divides
    parameters among processes but leaves each a copy of all buffers.
    """

    zeros: Tensor | None

    def __init__(
        self,
        n: int,
        k: int,
        bits: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A matrix of zeros. Raises ValueError for bits that the format doesn't have."""
        super().__init__()
        check_bits("bits", bits)
        groups = -(-k // GROUP)
        self.k, self.bits = k, bits
        self.codes = _bytes(n, groups, 8 * bits, device=device)
        self.scales = _bytes(n, groups, 2, device=device)
        self.zeros = _bytes(-(-n * groups // GROUP), 8 * bits, device=device) if bits < 8 else None
        self.empty = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

    @classmethod
    def of(cls, matrix: QuantizedMatrix, dtype: torch.dtype | None = None) -> QuantizedFactor:
        """It holds the matrix's own codes and zeros."""
        factor = cls(*matrix.shape, matrix.bits, device="meta")
        factor.matrix = matrix
        empty = torch.empty(0, device=matrix.codes.device, dtype=dtype)
        factor.empty = nn.Parameter(empty, requires_grad=False)
        return factor

    @property
    def matrix(self) -> QuantizedMatrix:
        scales = self.scales.view(torch.float16).squeeze(-1)
        return QuantizedMatrix(self.codes, scales, self.zeros, self.bits, self.k)

    @matrix.setter
    def matrix(self, matrix: QuantizedMatrix) -> None:
        if (matrix.shape, matrix.bits) != (self.shape, self.bits):
            raise ValueError(
                f"matrix must be {list(self.shape)} of {self.bits} bits, got"
                f" {list(matrix.shape)} of {matrix.bits}"
            )
        for name, value in stored_parts("", matrix).items():
            setattr(self, name[1:], nn.Parameter(value, requires_grad=False))

    @property
    def shape(self) -> torch.Size:
        """[n, k]."""
        return torch.Size((self.codes.shape[0], self.k))

    @property
    def dtype(self) -> torch.dtype:
        return self.empty.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(p.nbytes for p in self._parameters.values() if p is not None)

    def numel(self) -> int:
        """n k, the weights that the codes stand for."""
        return self.shape.numel()

    def dequantize(self) -> Tensor:
        """[n, k], in `dtype`."""
        return reference.dequantize(self.matrix, self.dtype)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, bits={self.bits}, dtype={self.dtype}"


class QuantizedLinear(SVDLoRALinear):
    """x [..., K] -> y [..., N] = x SVh^T U^T + bias + alpha x A^T B^T, as SVDLoRALinear.

    SVh, U: of each either a QuantizedFactor or a frozen parameter, one at least quantised. A dense
            weight is the pivoted form at rank N: SVh is the matrix [N, K], U the empty parameter.
    bits:   {"SVh": bits} or {"SVh": bits, "U": bits}, of those that are quantised.

    A, B, bias, alpha and all else are SVDLoRALinear's. A forward and a backward make the matrices
    from their codes and keep none of them, so training A and B on top takes the codes' memory.
    Raises ValueError or TypeError naming the argument.

    Example:
        from hylora_kernels.compression.quantize import quantize
        from hylora_kernels.layers.quantized import dense_weights

        matrix = quantize(torch.randn(48, 64), bits=4, method="rtn")
        layer = QuantizedLinear.from_weights(dense_weights(matrix))
        y = layer(torch.randn(2, 64))  # [2, 48]
    """

    SVh: Any
    U: Any
    merge_error: float | None = None  # |W made - W wanted| / |W wanted| of the last merge()
    _op = staticmethod(quantized_linear)

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
        *,
        bits: Mapping[str, int],
    ) -> None:
        _check_all_bits(bits)
        super().__init__(
            *(in_features, out_features, rank, lora_rank, bias, alpha, lora_dropout, form),
            device=device,
            dtype=dtype,
        )
        for name, width in bits.items():
            random = getattr(self, name)
            self._put(name, QuantizedFactor(*random.shape, width, device, dtype))
            if not random.is_meta and random.numel():
                getattr(self, name).matrix = requantized(random, width)
        if form == "pivoted" and rank == out_features:
            # They are 0 .. N - 1. A checkpoint of SmolLM2 in 80 MB would hold 0.8 MB of them.
            pivots = torch.arange(rank, dtype=torch.int32, device="cpu")
            self.register_buffer("pivots", pivots, persistent=False)

    def reset_parameters(self) -> None:
        """As SVDLoRALinear's, SVh and U rounded."""
        if not self.bits:  # the constructor's call, which comes before there are codes
            super().reset_parameters()
            return
        sizes = (self.in_features, self.out_features, self.rank, self.lora_rank)
        kind: dict[str, Any] = {"device": self.SVh.device, "dtype": self.SVh.dtype}
        has_bias = self.bias is not None
        fresh = QuantizedLinear(*sizes, has_bias, form=self.form, bits=self.bits, **kind)
        self.load_state_dict(fresh.state_dict())

    @classmethod
    def from_weights(
        cls, weights: Weights, lora_dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> QuantizedLinear:
        """The layer that holds these very tensors; SVh, U or both are a QuantizedMatrix.

        dtype: that of its inputs and outputs; by default that of what isn't quantised (SVh, U,
               the bias), else torch's default.
        """
        check_shapes(weights.in_features, "K from SVh", weights)
        bits = {n: m.bits for n, m in _matrices(weights) if isinstance(m, QuantizedMatrix)}
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
            bits=bits,
        )
        plain = (weights.SVh, weights.U, weights.bias)
        found = [t.dtype for t in plain if isinstance(t, Tensor)]
        layer._set_factors(weights, dtype or next(iter(found), torch.get_default_dtype()))
        bias = weights.bias
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def _set_factors(self, weights: Weights, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or self.SVh.dtype
        for name, matrix in _matrices(weights):
            if isinstance(matrix, QuantizedMatrix):
                self._put(name, QuantizedFactor.of(matrix, dtype))
            else:
                self._put(name, nn.Parameter(matrix.to(dtype), requires_grad=False))
        self.A = None if weights.A is None else nn.Parameter(weights.A)
        self.B = None if weights.B is None else nn.Parameter(weights.B)
        pivots = weights.pivots
        self.pivots = None if pivots is None else pivots.to(self.SVh.device, torch.int32)

    def _put(self, name: str, value: nn.Parameter | QuantizedFactor) -> None:
        if isinstance(value, nn.Module) and name in self._parameters:
            delattr(self, name)  # nn.Module refuses a module in the place of a parameter
        setattr(self, name, value)

    def stored(self) -> tuple[Any, Any]:
        SVh, U = (
            m.matrix if isinstance(m, QuantizedFactor) else without_gradient(m)
            for m in (self.SVh, self.U)
        )
        return SVh, U

    def _weights(self) -> Weights:
        weights = super()._weights()
        weights.SVh, weights.U = map(self._dequantized, (weights.SVh, weights.U))
        return weights

    def _dequantized(self, matrix: Tensor | QuantizedMatrix) -> Tensor:
        if isinstance(matrix, QuantizedMatrix):
            return reference.dequantize(matrix, self.SVh.dtype)
        return matrix

    def train(self, mode: bool = True) -> QuantizedLinear:
        return nn.Module.train(self, mode)  # no backend keeps anything of matrices made for a call

    @torch.no_grad()
    def merge(self, requantize: bool = True) -> QuantizedLinear:
        """Fold the adapter into the base at rank r + ra and round that to the same bits; the same
        layer, with the error that this made in merge_error.

        requantize=False keeps the adapter. Rounding loses what quantising with error feedback won,
        and an adapter much smaller than the steps between codes: see merge_error.
        """
        if self.A is None or not requantize:
            return self
        bits, old = self.bits, dict(zip(QUANTIZABLE, self.stored(), strict=True))
        exact = factors.merged(self._weights())
        kind: dict[str, Any] = {"device": self.SVh.device, "dtype": self.SVh.dtype}
        merged = replace(exact)
        for name, matrix in _matrices(exact):
            if name in bits and matrix.numel():
                same = old[name] if old[name].shape == matrix.shape else None
                value = requantized(matrix.to(kind["device"]), bits[name], same)
            else:
                value = matrix.to(**kind).contiguous()
            setattr(merged, name, value)
        self._set_factors(merged)
        W = reference.dense_weight(exact)
        made = reference.dense_weight(factors.in_float64(self._weights()))
        self.merge_error = float((made - W).norm() / W.norm())
        return self

    def with_adapter(
        self,
        lora_rank: int,
        alpha: float = 1.0,
        lora_dropout: float = 0.0,
        seed: int | None = None,
    ) -> QuantizedLinear:
        """A layer on the same frozen matrices, pivots and bias with a new adapter: A random by
        `seed`, B zero."""
        factors.check_sizes(self.in_features, self.out_features, self.rank, lora_rank, self.form)
        A, B = factors.random_adapter(self.out_features, self.in_features, lora_rank, seed)
        kind: dict[str, Any] = {"device": self.SVh.device, "dtype": self.SVh.dtype}
        A, B = (None if t is None else t.to(**kind) for t in (A, B))
        weights = Weights(*self.stored(), A, B, self.bias, alpha, self.pivots)
        layer = QuantizedLinear.from_weights(weights, lora_dropout, kind["dtype"])
        for name in QUANTIZABLE:
            layer._put(name, getattr(self, name))
        layer.bias = self.bias
        return layer.train(self.training)

    @property
    def bits(self) -> dict[str, int]:
        return {name: f.bits for name, f in self._modules.items() if name in QUANTIZABLE}


class QuantizedEmbedding(nn.Module):
    """ids int64 [...] -> rows [..., d] of E.

    matrix: QuantizedFactor [V, d], one row a token.
    bits:   {"matrix": bits}.

    An output head tied to it is a QuantizedLinear that holds the same QuantizedFactor as its SVh.
    Raises ValueError or TypeError naming the argument.

    Example:
        from hylora_kernels.compression.quantize import quantize

        matrix = quantize(torch.randn(100, 64), bits=6, method="rtn")
        embedding, head = QuantizedEmbedding.tied_pair(matrix)
        rows = embedding(torch.arange(3))  # [3, 64]
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: Mapping[str, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_all_bits(bits, ("matrix",))
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.matrix = QuantizedFactor(num_embeddings, embedding_dim, bits["matrix"], device, dtype)

    @classmethod
    def of(cls, matrix: QuantizedMatrix, dtype: torch.dtype | None = None) -> QuantizedEmbedding:
        embedding = cls(*matrix.shape, {"matrix": matrix.bits}, device="meta")
        embedding.matrix = QuantizedFactor.of(matrix, dtype)
        return embedding

    @classmethod
    def tied_pair(
        cls,
        matrix: QuantizedMatrix,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[QuantizedEmbedding, QuantizedLinear]:
        """matrix [V, d], the head's bias [V] -> (embedding, output head) with one QuantizedFactor.
        dtype: of both, by default torch's."""
        embedding = cls.of(matrix, dtype)
        head = QuantizedLinear.from_weights(dense_weights(matrix, bias, embedding.matrix.dtype))
        head.SVh = embedding.matrix
        return embedding, head

    @property
    def weight(self) -> Tensor:
        """E [V, d], computed when an operation reads it (DenseWeight); it is no parameter."""
        kind: dict[str, Any] = {"dtype": self.matrix.dtype, "device": self.matrix.device}
        return DenseWeight(self.matrix.dequantize, tuple(self.matrix.shape), **kind)

    def forward(self, ids: Tensor) -> Tensor:
        return reference.dequantize(rows_of(self.matrix.matrix, ids), self.matrix.dtype).unflatten(
            0, ids.shape
        )

    @property
    def bits(self) -> dict[str, int]:
        return {"matrix": self.matrix.bits}

    def parameter_count(self) -> int:
        """V d, which a tied head adds nothing to."""
        return self.matrix.numel()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def dense_weights(
    W: QuantizedMatrix, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Weights:
    """W [N, K] as the base of a layer: the pivoted form at rank N, its empty U of dtype `dtype`."""
    N, device = W.shape[0], W.codes.device
    pivots = torch.arange(N, dtype=torch.int32, device=device)
    U = torch.empty(0, N, dtype=dtype, device=device)
    return Weights(W, U, bias=bias, pivots=pivots)


def rows_of(matrix: QuantizedMatrix, ids: Tensor) -> QuantizedMatrix:
    """The rows `ids` [...] of the matrix, flat, as a matrix."""
    ids, zeros = ids.flatten(), matrix.zeros
    if zeros is not None:
        zeros = reference.pack_zero_points(reference.zero_points(matrix)[ids], matrix.bits)
    return QuantizedMatrix(matrix.codes[ids], matrix.scales[ids], zeros, matrix.bits, matrix.k)


def stored_parts(name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """Name in a state_dict -> tensor, for the matrix as the QuantizedFactor `name` of a layer."""
    scales = matrix.scales.contiguous()[..., None].view(torch.uint8)
    parts = {"codes": matrix.codes, "scales": scales, "zeros": matrix.zeros}
    return {f"{name}.{part}": value for part, value in parts.items() if value is not None}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module holds itself, those of its QuantizedFactors too, by name."""
    found = {name: p for name, p in module._parameters.items() if p is not None}
    for child, factor in module.named_children():
        if isinstance(factor, QuantizedFactor):
            found |= {f"{child}.{n}": p for n, p in factor._parameters.items() if p is not None}
    return found


def check_bits(name: str, bits: object) -> None:
    if type(bits) is not int or bits not in PLANES:
        raise ValueError(f"{name} must be one of {tuple(PLANES)}, got {bits!r}")


def _check_all_bits(bits: Mapping[str, int], names: tuple[str, ...] = QUANTIZABLE) -> None:
    if not isinstance(bits, Mapping) or not bits or not set(bits) <= set(names):
        raise ValueError(f"bits must be a mapping from {' or '.join(names)}, got {bits!r}")
    for name, width in bits.items():
        check_bits(f"bits of {name}", width)


def _matrices(weights: Weights) -> tuple[tuple[str, Tensor | QuantizedMatrix], ...]:
    return ("SVh", weights.SVh), ("U", weights.U)


def _bytes(*shape: int, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.uint8, device=device), requires_grad=False)
