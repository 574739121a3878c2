"""What a compression starts from: the model, and the blocks of text that it is calibrated on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.model.by_block import is_by_block
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.load import load_model, tokenizer_for
from hylora_kernels.support.console import note
from hylora_kernels.support.devices import resolve_device, resolve_dtype
from hylora_kernels.support.processes import ALONE, Processes
from hylora_kernels.text.mix import SELF, Part, default_mix, mixed_blocks
from hylora_kernels.text.sources import Mix, Source, is_mix, texts_in


def load_model_and_tokenizer(
    model_or_id: nn.Module | str | Path, options: CompressOptions
) -> tuple[nn.Module, Any]:
    """(the model in eval(), its tokenizer or None)."""
    if not isinstance(model_or_id, str | Path):
        check_model(model_or_id, "replace", "model_or_id")
        device = None if options.device is None else resolve_device(options.device)
        model = model_or_id.to(device=device, dtype=resolve_dtype(options.dtype))
        return model.eval(), options.tokenizer
    model, tokenizer = load_model(
        model_or_id,
        options.device or "auto",
        options.dtype or "auto",
        trust_remote_code=options.trust_remote_code,
    )
    check_model(model, "replace", "model_or_id")
    return model.eval(), options.tokenizer or tokenizer


def calibration_blocks(
    model: nn.Module, tokenizer: Any, options: CompressOptions, processes: Processes = ALONE
) -> tuple[Tensor | None, list[Part], Any]:
    """(token ids int64 [n, L], their sources, the tokenizer that read them).

    The ids are None for method "svd". A tokenizer that is None is the model's own, where one is
    needed. The first process alone reads or writes text.
    """
    o = options
    if o.method == "svd":
        return None, [], tokenizer
    mix = o.calibration
    if is_by_block(model):
        mix = _without_own_text(mix, o.samples)
    tokenizer = tokenizer_for(model, tokenizer, texts_in(mix))
    read = partial(
        mixed_blocks,
        mix,
        model,
        tokenizer,
        o.length,
        split=o.split,
        seed=o.seed,
        progress=o.progress,
        column=o.column,
        blocks=o.samples,
    )
    ids, sources = processes.by_first(read, "reading text")
    check_blocks(model, ids)
    return ids, sources, tokenizer


def _without_own_text(mix: Source | Mix | None, blocks: int) -> Mix:
    """The sources of a mix, as default_mix() completes it, without the text that the model writes.

    Raises ValueError if the mix asks for that text by name.
    """
    entries, why = default_mix(mix, blocks), "each token of it would read the whole model"
    kept: Mix = [(source, n) for source, n in entries if source != SELF]
    if len(kept) < len(entries):
        if is_mix(mix) or mix == SELF:
            raise ValueError(f"calibration {SELF!r} can't be written block by block: {why}")
        note(f"{SELF}: left out, since {why} from its files")
    return kept
