"""sweep(): a table of perplexities and sizes over keeps (or ranks) and adapter ranks."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hylora_kernels.compression.compress import compress
from hylora_kernels.evaluation.breadth import (
    BreadthReport,
    compare,
    format_ratio,
    text_blocks,
)
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.experiments.options import SweepOptions
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.load import load_model, tokenizer_for
from hylora_kernels.model.modules import model_fingerprint
from hylora_kernels.recovery.blocks import training_blocks
from hylora_kernels.recovery.finetune import finetune
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.support.console import format_bytes, format_ppl, table
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.options import reported_options, takes_options
from hylora_kernels.support.plots import sweep_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import hold_out, token_blocks
from hylora_kernels.text.mix import Part, mixed_blocks
from hylora_kernels.text.sources import held_out, may_have_columns, source_name, texts_in

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Cell(Report):
    """One model of the table, with its adapters merged.

    keep_asked:   None for the dense model and in a table over ranks.
    rank:         total rank of every layer; None in a table over keeps.
    kept, removed, params_linear: of the selected linears, without biases.
    params_as_is: parameters with separate adapters.
    bytes_total:  parameters and buffers in memory.
    trainable:    parameters of the adapters before they were merged.
    ppl:          on the first text. breadth: on all of them, beside the dense model's, which is the
                  first cell and has no ratios.
    seconds:      time to make and measure the cell.
    """

    keep_asked: float | None
    rank: int | None
    lora_rank: int
    kept: float
    removed: float
    params_linear: int
    params_total: int
    params_as_is: int
    bytes_total: int
    trainable: int
    steps: int
    ppl: float
    breadth: BreadthReport
    seconds: float


@dataclass(frozen=True)
class SweepReport(Report):
    """The result of sweep().

    data:    the first text. tokens: predictions behind its perplexity, in blocks of `length`.
    sources: the texts that all cells were calibrated on; none for method "svd".
    """

    model: str
    data: str
    length: int
    tokens: int
    options: dict
    dense: Cell
    cells: list[Cell]
    sources: list[Part]

    def render(self) -> Table:
        """A rich table, the dense model first: of one text the perplexity, of several those and
        their ratios to the dense model's."""
        names = [text.name for text in self.dense.breadth.texts]
        several = len(names) > 1
        columns = (
            "keep" if self.cells[0].rank is None else "rank",
            *("LoRA rank", "kept", "removed", "linears", "all", "separate", "memory"),
            *("trainable", "steps"),
            *((*names, "geometric mean", "worst") if several else ("perplexity",)),
        )
        title = f"{self.model}: perplexity over {self.tokens:,} tokens of {self.data}"
        if several:
            title = f"{self.model}: perplexity (ratio to dense)"
        rows = [_row(cell) for cell in (self.dense, *self.cells)]
        return table(f"{title}, blocks of {self.length}", columns, rows)


@takes_options(SweepOptions)
def sweep(model: nn.Module | str | Path, options: SweepOptions) -> SweepReport:
    """Compress a model to every keep (or rank) with every adapter rank, and evaluate each cell.

    A cell with adapters is trained for `steps` steps, if any; its perplexity is that of the model
    with merged adapters. Each finished cell is a file: an interrupted sweep continues, and a larger
    grid adds only its new cells. A given module is left unchanged.

    model: a transformers causal LM, or a hub id / local folder to load.
    """
    folder, load = Path(options.output_dir), _loader(model, options)
    dense, found = load()
    texts = _texts(dense, model, found, options)
    base = fingerprint(
        model=model_fingerprint(dense),
        options=reported_options(options),
        version=importlib.metadata.version("hylora-kernels"),
        calibration=texts.calibration,
        training=texts.training,
        **{f"test {name}": ids for name, ids in texts.test.items()},
    )
    del dense
    cells: list[Cell] = []
    bar = tqdm(_grid(options), desc="sweep", unit="cell", disable=not options.progress)
    for asked in bar:
        file = folder / "cells" / f"{fingerprint(base=base, **asked)}.json"
        if not file.exists():
            start = time.perf_counter()
            measured = _cell(load, asked, texts, options, cells[:1])
            Cell(**measured, seconds=time.perf_counter() - start).save(file)
        found = json.loads(file.read_text(encoding="utf-8"))
        cells.append(Cell(**found | {"breadth": BreadthReport.from_dict(found["breadth"])}))
    report = SweepReport(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        data=cells[0].breadth.texts[0].name,
        length=cells[0].breadth.texts[0].length,
        tokens=cells[0].breadth.texts[0].tokens,
        options=reported_options(options),
        dense=cells[0],
        cells=cells[1:],
        sources=texts.sources,
    )
    report.save(folder / "sweep.json")
    _plot(report, folder / "sweep.png")
    return report


def _loader(model: nn.Module | str | Path, options: SweepOptions) -> Callable[[], tuple]:
    """A function that returns the dense model anew, and its tokenizer or None."""
    if isinstance(model, nn.Module):
        return lambda: (copy.deepcopy(model), None)
    return lambda: load_model(
        model,
        options.device,
        options.dtype,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
    )


@dataclass(frozen=True)
class _Texts:
    """Token ids [n, L]. test: by name; calibration (of `sources`), training: None where not
    needed."""

    test: dict[str, Tensor]
    calibration: Tensor | None
    sources: list[Part]
    training: Tensor | None


def _texts(
    dense: nn.Module,
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    options: SweepOptions,
) -> _Texts:
    """What the cells read, checked before the first one."""
    o = options
    to_read = [o.data, *(texts_in(o.calibration) if o.method != "svd" else ())]
    if o.tokenizer is not None:
        tokenizer = o.tokenizer
    elif isinstance(model, nn.Module):
        tokenizer = tokenizer_for(dense, None, to_read)

    def read(data: Any, split: str, limit: int | None, seed: int | None) -> Tensor:
        column = o.column if may_have_columns(data) else None
        blocks = token_blocks(data, tokenizer, o.length, split, limit, seed, o.progress, column)
        check_blocks(dense, blocks)
        return blocks

    data, calibration, sources, training = o.data, None, [], None
    if o.texts is None:
        test, part = held_out(o.test, o.data, o.calibration)
        name = source_name(test, part)
        if test is data and o.steps and not isinstance(data, str | Path):
            data, test = hold_out(read(data, "all", None, None))
        tested = {name: read(test, part, o.limit, None)}
    if o.method != "svd":
        has_columns = any(map(may_have_columns, texts_in(o.calibration)))
        calibration, sources = mixed_blocks(
            o.calibration,
            dense,
            tokenizer,
            o.length,
            seed=o.seed,
            progress=o.progress,
            column=o.column if has_columns else None,
            blocks=o.samples,
        )
        check_blocks(dense, calibration)
    if o.steps:
        keep = {"objective": o.objective, "teacher": dense} if o.objective == "keep" else {}
        recovery = FinetuneOptions(
            data,
            tokenizer,
            steps=o.steps,
            length=o.length,
            seed=o.seed,
            column=o.column if may_have_columns(data) else None,
            **keep,
        )
        training, _ = training_blocks(dense, dense, recovery, 1, o.progress)
    if o.texts is not None:
        tested = text_blocks(
            dense, o.texts, tokenizer, o.length, o.limit, "test", o.progress, o.column
        )
    return _Texts(tested, calibration, sources, training)


def _grid(options: SweepOptions) -> list[dict[str, float]]:
    """The arguments that differ between cells; the first cell is the dense model's and has none."""
    name, values = ("keep", options.keep) if options.rank is None else ("rank", options.rank)
    return [{}, *({name: value, "lora_rank": ra} for value in values for ra in options.lora_rank)]


def _cell(
    load: Callable[[], tuple],
    asked: dict,
    texts: _Texts,
    options: SweepOptions,
    dense: list[Cell],
) -> dict:
    """Make a cell's model of the dense one and measure it: the fields of Cell but `seconds`.

    load:  returns the dense model anew, and its tokenizer or None.
    dense: the dense model's cell, or none for itself.
    """
    model = load()[0]
    if asked:
        arguments = options.for_compress() | asked
        if "rank" in asked:
            arguments["ranks"] = {".*": arguments.pop("rank")}
        ids = texts.calibration
        samples = 1 if ids is None else len(ids)
        # measure=0: the cell is measured on held-out text.
        compress(model, calibration=ids, samples=samples, measure=0, **arguments)
    separate, trainable = model_size(model), adapter_count(model)
    trained = bool(options.steps and trainable)
    if trained:
        finetune(
            model,
            texts.training,
            steps=options.steps,
            merge=False,
            seed=options.seed,
            progress=options.progress,
            objective=options.objective,
            teacher=(lambda: load()[0]) if options.objective == "keep" else None,
        )
    size = model_size(merge_adapters(model))
    found = {
        name: perplexity(model, ids, progress=options.progress, text=name)
        for name, ids in texts.test.items()
    }
    expected = {text.name: text for cell in dense for text in cell.breadth.texts}
    report = compare(found, expected, "test", "dense" if dense else None)
    return {
        "keep_asked": asked.get("keep"),
        "rank": asked.get("rank"),
        "lora_rank": asked.get("lora_rank", 0),
        "kept": size.linears.keep_merged,
        "removed": size.linears.removed_merged,
        "params_linear": size.linears.merged,
        "params_total": size.parameters,
        "params_as_is": separate.parameters,
        "bytes_total": size.resident_bytes,
        "trainable": trainable,
        "steps": options.steps if trained else 0,
        "ppl": report.texts[0].ppl,
        "breadth": report,
    }


def adapter_count(model: nn.Module) -> int:
    """Parameters of all A and B."""
    layers = (m for m in model.modules() if isinstance(m, SVDLoRALinear) and m.A is not None)
    return sum(layer.A.numel() + layer.B.numel() for layer in layers)


def _row(cell: Cell) -> tuple[str | int, ...]:
    asked = cell.rank if cell.rank is not None else cell.keep_asked
    quality, texts = [], cell.breadth.texts
    for text in texts:
        ratio = f" ({format_ratio(text.ratio)})" if len(texts) > 1 and text.ratio else ""
        quality.append(f"{format_ppl(text.ppl)}{ratio}")
    if len(texts) > 1:
        quality += [format_ratio(cell.breadth.geometric_mean), cell.breadth.worst or "-"]
    return (
        "dense" if asked is None else f"{asked:g}",
        cell.lora_rank,
        f"{cell.kept:.4f}",
        f"{cell.removed:.4f}",
        cell.params_linear,
        cell.params_total,
        cell.params_as_is,
        format_bytes(cell.bytes_total),
        cell.trainable,
        cell.steps,
        *quality,
    )


def _plot(report: SweepReport, path: Path) -> None:
    """Perplexity over the kept share; of several texts the geometric mean of their ratios, and the
    worst ratio, dashed."""
    several = len(report.dense.breadth.texts) > 1
    series: dict[str, list[tuple[float, float]]] = {}
    worst: dict[str, list[tuple[float, float]]] = {}
    for cell in report.cells:
        name, breadth = f"LoRA rank {cell.lora_rank}", cell.breadth
        value = breadth.geometric_mean if several else cell.ppl
        series.setdefault(name, []).append((cell.kept, value))
        if several:
            ratios = [text.ratio for text in breadth.texts if text.ratio is not None]
            worst.setdefault(f"{name}, worst text", []).append((cell.kept, max(ratios)))
    label = "kept share of the linears"
    if several:
        sweep_plot(series, path, label, 1.0, report.model, "perplexity / dense", worst)
    else:
        sweep_plot(series, path, label, report.dense.ppl, report.model)
