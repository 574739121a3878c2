"""The blocks of tokens that finetune() trains on."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.load import tokenizer_for
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.text.mix import Part, default_mix, mixed_blocks
from hylora_kernels.text.sources import Mix, Source, is_mix


def training_blocks(
    model: nn.Module, dense: nn.Module | None, options: FinetuneOptions, processes: int, shown: bool
) -> tuple[Tensor, list[Part]]:
    """(int64 [n, L] on the CPU in the order in which the steps take them, what each source gave).

    dense: writes the text "self". processes: of `accelerate launch`. shown: print progress.

    n is what the steps take, or fewer if there are fewer: then they are taken over and over. Of a
    text they are blocks that compress() with the same seed does not calibrate on.
    """
    o = options
    needed = o.steps * o.batch * o.accumulate * processes
    mix = training_mix(o.data, o.objective, needed)
    tokenizer = tokenizer_for(model, o.tokenizer, (source for source, _ in mix))
    blocks, parts = mixed_blocks(
        mix, dense, tokenizer, o.length, "recovery", o.split, o.seed, shown, o.column
    )
    check_blocks(model, blocks)
    generator = torch.Generator("cpu").manual_seed(o.seed)
    order = torch.randperm(len(blocks), generator=generator, device="cpu")
    return blocks[order[:needed]], parts


def training_mix(data: Source | Mix, objective: str, needed: int) -> list[tuple[Source, int]]:
    """The sources and the blocks of each, together `needed` or fewer.

    "keep" reads a text with the others of default_mix, as calibration does. Token ids are taken as
    they are, a mix as well, a larger one in proportion.
    """
    if isinstance(data, Tensor):
        return [(data, len(data))]
    alone = objective == "adapt" and not is_mix(data)
    mix = [(data, needed)] if alone else default_mix(data, needed)
    ends = list(accumulate((n for _, n in mix), initial=0))
    scale = min(1.0, needed / ends[-1])
    counts = [round(end * scale) - round(start * scale) for start, end in pairwise(ends)]
    return [(source, n) for (source, _), n in zip(mix, counts, strict=True) if n]
