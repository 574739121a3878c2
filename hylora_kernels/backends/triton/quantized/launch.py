"""From tensors to launches, and the ops that hide them from torch.compile.

Up to 16 rows are one launch of the C++ kernel where the library has it for the device: on an H200
it takes 0.5 to 0.8 of the time of the one of kernels.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.backends.shared import counters, quantized_gpu
from hylora_kernels.backends.shared.gpu import on_device
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.backends.triton.config import FUSION
from hylora_kernels.backends.triton.quantized.config import (
    DEQUANTIZE,
    Dequantize,
    Problem,
    QuantizedConfig,
    default_config,
)
from hylora_kernels.weights import GROUP, QuantizedMatrix

# Numbers of W that are dequantised at once, 128 MiB in half precision. The allocator gives the next
# matrix the same block, in a CUDA graph's own memory too, so this bounds the workspace of a model.
MOST_DEQUANTIZED = 2**26
ROWS, GROUPS = 16, 8  # of W that a program dequantises: 128 bytes at a time go to each row

_LIBRARY = torch.library.Library("hylora", "FRAGMENT")
_LIBRARY.define(
    "triton_quantized_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, int bits, "
    "Tensor? h_a, Tensor? B, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "triton_quantized_rows(Tensor ids, Tensor words, Tensor scales, Tensor? zeros, int bits, "
    "SymInt k, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """A QuantizedMatrix [n, k] as the kernels take it.

    words:  int32 [n, G, 2 bits]: its codes, the same memory unless that is not aligned to 16 bytes.
    scales: float16 [n, G].
    zeros:  uint8 [n, G], a byte each: unpacking them in the loop would take 0.6 instructions a code
            more for 1.5 % fewer bytes; None at 8 bits.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    k: int

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> Words:
        n, groups = matrix.scales.shape
        zeros = matrix.zeros
        if zeros is not None:
            flat = reference.unpack_bits(zeros.detach(), matrix.bits).reshape(-1)
            zeros = flat[: n * groups].reshape(n, groups).clone()
        words = _aligned(matrix.codes.detach()).view(torch.int32)
        return cls(words, _aligned(matrix.scales.detach()), zeros, matrix.bits, matrix.k)

    @property
    def matrix(self) -> QuantizedMatrix:
        """The matrix again, its codes and scales in the same memory."""
        zeros = self.zeros
        if zeros is not None:
            flat = F.pad(zeros.reshape(-1), (0, -zeros.numel() % GROUP)).reshape(-1, GROUP)
            zeros = reference.pack_bits(flat, self.bits)
        return QuantizedMatrix(self.words.view(torch.uint8), self.scales, zeros, self.bits, self.k)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.words, self.scales, self.zeros) if t is not None]


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and starting on 16 bytes, which the kernels load at once."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


# -------------------------------------------------------------------------------------- the product


def linear(
    x: Tensor,
    W: Words,
    bias: Tensor | None = None,
    h_a: Tensor | None = None,
    B: Tensor | None = None,
) -> Tensor:
    """x [..., K] -> y [..., N] = x W^T + h_a B^T + bias, in x's dtype.

    h_a [..., ra] and B [N, ra], or both None.
    """
    given = (x, W.words, W.scales, W.zeros, W.bits, h_a, B, bias)
    if torch.compiler.is_compiling():
        return torch.ops.hylora.triton_quantized_linear.default(*given)
    return _linear(*given)


def _linear(x, words, scales, zeros, bits, h_a, B, bias) -> Tensor:
    if target := quantized_gpu.target_for(x, h_a, B, bias):
        return quantized_gpu.LAUNCH(x, words, scales, zeros, bits, h_a, B, bias, *target)
    K, N = x.shape[-1], len(words)
    flat = x.reshape(-1, K)
    h_a = None if h_a is None else h_a.reshape(-1, h_a.shape[-1])
    lora_rank = 0 if h_a is None else h_a.shape[1]
    problem = Problem(len(flat), K, N, bits, lora_rank, x.dtype)
    config = config_for(problem, x.device)
    W = Words(words, scales, zeros, bits, K)
    with on_device(x.device):
        if isinstance(config, Dequantize):
            y = dequantized_product(flat, W, bias)
            if lora_rank:
                y.addmm_(h_a, B.T)
        else:
            given = (h_a, B) if lora_rank else (None, None)
            y = product(flat, W, bias, *given, problem, config)
    return y.reshape(*x.shape[:-1], N) if x.dim() != 2 else y


def config_for(problem: Problem, device: torch.device) -> QuantizedConfig | Dequantize:
    """The config that serves a call on a device."""
    return _default(problem, dispatch.target_of(device)) if problem.M else DEQUANTIZE


_default = functools.lru_cache(maxsize=4096)(default_config)


def product(
    x: Tensor,
    W: Words,
    bias: Tensor | None,
    h_a: Tensor | None,
    B: Tensor | None,
    problem: Problem,
    config: QuantizedConfig,
) -> Tensor:
    """One launch: x [M, K] -> y [M, N] = x W^T + h_a B^T + bias."""
    from hylora_kernels.backends.triton.launch import run  # imports triton, as _kernels() does

    if x.stride(1) != 1:
        x = x.contiguous()
    tiles, partial, zeros = config.tiles(problem), None, None
    if config.split > 1:
        cells = tiles * config.split * config.BM * config.BN
        partial = x.new_empty(cells, dtype=torch.float32)
        zeros = counters.zeros(x.device, tiles)
    y = x.new_empty(problem.M, problem.N)
    run(
        _kernels().product,
        tiles * config.split,
        zeros,
        X=x,
        Words=W.words,
        Scales=W.scales,
        Zeros=W.zeros,
        Bias=bias,
        Ha=None if h_a is None else h_a.contiguous(),
        B=B,
        Y=y,
        Partial=partial,
        **{"M": problem.M, "K": problem.K, "N": problem.N, "G": problem.groups},
        **{"lora_rank": problem.lora_rank, "x_m": x.stride(0), "BITS": problem.bits},
        **{"SPLIT": config.split, "BM": config.BM, "BN": config.BN, "BJ": 32},
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


# ------------------------------------------------------------------------------------- dequantising


def dequantized_product(x: Tensor, W: Words, bias: Tensor | None) -> Tensor:
    """y [M, N] by torch's product, on at most MOST_DEQUANTIZED numbers of W at a time."""
    N, step = len(W.words), max(1, MOST_DEQUANTIZED // W.k)
    if step >= N:
        return F.linear(x, dequantize(W, x.dtype, 0, N), bias)
    y = x.new_empty(len(x), N)
    for first in range(0, N, step):
        last = min(first + step, N)
        part, out = dequantize(W, x.dtype, first, last - first).T, y[:, first:last]
        if bias is None:
            torch.mm(x, part, out=out)
        else:
            torch.addmm(bias[first:last], x, part, out=out)
    return y


def dequantize(
    W: Words, dtype: torch.dtype, first: int = 0, count: int = 0, ids: Tensor | None = None
) -> Tensor:
    """Rows of W [count, K] in one launch: `count` from `first` on, or those of ids int64 [count],
    which must be within [0, n)."""
    count, (n, groups) = count if ids is None else len(ids), W.scales.shape
    out = W.scales.new_empty(count, W.k, dtype=dtype)
    if not out.numel():
        return out
    _kernels().dequantize[(-(-count // ROWS) * -(-groups // GROUPS),)](
        Words=W.words,
        Scales=W.scales,
        Zeros=W.zeros,
        Ids=ids,
        Out=out,
        **{"first": first, "count": count, "N": n, "K": W.k, "G": groups},
        **{"BITS": W.bits, "BN": ROWS, "GROUPS": GROUPS},
        **FUSION,
    )
    return out


def rows(ids: Tensor, W: Words, dtype: torch.dtype) -> Tensor:
    """ids [...] of an integer dtype -> rows of W [..., k]; NaN for an id outside of [0, n)."""
    given = (ids, W.words, W.scales, W.zeros, W.bits, W.k, dtype)
    if torch.compiler.is_compiling():
        return torch.ops.hylora.triton_quantized_rows.default(*given)
    return _rows(*given)


def _rows(ids, words, scales, zeros, bits, k, dtype) -> Tensor:
    flat, W = ids.reshape(-1).long().contiguous(), Words(words, scales, zeros, bits, k)
    with on_device(ids.device):
        return dequantize(W, dtype, ids=flat).reshape(*ids.shape, k)


# ---------------------------------------------------------------------------------------------- ops


def _fake_linear(x, words, scales, zeros, bits, h_a, B, bias) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(words))


def _fake_rows(ids, words, scales, zeros, bits, k, dtype) -> Tensor:
    return ids.new_empty(*ids.shape, k, dtype=dtype)


for _name, _kernel, _fake in (
    ("triton_quantized_linear", _linear, _fake_linear),
    ("triton_quantized_rows", _rows, _fake_rows),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hylora::{_name}", _fake, lib=_LIBRARY)


@functools.cache
def _kernels():
    """kernels.py, which imports triton: the package doesn't need it before the first launch."""
    from hylora_kernels.backends.triton.quantized import kernels

    return kernels
