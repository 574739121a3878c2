"""breadth(): a model's perplexity on several texts beside its dense model's.

A model that was compressed on one kind of text loses the others, which one perplexity hides.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hylora_kernels.evaluation.perplexity import Perplexity, perplexity
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks, vocabulary_size
from hylora_kernels.model.load import load_model, tokenizer_for
from hylora_kernels.model.modules import is_offloaded, model_fingerprint
from hylora_kernels.support.cache import (
    cache_dir,
    cache_root,
    kept_if_possible,
    load_tensors,
    save_tensors,
)
from hylora_kernels.support.console import format_ppl, table
from hylora_kernels.support.devices import floating_dtype, input_device
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.plots import ratio_plot
from hylora_kernels.support.report import Report
from hylora_kernels.text.blocks import token_blocks
from hylora_kernels.text.self_text import self_blocks
from hylora_kernels.text.sources import SELF, Source, may_have_columns

if TYPE_CHECKING:
    from rich.table import Table

BLOCKS = 8  # Of each text, unless another limit is given.


@dataclass(frozen=True)
class TextQuality(Perplexity):
    """The perplexity on one text.

    name:      of the text.
    dense_ppl: the dense model's, on the same tokens. ratio: ppl / dense_ppl. None without one.
    """

    name: str
    dense_ppl: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class BreadthReport(Report):
    """The result of breadth().

    split:          the part of each text that was read.
    dense:          name of the dense model; None without one.
    geometric_mean: of the ratios of all texts. worst: name of the text with the largest. Both None
                    without a dense model.
    """

    texts: list[TextQuality]
    split: str
    dense: str | None = None
    geometric_mean: float | None = None
    worst: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BreadthReport:
        """The report of what to_dict() gave."""
        return cls(**values | {"texts": [TextQuality(**text) for text in values["texts"]]})

    def render(self) -> Table:
        """A rich table, a row for each text, the geometric mean and the worst last."""
        rows: list[tuple[object, ...]] = [
            (t.name, t.tokens, format_ppl(t.dense_ppl), format_ppl(t.ppl), format_ratio(t.ratio))
            for t in self.texts
        ]
        title = "perplexity by text"
        if self.dense is not None:
            title += f", beside {self.dense}"
            rows.append(("geometric mean", "", "", "", format_ratio(self.geometric_mean)))
            worst = max(text.ratio for text in self.texts if text.ratio is not None)
            rows.append((f"worst: {self.worst}", "", "", "", format_ratio(worst)))
        return table(title, ("text", "tokens", "dense", "this model", "ratio"), rows)

    def plot(self, path: str | Path) -> None:
        """Draw a bar for each text: its ratio to the dense model's perplexity, which is marked.

        Raises ValueError without a dense model.
        """
        if self.geometric_mean is None:
            raise ValueError("dense must be given for a picture of ratios to the dense model")
        found = {t.name: (t.ratio, t.ppl) for t in self.texts if t.ratio is not None}
        ratio_plot(found, self.geometric_mean, path, f"Perplexity / that of {self.dense}")


def breadth(
    model: nn.Module,
    texts: Mapping[str, Source] | Sequence[Source],
    dense: nn.Module | str | Path | BreadthReport | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 512,
    limit: int | None = BLOCKS,
    split: str = "test",
    batch: int = 4,
    progress: bool = True,
    column: str | None = None,
) -> BreadthReport:
    """Perplexity of a causal language model on each of several texts, on its device.

    texts:  sources as token_blocks takes them, or "self", which the dense model writes; a mapping
            gives them names. Of each the part `split` is measured.
    dense:  the model that was compressed: a module, or a hub id or folder, which is loaded to the
            device and in the dtype of `model`, measured, and freed before `model` is measured. Its
            perplexities are kept in the cache. Or breadth()'s own report of it, on the same texts.
    limit:  most blocks of each text; None: all, and of "self" 8.
    column: of those texts that are tables.

    tokenizer, length, batch: as for evaluate().

    Raises ValueError naming the argument, FloatingPointError naming the text and the block whose
    loss is not finite.

    Example:
        report = breadth(model, ["brown", "python-docs", "self"], dense="my-org/my-model")
        report.geometric_mean, report.worst, report.texts[0].ratio
    """
    check_model(model, "evaluate")
    sources = _named(texts)
    own = {name: source for name, source in sources.items() if _is_self(source)}
    others = {name: source for name, source in sources.items() if name not in own}
    read = partial(
        text_blocks,
        tokenizer=tokenizer, length=length, limit=limit, split=split, progress=progress,
        column=column,
    )  # fmt: skip
    blocks = read(model, others) if others else {}  # Before a dense model is loaded.
    loaded = None
    if dense is not None and not isinstance(dense, BreadthReport):
        loaded = _loaded(dense, model)
    if own:
        blocks |= read(model if loaded is None else loaded, own)
    expected: dict[str, Perplexity] = {}
    if loaded is not None:
        key = None if is_offloaded(loaded) else model_fingerprint(loaded)
        expected = {n: _kept(loaded, key, n, blocks[n], batch, progress) for n in sources}
    elif isinstance(dense, BreadthReport):
        expected = {text.name: text for text in dense.texts}
        if expected.keys() != blocks.keys():
            raise ValueError(f"dense was measured on {[*expected]}, not on {[*sources]}")
    del loaded
    gc.collect()  # A dense model that was loaded here is gone before `model` is measured.
    found = {name: perplexity(model, blocks[name], batch, progress, name) for name in sources}
    return compare(found, expected, split, None if dense is None else _name_of(dense))


def text_blocks(
    dense: nn.Module,
    texts: Mapping[str, Source] | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 512,
    limit: int | None = BLOCKS,
    split: str = "test",
    progress: bool = True,
    column: str | None = None,
) -> dict[str, Tensor]:
    """name -> token ids int64 [n, L] of the texts that breadth() measures, on the CPU.

    dense: the model that writes "self". The other arguments, and the errors, are breadth()'s.
    """
    sources, blocks = _named(texts), dict[str, Tensor]()
    if any(map(_is_self, sources.values())) and _is_compressed(dense):
        raise ValueError(
            "texts: 'self' is what the dense model writes, and this model is compressed: give the "
            "dense model with dense=NAME, or leave 'self' out"
        )
    tokenizer = tokenizer_for(dense, tokenizer, sources.values())
    for name in sorted(sources, key=lambda name: _is_self(sources[name])):  # What takes long, last.
        source = sources[name]
        wanted = column if may_have_columns(source) else None
        try:
            if _is_self(source):
                assert tokenizer is not None, "'self' is no tensor"
                count = BLOCKS if limit is None else limit
                ids = self_blocks(dense, tokenizer, count, length, "test", progress=progress)
            else:
                ids = token_blocks(source, tokenizer, length, split, limit, None, progress, wanted)
            check_blocks(dense, ids)
        except (ValueError, TypeError) as error:
            raise type(error)(f"texts[{name!r}]: {error}") from error
        blocks[name] = ids
    return {name: blocks[name] for name in sources}


def format_ratio(ratio: float | None) -> str:
    """ "1.21"; None as "-"."""
    return "-" if ratio is None else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.3g}"


def compare(
    found: Mapping[str, Perplexity],
    expected: Mapping[str, Perplexity],
    split: str,
    dense: str | None = None,
) -> BreadthReport:
    """The report of text -> the model's perplexity, beside the dense model's, {} without one."""
    texts, losses = [], {}
    for name, quality in found.items():
        own = {field.name: getattr(quality, field.name) for field in fields(Perplexity)}
        if name in expected:
            losses[name] = quality.nll - expected[name].nll
            own |= {"dense_ppl": expected[name].ppl, "ratio": math.exp(losses[name])}
        texts.append(TextQuality(**own, name=name))
    if not losses:
        return BreadthReport(texts, split)
    mean = math.exp(sum(losses.values()) / len(losses))
    return BreadthReport(texts, split, dense, mean, max(losses, key=losses.__getitem__))


# ------------------------------------------------------------------------------------------- texts


def _named(texts: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """name -> source. Raises ValueError for no text and for one given twice."""
    if isinstance(texts, str | Path | Tensor):
        raise TypeError(f"texts must be a list of sources, or a dict of named ones, got {texts!r}")
    if isinstance(texts, Mapping):
        pairs = list(texts.items())
    else:
        pairs = [(_name_of_text(source, place), source) for place, source in enumerate(texts)]
    if not pairs:
        raise ValueError("texts must be at least one source, got none")
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"texts must differ, got {twice!r} twice")
    return dict(pairs)


def _name_of_text(source: Source, place: int) -> str:
    return str(source) if isinstance(source, str | Path) else f"text {place + 1}"


def _is_self(source: Source) -> bool:
    return isinstance(source, str) and source == SELF


# ------------------------------------------------------------------------------------- dense model


def _loaded(dense: nn.Module | str | Path, model: nn.Module) -> nn.Module:
    """The dense model, checked; one given by its name is loaded as `model` is."""
    if isinstance(dense, str | Path):
        dense, _ = load_model(dense, input_device(model), floating_dtype(model))
    check_model(dense, "evaluate", "dense")
    words, known = vocabulary_size(model), vocabulary_size(dense)
    if words != known:
        raise ValueError(f"dense must know the model's {words} tokens, not {known}")
    return dense


def _is_compressed(model: nn.Module) -> bool:
    return any(isinstance(module, SVDLoRALinear) for module in model.modules())


def _name_of(dense: nn.Module | str | Path | BreadthReport) -> str:
    if isinstance(dense, BreadthReport):
        return dense.dense or "the dense model"
    if isinstance(dense, str | Path):
        return str(dense)
    return getattr(dense, "name_or_path", "") or type(dense).__name__


def _kept(
    dense: nn.Module, key: str | None, name: str, ids: Tensor, batch: int, progress: bool
) -> Perplexity:
    """The dense model's perplexity on a text, from the cache if it was measured before.

    key: the model's fingerprint; without one nothing is kept.
    """
    if key is None:
        return perplexity(dense, ids, batch, progress, f"dense, {name}")
    file = fingerprint(model=key, ids=ids)
    path = cache_root() / "perplexity" / f"{file}.safetensors"
    kept = load_tensors(path, file)
    if kept is not None:
        mean = float(kept["nll"])
        return Perplexity(math.exp(mean), mean, ids[:, 1:].numel(), *ids.shape)
    quality = perplexity(dense, ids, batch, progress, f"dense, {name}")
    with kept_if_possible("perplexity"):
        nll = torch.tensor(quality.nll, dtype=torch.float64, device="cpu")
        save_tensors(cache_dir("perplexity") / path.name, {"nll": nll}, file)
    return quality
