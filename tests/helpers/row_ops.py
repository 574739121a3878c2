"""The row operations as torch computes them: in float64 for the truth, in a model's dtype for the
error that a kernel may have twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class AttentionCase:
    """One call. Slots that no query sees hold NaN."""

    keys: int = 33
    size: int = 64
    value_size: int = 0  # 0: size
    kv_heads: int = 2
    group: int = 3
    queries: int = 1
    first_key: tuple[int, ...] | None = None
    sequences: int = 1
    window: int = 0
    softcap: float = 0.0
    pieces: int = 1
    magnitude: float = 1.0  # of q: scores are about as large
    spare: int = 5  # slots of the cache behind the keys
    heads_apart: bool = True  # the cache is [.., heads, slots, size]; else [.., slots, heads, size]

    @property
    def scale(self) -> float:
        return self.size**-0.5

    def draw(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q [sequences, queries, heads, size] as a part of wider rows, k, v with spare slots."""
        random = torch.Generator().manual_seed(seed)
        value_size, heads = self.value_size or self.size, self.kv_heads * self.group

        def tensor(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        def cache(size):
            slots = self.keys + self.spare
            if self.heads_apart:
                return tensor(self.sequences, self.kv_heads, slots, size)
            return tensor(self.sequences, slots, self.kv_heads, size).transpose(1, 2)

        rows = tensor(self.sequences, self.queries, 7 + heads * self.size) * self.magnitude
        q = rows[..., 7:].unflatten(-1, (heads, self.size))
        k, v = cache(self.size), cache(value_size)
        for sequence, seen in enumerate(self.seen().any(1)):
            for tensor_ in (k, v):
                tensor_[sequence, :, : self.keys][:, ~seen] = float("nan")
                tensor_[sequence, :, self.keys :] = float("nan")
        return q, k, v

    def seen(self) -> Tensor:
        """bool [sequences, queries, keys]."""
        slots = torch.arange(self.keys)
        own = torch.arange(self.keys - self.queries, self.keys)[:, None]
        seen = slots <= own
        if self.window:
            seen &= slots > own - self.window
        first = torch.tensor(self.first_key or (0,) * self.sequences)
        return seen & (slots >= first[:, None, None])


def attention(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in the tensors' dtype, softmax in float32 or float64, zeros where a query sees
    nothing."""
    seen = case.seen()[:, None]
    k, v = (t[:, :, : case.keys].nan_to_num(0.0).repeat_interleave(case.group, 1) for t in (k, v))
    scores = q.transpose(1, 2) @ k.mT * case.scale
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    softmax_in = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=softmax_in).to(q.dtype) * seen
    return (weights @ v).transpose(1, 2)


def norm(x, weight, bias, eps, centers, rounds_first) -> Tensor:
    """As transformers' norms: float32 (float64 of float64) inside, rounded at one point or two."""
    inside = x.to(torch.promote_types(x.dtype, torch.float32))
    if centers:
        inside = inside - inside.mean(-1, keepdim=True)
    inside = inside * torch.rsqrt(inside.square().mean(-1, keepdim=True) + eps)
    if rounds_first:
        inside = inside.to(x.dtype)
    if weight is not None:
        inside = inside * weight.to(inside.dtype)
    if bias is not None:
        inside = inside + bias.to(inside.dtype)
    return inside.to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x cos + rotate(x) sin in x's dtype."""
    rotary_size = 2 * cos.shape[1]
    turned, rest = x[..., :rotary_size], x[..., rotary_size:]
    cos, sin = (table.to(x.dtype)[positions][:, :, None] for table in (cos, sin))
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        a, b = turned[..., ::2], turned[..., 1::2]
        rotated = torch.stack((-b, a), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = turned.chunk(2, -1)
        rotated = torch.cat((-b, a), -1)
    return torch.cat((turned * cos + rotated * sin, rest), -1)
