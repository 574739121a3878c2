"""Evaluation: perplexity, true size and speed of a causal language model, dense or compressed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.evaluation.perplexity import Perplexity, perplexity
from hylora_kernels.evaluation.size import ModelSize, model_size
from hylora_kernels.evaluation.speed import Throughput, throughput
from hylora_kernels.model.context import context_length
from hylora_kernels.model.load import tokenizer_of
from hylora_kernels.support.console import format_bytes, format_ppl, kept_removed, table
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.sources import source_name

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class EvaluateReport(Report):
    data: str
    split: str
    perplexity: Perplexity
    size: ModelSize
    speed: Throughput | None

    def render(self) -> Table:
        """A rich table."""
        size, quality = self.size, self.perplexity
        rows = [
            ("perplexity", format_ppl(quality.ppl)),
            (
                "tokens counted",
                f"{quality.tokens:,} in {quality.blocks} blocks of {quality.length}",
            ),
            ("parameters", size.parameters),
            ("trainable parameters", size.trainable),
            ("in memory", format_bytes(size.resident_bytes)),
            ("files", None if size.file_bytes is None else format_bytes(size.file_bytes)),
        ]
        for name, kept in (("linears", size.linears), ("whole model", size.model)):
            rows.append((name, f"{kept.merged:,}: {kept_removed(kept.keep_merged)}"))
            if kept.as_is != kept.merged:
                rows.append(
                    (
                        f"{name}, adapters separate",
                        f"{kept.as_is:,}: {kept_removed(kept.keep_as_is)}",
                    )
                )
        if self.speed is not None:
            how = ", optimized" if self.speed.optimized else ""
            rows.append((f"prefill tokens/s{how}", self.speed.prefill_tok_s))
            rows.append((f"decode tokens/s{how}", self.speed.decode_tok_s))
        return table(f"{self.data} ({self.split})", ("", "value"), rows)


def evaluate(
    model: nn.Module,
    data: Tensor | list[str] | str | Path = "brown",
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 2048,
    limit: int | None = None,
    split: str = "test",
    batch: int = 4,
    speed: bool = True,
    path: str | Path | None = None,
    progress: bool = True,
    optimize: bool = False,
) -> EvaluateReport:
    """Perplexity on `data`, size and, if wanted, speed.

    data, tokenizer: as for data.token_blocks, the tokenizer by default the model's own; a
           LongTensor [n, L] brings its own length.
    limit: at most so many blocks.
    path:  the folder the model was loaded from or saved to, for its bytes on disk.
    optimize: the speed is that of the model laid out by optimize_for_inference, which is undone:
           the same bits in new Parameter objects, which an optimizer made before doesn't know.
    """
    if tokenizer is None and not isinstance(data, Tensor):
        tokenizer = tokenizer_of(model)
    blocks = token_blocks(data, tokenizer, length, split, limit, progress=progress)
    quality = perplexity(model, blocks, batch, progress)
    size, most = model_size(model, path), context_length(model)
    prompt_tokens = 128 if most is None else max(1, min(128, most - 33))
    timed = throughput(model, prompt_tokens, 32, optimize=optimize) if speed else None
    return EvaluateReport(source_name(data), split, quality, size, timed)


# -------------------------------------------------------------------------------------------- speed
