"""evaluate(): perplexity on a text or several, true size, and speed of a model, in one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.evaluation.breadth import BLOCKS, BreadthReport, breadth
from hylora_kernels.evaluation.perplexity import Perplexity, perplexity
from hylora_kernels.evaluation.size import ModelSize, model_size
from hylora_kernels.evaluation.speed import Throughput, prompt_that_fits, throughput
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks, context_length
from hylora_kernels.model.load import tokenizer_for
from hylora_kernels.support.console import format_bytes, format_ppl, kept_removed, table
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.sources import Source, held_out, shown, source_name

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass
class EvaluateReport(Report):
    """The result of evaluate().

    data:         name of the text, and the part of it that was read; of several texts the first.
    split:        that part's name.
    perplexity:   on that text.
    speed:        None if it was not measured.
    not_measured: what failed -> why. It costs nothing else that was measured.
    breadth:      of several texts, or beside a dense model; else None.
    """

    data: str
    split: str
    perplexity: Perplexity
    size: ModelSize
    speed: Throughput | None
    not_measured: dict[str, str] = field(default_factory=dict)
    breadth: BreadthReport | None = None

    def render(self) -> Table | Group:
        """A rich table, after that of the texts if there are several."""
        size, quality = self.size, self.perplexity
        rows: list[tuple[str, object]] = []
        if self.breadth is None:
            counted = f"{quality.tokens:,} in {quality.blocks} blocks of {quality.length}"
            rows += [("perplexity", format_ppl(quality.ppl)), ("tokens counted", counted)]
        rows += [
            ("parameters", size.parameters),
            ("trainable parameters", size.trainable),
            ("in memory", format_bytes(size.resident_bytes)),
            ("files", None if size.file_bytes is None else format_bytes(size.file_bytes)),
        ]
        for name, kept in (("linears", size.linears), ("whole model", size.model)):
            rows.append((name, f"{kept.merged:,}: {kept_removed(kept.keep_merged)}"))
            if kept.as_is != kept.merged:
                separate = f"{kept.as_is:,}: {kept_removed(kept.keep_as_is)}"
                rows.append((f"{name}, adapters separate", separate))
        if self.speed is not None:
            how = ", optimized" if self.speed.optimized else ""
            rows.append((f"prefill tokens/s{how}", self.speed.prefill_tok_s))
            rows.append((f"decode tokens/s{how}", self.speed.decode_tok_s))
            rows.append(("decoded by", self.speed.runtime))
        rows += [(name, f"not measured: {why}") for name, why in self.not_measured.items()]
        if self.breadth is None:
            return table(self.data, ("", "value"), rows)
        from rich.console import Group

        return Group(self.breadth.render(), table("size and speed", ("", "value"), rows))


def evaluate(
    model: nn.Module,
    data: Tensor | list[str] | str | Path = "brown",
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int | None = None,
    limit: int | None = None,
    split: str = "test",
    batch: int = 4,
    speed: bool = True,
    path: str | Path | None = None,
    progress: bool = True,
    optimize: bool = False,
    column: str | None = None,
    test: Tensor | list[str] | str | Path | None = None,
    texts: Mapping[str, Source] | Sequence[Source] | None = None,
    dense: nn.Module | str | Path | None = None,
) -> EvaluateReport:
    """Perplexity on the held-out part of `data` (or of each of `texts`), size and speed of a causal
    language model, on its device.

    data, tokenizer, split, column: as for text.blocks.token_blocks, the tokenizer by default the
              model's own; a LongTensor [n, L] brings its own length L. Of a file the last tenth is
              measured, which compress() and finetune() do not read.
    test:     another text, which is measured whole in place of a part of `data`.
    texts:    several texts in place of `data`, "self" (which the dense model writes) among them.
    dense:    the model that was compressed, a module, hub id or folder: the report then has the
              ratio to its perplexity on each text, their geometric mean and the worst
              (evaluation.breadth.breadth).
    length:   tokens in a block; None: 2048, or what the model's context and the text allow. With
              `texts` or `dense` 512, or the model's context.
    limit:    most blocks to measure on; None: all, and with `texts` or `dense` 8 of each text.
    batch:    blocks in one forward.
    speed:    also measure tokens per second.
    path:     folder that the model was loaded from or saved to, for its bytes on disk.
    optimize: measure the speed of the model as optimize_for_inference packs it. This is undone:
              the same Parameter objects have their bits again, and an optimizer goes on with them.

    Raises ValueError naming the argument, FloatingPointError naming a block whose loss is not
    finite. A speed that can't be measured (a model without a cache, say) is noted in the report.

    Example:
        model = load_pretrained("my-folder")
        texts = ["my.txt", "python-docs"]
        report = evaluate(model, texts=texts, dense="my-org/my-model", length=64, limit=4)
        report.breadth.geometric_mean, report.size.linears.keep_merged, report.speed.decode_tok_s
    """
    check_model(model, "evaluate")
    if texts is not None:
        for name, given, default in (("data", data, "brown"), ("test", test, None)):
            if given is not default and not (isinstance(given, str) and given == default):
                raise ValueError(
                    f"{name} must be left out where texts are given, got {shown(given)}: add it to "
                    "texts"
                )
    if test is not None:
        data, split = held_out(test, data)
    context = context_length(model)
    size = model_size(model, path)  # It may refuse the path: before the long work.
    wide = None
    if texts is not None or dense is not None:
        texts = [data] if texts is None else texts
        length = min(512, context or 512) if length is None else length
        limit = BLOCKS if limit is None else limit
        wide = breadth(
            model, texts, dense, tokenizer, length, limit, split, batch, progress, column
        )
        quality: Perplexity = wide.texts[0]
        data = next(iter(texts.values() if isinstance(texts, Mapping) else texts))
    else:
        tokenizer = tokenizer_for(model, tokenizer, [data])
        longest = min(2048, context or 2048)
        blocks = token_blocks(
            data, tokenizer, length, split, limit, None, progress, column, longest
        )
        check_blocks(model, blocks)
        quality = perplexity(model, blocks, batch, progress)
    report = EvaluateReport(source_name(data, split), split, quality, size, None, breadth=wide)
    if speed:
        try:
            report.speed = throughput(model, prompt_that_fits(model), optimize=optimize)
        except Exception as error:  # A model's own forward with a cache may fail in any way.
            report.not_measured["speed"] = f"{type(error).__name__}: {error}"
    return report
