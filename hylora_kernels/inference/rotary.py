"""What a model gives to all its blocks: tables of rotary embeddings, and masks with windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from hylora_kernels.backends.shared.decoder_form import RotaryForm
from hylora_kernels.inference.watch import Blocks, NotRecognised, arguments_of_blocks

_CHUNK = 512  # positions that are asked for at once


@dataclass
class Table:
    """cos and sin [positions, size] as the model gives them to a block."""

    cos: Tensor
    sin: Tensor

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Each angle once, float32: the model has them twice, one half behind the other or side by
        side, or once."""
        half = self.cos.shape[1] // 2
        for once in (lambda t: t[:, :half], lambda t: t[:, ::2]):
            twice = (torch.cat((once(t), once(t)), 1) for t in (self.cos, self.sin))
            doubled = (once(t).repeat_interleave(2, 1) for t in (self.cos, self.sin))
            if _equal(twice, (self.cos, self.sin)) or _equal(doubled, (self.cos, self.sin)):
                return tuple(once(t).float().contiguous() for t in (self.cos, self.sin))  # type: ignore[return-value]
        return self.cos.float(), self.sin.float()

    @property
    def forms(self) -> list[RotaryForm]:
        return [RotaryForm(pairs, *self.angles) for pairs in ("halves", "interleaved")]  # type: ignore[arg-type]


def _equal(found: Any, wanted: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def rotated(x: Tensor, rotary: RotaryForm) -> Tensor:
    """x [tokens, heads, size] with its first rotary.size columns turned."""
    half = rotary.size // 2
    cos, sin = (t[: len(x), None].to(x.dtype) for t in (rotary.cos, rotary.sin))
    if rotary.size > x.shape[-1]:
        raise NotRecognised("its rotary embeddings are wider than a head")
    turned, rest = x[..., : rotary.size], x[..., rotary.size :]
    if rotary.pairs == "halves":
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned, rest), -1)


def tables_of(blocks: Blocks, count: int) -> list[Table]:
    """The tables that the blocks get for the first `count` positions, each once."""
    chunks: list[list[Table]] = []
    for first in range(0, count, _CHUNK):
        found: dict[int, Table] = {}
        size = min(_CHUNK, count - first)
        for arguments in arguments_of_blocks(blocks, size, first):
            table = _table_among(arguments, size)
            if table is not None:
                found.setdefault(id(table[0]), Table(*(t[0] for t in table)))
        chunks.append(list(found.values()))
    return [
        Table(torch.cat([t.cos for t in parts]), torch.cat([t.sin for t in parts]))
        for parts in zip(*chunks, strict=True)
    ]


def table_of(arguments: list[Any], tables: list[Table]) -> int | None:
    """The number of the table that a block got in a forward."""
    for table in _pairs_among(arguments):
        for number, known in enumerate(tables):
            count = min(len(known.cos), table[0].shape[1])
            if torch.equal(table[0][0, :count], known.cos[:count]):
                return number
    return None


def _table_among(arguments: list[Any], count: int) -> tuple[Tensor, Tensor] | None:
    return next((t for t in _pairs_among(arguments) if t[0].shape[1] == count), None)


def _pairs_among(arguments: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors [1, positions, size]."""
    return [
        tuple(value)
        for value in arguments
        if isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(t, Tensor) and t.dim() == 3 and len(t) == 1 for t in value)
        and value[0].shape == value[1].shape
    ]


class _Filled(DynamicLayer):
    """A cache layer that says that it holds `count` tokens."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def get_seq_length(self, *args: Any) -> int:
        return self.count


def windows_of(blocks: Blocks, limit: int) -> list[int]:
    """How many keys a query of each block sees, 0 for all: read off the masks of single queries
    behind so many keys that any window below `limit` shows."""
    seen = []
    for behind in (limit - 1, max(limit - 3, 1)):
        cache = Cache(layers=[_Filled(behind) for _ in blocks.modules])
        arguments = arguments_of_blocks(blocks, 1, behind, cache)
        seen.append([_window(values, behind + 1) for values in arguments])
    if seen[0] != seen[1]:
        raise NotRecognised("the keys that a query sees are no window of one size")
    return seen[0]


def _window(arguments: list[Any], keys: int) -> int:
    for mask in arguments:
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
            visible = mask[0, 0, 0]
            count = int(visible.sum())
            if not bool(visible[len(visible) - count :].all()):
                raise NotRecognised("the keys that a query sees are not the last ones")
            return 0 if count == keys else count
    raise NotRecognised("its blocks get no mask")
