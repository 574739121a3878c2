"""Mixes: blocks of tokens from several sources, so many of each.

A compressed model loses what its calibration text lacks (perplexity on code 3.4 times the dense
model's after calibration on prose alone, 1.2 times with code in the mix). So a user's text is read
with two more that need nobody's data: what the model itself writes, and the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hylora_kernels.model.context import check_context
from hylora_kernels.support.console import note
from hylora_kernels.text.blocks import BLOCKS, token_blocks
from hylora_kernels.text.sources import (
    SELF,
    STDLIB,
    Mix,
    Source,
    is_mix,
    is_same,
    may_have_columns,
    shown,
    source_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = {SELF: 2, STDLIB: 4}  # Blocks of a user's text for one of these.
PARTS = ("calibration", "recovery")


@dataclass(frozen=True)
class Part:
    """The blocks of one source in a mix. asked: the blocks wanted; a short text has fewer."""

    name: str
    blocks: int
    tokens: int
    asked: int

    def __str__(self) -> str:
        of = f" of {self.asked} asked for" if self.blocks < self.asked else ""
        return f"{self.name}: {self.tokens:,} tokens in {self.blocks} blocks{of}"


def calibrated_on(parts: Sequence[Part]) -> str:
    """The blocks and tokens of each source in a line; "" for none."""
    return f"calibrated on {'; '.join(map(str, parts))}" if parts else ""


def default_mix(data: Source | Mix | None = None, blocks: int = BLOCKS) -> list[tuple[Source, int]]:
    """The (source, blocks) pairs that `data` stands for.

    data:   a user's text is read with "self" and "stdlib", in 4 : 2 : 1; None: these two alone.
            Token ids, "self" and "stdlib" are read alone, and a mix is read as it is.
    blocks: of a user's text, or of token ids; also of a source with None in place of a number,
            half of it for "self" and a quarter for "stdlib".

    Raises ValueError or TypeError naming the entry of a mix that is none.
    """
    usual: Mix = [(source, None) for source in SHARES]
    mix: Mix
    if data is None:
        mix = usual
    elif is_mix(data):
        mix = data
    elif isinstance(data, Tensor) or (isinstance(data, str) and data in SHARES):
        mix = [(data, blocks)]
    else:
        mix = [(cast("Source", data), None), *usual]
    check_mix(mix)
    return [(source, _usual(source, blocks) if n is None else n) for source, n in mix]


def _usual(source: Source, blocks: int) -> int:
    return max(1, blocks // SHARES.get(source, 1)) if isinstance(source, str) else blocks


def check_mix(mix: Any, name: str = "data") -> None:
    """Raise ValueError or TypeError, naming the entry, unless `mix` is a list of (source, blocks),
    each source once."""
    for i, entry in enumerate(mix):
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise TypeError(
                f"{name}[{i}] must be (source, blocks), as all entries of a mix, got {entry!r}"
            )
        source, blocks = entry
        is_count = isinstance(blocks, int) and not isinstance(blocks, bool) and blocks >= 1
        if blocks is not None and not is_count:
            raise ValueError(
                f"{name}[{i}] must have an int of at least 1, or None, as its number of blocks, "
                f"got {blocks!r} for {shown(source)}"
            )
        if any(is_same(source, other) for other, _ in mix[:i]):
            raise ValueError(f"{name}[{i}] is {shown(source)} again: give all its blocks at once")


def mixed_blocks(
    mix: Source | Mix | None,
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int = 512,
    part: str = "calibration",
    split: str = "train",
    seed: int = 0,
    progress: bool = True,
    column: str | None = None,
    blocks: int = BLOCKS,
) -> tuple[Tensor, list[Part]]:
    """Blocks of tokens [n, length], int64, on the CPU, of all sources, and what each one gave.

    mix, blocks: as for default_mix; a source is what token_blocks takes, or "self", the text that
            `model` writes. The blocks are interleaved in proportion: any first blocks hold all
            sources.
    part:   "calibration" takes the first blocks of a seeded permutation of a source, "recovery" the
            last ones: they share none, unless the text is too short for both, as a line on stderr
            says.
    split, column: of all texts but "stdlib" beside others, which is read in its part for training,
            and of all that have columns.

    A model that can't write leaves out a "self" that only default_mix has added, as a line on
    stderr says. Raises the errors of token_blocks and check_mix, and ValueError for sources whose
    blocks are not of one length.

        ids, parts = mixed_blocks([("my.txt", 128), ("self", 64)], model, tokenizer)
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {PARTS}, got {part!r}")
    entries = default_mix(mix, blocks)
    has_columns = any(may_have_columns(source) for source, _ in entries)
    found: list[tuple[Part, Tensor] | None] = [None] * len(entries)
    # The model writes last: a text that can't be read is refused before those minutes.
    for i in sorted(range(len(entries)), key=lambda i: entries[i][0] == SELF):
        source, count = entries[i]
        here = "train" if source == STDLIB and len(entries) > 1 else split
        if source == SELF:
            may_fail = len(entries) > 1 and not is_mix(mix)
            ids = _self_blocks(model, tokenizer, count, length, part, seed, progress, may_fail)
            if ids is None:
                continue
        else:
            # Of no table at all the first source refuses a column.
            wanted = column if may_have_columns(source) or not has_columns else None
            last = part == "recovery"
            ids = token_blocks(
                source, tokenizer, length, here, count, seed, progress, wanted, last=last
            )
        found[i] = Part(source_name(source, here), len(ids), ids.numel(), count), ids
    parts, blocks_of = zip(*filter(None, found), strict=True)
    _check_lengths(parts, blocks_of)
    return interleave(blocks_of), list(parts)


def _check_lengths(parts: Sequence[Part], blocks: Sequence[Tensor]) -> None:
    length = blocks[0].shape[1]
    for part, ids in zip(parts, blocks, strict=True):
        if ids.shape[1] != length:
            raise ValueError(
                f"{part.name} has blocks of {ids.shape[1]} tokens, and {parts[0].name} of "
                f"{length}: a mix has one length"
            )


def interleave(blocks: Sequence[Tensor]) -> Tensor:
    """[n, L] of each source -> all rows [sum of n, L], each source's in order and spread evenly."""
    places = [(torch.arange(len(rows), device="cpu") + 0.5) / len(rows) for rows in blocks]
    return torch.cat(list(blocks))[torch.cat(places).argsort(stable=True)]


def _self_blocks(
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    length: int,
    part: str,
    seed: int,
    progress: bool,
    may_fail: bool,
) -> Tensor | None:
    """The model's own text; None where it can't write and `may_fail`."""
    from hylora_kernels.text.self_text import self_blocks  # transformers: --help needs neither.

    if model is None or tokenizer is None:
        raise ValueError(f"{SELF!r} is text that a model writes: give the model and its tokenizer")
    check_context(model, length)
    try:
        return self_blocks(model, tokenizer, count, length, part, seed, progress)
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # A model's own generation may fail in any way.
        if not may_fail:
            raise
        note(f"{SELF}: left out, since the model can't write: {type(error).__name__}: {error}")
        return None
