"""What a decoder is made of, as a backend that computes it whole needs to know: layers by their
packed weights, everything between them by numbers.

    hidden += attention_scale * norm(attention(norm(hidden)))
    hidden += mlp_scale * norm(mlp(norm(hidden)))           for each block
    logits = softcap(logit_scale * head(norm(hidden)))

A norm that is None is left out. In a parallel block the MLP reads the block's input, too; without a
norm of its own, what attention_norm has made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerForm:
    """packed: what backends.pack made of the weights. bias: [N] or None."""

    packed: Any
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class NormForm:
    """norm(x) * weight + bias over rows of `width` numbers; weight and bias float32 or None.

    rounds_first: norm(x) is rounded to the model's dtype before weight multiplies it.
    """

    kind: Literal["rms", "layer"]
    width: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    rounds_first: bool


@dataclass(frozen=True, eq=False)
class HeadsForm:
    """`count` heads of `size` numbers in a row of the projections, the first at `column`, the
    others `stride` apart. norm: of each head, or, if it is so wide, of all of them as one row."""

    count: int
    size: int
    column: int
    stride: int
    norm: NormForm | None = None


@dataclass(frozen=True, eq=False)
class RotaryForm:
    """pairs: the two numbers that an angle turns, i and i + size / 2 or 2 i and 2 i + 1. cos and
    sin: float32 [positions, size / 2]."""

    pairs: Literal["halves", "interleaved"]
    cos: Tensor
    sin: Tensor

    @property
    def size(self) -> int:
        return 2 * self.cos.shape[1]


@dataclass(frozen=True, eq=False)
class BlockForm:
    """projections: q, k and v, or one layer that makes all of them. window: keys that a query sees,
    0 for all. softcap: of scores, 0 for none. up: gate and up, or one layer that makes both, or up
    alone. The activation is of the `inner` columns from gate_column on; they are multiplied by
    those from up_column on, if there are any."""

    attention_norm: NormForm | None
    projections: tuple[LayerForm, ...]
    q: HeadsForm
    k: HeadsForm
    v: HeadsForm
    rotary: RotaryForm | None
    window: int
    scale: float
    softcap: float
    output: LayerForm
    attention_post_norm: NormForm | None
    attention_scale: float
    parallel: bool
    mlp_norm: NormForm | None
    up: tuple[LayerForm, ...]
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    inner: int
    gate_column: int
    up_column: int | None
    down: LayerForm
    mlp_post_norm: NormForm | None
    mlp_scale: float


@dataclass(frozen=True, eq=False)
class DecoderForm:
    """width: of hidden. positions: of the rotary tables, 0 if no block has any.

    embedding: rows of a packed matrix or of a tensor [words, width]; None: another one, whose
    module the caller has to run. embedding_scale: what its rows are multiplied by.
    """

    width: int
    positions: int
    blocks: tuple[BlockForm, ...]
    final_norm: NormForm | None
    head: LayerForm
    logit_scale: float
    logit_softcap: float
    embedding: LayerForm | Tensor | None
    embedding_scale: float
