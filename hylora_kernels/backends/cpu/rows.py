"""The row operations of a decoder block on tensors: what stands between its layers.

csrc/cpu/row_calls.h says what each computes. They take float32, bfloat16 and float16, compute in
float32 and round once; none has a gradient. The decoder runs the same kernels without these ops.
"""

from __future__ import annotations

from torch import Tensor

from hylora_kernels.backends.cpu.library import op


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: int,
    *,
    scale: float,
    first_key: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    pieces: int = 1,
) -> Tensor:
    """Causal attention of the last `queries` of `keys` slots of a cache.

    q:         [sequences, queries, heads, head_size].
    k, v:      [sequences, kv_heads, slots, head_size] and [..., value_size], where kv_heads divides
               heads.
    first_key: int64 [sequences], the first slot that is no padding; None: 0.
    window:    keys that a query sees at most, its own among them; 0: all.
    pieces:    parts that the keys are cut into, for several threads.

    Returns [sequences, queries, heads, value_size]."""
    return op("attention")(q, k, v, first_key, keys, window, scale, softcap, pieces)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    heads: int = 1,
    centers: bool = False,
    rounds_first: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """RMSNorm, or LayerNorm if it centers, of each of `heads` parts of x's rows.

    x, residual:  [..., heads * width].
    weight, bias: float32 [width].
    rounds_first: the normalised row is rounded to x's dtype before the weight multiplies it.

    Returns (y, residual + scale * x), where y is the norm of that sum; without a residual y is the
    norm of x, and the sum is empty."""
    return op("norm")(x, heads, weight, bias, eps, centers, rounds_first, residual, scale)


def rotary(
    x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False
) -> None:
    """Rotary embedding of x into y, which may be x or a part of a cache.

    x, y:      [sequences, rows, heads, size]; numbers behind the first rotary_size are copied.
    cos, sin:  float32 [positions, rotary_size / 2], each angle once.
    positions: int64 [sequences, rows]."""
    op("rotary")(x, y, cos, sin, positions, interleaved)


def activation(x: Tensor, name: str, up: Tensor | None = None, softcap: float = 0.0) -> Tensor:
    """activation(x), times up if given, both [..., columns]. `name` is silu, gelu, gelu_tanh, relu,
    or softcap: softcap * tanh(x / softcap)."""
    return op("activation")(x, up, name, softcap)


def add(a: Tensor | None, b: Tensor, scale: float = 1.0) -> Tensor:
    """a + scale * b, where a scale other than 1 rounds scale * b first; scale * b without a."""
    return op("add")(a, b, scale)


def argmax(x: Tensor, pieces: int = 1) -> Tensor:
    """x [..., columns] -> int64 [...]: the first column of the greatest number, or of a NaN."""
    return op("argmax")(x, pieces)
