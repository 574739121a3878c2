"""sweep(): a table of perplexity and size over keeps (or ranks) and adapter ranks."""

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
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.experiments.options import SweepOptions
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.load import load_model, tokenizer_of
from hylora_kernels.recovery.finetune import finetune
from hylora_kernels.support.console import format_bytes, format_ppl, table
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.options import reported_options, takes_options
from hylora_kernels.support.plots import sweep_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import hold_out, token_blocks
from hylora_kernels.text.sources import held_out, may_have_columns, source_name

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
    seconds: float


@dataclass(frozen=True)
class SweepReport(Report):
    """The result of sweep(). tokens: predictions behind each perplexity, in blocks of `length`."""

    model: str
    data: str
    length: int
    tokens: int
    options: dict
    dense: Cell
    cells: list[Cell]

    def render(self) -> Table:
        """A rich table, the dense model first."""
        columns = (
            "keep" if self.cells[0].rank is None else "rank",
            *("LoRA rank", "kept", "removed", "linears", "all", "separate", "memory"),
            *("trainable", "steps", "perplexity"),
        )
        title = f"{self.model}: perplexity over {self.tokens:,} tokens of {self.data}"
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
    texts = _token_blocks(dense, model, found, options)
    base = fingerprint(
        model=dense,
        options=reported_options(options),
        version=importlib.metadata.version("hylora-kernels"),
        **texts,
    )
    del dense
    cells = []
    bar = tqdm(_grid(options), desc="sweep", unit="cell", disable=not options.progress)
    for asked in bar:
        file = folder / "cells" / f"{fingerprint(base=base, **asked)}.json"
        if not file.exists():
            start = time.perf_counter()
            measured = _cell(load()[0], asked, texts, options)
            Cell(**measured, seconds=time.perf_counter() - start).save(file)
        cells.append(Cell(**json.loads(file.read_text(encoding="utf-8"))))
    report = SweepReport(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        data=source_name(*held_out(options.test, options.data, options.calibration)),
        length=texts["test"].shape[1],
        tokens=texts["test"][:, 1:].numel(),
        options=reported_options(options),
        dense=cells[0],
        cells=cells[1:],
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


def _token_blocks(
    dense: nn.Module,
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    options: SweepOptions,
) -> dict[str, Tensor | None]:
    """Token ids [n, L] for "test", "calibration" and "training"; None where not needed."""
    if options.tokenizer is not None:
        tokenizer = options.tokenizer
    elif isinstance(model, nn.Module) and not isinstance(options.data, Tensor):
        tokenizer = tokenizer_of(dense)
    o = options

    def read(data: Any, split: str, limit: int | None, seed: int | None) -> Tensor:
        column = o.column if may_have_columns(data) else None
        return token_blocks(data, tokenizer, o.length, split, limit, seed, o.progress, column)

    test, part = held_out(o.test, o.data, o.calibration)
    data, rest = o.data, None
    if test is data and o.steps and not isinstance(data, str | Path):
        data, rest = hold_out(read(data, "all", None, None))
    texts: dict[str, Tensor | None] = dict.fromkeys(("test", "calibration", "training"))
    texts["test"] = read(test if rest is None else rest, part, o.limit, None)
    if o.method != "svd":
        texts["calibration"] = read(o.calibration, "train", o.samples, o.seed)
    if o.steps:
        texts["training"] = read(data, "train", o.steps, o.seed)
    for blocks in texts.values():
        if blocks is not None:
            check_blocks(dense, blocks)
    return texts


def _grid(options: SweepOptions) -> list[dict[str, float]]:
    """The arguments that differ between cells; the first cell is the dense model's and has none."""
    name, values = ("keep", options.keep) if options.rank is None else ("rank", options.rank)
    return [{}, *({name: value, "lora_rank": ra} for value in values for ra in options.lora_rank)]


def _cell(model: nn.Module, asked: dict, texts: dict, options: SweepOptions) -> dict:
    """Make a cell's model of the dense one and measure it: the fields of Cell but `seconds`."""
    if asked:
        arguments = options.for_compress() | asked
        if "rank" in asked:
            arguments["ranks"] = {".*": arguments.pop("rank")}
        ids = texts["calibration"]
        compress(model, calibration=ids, samples=1 if ids is None else len(ids), **arguments)
    separate, trainable = model_size(model), adapter_count(model)
    trained = bool(options.steps and trainable)
    if trained:
        finetune(
            model,
            texts["training"],
            steps=options.steps,
            merge=False,
            seed=options.seed,
            progress=options.progress,
        )
    size = model_size(merge_adapters(model))
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
        "ppl": perplexity(model, texts["test"], progress=options.progress).ppl,
    }


def adapter_count(model: nn.Module) -> int:
    """Parameters of all A and B."""
    layers = (m for m in model.modules() if isinstance(m, SVDLoRALinear) and m.A is not None)
    return sum(layer.A.numel() + layer.B.numel() for layer in layers)


def _row(cell: Cell) -> tuple[str | int, ...]:
    asked = cell.rank if cell.rank is not None else cell.keep_asked
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
        format_ppl(cell.ppl),
    )


def _plot(report: SweepReport, path: Path) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for cell in report.cells:
        series.setdefault(f"LoRA rank {cell.lora_rank}", []).append((cell.kept, cell.ppl))
    sweep_plot(series, path, "kept share of the linears", report.dense.ppl, report.model)
