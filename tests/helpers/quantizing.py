"""Quantised matrices and layers with random codes; the bound on the error of a product."""

from __future__ import annotations

import torch
from helpers.checkpoints import build
from torch import Tensor, nn

from hylora_kernels.compression.quantize import quantize
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear, dense_weights
from hylora_kernels.reference import dequantize, quantized
from hylora_kernels.weights import QuantizedMatrix, Weights

N, K, R, RA = 48, 100, 16, 4
FORMS = ("dense", "pair", "SVh", "U", "pivoted")


def random_matrix(n: int, k: int, bits: int, seed: int = 0) -> QuantizedMatrix:
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // 64)
    codes = torch.randint(0, 2**bits, (n, k), generator=g)
    zeros = None if bits == 8 else torch.randint(0, 2**bits, (n, groups), generator=g)
    scales = (1 + torch.rand(n, groups, generator=g)) / 2**bits
    return quantized(codes, scales, zeros, bits)


def random_weights(form: str, bias: bool = False) -> Weights:
    """form: "dense"; "pair", both of it quantised; "SVh" or "U", a pair with that one quantised;
    "pivoted"."""
    torch.manual_seed(0)
    b = torch.randn(N) if bias else None
    if form == "dense":
        return dense_weights(random_matrix(N, K, 4), b)
    others = N - R if form == "pivoted" else N
    SVh = torch.randn(R, K) if form == "U" else random_matrix(R, K, 8 if form == "pivoted" else 5)
    U = torch.randn(others, R) if form == "SVh" else random_matrix(others, R, 6)
    pivots = torch.arange(0, N, 3, dtype=torch.int32) if form == "pivoted" else None
    return Weights(SVh, U, torch.randn(RA, K), torch.randn(N, RA), b, 0.5, pivots)


def dequantized(
    weights: Weights, dtype: torch.dtype = torch.float64, factors: bool = True
) -> Weights:
    """The same in tensors of dtype; with factors=False the codes stay codes."""

    def of(value):
        if isinstance(value, QuantizedMatrix):
            return dequantize(value, dtype) if factors else value
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to(dtype) if floating else value

    return Weights(*map(of, weights))


def moved(weights: Weights, device: str) -> Weights:
    """The same on a device."""

    def of(value):
        if isinstance(value, QuantizedMatrix):
            parts = map(of, (value.codes, value.scales, value.zeros))
            return QuantizedMatrix(*parts, value.bits, value.k)
        return value.to(device) if isinstance(value, Tensor) else value

    return Weights(*map(of, weights))


def quantized_model(name: str = "llama, tied", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model with dense linears in 4 bits, the first a pair in 5 and 8; its embedding, and
    the head if it is tied to it, in 6."""
    torch.manual_seed(0)
    model = build(name, rank=0).to(dtype)
    linears = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    head = model.get_output_embeddings()
    for path, linear in linears:
        if linear is head:
            continue
        weights = dense_weights(rounded(linear.weight, 4), linear.bias, dtype)
        if path == linears[0][0]:
            plain = SVDLoRALinear.from_linear(linear, 8, lora_rank=2)
            SVh, U = rounded(plain.SVh, 5), rounded(plain.U, 8)
            weights = Weights(SVh, U, plain.A, plain.B, linear.bias, 0.5)
        model.set_submodule(path, QuantizedLinear.from_weights(weights, dtype=dtype))
    embedding, new_head = QuantizedEmbedding.tied_pair(rounded(head.weight, 6), dtype=dtype)
    model.set_input_embeddings(embedding)
    if model.config.tie_word_embeddings:
        model.set_output_embeddings(new_head)
    return model.requires_grad_(False).eval()


def rounded(W: Tensor, bits: int) -> QuantizedMatrix:
    return quantize(W, bits, method="rtn")


def assert_as_exact_as_eager(y: Tensor, x, matrix, bias=None, h_a=None, B=None) -> None:
    """y is no further from float64 than twice what eager is on the dequantised matrix."""

    def formula(dtype):
        W = dequantize(matrix, dtype)
        given = [None if t is None else t.to(dtype) for t in (x, bias, h_a, B)]
        out = given[0] @ W.T
        out = out if bias is None else out + given[1]
        return out if h_a is None else out + given[2] @ given[3].T

    truth = formula(torch.float64)
    error = (y.double() - truth).abs().max()
    allowed = 2 * (formula(x.dtype).double() - truth).abs().max()
    # One rounding of the result, where the few numbers of eager happen to be exact.
    allowed = max(allowed, torch.finfo(x.dtype).eps / 2 * truth.abs().max())
    assert error <= allowed, f"{error:.2e}, {allowed:.2e} allowed"
