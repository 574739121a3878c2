"""The cache of a decoder that is computed whole: all keys and values in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hylora_kernels.backends.shared.decoder_form import DecoderForm
from hylora_kernels.model.cache import ReservedLayer


class KeyValues:
    """Keys and values of each block, for `capacity` tokens of each of `sequences` sequences.

    numbers: [blocks][keys, values][sequences][heads][capacity][size], in one dim.
    """

    def __init__(self, form: DecoderForm, sequences: int, capacity: int, dtype: torch.dtype):
        self.form, self.sequences, self.capacity = form, sequences, capacity
        cached = sum(b.k.count * (b.k.size + b.v.size) for b in form.blocks)
        with torch.inference_mode(False):  # later calls may be outside of it, and write as well
            self.numbers = torch.empty(cached * sequences * capacity, dtype=dtype, device="cpu")

    def to(self, dtype: torch.dtype) -> KeyValues:
        """A copy in another dtype."""
        copied = KeyValues(self.form, self.sequences, self.capacity, dtype)
        copied.numbers.copy_(self.numbers)
        return copied

    def grown(self, capacity: int, filled: int) -> KeyValues:
        """Memory for `capacity` tokens that holds the first `filled` ones."""
        grown = KeyValues(self.form, self.sequences, capacity, self.numbers.dtype)
        for old, new in zip(self.blocks(), grown.blocks(), strict=True):
            for before, behind in zip(old, new, strict=True):
                behind[:, :, :filled] = before[:, :, :filled]
        return grown

    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) [sequences, heads, capacity, size] of each block."""
        found, at = [], 0
        for block in self.form.blocks:
            pair = []
            for heads in (block.k, block.v):
                shape = (self.sequences, block.k.count, self.capacity, heads.size)
                size = torch.Size(shape).numel()
                pair.append(self.numbers[at : at + size].view(shape))
                at += size
            found.append((pair[0], pair[1]))
        return found

    def cache(self, rows: int, filled: int) -> Cache:
        """A cache of transformers on this memory, with `filled` tokens of `rows` sequences."""
        layers = [ReservedLayer.of(k[:rows], v[:rows], filled) for k, v in self.blocks()]
        return Cache(layers=layers)
