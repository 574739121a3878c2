"""A table of perplexity and size over keeps (or plain ranks) and adapter ranks.

Each finished cell is a file: an interrupted sweep goes on, and a larger one only adds what is new.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.compress import compress
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.load import load_model, tokenizer_of
from hylora_kernels.recovery.finetune import finetune
from hylora_kernels.support.console import format_bytes, format_ppl, table
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.plots import sweep_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import token_blocks


@dataclass(frozen=True)
class Cell(Report):
    """One model of the table, adapters merged, except for `params_as_is`, with separate adapters.

    keep_asked: None for the dense model and for plain ranks; rank: None for keeps.
    kept, removed, params_linear: of the selected linears, biases excluded.
    trainable: the adapters' parameters, before they were merged.
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
    """tokens: how many predictions each perplexity is over, in blocks of `length`."""

    model: str
    data: str
    length: int
    tokens: int
    options: dict
    dense: Cell
    cells: list[Cell]

    def render(self):
        """A rich table, the dense model first."""
        headings = ("keep", "LoRA rank", "kept", "removed", "linears", "all", "separate", "memory")
        title = f"{self.model}: perplexity over {self.tokens:,} tokens of {self.data}"
        rows = [_row(cell) for cell in (self.dense, *self.cells)]
        first = "rank" if self.cells[0].rank is not None else "keep"
        columns = (first, *headings[1:], "trainable", "steps", "perplexity")
        return table(f"{title}, blocks of {self.length}", columns, rows)


def sweep(
    model: nn.Module | str | Path,
    output_dir: str | Path,
    keep: Sequence[float] = (0.9, 0.8, 0.6),
    lora_rank: Sequence[int] = (0, 16, 64),
    rank: Sequence[int] | None = None,
    data="brown",
    calibration="brown",
    tokenizer=None,
    length: int = 512,
    samples: int = 128,
    limit: int | None = 16,
    steps: int = 0,
    device="auto",
    dtype="auto",
    seed: int = 0,
    progress: bool = True,
    **options,
) -> SweepReport:
    """Compress to every keep (or, where `rank` is given, every layer to rank r + ra) with every
    adapter rank, recover the cells with adapters by `steps` of training if asked, merge, evaluate.

    output_dir: takes cells/*.json, sweep.json and sweep.png. A cell is taken from its file where
                all that decides it is the same: weights, tokens, options, the package's version.
    data:       at most `limit` blocks of its test split to evaluate on; training on the other.
    options:    of compress(), e.g. method, ranks, form, refit.

    The given model is left as it is.
    """
    folder, fresh = Path(output_dir), _fresh(model, device, dtype)
    dense, found = fresh()
    if tokenizer is None and isinstance(model, nn.Module) and not isinstance(data, Tensor):
        tokenizer = tokenizer_of(dense)
    read = functools.partial(token_blocks, tokenizer=tokenizer or found, length=length)
    needs_calibration = options.get("method") != "svd"
    texts = {
        "test": read(data, split="test", limit=limit),
        "calibration": read(calibration, limit=samples, seed=seed) if needs_calibration else None,
        "training": read(data, limit=steps, seed=seed) if steps else None,
    }
    decides = {"seed": seed, "steps": steps, "options": options}
    decides["version"] = importlib.metadata.version("hylora-kernels")
    base = fingerprint(model=dense, **decides, **texts)
    del dense
    by = "keep" if rank is None else "rank"
    wanted = [{by: value, "lora_rank": ra} for value in rank or keep for ra in lora_rank]
    if not wanted:
        raise ValueError("keep (or rank) and lora_rank must each have at least one value")
    cells = []
    for place in tqdm([{}, *wanted], desc="sweep", unit="cell", disable=not progress):
        file = folder / "cells" / f"{fingerprint(base=base, **place)}.json"
        if not file.exists():
            start = time.perf_counter()
            made = _cell(fresh()[0], place, texts, steps, seed, options, progress)
            Cell(**made, seconds=time.perf_counter() - start).save(file)
        cells.append(Cell(**json.loads(file.read_text(encoding="utf-8"))))
    report = SweepReport(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        data=str(data) if isinstance(data, str | Path) else type(data).__name__,
        length=texts["test"].shape[1],
        tokens=texts["test"][:, 1:].numel(),
        options=options | {"samples": samples, "steps": steps, "seed": seed},
        dense=cells[0],
        cells=cells[1:],
    )
    report.save(folder / "sweep.json")
    _plot(report, folder / "sweep.png")
    return report


def _fresh(model, device, dtype) -> Callable[[], tuple]:
    """A function that gives the dense model anew, and its tokenizer or None."""
    if isinstance(model, nn.Module):
        return lambda: (copy.deepcopy(model), None)
    return lambda: load_model(model, device, dtype)


def _cell(model, place: dict, texts: dict, steps: int, seed: int, options: dict, progress) -> dict:
    if place:
        options = dict(options)
        if "rank" in place:
            options["ranks"] = {".*": place["rank"]}
        elif "keep" in place:
            options["keep"] = place["keep"]
        compress(
            model,
            calibration=texts["calibration"],
            lora_rank=place["lora_rank"],
            samples=len(texts["calibration"]) if texts["calibration"] is not None else 1,
            seed=seed,
            progress=progress,
            **options,
        )
    separate, trainable = model_size(model), adapter_count(model)
    trained = bool(steps and trainable)
    if trained:
        finetune(model, texts["training"], steps=steps, merge=False, seed=seed, progress=progress)
    size = model_size(merge_adapters(model))
    return {
        "keep_asked": place.get("keep"),
        "rank": place.get("rank"),
        "lora_rank": place.get("lora_rank", 0),
        "kept": size.linears.keep_merged,
        "removed": size.linears.removed_merged,
        "params_linear": size.linears.merged,
        "params_total": size.parameters,
        "params_as_is": separate.parameters,
        "bytes_total": size.resident_bytes,
        "trainable": trainable,
        "steps": steps if trained else 0,
        "ppl": perplexity(model, texts["test"], progress=progress).ppl,
    }


def adapter_count(model: nn.Module) -> int:
    """Parameters of all A and B."""
    layers = (m for m in model.modules() if isinstance(m, SVDLoRALinear) and m.A is not None)
    return sum(layer.A.numel() + layer.B.numel() for layer in layers)


def _row(cell: Cell) -> tuple:
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
